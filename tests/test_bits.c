/* Promises 1, 5 and 7: what must be equal to the bit. Later keys never show in earlier rows, not even as rounding; the
 * same call gives the same bits whatever the workspace holds and however it is split; NaN stays with those who see it.
 */
#include "check.h"
#include "call.h"

/* A copy of out and lse. */
typedef struct result {
    block out, lse;
} result;

static result result_of(const call *c)
{
    result r = {block_make(c->out.bytes, 0), block_make(c->lse.bytes, 0)};
    memcpy(r.out.data, c->out.data, r.out.bytes);
    memcpy(r.lse.data, c->lse.data, r.lse.bytes);
    return r;
}

static void result_free(result *r)
{
    block_free(&r->out);
    block_free(&r->lse);
}

static int result_equal(const result *r, const call *c)
{
    return memcmp(r->out.data, c->out.data, r->out.bytes) == 0 && memcmp(r->lse.data, c->lse.data, r->lse.bytes) == 0;
}

/* Is row i of query head h of batch entry b unchanged to the bit? */
static int row_equal(const result *r, const call *c, int64_t b, int64_t i, int64_t h)
{
    const int64_t at = (b * c->a.heads + h) * c->a.q_tokens + i;
    nf_input old = out_tensor(&c->a);
    old.data = r->out.data;
    return memcmp(row_at(old, b, i, h), row_at(out_tensor(&c->a), b, i, h), (size_t)c->k->dim * sizeof(float)) == 0 &&
           memcmp(r->lse.data + (size_t)at * sizeof(float), c->a.lse + at, sizeof(float)) == 0;
}

/* ---- promise 1 -----------------------------------------------------------------------------------------------------
 */

enum { ATTACKS = 8 };

static const char *const attack_name[ATTACKS] = {"norm 40",          "norm 40 towards q", "zero keys",
                                                 "along a row of W", "huge keys",         "NaN keys",
                                                 "values replaced",  "NaN everywhere"};

/* Replace the keys and values from token `from` on. */
static void attack(call *c, int64_t from, int how)
{
    const int dim = c->k->dim;
    const double unit = 1 / sqrt(1 / sqrt((double)dim));
    oracle_random r = {(uint64_t)(from + how)};
    for (int64_t j = from; j < c->a.q_tokens; j++) {
        float *k = row_at(c->a.k, 0, j, 0), *v = row_at(c->a.v, 0, j, 0), *q = row_at(c->a.q, 0, from - 1, 0);
        float *later = row_at(c->a.q, 0, j, 0), old[512];
        memcpy(old, k, (size_t)dim * sizeof(float));
        oracle_vector(&r, k, dim, 40 * unit);
        for (int d = 0; d < dim; d++) {
            k[d] = how == 1   ? 40 * q[d]
                   : how == 2 ? 0
                   : how == 3 ? (c->w ? (float)unit * c->w[(j % c->k->rows) * dim + d] : -q[d])
                   : how == 4 ? k[d] * 1e15f
                   : how == 5 ? NAN
                   : how == 6 ? old[d]
                   : how == 7 ? NAN
                              : k[d];
            v[d] = how >= 7 ? NAN : 1e6f * v[d] + 1;
            later[d] = how >= 7 ? NAN : -later[d];
        }
    }
}

TEST_LIST(causal, CAUSALS)
{
    oracle_random random = {42};
    EACH_WAY(k, w)
    {
        const int64_t chunk = w.chunk > 1 ? w.chunk : 8, b = k->block ? k->block : 1;
        const int64_t edges[] = {1,         chunk - 1,     chunk, chunk + 1, 2 * chunk - 1,
                                 2 * chunk, 3 * chunk + 1, b,     2 * b - 1, 3 * b + 1};
        for (size_t e = 0; e < sizeof edges / sizeof *edges + 3; e++)
            for (int how = QUICK ? (int)e % 3 : 0; how < ATTACKS; how += QUICK ? 3 : 1) {
                const shape s = {
                    .q_tokens = 4 * (chunk > b ? chunk : b), .norm = e % 2 ? 3 : 20, .seed = e, .kind = ORACLE_MIXED};
                const int64_t t = e < sizeof edges / sizeof *edges
                                      ? edges[e]
                                      : 1 + (int64_t)(oracle_next(&random) % (uint64_t)(s.q_tokens - 1));
                call c = call_make(k, s);
                result before;
                CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
                before = result_of(&c);
                attack(&c, t, how);
                CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
                for (int64_t i = 0; i < t; i++)
                    CHECK(row_equal(&before, &c, 0, i, 0), "%s: row %d sees %s from token %d on", w.name, (int)i,
                          attack_name[how], (int)t);
                CHECK(!row_equal(&before, &c, 0, t, 0), "%s: the attack at %d changes nothing", w.name, (int)t);
                result_free(&before);
                call_free(&c);
            }
    }
}

/* Keys so uneven that favor may end a chunk before one of them: whether it does must not depend on the chunk's last. */
TEST_LIST(uneven, CAUSALS)
{
    EACH_WAY(k, w)
    for (int how = 4; how < 6; how++)
        for (uint64_t seed = 0; seed < (QUICK ? 12 : 48); seed++) {
            const shape s = {.q_tokens = w.chunk > 1 ? w.chunk : 8, .norm = 6 + (double)(seed % 12), .seed = seed};
            call c = call_make(k, s);
            result before;
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            before = result_of(&c);
            attack(&c, s.q_tokens - 1, how);
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t i = 0; i < s.q_tokens - 1; i++)
                CHECK(row_equal(&before, &c, 0, i, 0), "%s: row %d sees the last of %d keys, seed %d", w.name, (int)i,
                      (int)s.q_tokens, (int)seed);
            result_free(&before);
            call_free(&c);
        }
}

/* The first N rows have the same bits whether or not more tokens follow. */
TEST_LIST(prefix, CAUSALS)
{
    EACH_WAY(k, w)
    {
        const int64_t lengths[] = {
            1, 2, w.chunk - 1, w.chunk, w.chunk + 1, 2 * w.chunk + 3, 3 * w.chunk, 3 * k->block + 1};
        const shape s = {.q_tokens = 3 * (w.chunk + k->block) + 5, .norm = 30, .kind = ORACLE_MIXED, .seed = 8};
        call c = call_make(k, s);
        result whole;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        whole = result_of(&c);
        for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) {
            c.a.q_tokens = lengths[n];
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t i = 0; i < lengths[n]; i++)
                CHECK(memcmp(whole.out.data + (size_t)(i * k->dim) * sizeof(float), row_at(out_tensor(&c.a), 0, i, 0),
                             (size_t)k->dim * sizeof(float)) == 0 &&
                          memcmp(whole.lse.data + (size_t)i * sizeof(float), c.a.lse + i, sizeof(float)) == 0,
                      "%s: row %d of %d differs from the longer call", w.name, (int)i, (int)lengths[n]);
        }
        result_free(&whole);
        call_free(&c);
    }
}

/* ---- promise 5 -----------------------------------------------------------------------------------------------------
 */

TEST_EACH(repeat)
{
    static const int fill[] = {0xff, 0x00, 0x7f, 0xa5};
    const shape s = {
        .batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 75 + 2 * k->block, .norm = 6, .odd = 1, .seed = 1};
    call c = call_make(k, s);
    EACH_WAY(k, w)
    {
        result first;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        first = result_of(&c);
        for (size_t i = 0; i < sizeof fill / sizeof *fill; i++) {
            memset(c.workspace.data, fill[i], c.workspace.bytes);
            CHECK(w.forward(&c.a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
            CHECK(result_equal(&first, &c), "%s: the workspace's old content shows", w.name);
        }
        result_free(&first);
    }
    call_free(&c);
}

/* Any cut of the units into calls gives the bits of one call, with a shared state too. */
static void split_equals_whole(call *c, way w, int64_t units)
{
    block state = block_make(c->state.bytes, 0);
    result whole;
    if (c->a.state)
        call_state(c);
    CHECK(call_run(c, w.forward) == NF_OK, "%s", w.name);
    whole = result_of(c);
    if (c->a.state)
        memcpy(state.data, c->state.data, state.bytes);
    for (int64_t step = 1; step < units; step++) {
        if (c->a.state)
            call_state(c);
        call_blank(c);
        for (int64_t end = units; end > 0; end -= step) { /* last first */
            c->a.split_begin = end > step ? end - step : 0;
            c->a.split_count = end - c->a.split_begin;
            CHECK(w.forward(&c->a, c->workspace.data, c->bytes) == NF_OK, "%s", w.name);
            memset(c->workspace.data, BLANK, c->bytes);
        }
        c->a.split_begin = c->a.split_count = 0;
        CHECK(result_equal(&whole, c), "%s: splits of %d units change bits", w.name, (int)step);
        CHECK(!c->a.state || memcmp(state.data, c->state.data, state.bytes) == 0, "%s: splits change the state",
              w.name);
    }
    block_free(&state);
    result_free(&whole);
}

TEST_EACH(splits)
{
    static const int32_t borders[] = {0, 10, 10, 60, 75};
    const shape table[] = {{.batch = 3, .heads = 4, .kv_heads = 2, .q_tokens = 41 + 2 * k->block, .norm = 6, .seed = 1},
                           {.heads = 2, .q_tokens = 75, .cu_tokens = borders, .sequences = 4, .norm = 6, .seed = 2}};
    for (int i = 0; i < 2; i++)
        for (int with_state = 0; with_state <= stateful(k); with_state++) {
            call c = call_make(k, table[i]);
            if (with_state)
                call_state(&c);
            EACH_WAY(k, w)
            {
                split_equals_whole(&c, w, i ? 8 : 6);
            }
            call_free(&c);
        }
}

/* Only the units of the split are written. */
TEST_EACH(split_writes)
{
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 40, .norm = 3, .seed = 1};
    call c = call_make(k, s);
    c.a.split_begin = 1;
    c.a.split_count = 2;
    EACH_WAY(k, w)
    {
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        for (int64_t b = 0; b < 2; b++)
            for (int64_t h = 0; h < 4; h++) {
                const int64_t unit = b * 2 + h / 2;
                const int ours = unit == 1 || unit == 2;
                CHECK(blank((unsigned char *)row_at(out_tensor(&c.a), b, 20, h), 4 * (size_t)k->dim) == !ours,
                      "%s: unit %d", w.name, (int)unit);
            }
    }
    call_free(&c);
}

/* ---- promise 7 -----------------------------------------------------------------------------------------------------
 */

/* NaN or Inf in one row of q, k or v of one head: rows that do not see it keep their bits, those that see a NaN say so.
 */
TEST_EACH(poison)
{
    static const float poisons[] = {NAN, INFINITY, -INFINITY};
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 100 + 2 * k->block, .norm = 3, .seed = 4};
    EACH_WAY(k, w)
    {
        for (int full = k->map == ORACLE_SOFTMAXQK; full < (k->block && k->features ? 1 : 2); full++) {
            call c = call_make(k, s);
            oracle_head o = head_at(&c, 1, 1, 0, s.q_tokens);
            result clean;
            c.a.mask = full;
            if (full)
                c.a.decay = NULL;
            o.full = full;
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            clean = result_of(&c);
            for (int which = 0; which < 3; which++)
                for (int p = 0; p < 3; p += QUICK ? 2 : 1) {
                    const int64_t at[] = {0, 31, 32, 50, 99}, t = at[(which + p + w_i) % 5];
                    float *poisoned = &row_at(which == 0 ? c.a.q : which == 1 ? c.a.k : c.a.v, 1, t, 1)[k->dim / 2];
                    const float healthy = *poisoned;
                    *poisoned = poisons[p];
                    CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
                    *poisoned = healthy;
                    for (int64_t b = 0; b < 2; b++)
                        for (int64_t h = 0; h < 4; h++)
                            for (int64_t i = 0; i < s.q_tokens; i++) {
                                const int sees =
                                    b == 1 && (which == 0 ? h == 1 && i == t
                                                          : h / 2 == 1 && oracle_link(&o, i, t) != ORACLE_UNSEEN);
                                const float *row = row_at(out_tensor(&c.a), b, i, h);
                                CHECK(sees || row_equal(&clean, &c, b, i, h),
                                      "%s: %g in %s of token %d shows in row %d, head %d, batch entry %d", w.name,
                                      (double)poisons[p], ((const char *[]){"q", "k", "v"})[which], (int)t, (int)i,
                                      (int)h, (int)b);
                                CHECK(!sees || p > 0 || isnan(row[k->dim / 2]), "%s: row %d hides a NaN in %s", w.name,
                                      (int)i, ((const char *[]){"q", "k", "v"})[which]);
                            }
                }
            result_free(&clean);
            call_free(&c);
        }
    }
}

/* ---- denormal numbers ----------------------------------------------------------------------------------------------
 */

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(DEVICE) && !defined(SIMT)
/* They count as zero within a call, and for the caller they are what they were. (GPUs take them as they are.) */
TEST_EACH(denormals)
{
    const shape s = {.batch = 1, .heads = 4, .kv_heads = 2, .q_tokens = 70 + 2 * k->block, .norm = 3, .seed = 6};
    EACH_WAY(k, w)
    {
        call c = call_make(k, s);
        volatile float tiny = 1e-40f;
        result zeros = {{0}, {0}};
        for (int round = 0; round < 2; round++) {
            for (int64_t t = 0; t < s.q_tokens; t += 3)
                for (int which = 0; which < 3; which++) {
                    float *row = row_at(which == 0   ? c.a.q
                                        : which == 1 ? c.a.k
                                                     : c.a.v,
                                        0, t, which == 0 ? t % 4 : t % 2);
                    for (int d = (int)t % 5; d < k->dim; d += 2)
                        row[d] = round ? (d % 4 ? tiny : -tiny) : 0;
                }
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            CHECK(tiny / 2 > 0, "%s leaves denormals flushed", w.name);
            if (round == 0)
                zeros = result_of(&c);
        }
        CHECK(result_equal(&zeros, &c), "%s: denormal numbers are not 0", w.name);
        result_free(&zeros);
        call_free(&c);
    }
}
#endif
