/* The kernels of a tuner or bench program as one table, made from the generated kernels.h, which includes their headers
 * (declarations; each is implemented in a file of its own) and lists
 *     NF_KERNELS(X)       X(kernel, "contract", operator, map, dtype, d, v, m, rows, b)
 *     <kernel>_CODES(X)   X("suffix", "hash of the variant's code", 1 for the shipped default of its target)
 *     <kernel>_STATE      its functions state_bytes and state_reset, or NULL, NULL
 *     NF_TOOL             the generator's version
 *     NF_BACKEND          "cpu", "cuda" or "hip"; NF_ON_GPU is defined where it is a GPU
 */
#ifndef KERNEL_H
#define KERNEL_H

#include "kernels.h"

#include "oracle.h"
#include "pattern.h" /* where no header of kernels.h has it */

#include <stdarg.h>
#include <stdio.h>

/* One line on what is wrong, and the end. PROGRAM is defined by the program. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs(PROGRAM ": ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(2);
}

typedef struct kernel_code {
    const char *suffix, *code;
    int is_default;
} kernel_code;

typedef struct kernel {
    const char *name, *contract;
    enum { FAVOR, LINEAR, EXACT, SPARSE, HYBRID } op;
    oracle_map map;
    enum { F32, BF16, F16 } dtype;
    int d, v, m, rows, b;
    nf_pattern pattern;       /* what is measured: kernel_args points to it where the operator takes one */
    const kernel_code *codes; /* up to a null suffix */
    nf_status (*forward)(const nf_args *args, void *workspace, size_t bytes);
    nf_status (*decode)(const nf_args *args, void *workspace, size_t bytes);
    size_t (*workspace)(const nf_args *args);
    const nf_variant *(*variants)(int32_t *count);
    size_t (*state_bytes)(const nf_args *args);
    nf_status (*state_reset)(const nf_args *args);
    size_t (*projection_bytes)(void);
    nf_status (*projection_init)(void *projection, uint64_t seed, const nf_calibration *calibration);
    nf_status (*projection_read)(const void *projection, float *w);
} kernel;

#define KERNEL_CODE(suffix, code, is_default) {suffix, code, is_default},
#define KERNEL_CODES(K, contract, op, map, dtype, d, v, m, rows, b) \
    static const kernel_code K##_codes[] = {K##_CODES(KERNEL_CODE){NULL, NULL, 0}};
NF_KERNELS(KERNEL_CODES)

#define KERNEL_IS_favor FAVOR
#define KERNEL_IS_linear LINEAR
#define KERNEL_IS_exact EXACT
#define KERNEL_IS_sparse SPARSE
#define KERNEL_IS_hybrid HYBRID
#define KERNEL_IS_f32 F32
#define KERNEL_IS_bf16 BF16
#define KERNEL_IS_f16 F16
#define KERNEL_MAP_favor_cosh ORACLE_COSH
#define KERNEL_MAP_favor_exp ORACLE_EXP
#define KERNEL_MAP_favor_trig ORACLE_TRIG
#define KERNEL_MAP_favor_relu ORACLE_RELU
#define KERNEL_MAP_hybrid_cosh ORACLE_COSH
#define KERNEL_MAP_hybrid_exp ORACLE_EXP
#define KERNEL_MAP_exact_none ORACLE_EXP
#define KERNEL_MAP_sparse_none ORACLE_EXP
#define KERNEL_MAP_linear_elu ORACLE_ELU
#define KERNEL_MAP_linear_relu ORACLE_LINEAR_RELU
#define KERNEL_MAP_linear_identity ORACLE_IDENTITY
#define KERNEL_MAP_linear_taylor2 ORACLE_TAYLOR2
#define KERNEL_MAP_linear_softmaxqk ORACLE_SOFTMAXQK
#define KERNEL_PROJECTION_favor(K) K##_projection_bytes, K##_projection_init, K##_projection_read
#define KERNEL_PROJECTION_hybrid(K) KERNEL_PROJECTION_favor(K)
#define KERNEL_PROJECTION_linear(K) NULL, NULL, NULL
#define KERNEL_PROJECTION_exact(K) NULL, NULL, NULL
#define KERNEL_PROJECTION_sparse(K) NULL, NULL, NULL
/* sparse: a window of 512 tokens; hybrid: one block before the own. */
#define KERNEL_WINDOW_favor(b) 0
#define KERNEL_WINDOW_linear(b) 0
#define KERNEL_WINDOW_exact(b) 0
#define KERNEL_WINDOW_sparse(b) 512
#define KERNEL_WINDOW_hybrid(b) b
#define KERNEL_ROW(K, contract, op, map, dtype, d, v, m, rows, b) \
    {#K, \
     contract, \
     KERNEL_IS_##op, \
     KERNEL_MAP_##op##_##map, \
     KERNEL_IS_##dtype, \
     d, \
     v, \
     m, \
     rows, \
     b, \
     {KERNEL_WINDOW_##op(b), NULL, 0, NULL, 0, 0, 0, 0, 0, NULL, NULL, NULL, 0}, \
     K##_codes, \
     K##_forward, \
     K##_decode, \
     K##_workspace, \
     K##_variants, \
     K##_STATE, \
     KERNEL_PROJECTION_##op(K)},
static const kernel kernel_table[] = {NF_KERNELS(KERNEL_ROW)};
enum { KERNELS = sizeof kernel_table / sizeof *kernel_table };

/* A variant's name behind the kernel's: avx512_c32_r8x2. */
static inline const char *kernel_suffix(const kernel *k, const nf_variant *v)
{
    return v->name + strlen(k->name) + 1;
}

/* Tokens per chunk, from a suffix; 32 where it does not say. */
static inline int kernel_chunk(const char *suffix)
{
    const char *c = strstr(suffix, "_c");
    const int chunk = c ? atoi(c + 2) : 0;
    return chunk > 0 ? chunk : 32;
}

static inline const kernel_code *kernel_code_of(const kernel *k, const char *suffix)
{
    const kernel_code *c = k->codes;
    while (c->suffix && strcmp(c->suffix, suffix) != 0)
        c++;
    return c;
}

/* The variant that the contract's own symbol runs on this machine: the first target it supports, as shipped. -1: none.
 */
static inline int kernel_default(const kernel *k)
{
    int32_t count;
    const nf_variant *v = k->variants(&count);
    for (int32_t i = 0; i < count; i++)
        if (v[i].supported() && kernel_code_of(k, kernel_suffix(k, &v[i]))->is_default)
            return i;
    return -1;
}

/* Ask for what some targets need before they count as supported. */
static inline void kernel_request(void)
{
#ifdef NF_REQUEST_READY
    nf_amx_request();
#endif
}

/* Memory aligned as workspaces, projections and states must be. */
static inline void *kernel_memory(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, NF_ALIGN, bytes ? bytes : NF_ALIGN) != 0)
        fail("out of memory: %zu bytes", bytes);
    return p;
}

static inline float *kernel_floats(int64_t count)
{
    return (float *)kernel_memory((size_t)count * sizeof(float));
}

/* Bytes of an element of the kernel's tensors. */
static inline size_t kernel_element(const kernel *k)
{
    return k->dtype == F32 ? sizeof(float) : sizeof(uint16_t);
}

/* Element i of a tensor. */
static inline float kernel_value(const kernel *k, const void *data, int64_t i)
{
    return k->dtype == F32 ? ((const float *)data)[i] : oracle_half_value(k->dtype == F16, ((const uint16_t *)data)[i]);
}

/* Floats as a tensor of the kernel; they become what it holds. */
static inline void *kernel_tensor(const kernel *k, float *x, int64_t count)
{
    uint16_t *data = (uint16_t *)kernel_memory((size_t)count * kernel_element(k));
    if (k->dtype == F32)
        memcpy(data, x, (size_t)count * sizeof(float));
    for (int64_t i = 0; i < count && k->dtype != F32; i++) {
        data[i] = oracle_half_of(k->dtype == F16, x[i]);
        x[i] = oracle_half_value(k->dtype == F16, data[i]);
    }
    return data;
}

static inline void *kernel_copy(const kernel *k, const float *x, int64_t count)
{
    float *same = kernel_floats(count);
    void *data;
    memcpy(same, x, (size_t)count * sizeof(float));
    data = kernel_tensor(k, same, count);
    free(same);
    return data;
}

/* Inputs of the oracle, values as wide as the kernel's. */
static inline void kernel_inputs(const kernel *k, oracle_kind kind, double norm, uint64_t seed, int64_t q_rows,
                                 int64_t kv_rows, float *q, float *key, float *v)
{
    float *as_wide = k->v == k->d ? v : kernel_floats(kv_rows * k->d);
    oracle_random random = {seed};
    oracle_inputs(kind, norm, 0, seed, k->d, q_rows, kv_rows, q, key, as_wide);
    oracle_positive(k->map, q, q_rows * k->d);
    oracle_positive(k->map, key, kv_rows * k->d);
    if (as_wide == v)
        return;
    for (int64_t j = 0; j < kv_rows; j++)
        oracle_vector(&random, v + j * k->v, k->v, -sqrt((double)k->v));
    free(as_wide);
}

/* The inputs of a call, dense, and room for its output. */
typedef struct arrays {
    float *q, *k, *v;                  /* what the tensors hold */
    void *of_q, *of_k, *of_v, *of_out; /* the tensors */
} arrays;

static inline arrays arrays_new(const kernel *k, oracle_kind kind, int64_t q_rows, int64_t kv_rows, double norm,
                                uint64_t seed)
{
    arrays a = {kernel_floats(q_rows * k->d),
                kernel_floats(kv_rows * k->d),
                kernel_floats(kv_rows * k->v),
                NULL,
                NULL,
                NULL,
                NULL};
    kernel_inputs(k, kind, norm, seed, q_rows, kv_rows, a.q, a.k, a.v);
    a.of_q = kernel_tensor(k, a.q, q_rows * k->d);
    a.of_k = kernel_tensor(k, a.k, kv_rows * k->d);
    a.of_v = kernel_tensor(k, a.v, kv_rows * k->v);
    a.of_out = kernel_memory((size_t)(q_rows * k->v) * kernel_element(k));
    return a;
}

static inline void arrays_free(arrays *a)
{
    free(a->q);
    free(a->k);
    free(a->v);
    free(a->of_q);
    free(a->of_k);
    free(a->of_v);
    free(a->of_out);
}

/* The floats of a tensor. */
static inline float *kernel_unpack(const kernel *k, const void *data, int64_t count)
{
    float *x = kernel_floats(count);
    for (int64_t i = 0; i < count; i++)
        x[i] = kernel_value(k, data, i);
    return x;
}

/* A projection of the kernel from a seed, or NULL where it has none; *w becomes its effective matrix. */
static inline void *kernel_projection(const kernel *k, uint64_t seed, float **w)
{
    void *p;
    *w = NULL;
    if (!k->m)
        return NULL;
    p = kernel_memory(k->projection_bytes());
    *w = kernel_floats((int64_t)k->rows * k->d);
    if (k->projection_init(p, seed, NULL) != NF_OK || k->projection_read(p, *w) != NF_OK)
        fail("%s: its projection cannot be made", k->name);
    return p;
}

/* softmaxqk has no causal order. */
static inline int kernel_full_only(const kernel *k)
{
    return k->map == ORACLE_SOFTMAXQK;
}

/* Does the kernel carry a state? */
static inline int kernel_stateful(const kernel *k)
{
    return k->state_bytes != NULL;
}

/* Dense arguments for `tokens` tokens. */
static inline nf_args kernel_args(const kernel *kernel, int64_t batch, int64_t tokens, int64_t heads, const void *q,
                                  const void *k, const void *v, void *out, const void *projection)
{
    nf_args a;
    memset(&a, 0, sizeof a);
    a.batch = batch;
    a.heads = heads;
    a.q_tokens = tokens;
    a.q.data = q;
    a.k.data = k;
    a.v.data = v;
    a.out.data = out;
    a.projection = projection;
    a.pattern = kernel->b ? &kernel->pattern : NULL;
    a.mask = kernel_full_only(kernel) ? NF_FULL : NF_CAUSAL;
    return a;
}

/* What the oracle must know of one head of dense arrays [token][heads][d] and [token][kv_heads][d]. */
static inline oracle_head kernel_head(const kernel *k, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head,
                                      const float *q, const float *key, const float *v, const float *w)
{
    oracle_head h;
    const int64_t kv_head = head / (heads / kv_heads);
    memset(&h, 0, sizeof h);
    h.q_tokens = h.kv_tokens = tokens;
    h.dim = k->d;
    h.q_stride = heads * k->d;
    h.values = k->v;
    h.k_stride = kv_heads * k->d;
    h.v_stride = kv_heads * k->v;
    h.q = q + head * k->d;
    h.k = key + kv_head * k->d;
    h.v = v + kv_head * k->v;
    h.w = w;
    h.rows = k->rows;
    h.map = k->map;
    h.full = kernel_full_only(k);
    h.eps = (double)1e-3f; /* the default of favor's relu */
    return h;
}

/* The reference of one head, over the pattern's window and first tokens where the operator takes one. */
static inline void kernel_oracle(const kernel *k, const nf_pattern *pattern, const oracle_head *h, double *out,
                                 double *lse)
{
    oracle_pattern same;
    oracle_head head = *h;
    memset(&same, 0, sizeof same);
    same.window = pattern->window;
    same.dilation = 1;
    same.globals = pattern->globals;
    same.block = k->b;
    head.pattern = same;
    oracle_attention(&head, out, lse);
}

/* Keys that a query attends to exactly, mean over the tokens of a causal call with the kernel's own pattern. */
static inline double kernel_near_keys(const kernel *k, int64_t tokens)
{
    const nf_pattern *p = &k->pattern;
    double sum = 0;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t first = t + 1 - p->window; /* of the window */
        if (k->op == HYBRID)
            first = (t / k->b - (p->window + k->b - 1) / k->b) * k->b;
        if (first < 0 || k->op == EXACT)
            first = 0;
        sum += (double)(t + 1 - first + (first < p->globals ? first : p->globals));
    }
    return sum / (double)tokens;
}

/* GEMM flops per token and head. */
static inline double kernel_flops(const kernel *k, const char *suffix, int64_t tokens)
{
    const double d = k->d, v = k->v,
                 m = k->op != LINEAR            ? k->m
                     : k->map == ORACLE_TAYLOR2 ? 1 + d + d * (d + 1) / 2
                                                : d;
    const double t = kernel_chunk(suffix) / 2.0, far = 4 * k->rows * d + 4 * m * v;
    if (k->op == LINEAR)
        return kernel_full_only(k) ? far : far + 2 * t * (d + v);
    return k->op == FAVOR ? far + 2 * t * (m + v) : far + 4 * d * kernel_near_keys(k, tokens);
}

#endif /* KERNEL_H */
