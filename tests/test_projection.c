/* Promise 6 and the projections: what is sampled is orthogonal, of the right norm, reproducible and well spread; the
 * estimator is unbiased and its variance falls as 1/M; a calibration does what its formulas say, and helps. */
#include "check.h"
#include "call.h"

static float *matrix_make(const kernel *k)
{
    float *w = (float *)calloc((size_t)(k->rows * k->dim), sizeof(float));
    if (!w)
        abort();
    return w;
}

static void sample(const kernel *k, uint64_t seed, uint32_t flags, float *w)
{
    block p = block_make(k->projection_bytes(), 0);
    nf_calibration how;
    memset(&how, 0, sizeof how);
    how.flags = flags;
    CHECK(k->projection_init(p.data, seed, flags ? &how : NULL) == NF_OK, "projection_init");
    CHECK(k->projection_read(p.data, w) == NF_OK, "projection_read");
    CHECK(block_intact(&p), "the projection wrote beside itself");
    block_free(&p);
}

static double dot(const float *a, const float *b, int dim)
{
    double sum = 0;
    for (int d = 0; d < dim; d++)
        sum += (double)a[d] * (double)b[d];
    return sum;
}

/* ---- the sampled matrix --------------------------------------------------------------------------------------------
 */

enum { UNIFORM = NF_CHI_NORMS | NF_GRAM_SCHMIDT, ALL_WAYS = NF_CHI_NORMS | NF_GRAM_SCHMIDT | NF_SIMPLEX };

/* Every way to sample: within each block of D, rows at right angles, or at those of a simplex (cosine -1 / (D - 1)), up
 * to rounding to bf16 (2^-9 of an entry); of norm sqrt(D) unless the norms are chi; across blocks and signs no row
 * comes twice. */
TEST_LIST(angles, FAVORS)
{
    float *w = matrix_make(k);
    for (uint32_t flags = 0; flags <= ALL_WAYS; flags += NF_CHI_NORMS)
        for (uint64_t seed = 0; seed < (QUICK || flags ? 2 : 5); seed++) {
            sample(k, seed, flags, w);
            for (int r = 0; r < k->rows; r++) {
                const double norm = sqrt(dot(w + r * k->dim, w + r * k->dim, k->dim));
                CHECK(flags & NF_CHI_NORMS || fabs(norm / sqrt((double)k->dim) - 1) < 4e-3,
                      "flags %d, row %d: norm %.4f", (int)flags, r, norm);
                for (int s = r + 1; s < k->rows; s++) {
                    const float *other = w + s * k->dim;
                    const double cosine = dot(w + r * k->dim, other, k->dim) / norm / sqrt(dot(other, other, k->dim));
                    const double expected = flags & NF_SIMPLEX ? -1.0 / (k->dim - 1) : 0;
                    CHECK(r / k->dim != s / k->dim || fabs(cosine - expected) < 4e-3, "flags %d, rows %d and %d: %.4f",
                          (int)flags, r, s, cosine);
                    CHECK(fabs(cosine) < 0.999, "flags %d: rows %d and %d are the same", (int)flags, r, s);
                }
            }
        }
    free(w);
}

/* Chi norms: |w_r|^2 has the mean D and the variance 2 D of D squared normal numbers, each within 4.5 standard errors
 * (kurtosis 3 + 12 / D; a right sampler fails one of these with probability 7e-6; the seeds are fixed). */
TEST_LIST(chi_norms, FAVORS)
{
    const int seeds = (QUICK ? 400 : 4000) / k->rows + 1, n = seeds * k->rows;
    const double dim = k->dim;
    float *w = matrix_make(k);
    for (uint32_t flags = NF_CHI_NORMS; flags <= ALL_WAYS; flags += NF_GRAM_SCHMIDT) {
        double mean = 0, square = 0;
        for (int i = 0; i < n; i++) {
            if (i % k->rows == 0)
                sample(k, (uint64_t)(i / k->rows), flags, w);
            const float *row = w + i % k->rows * k->dim;
            mean += (dot(row, row, k->dim) - dim) / n;
            square += (dot(row, row, k->dim) - dim) * (dot(row, row, k->dim) - dim) / n;
        }
        CHECK(fabs(mean) < 4.5 * sqrt(2 * dim / n), "flags %d: mean off by %.3f of %.0f", (int)flags, mean, dim);
        CHECK(fabs(square / (2 * dim) - 1) < 4.5 * sqrt((2 + 12 / dim) / n), "flags %d: variance %.3f, not %.0f",
              (int)flags, square, 2 * dim);
    }
    free(w);
}

TEST_LIST(reproducible, FAVORS)
{
    const size_t bytes = (size_t)(k->rows * k->dim) * sizeof(float);
    float *a = matrix_make(k), *b = matrix_make(k);
    for (uint64_t seed = 0; seed < 20; seed++) {
        const uint32_t flags = seed < 4 ? 0 : seed % 8 * NF_CHI_NORMS;
        sample(k, seed, flags, a);
        sample(k, seed, flags, b);
        CHECK(memcmp(a, b, bytes) == 0, "seed %d twice gives two matrices", (int)seed);
        sample(k, seed + 1, flags, b);
        CHECK(memcmp(a, b, bytes) != 0, "seeds %d and %d give one matrix", (int)seed, (int)seed + 1);
        sample(k, seed | (uint64_t)1 << 63, flags, b);
        CHECK(memcmp(a, b, bytes) != 0, "the seed's high bits do not count");
        sample(k, seed, flags ^ NF_SIMPLEX, b);
        CHECK(memcmp(a, b, bytes) != 0, "the flags do not count");
    }
    free(a);
    free(b);
}

/* The bits of seed 1234, the same on every processor, compiler and flag (this test also runs emulated, and with
 * -ffast-math). A change here breaks every state and model that was made with an older header. */
TEST_LIST(golden, FAVORS)
{
    static const struct {
        const char *name;
        uint32_t flags;
        uint64_t hash;
    } table[] = {
        {"favor_cosh_f32_d64_m128", 0, 0x80728c311ec623b1},
        {"favor_exp_f32_d64_m256", 0, 0xf9298dfe010cc8a1},
        {"favor_cosh_f32_d48_m96", 0, 0x693b2468577fe42f},
        {"favor_cosh_f32_d80_m336", 0, 0xa0ef45a30e2112e8},
        {"favor_exp_f32_d256_m32", 0, 0xa7f306c427bf1a09},
        {"favor_exp_f32_d8_m8", 0, 0x0713d5558a4d8e25},
        {"favor_cosh_f32_d64_m128", NF_CHI_NORMS, 0xf5082a5756344aca},
        {"favor_cosh_f32_d64_m128", NF_GRAM_SCHMIDT, 0xa290b5ee4fc947bc},
        {"favor_cosh_f32_d64_m128", NF_SIMPLEX, 0x235eaa7fda1e693b},
        {"favor_cosh_f32_d48_m96", ALL_WAYS, 0x32d4f291b4ba3111},
        {"favor_cosh_f32_d80_m336", UNIFORM, 0x058d9b92f3f59c04},
        {"favor_exp_f32_d256_m32", ALL_WAYS, 0x41cb41f9d26891ba},
    };
    float *w = matrix_make(k);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strcmp(table[i].name, k->name) == 0) {
            uint64_t hash = 0xcbf29ce484222325u;
            sample(k, 1234, table[i].flags, w);
            for (int n = 0; n < k->rows * k->dim; n++) {
                uint32_t bits;
                memcpy(&bits, w + n, sizeof bits);
                hash = (hash ^ (bits >> 16)) * 0x100000001b3u;
            }
            CHECK(hash == table[i].hash, "%s: the matrix of seed 1234, flags %d has the hash 0x%016llx", k->name,
                  (int)table[i].flags, (unsigned long long)hash);
        }
    free(w);
}

/* w_r . u over seeds, for a direction u (random, an axis, the diagonal): mean 0 and variance 1 within 4.5 standard
 * errors (a right sampler fails one of these with probability 7e-6; the seeds are fixed), fourth moment near that of a
 * sphere, 3 D / (D + 2) (20 %; along the axis and the diagonal and in few dimensions a rotation of signs has few
 * values), or of normal numbers, 3. Where every rotation is equally likely it too within 4.5 standard errors. */
static void moments_along(const kernel *k, uint32_t flags, const float *u, double spread)
{
    const int seeds = QUICK ? 60 : flags & NF_GRAM_SCHMIDT ? 150 : 400;
    float *w = matrix_make(k);
    const double fourth = flags & NF_CHI_NORMS ? 3 : 3.0 * k->dim / (k->dim + 2);
    double m1 = 0, m2 = 0, m4 = 0, s1 = 0, s2 = 0, s4 = 0;
    for (int seed = 0; seed < seeds; seed++) {
        double x1 = 0, x2 = 0, x4 = 0;
        sample(k, (uint64_t)seed, flags, w);
        for (int r = 0; r < k->rows; r++) {
            const double x = dot(w + r * k->dim, u, k->dim);
            x1 += x / k->rows;
            x2 += x * x / k->rows;
            x4 += x * x * x * x / k->rows;
        }
        m1 += x1 / seeds, s1 += x1 * x1 / seeds;
        m2 += x2 / seeds, s2 += x2 * x2 / seeds;
        m4 += x4 / seeds, s4 += x4 * x4 / seeds;
    }
    s1 = sqrt((s1 - m1 * m1) / seeds);
    s2 = sqrt(fmax(s2 - m2 * m2, 0) / seeds) + 1e-4; /* whole blocks have no variance but rounding */
    CHECK(fabs(m1) < 4.5 * s1, "mean %.4f, %.1f standard errors", m1, m1 / s1);
    CHECK(fabs(m2 - 1) < 4.5 * s2, "variance %.4f, %.1f standard errors off", m2, (m2 - 1) / s2);
    s4 = sqrt((s4 - m4 * m4) / seeds);
    CHECK(fabs(m4 - fourth) < (flags & NF_GRAM_SCHMIDT ? 4.5 * s4 : spread * fourth), "fourth moment %.3f, not %.3f",
          m4, fourth);
    free(w);
}

TEST_LIST(moments, FAVORS)
{
    float *u = (float *)calloc((size_t)k->dim, sizeof(float));
    oracle_random random = {5};
    oracle_vector(&random, u, k->dim, 1);
    moments_along(k, 0, u, k->dim < 16 ? 0.4 : 0.2);
    moments_along(k, NF_SIMPLEX, u, k->dim < 16 ? 0.4 : 0.2);
    moments_along(k, UNIFORM, u, 0);
    memset(u, 0, (size_t)k->dim * sizeof(float));
    u[0] = 1;
    moments_along(k, 0, u, 0.7);
    moments_along(k, NF_GRAM_SCHMIDT, u, 0);
    moments_along(k, ALL_WAYS, u, 0);
    for (int d = 0; d < k->dim; d++)
        u[d] = (float)(1 / sqrt((double)k->dim));
    moments_along(k, 0, u, 0.7);
    free(u);
}

/* A model's own matrix: rounded to the nearest bf16, or kept. */
TEST_LIST(own_matrix, FAVORS)
{
    const int n = k->rows * k->dim;
    float *w = matrix_make(k), *back = matrix_make(k);
    block p = block_make(k->projection_bytes(), 0);
    oracle_random random = {8};
    for (int i = 0; i < n; i++)
        w[i] = (float)oracle_normal(&random);
    CHECK(k->projection_from(p.data, w, NF_KEEP_F32) == NF_OK && k->projection_read(p.data, back) == NF_OK, "keep");
    CHECK(memcmp(w, back, (size_t)n * sizeof(float)) == 0, "NF_KEEP_F32 changes the matrix");
    CHECK(k->projection_from(p.data, w, 0) == NF_OK && k->projection_read(p.data, back) == NF_OK, "round");
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, back + i, sizeof bits);
        CHECK((bits & 0xffff) == 0 && fabsf(back[i] - w[i]) <= fabsf(w[i]) / 256, "%g became %g", (double)w[i],
              (double)back[i]);
    }
    CHECK(block_intact(&p), "the projection wrote beside itself");
    block_free(&p);
    free(w);
    free(back);
}

/* ---- the estimator -------------------------------------------------------------------------------------------------
 */

/* exp(lse) of one key is the estimate of exp(q'.k'). With iid normal W its mean is exact and its relative variance,
 * with z = |q' + k'|^2, is (e^z - 1) / M for exp and 2 (cosh z - 1) / M for cosh; with y = |q' - k'|^2, it is e^y (1 -
 * e^-y)^2 / M for trig. 4 pairs (q, k) at once, one per head.
 * The mean must lie within 4.5 standard errors (fails by chance with probability 7e-6 per head; the seeds are fixed);
 * the variance within 25 %, five standard errors of it or more at these z. As the same bound holds for every M among
 * the contracts, the variance falls as 1/M. */
TEST_LIST(unbiased, FAVORS)
{
    if (!estimates(k))
        return;
    enum { HEADS = 4 };
    static const double norms[HEADS] = {0.2, 0.4, 0.5, 0.6};
    const int draws = QUICK ? 300 : 20000 / (k->rows < 20 ? 4 : k->rows / 4), n = k->rows * k->dim;
    const shape s = {.heads = HEADS, .q_tokens = 1, .norm = 1, .seed = 2};
    double mean[HEADS] = {0}, square[HEADS] = {0}, truth[HEADS], z[HEADS];
    float *w = matrix_make(k);
    oracle_random random = {77};
    call c = call_make(k, s);
    for (int h = 0; h < HEADS; h++) {
        const double scale = 1 / sqrt((double)k->dim);
        float *q = row_at(c.a.q, 0, 0, h), *key = row_at(c.a.k, 0, 0, h);
        oracle_vector(&random, q, k->dim, norms[h] / sqrt(scale));
        oracle_vector(&random, key, k->dim, norms[h] / sqrt(scale));
        for (int d = 0; d < k->dim; d++) /* towards each other, so that the sum is not always near sqrt 2 */
            key[d] += h % 2 ? q[d] / 2 : 0;
        truth[h] = exp(scale * dot(q, key, k->dim));
        z[h] = scale *
               (dot(q, q, k->dim) + dot(key, key, k->dim) + (map_of(k) == ORACLE_TRIG ? -2 : 2) * dot(q, key, k->dim));
    }
    for (int i = 0; i < draws; i++) {
        for (int j = 0; j < n; j++)
            w[j] = (float)oracle_normal(&random);
        CHECK(k->projection_from(c.projection.data, w, NF_KEEP_F32) == NF_OK, "projection_from");
        CHECK(call_run(&c, k->forward) == NF_OK, "forward");
        for (int h = 0; h < HEADS; h++) {
            const double estimate = exp((double)c.a.lse[h]) / truth[h];
            mean[h] += estimate / draws;
            square[h] += (estimate - 1) * (estimate - 1) / draws;
        }
    }
    for (int h = 0; h < HEADS; h++) {
        const double law = (map_of(k) == ORACLE_TRIG   ? exp(z[h]) * pow(1 - exp(-z[h]), 2)
                            : map_of(k) == ORACLE_COSH ? 2 * (cosh(z[h]) - 1)
                                                       : exp(z[h]) - 1) /
                           k->features;
        const double error = sqrt(square[h] / draws);
        CHECK(fabs(mean[h] - 1) < 4.5 * error, "z = %.2f: mean %.5f, %.1f standard errors off", z[h], mean[h],
              (mean[h] - 1) / error);
        CHECK(fabs(square[h] / law - 1) < (QUICK ? 0.6 : 0.25), "z = %.2f: variance %.3g, the law says %.3g", z[h],
              square[h], law);
    }
    free(w);
    call_free(&c);
}

/* What the matrices of many seeds make of one pair with |q' + k'|^2 = z, relative to e^(q'k'): mean and variance over
 * seeds, and their standard errors. flags 32: independent normal rows. */
enum { INDEPENDENT = 32 };

typedef struct spread {
    double mean, variance, mean_error, variance_error;
} spread;

static spread estimate(const kernel *k, uint32_t flags, double z, int seeds)
{
    float *w = matrix_make(k), *sum = (float *)calloc((size_t)k->dim, sizeof(float));
    double *x = oracle_doubles((size_t)seeds), fourth = 0;
    oracle_random random = {flags + 1};
    spread s = {0, 0, 0, 0};
    oracle_vector(&random, sum, k->dim, sqrt(z));
    for (int i = 0; i < seeds; i++) {
        if (flags == INDEPENDENT)
            for (int j = 0; j < k->rows * k->dim; j++)
                w[j] = (float)oracle_normal(&random);
        else
            sample(k, (uint64_t)i, flags, w);
        for (int r = 0; r < k->rows; r++) {
            const double u = dot(w + r * k->dim, sum, k->dim);
            x[i] += (k->features == k->rows ? exp(u) : cosh(u)) * exp(-z / 2) / k->rows;
        }
        s.mean += x[i] / seeds;
    }
    for (int i = 0; i < seeds; i++) {
        const double square = (x[i] - s.mean) * (x[i] - s.mean);
        s.variance += square / seeds;
        fourth += square * square / seeds;
    }
    s.mean_error = sqrt(s.variance / seeds);
    s.variance_error = sqrt((fourth - s.variance * s.variance) / seeds);
    free(w);
    free(sum);
    free(x);
    return s;
}

/* Uniform rotations: with chi norms the mean is exact, orthogonal or simplex; with all norms sqrt(D) it is that of a
 * sphere of this radius, e^(-z/2) sum_n (z D)^n / (2 4 .. 2n D (D + 2) .. (D + 2n - 2)). Each within 4.5 standard
 * errors. */
TEST_LIST(sampled_unbiased, FAVORS)
{
    const int seeds = (QUICK ? 4000 : 30000) / k->rows / (k->dim > 64 ? 4 : 1) + 50;
    const double z = 1, dim = k->dim;
    double sphere = exp(-z / 2), term = sphere;
    for (int n = 0; n < 20; n++) {
        term *= z * dim / (2 * n + 2) / (dim + 2 * n);
        sphere += term;
    }
    for (uint32_t flags = NF_GRAM_SCHMIDT; flags <= ALL_WAYS; flags++) {
        const double expected = flags & NF_CHI_NORMS ? 1 : sphere;
        spread s;
        if ((flags & ALL_WAYS) != flags || !(flags & NF_GRAM_SCHMIDT))
            continue;
        s = estimate(k, flags, z, seeds);
        CHECK(fabs(s.mean - expected) < 4.5 * s.mean_error, "flags %d: mean %.5f, not %.5f, %.1f standard errors off",
              (int)flags, s.mean, expected, (s.mean - expected) / s.mean_error);
    }
}

/* In 8 dimensions, where one block of rows decides: variance falls from independent to orthogonal rows, from there to
 * norms all sqrt(D), and for exp to the simplex; each by 3 standard errors of the difference or more. */
TEST_LIST(variance_order, FAVORS)
{
    const int seeds = QUICK ? 4000 : 20000;
    const uint32_t ways[4] = {INDEPENDENT, UNIFORM, NF_GRAM_SCHMIDT, NF_GRAM_SCHMIDT | NF_SIMPLEX};
    spread s[4];
    if (k->dim != 8)
        return;
    for (int i = 0; i < 4; i++) {
        s[i] = estimate(k, ways[i], 0.5, seeds);
        if (i == 0 || (i == 3 && k->features != k->rows)) /* cosh: a row and its negative are far from a simplex */
            continue;
        CHECK(s[i - 1].variance - s[i].variance > 3 * hypot(s[i - 1].variance_error, s[i].variance_error),
              "flags %d: variance %.4f +- %.4f; flags %d: %.4f +- %.4f", (int)ways[i - 1], s[i - 1].variance,
              s[i - 1].variance_error, (int)ways[i], s[i].variance, s[i].variance_error);
    }
}

/* ---- calibration ---------------------------------------------------------------------------------------------------
 */

/* Add a mean to q and k and make the channels uneven, as trained heads have them. */
static void structure(call *c, double mean)
{
    const int dim = c->k->dim;
    const double unit = 1 / sqrt(1 / sqrt((double)dim)) / sqrt((double)dim);
    for (int64_t h = 0; h < c->a.heads; h++)
        for (int64_t i = 0; i < c->a.q_tokens; i++)
            for (int d = 0; d < dim; d++) {
                const double uneven = d % 3 ? 1 : 3;
                float *q = row_at(c->a.q, 0, i, h) + d, *k = row_at(c->a.k, 0, i, h) + d;
                *q = (float)((double)*q / uneven + unit * mean * (d % 2 ? 0.5 : -0.4));
                *k = (float)((double)*k * uneven + unit * mean * (d % 5 ? 1 : -2));
            }
}

static nf_calibration sample_of(const call *c)
{
    nf_calibration s;
    memset(&s, 0, sizeof s);
    s.q = row_at(c->a.q, 0, 0, 0);
    s.k = row_at(c->a.k, 0, 0, 0);
    s.q_tokens = s.k_tokens = c->a.q_tokens;
    s.q_stride = c->a.q.token_stride;
    s.k_stride = c->a.k.token_stride;
    return s;
}

/* Every flag and tau: the kernel computes what the definition says. */
TEST_LIST(calibrated, FAVORS)
{
    if (!estimates(k))
        return;
    static const struct {
        float tau;
        uint32_t flags;
    } table[] = {{0, 0},    {1, 0}, {0.5f, NF_KEEP_MEAN},     {0.8f, NF_KEEP_CHANNELS},
                 {0.9f, 3}, {1, 3}, {0, NF_OPTIMAL_FEATURES}, {1, 3 | NF_SIMPLEX | NF_OPTIMAL_FEATURES}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        for (int odd = 0; odd < 2; odd++) {
            const shape s = {.q_tokens = 90, .norm = 2, .seed = 3, .odd = odd};
            call c = call_make(k, s);
            nf_calibration from;
            oracle_calibration definition;
            structure(&c, 4);
            from = sample_of(&c);
            from.tau = table[i].tau;
            from.flags = table[i].flags & (31 | optimal(k));
            call_project(&c, 3, &from);
            definition = oracle_calibrate(from.q, 90, from.q_stride, from.k, 90, from.k_stride, k->dim,
                                          (double)from.tau, from.flags);
            c.calibration = &definition;
            call_reference(&c, 0);
            EACH_WAY(k, w)
            {
                CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
                CHECK(call_error(&c, 0) <= tolerance(10), "%s tau %g flags %d: error %.3g", w.name, (double)from.tau,
                      (int)from.flags, call_error(&c, 0));
            }
            oracle_calibration_free(&definition);
            call_free(&c);
        }
}

/* tau = 1 that keeps means and channels is no calibration. */
TEST_LIST(neutral, FAVORS)
{
    if (!estimates(k))
        return;
    const shape s = {.q_tokens = 90, .norm = 3, .seed = 3};
    call c = call_make(k, s);
    nf_calibration none = sample_of(&c);
    none.tau = 1;
    none.flags = NF_KEEP_MEAN | NF_KEEP_CHANNELS;
    call_reference(&c, 0); /* of the plain projection */
    call_project(&c, 3, &none);
    CHECK(call_run(&c, k->forward) == NF_OK, "forward");
    CHECK(call_error(&c, 0) <= tolerance(10), "error %.3g", call_error(&c, 0));
    call_free(&c);
}

/* Without a sample there is tempering alone, and only if asked for; the rows are sampled by the flags. */
TEST_LIST(tempered, FAVORS)
{
    static const float tau[2] = {0, 0.8f};
    for (int i = 0; i < 1 + estimates(k); i++) {
        const shape s = {.q_tokens = 70, .norm = 2, .seed = 3};
        call c = call_make(k, s);
        nf_calibration from = sample_of(&c);
        oracle_calibration definition =
            oracle_calibrate(from.q, 1, 0, from.k, 1, 0, k->dim, i ? (double)tau[i] : 1, ORACLE_KEEP_CHANNELS);
        memset(definition.q_mean, 0, (size_t)k->dim * sizeof(double));
        memset(definition.k_mean, 0, (size_t)k->dim * sizeof(double));
        memset(&from, 0, sizeof from);
        from.tau = tau[i];
        from.flags = ALL_WAYS | (i ? NF_KEEP_MEAN : 0);
        call_project(&c, 3, &from);
        c.calibration = &definition;
        call_reference(&c, 0);
        CHECK(call_run(&c, k->forward) == NF_OK, "forward");
        CHECK(call_error(&c, 0) <= tolerance(10), "tau %g: error %.3g", (double)tau[i], call_error(&c, 0));
        oracle_calibration_free(&definition);
        call_free(&c);
    }
}

/* A calibrated kernel keeps the other promises: its state goes on, token by token. */
TEST_LIST(calibrated_state, FAVORS)
{
    if (!estimates(k))
        return;
    const shape s = {.q_tokens = 60, .norm = 2, .seed = 3};
    call c = call_make(k, s);
    nf_calibration from;
    oracle_calibration definition;
    structure(&c, 4);
    from = sample_of(&c);
    from.flags = optimal(k);
    call_project(&c, 3, &from);
    definition = oracle_calibrate(from.q, 60, 0, from.k, 60, 0, k->dim, 0, from.flags);
    c.calibration = &definition;
    call_reference(&c, 0);
    call_state(&c);
    EACH_WAY(k, w)
    {
        nf_args a = c.a;
        call_state(&c);
        call_blank(&c);
        a.q_tokens = 1;
        for (int64_t t = 0; t < 60; t++) {
            a.q.data = row_at(c.a.q, 0, t, 0);
            a.k.data = row_at(c.a.k, 0, t, 0);
            a.v.data = row_at(c.a.v, 0, t, 0);
            a.out.data = row_at(out_tensor(&c.a), 0, t, 0);
            a.lse = c.a.lse + t;
            CHECK((t < 20 ? w.forward : w.decode)(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
        }
        CHECK(call_error(&c, 0) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 0));
    }
    oracle_calibration_free(&definition);
    call_free(&c);
}

/* Optimal positive features of one pair: over seeds the estimate of e^(q'k') has the mean 1, relatively, within 4.5
 * standard errors (a right one fails with probability 7e-6; the seeds are fixed), and less variance than with chi norms
 * alone, by 3 standard errors of the difference: for independent rows and z = |q' + k'|^2 a feature's second moment is
 * s^2D (2 s^2 - 1)^(-D/2) e^(2 s^2 z / (2 s^2 - 1) - z) and e^z, 2.29 and 2.72 here. */
TEST_LIST(optimal_features, FAVORS)
{
    if (!optimal(k) || k->dim != 8)
        return;
    const shape s = {.q_tokens = 1, .norm = 0.5, .seed = 2};
    const int seeds = QUICK ? 4000 : 20000;
    double error[2], variance[2];
    call c = call_make(k, s);
    float *q = row_at(c.a.q, 0, 0, 0);
    memcpy(row_at(c.a.k, 0, 0, 0), q, (size_t)k->dim * sizeof(float));
    for (uint32_t i = 0; i < 2; i++) {
        nf_calibration from = sample_of(&c);
        double mean = 0, square = 0, fourth = 0;
        from.tau = 1;
        from.flags = UNIFORM | NF_KEEP_MEAN | NF_KEEP_CHANNELS | (i ? NF_OPTIMAL_FEATURES : 0);
        for (int seed = 0; seed < seeds; seed++) {
            double off;
            CHECK(k->projection_init(c.projection.data, (uint64_t)seed, &from) == NF_OK, "projection_init");
            CHECK(k->forward(&c.a, c.workspace.data, c.bytes) == NF_OK, "forward");
            off = exp((double)c.a.lse[0] - dot(q, q, k->dim) / sqrt((double)k->dim)) - 1;
            mean += off / seeds, square += off * off / seeds, fourth += off * off * off * off / seeds;
        }
        CHECK(fabs(mean) < 4.5 * sqrt(square / seeds), "flags %d: mean 1 + %.4f, %.1f standard errors", (int)from.flags,
              mean, mean / sqrt(square / seeds));
        variance[i] = square, error[i] = sqrt((fourth - square * square) / seeds);
    }
    CHECK(variance[0] - variance[1] > 3 * hypot(error[0], error[1]),
          "variance %.4f +- %.4f, without weights %.4f +- %.4f", variance[1], error[1], variance[0], error[0]);
    call_free(&c);
}

/* Weights belong to the features: a state made with them does not go on with the same matrix without. */
TEST_LIST(weights_in_hash, FAVORS)
{
    if (!optimal(k))
        return;
    const shape s = {.q_tokens = 20, .norm = 2, .seed = 3};
    call c = call_make(k, s);
    nf_calibration from = sample_of(&c);
    from.tau = 1;
    from.flags = NF_KEEP_MEAN | NF_KEEP_CHANNELS | NF_OPTIMAL_FEATURES;
    call_project(&c, 3, &from);
    call_state(&c);
    CHECK(call_run(&c, k->forward) == NF_OK, "forward");
    CHECK(k->projection_from(c.projection.data, c.w, NF_KEEP_F32) == NF_OK, "projection_from");
    CHECK(call_run(&c, k->forward) == NF_E_STATE, "the same matrix");
    call_free(&c);
}

/* Heads with one projection each: every head uses its own. */
TEST_LIST(projection_per_head, FAVORS)
{
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 40, .norm = 2, .seed = 3};
    const size_t stride = (k->projection_bytes() + NF_ALIGN - 1) / NF_ALIGN * NF_ALIGN + NF_ALIGN;
    call c = call_make(k, s);
    block both = block_make(2 * stride, 0);
    double *ref[2], *ratio[2];
    for (uint64_t i = 0; i < 2; i++) {
        call_project(&c, 50 + i, NULL);
        CHECK(k->projection_init(both.data + i * stride, 50 + i, NULL) == NF_OK, "projection_init");
        call_reference(&c, 0);
        ref[i] = c.ref, ratio[i] = c.ratio;
        c.ref = c.ratio = NULL;
        free(c.ref_lse);
    }
    c.ref = ref[0], c.ratio = ratio[0];
    c.ref_lse = NULL;
    for (int64_t row = 0; row < 2 * 4 * 40; row++)
        if (row / 40 % 4 >= 2)
            memcpy(ref[0] + row * k->dim, ref[1] + row * k->dim, (size_t)k->dim * sizeof(double)),
                ratio[0][row] = ratio[1][row];
    free(ref[1]), free(ratio[1]);
    c.a.projection = both.data;
    c.a.projection_stride = stride;
    c.a.lse = NULL;
    EACH_WAY(k, w)
    {
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        CHECK(call_error(&c, 0) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 0));
    }
    block_free(&both);
    call_free(&c);
}

/* Large key means and uneven channels: the calibrated estimate is at least twice as near to exact softmax. */
TEST_LIST(calibration_helps, FAVORS)
{
    if (!estimates(k))
        return;
    const int64_t n = 128;
    double error[2] = {0, 0};
    for (uint64_t seed = 0; seed < 5; seed++) {
        const shape s = {.q_tokens = n, .norm = 1, .seed = seed, .full = 1};
        call c = call_make(k, s);
        double *exact = oracle_doubles((size_t)(n * k->dim));
        oracle_head o;
        nf_calibration from;
        structure(&c, 5);
        o = head_at(&c, 0, 0, 0, n);
        oracle_exact(&o, exact, NULL);
        from = sample_of(&c);
        for (int i = 0; i < 2; i++) {
            call_project(&c, seed, i ? &from : NULL);
            CHECK(call_run(&c, k->forward) == NF_OK, "forward");
            error[i] += oracle_compare(row_at(out_tensor(&c.a), 0, 0, 0), 0, exact, n, k->dim).mean / 5;
        }
        free(exact);
        call_free(&c);
    }
    CHECK(error[1] < error[0] / 2, "error %.3f, calibrated %.3f", error[0], error[1]);
}
