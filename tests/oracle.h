/* The fp64 oracle: attention straight from its definition, in plain loops and double precision. It shares no code with
 * the kernels. One head and one sequence at a time; keys folded into a state earlier are simply the first keys here,
 * because query i of a causal call sees the keys j <= i + kv_tokens - q_tokens.
 *
 * Below, x' = sqrt(scale) x. The exact kernel is A_ij = exp(q'_i . k'_j); the favor kernel is
 *     A_ij = 1/m sum_r exp(lq_ir + lk_jr),   lq_ir = w_r . q'_i - |q'_i|^2 / 2,   lk_jr = w_r . k'_j - |k'_j|^2 / 2
 * where the map cosh uses every w_r twice, with both signs. out_i = sum_j A_ij v_j / sum_j A_ij, lse_i = ln sum_j A_ij.
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

/* What a calibration derives from a sample of one head, in the units of the arrays (not of x'). */
typedef struct oracle_calibration {
    double tau;
    double *q_mean, *k_mean, *psi, *k_var; /* [dim] each */
} oracle_calibration;

typedef struct oracle_head {
    int64_t q_tokens, kv_tokens;
    int64_t q_stride, k_stride, v_stride; /* elements from token to token; 0 = dim */
    int dim;
    const float *q, *k, *v;
    double scale; /* 0 = 1/sqrt(dim) */
    int full;     /* 1: every query sees every key; 0: causal */

    /* favor only */
    const float *w; /* [rows][dim] as K_projection_read gives it */
    int rows, cosh; /* cosh: each row serves both signs, m = 2 rows */
    const oracle_calibration *calibration;
} oracle_head;

ORACLE_FN double *oracle_doubles(size_t count)
{
    double *p = (double *)calloc(count ? count : 1, sizeof(double));
    if (!p)
        abort();
    return p;
}

ORACLE_FN double oracle_scale(const oracle_head *h)
{
    return h->scale > 0 ? h->scale : 1 / sqrt((double)h->dim);
}

ORACLE_FN const float *oracle_row(const float *data, int64_t stride, int dim, int64_t token)
{
    return data + token * (stride ? stride : dim);
}

/* Number of keys that query i sees. */
ORACLE_FN int64_t oracle_visible(const oracle_head *h, int64_t i)
{
    return h->full ? h->kv_tokens : i + 1 + h->kv_tokens - h->q_tokens;
}

/* ---- features -------------------------------------------------------------------------------------------------- */

/* ln of the features of one point x: l_r = +-w_r . x - |x|^2 / 2 + extra, for all m features. */
ORACLE_FN void oracle_features(const oracle_head *h, const double *x, double extra, double *l)
{
    double norm = 0;
    for (int d = 0; d < h->dim; d++)
        norm += x[d] * x[d];
    for (int r = 0; r < h->rows; r++) {
        double dot = 0;
        for (int d = 0; d < h->dim; d++)
            dot += (double)h->w[r * h->dim + d] * x[d];
        l[r] = dot - norm / 2 + extra;
        if (h->cosh)
            l[h->rows + r] = -dot - norm / 2 + extra;
    }
}

/* The log features of query i. With a calibration, q'.k' = q~'.k~' + qmean'.k~' + q'.kmean' (q~ = q - qmean, and so
 * k~): the random features approximate the first term, tempered and balanced; the second belongs to the key; the third
 * and the mass that tempering takes away belong to the query. */
ORACLE_FN void oracle_query_features(const oracle_head *h, int64_t i, double *l)
{
    const float *q = oracle_row(h->q, h->q_stride, h->dim, i);
    const oracle_calibration *c = h->calibration;
    const double s = oracle_scale(h);
    double *x = oracle_doubles((size_t)h->dim), extra = 0;
    for (int d = 0; d < h->dim; d++) {
        if (c) {
            const double centred = (double)q[d] - c->q_mean[d], t4 = c->tau * c->tau * c->tau * c->tau;
            x[d] = sqrt(s) * c->tau * c->psi[d] * centred;
            extra += s * (double)q[d] * c->k_mean[d] + (1 - t4) / 2 * (s * c->k_var[d]) * (s * centred * centred);
        } else {
            x[d] = sqrt(s) * (double)q[d];
        }
    }
    oracle_features(h, x, extra, l);
    free(x);
}

/* The log features of key j. */
ORACLE_FN void oracle_key_features(const oracle_head *h, int64_t j, double *l)
{
    const float *k = oracle_row(h->k, h->k_stride, h->dim, j);
    const oracle_calibration *c = h->calibration;
    const double s = oracle_scale(h);
    double *x = oracle_doubles((size_t)h->dim), extra = 0;
    for (int d = 0; d < h->dim; d++) {
        if (c) {
            const double centred = (double)k[d] - c->k_mean[d];
            x[d] = sqrt(s) * c->tau * centred / c->psi[d];
            extra += s * c->q_mean[d] * centred;
        } else {
            x[d] = sqrt(s) * (double)k[d];
        }
    }
    oracle_features(h, x, extra, l);
    free(x);
}

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* out = sum_j e^(l_j) v_j / sum_j e^(l_j), returns ln sum_j e^(l_j); nothing visible: 0 and -inf. */
ORACLE_FN double oracle_softmax(const oracle_head *h, const double *l, int64_t visible, double *out)
{
    double top = -INFINITY, sum = 0;
    memset(out, 0, (size_t)h->dim * sizeof *out);
    for (int64_t j = 0; j < visible; j++)
        top = l[j] > top ? l[j] : top;
    for (int64_t j = 0; j < visible; j++) {
        const float *v = oracle_row(h->v, h->v_stride, h->dim, j);
        const double e = exp(l[j] - top);
        sum += e;
        for (int d = 0; d < h->dim; d++)
            out[d] += e * (double)v[d];
    }
    for (int d = 0; d < h->dim && visible > 0; d++)
        out[d] /= sum;
    return visible > 0 ? top + log(sum) : -INFINITY;
}

/* Exact softmax attention. out [q_tokens][dim]; lse [q_tokens] or NULL. */
ORACLE_FN void oracle_exact(const oracle_head *h, double *out, double *lse)
{
    double *l = oracle_doubles((size_t)h->kv_tokens);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        const float *q = oracle_row(h->q, h->q_stride, h->dim, i);
        const int64_t visible = oracle_visible(h, i);
        double sum;
        for (int64_t j = 0; j < visible; j++) {
            const float *k = oracle_row(h->k, h->k_stride, h->dim, j);
            l[j] = 0;
            for (int d = 0; d < h->dim; d++)
                l[j] += (double)q[d] * (double)k[d];
            l[j] *= oracle_scale(h);
        }
        sum = oracle_softmax(h, l, visible, out + i * h->dim);
        if (lse)
            lse[i] = sum;
    }
    free(l);
}

/* favor, pair by pair: the definition itself, q_tokens * kv_tokens * m exponentials. For short lengths. */
ORACLE_FN void oracle_favor_pairs(const oracle_head *h, double *out, double *lse)
{
    const int m = h->cosh ? 2 * h->rows : h->rows;
    double *lk = oracle_doubles((size_t)h->kv_tokens * (size_t)m), *lq = oracle_doubles((size_t)m);
    double *l = oracle_doubles((size_t)h->kv_tokens);
    for (int64_t j = 0; j < h->kv_tokens; j++)
        oracle_key_features(h, j, lk + j * m);
    for (int64_t i = 0; i < h->q_tokens; i++) {
        const int64_t visible = oracle_visible(h, i);
        double total;
        oracle_query_features(h, i, lq);
        for (int64_t j = 0; j < visible; j++) { /* l_j = ln A_ij */
            double top = -INFINITY, sum = 0;
            for (int r = 0; r < m; r++)
                top = fmax(top, lq[r] + lk[j * m + r]);
            for (int r = 0; r < m; r++)
                sum += exp(lq[r] + lk[j * m + r] - top);
            l[j] = top + log(sum) - log((double)m);
        }
        total = oracle_softmax(h, l, visible, out + i * h->dim);
        if (lse)
            lse[i] = total;
    }
    free(lk);
    free(lq);
    free(l);
}

/* Add key j to the sums of every feature: sums[r] = { ln reference, sum of weights, weighted sum of v [dim] }. */
ORACLE_FN void oracle_fold(const oracle_head *h, int64_t j, int m, double *lk, double *sums)
{
    const float *v = oracle_row(h->v, h->v_stride, h->dim, j);
    oracle_key_features(h, j, lk);
    for (int r = 0; r < m; r++) {
        double *s = sums + (size_t)r * (size_t)(h->dim + 2), e;
        if (j == 0 || lk[r] > s[0]) {
            const double shrink = j == 0 ? 0 : exp(s[0] - lk[r]);
            for (int d = 1; d < h->dim + 2; d++)
                s[d] *= shrink;
            s[0] = lk[r];
        }
        e = exp(lk[r] - s[0]);
        s[1] += e;
        for (int d = 0; d < h->dim; d++)
            s[2 + d] += e * (double)v[d];
    }
}

/* One query against the sums. */
ORACLE_FN double oracle_read(const oracle_head *h, int m, const double *lq, const double *sums, double *out)
{
    const size_t width = (size_t)(h->dim + 2);
    double top = -INFINITY, den = 0;
    memset(out, 0, (size_t)h->dim * sizeof *out);
    for (int r = 0; r < m; r++)
        top = fmax(top, lq[r] + sums[(size_t)r * width]);
    for (int r = 0; r < m; r++) {
        const double *s = sums + (size_t)r * width, p = exp(lq[r] + s[0] - top);
        den += p * s[1];
        for (int d = 0; d < h->dim; d++)
            out[d] += p * s[2 + d];
    }
    for (int d = 0; d < h->dim; d++)
        out[d] /= den;
    return top + log(den) - log((double)m);
}

/* favor with the two sums exchanged: sum_r phi_r(q_i) sum_j phi_r(k_j) v_j, key after key, every feature with its own
 * running reference. Linear in the length; agrees with oracle_favor_pairs to about 1e-12. */
ORACLE_FN void oracle_favor(const oracle_head *h, double *out, double *lse)
{
    const int m = h->cosh ? 2 * h->rows : h->rows;
    double *sums = oracle_doubles((size_t)m * (size_t)(h->dim + 2)), *l = oracle_doubles((size_t)m);
    int64_t seen = 0;
    for (int64_t i = 0; i < h->q_tokens; i++) {
        const int64_t visible = oracle_visible(h, i);
        double total = -INFINITY;
        for (; seen < visible; seen++)
            oracle_fold(h, seen, m, l, sums);
        memset(out + i * h->dim, 0, (size_t)h->dim * sizeof *out);
        if (visible > 0) {
            oracle_query_features(h, i, l);
            total = oracle_read(h, m, l, sums, out + i * h->dim);
        }
        if (lse)
            lse[i] = total;
    }
    free(sums);
    free(l);
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

/* The calibration of a sample: means, psi_d = (sum k~_d^2 / sum q~_d^2)^(1/4) (mean squares, should the samples differ
 * in length), variances of the keys. Strides 0 = dim, tau 0 = 0.7. */
ORACLE_FN oracle_calibration oracle_calibrate(const float *q, int64_t q_tokens, int64_t q_stride, const float *k,
                                              int64_t k_tokens, int64_t k_stride, int dim, double tau, int keep_mean,
                                              int keep_channels)
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
        if (keep_mean) {
            q2 += c.q_mean[d] * c.q_mean[d];
            k2 += c.k_mean[d] * c.k_mean[d];
            c.q_mean[d] = c.k_mean[d] = 0;
        }
        c.psi[d] = keep_channels || !(q2 > 0) || !(k2 > 0) ? 1 : sqrt(sqrt(k2 / q2));
    }
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
        const float *v = oracle_row(h->v, h->v_stride, h->dim, j);
        double sum = 0;
        for (int d = 0; d < h->dim; d++)
            sum += (double)v[d] * (double)v[d];
        most = fmax(most, sqrt(sum));
    }
    return most;
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

#endif /* ORACLE_H */
