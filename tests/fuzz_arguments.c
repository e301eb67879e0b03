/* libFuzzer target: any nf_args, nf_pattern and nf_grads, honest or not. Every buffer has exactly the size that the
 * arguments speak of, so under AddressSanitizer a call either runs within them or refuses; a refusing call must have
 * written nothing. */
#define NEARFAR_STATIC
#include "nf_exact_f32_d8_cpu.h"
#include "nf_favor_exp_f32_d8_m8_cpu.h"
#include "nf_hybrid_cosh_f32_d8_m8_b16_cpu.h"
#include "nf_linear_elu_f32_d8_cpu.h"
#include "nf_linear_softmaxqk_f32_d8_cpu.h"
#include "nf_sparse_f32_d8_b32_cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { DIM = 8, MOST = 1 << 16 };

#define PROJECTION(K) K##_projection_bytes, K##_projection_init
#define ENTRIES(K) K##_workspace, K##_forward, K##_decode, K##_backward, K##_state_bytes, K##_state_reset

static const struct kernel {
    int block;
    size_t (*workspace)(const nf_args *args);
    nf_status (*forward)(const nf_args *args, void *workspace, size_t bytes);
    nf_status (*decode)(const nf_args *args, void *workspace, size_t bytes);
    nf_status (*backward)(const nf_args *args, const nf_grads *grads, void *workspace, size_t bytes);
    size_t (*state_bytes)(const nf_args *args);
    nf_status (*state_reset)(const nf_args *args);
    size_t (*projection_bytes)(void);
    nf_status (*projection_init)(void *projection, uint64_t seed, const nf_calibration *calibration);
} kernels[] = {
    {0, ENTRIES(nf_exact_f32_d8_cpu), NULL, NULL},
    {32, ENTRIES(nf_sparse_f32_d8_b32_cpu), NULL, NULL},
    {16, ENTRIES(nf_hybrid_cosh_f32_d8_m8_b16_cpu), PROJECTION(nf_hybrid_cosh_f32_d8_m8_b16_cpu)},
    {0, ENTRIES(nf_favor_exp_f32_d8_m8_cpu), PROJECTION(nf_favor_exp_f32_d8_m8_cpu)},
    {0, ENTRIES(nf_linear_elu_f32_d8_cpu), NULL, NULL},
    {0, ENTRIES(nf_linear_softmaxqk_f32_d8_cpu), NULL, NULL},
};

typedef long double wide; /* holds every product of three sizes, near enough */

typedef struct reader {
    const uint8_t *data;
    size_t size;
} reader;

static unsigned take(reader *r)
{
    return r->size ? (r->size--, *r->data++) : 0;
}

/* Mostly small, sometimes hostile. */
static int64_t number(reader *r, int64_t usual)
{
    static const int64_t hostile[] = {
        -1, INT64_MIN, INT64_MAX, INT64_MAX / 2, (int64_t)1 << 31, (int64_t)1 << 32, (int64_t)1 << 47, (int64_t)1 << 60,
        -8, 1000};
    const unsigned b = take(r);
    if (b < 120)
        return usual;
    return b < 235 ? b % 5 : hostile[b % (sizeof hostile / sizeof *hostile)];
}

static float odd_float(reader *r)
{
    const float odd[] = {0, 1, -1, NAN, INFINITY, 1e-30f, 1e30f, 0.5f};
    return odd[take(r) % 8];
}

static int64_t stride(reader *r)
{
    const unsigned b = take(r);
    return b < 160 ? 0 : b < 230 ? DIM * (b % 7) + b % 3 : number(r, 7);
}

enum { TOO_LARGE = -1, NONSENSE = -2 }; /* right, but more than there is room for here; must be refused */

/* Draw the strides of a tensor; its bytes. */
static wide tensor(reader *r, nf_input *x, int64_t batch, int64_t tokens, int64_t heads)
{
    wide h, t, b, n;
    x->batch_stride = stride(r), x->token_stride = stride(r), x->head_stride = stride(r);
    h = x->head_stride ? x->head_stride : DIM;
    t = x->token_stride ? x->token_stride : (wide)heads * DIM;
    b = x->batch_stride ? x->batch_stride : (wide)tokens * t;
    if (batch < 1 || heads < 1 || tokens < 0 || h < 0 || t < 0 || b < 0)
        return NONSENSE;
    n = tokens ? ((wide)(batch - 1) * b + (wide)(tokens - 1) * t + (wide)(heads - 1) * h + DIM) * 4 : 0;
    return n <= MOST ? n : n < (wide)((int64_t)1 << 50) ? TOO_LARGE : NONSENSE;
}

/* The buffers of a call; those that it writes start out as 0xa5. */
typedef struct buffers {
    struct {
        void *at;
        size_t bytes;
        int written;
    } all[24];
    int count;
} buffers;

static void *buffer(buffers *b, wide bytes, int fill)
{
    const size_t n = bytes >= 0 ? (size_t)bytes : 4;
    void *p;
    if (posix_memalign(&p, 64, n ? n : 1))
        abort();
    memset(p, fill, n);
    b->all[b->count].at = p;
    b->all[b->count].bytes = n;
    b->all[b->count++].written = fill == 0xa5;
    return p;
}

/* Is what would be written as it was: all bytes like the first? */
static int untouched(const buffers *b)
{
    for (int i = 0; i < b->count; i++) {
        const unsigned char *x = (const unsigned char *)b->all[i].at;
        const size_t n = b->all[i].bytes;
        if (b->all[i].written && n && (x[0] != 0xa5 || memcmp(x, x + 1, n - 1) != 0))
            return 0;
    }
    return 1;
}

static int32_t *ints(reader *r, buffers *b, int64_t count, int64_t step)
{
    int32_t *x = (int32_t *)buffer(b, (wide)(count > 0 ? count : 0) * 4, 0);
    for (int64_t i = 0; i < count; i++)
        x[i] = (int32_t)number(r, i * step);
    return x;
}

/* A pattern; lists are as long as it says, or not there where it speaks of more than there is room for. */
static nf_pattern pattern(reader *r, buffers *b, int block, int64_t heads)
{
    const unsigned parts = take(r);
    nf_pattern p;
    memset(&p, 0, sizeof p);
    p.window = parts & 1 ? number(r, 40) : 3;
    if (parts & 2)
        p.globals = number(r, 2);
    if (parts & 4 && heads > 0 && heads <= 1000)
        p.dilation = ints(r, b, heads, 1);
    if (parts & 8) {
        p.global_count = (int64_t)(take(r) % 6) - 1;
        p.global_tokens = ints(r, b, p.global_count, 1);
    }
    if (parts & 16) {
        p.block = take(r) % 8 ? block : number(r, 0);
        p.block_heads = take(r) % 2 ? heads : number(r, 1);
        p.block_rows = number(r, 2);
        p.block_count = (int64_t)(take(r) % 8) - 1;
        p.block_keys = ints(r, b, p.block_count, 1);
        if (p.block_heads >= 0 && p.block_heads <= 64 && p.block_rows >= 0 && p.block_rows <= 64)
            p.block_offsets = ints(r, b, p.block_heads * (p.block_rows + 1), 0);
        for (int64_t i = 0; parts & 32 && p.block_offsets && i < p.block_heads * (p.block_rows + 1); i++)
            ((int32_t *)(uintptr_t)p.block_offsets)[i] = (int32_t)(i < p.block_count ? i : p.block_count);
    }
    if (parts & 64 && heads > 0 && heads <= 1000) {
        float *gain = (float *)buffer(b, (wide)heads * 4, 0);
        for (int64_t h = 0; h < heads && r->size; h++)
            gain[h] = odd_float(r);
        p.far_gain = gain;
    }
    if (parts & 128)
        p.flags = take(r) % 5;
    return p;
}

static nf_output written(nf_input x, void *data)
{
    nf_output y = {data, x.batch_stride, x.token_stride, x.head_stride};
    return y;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    reader r = {data, size};
    const unsigned mode = take(&r), bend = take(&r);
    const struct kernel *k = &kernels[((mode & 3) | (bend >> 5 & 4)) % (sizeof kernels / sizeof *kernels)];
    int linear;
    const int decode = (mode >> 2 & 3) == 2, backward = (mode >> 2 & 3) == 3;
    size_t need;
    enum { Q, K, V, OUT, DOUT, DQ, DK, DV, TENSORS };
    nf_input x[TENSORS];
    wide bytes[TENSORS];
    int nonsense = 0, runs = 1;
    int32_t cu[6] = {0, 0, 0, 0, 0, 0};
    buffers b;
    nf_args a;
    nf_grads g;
    nf_pattern p;
    unsigned char *projection = NULL, *state = NULL;
    void *workspace;
    size_t state_bytes;
    nf_status s;
    memset(&a, 0, sizeof a);
    memset(&g, 0, sizeof g);
    memset(x, 0, sizeof x);
    b.count = 0;
    linear = k >= kernels + 4;
    need = k->workspace(NULL);
    a.batch = number(&r, 1);
    a.heads = number(&r, 2);
    a.kv_heads = number(&r, 1);
    a.q_tokens = number(&r, 3);
    a.kv_tokens = number(&r, 0);
    a.mask = (int32_t)number(&r, 0);
    a.split_begin = number(&r, 0);
    a.split_count = number(&r, 0);
    a.flags = take(&r);
    a.flags = a.flags < 160 ? 0 : a.flags % 5;
    for (int i = 0; i < (backward ? TENSORS : DOUT); i++) {
        const int keys = i == K || i == V || i == DK || i == DV;
        bytes[i] = tensor(&r, &x[i], a.batch, keys && (a.kv_tokens || a.flags & NF_NO_KEYS) ? a.kv_tokens : a.q_tokens,
                          keys && a.kv_heads ? a.kv_heads : a.heads);
        nonsense |= bytes[i] <= NONSENSE;
        runs &= bytes[i] >= 0;
    }
    runs &= a.batch <= 1000 && a.heads <= 1000;
    if (!nonsense && !runs)
        return 0;
    for (int i = 0; i < (backward ? TENSORS : DOUT); i++)
        x[i].data = buffer(&b, runs ? bytes[i] : 4, i >= DQ || (i == OUT && !backward) ? 0xa5 : 0x3e + i % 2);
    a.q = x[Q], a.k = x[K], a.v = x[V];
    g.out = x[OUT], g.dout = x[DOUT];
    a.out = written(x[OUT], bend & 32 ? (void *)(uintptr_t)x[Q].data : (void *)(uintptr_t)x[OUT].data);
    g.dq = written(x[DQ], bend & 32 ? (void *)(uintptr_t)x[Q].data : (void *)(uintptr_t)x[DQ].data);
    g.dk = written(x[DK], (void *)(uintptr_t)x[DK].data), g.dv = written(x[DV], (void *)(uintptr_t)x[DV].data);
    if (bend & 1)
        a.lse = (float *)buffer(&b, runs ? (wide)(a.batch * a.heads * a.q_tokens * 4) : 4, backward ? 0x3f : 0xa5);
    g.lse = a.lse, g.dlse = bend & 2 ? a.lse : NULL;
    if (mode & 16) {
        a.scale = odd_float(&r);
        a.eps = take(&r) & 1 ? 0 : odd_float(&r);
        a.sequences = number(&r, 2);
        for (int i = 1; i < 6; i++)
            cu[i] = (int32_t)number(&r, i);
        /* more sequences than cu has borders would be a lie that no callee can see */
        a.cu_tokens = take(&r) & 1 && a.sequences <= 5 ? cu : NULL;
    }
    if (k->projection_bytes) {
        a.projection = projection = (unsigned char *)buffer(&b, (wide)k->projection_bytes(), 0);
        if (k->projection_init(projection, mode, NULL) != NF_OK)
            abort();
        if (bend & 16)
            projection[take(&r) % 64] ^= (unsigned char)take(&r);
    }
    if (k->block && mode & 32) {
        p = pattern(&r, &b, k->block, a.heads);
        a.pattern = &p;
    } else if (mode & 64) {
        memset(&p, 0, sizeof p);
        p.window = mode & 128 ? 100 : 5;
        p.globals = 2;
        a.pattern = &p;
    }
    if (linear && a.kv_heads <= 1000 && a.heads <= 1000 && take(&r) & 1) {
        const int64_t heads = a.kv_heads > 0 ? a.kv_heads : a.heads > 0 ? a.heads : 1;
        float *decay = (float *)buffer(&b, (wide)heads * 4, 0);
        for (int64_t h = 0; h < heads && r.size; h++)
            decay[h] = take(&r) & 3 ? -0.25f : odd_float(&r);
        a.decay = decay;
    }
    workspace = buffer(&b, (wide)need, 0xa5);
    state_bytes = k->state_bytes(&a);
    if (bend & 2 && !backward && state_bytes && state_bytes < MOST) {
        a.state = state = (unsigned char *)buffer(&b, (wide)state_bytes, 0);
        if (k->state_reset(&a) != NF_OK && bend & 4)
            a.state = NULL;
        if (bend & 8)
            state[take(&r) % (state_bytes < 128 ? state_bytes : 128)] ^= (unsigned char)take(&r);
    }
    if (backward)
        s = k->backward(&a, &g, workspace, need - (bend & 64 ? 1 : 0));
    else
        s = (decode ? k->decode : k->forward)(&a, workspace, need - (bend & 64 ? 1 : 0));
    if (s != NF_OK && !untouched(&b)) {
        printf("refused with '%s', yet wrote\n", nf_status_text(s));
        abort();
    }
    if (s == NF_OK && nonsense) {
        printf("accepted sizes beyond all memory\n");
        abort();
    }
    for (int i = 0; i < 12 && s == NF_OK && a.state; i++) /* beyond a ring */
        s = (i % 2 ? k->decode : k->forward)(&a, workspace, need);
    for (int i = 0; i < b.count; i++)
        free(b.all[i].at);
    return 0;
}
