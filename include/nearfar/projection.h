/* ---- projections: sampled, given or fitted to a head ----
 *
 * A matrix w [rows][D] in natural units, and a head's calibration: with x' = sqrt(scale) x the features are e^(w x^ -
 * |x^|^2 / 2) of q^ = q_factor (q' - q_mean') and k^ = k_factor (k' - k_mean'). The rest of the logit is a weight of
 * the key, e^(q_mean' (k' - k_mean')), and one of the query, which only lse sees.
 */
#ifndef NF_PROJECTION_READY
#define NF_PROJECTION_READY

typedef struct nf_projection_shape {
    uint64_t contract;
    int rows, dim, stride; /* stride: of a column of w, padded to an odd number of cache lines */
    size_t bytes;
    uint32_t flags; /* of calibrations */
} nf_projection_shape;

/* The calibration of one head, [dim] each; mean, factor and slope of a side follow each other. */
enum { NF_Q_MEAN, NF_Q_FACTOR, NF_Q_SLOPE, NF_Q_CURVE, NF_K_MEAN, NF_K_FACTOR, NF_K_SLOPE };

/* 64 random bits (splitmix64, Steele, Lea and Flood 2014). */
static uint64_t nf_random(uint64_t *counter)
{
    uint64_t x = *counter += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* The nearest bf16 (ties to even), as a float. */
static float nf_to_bf16(float x)
{
    const uint32_t bits = nf_bits(x), near = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    memcpy(&x, &near, sizeof x);
    return x;
}

/* The root of a whole number, rounded down. */
static int64_t nf_whole_root(int64_t x)
{
    int64_t root = (int64_t)nf_sqrt((double)x);
    while (root * root > x)
        root--;
    while ((root + 1) * (root + 1) <= x)
        root++;
    return root;
}

#define NF_UNIT 16777216 /* 1 in whole numbers: 2^24, exact in a float */

/* True with probability e^(-x / 2^32): does a falling run of random numbers end after an even number (Forsythe and
 * von Neumann)? */
static int nf_chance(uint64_t *counter, uint32_t x)
{
    for (int even = 1;; even = !even) {
        const uint32_t y = (uint32_t)(nf_random(counter) >> 32);
        if (y >= x)
            return even;
        x = y;
    }
}

/* A normal number in units of 2^-24, by comparisons alone (Karney 2016, algorithm N). */
static int64_t nf_normal(uint64_t *counter)
{
    for (;;) {
        const uint32_t half = 0x80000000u;
        int64_t whole = 0, left, part, chance;
        while (nf_chance(counter, half)) /* e^(-whole / 2), then to e^(-whole^2 / 2) */
            whole++;
        for (left = whole * (whole - 1); left > 0 && nf_chance(counter, half); left--)
            ;
        part = (int64_t)(nf_random(counter) >> 40);
        chance = part * (2 * whole * NF_UNIT + part) / (2 * whole + 2) / 65536;
        if (left == 0)
            for (left = whole + 1; left > 0 && nf_chance(counter, (uint32_t)chance); left--)
                ;
        if (left == 0)
            return nf_random(counter) >> 63 ? -whole * NF_UNIT - part : whole * NF_UNIT + part;
    }
}

enum { NF_MOST_DIM = 256 };

/* One round on a row: permutation, signs, in every block the Hadamard transform. Whole numbers below 2^24. */
static void nf_hadamard(float *row, const int *from, const float *sign, int dim, int block)
{
    float x[NF_MOST_DIM];
    for (int d = 0; d < dim; d++)
        x[d] = row[from[d]] * sign[d];
    for (int half = 1; half < block; half *= 2)
        for (int d = 0; d < dim; d++)
            if (!(d & half)) {
                const float a = x[d], b = x[d + half];
                x[d] = a + b;
                x[d + half] = a - b;
            }
    memcpy(row, x, (size_t)dim * sizeof(float));
}

/* The first rows of a random rotation in whole numbers, and what all dim rows sum up to; returns the square of a
 * row's norm. Rounds of permutation, signs and Hadamard transform (orthogonal random features, Yu et al. 2016, section
 * 4). */
static double nf_rotation_hadamard(float *w, int rows, int dim, uint64_t *counter, int64_t *sum)
{
    const int block = dim & -dim;
    float ones[NF_MOST_DIM];
    double square = 1;
    for (int d = 0; d < dim; d++) {
        ones[d] = 1;
        for (int r = 0; r < rows; r++)
            w[r * dim + d] = r == d ? 1.0f : 0.0f;
    }
    for (int round = block == dim ? 3 : 6; round > 0; round--) {
        int from[NF_MOST_DIM];
        float sign[NF_MOST_DIM];
        square *= block;
        for (int d = 0; d < dim; d++) {
            from[d] = d;
            sign[d] = nf_random(counter) >> 63 ? -1.0f : 1.0f;
        }
        for (int d = dim - 1; d > 0; d--) {
            const int other = (int)(nf_random(counter) % (uint64_t)(d + 1)), t = from[d];
            from[d] = from[other];
            from[other] = t;
        }
        for (int r = 0; r < rows; r++)
            nf_hadamard(w + r * dim, from, sign, dim, block);
        nf_hadamard(ones, from, sign, dim, block);
    }
    for (int d = 0; d < dim; d++)
        sum[d] = (int64_t)ones[d];
    return square;
}

/* Take out of x its shares of the rows of w, bring it to norm 2^24; returns the norm that was left. */
static int64_t nf_orthonormal(int64_t *x, const float *w, int rows, int dim)
{
    int64_t square = 0, norm;
    for (int r = 0; r < rows; r++, w += dim) {
        int64_t dot = 0;
        for (int d = 0; d < dim; d++)
            dot += x[d] * (int64_t)w[d];
        for (int d = 0; d < dim; d++)
            x[d] -= dot / NF_UNIT * (int64_t)w[d] / NF_UNIT;
    }
    for (int d = 0; d < dim; d++)
        square += x[d] * x[d];
    norm = nf_whole_root(square);
    for (int d = 0; d < dim; d++)
        x[d] = x[d] * NF_UNIT / (norm + !norm);
    return norm;
}

/* The same by Gram-Schmidt of normal vectors, where every rotation is equally likely. What is left of a vector may be
 * short and rounded: the second time leaves nothing of that. */
static double nf_rotation_gram_schmidt(float *w, int rows, int dim, uint64_t *counter, int64_t *sum)
{
    const int64_t missing = nf_whole_root((int64_t)(dim - rows) * NF_UNIT * NF_UNIT);
    memset(sum, 0, (size_t)dim * sizeof *sum);
    for (int r = 0; r < rows + (rows < dim); r++) { /* the sum of the rows that are missing: one more direction */
        int64_t x[NF_MOST_DIM];
        do {
            for (int d = 0; d < dim; d++)
                x[d] = nf_normal(counter);
        } while (nf_orthonormal(x, w, r, dim) < NF_UNIT / 1024);
        nf_orthonormal(x, w, r, dim);
        for (int d = 0; d < dim; d++) {
            sum[d] += r < rows ? x[d] : x[d] * missing / NF_UNIT;
            if (r < rows)
                w[r * dim + d] = (float)x[d];
        }
    }
    return (double)NF_UNIT * NF_UNIT;
}

/* Rows of random rotations, rotation after rotation. With NF_SIMPLEX the rows of each point to the corners of a simplex
 * around 0 (simplex random features, Reid et al. 2023): less their mean, they do. Norms: sqrt(dim) or chi. */
static void nf_sample(const nf_projection_shape *shape, uint64_t seed, uint32_t flags, float *w)
{
    const int dim = shape->dim;
    for (int first = 0; first < shape->rows; first += dim) {
        const int rows = shape->rows - first < dim ? shape->rows - first : dim;
        float *block = w + first * dim;
        int64_t sum[NF_MOST_DIM];
        uint64_t counter = seed;
        double square;
        counter = nf_random(&counter) + (uint64_t)(first / dim);
        counter = nf_random(&counter);
        square = flags & NF_GRAM_SCHMIDT ? nf_rotation_gram_schmidt(block, rows, dim, &counter, sum)
                                         : nf_rotation_hadamard(block, rows, dim, &counter, sum);
        if (flags & NF_SIMPLEX)
            square *= (double)dim * (dim - 1);
        for (int r = 0; r < rows; r++) {
            double norm = dim;
            float unit;
            for (int d = 0; d < dim && (flags & (NF_CHI_NORMS | NF_OPTIMAL_FEATURES)); d++) {
                const double x = (double)nf_normal(&counter) / NF_UNIT;
                norm = (d ? norm : 0) + x * x;
            }
            unit = (float)nf_sqrt(norm / square);
            for (int d = 0; d < dim; d++) {
                const int64_t x = (int64_t)block[r * dim + d];
                block[r * dim + d] = nf_to_bf16((float)(flags & NF_SIMPLEX ? x * dim - sum[d] : x) * unit);
            }
        }
    }
}

static nf_status nf_check_sample(const nf_projection_shape *shape, const void *projection, const float *x,
                                 int64_t tokens, int64_t stride)
{
    const int64_t dim = shape->dim, step = stride ? stride : dim;
    if (!x)
        return NF_E_NULL;
    if (!nf_aligned(x, sizeof(float)))
        return NF_E_ALIGN;
    if (tokens < 1)
        return NF_E_SIZE;
    if (step < dim)
        return NF_E_STRIDE;
    if (nf_product(tokens, step) < 0)
        return NF_E_OVERFLOW;
    for (int64_t i = 0; i < tokens * dim; i++) {
        const float y = x[i / dim * step + i % dim];
        if (!nf_finite(y) || y > 1e15f || y < -1e15f)
            return NF_E_VALUE;
    }
    return nf_overlap(projection, shape->bytes, x, (size_t)((tokens - 1) * step + dim) * sizeof(float)) ? NF_E_OVERLAP
                                                                                                        : NF_OK;
}

static nf_status nf_check_calibration(const nf_projection_shape *shape, const void *projection, const nf_calibration *c)
{
    const int none = !c->q && !c->k && !c->q_tokens && !c->k_tokens && !(c->flags & NF_OPTIMAL_FEATURES);
    nf_status status = none ? NF_OK : nf_check_sample(shape, projection, c->q, c->q_tokens, c->q_stride);
    if (status == NF_OK && !none)
        status = nf_check_sample(shape, projection, c->k, c->k_tokens, c->k_stride);
    if (status == NF_OK &&
        (!nf_finite(c->tau) || (c->tau != 0 && c->tau < 1e-3f) || c->tau > 1 || c->flags & ~shape->flags))
        status = NF_E_VALUE;
    return status;
}

/* floor(x) below 2^23, or NaN. */
NF_BOTH inline float nf_whole(double x)
{
    const float near = (float)x;
    const double whole = nf_finite(near) ? (double)(int32_t)x : 0;
    return nf_finite(near) ? (float)(whole > x ? whole - 1 : whole) : near;
}

static void nf_moments(const float *x, int64_t tokens, int64_t stride, int64_t d, double *mean, double *variance)
{
    double sum = 0, square = 0;
    for (int64_t t = 0; t < tokens; t++)
        sum += (double)x[t * stride + d];
    *mean = (double)(float)(sum / (double)tokens);
    for (int64_t t = 0; t < tokens; t++)
        square += ((double)x[t * stride + d] - *mean) * ((double)x[t * stride + d] - *mean);
    *variance = square / (double)tokens;
}

/* Fill fit from a sample, then the mean logit q_mean k_mean; returns the mean of |q^ + k^|^2 /
 * dim at the default scale. Channel balance psi = (E k^2 / E q^2)^(1/4): SADERF, Likhosherstov et al. 2023. */
static double nf_calibrate(const nf_projection_shape *shape, const nf_calibration *c, float *fit)
{
    const int dim = shape->dim;
    const int sample = c && c->q;
    const double tau = c && c->tau > 0 ? (double)c->tau : sample ? 0.7 : 1;
    double mean = 0, square = 0;
    for (int d = 0; d < dim; d++) {
        double q_mean = 0, k_mean = 0, q_square = 0, k_square = 0, psi = 1, lost = 0;
        if (sample) {
            nf_moments(c->q, c->q_tokens, c->q_stride ? c->q_stride : dim, d, &q_mean, &q_square);
            nf_moments(c->k, c->k_tokens, c->k_stride ? c->k_stride : dim, d, &k_mean, &k_square);
            lost = k_square * (1 - tau * tau * tau * tau);
            if (c->flags & NF_KEEP_MEAN) {
                q_square += q_mean * q_mean, k_square += k_mean * k_mean;
                square += 2 * q_mean * k_mean;
                q_mean = k_mean = 0;
            }
            if (!(c->flags & NF_KEEP_CHANNELS) && q_square > 1e-30 && k_square > 1e-30)
                psi = nf_sqrt(nf_sqrt(k_square / q_square));
        }
        fit[NF_Q_MEAN * dim + d] = (float)q_mean;
        fit[NF_K_MEAN * dim + d] = (float)k_mean;
        fit[NF_Q_FACTOR * dim + d] = (float)(tau * psi);
        fit[NF_K_FACTOR * dim + d] = (float)(tau / psi);
        fit[NF_Q_SLOPE * dim + d] = (float)(-k_mean / (tau * psi));
        fit[NF_K_SLOPE * dim + d] = (float)(-q_mean * psi / tau);
        fit[NF_Q_CURVE * dim + d] = (float)(lost / (tau * tau * psi * psi));
        mean += q_mean * k_mean;
        square += psi * psi * q_square + k_square / (psi * psi);
    }
    fit[8 * dim] = (float)mean;
    return tau * tau * square / (dim * nf_sqrt(dim));
}

/* FAVOR++ (Likhosherstov et al. 2022): rows times s, s^2 = 1 - 4 A that of least variance at |q^ + k^|^2 = z dim.
 * weight: log2 of the ratio of densities, below 2^12 in steps of 2^-10: exact less a reference. */
static void nf_widen(const nf_projection_shape *shape, double z, float *w, float *weight)
{
    const double b = 3 + 2 * (z < 16 ? z : 16), square = (b + nf_sqrt(b * b - 8)) / 4;
    for (int r = 0; r < shape->rows; r++) {
        double norm = 0;
        for (int d = 0; d < shape->dim; d++, w++) {
            *w = nf_to_bf16(*w * (float)nf_sqrt(square));
            norm += (double)*w * (double)*w;
        }
        weight[r] = nf_whole(738.65986093515 * (shape->dim * nf_log(square) - norm + norm / square) + 0.5) / 1024;
    }
}

static float *nf_matrix(void *projection)
{
    return (float *)(void *)((nf_projection_head *)projection + 1);
}

/* Everything of a projection that follows from w and the sample. */
static void nf_projection_finish(const nf_projection_shape *shape, void *projection, const nf_calibration *calibration)
{
    const size_t dim = (size_t)shape->dim, rows = (size_t)shape->rows, stride = (size_t)shape->stride;
    nf_projection_head *head = (nf_projection_head *)projection;
    float *w = nf_matrix(projection), *columns = w + rows * dim, *weight = columns + dim * stride;
    double z;
    memset(head, 0, sizeof *head);
    memset(columns, 0, shape->bytes - sizeof *head - rows * dim * sizeof(float));
    z = nf_calibrate(shape, calibration, weight + stride);
    if (calibration && (calibration->flags & NF_OPTIMAL_FEATURES))
        nf_widen(shape, z, w, weight);
    for (size_t i = 0; i < rows * dim; i++)
        columns[i % dim * stride + i / dim] = w[i];
    head->magic = NF_MAGIC_PROJECTION;
    head->abi = NF_CORE_ABI;
    head->contract = shape->contract;
    /* without a sample and tempering, it only says how w was drawn */
    head->calibrated = calibration && (calibration->q || (calibration->tau > 0 && calibration->tau < 1));
    head->hash = nf_hash(shape->contract, w, shape->bytes - sizeof *head);
}

static nf_status nf_projection_init(const nf_projection_shape *shape, void *projection, uint64_t seed,
                                    const nf_calibration *calibration)
{
    const nf_calibration *c = calibration;
    const nf_status status = c ? nf_check_calibration(shape, projection, c) : NF_OK;
    if (!projection)
        return NF_E_NULL;
    if (!nf_aligned(projection, NF_ALIGN))
        return NF_E_ALIGN;
    if (status == NF_OK) {
        nf_sample(shape, seed, c ? c->flags : 0, nf_matrix(projection));
        nf_projection_finish(shape, projection, c);
    }
    return status;
}

static nf_status nf_check_matrix(const nf_projection_shape *shape, const void *projection, const float *w)
{
    if (!projection || !w)
        return NF_E_NULL;
    if (!nf_aligned(projection, NF_ALIGN) || !nf_aligned(w, sizeof(float)))
        return NF_E_ALIGN;
    return nf_overlap(projection, shape->bytes, w, (size_t)(shape->rows * shape->dim) * sizeof(float)) ? NF_E_OVERLAP
                                                                                                       : NF_OK;
}

static nf_status nf_projection_from(const nf_projection_shape *shape, void *projection, const float *w, uint32_t flags)
{
    const nf_status status = nf_check_matrix(shape, projection, w);
    const int count = shape->rows * shape->dim;
    if (status != NF_OK)
        return status;
    if (flags & ~NF_KEEP_F32)
        return NF_E_VALUE;
    for (int r = 0; r < shape->rows; r++) { /* beyond, exponents would not be exact */
        float sum = 0;
        for (int d = 0; d < shape->dim; d++)
            sum += w[r * shape->dim + d] < 0 ? -w[r * shape->dim + d] : w[r * shape->dim + d];
        if (!nf_finite(sum) || sum > 32000.0f)
            return NF_E_VALUE;
    }
    for (int i = 0; i < count; i++)
        nf_matrix(projection)[i] = flags & NF_KEEP_F32 ? w[i] : nf_to_bf16(w[i]);
    nf_projection_finish(shape, projection, NULL);
    return NF_OK;
}

static nf_status nf_projection_read(const nf_projection_shape *shape, const void *projection, float *w)
{
    const nf_projection_head *head = (const nf_projection_head *)projection;
    const nf_status status = nf_check_matrix(shape, projection, w);
    if (status != NF_OK)
        return status;
    if (head->magic != NF_MAGIC_PROJECTION || head->abi != NF_CORE_ABI || head->contract != shape->contract)
        return NF_E_PROJECTION;
    memcpy(w, head + 1, (size_t)(shape->rows * shape->dim) * sizeof(float));
    return NF_OK;
}

/* A key's norm, cut off where only absurd means in a calibration lead; NaN passes. */
NF_BOTH inline double nf_limit(double norm)
{
    return norm > 4194304.0 ? 4194304.0 : norm < -4194304.0 ? -4194304.0 : norm;
}

/* floor(log2 x) of a number above the limit, otherwise 0. */
NF_BOTH float nf_exponent(float x, float limit)
{
    return x > limit && nf_finite(x) ? (float)((int32_t)(nf_bits(x) >> 23) - 127) : 0.0f;
}

/* NF_INPUT_LIMIT, in turns. */
#define NF_TURN_LIMIT (NF_INPUT_LIMIT * 0.110317800f)

/* A feature of a key beyond 2^60 of its reference ends the chunk; a sum beyond 2^16 raises the reference. A reference
 * stays a little below the key it rises to, so that the next records change nothing. */
#define NF_KEY_LIMIT 1152921504606846976.0f
#define NF_KEY_STEP 60.0f
#define NF_SUM_LIMIT 65536.0f
#define NF_REFERENCE_LAG 8.0f

#endif
