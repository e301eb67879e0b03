/* libFuzzer target: any nf_args, honest or not. Every buffer has exactly the size that the arguments speak of, so under
 * AddressSanitizer a call either runs within them or refuses; a refusing call must have written nothing. */
#define NEARFAR_STATIC
#include "nf_exact_f32_d8_cpu.h"
#include "nf_favor_cosh_f32_d8_m8_cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { DIM = 8, MOST = 1 << 16 };

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

static int64_t stride(reader *r)
{
    const unsigned b = take(r);
    return b < 160 ? 0 : b < 230 ? DIM * (b % 7) + b % 3 : number(r, 7);
}

enum { TOO_LARGE = -1, NONSENSE = -2 }; /* right, but more than there is room for here; must be refused */

/* Bytes of a tensor. */
static wide extent(int64_t batch, int64_t tokens, int64_t heads, int64_t bs, int64_t ts, int64_t hs)
{
    const wide h = hs ? hs : DIM, t = ts ? ts : (wide)heads * DIM, b = bs ? bs : (wide)tokens * t;
    wide n;
    if (batch < 1 || heads < 1 || tokens < 0 || h < 0 || t < 0 || b < 0)
        return NONSENSE;
    n = tokens ? ((wide)(batch - 1) * b + (wide)(tokens - 1) * t + (wide)(heads - 1) * h + DIM) * 4 : 0;
    return n <= MOST ? n : n < (wide)((int64_t)1 << 50) ? TOO_LARGE : NONSENSE;
}

static void *aligned(size_t bytes, int fill)
{
    void *p;
    if (posix_memalign(&p, 64, bytes ? bytes : 1))
        abort();
    memset(p, fill, bytes);
    return p;
}

static int untouched(const void *p, size_t bytes)
{
    const unsigned char *b = (const unsigned char *)p;
    for (size_t i = 0; i < bytes; i++)
        if (b[i] != 0xa5)
            return 0;
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    reader r = {data, size};
    const unsigned mode = take(&r);
    const int favor = mode & 1, decode = mode & 2, exotic = mode & 4;
    const size_t need = favor ? nf_favor_cosh_f32_d8_m8_cpu_workspace(NULL) : nf_exact_f32_d8_cpu_workspace(NULL);
    nf_args a;
    memset(&a, 0, sizeof a);
    a.batch = number(&r, 1);
    a.heads = number(&r, 2);
    a.kv_heads = number(&r, 1);
    a.q_tokens = number(&r, 3);
    a.kv_tokens = number(&r, 0);
    a.mask = (int32_t)number(&r, 0);
    a.q.batch_stride = stride(&r), a.q.token_stride = stride(&r), a.q.head_stride = stride(&r);
    a.k.batch_stride = stride(&r), a.k.token_stride = stride(&r), a.k.head_stride = stride(&r);
    a.v.batch_stride = stride(&r), a.v.token_stride = stride(&r), a.v.head_stride = stride(&r);
    a.out.batch_stride = stride(&r), a.out.token_stride = stride(&r), a.out.head_stride = stride(&r);
    a.split_begin = number(&r, 0);
    a.split_count = number(&r, 0);
    {
        const int64_t kvh = a.kv_heads ? a.kv_heads : a.heads, kvt = a.kv_tokens ? a.kv_tokens : a.q_tokens;
        const wide q = extent(a.batch, a.q_tokens, a.heads, a.q.batch_stride, a.q.token_stride, a.q.head_stride);
        const wide k = extent(a.batch, kvt, kvh, a.k.batch_stride, a.k.token_stride, a.k.head_stride);
        const wide v = extent(a.batch, kvt, kvh, a.v.batch_stride, a.v.token_stride, a.v.head_stride);
        const wide o = extent(a.batch, a.q_tokens, a.heads, a.out.batch_stride, a.out.token_stride, a.out.head_stride);
        const int nonsense = q <= NONSENSE || k <= NONSENSE || v <= NONSENSE || o <= NONSENSE;
        const int runs = q >= 0 && k >= 0 && v >= 0 && o >= 0 && a.batch <= 1000 && a.heads <= 1000;
        const size_t rows = runs ? (size_t)(a.batch * a.heads * a.q_tokens) : 1;
        const size_t bytes = runs ? (size_t)o : 4;
        const unsigned bend = take(&r);
        int32_t cu[6] = {0, 0, 0, 0, 0, 0};
        unsigned char *projection = (unsigned char *)aligned(nf_favor_cosh_f32_d8_m8_cpu_projection_bytes(), 0);
        void *workspace = aligned(need, 0xa5), *state = NULL;
        size_t state_bytes;
        nf_status s;
        if (!nonsense && !runs) {
            free(projection);
            free(workspace);
            return 0;
        }
        a.q.data = aligned(runs ? (size_t)q : 4, 0x3f);
        a.k.data = aligned(runs ? (size_t)k : 4, 0x3e);
        a.v.data = aligned(runs ? (size_t)v : 4, 0x3f);
        a.out.data = aligned(bytes, 0xa5);
        a.lse = bend & 1 ? (float *)aligned(rows * sizeof(float), 0xa5) : NULL;
        if (exotic) {
            const float scales[] = {0, 1, -1, NAN, INFINITY, 1e-30f, 1e30f, 0.5f};
            a.scale = scales[take(&r) % 8];
            a.sequences = number(&r, 2);
            for (int i = 1; i < 6; i++)
                cu[i] = (int32_t)number(&r, i);
            /* more sequences than cu has borders would be a lie that no callee can see */
            a.cu_tokens = take(&r) & 1 && a.sequences <= 5 ? cu : NULL;
        }
        a.projection = projection;
        if (nf_favor_cosh_f32_d8_m8_cpu_projection_init(projection, mode, NULL) != NF_OK)
            abort();
        state_bytes = favor ? nf_favor_cosh_f32_d8_m8_cpu_state_bytes(&a) : 0;
        if (bend & 2 && state_bytes && state_bytes < MOST) {
            a.state = state = aligned(state_bytes, 0);
            if (nf_favor_cosh_f32_d8_m8_cpu_state_reset(&a) != NF_OK && bend & 4)
                a.state = NULL;
            if (bend & 8)
                ((unsigned char *)state)[take(&r) % (state_bytes < 128 ? state_bytes : 128)] ^= (unsigned char)take(&r);
        }
        if (bend & 16)
            projection[take(&r) % 64] ^= (unsigned char)take(&r);
        if (bend & 32) {
            free(a.out.data);
            a.out.data = (void *)(uintptr_t)a.q.data; /* overlap */
        }
        s = (favor ? (decode ? nf_favor_cosh_f32_d8_m8_cpu_decode : nf_favor_cosh_f32_d8_m8_cpu_forward)
                   : (decode ? nf_exact_f32_d8_cpu_decode : nf_exact_f32_d8_cpu_forward))(&a, workspace,
                                                                                          need - (bend & 64 ? 1 : 0));
        if (s != NF_OK && (!untouched(workspace, need) || (!(bend & 32) && !untouched(a.out.data, bytes)) ||
                           (a.lse && !untouched(a.lse, rows * sizeof(float))))) {
            printf("refused with '%s', yet wrote\n", nf_status_text(s));
            abort();
        }
        if (s == NF_OK && nonsense) {
            printf("accepted sizes beyond all memory\n");
            abort();
        }
        if (!(bend & 32))
            free(a.out.data);
        free((void *)(uintptr_t)a.q.data);
        free((void *)(uintptr_t)a.k.data);
        free((void *)(uintptr_t)a.v.data);
        free(a.lse);
        free(projection);
        free(workspace);
        free(state);
    }
    return 0;
}
