/* The fp64 oracle: attention and its gradients straight from the definition, in plain loops and double precision. It
 * shares no code with the kernels. One head and one sequence at a time; keys folded into a state earlier are simply the
 * first keys here, because query i of a causal call stands at position i + kv_tokens - q_tokens.
 *
 * Every operator is a softmax over the logits l_ij of its pairs (oracle_link says which kind a pair is):
 *     out_i = sum_j e^(l_ij) v_j / sum_j e^(l_ij),   lse_i = ln sum_j e^(l_ij)
 * A pair is unseen (l = -inf), exact (l = q'_i . k'_j with x' = sqrt(scale) x), or estimated by random features:
 *     l_ij = ln 1/m sum_r exp(lq_ir + lk_jr),   lq_ir = w_r . q'_i - |q'_i|^2 / 2,   lk_jr = w_r . k'_j - |k'_j|^2 / 2
 * where the map cosh uses every w_r twice, with both signs. Of the maps trig and relu the pair's weight is
 *     e^(|q'_i|^2/2 + |k'_j|^2/2) / rows sum_r cos(w_r . (q'_i - k'_j)),   1/m sum_r f(w_r . q'_i) f(w_r . k'_j), f(u)
 * = max(0, u) + eps and out = sum_j A_ij v_j / D_i, lse = ln D_i with D_i = sum_j A_ij; for trig D_i is at least 2^-20
 * sum_j e^(|q'_i|^2/2 + |k'_j|^2/2).
 */
#ifndef ORACLE_H
#define ORACLE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define ORACLE_FN static inline __attribute__((unused))
#else
#define ORACLE_FN static inline
#endif

typedef enum oracle_map {
    ORACLE_EXP,
    ORACLE_COSH,
    ORACLE_TRIG,
    ORACLE_RELU,
    ORACLE_ELU, /* from here on: linear */
    ORACLE_LINEAR_RELU,
    ORACLE_IDENTITY,
    ORACLE_TAYLOR2,
    ORACLE_SOFTMAXQK,
    ORACLE_MAPS
} oracle_map;

/* What a calibration derives from a sample of one head, in the units of the arrays (not of x'). */
typedef struct oracle_calibration {
    double tau, widening;                  /* s^2: see oracle_row_weight; 0: rows as they are */
    double *q_mean, *k_mean, *psi, *k_var; /* [dim] each */
} oracle_calibration;

static const char *const oracle_map_name[ORACLE_MAPS]
#if defined(__GNUC__) || defined(__clang__)
    __attribute__((unused))
#endif
    = {"exp", "cosh", "trig", "relu", "elu", "relu", "identity", "taylor2", "softmaxqk"};

/* The pattern of one head; block is the contract's, 0: no pattern. */
typedef struct oracle_pattern {
    int64_t window, dilation, globals;
    const int32_t *global_tokens; /* [global_count] */
    int64_t global_count;
    int64_t block;
    const int32_t *block_offsets, *block_keys; /* of this head's list; NULL: none */
    double far_gain;
    int far_exact;
} oracle_pattern;

typedef struct oracle_head {
    int64_t q_tokens, kv_tokens;
    int64_t q_stride, k_stride, v_stride; /* elements from token to token; 0 = dim */
    int dim;
    const float *q, *k, *v;
    double scale; /* 0 = 1/sqrt(dim) */
    int full;     /* 1: every query sees every key; 0: causal */

    oracle_map map; /* of the features, where there are any */

    /* favor and hybrid only */
    const float *w; /* [rows][dim] as K_projection_read gives it */
    int rows;       /* m; of cosh (each serves both signs) and trig (sine and cosine) m/2 */
    double eps;     /* of relu */
    const oracle_calibration *calibration;

    oracle_pattern pattern; /* sparse and hybrid only */

    /* linear only; scale 0 = 1, but of taylor2 */
    double decay; /* natural log of the factor per token */
    int unnormalised;
    int values; /* dim of v and out; 0 = dim */
} oracle_head;

ORACLE_FN double *oracle_doubles(size_t count)
{
    double *p = (double *)calloc(count ? count : 1, sizeof(double));
    if (!p)
        abort();
    return p;
}

ORACLE_FN int oracle_is_linear(const oracle_head *h)
{
    return h->map >= ORACLE_ELU;
}

ORACLE_FN double oracle_scale(const oracle_head *h)
{
    if (oracle_is_linear(h) && h->map != ORACLE_TAYLOR2)
        return h->scale > 0 ? h->scale : 1;
    return h->scale > 0 ? h->scale : 1 / sqrt((double)h->dim);
}

ORACLE_FN int oracle_values(const oracle_head *h)
{
    return h->values ? h->values : h->dim;
}

ORACLE_FN const float *oracle_row(const float *data, int64_t stride, int dim, int64_t token)
{
    return data + token * (stride ? stride : dim);
}

/* Features of a point; 0 without any. */
ORACLE_FN int oracle_m(const oracle_head *h)
{
    return h->map == ORACLE_COSH || h->map == ORACLE_TRIG ? 2 * h->rows : h->rows;
}

/* Features that are not exponentials: these are held as they are, behind them the exponent of a factor of all. */
ORACLE_FN int oracle_plain(const oracle_head *h)
{
    return h->rows && (h->map == ORACLE_TRIG || h->map == ORACLE_RELU);
}

/* ---- who sees whom --------------------------------------------------------------------------------------------- */

typedef enum oracle_kinship { ORACLE_UNSEEN, ORACLE_NEAR, ORACLE_FAR } oracle_kinship; /* FAR: by features */

ORACLE_FN int64_t oracle_position(const oracle_head *h, int64_t i)
{
    return h->full ? i : i + h->kv_tokens - h->q_tokens;
}

ORACLE_FN int oracle_global(const oracle_pattern *p, int64_t token)
{
    int listed = 0;
    for (int64_t g = 0; g < p->global_count; g++)
        listed |= p->global_tokens[g] == token;
    return listed || token < p->globals;
}

/* sparse: does the query at position p see key j, the mask aside? */
ORACLE_FN int oracle_sees(const oracle_pattern *pattern, int64_t p, int64_t j)
{
    const int64_t away = j < p ? p - j : j - p, b = p / pattern->block;
    int seen = away % pattern->dilation == 0 && away / pattern->dilation < pattern->window;
    seen |= oracle_global(pattern, j) || oracle_global(pattern, p);
    if (pattern->block_offsets)
        for (int32_t n = pattern->block_offsets[b]; n < pattern->block_offsets[b + 1]; n++)
            seen |= j / pattern->block == pattern->block_keys[n];
    return seen;
}

/* hybrid: how the query at position p and an earlier key (or its own) meet. */
ORACLE_FN oracle_kinship oracle_nearness(const oracle_pattern *pattern, int64_t p, int64_t j)
{
    const int64_t blocks = (pattern->window + pattern->block - 1) / pattern->block;
    const int within = p / pattern->block - j / pattern->block <= blocks;
    if (oracle_global(pattern, j) || oracle_global(pattern, p))
        return ORACLE_NEAR;
    if (pattern->far_exact)
        return within ? ORACLE_FAR : ORACLE_UNSEEN;
    return within ? ORACLE_NEAR : ORACLE_FAR;
}

/* How query i and key j meet. */
ORACLE_FN oracle_kinship oracle_link(const oracle_head *h, int64_t i, int64_t j)
{
    const int64_t p = oracle_position(h, i);
    if (!h->full && j > p)
        return ORACLE_UNSEEN;
    if (h->pattern.block && !h->rows)
        return oracle_sees(&h->pattern, p, j) ? ORACLE_NEAR : ORACLE_UNSEEN;
    if (h->pattern.block)
        return oracle_nearness(&h->pattern, p, j);
    return h->rows ? ORACLE_FAR : ORACLE_NEAR;
}

/* ---- features -------------------------------------------------------------------------------------------------- */

/* ln of the features of one point x: l_r = +-w_r . x - |x|^2 / 2 + extra, for all m features, and l[m] = 0; of plain
 * features themselves, and l[m] = |x|^2 / 2 + extra (trig) or 0. */
ORACLE_FN void oracle_features(const oracle_head *h, const double *x, double extra, double *l)
{
    double norm = 0;
    for (int d = 0; d < h->dim; d++)
        norm += x[d] * x[d];
    for (int r = 0; r < h->rows; r++) {
        double dot = 0;
        for (int d = 0; d < h->dim; d++)
            dot += (double)h->w[r * h->dim + d] * x[d];
        l[r] = h->map == ORACLE_TRIG   ? cos(dot)
               : h->map == ORACLE_RELU ? fmax(0, dot) + h->eps
                                       : dot - norm / 2 + extra;
        if (h->map == ORACLE_COSH)
            l[h->rows + r] = -dot - norm / 2 + extra;
        if (h->map == ORACLE_TRIG)
            l[h->rows + r] = sin(dot);
    }
    l[oracle_m(h)] = h->map == ORACLE_TRIG ? norm / 2 + extra : 0;
}

/* A query (or key) as the features see it: x'_d, the part of the logit that is no feature's, and the derivatives of
 * both by the point's own coordinates. With a calibration, q'.k' = q~'.k~' + qmean'.k~' + q'.kmean' (q~ = q - qmean,
 * and so k~): the random features approximate the first term, tempered and balanced; the second belongs to the key; the
 * third and the mass that tempering takes away belong to the query. */
typedef struct oracle_point {
    double extra, *x, *slope, *tilt; /* slope: dx'_d/dx_d, tilt: d extra/dx_d */
} oracle_point;

ORACLE_FN oracle_point oracle_point_at(const oracle_head *h, const float *row, int query)
{
    const oracle_calibration *c = h->calibration;
    const double s = oracle_scale(h);
    oracle_point p = {0, NULL, NULL, NULL};
    p.x = oracle_doubles((size_t)h->dim * 3);
    p.slope = p.x + h->dim, p.tilt = p.slope + h->dim;
    for (int d = 0; d < h->dim; d++) {
        const double x = (double)row[d];
        p.slope[d] = sqrt(s);
        p.x[d] = sqrt(s) * x;
        if (c && query) {
            const double centred = x - c->q_mean[d], lost = (1 - pow(c->tau, 4)) / 2 * s * s * c->k_var[d];
            p.slope[d] = sqrt(s) * c->tau * c->psi[d];
            p.x[d] = p.slope[d] * centred;
            p.extra += s * x * c->k_mean[d] + lost * centred * centred;
            p.tilt[d] = s * c->k_mean[d] + 2 * lost * centred;
        } else if (c) {
            const double centred = x - c->k_mean[d];
            p.slope[d] = sqrt(s) * c->tau / c->psi[d];
            p.x[d] = p.slope[d] * centred;
            p.extra += s * c->q_mean[d] * centred;
            p.tilt[d] = s * c->q_mean[d];
        }
    }
    return p;
}

ORACLE_FN void oracle_point_features(const oracle_head *h, const float *row, int query, double *l)
{
    oracle_point p = oracle_point_at(h, row, query);
    oracle_features(h, p.x, p.extra, l);
    free(p.x);
}

/* Optimal positive features: rows are s times as long as normal vectors, and a key's features have the ratio of the
 * densities at w, s^dim e^(-|w|^2 / 2) / e^(-|w|^2 / 2 s^2); its logarithm, of base 2 in multiples of 2^-10. */
ORACLE_FN double oracle_row_weight(const oracle_head *h, int r)
{
    const double square = h->calibration->widening;
    double norm = 0;
    for (int d = 0; d < h->dim; d++)
        norm += pow((double)h->w[r * h->dim + d], 2);
    return floor((h->dim * log(square) - norm + norm / square) / 2 / log(2) * 1024 + 0.5) / 1024 * log(2);
}

/* The log features of query i, and of key j. */
ORACLE_FN void oracle_query_features(const oracle_head *h, int64_t i, double *l)
{
    oracle_point_features(h, oracle_row(h->q, h->q_stride, h->dim, i), 1, l);
}

ORACLE_FN void oracle_key_features(const oracle_head *h, int64_t j, double *l)
{
    oracle_point_features(h, oracle_row(h->k, h->k_stride, h->dim, j), 0, l);
    for (int r = 0; h->calibration && h->calibration->widening > 0 && !oracle_plain(h) && r < oracle_m(h); r++)
        l[r] += oracle_row_weight(h, r % h->rows);
}

/* ---- attention, pair by pair ----------------------------------------------------------------------------------- */

/* out = sum_j +-e^(l_j) v_j / sum_j +-e^(l_j), returns ln of that sum; all unseen: 0 and -inf. The signs may be NULL,
 * and the sum counts as e^least at least. */
ORACLE_FN double oracle_softmax(const oracle_head *h, const double *l, const double *sign, double least, double *out)
{
    double top = -INFINITY, sum = 0;
    memset(out, 0, (size_t)oracle_values(h) * sizeof *out);
    for (int64_t j = 0; j < h->kv_tokens; j++)
        top = l[j] > top ? l[j] : top;
    if (top == -INFINITY)
        return top;
    for (int64_t j = 0; j < h->kv_tokens; j++) {
        const float *v = oracle_row(h->v, h->v_stride, oracle_values(h), j);
        const double e = exp(l[j] - top) * (sign ? sign[j] : 1);
        sum += e;
        for (int d = 0; d < oracle_values(h) && e != 0; d++)
            out[d] += e * (double)v[d];
    }
    sum = fmax(sum, exp(least - top));
    for (int d = 0; d < oracle_values(h); d++)
        out[d] /= sum;
    return top + log(sum);
}

ORACLE_FN double oracle_near_logit(const oracle_head *h, int64_t i, int64_t j)
{
    const float *q = oracle_row(h->q, h->q_stride, h->dim, i), *k = oracle_row(h->k, h->k_stride, h->dim, j);
    double l = 0;
    for (int d = 0; d < h->dim; d++)
        l += (double)q[d] * (double)k[d];
    return oracle_scale(h) * l;
}

/* ln |A| of a pair by features, and the sign of A; share [m] (or NULL): what each feature contributes to A, the
 * derivatives of ln |A| by the features' logarithms. */
ORACLE_FN double oracle_far_logit(const oracle_head *h, const double *lq, const double *lk, double *share, double *sign)
{
    const int m = oracle_m(h);
    double top = -INFINITY, sum = 0;
    *sign = 1;
    if (oracle_plain(h)) {
        for (int r = 0; r < m; r++)
            sum += lq[r] * lk[r];
        for (int r = 0; r < m && share; r++)
            share[r] = lq[r] * lk[r] / sum;
        *sign = sum < 0 ? -1 : 1;
        return log(fabs(sum)) + lq[m] + lk[m] - log((double)(h->map == ORACLE_TRIG ? h->rows : m));
    }
    for (int r = 0; r < m; r++)
        top = fmax(top, lq[r] + lk[r]);
    for (int r = 0; r < m; r++) {
        const double e = exp(lq[r] + lk[r] - top);
        sum += e;
        if (share)
            share[r] = e;
    }
    for (int r = 0; r < m && share; r++)
        share[r] /= sum;
    return top + log(sum) - log((double)m) + h->pattern.far_gain;
}

/* The log features of every query and key: [q_tokens][m + 1], [kv_tokens][m + 1]. */
ORACLE_FN double *oracle_all_features(const oracle_head *h, int query)
{
    const int64_t rows = query ? h->q_tokens : h->kv_tokens;
    double *l = oracle_doubles((size_t)rows * (size_t)(oracle_m(h) + 1));
    for (int64_t t = 0; t < rows && h->rows; t++)
        (query ? oracle_query_features : oracle_key_features)(h, t, l + t * (oracle_m(h) + 1));
    return l;
}

/* trig: ln sum_j e^(|q'_i|^2/2 + |k'_j|^2/2) over the keys that query i sees, what its sum would be were all cosines 1;
 * otherwise -inf. */
ORACLE_FN double oracle_mass(const oracle_head *h, const double *lq, const double *lk, int64_t i)
{
    const int m = oracle_m(h);
    double top = -INFINITY, sum = 0;
    if (!h->rows || h->map != ORACLE_TRIG)
        return top;
    for (int64_t j = 0; j < h->kv_tokens; j++)
        if (oracle_link(h, i, j) == ORACLE_FAR)
            top = fmax(top, lk[j * (m + 1) + m]);
    for (int64_t j = 0; j < h->kv_tokens; j++)
        if (oracle_link(h, i, j) == ORACLE_FAR)
            sum += exp(lk[j * (m + 1) + m] - top);
    return top + log(sum) + lq[i * (m + 1) + m];
}

/* The definition itself: q_tokens * kv_tokens * m exponentials where there are features. out [q_tokens][dim]; lse
 * [q_tokens] or NULL. */
ORACLE_FN void oracle_pairs(const oracle_head *h, double *out, double *lse)
{
    const int m = oracle_m(h);
    double *l = oracle_doubles((size_t)h->kv_tokens), *lq = oracle_all_features(h, 1), *lk = oracle_all_features(h, 0);
    double *sign = oracle_doubles((size_t)h->kv_tokens);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        double sum;
        for (int64_t j = 0; j < h->kv_tokens; j++) {
            const oracle_kinship link = oracle_link(h, i, j);
            sign[j] = 1;
            l[j] = link == ORACLE_NEAR  ? oracle_near_logit(h, i, j)
                   : link == ORACLE_FAR ? oracle_far_logit(h, lq + i * (m + 1), lk + j * (m + 1), NULL, &sign[j])
                                        : -INFINITY;
        }
        sum = oracle_softmax(h, l, sign, oracle_mass(h, lq, lk, i) - 20 * log(2), out + i * oracle_values(h));
        if (lse)
            lse[i] = sum;
    }
    free(l);
    free(lq);
    free(lk);
    free(sign);
}

/* How far the terms of a row's sum of weights exceed it: 1, but of taylor2, whose state sums up products of channels,
 * whatever their signs: sum_j (1 + t + t^2/2) / sum_j A_ij with t = scale |q_i| |k_j|. A row's rounding errors grow
 * with it. */
ORACLE_FN double oracle_spread(const oracle_head *h, int64_t i)
{
    const float *q = oracle_row(h->q, h->q_stride, h->dim, i);
    double terms = 0, sum = 0;
    for (int64_t j = 0; j < h->kv_tokens && h->map == ORACLE_TAYLOR2; j++) {
        const float *k = oracle_row(h->k, h->k_stride, h->dim, j);
        const int64_t away = i + h->kv_tokens - h->q_tokens - j;
        const double left = h->full ? 1 : away < 0 ? 0 : exp(h->decay * (double)away);
        double qq = 0, kk = 0, s = 0, t;
        for (int d = 0; d < h->dim; d++) {
            qq += (double)q[d] * (double)q[d];
            kk += (double)k[d] * (double)k[d];
            s += (double)q[d] * (double)k[d];
        }
        t = oracle_scale(h) * sqrt(qq * kk), s *= oracle_scale(h);
        terms += left * (1 + t + t * t / 2);
        sum += left * (1 + s + s * s / 2);
    }
    return sum > 0 ? terms / sum : 1;
}

/* How much of a row cancels: what its sum would be without, relative to its sum. At most 2^20; 1 but for trig. */
ORACLE_FN void oracle_cancellation(const oracle_head *h, const double *lse, double *ratio)
{
    double *lq = oracle_all_features(h, 1), *lk = oracle_all_features(h, 0);
    for (int64_t i = 0; i < h->q_tokens; i++)
        ratio[i] = oracle_is_linear(h) ? oracle_spread(h, i) : fmax(1, exp(oracle_mass(h, lq, lk, i) - lse[i]));
    free(lq);
    free(lk);
}

/* Exact softmax attention, whatever else the head has. */
ORACLE_FN void oracle_exact(const oracle_head *h, double *out, double *lse)
{
    oracle_head exact = *h;
    exact.rows = 0;
    exact.map = ORACLE_EXP;
    exact.pattern.block = 0;
    oracle_pairs(&exact, out, lse);
}

/* What the error of a row is relative to: the longest v; where its sum cancels, as often that (or the row, if it came
 * out longer) as the sum would be without. */
ORACLE_FN double oracle_row_scale(const double *row, int dim, double ratio, double v_norm)
{
    double length = 0;
    for (int d = 0; d < dim; d++)
        length += row[d] * row[d];
    return ratio * fmax(fmax(v_norm, sqrt(length)), 1e-30);
}

/* ---- the far field with its two sums exchanged ----------------------------------------------------------------- */

/* Add key j to the sums of every feature: sums[r] = { ln reference, sum of weights, weighted sum of v [dim] }. */
ORACLE_FN void oracle_fold(const oracle_head *h, int64_t j, int m, double *lk, double *sums)
{
    const float *v = oracle_row(h->v, h->v_stride, oracle_values(h), j);
    oracle_key_features(h, j, lk);
    for (int r = 0; r < m; r++) {
        double *s = sums + (size_t)r * (size_t)(oracle_values(h) + 2), e;
        if (!(s[1] > 0) || lk[r] > s[0]) {
            const double shrink = s[1] > 0 ? exp(s[0] - lk[r]) : 0;
            for (int d = 1; d < oracle_values(h) + 2; d++)
                s[d] *= shrink;
            s[0] = lk[r];
        }
        e = exp(lk[r] - s[0]);
        s[1] += e;
        for (int d = 0; d < oracle_values(h); d++)
            s[2 + d] += e * (double)v[d];
    }
}

/* One query against the sums. */
ORACLE_FN double oracle_read(const oracle_head *h, int m, const double *lq, const double *sums, double *out)
{
    const size_t width = (size_t)(oracle_values(h) + 2);
    double top = -INFINITY, den = 0;
    memset(out, 0, (size_t)oracle_values(h) * sizeof *out);
    for (int r = 0; r < m; r++)
        top = fmax(top, lq[r] + sums[(size_t)r * width]);
    for (int r = 0; r < m; r++) {
        const double *s = sums + (size_t)r * width, p = exp(lq[r] + s[0] - top);
        den += p * s[1];
        for (int d = 0; d < oracle_values(h); d++)
            out[d] += p * s[2 + d];
    }
    for (int d = 0; d < oracle_values(h); d++)
        out[d] /= den;
    return top + log(den) - log((double)m);
}

/* favor and hybrid: the estimated keys are summed feature by feature as the queries pass them, sum_r phi_r(q_i) sum_j
 * phi_r(k_j) v_j; the exact ones pair by pair. Agrees with oracle_pairs to about 1e-12. */
ORACLE_FN void oracle_sums(const oracle_head *h, double *out, double *lse)
{
    const int m = oracle_m(h);
    double *sums = oracle_doubles((size_t)m * (size_t)(oracle_values(h) + 2)), *lr = oracle_doubles((size_t)m + 1);
    double *l = oracle_doubles((size_t)h->kv_tokens), *far = oracle_doubles((size_t)oracle_values(h));
    int64_t seen = 0;
    for (int64_t i = 0; i < h->q_tokens; i++) {
        double *row = out + i * oracle_values(h), near_lse, far_lse = -INFINITY, total;
        const int alone = h->pattern.block && oracle_global(&h->pattern, oracle_position(h, i)); /* no far field */
        for (int64_t j = 0; j < h->kv_tokens; j++)
            l[j] = oracle_link(h, i, j) == ORACLE_NEAR ? oracle_near_logit(h, i, j) : -INFINITY;
        near_lse = total = oracle_softmax(h, l, NULL, -INFINITY, row);
        for (; !alone && seen < h->kv_tokens &&
               (oracle_link(h, i, seen) == ORACLE_FAR || (h->pattern.block && oracle_global(&h->pattern, seen)));
             seen++)
            if (oracle_link(h, i, seen) == ORACLE_FAR)
                oracle_fold(h, seen, m, lr, sums);
        if (!alone && sums[1] > 0) {
            oracle_query_features(h, i, lr);
            far_lse = oracle_read(h, m, lr, sums, far) + h->pattern.far_gain;
            total = fmax(near_lse, far_lse) + log1p(exp(-fabs(near_lse - far_lse)));
            for (int d = 0; d < oracle_values(h); d++)
                row[d] = exp(near_lse - total) * row[d] + exp(far_lse - total) * far[d];
        }
        if (lse)
            lse[i] = total;
    }
    free(sums);
    free(lr);
    free(l);
    free(far);
}

ORACLE_FN void oracle_favor(const oracle_head *h, double *out, double *lse)
{
    oracle_head favor = *h;
    favor.pattern.block = 0;
    favor.pattern.far_gain = 0;
    (oracle_plain(h) ? oracle_pairs : oracle_sums)(&favor, out, lse);
}

/* ---- linear attention -------------------------------------------------------------------------------------------
 *
 *     A_ij = scale phi(q_i) . phi(k_j) e^(decay (i - j)),   out_i = sum_j A_ij v_j / sum_j A_ij,   lse_i = sum_j A_ij
 *
 * with phi(x) = elu(x) + 1, max(x, 0), x; taylor2: A_ij = 1 + s + s^2/2 of s = scale q_i . k_j instead; softmaxqk: phi
 * of a query is its softmax, phi of a key its share in every channel's softmax over the keys. Unnormalised: out_i =
 * sum_j A_ij v_j. A row without weights is 0.
 */

/* phi of all queries, or of all keys: [tokens][dim]. taylor2: x itself. */
ORACLE_FN double *oracle_mapped(const oracle_head *h, int query)
{
    const int64_t tokens = query ? h->q_tokens : h->kv_tokens, dim = h->dim;
    double *phi = oracle_doubles((size_t)(tokens * dim));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < dim; d++) {
            const double x = (double)(query ? oracle_row(h->q, h->q_stride, h->dim, t)
                                            : oracle_row(h->k, h->k_stride, h->dim, t))[d];
            phi[t * dim + d] = h->map == ORACLE_ELU           ? (x > 0 ? x + 1 : exp(x))
                               : h->map == ORACLE_LINEAR_RELU ? fmax(x, 0)
                                                              : x;
        }
    if (h->map != ORACLE_SOFTMAXQK)
        return phi;
    for (int64_t n = 0; n < (query ? tokens : dim); n++) { /* a softmax over count entries, so far apart */
        const int64_t count = query ? dim : tokens, apart = query ? 1 : dim;
        double *x = phi + (query ? n * dim : n), top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < count; i++)
            top = fmax(top, x[i * apart]);
        for (int64_t i = 0; i < count; i++)
            sum += x[i * apart] = exp(x[i * apart] - top);
        for (int64_t i = 0; i < count; i++)
            x[i * apart] /= sum;
    }
    return phi;
}

/* A_ij; *slope, if asked for, its derivative by phi(q_i) . phi(k_j). 0 where i does not see j. */
ORACLE_FN double oracle_weight(const oracle_head *h, int64_t i, int64_t j, const double *pq, const double *pk,
                               double *slope)
{
    const int64_t away = i + h->kv_tokens - h->q_tokens - j;
    double dot = 0, left, unused;
    slope = slope ? slope : &unused;
    *slope = 0;
    if (!h->full && away < 0)
        return 0;
    left = h->full ? 1 : exp(h->decay * (double)away);
    for (int d = 0; d < h->dim; d++)
        dot += pq[i * h->dim + d] * pk[j * h->dim + d];
    *slope = left * oracle_scale(h);
    dot *= oracle_scale(h);
    if (h->map != ORACLE_TAYLOR2)
        return left * dot;
    *slope *= 1 + dot;
    return left * (1 + dot + dot * dot / 2);
}

ORACLE_FN void oracle_linear(const oracle_head *h, double *out, double *lse)
{
    const int dim = oracle_values(h);
    double *pq = oracle_mapped(h, 1), *pk = oracle_mapped(h, 0);
    memset(out, 0, (size_t)(h->q_tokens * dim) * sizeof *out);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        double sum = 0;
        for (int64_t j = 0; j < h->kv_tokens; j++) {
            const float *v = oracle_row(h->v, h->v_stride, dim, j);
            const double a = oracle_weight(h, i, j, pq, pk, NULL);
            sum += a;
            for (int d = 0; d < dim && a != 0; d++)
                out[i * dim + d] += a * (double)v[d];
        }
        for (int d = 0; d < dim && !h->unnormalised; d++)
            out[i * dim + d] = sum != 0 ? out[i * dim + d] / sum : 0;
        if (lse)
            lse[i] = sum;
    }
    free(pq);
    free(pk);
}

/* dx += what the gradients g by phi become through the map. */
ORACLE_FN void oracle_mapped_back(const oracle_head *h, int query, const double *phi, const double *g, double *dx)
{
    const int64_t tokens = query ? h->q_tokens : h->kv_tokens, dim = h->dim;
    for (int64_t t = 0; t < tokens * dim && h->map != ORACLE_SOFTMAXQK; t++)
        dx[t] += g[t] * (h->map == ORACLE_ELU ? fmin(phi[t], 1) : h->map == ORACLE_LINEAR_RELU ? phi[t] > 0 : 1);
    for (int64_t n = 0; n < (query ? tokens : dim) && h->map == ORACLE_SOFTMAXQK; n++) {
        const int64_t count = query ? dim : tokens, apart = query ? 1 : dim, at = query ? n * dim : n;
        double mean = 0;
        for (int64_t i = 0; i < count; i++)
            mean += phi[at + i * apart] * g[at + i * apart];
        for (int64_t i = 0; i < count; i++)
            dx[at + i * apart] += phi[at + i * apart] * (g[at + i * apart] - mean);
    }
}

/* The head's operator, in the way that is fast enough for long sequences. */
ORACLE_FN void oracle_attention(const oracle_head *h, double *out, double *lse)
{
    if (oracle_is_linear(h))
        oracle_linear(h, out, lse);
    else if (h->rows && !oracle_plain(h) && !(h->pattern.block && h->pattern.far_exact))
        oracle_sums(h, out, lse);
    else
        oracle_pairs(h, out, lse);
}

/* ---- gradients, pair by pair ----------------------------------------------------------------------------------- */

/* What a loss sends back: its gradients by out [q_tokens][dim] (stride 0 = dim) and by lse [q_tokens] (or NULL), and
 * what comes of it. dq, dk, dv [tokens][dim] are added to: heads that share keys share dk and dv. */
typedef struct oracle_loss {
    const float *dout, *dlse;
    int64_t dout_stride;
    double *dq, *dk, *dv;
} oracle_loss;

/* The derivatives of the logarithms of row r's features by w_r . x' = u. */
ORACLE_FN double oracle_along(const oracle_head *h, const double *g, int r, double u)
{
    switch (h->map) {
    case ORACLE_COSH:
        return g[r] - g[h->rows + r];
    case ORACLE_TRIG:
        return g[h->rows + r] / tan(u) - g[r] * tan(u);
    case ORACLE_RELU:
        return u > 0 ? g[r] / (u + h->eps) : 0;
    default:
        return g[r];
    }
}

/* dx += sum_r g_r d l_r/dx of a point, l_r = +-w_r . x' - |x'|^2 / 2 + extra, or of plain features ln |f_r| and their
 * factor. */
ORACLE_FN void oracle_features_back(const oracle_head *h, const float *row, int query, const double *g, double *dx)
{
    oracle_point p = oracle_point_at(h, row, query);
    double all = 0, *along;
    for (int r = 0; r < oracle_m(h); r++)
        all += g[r];
    along = oracle_doubles((size_t)h->dim);
    for (int d = 0; d < h->dim; d++)
        along[d] = (h->map == ORACLE_TRIG ? all : h->map == ORACLE_RELU ? 0 : -all) * p.x[d];
    for (int r = 0; r < h->rows; r++) {
        double u = 0;
        for (int d = 0; d < h->dim; d++)
            u += (double)h->w[r * h->dim + d] * p.x[d];
        u = oracle_along(h, g, r, u);
        for (int d = 0; d < h->dim; d++)
            along[d] += u * (double)h->w[r * h->dim + d];
    }
    for (int d = 0; d < h->dim; d++)
        dx[d] += p.slope[d] * along[d] + (h->map == ORACLE_RELU ? 0 : p.tilt[d] * all);
    free(along);
    free(p.x);
}

/* linear: with n_i = sum_j A_ij (unnormalised: 1, and no out_i), dv_j = sum_i A_ij dout_i / n_i and the gradient by
 * A_ij is dout_i . (v_j - out_i) / n_i + dlse_i. */
ORACLE_FN void oracle_linear_backward(const oracle_head *h, const oracle_loss *loss)
{
    const int dim = h->dim, values = oracle_values(h);
    double *pq = oracle_mapped(h, 1), *pk = oracle_mapped(h, 0);
    double *gq = oracle_doubles((size_t)(h->q_tokens * dim)), *gk = oracle_doubles((size_t)(h->kv_tokens * dim));
    double *out = oracle_doubles((size_t)(h->q_tokens * values)), *lse = oracle_doubles((size_t)h->q_tokens);
    oracle_linear(h, out, lse);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        const float *dout = oracle_row(loss->dout, loss->dout_stride, values, i);
        const double part = h->unnormalised ? 1 : lse[i] != 0 ? 1 / lse[i] : 0;
        for (int64_t j = 0; j < h->kv_tokens; j++) {
            const float *v = oracle_row(h->v, h->v_stride, values, j);
            double slope, da = loss->dlse ? (double)loss->dlse[i] : 0;
            const double a = oracle_weight(h, i, j, pq, pk, &slope);
            for (int d = 0; d < values; d++) {
                da += part * (double)dout[d] * ((double)v[d] - (h->unnormalised ? 0 : out[i * values + d]));
                loss->dv[j * values + d] += a * part * (double)dout[d];
            }
            for (int d = 0; d < dim; d++) {
                gq[i * dim + d] += da * slope * pk[j * dim + d];
                gk[j * dim + d] += da * slope * pq[i * dim + d];
            }
        }
    }
    oracle_mapped_back(h, 1, pq, gq, loss->dq);
    oracle_mapped_back(h, 0, pk, gk, loss->dk);
    free(pq);
    free(pk);
    free(gq);
    free(gk);
    free(out);
    free(lse);
}

/* Softmax: with P_ij = e^(l_ij - lse_i), dv_j = sum_i P_ij dout_i and dl_ij = P_ij (dout_i . v_j - dout_i . out_i +
 * dlse_i). Pairs: an exact logit has the gradients scale k_j and scale q_i; an estimated one passes dl_ij on to the
 * exponents of its features, each its share, and these are summed up (gq, gk) before they go through the feature map.
 */
ORACLE_FN void oracle_softmax_backward(const oracle_head *h, const oracle_loss *loss)
{
    const int m = oracle_m(h), dim = h->dim;
    double *lq = oracle_all_features(h, 1), *lk = oracle_all_features(h, 0), *share = oracle_doubles((size_t)m);
    double *gq = oracle_doubles((size_t)h->q_tokens * (size_t)m),
           *gk = oracle_doubles((size_t)h->kv_tokens * (size_t)m);
    double *out = oracle_doubles((size_t)(h->q_tokens * dim)), *lse = oracle_doubles((size_t)h->q_tokens);
    oracle_pairs(h, out, lse);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        const float *q = oracle_row(h->q, h->q_stride, dim, i),
                    *dout = oracle_row(loss->dout, loss->dout_stride, dim, i);
        double delta = loss->dlse ? -(double)loss->dlse[i] : 0;
        for (int d = 0; d < dim; d++)
            delta += (double)dout[d] * out[i * dim + d];
        for (int64_t j = 0; j < h->kv_tokens; j++) {
            const float *k = oracle_row(h->k, h->k_stride, dim, j), *v = oracle_row(h->v, h->v_stride, dim, j);
            const oracle_kinship link = oracle_link(h, i, j);
            double p, sign = 1, dl = -delta;
            if (link == ORACLE_UNSEEN)
                continue;
            p = exp((link == ORACLE_NEAR ? oracle_near_logit(h, i, j)
                                         : oracle_far_logit(h, lq + i * (m + 1), lk + j * (m + 1), share, &sign)) -
                    lse[i]);
            p *= sign;
            for (int d = 0; d < dim; d++)
                dl += (double)dout[d] * (double)v[d];
            dl *= p;
            for (int d = 0; d < dim; d++)
                loss->dv[j * dim + d] += p * (double)dout[d];
            for (int d = 0; d < dim && link == ORACLE_NEAR; d++) {
                loss->dq[i * dim + d] += dl * oracle_scale(h) * (double)k[d];
                loss->dk[j * dim + d] += dl * oracle_scale(h) * (double)q[d];
            }
            for (int r = 0; r < m && link == ORACLE_FAR; r++) {
                gq[i * m + r] += dl * share[r];
                gk[j * m + r] += dl * share[r];
            }
        }
    }
    for (int64_t i = 0; i < h->q_tokens && m; i++)
        oracle_features_back(h, oracle_row(h->q, h->q_stride, dim, i), 1, gq + i * m, loss->dq + i * dim);
    for (int64_t j = 0; j < h->kv_tokens && m; j++)
        oracle_features_back(h, oracle_row(h->k, h->k_stride, dim, j), 0, gk + j * m, loss->dk + j * dim);
    free(lq);
    free(lk);
    free(share);
    free(gq);
    free(gk);
    free(out);
    free(lse);
}

ORACLE_FN void oracle_backward(const oracle_head *h, const oracle_loss *loss)
{
    (oracle_is_linear(h) ? oracle_linear_backward : oracle_softmax_backward)(h, loss);
}

/* ---- calibration ----------------------------------------------------------------------------------------------- */

ORACLE_FN void oracle_moments(const float *x, int64_t tokens, int64_t stride, int dim, double *mean, double *var)
{
    for (int d = 0; d < dim; d++) {
        mean[d] = var[d] = 0;
        for (int64_t t = 0; t < tokens; t++)
            mean[d] += (double)oracle_row(x, stride, dim, t)[d] / (double)tokens;
        for (int64_t t = 0; t < tokens; t++) {
            const double e = (double)oracle_row(x, stride, dim, t)[d] - mean[d];
            var[d] += e * e / (double)tokens;
        }
    }
}

enum { ORACLE_KEEP_MEAN = 1, ORACLE_KEEP_CHANNELS = 2, ORACLE_OPTIMAL = 32 };

/* s^2 of optimal positive features from z, the mean of |q' + k'|^2 / dim over all pairs of a sample, at most 16: where
 * the second moment of a feature's estimate of e^(|x|^2 / 2), |x|^2 = z dim, is least: that of s^2dim (2 s^2 -
 * 1)^(-dim/2) e^(2 s^2 |x|^2 / (2 s^2 - 1)), by bisection on the derivative of its logarithm. */
ORACLE_FN double oracle_widening(const oracle_calibration *c, const float *q, int64_t q_tokens, int64_t q_stride,
                                 const float *k, int64_t k_tokens, int64_t k_stride, int dim)
{
    double z = 0, least = 1, most = 100;
    for (int64_t i = 0; i < q_tokens; i++)
        for (int64_t j = 0; j < k_tokens; j++)
            for (int d = 0; d < dim; d++)
                z += pow(c->tau * c->psi[d] * ((double)oracle_row(q, q_stride, dim, i)[d] - c->q_mean[d]) +
                             c->tau / c->psi[d] * ((double)oracle_row(k, k_stride, dim, j)[d] - c->k_mean[d]),
                         2);
    z = fmin(z / (double)(q_tokens * k_tokens) / pow(dim, 1.5), 16);
    for (int n = 0; n < 100; n++) {
        const double y = (least + most) / 2, slope = 1 / y - 1 / (2 * y - 1) - 2 * z / pow(2 * y - 1, 2);
        *(slope < 0 ? &least : &most) = y;
    }
    return least;
}

/* The calibration of a sample: means, psi_d = (sum k~_d^2 / sum q~_d^2)^(1/4) (mean squares, should the samples differ
 * in length), variances of the keys. Strides 0 = dim, tau 0 = 0.7. */
ORACLE_FN oracle_calibration oracle_calibrate(const float *q, int64_t q_tokens, int64_t q_stride, const float *k,
                                              int64_t k_tokens, int64_t k_stride, int dim, double tau, uint32_t flags)
{
    oracle_calibration c;
    double *q_var = oracle_doubles((size_t)dim);
    c.tau = tau > 0 ? tau : 0.7;
    c.q_mean = oracle_doubles((size_t)dim);
    c.k_mean = oracle_doubles((size_t)dim);
    c.psi = oracle_doubles((size_t)dim);
    c.k_var = oracle_doubles((size_t)dim);
    oracle_moments(q, q_tokens, q_stride, dim, c.q_mean, q_var);
    oracle_moments(k, k_tokens, k_stride, dim, c.k_mean, c.k_var);
    for (int d = 0; d < dim; d++) {
        double q2 = q_var[d], k2 = c.k_var[d];
        if (flags & ORACLE_KEEP_MEAN) {
            q2 += c.q_mean[d] * c.q_mean[d];
            k2 += c.k_mean[d] * c.k_mean[d];
            c.q_mean[d] = c.k_mean[d] = 0;
        }
        c.psi[d] = flags & ORACLE_KEEP_CHANNELS || !(q2 > 0) || !(k2 > 0) ? 1 : sqrt(sqrt(k2 / q2));
    }
    c.widening = flags & ORACLE_OPTIMAL ? oracle_widening(&c, q, q_tokens, q_stride, k, k_tokens, k_stride, dim) : 0;
    free(q_var);
    return c;
}

ORACLE_FN void oracle_calibration_free(oracle_calibration *c)
{
    free(c->q_mean);
    free(c->k_mean);
    free(c->psi);
    free(c->k_var);
}

/* ---- errors ---------------------------------------------------------------------------------------------------- */

typedef struct oracle_error {
    double row;    /* max over rows of |out - ref|_2 / |ref|_2 */
    double value;  /* max |out - ref| / max |ref| */
    double length; /* max over rows of |out - ref|_2 */
    double mean;   /* |out - ref|_F / |ref|_F */
    int64_t worst; /* the row of the largest row error */
    int bad;       /* a value is not finite */
} oracle_error;

/* Compare out (stride 0 = dim) with the reference [tokens][dim]. A row whose reference is 0 must be exactly 0. */
ORACLE_FN oracle_error oracle_compare(const float *out, int64_t stride, const double *ref, int64_t tokens, int dim)
{
    oracle_error e = {0, 0, 0, 0, 0, 0};
    double top = 0, off = 0, sum = 0, size = 0;
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = oracle_row(out, stride, dim, t);
        double num = 0, den = 0, rel;
        for (int d = 0; d < dim; d++) {
            const double r = ref[t * dim + d], x = fabs((double)row[d] - r);
            if (!(fabs((double)row[d]) <= 3.5e38))
                e.bad = 1;
            num += x * x;
            den += r * r;
            top = fmax(top, fabs(r));
            off = fmax(off, x);
        }
        rel = den > 0 ? sqrt(num / den) : num > 0 ? INFINITY : 0;
        e.length = fmax(e.length, sqrt(num));
        sum += num;
        size += den;
        if (rel > e.row) {
            e.row = rel;
            e.worst = t;
        }
    }
    e.value = top > 0 ? off / top : off > 0 ? INFINITY : 0;
    e.mean = size > 0 ? sqrt(sum / size) : 0;
    if (e.bad)
        e.row = e.value = e.length = e.mean = INFINITY;
    return e;
}

/* The largest |v|_2 of a head: attention averages values, so errors of out are measured against it. */
ORACLE_FN double oracle_v_norm(const oracle_head *h)
{
    double most = 0;
    for (int64_t j = 0; j < h->kv_tokens; j++) {
        const float *v = oracle_row(h->v, h->v_stride, oracle_values(h), j);
        double sum = 0;
        for (int d = 0; d < oracle_values(h); d++)
            sum += (double)v[d] * (double)v[d];
        most = fmax(most, sqrt(sum));
    }
    return most;
}

/* ---- 16-bit floats ----------------------------------------------------------------------------------------------- */

/* A float as bits of bf16 or f16: to nearest, ties to even, from the definition of the formats. */
ORACLE_FN uint16_t oracle_half_of(int f16, float x)
{
    const int places = f16 ? 11 : 8, lowest = f16 ? -13 : -125;
    const unsigned sign = signbit(x) ? 0x8000u : 0;
    double y = fabs((double)x), unit;
    int e;
    if (isnan(x))
        return (uint16_t)(sign | (f16 ? 0x7e00u : 0x7fc0u));
    frexp(y, &e);
    unit = ldexp(1, (y == 0 || e < lowest ? lowest : e) - places);
    y = isinf(y) ? y : nearbyint(y / unit) * unit;
    if (y > (f16 ? 65504 : 3.3895313892515355e38))
        return (uint16_t)(sign | (f16 ? 0x7c00u : 0x7f80u));
    frexp(y, &e);
    if (y == 0 || e < lowest)
        return (uint16_t)(sign | (unsigned)(y / ldexp(1, lowest - places)));
    y = ldexp(y, places - e) - ldexp(1, places - 1);
    return (uint16_t)(sign | (((unsigned)(e - lowest + 1) << (places - 1)) + (unsigned)y));
}

ORACLE_FN float oracle_half_value(int f16, uint16_t bits)
{
    const int places = f16 ? 11 : 8, lowest = f16 ? -13 : -125;
    const int e = (bits & 0x7fff) >> (places - 1), m = bits & ((1 << (places - 1)) - 1);
    const double y = e == (f16 ? 31 : 255) ? (m ? NAN : INFINITY)
                     : e                   ? ldexp(1 + ldexp(m, 1 - places), e + lowest - 2)
                                           : ldexp(m, lowest - places);
    return (float)(bits >> 15 ? -y : y);
}

/* ---- inputs ---------------------------------------------------------------------------------------------------- */

typedef struct oracle_random {
    uint64_t state;
} oracle_random;

ORACLE_FN uint64_t oracle_next(oracle_random *r) /* splitmix64 */
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in (0, 1). */
ORACLE_FN double oracle_uniform(oracle_random *r)
{
    return ((double)(oracle_next(r) >> 11) + 0.5) / 9007199254740992.0;
}

/* Standard normal (Box and Muller). */
ORACLE_FN double oracle_normal(oracle_random *r)
{
    const double radius = sqrt(-2 * log(oracle_uniform(r)));
    return radius * cos(6.283185307179586 * oracle_uniform(r));
}

typedef enum oracle_kind {
    ORACLE_GAUSS,    /* normal components; norms spread around the given one */
    ORACLE_CONSTANT, /* random directions, all of the given norm */
    ORACLE_MIXED,    /* norms uniform in [1, norm] */
    ORACLE_EARLY,    /* the first eighth of the keys at the given norm, everything else at 1 */
    ORACLE_OPPOSITE, /* queries near minus the keys, all of the given norm */
    ORACLE_INTEGER,  /* q, k, v whole numbers in [-3, 3], norm ignored */
    ORACLE_KINDS
} oracle_kind;

/* A random direction of Euclidean length `norm`; norm < 0: normal components of expected length -norm. */
ORACLE_FN void oracle_vector(oracle_random *r, float *x, int dim, double norm)
{
    double sum = 0, factor;
    double *g = oracle_doubles((size_t)dim);
    for (int d = 0; d < dim; d++) {
        g[d] = oracle_normal(r);
        sum += g[d] * g[d];
    }
    factor = norm < 0 ? -norm / sqrt((double)dim) : norm / sqrt(sum);
    for (int d = 0; d < dim; d++)
        x[d] = (float)(factor * g[d]);
    free(g);
}

/* Fill q [q_rows][dim], k and v [kv_rows][dim] (v normal). norm is that of q' and k', x' = sqrt(scale) x; scale 0 =
 * 1/sqrt(dim). For several heads call it once per head, or hand in rows that run over tokens and heads. */
ORACLE_FN void oracle_inputs(oracle_kind kind, double norm, double scale, uint64_t seed, int dim, int64_t q_rows,
                             int64_t kv_rows, float *q, float *k, float *v)
{
    oracle_random r = {seed * 0x2545f4914f6cdd1du + (uint64_t)kind + 1};
    const double unit = 1 / sqrt(scale > 0 ? scale : 1 / sqrt((double)dim));
    for (int64_t j = 0; j < kv_rows; j++) {
        double length = unit * norm;
        if (kind == ORACLE_GAUSS)
            length = -length;
        else if (kind == ORACLE_MIXED)
            length = unit * (1 + (norm - 1) * oracle_uniform(&r));
        else if (kind == ORACLE_EARLY && j >= (kv_rows + 7) / 8)
            length = unit;
        oracle_vector(&r, k + j * dim, dim, length);
        oracle_vector(&r, v + j * dim, dim, -sqrt((double)dim));
    }
    for (int64_t i = 0; i < q_rows; i++) {
        double length = unit * norm;
        float *x = q + i * dim;
        if (kind == ORACLE_GAUSS)
            length = -length;
        else if (kind == ORACLE_MIXED)
            length = unit * (1 + (norm - 1) * oracle_uniform(&r));
        else if (kind == ORACLE_EARLY)
            length = unit;
        oracle_vector(&r, x, dim, kind == ORACLE_OPPOSITE ? 0.1 * length : length);
        for (int d = 0; d < dim && kind == ORACLE_OPPOSITE && kv_rows > 0; d++)
            x[d] -= k[(i % kv_rows) * dim + d];
    }
    for (int64_t n = 0; kind == ORACLE_INTEGER && n < (q_rows + 2 * kv_rows) * dim; n++) {
        float *x = n < q_rows * dim               ? q + n
                   : n < (q_rows + kv_rows) * dim ? k + n - q_rows * dim
                                                  : v + n - (q_rows + kv_rows) * dim;
        *x = (float)((int)(oracle_next(&r) % 7) - 3);
    }
}

/* Inputs as an operator takes them: features that the caller made are positive; a sum of signed weights divides badly.
 */
ORACLE_FN void oracle_positive(oracle_map map, float *x, int64_t count)
{
    for (int64_t i = 0; i < count && map == ORACLE_IDENTITY; i++)
        x[i] = fabsf(x[i]);
}

#endif /* ORACLE_H */
