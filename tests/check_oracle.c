/* The oracle checked against itself: pair by pair against running sums, and the hand-derived gradients against central
 * differences of the forward. Prints the worst of each. */
#include "oracle.h"

#include <stdio.h>

enum { D = 8, ROWS = 12, TOKENS = 60, QUERIES = 50, WAYS = 128 /* of the operators on softmax; behind them linear */ };

static float q[TOKENS * D], k[TOKENS * D], v[TOKENS * D], w[ROWS * D];
static oracle_calibration calibration;

static double distance(const double *a, const double *b, int count)
{
    double most = 0;
    for (int i = 0; i < count; i++)
        most = a[i] == b[i] ? most : fmax(most, fabs(a[i] - b[i]) / fmax(1, fabs(b[i])));
    return most;
}

/* One of every operator, mask, map, calibration and pattern. */
static oracle_head head_of(int way, int64_t queries, int64_t tokens)
{
    static const int32_t listed[] = {3, 17, 18}, offsets[] = {0, 0, 1, 3, 3, 5, 6, 6, 8},
                         keys[] = {0, 0, 1, 1, 3, 5, 0, 7};
    const int linear = way >= WAYS ? 1 + (way - WAYS) / 8 : 0; /* a map, then mask, normaliser, decay or scale */
    const int features = !linear && way & 1, patterned = way >> 1 & 1;
    oracle_pattern pattern;
    oracle_head h;
    memset(&h, 0, sizeof h);
    memset(&pattern, 0, sizeof pattern);
    h.q_tokens = queries, h.kv_tokens = tokens, h.dim = D;
    h.q = q, h.k = k, h.v = v;
    if (linear) {
        h.map = (oracle_map)(ORACLE_ELU + linear - 1);
        h.full = (way & 1) || h.map == ORACLE_SOFTMAXQK;
        h.unnormalised = way >> 1 & 1;
        h.decay = way & 4 && !h.full ? -0.1 : 0;
        h.scale = way & 4 ? 0.6 : 0;
        return h;
    }
    h.full = (way >> 2 & 1) && !(features && patterned);
    if (h.full)
        h.q_tokens = tokens = queries < tokens ? queries : tokens, h.kv_tokens = tokens;
    if (features) {
        h.w = w, h.rows = ROWS, h.map = (oracle_map)((way >> 3 & 1) | (!patterned && way & 64 ? 2 : 0));
        h.calibration = way & 16 && h.map != ORACLE_RELU ? &calibration : NULL;
        h.eps = 1e-3;
    }
    pattern.block = 8, pattern.dilation = 1;
    pattern.window = way & 32 ? 9 : 0;
    pattern.globals = way & 16 ? 0 : 2;
    if (features) {
        pattern.far_gain = 0.7, pattern.far_exact = way >> 2 & 1;
    } else {
        pattern.dilation = 1 + (way >> 3 & 1);
        if (way & 16)
            pattern.block_offsets = offsets, pattern.block_keys = keys;
    }
    if (way & 8)
        pattern.global_tokens = listed, pattern.global_count = 3;
    if (patterned)
        h.pattern = pattern;
    return h;
}

static double sums_agree(int way)
{
    static double out[2][QUERIES * D], lse[2][QUERIES];
    const oracle_head h = head_of(way, QUERIES, TOKENS);
    if (!h.rows || oracle_plain(&h) || (h.pattern.block && h.pattern.far_exact))
        return 0;
    oracle_sums(&h, out[0], lse[0]);
    oracle_pairs(&h, out[1], lse[1]);
    return fmax(distance(out[0], out[1], QUERIES * D), distance(lse[0], lse[1], QUERIES));
}

/* sum of dout . out + dlse lse; queries that see nothing are left out. */
static double loss_of(const oracle_head *h, const float *dout, const float *dlse)
{
    static double out[TOKENS * D], lse[TOKENS];
    double sum = 0;
    (oracle_is_linear(h) ? oracle_linear : oracle_pairs)(h, out, lse);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        sum += lse[i] > -INFINITY ? (double)dlse[i] * lse[i] : 0;
        for (int d = 0; d < D; d++)
            sum += (double)dout[i * D + d] * out[i * D + d];
    }
    return sum;
}

/* The sign of every projection of relu, as bits of a sum: where it changes, a difference is no derivative. */
static double signs(const oracle_head *h)
{
    double sum = 0, *l[2] = {oracle_all_features(h, 1), oracle_all_features(h, 0)};
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < (side ? h->kv_tokens : h->q_tokens) * (ROWS + 1) && h->map == ORACLE_RELU; i++)
            sum += l[side][i] > h->eps ? sin((double)(i + 1)) : 0;
    free(l[0]);
    free(l[1]);
    return sum;
}

/* The derivative by *x: central differences of two steps, extrapolated; NaN across a kink. The inputs are multiples of
 * 2^-16, so that float holds every step exactly. */
static double difference(const oracle_head *h, const float *dout, const float *dlse, float *x)
{
    const float here = *x;
    double slope[2], before;
    int bent = 0;
    for (int i = 0; i < 2; i++) {
        const float step = i ? 1.0f / 512 : 1.0f / 1024;
        *x = here + step;
        slope[i] = loss_of(h, dout, dlse);
        before = signs(h);
        *x = here - step;
        bent |= signs(h) != before;
        slope[i] = (slope[i] - loss_of(h, dout, dlse)) / (2 * (double)step);
    }
    *x = here;
    return bent ? NAN : (4 * slope[0] - slope[1]) / 3;
}

static double gradients_agree(int way, int norm)
{
    enum { N = 44, SHORT = 41 };
    static float dout[N * D], dlse[N];
    static double dq[N * D], dk[N * D], dv[N * D];
    const oracle_head h = head_of(way, SHORT, N);
    oracle_loss loss = {dout, dlse, 0, dq, dk, dv};
    oracle_random r = {9};
    double worst = 0, size = 0;
    if (h.rows && h.map == ORACLE_TRIG && norm > 1) /* sums cancel, the guard takes over */
        return 0;
    oracle_vector(&r, dlse, N, -3);
    for (int i = 0; i < N; i++)
        oracle_vector(&r, dout + i * D, D, -3);
    memset(dq, 0, sizeof dq), memset(dk, 0, sizeof dk), memset(dv, 0, sizeof dv);
    oracle_backward(&h, &loss);
    for (int i = 0; i < N * D; i++)
        size = fmax(size, fmax(fabs(dq[i]), fmax(fabs(dk[i]), fabs(dv[i]))));
    for (int i = way % 5; i < h.q_tokens * D; i += 23) /* fmax passes over NaN */
        worst = fmax(worst, fabs(difference(&h, dout, dlse, q + i) - dq[i]));
    for (int i = way % 7; i < h.kv_tokens * D; i += 23) {
        worst = fmax(worst, fabs(difference(&h, dout, dlse, k + i) - dk[i]));
        worst = fmax(worst, fabs(difference(&h, dout, dlse, v + i) - dv[i]));
    }
    return size > 0 ? worst / size : INFINITY;
}

/* positive: away from the bends of maps and from sums that come close to 0. */
static void inputs(oracle_kind kind, double norm, int positive)
{
    float *const all[] = {q, k, v};
    oracle_inputs(kind, norm, 0, 7, D, QUERIES, TOKENS, q, k, v);
    for (int t = 0; t < 3; t++)
        for (int i = 0; i < TOKENS * D; i++)
            all[t][i] = (float)rint((double)all[t][i] * 65536) / 65536;
    for (int i = 0; i < TOKENS * D && positive; i++)
        q[i] = fabsf(q[i]) + 0.0625f, k[i] = fabsf(k[i]) + 0.0625f;
    calibration = oracle_calibrate(q, QUERIES, 0, k, TOKENS, 0, D, 0, ORACLE_OPTIMAL);
}

int main(void)
{
    oracle_random r = {5};
    double sums = 0, gradients = 0, linear = 0;
    for (int i = 0; i < ROWS; i++)
        oracle_vector(&r, w + i * D, D, 3);
    for (int kind = 0; kind < ORACLE_KINDS; kind++) {
        inputs((oracle_kind)kind, 40, 0);
        for (int way = 0; way < WAYS; way++)
            sums = fmax(sums, sums_agree(way));
        oracle_calibration_free(&calibration);
    }
    for (int norm = 1; norm <= 4; norm += 3) {
        inputs(ORACLE_GAUSS, norm, 0);
        for (int way = 0; way < WAYS; way++)
            gradients = fmax(gradients, gradients_agree(way, norm));
        oracle_calibration_free(&calibration);
    }
    for (int positive = 0; positive < 2; positive++)
        for (int way = WAYS; way < WAYS + 8 * (ORACLE_MAPS - ORACLE_ELU); way++) {
            inputs(ORACLE_GAUSS, 1, positive);
            for (int i = 0; i < TOKENS * D && !positive; i++) { /* signed: no input within a step of 0 */
                q[i] += q[i] < 0 ? -0.0625f : 0.0625f;
                k[i] += k[i] < 0 ? -0.0625f : 0.0625f;
            }
            if (positive || head_of(way, QUERIES, TOKENS).map != ORACLE_IDENTITY)
                linear = fmax(linear, gradients_agree(way, 1));
            oracle_calibration_free(&calibration);
        }
    printf("sums %g, gradients %g, of linear %g\n", sums, gradients, linear);
    return sums < 1e-10 && gradients < 1e-8 && linear < 1e-8 ? 0 : 1;
}
