/* args->eps: favor_exp computes the published Performer's features, stabilised over all keys and with eps added. And
 * what that definition does that the default does not: later keys change earlier rows, and eps takes over. */
#include "check.h"
#include "call.h"

#define LONG (QUICK ? 90 : 300)

/* ---- the published definition --------------------------------------------------------------------------------------
 *
 * Choromanski et al. 2021 and the code that came with it, in fp64: with x' = sqrt(scale) x, u = w x', h = |x'|^2 / 2,
 *     phi(q_i)_r = m^(-1/2) (e^(u_ir - h_i - max_r u_ir) + eps),
 *     phi(k_j)_r = m^(-1/2) (e^(u_jr - h_j - max_jr u_jr) + eps),
 * out_i = sum_j phi(q_i) phi(k_j) v_j / R_i, R_i = sum_j phi(q_i) phi(k_j). The maximum over the keys is that over all
 * of them, under the causal mask too. */
typedef struct published {
    oracle_head h;
    double eps;
} published;

static double *published_features(const published *p, const float *data, int64_t stride, int64_t tokens, int key)
{
    const int m = p->h.rows, dim = p->h.dim;
    const double root = sqrt(oracle_scale(&p->h));
    double *phi = oracle_doubles((size_t)(tokens * m)), *norm = oracle_doubles((size_t)tokens), all = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        const float *x = oracle_row(data, stride, dim, t);
        for (int d = 0; d < dim; d++)
            norm[t] += pow(root * (double)x[d], 2) / 2;
        for (int r = 0; r < m; r++) {
            for (int d = 0; d < dim; d++)
                phi[t * m + r] += (double)p->h.w[r * dim + d] * root * (double)x[d];
            all = fmax(all, phi[t * m + r]);
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        double own = -INFINITY;
        for (int r = 0; r < m; r++)
            own = fmax(own, phi[t * m + r]);
        for (int r = 0; r < m; r++)
            phi[t * m + r] = (exp(phi[t * m + r] - norm[t] - (key ? all : own)) + p->eps) / sqrt((double)m);
    }
    free(norm);
    return phi;
}

/* out [q_tokens][dim] and ln R [q_tokens]. */
static void published_attention(const published *p, double *out, double *lse)
{
    const oracle_head *h = &p->h;
    double *q = published_features(p, h->q, h->q_stride, h->q_tokens, 0);
    double *k = published_features(p, h->k, h->k_stride, h->kv_tokens, 1);
    memset(out, 0, (size_t)(h->q_tokens * h->dim) * sizeof *out);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        double sum = 0;
        for (int64_t j = 0; j < h->kv_tokens && (h->full || j <= oracle_position(h, i)); j++) {
            const float *v = oracle_row(h->v, h->v_stride, h->dim, j);
            double a = 0;
            for (int r = 0; r < h->rows; r++)
                a += q[i * h->rows + r] * k[j * h->rows + r];
            sum += a;
            for (int d = 0; d < h->dim; d++)
                out[i * h->dim + d] += a * (double)v[d];
        }
        for (int d = 0; d < h->dim; d++)
            out[i * h->dim + d] /= sum;
        lse[i] = log(sum);
    }
    free(q);
    free(k);
}

/* Fill c->ref and c->ref_lse. */
static void published_reference(call *c, double eps)
{
    const nf_args *a = &c->a;
    const int32_t whole[2] = {0, (int32_t)a->q_tokens};
    const int32_t *cu = a->cu_tokens ? a->cu_tokens : whole;
    call_reference(c, 0); /* makes the arrays, and v_norm */
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t s = 0; s < (a->cu_tokens ? a->sequences : 1); s++) {
                const int64_t row = (b * a->heads + h) * a->q_tokens + cu[s];
                const published p = {head_at(c, b, h, cu[s], cu[s + 1] - cu[s]), eps};
                published_attention(&p, c->ref + row * c->k->dim, c->ref_lse + row);
            }
}

static int takes_eps(const kernel *k)
{
    return strstr(k->name, "favor_exp") != NULL;
}

/* A checkpoint's matrix: any rows. */
static void model_matrix(call *c, uint64_t seed)
{
    oracle_random r = {seed};
    for (int i = 0; i < c->k->rows * c->k->dim; i++)
        c->w[i] = (float)oracle_normal(&r);
    if (c->k->projection_from(c->projection.data, c->w, NF_KEEP_F32) != NF_OK)
        abort();
}

static void agree(const kernel *k, shape s, float eps, const char *what)
{
    call c = call_make(k, s);
    model_matrix(&c, s.seed);
    c.a.eps = eps;
    published_reference(&c, (double)eps);
    EACH_WAY(k, w)
    {
        const double tol = tolerance(s.norm);
        CHECK(call_run(&c, w.forward) == NF_OK, "%s %s", w.name, what);
        CHECK(call_error(&c, 0) <= tol, "%s %s, %d queries, %d keys, norm %g, eps %g: error %.3g", w.name, what,
              (int)c.a.q_tokens, (int)kv_tokens(&c.a), s.norm, (double)eps, call_error(&c, 0));
        CHECK(call_intact(&c), "%s %s: wrote beside its rows", w.name, what);
    }
    call_free(&c);
}

/* ---- agreement -----------------------------------------------------------------------------------------------------
 */

TEST_LIST(compat_inputs, FAVORS)
{
    static const float eps[] = {1e-4f, 1e-6f, 1e-9f, 1};
    static const double norms[] = {0.3, 1, 2, 4, 10, 40};
    for (int kind = 0; kind < ORACLE_KINDS && takes_eps(k); kind++)
        for (size_t n = 0; n < sizeof norms / sizeof *norms; n++)
            for (size_t e = 0; e < sizeof eps / sizeof *eps; e++) {
                const shape s = {
                    .q_tokens = LONG / 3, .full = 1, .kind = (oracle_kind)kind, .norm = norms[n], .seed = n};
                agree(k, s, eps[e], "inputs");
            }
}

TEST_LIST(compat_lengths, FAVORS)
{
    static const int64_t lengths[] = {1, 2, 15, 16, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 1000};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths - QUICK && takes_eps(k); i++) {
        const shape s = {.q_tokens = lengths[i], .full = 1, .norm = 1.5, .seed = i};
        agree(k, s, i % 2 ? 1e-4f : 1e-6f, "lengths");
    }
}

TEST_LIST(compat_layouts, FAVORS)
{
    static const int32_t borders[] = {0, 5, 6, 70, 102};
    const shape packed = {
        .heads = 4, .kv_heads = 2, .q_tokens = 102, .cu_tokens = borders, .sequences = 4, .norm = 2, .full = 1};
    shape s;
    for (int i = 0; layout_at(k, i, &s) && takes_eps(k); i++) {
        s.full = 1;
        s.norm = 2;
        agree(k, s, 1e-4f, "layouts");
    }
    if (takes_eps(k))
        agree(k, packed, 1e-4f, "packed");
}

/* Without eps the published features are the default's: the stabilisers cancel. This holds the two oracles together. */
TEST_LIST(compat_without_eps, FAVORS)
{
    for (int full = 0; full < 2 && takes_eps(k); full++) {
        const shape s = {.q_tokens = 60, .full = full, .norm = 2, .seed = 4};
        call c = call_make(k, s);
        double *ours;
        call_reference(&c, 0);
        ours = c.ref;
        c.ref = NULL, free(c.ref_lse), c.ref_lse = NULL;
        published_reference(&c, 0);
        for (int64_t i = 0; i < 60 * k->dim; i++)
            CHECK(fabs(ours[i] - c.ref[i]) <= 1e-9 * c.v_norm, "%g and %g", ours[i], c.ref[i]);
        free(ours);
        call_free(&c);
    }
}

/* google-research adds 2 s to a sum R of at most s. That is a matter of lse: docs/compat.md. */
TEST_LIST(compat_floor, FAVORS)
{
    const double floor = 1e-6;
    const shape s = {.q_tokens = 40, .full = 1, .norm = 5, .kind = ORACLE_MIXED, .seed = 2};
    int low = 0, high = 0;
    call c;
    if (!takes_eps(k))
        return;
    c = call_make(k, s);
    c.a.eps = 1e-6f;
    published_reference(&c, 1e-6);
    CHECK(call_run(&c, k->forward) == NF_OK, "forward");
    for (int64_t i = 0; i < 40; i++) {
        const double r = exp(c.ref_lse[i]), sum = exp((double)c.a.lse[i]);
        const double theirs = r <= floor ? r / (r + 2 * floor) : 1, ours = sum <= floor ? sum / (sum + 2 * floor) : 1;
        low += r <= floor, high += r > floor;
        CHECK(fabs(r / floor - 1) > 1e-3, "too near to tell");
        for (int d = 0; d < k->dim; d++)
            CHECK(fabs((double)row_at(out_tensor(&c.a), 0, i, 0)[d] * ours - c.ref[i * k->dim + d] * theirs) <=
                      1e-5 * c.v_norm,
                  "row %d: %g and %g", (int)i, (double)row_at(out_tensor(&c.a), 0, i, 0)[d], c.ref[i * k->dim + d]);
    }
    CHECK(low > 0 && high > 0, "%d rows below, %d above", low, high);
    call_free(&c);
}

/* ---- the generalised kernel ----------------------------------------------------------------------------------------
 *
 * Three published definitions of relu features of x: f(w x) + e (google-research, JAX), f(m^(-1/2) w x) + e
 * (google-research, TensorFlow), f(d^(-1/4) w x) + e (performer-pytorch), f(u) = max(0, u), e = 1e-3. For favor_relu
 * they are args.scale = 1, 1/m and 0. */
static double relu_weight(const call *c, int publisher, int64_t i, int64_t j)
{
    const int m = c->k->rows, dim = c->k->dim;
    const double factor[] = {1, 1 / sqrt((double)m), pow(dim, -0.25)};
    double sum = 0;
    for (int r = 0; r < m; r++) {
        double q = 0, k = 0;
        for (int d = 0; d < dim; d++) {
            q += (double)c->w[r * dim + d] * (double)row_at(c->a.q, 0, i, 0)[d];
            k += (double)c->w[r * dim + d] * (double)row_at(c->a.k, 0, j, 0)[d];
        }
        sum += (fmax(0, q * factor[publisher]) + 1e-3) * (fmax(0, k * factor[publisher]) + 1e-3);
    }
    return sum;
}

TEST_LIST(relu_scales, FAVORS)
{
    const float scales[] = {1, 1 / (float)k->rows, 0};
    for (int i = 0; i < 6 && map_of(k) == ORACLE_RELU; i++) {
        const shape s = {.q_tokens = 60, .full = i % 2, .norm = 2, .seed = 9};
        call c = call_make(k, s);
        model_matrix(&c, 5);
        call_reference(&c, 0); /* for v_norm */
        c.a.scale = scales[i / 2];
        EACH_WAY(k, w)
        {
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t t = 0; t < s.q_tokens; t++) {
                double out[256] = {0}, sum = 0;
                for (int64_t j = 0; j < (s.full ? s.q_tokens : t + 1); j++) {
                    const double a = relu_weight(&c, i / 2, t, j);
                    sum += a;
                    for (int d = 0; d < k->dim; d++)
                        out[d] += a * (double)row_at(c.a.v, 0, j, 0)[d];
                }
                for (int d = 0; d < k->dim; d++)
                    CHECK(fabs((double)row_at(out_tensor(&c.a), 0, t, 0)[d] - out[d] / sum) <= 1e-5 * c.v_norm,
                          "%s: publisher %d, row %d", w.name, i / 2, (int)t);
            }
        }
        call_free(&c);
    }
}

/* ---- what the default does without ---------------------------------------------------------------------------------
 */

/* The leak: under the causal mask only the last key grows, and the published rows before it change. Ours keep their
 * bits. */
TEST_LIST(leak, FAVORS)
{
    const shape s = {.q_tokens = 24, .norm = 2, .kind = ORACLE_CONSTANT, .seed = 3};
    call c;
    if (!takes_eps(k))
        return;
    c = call_make(k, s);
    for (int e = 0; e < 3; e++) {
        const double eps = e == 0 ? 1e-6 : e == 1 ? 1e-4 : 0;
        double *before, most = 0;
        block ours = block_make(c.out.bytes, 0);
        published_reference(&c, eps);
        before = c.ref;
        c.ref = NULL, free(c.ref_lse), c.ref_lse = NULL;
        CHECK(call_run(&c, k->forward) == NF_OK, "forward");
        memcpy(ours.data, c.out.data, ours.bytes);
        for (int d = 0; d < k->dim; d++)
            row_at(c.a.k, 0, 23, 0)[d] *= 6;
        published_reference(&c, eps);
        for (int64_t i = 0; i < 23 * k->dim; i++)
            most = fmax(most, fabs(c.ref[i] - before[i]) / c.v_norm);
        CHECK(call_run(&c, k->forward) == NF_OK, "forward");
        CHECK(memcmp(ours.data, c.out.data, 23 * (size_t)k->dim * sizeof(float)) == 0, "the default leaks");
        CHECK(memcmp(ours.data, c.out.data, ours.bytes) != 0, "the last row must see its key");
        CHECK(eps > 0 ? most > 0.01 : most < 1e-9, "eps %g: rows before the last key moved by %.3g", eps, most);
        for (int d = 0; d < k->dim; d++)
            row_at(c.a.k, 0, 23, 0)[d] /= 6;
        free(before);
        block_free(&ours);
    }
    call_free(&c);
}

/* The collapse: with longer queries and keys eps is all that is left of the published features, and every row is the
 * mean of the values. Ours stays the estimate that it is. */
TEST_LIST(collapse, FAVORS)
{
    double published_off = 0, ours_off = 0, size = 0;
    const shape s = {.q_tokens = 64, .full = 1, .norm = 5, .kind = ORACLE_CONSTANT, .seed = 5};
    call c;
    if (!takes_eps(k))
        return;
    c = call_make(k, s);
    published_reference(&c, 1e-4);
    CHECK(call_run(&c, k->forward) == NF_OK, "forward");
    for (int d = 0; d < k->dim; d++) {
        double mean = 0;
        for (int64_t j = 0; j < 64; j++)
            mean += (double)row_at(c.a.v, 0, j, 0)[d] / 64;
        for (int64_t i = 0; i < 64; i++) {
            published_off += pow(c.ref[i * k->dim + d] - mean, 2);
            ours_off += pow((double)row_at(out_tensor(&c.a), 0, i, 0)[d] - mean, 2);
            size += pow((double)row_at(c.a.v, 0, i, 0)[d], 2);
        }
    }
    CHECK(sqrt(published_off / size) < 0.01, "the published rows are %.3g from the mean", sqrt(published_off / size));
    CHECK(sqrt(ours_off / size) > 0.2, "ours are only %.3g from it", sqrt(ours_off / size));
    call_reference(&c, 0);
    CHECK(call_error(&c, 0) <= tolerance(10), "ours: error %.3g", call_error(&c, 0));
    call_free(&c);
}

/* ---- what is refused -----------------------------------------------------------------------------------------------
 */

TEST_LIST(refused, CAUSALS)
{
    const shape s = {.heads = 2, .q_tokens = 20, .full = takes(k, (shape){.full = 1}), .norm = 2, .seed = 1};
    static const float bad[] = {-1e-4f, 1e-10f, 1.5f, NAN, INFINITY};
    const nf_status looked_at = k->features ? NF_E_EPS : NF_OK, taken = map_of(k) == ORACLE_RELU ? NF_OK : looked_at;
    call c = call_make(k, s);
    EACH_WAY(k, w)
    {
        c.a.mask = s.full;
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            c.a.eps = bad[i];
            CHECK(call_run(&c, w.forward) == looked_at, "%s: eps %g", w.name, (double)bad[i]);
            CHECK(!k->features || blank(c.out.data, c.out.bytes), "%s: wrote", w.name);
        }
        c.a.eps = 1e-4f;
        CHECK(call_run(&c, w.forward) == (takes_eps(k) ? NF_OK : taken), "%s: full", w.name);
        c.a.mask = NF_CAUSAL;
        CHECK(call_run(&c, w.forward) == taken, "%s: causal", w.name);
        if (stateful(k)) {
            c.a.eps = 0;
            call_state(&c);
            c.a.eps = 1e-4f; /* a state of relu knows its eps */
            CHECK(call_run(&c, w.decode) == (taken == NF_OK && k->features ? NF_E_STATE : looked_at), "%s: decode",
                  w.name);
            c.a.mask = NF_FULL;
            if (takes_eps(k))
                CHECK(call_run(&c, w.forward) == NF_E_EPS, "%s: with a state", w.name);
            c.a.state = NULL;
        }
    }
    call_free(&c);
}

/* Of a calibrated projection the published definition knows nothing, and it has no backward here. */
TEST_LIST(refused_with, FAVORS)
{
    const shape s = {.q_tokens = 20, .full = 1, .norm = 2, .seed = 1};
    call c = call_make(k, s);
    nf_calibration from = {.q_tokens = 20, .k_tokens = 20};
    nf_grads g;
    memset(&g, 0, sizeof g);
    c.a.eps = 1e-4f;
    if (k->backward) /* of relu: only the tensors are missing */
        CHECK(k->backward(&c.a, &g, c.workspace.data, c.bytes) == (map_of(k) == ORACLE_RELU ? NF_E_NULL : NF_E_EPS),
              "backward");
    from.q = row_at(c.a.q, 0, 0, 0), from.k = row_at(c.a.k, 0, 0, 0);
    call_project(&c, 1, &from);
    CHECK(call_run(&c, k->forward) == NF_E_EPS && blank(c.out.data, c.out.bytes), "calibrated");
    c.a.eps = 0;
    CHECK(call_run(&c, k->forward) == (estimates(k) ? NF_OK : NF_E_EPS), "calibrated, without eps");
    call_free(&c);
}
