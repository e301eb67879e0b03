/* A call under test: its buffers, its inputs, its reference. Every buffer stands between guard bytes and starts out as
 * NaN (all bits set), so what is read without being given and what is written without being due both show. */
#ifndef CALL_H
#define CALL_H

#include "kernels.h"
#include "oracle.h"

#if defined(DEVICE) /* a GPU needs a copy of what its kernels may touch */
#include "device.h"
#define simt_memory(at, bytes) device_mirror(at, bytes)
#define simt_forget(at) device_forget(at)
#elif defined(SIMT) /* and the executor must know it */
#include "simt/simt.h"
#else
#define simt_memory(at, bytes) ((void)0)
#define simt_forget(at) ((void)0)
#endif

#ifndef QUICK
#define QUICK 0 /* 1: shorter lengths, for emulators and sanitizers */
#endif

#if defined(__SANITIZE_ADDRESS__)
enum { GUARD = 0 }; /* the sanitizer's own zones are sharper */
#else
enum { GUARD = 256 };
#endif

#define BLANK 0xff

typedef struct block {
    unsigned char *base, *data;
    size_t bytes, before; /* before: guard bytes in front of data */
} block;

/* bytes of memory at a multiple of 64 plus `off`. */
static inline block block_make(size_t bytes, size_t off)
{
    void *base;
    block b = {NULL, NULL, bytes, GUARD + off};
    if (posix_memalign(&base, 64, b.before + bytes + GUARD + 1))
        abort();
    memset(base, BLANK, b.before + bytes + GUARD + 1);
    b.base = (unsigned char *)base;
    b.data = b.base + b.before;
    simt_memory(b.data, bytes);
    return b;
}

static inline void block_free(block *b)
{
    simt_forget(b->data);
    free(b->base);
    memset(b, 0, sizeof *b);
}

static inline int blank(const unsigned char *p, size_t n)
{
    while (n && p[--n] == BLANK)
        ;
    return n == 0;
}

static inline int block_intact(const block *b)
{
    return !b->base || (blank(b->base, b->before) && blank(b->data + b->bytes, GUARD));
}

/* ---- a call ------------------------------------------------------------------------------------------------------ */

typedef struct shape {
    int64_t batch, heads, kv_heads, q_tokens, kv_tokens; /* 0: 1, 1, heads, 0, q_tokens */
    int full, odd;                                       /* odd: every tensor has its own odd strides, off by 4 bytes */
    float scale;
    const int32_t *cu_tokens;
    int64_t sequences;
    oracle_kind kind;
    double norm; /* of q' and k' */
    uint64_t seed;
    const nf_pattern *pattern; /* NULL: the window of pattern_of() and three globals */
    int steady;                /* linear: no decay */
} shape;

typedef struct call {
    const kernel *k;
    nf_args a;
    block q, key, v, out, lse, workspace, projection, state, pattern, decay;
    size_t bytes;                          /* of the workspace */
    double *ref, *ref_lse;                 /* [batch, heads, q_tokens] (dim) */
    double *ratio;                         /* likewise: how much a row's sum cancels */
    float *w;                              /* the projection's effective matrix */
    const oracle_calibration *calibration; /* for the reference */
    double v_norm;                         /* the longest row of v */
} call;

static inline int64_t kv_heads(const nf_args *a)
{
    return a->kv_heads ? a->kv_heads : a->heads;
}

static inline int64_t kv_tokens(const nf_args *a)
{
    return a->kv_tokens ? a->kv_tokens : a->q_tokens;
}

/* Strides of a tensor, dense or odd (the order of heads and tokens exchanged, with gaps), and its buffer. */
static inline block tensor_make(nf_input *t, int64_t batch, int64_t tokens, int64_t heads, int dim, int odd)
{
    int64_t rows;
    block b;
    t->head_stride = odd ? tokens * (dim + odd) + 1 : dim;
    t->token_stride = odd ? dim + odd : heads * dim;
    t->batch_stride = odd ? heads * t->head_stride + 3 : tokens * t->token_stride;
    rows = (batch - 1) * t->batch_stride + (tokens - 1) * t->token_stride + (heads - 1) * t->head_stride + dim;
    b = block_make(tokens ? (size_t)rows * sizeof(float) : 0, odd ? 4 * (size_t)odd : 0);
    t->data = b.data;
    return b;
}

static inline float *row_at(nf_input t, int64_t batch, int64_t token, int64_t head)
{
    return (float *)(uintptr_t)t.data + batch * t.batch_stride + token * t.token_stride + head * t.head_stride;
}

static inline nf_input out_tensor(const nf_args *a)
{
    return (nf_input){a->out.data, a->out.batch_stride, a->out.token_stride, a->out.head_stride};
}

/* Layouts: batch, heads, groups, strides off the alignment, keys before the queries, cross attention, scale. Longer by
 * two blocks where there are any, beyond a window. 0 where there are no more. */
static inline int layout_at(const kernel *k, int i, shape *s)
{
    static const shape table[] = {
        {.batch = 3, .heads = 2, .q_tokens = 37},
        {.batch = 2, .heads = 3, .q_tokens = 70, .odd = 1},
        {.heads = 4, .kv_heads = 2, .q_tokens = 50},
        {.heads = 8, .kv_heads = 2, .q_tokens = 50, .odd = 1},
        {.batch = 2, .heads = 5, .kv_heads = 1, .q_tokens = 33},
        {.q_tokens = 20, .kv_tokens = 100},
        {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 1, .kv_tokens = 77, .odd = 1},
        {.heads = 2, .q_tokens = 66, .kv_tokens = 67},
        {.q_tokens = 50, .full = 1},
        {.heads = 2, .q_tokens = 40, .kv_tokens = 90, .full = 1, .odd = 1},
        {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 90, .kv_tokens = 7, .full = 1},
        {.q_tokens = 45, .scale = 0.5f},
        {.q_tokens = 45, .kv_tokens = 60, .scale = 0.01f, .full = 1},
    };
    if (i >= (int)(sizeof table / sizeof *table))
        return 0;
    *s = table[i];
    s->norm = 4;
    s->seed = 100 + (uint64_t)i;
    *(s->kv_tokens ? &s->kv_tokens : &s->q_tokens) += 2 * k->block;
    return 1;
}

/* Can the kernel do that at all? The hybrid is causal, and two-sided patterns have a place for every query. */
static inline int takes(const kernel *k, shape s)
{
    return !(s.full && k->block && (k->features || (s.kv_tokens && s.kv_tokens != s.q_tokens)));
}

static inline oracle_map map_of(const kernel *k)
{
    return k->map                      ? k->map
           : strstr(k->name, "_cosh_") ? ORACLE_COSH
           : strstr(k->name, "_trig_") ? ORACLE_TRIG
           : strstr(k->name, "_relu_") ? ORACLE_RELU
                                       : ORACLE_EXP;
}

/* Does it estimate softmax, and can so be calibrated? */
static inline int estimates(const kernel *k)
{
    return k->features && map_of(k) != ORACLE_RELU;
}

/* NF_OPTIMAL_FEATURES where the kernel has them, for tests that calibrate. */
static inline uint32_t optimal(const kernel *k)
{
    return estimates(k) && map_of(k) != ORACLE_TRIG ? NF_OPTIMAL_FEATURES : 0;
}

static inline int stateful(const kernel *k)
{
    return k->far || k->block;
}

/* The pattern of a call that asks for none. */
static inline nf_pattern pattern_of(const kernel *k)
{
    return (nf_pattern){.window = k->features ? 5 : k->block + 5, .globals = 3};
}

/* Decays of kv heads: the first and third of little, slow and fast, none, and one that a float cannot add to 1. */
static inline float decay_of(int64_t head)
{
    static const float table[] = {-0.02f, 0, -1.5f, -1e-8f};
    return table[head % 4];
}

static inline void call_fill(call *c, shape s)
{
    const nf_args *a = &c->a;
    const int64_t group = a->heads / kv_heads(a), n = a->q_tokens, m = kv_tokens(a);
    const size_t row = (size_t)c->k->dim * sizeof(float);
    block q = block_make((size_t)(group * n) * row, 0), k = block_make((size_t)m * row, 0);
    block v = block_make((size_t)m * row, 0);
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < kv_heads(a); h++) {
            const uint64_t seed = s.seed + 1000 * (uint64_t)b + (uint64_t)h;
            oracle_inputs(s.kind, s.norm, (double)s.scale, seed, c->k->dim, group * n, m, (float *)(void *)q.data,
                          (float *)(void *)k.data, (float *)(void *)v.data);
            oracle_positive(c->k->map, (float *)(void *)q.data, group * n * c->k->dim);
            oracle_positive(c->k->map, (float *)(void *)k.data, m * c->k->dim);
            for (int64_t i = 0; i < group * n; i++)
                memcpy(row_at(a->q, b, i % n, h * group + i / n), q.data + (size_t)i * row, row);
            for (int64_t j = 0; j < m; j++) {
                memcpy(row_at(a->k, b, j, h), k.data + (size_t)j * row, row);
                memcpy(row_at(a->v, b, j, h), v.data + (size_t)j * row, row);
            }
        }
    block_free(&q);
    block_free(&k);
    block_free(&v);
}

/* A projection into c, from a seed, with or without a calibration, and its effective matrix for the reference. */
static inline void call_project(call *c, uint64_t seed, const nf_calibration *calibration)
{
    if (!c->k->features)
        return;
    if (!c->projection.base) {
        c->projection = block_make(c->k->projection_bytes(), 0);
        c->w = (float *)calloc((size_t)(c->k->rows * c->k->dim), sizeof(float));
    }
    if (c->k->projection_init(c->projection.data, seed, calibration) != NF_OK ||
        c->k->projection_read(c->projection.data, c->w) != NF_OK)
        abort();
    c->a.projection = c->projection.data;
}

static inline call call_make(const kernel *k, shape s)
{
    call c;
    nf_args *a = &c.a;
    nf_input out;
    memset(&c, 0, sizeof c);
    c.k = k;
    a->batch = s.batch ? s.batch : 1;
    a->heads = s.heads ? s.heads : 1;
    a->kv_heads = s.kv_heads;
    a->q_tokens = s.q_tokens;
    a->kv_tokens = s.kv_tokens;
    a->scale = s.scale;
    a->mask = s.full || k->map == ORACLE_SOFTMAXQK ? NF_FULL : NF_CAUSAL;
    a->cu_tokens = s.cu_tokens;
    a->sequences = s.sequences;
    c.q = tensor_make(&a->q, a->batch, a->q_tokens, a->heads, k->dim, s.odd ? 1 : 0);
    c.key = tensor_make(&a->k, a->batch, kv_tokens(a), kv_heads(a), k->dim, s.odd ? 3 : 0);
    c.v = tensor_make(&a->v, a->batch, kv_tokens(a), kv_heads(a), k->dim, s.odd ? 5 : 0);
    c.out = tensor_make(&out, a->batch, a->q_tokens, a->heads, k->dim, s.odd ? 7 : 0);
    a->out = (nf_output){c.out.data, out.batch_stride, out.token_stride, out.head_stride};
    c.lse = block_make((size_t)(a->batch * a->heads * a->q_tokens) * sizeof(float), s.odd ? 4 : 0);
    a->lse = (float *)(void *)c.lse.data;
    c.pattern = block_make(sizeof(nf_pattern), 0); /* left blank for operators that do not look at it */
    simt_forget(c.pattern.data);                   /* the host's */
    a->pattern = (const nf_pattern *)(const void *)c.pattern.data;
    if (k->block)
        *(nf_pattern *)(void *)c.pattern.data = s.pattern ? *s.pattern : pattern_of(k);
    if (k->map && a->mask == NF_CAUSAL && !s.steady) {
        float *decay;
        c.decay = block_make((size_t)kv_heads(a) * sizeof(float), 0);
        decay = (float *)(void *)c.decay.data;
        for (int64_t h = 0; h < kv_heads(a); h++)
            decay[h] = decay_of(h);
        a->decay = decay;
    }
    c.bytes = k->workspace(a);
    c.workspace = block_make(c.bytes, 0);
    call_project(&c, s.seed, NULL);
    call_fill(&c, s);
    return c;
}

static inline void call_free(call *c)
{
    block *const all[] = {&c->q,         &c->key,        &c->v,     &c->out,     &c->lse,
                          &c->workspace, &c->projection, &c->state, &c->pattern, &c->decay};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        block_free(all[i]);
    free(c->ref);
    free(c->ref_lse);
    free(c->ratio);
    free(c->w);
    memset(c, 0, sizeof *c);
}

/* An empty state for the call. */
static inline void call_state(call *c)
{
    if (!c->state.base)
        c->state = block_make(c->k->state_bytes(&c->a), 0);
    c->a.state = c->state.data;
    if (c->k->state_reset(&c->a) != NF_OK)
        abort();
}

/* out, lse and workspace back to NaN. */
static inline void call_blank(call *c)
{
    memset(c->out.data, BLANK, c->out.bytes);
    memset(c->lse.data, BLANK, c->lse.bytes);
    memset(c->workspace.data, BLANK, c->workspace.bytes);
}

static inline nf_status call_run(call *c, attend_fn attend)
{
    call_blank(c);
    return attend(&c->a, c->workspace.data, c->bytes);
}

/* Is everything between the rows of a tensor as it was made? */
static inline int gaps_blank(const block *b, nf_input t, int64_t batch, int64_t tokens, int64_t heads, int dim)
{
    block gaps = block_make(b->bytes, 0);
    int intact;
    memcpy(gaps.data, b->data, b->bytes);
    t.data = gaps.data;
    for (int64_t n = 0; n < batch; n++)
        for (int64_t i = 0; i < tokens; i++)
            for (int64_t h = 0; h < heads; h++)
                memset(row_at(t, n, i, h), BLANK, (size_t)dim * sizeof(float));
    intact = blank(gaps.data, gaps.bytes);
    block_free(&gaps);
    return intact;
}

/* Nothing outside the rows of out was written, and no guard. */
static inline int call_intact(const call *c)
{
    const block *const all[] = {&c->q,         &c->key,        &c->v,     &c->out,     &c->lse,
                                &c->workspace, &c->projection, &c->state, &c->pattern, &c->decay};
    int intact = gaps_blank(&c->out, out_tensor(&c->a), c->a.batch, c->a.q_tokens, c->a.heads, c->k->dim);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        intact = intact && block_intact(all[i]);
    return intact;
}

/* ---- reference --------------------------------------------------------------------------------------------------- */

/* The call's pattern as query head h has it. */
static inline oracle_pattern pattern_at(const call *c, int64_t h)
{
    const nf_pattern *p = c->a.pattern;
    oracle_pattern o;
    memset(&o, 0, sizeof o);
    if (!c->k->block)
        return o;
    o.window = p->window;
    o.dilation = p->dilation ? p->dilation[h] : 1;
    o.globals = p->globals;
    o.global_tokens = p->global_tokens;
    o.global_count = p->global_count;
    o.block = c->k->block;
    o.block_offsets = p->block_offsets;
    if (p->block_offsets && p->block_heads > 1)
        o.block_offsets += h * (p->block_rows + 1);
    o.block_keys = p->block_keys;
    o.far_gain = p->far_gain ? (double)p->far_gain[h] : 0;
    o.far_exact = (p->flags & NF_FAR_EXACT) != 0;
    return o;
}

/* The oracle's head for query head h of a batch entry, rows [first, first + count) of its tokens. */
static inline oracle_head head_at(const call *c, int64_t batch, int64_t h, int64_t first, int64_t count)
{
    const nf_args *a = &c->a;
    const int64_t kv = h / (a->heads / kv_heads(a)), packed = a->cu_tokens != NULL;
    oracle_head o;
    memset(&o, 0, sizeof o);
    o.q_tokens = count;
    o.kv_tokens = packed ? count : kv_tokens(a);
    o.q_stride = a->q.token_stride;
    o.k_stride = a->k.token_stride;
    o.v_stride = a->v.token_stride;
    o.dim = c->k->dim;
    o.q = row_at(a->q, batch, first, h);
    o.k = row_at(a->k, batch, packed ? first : 0, kv);
    o.v = row_at(a->v, batch, packed ? first : 0, kv);
    o.scale = (double)a->scale;
    o.full = a->mask == NF_FULL;
    o.w = c->w;
    o.rows = c->k->rows;
    o.map = map_of(c->k);
    o.eps = a->eps > 0 ? (double)a->eps : (double)1e-3f;
    o.calibration = c->calibration;
    o.pattern = pattern_at(c, h);
    o.decay = c->k->map && a->decay ? (double)a->decay[kv] : 0;
    o.unnormalised = (a->flags & NF_UNNORMALISED) != 0;
    return o;
}

/* Fill c->ref and c->ref_lse; of sequences without packing only the rows [first, q_tokens). */
static inline void call_reference(call *c, int64_t first)
{
    const nf_args *a = &c->a;
    const int64_t rows = a->batch * a->heads * a->q_tokens;
    const int32_t whole[2] = {0, (int32_t)a->q_tokens};
    const int32_t *cu = a->cu_tokens ? a->cu_tokens : whole;
    if (!c->ref) {
        c->ref = oracle_doubles((size_t)(rows * c->k->dim));
        c->ref_lse = oracle_doubles((size_t)rows);
    }
    free(c->ratio);
    c->ratio = oracle_doubles((size_t)rows);
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t s = 0; s < (a->cu_tokens ? a->sequences : 1); s++) {
                const int64_t from = cu[s] > first ? cu[s] : first, row = (b * a->heads + h) * a->q_tokens + from;
                const oracle_head o = head_at(c, b, h, from, cu[s + 1] - from);
                oracle_attention(&o, c->ref + row * c->k->dim, c->ref_lse + row);
                oracle_cancellation(&o, c->ref_lse + row, c->ratio + row);
            }
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < kv_heads(a); h++)
            for (int64_t j = 0; j < kv_tokens(a); j++) {
                double sum = 0;
                for (int d = 0; d < c->k->dim; d++)
                    sum += pow((double)row_at(a->v, b, j, h)[d], 2);
                c->v_norm = fmax(c->v_norm, sqrt(sum));
            }
}

/* The larger of two errors; NaN counts as infinite. */
static inline double larger(double a, double b)
{
    return a >= b ? a : b < INFINITY ? b : INFINITY;
}

/* How much a row's sum cancels; 1 where the reference was not made by call_reference. */
static inline double row_ratio(const call *c, int64_t row)
{
    return c->ratio ? c->ratio[row] : 1;
}

static inline double row_scale(const call *c, int64_t row)
{
    return oracle_row_scale(c->ref + row * c->k->dim, c->k->dim, row_ratio(c, row), c->v_norm);
}

/* The largest error over the rows [first, q_tokens): |out - ref| relative to row_scale, and of lse relative to max(1,
 * |lse|) and to how much the row's sum cancels. Infinite where anything is not finite. */
static inline double call_error(const call *c, int64_t first)
{
    const nf_args *a = &c->a;
    const int dim = c->k->dim;
    double worst = 0;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t i = first; i < a->q_tokens; i++) {
                const int64_t row = (b * a->heads + h) * a->q_tokens + i;
                const float *out = row_at(out_tensor(a), b, i, h);
                double sum = 0;
                for (int d = 0; d < dim; d++)
                    sum += pow((double)out[d] - c->ref[row * dim + d], 2);
                worst = larger(worst, sqrt(sum) / row_scale(c, row));
                if (a->lse && (double)a->lse[row] != c->ref_lse[row]) /* equal: both -inf */
                    worst = larger(worst, fabs((double)a->lse[row] - c->ref_lse[row]) / row_ratio(c, row) /
                                              fmax(1, fabs(c->ref_lse[row])));
            }
    return worst;
}

/* Is all of out finite, and no lse NaN? */
static inline int call_finite(const call *c)
{
    const nf_args *a = &c->a;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t i = 0; i < a->q_tokens; i++) {
                for (int d = 0; d < c->k->dim; d++)
                    if (!isfinite(row_at(out_tensor(a), b, i, h)[d]))
                        return 0;
                if (a->lse && isnan(a->lse[(b * a->heads + h) * a->q_tokens + i]))
                    return 0;
            }
    return 1;
}

/* Promise 4: the error of an output row, relative to the longest value, up to |k'| = 10 and up to 40. */
static inline double tolerance(double norm)
{
    return norm <= 10 ? 1e-5 : 5e-5;
}

#endif
