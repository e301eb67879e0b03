/* Calls of a GPU's header as an engine makes them, beside the CPU's header of the same contract: the same results, the
 * same states, and what is checked where. The build says -DCONTRACT=<name>, of D = 8 and as many features, and
 * -DFEATURES where these are random. */
#include "check.h"
#include "simt.h"

#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define NEARFAR_STATIC
#include NAME(JOIN(JOIN(nf_, CONTRACT), _cpu.h))

#include NAME(JOIN(JOIN(nf_, CONTRACT), _cuda.h))

#define CPU(entry) JOIN(JOIN(nf_, CONTRACT), _cpu_##entry)
#define GPU(entry) JOIN(JOIN(nf_, CONTRACT), _cuda_##entry)

#include <stdlib.h>

enum { D = 8, HEADS = 64, TOKENS = 130, FLOATS = HEADS * TOKENS * D };

/* Memory of the device. */
static void *memory(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, NF_ALIGN, bytes))
        abort();
    memset(p, 0xff, bytes);
    simt_memory(p, bytes);
    return p;
}

static void give_back(void *p)
{
    simt_forget(p);
    free(p);
}

typedef struct buffers {
    float *q, *k, *v, *decay, *out[2], *lse[2];
    void *projection, *workspace[2], *state[2];
    size_t bytes[2];
    nf_args a[2]; /* the CPU's, the GPU's */
} buffers;

/* HEADS units of TOKENS tokens: so many that a GPU goes through their segments in rounds. */
static buffers make(int32_t mask)
{
    static const nf_pattern pattern = {.window = 5, .globals = 2};
    buffers b;
    memset(&b, 0, sizeof b);
    b.q = (float *)memory(FLOATS * sizeof(float));
    b.k = (float *)memory(FLOATS * sizeof(float));
    b.v = (float *)memory(FLOATS * sizeof(float));
    for (int i = 0; i < FLOATS; i++) {
        b.q[i] = (float)((i * 7919 + i / 13) % 1000) / 250 - 2;
        b.k[i] = (float)((i * 104729 + i / 7) % 1000) / 250 - 2;
        b.v[i] = (float)((i * 1299709 + i / 11) % 1000) / 500 - 1;
    }
    b.decay = (float *)memory(HEADS * sizeof(float));
    for (int h = 0; h < HEADS; h++)
        b.decay[h] = -0.02f * (float)(h % 3);
#ifdef FEATURES
    {
        const nf_calibration c = {.q = b.q, .k = b.k, .q_tokens = 64, .k_tokens = 64, .flags = NF_OPTIMAL_FEATURES};
        b.projection = memory(GPU(projection_bytes)());
        if (CPU(projection_init)(b.projection, 5, &c) != NF_OK)
            abort();
    }
#else
    b.projection = memory(NF_ALIGN); /* nobody looks at it */
#endif
    b.bytes[0] = CPU(workspace)(NULL), b.bytes[1] = GPU(workspace)(NULL);
    for (int i = 0; i < 2; i++) {
        nf_args *a = &b.a[i];
        b.out[i] = (float *)memory(FLOATS * sizeof(float));
        b.lse[i] = (float *)memory(HEADS * TOKENS * sizeof(float));
        b.workspace[i] = memory(b.bytes[i]);
        a->batch = 1, a->heads = HEADS, a->q_tokens = TOKENS, a->mask = mask, a->projection = b.projection;
        a->q.data = b.q, a->k.data = b.k, a->v.data = b.v, a->out.data = b.out[i], a->lse = b.lse[i];
        a->decay = mask == NF_CAUSAL ? b.decay : NULL;
        a->pattern = &pattern;
        b.state[i] = memory(GPU(state_bytes)(a));
    }
    return b;
}

static void free_all(buffers *b)
{
    void *const all[] = {b->q, b->k, b->v, b->decay, b->projection};
    for (int i = 0; i < 5; i++)
        give_back(all[i]);
    for (int i = 0; i < 2; i++)
        give_back(b->out[i]), give_back(b->lse[i]), give_back(b->workspace[i]), give_back(b->state[i]);
}

static void alike(const float *x, const float *y, int count, float most, const char *what)
{
    for (int i = 0; i < count; i++)
        CHECK(fabsf(x[i] - y[i]) <= most * fmaxf(1, fabsf(x[i])), "%s %d: %g on the CPU, %g on the GPU", what, i,
              (double)x[i], (double)y[i]);
}

static void use_states(buffers *b)
{
    b->a[0].state = b->state[0], b->a[1].state = b->state[1];
    CHECK(CPU(state_reset)(&b->a[0]) == NF_OK && GPU(state_reset)(&b->a[1]) == NF_OK, "reset");
}

/* Heads and near fields are equal to the bit; so many tokens; and R, z, S mean the same sums. */
static void states_alike(const buffers *b, int64_t tokens)
{
    const size_t far = sizeof(nf_state_unit) + D * (D + 2) * sizeof(float);
    const size_t unit = (GPU(state_bytes)(&b->a[1]) - sizeof(nf_state_head)) / HEADS;
    CHECK(memcmp(b->state[0], b->state[1], sizeof(nf_state_head)) == 0, "the heads of the states differ");
    for (size_t u = 0; u < HEADS; u++) {
        const nf_state_unit *x =
            (const nf_state_unit *)(const void *)((char *)b->state[0] + sizeof(nf_state_head) + u * unit);
        const nf_state_unit *y =
            (const nf_state_unit *)(const void *)((char *)b->state[1] + sizeof(nf_state_head) + u * unit);
        const float *p = (const float *)(const void *)(x + 1), *g = (const float *)(const void *)(y + 1);
        CHECK(memcmp(x, y, sizeof *x) == 0 && x->tokens == tokens, "unit %d: %d and %d tokens", (int)u, (int)x->tokens,
              (int)y->tokens);
        CHECK(memcmp((const char *)x + far, (const char *)y + far, unit - far) == 0, "the near fields of unit %d",
              (int)u);
        for (int r = 0; r < D; r++) {
            const double scale = ldexp(1, (int)(g[r] - p[r]));
            for (int d = -1; d < D; d++) {
                const int at = d < 0 ? D + r : 2 * D + r * D + d;
                CHECK(fabs((double)p[at] - (double)g[at] * scale) <= 1e-5 * (double)p[D + r], "feature %d of unit %d",
                      r, (int)u);
            }
        }
    }
}

/* Segments in rounds, causal and full, without a state and with one. */
Test(calls, rounds)
{
    for (int i = 0; i < 4; i += GPU(contract).block ? 2 : 1) {
        buffers b = make(i % 2 ? NF_FULL : NF_CAUSAL);
        int64_t launches;
        if (i / 2)
            use_states(&b);
        launches = simt.launches;
        CHECK(CPU(forward)(&b.a[0], b.workspace[0], b.bytes[0]) == NF_OK, "CPU");
        CHECK(GPU(forward)(&b.a[1], b.workspace[1], b.bytes[1]) == NF_OK, "GPU");
        CHECK(simt.launches - launches > 6, "these must be several rounds, not %d launches",
              (int)(simt.launches - launches));
        alike(b.out[0], b.out[1], FLOATS, 1e-5f, "out");
        alike(b.lse[0], b.lse[1], HEADS * TOKENS, 1e-5f, "lse");
        if (i / 2)
            states_alike(&b, TOKENS);
        free_all(&b);
    }
}

/* A state made on one goes on on the other. */
Test(calls, states_move)
{
    for (int from = 0; from < 2; from++) {
        buffers b = make(NF_CAUSAL);
        nf_args part;
        CHECK(CPU(forward)(&b.a[0], b.workspace[0], b.bytes[0]) == NF_OK, "whole");
        use_states(&b);
        part = b.a[from], part.q_tokens = 70;
        part.q.batch_stride = part.k.batch_stride = part.v.batch_stride = part.out.batch_stride = FLOATS;
        part.lse = NULL;
        CHECK((from ? GPU(forward) : CPU(forward))(&part, b.workspace[from], b.bytes[from]) == NF_OK, "first part");
        part = b.a[1 - from], part.q_tokens = TOKENS - 70, part.state = b.state[from], part.lse = NULL;
        part.q.data = b.q + 70 * HEADS * D, part.k.data = b.k + 70 * HEADS * D, part.v.data = b.v + 70 * HEADS * D;
        part.out.data = b.out[1] + 70 * HEADS * D;
        CHECK((from ? CPU(forward) : GPU(forward))(&part, b.workspace[1 - from], b.bytes[1 - from]) == NF_OK,
              "second part");
        alike(b.out[0] + 70 * HEADS * D, b.out[1] + 70 * HEADS * D, 60 * HEADS * D, 1e-5f, "out");
        free_all(&b);
    }
}

/* What only the device can look at: rows of NaN, and a state that is left alone. */
Test(calls, foreign)
{
    for (int which = 0; which < (GPU(contract).block ? 5 : 3); which++) {
        buffers b = make(which == 2 && !GPU(contract).block ? NF_FULL : NF_CAUSAL);
        const size_t bytes = GPU(state_bytes)(&b.a[1]);
        void *before = malloc(bytes);
        int32_t *tokens = (int32_t *)memory(2 * sizeof(int32_t));
        nf_pattern pattern = *b.a[1].pattern;
        const size_t one = sizeof(nf_state_head) + (bytes - sizeof(nf_state_head)) / HEADS;
        void *single = memory(bytes);
        use_states(&b);
        tokens[0] = 9, tokens[1] = 3;
        b.a[1].pattern = &pattern;
        if (which == 0 && GPU(contract).decays) {
            b.a[1].state = NULL; /* which would not be of these decays, either */
            for (int h = 0; h < HEADS; h++)
                b.decay[h] = h % 2 ? 1e-9f : -INFINITY;
        } else if (which == 0)
            ((nf_projection_head *)b.projection)->contract++;
        else if (which == 1) {
            memcpy(single, b.state[1], one);
            ((nf_state_head *)single)->units = 1;
            simt_forget(single), simt_memory(single, one); /* behind the one unit there is nothing */
            b.a[1].state = single;
        } else if (which == 2)
            b.a[1].scale = 0.5f; /* not the one that the state was made for */
        else if (which == 3)
            pattern.far_gain = b.decay, b.decay[HEADS - 1] = NAN;
        else /* falling positions */
            pattern.global_tokens = tokens, pattern.global_count = 2, b.a[1].state = NULL;
        memcpy(before, b.state[1], bytes);
        CHECK(GPU(forward)(&b.a[1], b.workspace[1], b.bytes[1]) == NF_OK, "launched");
        for (int i = 0; i < FLOATS; i++)
            CHECK(isnan(b.out[1][i]), "case %d: row %d hides that something is wrong", which, i / D);
        for (int i = 0; i < HEADS * TOKENS; i++)
            CHECK(isnan(b.lse[1][i]), "case %d: lse %d", which, i);
        CHECK(memcmp(before, b.state[1], bytes) == 0, "case %d: the state was written", which);
        free(before);
        give_back(tokens);
        give_back(single);
        free_all(&b);
    }
}

/* States of different projections do not merge to anything that a call takes. */
Test(calls, foreign_merge)
{
    buffers b = make(NF_CAUSAL);
    nf_args sizes;
    use_states(&b);
    ((nf_state_unit *)(void *)((char *)b.state[0] + sizeof(nf_state_head)))->hash++;
    sizes = b.a[1];
    if (GPU(contract).block) { /* near fields with a far field behind them do not follow one another */
        CHECK(GPU(state_merge)(&sizes, b.state[1], b.state[0], b.state[1]) == NF_E_STATE, "merged");
        free_all(&b);
        return;
    }
    CHECK(GPU(state_merge)(&sizes, b.state[1], b.state[0], b.state[1]) == NF_OK, "launched");
    CHECK(GPU(forward)(&b.a[1], b.workspace[1], b.bytes[1]) == NF_OK, "launched");
    CHECK(isnan(b.out[1][0]) && !isnan(b.out[1][D]), "the first unit alone is foreign");
    CHECK(GPU(state_merge)(&sizes, NULL, b.state[0], b.state[1]) == NF_E_NULL, "null");
    CHECK(GPU(state_merge)(&sizes, (char *)b.state[1] + 4, b.state[0], b.state[1]) == NF_E_ALIGN, "alignment");
    CHECK(GPU(state_merge)(&sizes, (char *)b.state[1] + 64, b.state[0], b.state[1]) == NF_E_OVERLAP, "overlap");
    free_all(&b);
}

/* Borders out of order are sequences of no tokens: nothing outside is touched (the executor would tell). */
Test(calls, borders)
{
    static const int32_t wrong[] = {0, 100, 60, 5000, TOKENS};
    buffers b = make(NF_CAUSAL);
    int32_t *borders = (int32_t *)memory(sizeof wrong);
    memcpy(borders, wrong, sizeof wrong);
    b.a[1].cu_tokens = borders, b.a[1].sequences = 4;
    CHECK(GPU(forward)(&b.a[1], b.workspace[1], b.bytes[1]) == NF_OK, "launched");
    CHECK(!isnan(b.out[1][99 * HEADS * D]) && isnan(b.out[1][100 * HEADS * D]), "the one right sequence alone is done");
    give_back(borders);
    free_all(&b);
}

/* Every check of the host comes before the first launch. */
Test(calls, checks)
{
    buffers b = make(NF_CAUSAL);
    const int64_t launches = simt.launches;
    nf_args a = b.a[1];
    CHECK(GPU(forward)(NULL, b.workspace[1], b.bytes[1]) == NF_E_NULL, "no args");
    CHECK(GPU(forward)(&a, NULL, b.bytes[1]) == NF_E_NULL, "no workspace");
    CHECK(GPU(forward)(&a, b.workspace[1], b.bytes[1] - 1) == NF_E_WORKSPACE, "small workspace");
    CHECK(GPU(decode)(&a, b.workspace[1], b.bytes[1]) == NF_E_NULL, "decode without a state");
    a.projection = NULL;
    if (GPU(contract).projection)
        CHECK(GPU(forward)(&a, b.workspace[1], b.bytes[1]) == NF_E_NULL, "no projection");
    a = b.a[1], a.heads = 5, a.kv_heads = 2;
    CHECK(GPU(forward)(&a, b.workspace[1], b.bytes[1]) == NF_E_HEADS, "heads");
    a = b.a[1], a.out.data = b.q;
    CHECK(GPU(forward)(&a, b.workspace[1], b.bytes[1]) == NF_E_OVERLAP, "overlap");
    simt.shared_limit = 64;
    CHECK(GPU(forward)(&b.a[1], b.workspace[1], b.bytes[1]) == NF_E_UNSUPPORTED, "a device without shared memory");
    simt.shared_limit = 64 * 1024;
    CHECK(simt.launches == launches, "a refused call has launched something");
    a = b.a[1], a.q_tokens = 0;
    CHECK(GPU(forward)(&a, b.workspace[1], b.bytes[1]) == NF_OK, "nothing to do is no error");
    free_all(&b);
}
