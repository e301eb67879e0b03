/* Linear attention beyond what it shares with the other operators: signed and unnormalised weights, value dims of their
 * own, 16-bit tensors, decay that a float cannot add to 1, and the published recurrence of retention. */
#include "check.h"
#include "call.h"

#define ALL_LINEARS(X, y) LINEARS(X, y) OTHER_LINEARS(X, y)
OTHER_LINEARS(KERNEL_DECLARE, unused)

/* ---- tensors of any element, dense: [token][head][dim]
 * --------------------------------------------------------------- */

typedef enum element { F32, BF16, F16 } element;

static element element_of(const kernel *k)
{
    return strstr(k->name, "_bf16_") ? BF16 : strstr(k->name, "_f16_") ? F16 : F32;
}

/* Unit roundoff of an element. */
static double roundoff(element e)
{
    return e == BF16 ? 1.0 / 256 : e == F16 ? 1.0 / 2048 : 0;
}

static float decoded(const void *data, int64_t i, element e)
{
    const uint16_t half = e == F32 ? 0 : ((const uint16_t *)data)[i];
    uint32_t bits = (uint32_t)half << 16;
    float x;
    if (e == F32)
        return ((const float *)data)[i];
    memcpy(&x, &bits, sizeof x);
    if (e == F16) {
        const int exponent = half >> 10 & 31;
        x = ldexpf((float)((half & 1023) + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
        x = half >> 15 ? -x : x;
    }
    return x;
}

/* x cut to the bits of an element: exact in it. */
static void encode(void *data, int64_t i, float x, element e)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (e == F32) {
        ((float *)data)[i] = x;
    } else if (e == BF16) {
        ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
    } else {
        const int exponent = (int)(bits >> 23 & 255) - 112; /* 0 for what is too small */
        ((uint16_t *)data)[i] =
            (uint16_t)((bits >> 16 & 0x8000) | (exponent > 0 ? (uint32_t)exponent << 10 | (bits >> 13 & 1023) : 0));
    }
}

enum { HEADS = 4, KV_HEADS = 2, GROUP = HEADS / KV_HEADS };

typedef struct tensor {
    block raw;
    float *value; /* what raw holds, as float */
    int64_t count;
    element e;
} tensor;

static tensor tensor_new(const kernel *k, int64_t tokens, int heads, int dim)
{
    tensor t;
    t.e = element_of(k);
    t.count = tokens * heads * dim;
    t.raw = block_make((size_t)t.count * (t.e == F32 ? 4 : 2), t.e == F32 ? 4 : 2);
    t.value = (float *)calloc((size_t)t.count + 1, sizeof(float));
    return t;
}

static void tensor_fill(tensor *t, double size, int positive, oracle_random *r)
{
    for (int64_t i = 0; i < t->count; i++) {
        const float x = (float)(size * oracle_normal(r));
        encode(t->raw.data, i, positive ? fabsf(x) : x, t->e);
        t->value[i] = decoded(t->raw.data, i, t->e);
    }
}

static void tensor_read(tensor *t)
{
    for (int64_t i = 0; i < t->count; i++)
        t->value[i] = decoded(t->raw.data, i, t->e);
}

static void tensor_free(tensor *t)
{
    block_free(&t->raw);
    free(t->value);
}

/* ---- problems
 * -------------------------------------------------------------------------------------------------------- */

typedef struct problem {
    const kernel *k;
    int values;
    nf_args a;
    tensor q, key, v, out, dout, dq, dk, dv;
    float *lse, *dlse, *decay;
    block sums, dsums, decays, workspace, state;
    size_t bytes;
} problem;

static int values_of(const kernel *k)
{
    const int v = number_in(k->name, 'v');
    return v ? v : k->dim;
}

static problem problem_make(const kernel *k, int64_t tokens, int full, uint32_t flags, uint64_t seed)
{
    oracle_random r = {seed};
    problem p;
    const int positive = k->map == ORACLE_IDENTITY && !flags;
    memset(&p, 0, sizeof p);
    p.k = k, p.values = values_of(k);
    p.q = tensor_new(k, tokens, HEADS, k->dim), p.dq = tensor_new(k, tokens, HEADS, k->dim);
    p.key = tensor_new(k, tokens, KV_HEADS, k->dim), p.dk = tensor_new(k, tokens, KV_HEADS, k->dim);
    p.v = tensor_new(k, tokens, KV_HEADS, p.values), p.dv = tensor_new(k, tokens, KV_HEADS, p.values);
    p.out = tensor_new(k, tokens, HEADS, p.values), p.dout = tensor_new(k, tokens, HEADS, p.values);
    p.sums = block_make((size_t)(tokens * HEADS) * sizeof(float), 0), p.lse = (float *)(void *)p.sums.data;
    p.dsums = block_make((size_t)(tokens * HEADS) * sizeof(float), 0), p.dlse = (float *)(void *)p.dsums.data;
    p.decays = block_make(KV_HEADS * sizeof(float), 0), p.decay = (float *)(void *)p.decays.data;
    tensor_fill(&p.q, 1, positive, &r), tensor_fill(&p.key, 1, positive, &r);
    tensor_fill(&p.v, 1, 0, &r), tensor_fill(&p.dout, 1, 0, &r);
    for (int64_t i = 0; i < tokens * HEADS; i++)
        p.dlse[i] = (float)oracle_normal(&r) / (float)(tokens * k->dim);
    p.a.batch = 1, p.a.heads = HEADS, p.a.kv_heads = KV_HEADS, p.a.q_tokens = tokens;
    p.a.q.data = p.q.raw.data, p.a.k.data = p.key.raw.data, p.a.v.data = p.v.raw.data, p.a.out.data = p.out.raw.data;
    p.a.lse = p.lse, p.a.flags = flags;
    p.a.mask = full || k->map == ORACLE_SOFTMAXQK ? NF_FULL : NF_CAUSAL;
    p.bytes = k->workspace(NULL);
    p.workspace = block_make(p.bytes, 0);
    return p;
}

static void problem_free(problem *p)
{
    tensor *const all[] = {&p->q, &p->key, &p->v, &p->out, &p->dout, &p->dq, &p->dk, &p->dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        tensor_free(all[i]);
    block_free(&p->sums), block_free(&p->dsums), block_free(&p->decays);
    block_free(&p->workspace), block_free(&p->state);
}

static void problem_decay(problem *p, float first, float second)
{
    p->decay[0] = first, p->decay[1] = second;
    p->a.decay = p->decay;
}

static oracle_head problem_head(const problem *p, int h)
{
    const int kv = h / GROUP;
    oracle_head o;
    memset(&o, 0, sizeof o);
    o.q_tokens = o.kv_tokens = p->a.q_tokens;
    o.dim = p->k->dim, o.values = p->values;
    o.q_stride = HEADS * p->k->dim, o.k_stride = KV_HEADS * p->k->dim, o.v_stride = KV_HEADS * p->values;
    o.q = p->q.value + h * p->k->dim, o.k = p->key.value + kv * p->k->dim, o.v = p->v.value + kv * p->values;
    o.scale = (double)p->a.scale, o.full = p->a.mask == NF_FULL;
    o.map = p->k->map, o.decay = p->a.decay ? (double)p->decay[kv] : 0;
    o.unnormalised = (p->a.flags & NF_UNNORMALISED) != 0;
    return o;
}

/* phi of all queries or keys, every number's absolute value: sums of these are what a signed sum's rounding is measured
 * against. */
static double *magnitudes(const oracle_head *o, int query)
{
    double *phi = oracle_mapped(o, query);
    for (int64_t t = 0; t < (query ? o->q_tokens : o->kv_tokens) * o->dim; t++)
        phi[t] = fabs(phi[t]);
    return phi;
}

/* out and lse against the oracle: a vector's error is that of its sum, 1e-5 of the largest value times
 * the weights, and the rounding of what is written. */
static void problem_check(problem *p, const char *what)
{
    const int64_t n = p->a.q_tokens;
    double *out = oracle_doubles((size_t)(n * p->values)), *lse = oracle_doubles((size_t)n);
    tensor_read(&p->out);
    for (int h = 0; h < HEADS; h++) {
        const oracle_head o = problem_head(p, h);
        double *pq = magnitudes(&o, 1), *pk = magnitudes(&o, 0);
        oracle_linear(&o, out, lse);
        for (int64_t i = 0; i < n; i++) {
            double weights = 0, size;
            for (int64_t j = 0; j < n; j++)
                weights += oracle_weight(&o, i, j, pq, pk, NULL);
            size = o.unnormalised ? weights : 1;
            CHECK(fabs((double)p->lse[h * n + i] - lse[i]) <= 1e-5 * weights,
                  "%s: lse of row %d, head %d is %g, not %g", what, (int)i, h, (double)p->lse[h * n + i], lse[i]);
            for (int d = 0; d < p->values; d++) {
                const double ref = out[i * p->values + d], got = (double)p->out.value[(i * HEADS + h) * p->values + d];
                CHECK(fabs(got - ref) <= 5e-5 * size + 1.01 * roundoff(p->out.e) * fabs(ref),
                      "%s: row %d, head %d, dim %d is %g, not %g", what, (int)i, h, d, got, ref);
            }
        }
        free(pq), free(pk);
    }
    CHECK(block_intact(&p->out.raw), "%s: wrote beside out", what);
    free(out), free(lse);
}

static nf_status problem_run(problem *p, attend_fn attend)
{
    memset(p->out.raw.data, BLANK, p->out.raw.bytes);
    memset(p->workspace.data, BLANK, p->bytes);
    return attend(&p->a, p->workspace.data, p->bytes);
}

/* The gradients' largest error, relative to the longest row; of 16 bits out, dout and the gradients are rounded. */
static void problem_check_gradients(problem *p, const char *what)
{
    const int64_t n = p->a.q_tokens;
    const int dims[] = {p->k->dim, p->k->dim, p->values};
    tensor *const got[] = {&p->dq, &p->dk, &p->dv};
    const double bound = p->out.e == F32 ? 2e-5 : 8 * roundoff(p->out.e);
    double *ref[3], *dq, *dk, *dv;
    for (int t = 0; t < 3; t++)
        ref[t] = oracle_doubles((size_t)got[t]->count), tensor_read(got[t]);
    for (int h = 0; h < HEADS; h++) {
        const oracle_head o = problem_head(p, h);
        oracle_loss loss = {p->dout.value + h * p->values, p->dlse + h * n, HEADS * p->values, NULL, NULL, NULL};
        loss.dq = dq = oracle_doubles((size_t)(n * p->k->dim));
        loss.dk = dk = oracle_doubles((size_t)(n * p->k->dim));
        loss.dv = dv = oracle_doubles((size_t)(n * p->values));
        oracle_backward(&o, &loss);
        for (int64_t i = 0; i < n; i++) {
            for (int d = 0; d < p->k->dim; d++) {
                ref[0][(i * HEADS + h) * p->k->dim + d] += dq[i * p->k->dim + d];
                ref[1][(i * KV_HEADS + h / GROUP) * p->k->dim + d] += dk[i * p->k->dim + d];
            }
            for (int d = 0; d < p->values; d++)
                ref[2][(i * KV_HEADS + h / GROUP) * p->values + d] += dv[i * p->values + d];
        }
        free(dq), free(dk), free(dv);
    }
    for (int t = 0; t < 3; t++) {
        double most = 0, worst = 0;
        for (int64_t i = 0; i < got[t]->count; i += dims[t]) {
            double length = 0, off = 0;
            for (int d = 0; d < dims[t]; d++) {
                length += pow(ref[t][i + d], 2);
                off += pow(ref[t][i + d] - (double)got[t]->value[i + d], 2);
            }
            most = fmax(most, sqrt(length)), worst = larger(worst, sqrt(off));
        }
        CHECK(worst <= bound * most, "%s: %s off by %.3g of the longest row", what,
              ((const char *[]){"dq", "dk", "dv"})[t], worst / most);
        CHECK(block_intact(&got[t]->raw), "%s: wrote beside a gradient", what);
        free(ref[t]);
    }
}

/* ---- normalised or not, decaying or not, both masks, every element and value dim
 * --------------------------------------- */

/* The flags and masks of a case; 0 where there are no more. */
static int case_at(const kernel *k, int i, problem *p)
{
    static const int64_t tokens[] = {2, 33, 100, 131};
    const int full = i & 1, decaying = !full && (i & 4) && k->map != ORACLE_SOFTMAXQK;
    if (i >= 16)
        return 0;
    *p = problem_make(k, tokens[(i / 2) % 4], full, i & 2 ? NF_UNNORMALISED : 0, (uint64_t)i);
    p->a.scale = i & 8 ? 0.37f : 0;
    if (decaying)
        problem_decay(p, -0.03f, i & 8 ? -2.0f : 0);
    return 1;
}

TEST_LIST(cases, ALL_LINEARS)
{
    problem p;
    for (int i = 0; case_at(k, i, &p); i++) {
        EACH_WAY(k, w)
        {
            char what[128];
            snprintf(what, sizeof what, "%s case %d", w.name, i);
            CHECK(problem_run(&p, w.forward) == NF_OK, "%s", what);
            problem_check(&p, what);
        }
        problem_free(&p);
    }
}

TEST_LIST(gradients, ALL_LINEARS)
{
    problem p;
    for (int i = 0; k->backward && case_at(k, i, &p); i++) { /* GPUs have none */
        const nf_grads g = {.out = {p.out.raw.data, 0, 0, 0},
                            .dout = {p.dout.raw.data, 0, 0, 0},
                            .lse = p.lse,
                            .dlse = p.dlse,
                            .dq = {p.dq.raw.data, 0, 0, 0},
                            .dk = {p.dk.raw.data, 0, 0, 0},
                            .dv = {p.dv.raw.data, 0, 0, 0}};
        EACH_WAY(k, w)
        {
            char what[128];
            snprintf(what, sizeof what, "%s case %d", w.name, i);
            CHECK(problem_run(&p, w.forward) == NF_OK, "%s", what);
            CHECK(w.backward(&p.a, &g, p.workspace.data, p.bytes) == NF_OK, "%s", what);
            problem_check_gradients(&p, what);
        }
        problem_free(&p);
    }
}

/* A prompt, then single steps: the rows of one long call. softmaxqk: the keys in two calls, then the queries. */
TEST_LIST(steps, ALL_LINEARS)
{
    const int64_t n = 75, half = 40;
    EACH_WAY(k, w)
    {
        const size_t size = element_of(k) == F32 ? 4 : 2;
        problem p = problem_make(k, n, 0, w_i % 2 ? NF_UNNORMALISED : 0, 3);
        nf_args a;
        block sums = block_make((size_t)(HEADS * n) * sizeof(float), 0);
        float *lse = (float *)(void *)sums.data;
        if (k->map != ORACLE_SOFTMAXQK)
            problem_decay(&p, -0.01f, -1e-8f);
        p.state = block_make(k->state_bytes(&p.a), 0);
        p.a.state = p.state.data;
        CHECK(k->state_reset(&p.a) == NF_OK, "reset");
        for (int64_t t = 0, m; t < n; t += m) {
            a = p.a;
            m = t ? 1 : half;
            a.lse = lse;
            a.q_tokens = k->map == ORACLE_SOFTMAXQK ? 0 : m, a.kv_tokens = m;
            a.q.data = p.q.raw.data + (size_t)(t * HEADS * k->dim) * size;
            a.k.data = p.key.raw.data + (size_t)(t * KV_HEADS * k->dim) * size;
            a.v.data = p.v.raw.data + (size_t)(t * KV_HEADS * p.values) * size;
            a.out.data = p.out.raw.data + (size_t)(t * HEADS * p.values) * size;
            CHECK((t && a.q_tokens ? w.decode : w.forward)(&a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            for (int64_t row = 0; row < HEADS * a.q_tokens; row++)
                p.lse[row / m * n + t + row % m] = lse[row];
        }
        if (k->map == ORACLE_SOFTMAXQK) {
            nf_args ask = p.a;
            oracle_head o = problem_head(&p, 0);
            ask.kv_tokens = n - half; /* the keys from `half` on once more, to the state of those before */
            CHECK(k->state_reset(&p.a) == NF_OK, "reset");
            a = p.a, a.q_tokens = 0, a.kv_tokens = half;
            CHECK(w.forward(&a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            ask.k.data = p.key.raw.data + (size_t)(half * KV_HEADS * k->dim) * size;
            ask.v.data = p.v.raw.data + (size_t)(half * KV_HEADS * p.values) * size;
            CHECK(o.full && w.forward(&ask, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
        }
        problem_check(&p, w.name);
        block_free(&sums);
        problem_free(&p);
    }
}

/* Keys first, then queries that see the state alone; and queries that have nothing to see. */
TEST_LIST(queries_alone, ALL_LINEARS)
{
    const int64_t n = 75;
    EACH_WAY(k, w)
    {
        for (int i = 0; i < 4; i++) {
            problem p = problem_make(k, n, 1, i % 2 ? NF_UNNORMALISED : 0, 3);
            nf_args a = p.a, keys = p.a;
            p.state = block_make(k->state_bytes(&a), 0);
            a.state = keys.state = p.state.data;
            CHECK(k->state_reset(&a) == NF_OK, "reset");
            keys.q_tokens = 0, keys.kv_tokens = n;
            a.flags |= NF_NO_KEYS, a.k.data = a.v.data = NULL;
            CHECK((i / 2 ? w.decode : w.forward)(&a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            tensor_read(&p.out);
            for (int64_t at = 0; at < p.out.count; at++)
                CHECK(p.out.value[at] == 0 && p.lse[at / p.values] == 0, "%s: number %d of nothing", w.name, (int)at);
            CHECK(w.forward(&keys, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            CHECK((i / 2 ? w.decode : w.forward)(&a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            problem_check(&p, w.name);
            problem_free(&p);
        }
    }
}

/* ---- decay
 * ----------------------------------------------------------------------------------------------------------- */

/* A decay of about 1e-6 per token over a million equal tokens, in calls of one and of many tokens: the sum of weights
 * is known. A factor rounded to float would be 3 % off in the exponent. */
TEST_LIST(slow_decay, CAUSAL_LINEARS)
{
    const int64_t n = QUICK ? 20000 : 1000000, piece = 4000;
    const double g = -9.83e-7;
    if (k->dim > 8)
        return; /* the small one tells */
    EACH_WAY(k, w)
    {
        for (int chunks = 0; chunks < 2; chunks++) {
            problem p = problem_make(k, chunks ? piece : 1, 0, 0, 3);
            double one, expected;
            for (int64_t i = 0; i < p.key.count; i++)
                encode(p.key.raw.data, i, 0.25f, F32);
            problem_decay(&p, (float)g, (float)g);
            p.state = block_make(k->state_bytes(&p.a), 0);
            CHECK(w.forward(&p.a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            one = (double)p.lse[0];
            p.a.state = p.state.data;
            CHECK(k->state_reset(&p.a) == NF_OK, "reset");
            for (int64_t t = 0; t < n; t += p.a.q_tokens) {
                for (int64_t h = 0; h < HEADS; h++) /* the same query for all, the first */
                    for (int64_t i = 0; i < p.a.q_tokens && t == 0; i++)
                        memcpy(p.q.raw.data + (i * HEADS + h) * k->dim * 4, p.q.raw.data, (size_t)k->dim * 4);
                CHECK((chunks ? w.forward : w.decode)(&p.a, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            }
            expected = one * (1 - exp((double)p.decay[0] * (double)n)) / (1 - exp((double)p.decay[0]));
            CHECK(fabs((double)p.lse[p.a.q_tokens - 1] - expected) <= 3e-3 * expected, "%s, %s: %g, not %g", w.name,
                  chunks ? "chunks" : "steps", (double)p.lse[p.a.q_tokens - 1], expected);
            problem_free(&p);
        }
    }
}

/* Retention (Sun et al. 2023) as it is published: S_n = gamma S_n-1 + k_n' v_n, o_n = q_n S_n / sqrt(D). */
TEST_LIST(retention, CAUSAL_LINEARS)
{
    const int64_t n = 90;
    problem p = problem_make(k, n, 0, NF_UNNORMALISED, 8);
    double *s = oracle_doubles((size_t)(k->dim * p.values));
    if (k->map != ORACLE_IDENTITY) {
        free(s);
        problem_free(&p);
        return;
    }
    problem_decay(&p, (float)log(1 - 1.0 / 32), (float)log(1 - 1.0 / 64));
    p.a.scale = (float)(1 / sqrt((double)k->dim));
    EACH_WAY(k, w)
    {
        CHECK(problem_run(&p, w.forward) == NF_OK, "%s", w.name);
        tensor_read(&p.out);
        for (int h = 0; h < HEADS; h++) {
            memset(s, 0, (size_t)(k->dim * p.values) * sizeof *s);
            for (int64_t t = 0; t < n; t++) {
                const float *key = p.key.value + (t * KV_HEADS + h / GROUP) * k->dim,
                            *q = p.q.value + (t * HEADS + h) * k->dim;
                const float *v = p.v.value + (t * KV_HEADS + h / GROUP) * p.values;
                for (int e = 0; e < p.values; e++) {
                    double o = 0;
                    for (int d = 0; d < k->dim; d++) {
                        double *at = s + d * p.values + e;
                        *at = *at * (h / GROUP ? 1 - 1.0 / 64 : 1 - 1.0 / 32) + (double)key[d] * (double)v[e];
                        o += (double)q[d] * *at;
                    }
                    o /= sqrt((double)k->dim);
                    CHECK(fabs(o - (double)p.out.value[(t * HEADS + h) * p.values + e]) < 2e-5 * (1 + fabs(o)),
                          "%s: token %d, head %d is %g, not %g", w.name, (int)t, h,
                          (double)p.out.value[(t * HEADS + h) * p.values + e], o);
                }
            }
        }
    }
    free(s);
    problem_free(&p);
}

/* A relu query without a positive channel has nothing to attend to: 0, and a sum of 0; nor has it a gradient. */
TEST_LIST(nothing_to_attend_to, CAUSAL_LINEARS)
{
    problem p = problem_make(k, 40, 0, 0, 8);
    const nf_grads g = {.out = {p.out.raw.data, 0, 0, 0},
                        .dout = {p.dout.raw.data, 0, 0, 0},
                        .lse = p.lse,
                        .dq = {p.dq.raw.data, 0, 0, 0},
                        .dk = {p.dk.raw.data, 0, 0, 0},
                        .dv = {p.dv.raw.data, 0, 0, 0}};
    const int64_t row = 21 * HEADS * k->dim;
    for (int d = 0; d < k->dim; d++)
        encode(p.q.raw.data, row + d, -1 - p.q.value[row + d] * p.q.value[row + d], F32);
    EACH_WAY(k, w)
    {
        if (k->map == ORACLE_LINEAR_RELU) {
            CHECK(problem_run(&p, w.forward) == NF_OK, "%s", w.name);
            tensor_read(&p.out);
            CHECK(p.lse[21] == 0, "%s: the sum is %g", w.name, (double)p.lse[21]);
            for (int d = 0; d < p.values; d++)
                CHECK(p.out.value[21 * HEADS * p.values + d] == 0, "%s: dim %d is not 0", w.name, d);
            if (!k->backward)
                continue;
            CHECK(w.backward(&p.a, &g, p.workspace.data, p.bytes) == NF_OK, "%s", w.name);
            tensor_read(&p.dq), tensor_read(&p.dk), tensor_read(&p.dv);
            for (int d = 0; d < k->dim; d++)
                CHECK(p.dq.value[row + d] == 0, "%s: it has a gradient", w.name);
            for (int64_t i = 0; i < p.dk.count; i++)
                CHECK(isfinite(p.dk.value[i]) && isfinite(p.dv.value[i % p.dv.count]), "%s: not finite", w.name);
        }
    }
    problem_free(&p);
}
