/* Kernels of 16-bit tensors and of value dims of their own, each against its twin: the kernel of floats and of values
 * as wide as heads, which every other test knows. On the same inputs, and the values in slices, a variant gives the
 * twin's bits, rounded. Matrix units round features and weights, too: there the error is held against that of rounding
 * the inputs. */
#include "check.h"
#include "patterns.h"

typedef struct pair {
    kernel k, twin;
    int values, element; /* V, bytes of an element */
    int f16;
} pair;

static pair pair_of(const kernel *k, const kernel *twin)
{
    pair p = {kernel_of(k), kernel_of(twin), 0, strstr(k->name, "f32") ? 4 : 2, strstr(k->name, "_f16") != NULL};
    p.values = number_in(k->name, 'v') ? number_in(k->name, 'v') : p.k.dim;
    return p;
}

#define TWIN_PAIR(contract, twin, topic) \
    extern const kernel kernel_##contract, kernel_##twin; \
    Test(topic, contract) \
    { \
        const pair p = pair_of(&kernel_##contract, &kernel_##twin); \
        topic(&p); \
    }
#define TEST_TWINS(topic) \
    static void topic(const pair *p); \
    TWINS(TWIN_PAIR, topic) \
    static void topic(const pair *p)

static float read_element(const pair *p, const void *at, int64_t i)
{
    return p->element == 4 ? ((const float *)at)[i] : oracle_half_value(p->f16, ((const uint16_t *)at)[i]);
}

static void write_element(const pair *p, void *at, int64_t i, float x)
{
    if (p->element == 4)
        ((float *)at)[i] = x;
    else
        ((uint16_t *)at)[i] = oracle_half_of(p->f16, x);
}

static float rounded(const pair *p, float x)
{
    uint32_t element[1];
    write_element(p, element, 0, x);
    return read_element(p, element, 0);
}

/* ---- a scene: the inputs of one call of both -----------------------------------------------------------------------
 */

typedef struct scene {
    int64_t heads, kv_heads, q_tokens, kv_tokens;
    int full, odd; /* odd: strides with gaps */
    oracle_kind kind;
    double norm;
    int64_t carried; /* tokens that go before through a state */
    float eps;
    int projection;           /* SAMPLED, CALIBRATED, GIVEN */
    const int32_t *cu_tokens; /* of `sequences` packed ones */
    int64_t sequences;
    int parts;      /* of a pattern at random (patterns.h); 0: a window and globals */
    float decay;    /* of the first kv head, half of it of the next, ... */
    uint32_t flags; /* NF_UNNORMALISED */
    uint64_t seed;
} scene;

/* From a seed; fitted to the scene; a matrix that bf16 does not hold. */
enum { SAMPLED, CALIBRATED, GIVEN };

enum { SPARE = 3 }; /* elements between heads where strides are odd */

typedef struct stage {
    const pair *p;
    scene s;
    float *q, *k, *v;         /* unrounded, [token][head][dim] */
    void *hq, *hk, *hv, *out; /* of the kernel */
    float *lse, *ref_lse, *decay;
    float *ref, *exact; /* [token][head][values]: the twin's, on rounded inputs and on others */
    void *projection, *twin_projection, *state, *twin_state, *workspace;
    int32_t *borders;
    kit kit;
    nf_pattern pattern; /* of operators over one */
    size_t bytes;
} stage;

static void *memory(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, 64, bytes + 64))
        abort();
    memset(p, 0xff, bytes + 64);
    simt_memory(p, bytes + 64);
    return p;
}

static void release(void *p)
{
    simt_forget(p);
    free(p);
}

static int64_t gap(const scene *s)
{
    return s->odd ? SPARE : 0;
}

/* A tensor of the kernel: rows of `dim` elements with gaps. */
static void *spread(const stage *g, const float *x, int64_t tokens, int64_t heads, int dim)
{
    const int64_t row = dim + gap(&g->s);
    char *to = (char *)memory((size_t)(tokens * heads * row + 1) * (size_t)g->p->element);
    for (int64_t i = 0; x && i < tokens * heads; i++)
        for (int d = 0; d < dim; d++)
            write_element(g->p, to, i * row + d, x[i * dim + d]);
    return to;
}

static nf_input strided(const stage *g, void *data, int64_t heads, int dim)
{
    const int64_t row = dim + gap(&g->s);
    return (nf_input){data, 0, heads * row, row};
}

/* The scene's projection, for the kernel or its twin. */
static void stage_project(const stage *g, const kernel *k, void *projection)
{
    const int64_t dim = k->dim;
    if (g->s.projection == GIVEN) {
        float *w = (float *)malloc((size_t)(k->rows * dim) * sizeof(float));
        oracle_random random = {3};
        for (int r = 0; r < k->rows; r++)
            oracle_vector(&random, w + r * dim, (int)dim, sqrt((double)dim));
        CHECK(k->projection_from(projection, w, NF_KEEP_F32) == NF_OK, "from");
        free(w);
    } else {
        nf_calibration c;
        memset(&c, 0, sizeof c);
        c.q = g->q, c.k = g->k, c.q_tokens = g->s.q_tokens, c.k_tokens = g->s.kv_tokens;
        c.q_stride = g->s.heads * dim, c.k_stride = g->s.kv_heads * dim;
        c.flags = optimal(k);
        CHECK(k->projection_init(projection, 9, g->s.projection == CALIBRATED ? &c : NULL) == NF_OK, "init");
    }
}

static stage stage_make(const pair *p, scene s)
{
    stage g;
    const int64_t kv = s.kv_tokens ? s.kv_tokens : s.q_tokens, kvh = s.kv_heads ? s.kv_heads : s.heads;
    const int dim = p->k.dim, values = p->values;
    const size_t a = p->k.workspace(NULL), b = p->twin.workspace(NULL);
    oracle_random random = {77};
    float *scratch;
    memset(&g, 0, sizeof g);
    g.p = p;
    s.kv_tokens = kv, s.kv_heads = kvh;
    g.s = s;
    g.q = (float *)memory((size_t)(s.q_tokens * s.heads * dim) * 4);
    g.k = (float *)memory((size_t)(kv * kvh * dim) * 4);
    g.v = (float *)memory((size_t)(kv * kvh * values) * 4);
    scratch = (float *)memory((size_t)(kv * kvh * dim) * 4);
    oracle_inputs(s.kind, s.norm, 0, 5, dim, s.q_tokens * s.heads, kv * kvh, g.q, g.k, scratch);
    release(scratch);
    if (strstr(p->k.name, "_identity_")) { /* features that can be normalised */
        for (int64_t i = 0; i < s.q_tokens * s.heads * dim; i++)
            g.q[i] = fabsf(g.q[i]);
        for (int64_t i = 0; i < kv * kvh * dim; i++)
            g.k[i] = fabsf(g.k[i]);
    }
    for (int64_t i = 0; i < kv * kvh; i++)
        oracle_vector(&random, g.v + i * values, values, sqrt((double)values));
    g.hq = spread(&g, g.q, s.q_tokens, s.heads, dim);
    g.hk = spread(&g, g.k, kv, kvh, dim);
    g.hv = spread(&g, g.v, kv, kvh, values);
    g.out = spread(&g, NULL, s.q_tokens, s.heads, values);
    g.lse = (float *)memory((size_t)(s.q_tokens * s.heads) * 4);
    g.ref_lse = (float *)memory((size_t)(s.q_tokens * s.heads) * 4);
    g.ref = (float *)memory((size_t)(s.q_tokens * s.heads * values) * 4);
    g.exact = (float *)memory((size_t)(s.q_tokens * s.heads * values) * 4);
    if (p->k.features) {
        g.projection = memory(p->k.projection_bytes());
        g.twin_projection = memory(p->twin.projection_bytes());
        stage_project(&g, &p->k, g.projection);
        stage_project(&g, &p->twin, g.twin_projection);
    }
    g.pattern = (nf_pattern){.window = p->k.block + 5, .globals = 3};
    if (s.parts) {
        oracle_random parts = {s.seed};
        g.kit = kit_make(&p->k, s.parts, s.heads, kv, &parts);
        g.pattern = g.kit.p;
    }
    if (s.decay < 0) {
        g.decay = (float *)memory((size_t)kvh * sizeof(float));
        for (int64_t i = 0; i < kvh; i++)
            g.decay[i] = s.decay / (float)(1 << i);
    }
    if (s.cu_tokens) {
        g.borders = (int32_t *)memory((size_t)(s.sequences + 1) * sizeof(int32_t));
        memcpy(g.borders, s.cu_tokens, (size_t)(s.sequences + 1) * sizeof(int32_t));
    }
    g.bytes = a > b ? a : b;
    g.workspace = memory(g.bytes);
    return g;
}

static void stage_free(stage *g)
{
    void *all[] = {g->q,     g->k,          g->v,         g->hq,      g->hk,    g->hv,         g->out,
                   g->lse,   g->ref,        g->exact,     g->ref_lse, g->decay, g->projection, g->twin_projection,
                   g->state, g->twin_state, g->workspace, g->borders};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
    kit_free(&g->kit);
}

static nf_args stage_args(const stage *g)
{
    nf_args a;
    nf_input out;
    memset(&a, 0, sizeof a);
    a.batch = 1;
    a.heads = g->s.heads, a.kv_heads = g->s.kv_heads;
    a.q_tokens = g->s.q_tokens, a.kv_tokens = g->s.kv_tokens;
    a.mask = g->s.full;
    a.cu_tokens = g->borders, a.sequences = g->s.sequences;
    a.eps = g->s.eps;
    a.decay = g->decay, a.flags = g->s.flags;
    a.q = strided(g, g->hq, a.heads, g->p->k.dim);
    a.k = strided(g, g->hk, a.kv_heads, g->p->k.dim);
    a.v = strided(g, g->hv, a.kv_heads, g->p->values);
    out = strided(g, g->out, a.heads, g->p->values);
    a.out = (nf_output){g->out, 0, out.token_stride, out.head_stride};
    a.lse = g->lse;
    a.projection = g->projection;
    a.pattern = &g->pattern;
    return a;
}

/* Of a call the queries from .. end, with the keys first .. end; without lse. */
static nf_args piece(const stage *g, int64_t from, int64_t first, int64_t end)
{
    const nf_args a = stage_args(g);
    const int e = g->p->element;
    nf_args part = a;
    part.lse = NULL;
    part.q_tokens = end - from, part.kv_tokens = end - first;
    part.q.data = (const char *)a.q.data + from * a.q.token_stride * e;
    part.k.data = (const char *)a.k.data + first * a.k.token_stride * e;
    part.v.data = (const char *)a.v.data + first * a.v.token_stride * e;
    part.out.data = (char *)a.out.data + from * a.out.token_stride * e;
    return part;
}

/* The call in pieces: `carried` tokens first, and a decode of the last two where `decode` asks for it; without a state
 * each piece has all keys up to its end. */
static void run_kernel(stage *g, const way *w, int decode)
{
    const kernel *k = &g->p->k;
    nf_args a = stage_args(g);
    const int64_t cut[3] = {g->s.carried, decode ? a.q_tokens - 2 : a.q_tokens, a.q_tokens};
    if (!g->s.carried && !decode) {
        CHECK(w->forward(&a, g->workspace, g->bytes) == NF_OK, "%s", w->name);
        return;
    }
    if (k->state_bytes) {
        g->state = g->state ? g->state : memory(k->state_bytes(&a));
        a.state = g->state;
        CHECK(k->state_reset(&a) == NF_OK, "reset");
    }
    for (int i = 0; i < 3; i++) {
        const int64_t from = i ? cut[i - 1] : 0;
        nf_args part = piece(g, from, k->state_bytes ? from : 0, cut[i]);
        part.state = a.state;
        if (part.q_tokens)
            CHECK((i == 2 ? w->decode : w->forward)(&part, g->workspace, g->bytes) == NF_OK, "%s", w->name);
    }
}

/* The same by the twin, on inputs rounded as the kernel has them (into g->ref) or not (g->exact), slice of values by
 * slice. */
static void run_twin(stage *g, const way *w, int decode, int exact)
{
    const pair *p = g->p;
    const int dim = p->k.dim;
    const int64_t n = g->s.q_tokens * g->s.heads, m = g->s.kv_tokens * g->s.kv_heads;
    float *q = (float *)memory((size_t)(n * dim) * 4), *k = (float *)memory((size_t)(m * dim) * 4);
    float *v = (float *)memory((size_t)(m * dim) * 4), *out = (float *)memory((size_t)(n * dim) * 4);
    stage twin = *g;
    pair same = *p;
    same.k = p->twin, same.values = dim, same.element = 4;
    for (int64_t i = 0; i < n * dim; i++)
        q[i] = exact ? g->q[i] : rounded(p, g->q[i]);
    for (int64_t i = 0; i < m * dim; i++)
        k[i] = exact ? g->k[i] : rounded(p, g->k[i]);
    twin.p = &same;
    twin.s.odd = 0;
    twin.hq = q, twin.hk = k, twin.hv = v, twin.out = out;
    twin.lse = g->ref_lse;
    twin.projection = g->twin_projection;
    twin.state = g->twin_state;
    for (int d0 = 0; d0 < p->values; d0 += dim) {
        for (int64_t i = 0; i < m; i++)
            for (int d = 0; d < dim; d++) {
                const float x = d0 + d < p->values ? g->v[i * p->values + d0 + d] : 0;
                v[i * dim + d] = exact ? x : rounded(p, x);
            }
        run_kernel(&twin, w, decode);
        for (int64_t i = 0; i < n; i++)
            for (int d = 0; d < dim && d0 + d < p->values; d++)
                (exact ? g->exact : g->ref)[i * p->values + d0 + d] = out[i * dim + d];
    }
    g->twin_state = twin.state;
    release(q), release(k), release(v), release(out);
}

/* Does the variant run on matrix units? */
static int is_matrix(const way *w)
{
    return strstr(w->name, "_amx_") || strstr(w->name, "_sm80_") || strstr(w->name, "_gfx");
}

/* The twin's variant of the same suffix, or for matrix units the one without. */
static way twin_way(const pair *p, const way *w)
{
    const char *suffix = w->name + strlen("nf_") + strlen(p->k.name);
    EACH_WAY(&p->twin, t)
    {
        const char *other = t.name + strlen("nf_") + strlen(p->twin.name);
        if (strcmp(suffix, other) == 0 || (is_matrix(w) && (strstr(other, "_avx512_") || strstr(other, "_simt_"))))
            return t;
    }
    CHECK(0, "%s has no twin", w->name);
    return *w;
}

/* Root mean square of what the output (or the twin's, rounded) is off the exact one. */
static double distance(const stage *g, int of_twin)
{
    const int values = g->p->values;
    const int64_t n = g->s.q_tokens * g->s.heads, row = values + gap(&g->s);
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        for (int d = 0; d < values; d++) {
            const float x = of_twin ? rounded(g->p, g->ref[i * values + d]) : read_element(g->p, g->out, i * row + d);
            sum += pow((double)x - (double)g->exact[i * values + d], 2);
        }
    return sqrt(sum / fmax(1, (double)(n * values)));
}

static int64_t different(const stage *g)
{
    const int values = g->p->values;
    const int64_t n = g->s.q_tokens * g->s.heads, row = values + gap(&g->s);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        for (int d = 0; d < values; d++)
            count += read_element(g->p, g->out, i * row + d) != rounded(g->p, g->ref[i * values + d]);
        count += memcmp(g->lse + i, g->ref_lse + i, 4) != 0;
    }
    return count;
}

/* The error on matrix units, root mean square, may be so many times that of rounding the inputs: features, weights and
 * the output are rounded too. */
enum { ROUNDINGS = 2 };

static void compare(const pair *p, scene s, int decode)
{
    stage g;
    if (p->k.block && s.full && (s.kv_tokens || p->k.projection_bytes))
        return; /* two-sided patterns have a place for every query; hybrid is causal */
    g = stage_make(p, s);
    EACH_WAY(&p->k, w)
    {
        const way t = twin_way(p, &w);
        run_kernel(&g, &w, decode);
        run_twin(&g, &t, decode, 0);
        if (!is_matrix(&w)) {
            CHECK(different(&g) == 0, "%s: %d differ", w.name, (int)different(&g));
        } else {
            for (int64_t i = 0; i < s.q_tokens * s.heads && !s.carried && !decode; i++)
                CHECK(g.lse[i] == g.ref_lse[i] ||
                          fabs((double)g.lse[i] - (double)g.ref_lse[i]) <= 1e-2 * fmax(1, fabs((double)g.ref_lse[i])),
                      "%s: lse %d is %g, not %g", w.name, (int)i, (double)g.lse[i], (double)g.ref_lse[i]);
            run_twin(&g, &t, decode, 1);
            CHECK(distance(&g, 0) <= ROUNDINGS * distance(&g, 1), "%s: error %.2e, rounding the inputs costs %.2e",
                  w.name, distance(&g, 0), distance(&g, 1));
        }
    }
    stage_free(&g);
}

static const scene scenes[] = {
    {.heads = 1, .q_tokens = 300, .norm = 3},
    {.heads = 4, .kv_heads = 2, .q_tokens = 70, .odd = 1, .norm = 3},
    {.heads = 2, .q_tokens = 33, .kv_tokens = 190, .norm = 3},
    {.heads = 2, .q_tokens = 65, .kv_tokens = 100, .full = 1, .odd = 1, .norm = 3},
    {.heads = 1, .q_tokens = 1, .norm = 3},
    {.heads = 1, .q_tokens = 257, .norm = 12},
    {.heads = 2, .kv_heads = 1, .q_tokens = 200, .norm = 3, .carried = 77},
};

TEST_TWINS(twins)
{
    for (size_t i = 0; i < sizeof scenes / sizeof *scenes; i++)
        compare(p, scenes[i], 0);
}

TEST_TWINS(decoded)
{
    compare(p, (scene){.heads = 2, .q_tokens = 40, .norm = 3, .carried = 21}, 1);
    compare(p, (scene){.heads = 4, .kv_heads = 1, .q_tokens = 140, .norm = 3, .odd = 1}, 1);
}

/* Lengths around the chunks. */
TEST_TWINS(lengths)
{
    static const int64_t n[] = {0, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 1000};
    for (size_t i = 0; i < sizeof n / sizeof *n - QUICK; i++)
        compare(p, (scene){.heads = 1, .q_tokens = n[i], .norm = 4}, 0);
}

/* Inputs that move the references: all kinds, long ones. */
TEST_TWINS(kinds)
{
    for (int kind = 0; kind < ORACLE_INTEGER; kind++)
        compare(p,
                (scene){.heads = 1, .q_tokens = 150, .kind = (oracle_kind)kind, .norm = kind == ORACLE_EARLY ? 8 : 20},
                0);
}

TEST_TWINS(projections)
{
    for (int i = CALIBRATED; i <= GIVEN && (strstr(p->k.name, "favor_cosh_") || strstr(p->k.name, "favor_exp_")); i++) {
        compare(p, (scene){.heads = 2, .kv_heads = 1, .q_tokens = 90, .norm = 3, .projection = i}, 0);
        compare(p, (scene){.heads = 1, .q_tokens = 40, .kv_tokens = 70, .full = 1, .norm = 3, .projection = i}, 0);
    }
}

/* Decays, fast ones and slow ones, and sums without a normaliser: step by step, from a state, behind earlier keys. */
TEST_TWINS(decays)
{
    static const float decays[] = {0, -2, -0.03f, -1e-6f};
    for (size_t i = 0; i < sizeof decays / sizeof *decays && strstr(p->k.name, "linear_"); i++) {
        scene s = {.heads = 2, .q_tokens = 150, .odd = 1, .norm = 3, .decay = decays[i]};
        s.flags = i % 2 ? 0 : NF_UNNORMALISED;
        compare(p, s, 1);
        s.carried = 77, s.flags ^= NF_UNNORMALISED;
        compare(p, s, 0);
        s.carried = 0, s.kv_tokens = 190;
        compare(p, s, 0);
    }
}

/* Keys that two variants have taken in, merged; then the rest of the sequence. */
TEST_TWINS(merged)
{
    static const int64_t cut[] = {0, 60, 110, 150};
    const float decay = strstr(p->k.name, "linear_") ? -0.03f : 0;
    stage g;
    void *state[2];
    way first;
    if (p->k.block || !p->k.state_merge || !way_at(&p->k, 0, &first))
        return;
    g = stage_make(p, (scene){.heads = 2, .kv_heads = 1, .q_tokens = 150, .norm = 3, .decay = decay});
    for (int i = 0; i < 2; i++)
        state[i] = memory(p->k.state_bytes(&(nf_args){.batch = 1, .heads = 1}));
    EACH_WAY(&p->k, w)
    {
        const way t = twin_way(p, &w);
        nf_args part;
        run_kernel(&g, &w, 0);
        run_twin(&g, &t, 0, 0);
        run_twin(&g, &t, 0, 1);
        for (int i = 0; i < 2; i++) {
            part = piece(&g, cut[i], cut[i], cut[i + 1]);
            part.state = state[i], part.q_tokens = 0;
            CHECK(p->k.state_reset(&part) == NF_OK, "reset");
            CHECK((i ? first : w).forward(&part, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        }
        CHECK(p->k.state_merge(state[0], state[0], state[1]) == NF_OK, "%s", w.name);
        part = piece(&g, cut[2], cut[2], cut[3]);
        part.state = state[0];
        CHECK(first.forward(&part, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        CHECK(distance(&g, 0) <= ROUNDINGS * distance(&g, 1) + 1e-5, "%s: error %.2e, rounding the inputs costs %.2e",
              w.name, distance(&g, 0), distance(&g, 1));
    }
    release(state[0]), release(state[1]);
    stage_free(&g);
}

/* Queries that see a state alone: the bits of a forward that had its keys, too; by decode its rows. */
TEST_TWINS(queries_alone)
{
    stage g;
    char *kept;
    size_t bytes;
    if (p->k.block || !p->k.state_merge)
        return;
    g = stage_make(
        p, (scene){.heads = 4, .kv_heads = 2, .q_tokens = 70, .kv_tokens = 150, .full = 1, .odd = 1, .norm = 3});
    bytes = (size_t)(70 * 4 * (p->values + gap(&g.s)) * p->element);
    kept = (char *)memory(bytes);
    EACH_WAY(&p->k, w)
    {
        const way t = twin_way(p, &w);
        nf_args a = stage_args(&g);
        run_twin(&g, &t, 0, 0);
        run_twin(&g, &t, 0, 1);
        g.state = g.state ? g.state : memory(p->k.state_bytes(&a));
        a.state = g.state;
        CHECK(p->k.state_reset(&a) == NF_OK, "reset");
        CHECK(w.forward(&a, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        memcpy(kept, g.out, bytes);
        a.flags = NF_NO_KEYS, a.kv_tokens = 0, a.k.data = a.v.data = NULL;
        memset(g.out, 0xff, bytes);
        CHECK(w.forward(&a, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        CHECK(memcmp(kept, g.out, bytes) == 0, "%s: not the bits of a forward with the keys", w.name);
        memset(g.out, 0xff, bytes);
        CHECK(w.decode(&a, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        CHECK(distance(&g, 0) <= ROUNDINGS * distance(&g, 1) + 1e-5, "%s: error %.2e, rounding the inputs costs %.2e",
              w.name, distance(&g, 0), distance(&g, 1));
    }
    release(kept);
    stage_free(&g);
}

/* Sequences behind one another, empty ones among them. */
TEST_TWINS(packed)
{
    static const int32_t borders[] = {0, 0, 5, 5, 69, 70, 150};
    for (int full = 0; full < 2; full++)
        compare(p,
                (scene){.heads = 4,
                        .kv_heads = 2,
                        .q_tokens = 150,
                        .full = full,
                        .norm = 3,
                        .cu_tokens = borders,
                        .sequences = 6},
                0);
}

/* Patterns of all parts, new ones every time; with a state those that it can carry. FAR_EXACT at 0, 5, 10, 15. */
TEST_TWINS(patterns)
{
    for (int i = 0; i < 16 && p->k.block; i += QUICK ? 2 : 1) {
        const int parts = i < 10 ? 1 + 37 * i % 255 : STATE_PARTS;
        compare(p,
                (scene){.heads = 4,
                        .kv_heads = 2,
                        .q_tokens = 150 - 7 * i % 50,
                        .kv_tokens = i % 4 || i >= 10 ? 0 : 190,
                        .carried = i < 10 ? 0 : 40 + i,
                        .norm = 3,
                        .parts = i % 5 ? parts : parts | FAR_EXACT,
                        .seed = 50 + (uint64_t)i},
                0);
    }
}

/* Neither a cut of the units into calls nor what follows a token changes a bit; NaN in a query stays in its row. */
TEST_TWINS(bits)
{
    stage g = stage_make(p, (scene){.heads = 6, .kv_heads = 3, .q_tokens = 140, .norm = 12, .kind = ORACLE_MIXED});
    const int64_t row = 6 * p->values;
    const size_t bytes = (size_t)(140 * row * p->element);
    char *kept = (char *)memory(bytes);
    const nf_args a = stage_args(&g);
    EACH_WAY(&p->k, w)
    {
        nf_args part = a;
        run_kernel(&g, &w, 0);
        memcpy(kept, g.out, bytes);
        memset(g.out, 0xff, bytes);
        for (part.split_begin = 2; part.split_begin >= 0; part.split_begin--) {
            part.split_count = 1;
            CHECK(w.forward(&part, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        }
        CHECK(memcmp(kept, g.out, bytes) == 0, "%s: splits change bits", w.name);
        for (int64_t n = 1; n < 140; n += 31) {
            part = a;
            part.q_tokens = part.kv_tokens = n;
            CHECK(w.forward(&part, g.workspace, g.bytes) == NF_OK, "%s", w.name);
            CHECK(memcmp(kept, g.out, (size_t)(n * row * p->element)) == 0, "%s: %d tokens", w.name, (int)n);
        }
        write_element(p, g.hq, (77 * 6 + 3) * p->k.dim, NAN);
        run_kernel(&g, &w, 0);
        for (int64_t i = 0; i < 140 * 6; i++) {
            const size_t at = (size_t)(i * p->values * p->element), length = (size_t)(p->values * p->element);
            CHECK(i == 77 * 6 + 3 ? isnan(read_element(p, g.out, i * p->values))
                                  : memcmp(kept + at, (const char *)g.out + at, length) == 0,
                  "%s: NaN in query 77 of head 3, row %d", w.name, (int)i);
        }
        write_element(p, g.hq, (77 * 6 + 3) * p->k.dim, g.q[(77 * 6 + 3) * p->k.dim]);
    }
    release(kept);
    stage_free(&g);
}

/* Whatever comes behind a token (longer keys, values without end, NaN), its row and those before keep their bits; and
 * no finite input gives anything else than finite rows. */
TEST_TWINS(past)
{
    static const int64_t borders[] = {1, 30, 63, 64, 65, 100, 149};
    stage g = stage_make(p, (scene){.heads = 1, .q_tokens = 150, .norm = 6});
    const size_t row = (size_t)p->values * (size_t)p->element;
    char *kept = (char *)memory(150 * row), *keys = (char *)memory((size_t)(150 * p->k.dim * p->element));
    char *values = (char *)memory(150 * row);
    float lse[150];
    memcpy(keys, g.hk, (size_t)(150 * p->k.dim * p->element));
    memcpy(values, g.hv, 150 * row);
    EACH_WAY(&p->k, w)
    {
        memcpy(g.hk, keys, (size_t)(150 * p->k.dim * p->element));
        memcpy(g.hv, values, 150 * row);
        run_kernel(&g, &w, 0);
        memcpy(kept, g.out, 150 * row);
        memcpy(lse, g.lse, sizeof lse);
        memset(g.workspace, 0x7f, g.bytes); /* whatever lies in the workspace */
        run_kernel(&g, &w, 0);
        CHECK(memcmp(kept, g.out, 150 * row) == 0 && memcmp(lse, g.lse, sizeof lse) == 0, "%s: other bits", w.name);
        for (int64_t i = 0; i < 150 * p->values; i++)
            CHECK(isfinite(read_element(p, kept, i)), "%s: element %d", w.name, (int)i);
        for (size_t b = 0; b < sizeof borders / sizeof *borders; b += QUICK ? 2 : 1)
            for (int how = 0; how < 4; how++) {
                const int64_t from = borders[b];
                memcpy(g.hk, keys, (size_t)(150 * p->k.dim * p->element));
                memcpy(g.hv, values, 150 * row);
                for (int64_t t = from; t < 150; t += how == 0 ? 1 : 7) {
                    for (int d = 0; d < p->k.dim && how < 2; d++)
                        write_element(p, g.hk, t * p->k.dim + d,
                                      how ? NAN : 500.0f * read_element(p, keys, t * p->k.dim + d));
                    if (how >= 2)
                        write_element(p, g.hv, t * p->values + p->values - 1, how == 2 ? INFINITY : NAN);
                }
                run_kernel(&g, &w, 0);
                CHECK(memcmp(kept, g.out, (size_t)from * row) == 0 && memcmp(lse, g.lse, (size_t)from * 4) == 0,
                      "%s: rows before %d, way %d", w.name, (int)from, how);
                if (how == 2)
                    CHECK(!isfinite(read_element(p, g.out, from * p->values + p->values - 1)) &&
                              isfinite(read_element(p, g.out, 149 * p->values)),
                          "%s: the endless value of token %d", w.name, (int)from);
            }
    }
    release(kept), release(keys), release(values);
    stage_free(&g);
}

/* Logits far beyond any model's. Those of a row are far apart or alike, whole numbers times a power of two, so that the
 * twin's output is the definition's; of the rows of a warp some have the largest logits, some the lowest, some ordinary
 * ones. (Of features all have the largest: estimates of the others would be noise.) */
TEST_TWINS(enormous)
{
    static const float sizes[] = {0x1p11f, 0x1p15f, 0x1p40f, 0x1p100f}; /* f16 has the first two */
    const int estimate = !p->k.block && !strstr(p->k.name, "exact_");
    for (int i = 0; i < (p->f16 ? 2 : 4); i++) {
        stage g = stage_make(p, (scene){.heads = 1, .q_tokens = 150, .norm = 1});
        const int dim = p->k.dim, values = p->values;
        const float query[3] = {sizes[i], -sizes[i], 1 / sizes[i]};
        for (int64_t e = 0; e < 150 * dim; e++) {
            g.q[e] = query[p->k.features ? 0 : e / dim % 3];
            g.k[e] = sizes[i] * (1 + (float)(e / dim * 37 % 64) / 64);
            write_element(p, g.hq, e, g.q[e]);
            write_element(p, g.hk, e, g.k[e]);
        }
        EACH_WAY(&p->k, w)
        {
            const way t = twin_way(p, &w);
            run_kernel(&g, &w, 0);
            run_twin(&g, &t, 0, 0);
            for (int64_t e = 0; e < 150 * values; e++) {
                const double x = (double)read_element(p, g.out, e), y = (double)g.ref[e];
                CHECK(isfinite(x) && (estimate || fabs(x - y) <= 0x1p-7 * (1 + fabs(y))),
                      "%s: inputs of %g: column %d of row %d is %g, not %g", w.name, (double)sizes[i], (int)e % values,
                      (int)e / values, x, y);
            }
            for (int64_t row = 0; row < 150; row++) {
                const double x = (double)g.lse[row], y = (double)g.ref_lse[row];
                CHECK(!isnan(x) && (estimate || i == 3 || fabs(x - y) <= 0x1p-8 + 1e-6 * fabs(y)), /* 3: cut off */
                      "%s: inputs of %g: lse of row %d is %g, not %g", w.name, (double)sizes[i], (int)row, x, y);
            }
        }
        stage_free(&g);
    }
}

#ifndef SIMT /* GPUs have neither eps nor a backward */
/* The published Performer's features (test_compat.c). */
TEST_TWINS(compat)
{
    if (strstr(p->k.name, "favor_exp_"))
        compare(p,
                (scene){.heads = 2, .kv_heads = 1, .q_tokens = 70, .kv_tokens = 90, .full = 1, .norm = 2, .eps = 1e-4f},
                0);
}

/* Gradients: of values in slices each slice has its own dv, and their dq and dk add up. Against the twin's, relative to
 * its largest: what rounding gives. */
TEST_TWINS(gradients)
{
    stage g = stage_make(p, (scene){.heads = 2, .kv_heads = 1, .q_tokens = 90, .norm = 3});
    const int dim = p->k.dim, values = p->values;
    const int64_t n = 180, m = 90;
    float *dout = (float *)memory((size_t)(n * values) * 4), *sum[2];
    void *given = memory((size_t)(n * values) * 4), *dq = memory((size_t)(n * dim) * 4),
         *dk = memory((size_t)(m * dim) * 4);
    void *dv = memory((size_t)(m * values) * 4);
    oracle_random random = {5};
    oracle_vector(&random, dout, (int)n * values, sqrt((double)(n * values)));
    for (int64_t i = 0; i < n * values; i++)
        write_element(p, given, i, dout[i]);
    sum[0] = (float *)memory((size_t)(n * dim) * 4), sum[1] = (float *)memory((size_t)(m * dim) * 4);
    EACH_WAY(&p->k, w)
    {
        const way t = twin_way(p, &w);
        nf_args a = stage_args(&g);
        nf_grads grads;
        memset(&grads, 0, sizeof grads);
        grads.out.data = g.out, grads.dout.data = given, grads.lse = g.lse;
        grads.dq.data = dq, grads.dk.data = dk, grads.dv.data = dv;
        run_kernel(&g, &w, 0);
        CHECK(w.backward(&a, &grads, g.workspace, g.bytes) == NF_OK, "%s", w.name);
        memset(sum[0], 0, (size_t)(n * dim) * 4), memset(sum[1], 0, (size_t)(m * dim) * 4);
        for (int d0 = 0; d0 < values; d0 += dim) {
            float *q = (float *)memory((size_t)(n * dim) * 4), *k = (float *)memory((size_t)(m * dim) * 4);
            float *v = (float *)memory((size_t)(m * dim) * 4), *out = (float *)memory((size_t)(n * dim) * 4);
            float *to = (float *)memory((size_t)(n * dim) * 4), *tq = (float *)memory((size_t)(n * dim) * 4);
            float *tk = (float *)memory((size_t)(m * dim) * 4), *tv = (float *)memory((size_t)(m * dim) * 4);
            nf_args b;
            nf_grads bg;
            double worst = 0, largest = 1e-30;
            memset(&b, 0, sizeof b), memset(&bg, 0, sizeof bg);
            for (int64_t i = 0; i < n * dim; i++)
                q[i] = rounded(p, g.q[i]);
            for (int64_t i = 0; i < m * dim; i++) {
                k[i] = rounded(p, g.k[i]);
                v[i] = d0 + i % dim < values ? rounded(p, g.v[i / dim * values + d0 + i % dim]) : 0;
            }
            for (int64_t i = 0; i < n * dim; i++)
                to[i] = d0 + i % dim < values ? rounded(p, dout[i / dim * values + d0 + i % dim]) : 0;
            b.batch = 1, b.heads = 2, b.kv_heads = 1, b.q_tokens = 90;
            b.q.data = q, b.k.data = k, b.v.data = v, b.out.data = out, b.lse = g.ref_lse,
            b.projection = g.twin_projection;
            bg.out.data = out, bg.dout.data = to, bg.lse = g.ref_lse, bg.dq.data = tq, bg.dk.data = tk, bg.dv.data = tv;
            CHECK(t.forward(&b, g.workspace, g.bytes) == NF_OK && t.backward(&b, &bg, g.workspace, g.bytes) == NF_OK,
                  "%s", t.name);
            for (int64_t i = 0; i < n * dim; i++)
                sum[0][i] += tq[i];
            for (int64_t i = 0; i < m * dim; i++) {
                sum[1][i] += tk[i];
                largest = fmax(largest, fabs((double)tv[i]));
                if (d0 + i % dim < values)
                    worst =
                        fmax(worst, fabs((double)read_element(p, dv, i / dim * values + d0 + i % dim) - (double)tv[i]));
            }
            CHECK(worst <= (p->element == 4 ? 2e-5
                            : is_matrix(&w) ? 2e-2
                                            : 1e-2) *
                               largest,
                  "%s: dv %.1e of %.1e", w.name, worst, largest);
            release(q), release(k), release(v), release(out), release(to), release(tq), release(tk), release(tv);
        }
        for (int key = 0; key < 2; key++) {
            double error = 0, length = 0;
            for (int64_t i = 0; i < (key ? m : n) * dim; i++) {
                error += pow((double)read_element(p, key ? dk : dq, i) - (double)sum[key][i], 2);
                length += pow((double)sum[key][i], 2);
            }
            CHECK(sqrt(error / length) <= (p->element == 4 ? 2e-5 : 2e-2), "%s: d%c is off by %.1e of its length",
                  w.name, key ? 'k' : 'q', sqrt(error / length));
        }
    }
    release(dout), release(given), release(dq), release(dk), release(dv), release(sum[0]), release(sum[1]);
    stage_free(&g);
}
#endif
