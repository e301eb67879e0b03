/* The kernels of a tuner or bench program as one table, made from the generated kernels.h, which includes their headers
 * (declarations; each is implemented in a file of its own) and lists
 *     NF_KERNELS(X)       X(kernel, "contract", operator, map, d, m, rows, b)
 *     <kernel>_CODES(X)   X("suffix", "hash of the variant's code", 1 for the shipped default of its target)
 *     NF_TOOL             the generator's version
 */
#ifndef KERNEL_H
#define KERNEL_H

#include "kernels.h"
#include "oracle.h"

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
    enum { FAVOR, EXACT, SPARSE, HYBRID } op;
    oracle_map map;
    int d, m, rows, b;
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
#define KERNEL_CODES(K, contract, op, map, d, m, rows, b) \
    static const kernel_code K##_codes[] = {K##_CODES(KERNEL_CODE){NULL, NULL, 0}};
NF_KERNELS(KERNEL_CODES)

#define KERNEL_IS_favor FAVOR
#define KERNEL_IS_exact EXACT
#define KERNEL_IS_sparse SPARSE
#define KERNEL_IS_hybrid HYBRID
#define KERNEL_IS_cosh ORACLE_COSH
#define KERNEL_IS_exp ORACLE_EXP
#define KERNEL_IS_trig ORACLE_TRIG
#define KERNEL_IS_relu ORACLE_RELU
#define KERNEL_IS_none ORACLE_EXP
#define KERNEL_PROJECTION_favor(K) K##_projection_bytes, K##_projection_init, K##_projection_read
#define KERNEL_PROJECTION_hybrid(K) KERNEL_PROJECTION_favor(K)
#define KERNEL_PROJECTION_exact(K) NULL, NULL, NULL
#define KERNEL_PROJECTION_sparse(K) NULL, NULL, NULL
/* sparse: a window of 512 tokens; hybrid: one block before the own. */
#define KERNEL_WINDOW_favor(b) 0
#define KERNEL_WINDOW_exact(b) 0
#define KERNEL_WINDOW_sparse(b) 512
#define KERNEL_WINDOW_hybrid(b) b
#define KERNEL_ROW(K, contract, op, map, d, m, rows, b) \
    {#K, \
     contract, \
     KERNEL_IS_##op, \
     KERNEL_IS_##map, \
     d, \
     m, \
     rows, \
     b, \
     {KERNEL_WINDOW_##op(b), NULL, 0, NULL, 0, 0, 0, 0, 0, NULL, NULL, NULL, 0}, \
     K##_codes, \
     K##_forward, \
     K##_decode, \
     K##_workspace, \
     K##_variants, \
     K##_state_bytes, \
     K##_state_reset, \
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

/* Does the kernel carry a state? */
static inline int kernel_stateful(const kernel *k)
{
    return k->op != EXACT;
}

/* Dense arguments for `tokens` tokens. */
static inline nf_args kernel_args(const kernel *kernel, int64_t batch, int64_t tokens, int64_t heads, const float *q,
                                  const float *k, const float *v, float *out, const void *projection)
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
    h.k_stride = h.v_stride = kv_heads * k->d;
    h.q = q + head * k->d;
    h.k = key + kv_head * k->d;
    h.v = v + kv_head * k->d;
    h.w = w;
    h.rows = k->rows;
    h.map = k->map;
    h.eps = (double)1e-3f; /* the default of relu */
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

#endif /* KERNEL_H */
