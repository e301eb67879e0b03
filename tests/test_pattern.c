/* Sparse and hybrid over every kind of pattern: each part alone, unions, and what must follow from the definition. */
#include "nearfar/core.h"

#include "nearfar/pattern.h"

#include "nearfar/patterns.h"

#include "check.h"
#include "patterns.h"

#define CASES (QUICK ? 12 : 60)

/* At |k'| = 40 a logit, some 2300 in log2 units, is known to 1.2e-4: where two keys share a row, as they do here, their
 * weights are right to 8e-5. */
static double bound_of(double norm)
{
    return norm <= 10 ? tolerance(norm) : 1e-4;
}

/* Run the call in every way against the oracle. */
static void agree(call *c, double norm, const char *what)
{
    EACH_WAY(c->k, w)
    {
        const nf_status s = call_run(c, w.forward);
        const double error = s == NF_OK ? call_error(c, 0) : 0;
        CHECK(s == NF_OK, "%s %s: %s", w.name, what, nf_status_text(s));
        CHECK(error <= bound_of(norm), "%s %s, %d queries, %d keys: error %.3g", w.name, what, (int)c->a.q_tokens,
              (int)kv_tokens(&c->a), error);
        CHECK(call_intact(c), "%s %s: wrote beside its rows", w.name, what);
    }
}

static void agree_shape(const kernel *k, shape s, double norm, const char *what)
{
    call c = call_make(k, s);
    call_reference(&c, 0);
    agree(&c, norm, what);
    call_free(&c);
}

/* A shape at random: lengths around blocks and chunks, groups, strides, keys before the queries, both masks. */
static shape any_shape(const kernel *k, oracle_random *r)
{
    const int64_t around = (1 + below(r, 4)) * (below(r, 2) ? k->block : 96);
    shape s = {.heads = 4, .kv_heads = 2, .norm = 3};
    s.q_tokens = below(r, 4) ? around - 2 + below(r, 5) : 1 + below(r, 70);
    s.odd = (int)below(r, 2);
    s.seed = oracle_next(r) % 1000;
    s.full = !k->features && below(r, 3) == 0;
    if (!s.full && below(r, 3) == 0)
        s.kv_tokens = s.q_tokens + below(r, 2 * k->block);
    return s;
}

static void describe(char *text, size_t size, int parts, const shape *s, const nf_pattern *p)
{
    snprintf(text, size, "parts %d, seed %d%s%s, window %d, %d + %d globals", parts, (int)s->seed,
             s->full ? ", full" : "", s->odd ? ", odd" : "", (int)p->window, (int)p->globals, (int)p->global_count);
}

TEST_LIST(unions, WITH_PATTERN)
{
    const int alone[] = {
        WINDOW,    WINDOW | DILATION,         GLOBALS, LISTED, BLOCKS, BLOCKS | HEAD_LISTS, WINDOW | GAIN,
        FAR_EXACT, FAR_EXACT | GLOBALS | GAIN};
    const int count = sizeof alone / sizeof *alone;
    oracle_random r = {2};
    for (int i = 0; i < 2 * count + CASES; i++) {
        const int parts = i < 2 * count ? alone[i % count] : (int)below(&r, 256);
        shape s = any_shape(k, &r);
        kit t = kit_make(k, parts, s.heads, s.kv_tokens ? s.kv_tokens : s.q_tokens, &r);
        char what[128];
        s.pattern = &t.p;
        describe(what, sizeof what, parts, &s, &t.p);
        agree_shape(k, s, 10, what);
        CHECK(kit_intact(&t), "%s: wrote beside a list", what);
        kit_free(&t);
    }
}

TEST_LIST(hostile, WITH_PATTERN)
{
    oracle_random r = {3};
    for (int kind = 0; kind < ORACLE_KINDS; kind++)
        for (int i = 0; i < 2; i++) {
            shape s = {.heads = 2, .q_tokens = 3 * k->block + 20, .kind = (oracle_kind)kind, .norm = 40, .seed = 5};
            kit t = kit_make(k, i ? 255 & ~FAR_EXACT : WINDOW, s.heads, s.q_tokens, &r);
            char what[128];
            s.pattern = &t.p;
            describe(what, sizeof what, kind, &s, &t.p);
            agree_shape(k, s, 40, what);
            kit_free(&t);
        }
}

/* Every sequence has its own positions from 0 on. */
TEST_LIST(packed, WITH_PATTERN)
{
    static const int32_t borders[] = {0, 0, 70, 70, 75, 76, 240};
    oracle_random r = {4};
    for (int i = 0; i < CASES / 4; i++) {
        shape s = {.heads = 4, .kv_heads = 2, .q_tokens = 240, .cu_tokens = borders, .sequences = 6, .norm = 3};
        kit t = kit_make(k, (int)below(&r, 256), s.heads, 164, &r);
        s.pattern = &t.p;
        s.full = !k->features && i % 2;
        s.odd = i / 2 % 2;
        agree_shape(k, s, 10, "packed");
        kit_free(&t);
    }
}

/* ---- what follows from the definition ------------------------------------------------------------------------------
 */

/* Compare with plain exact attention. */
static void equals_exact(const kernel *k, shape s, const char *what)
{
    call c = call_make(k, s);
    c.ref = oracle_doubles((size_t)(s.heads * s.q_tokens * k->dim));
    c.ref_lse = oracle_doubles((size_t)(s.heads * s.q_tokens));
    c.v_norm = sqrt(k->dim) / 2;
    for (int64_t h = 0; h < s.heads; h++) {
        const oracle_head o = head_at(&c, 0, h, 0, s.q_tokens);
        oracle_exact(&o, c.ref + h * s.q_tokens * k->dim, c.ref_lse + h * s.q_tokens);
    }
    agree(&c, 10, what);
    call_free(&c);
}

/* A window, globals, a list or blocks that reach everything, and all of them at once. */
TEST_LIST(everything, WITH_PATTERN)
{
    const int64_t n = 2 * k->block + 11, blocks = 3;
    block lists;
    int32_t *const all = ints(&lists, n + 4 + 9), *const offsets = all + n, *const keys = offsets + 4;
    const nf_pattern wide = {.window = n}, huge = {.window = (int64_t)1 << 40}, globals = {.globals = n},
                     more = {.globals = (int64_t)1 << 40}, listed = {.global_tokens = all, .global_count = n},
                     listed_blocks = {.block = k->block,
                                      .block_heads = 1,
                                      .block_rows = blocks,
                                      .block_count = 9,
                                      .block_offsets = offsets,
                                      .block_keys = keys};
    nf_pattern both = listed_blocks;
    const nf_pattern *const patterns[] = {&wide, &huge, &globals, &more, &listed, &listed_blocks, &both};
    both.window = n, both.globals = n, both.global_tokens = all, both.global_count = n;
    for (int i = 0; i < n; i++)
        all[i] = i;
    for (int i = 0; i < 9; i++)
        keys[i] = i % 3;
    for (int i = 0; i < 4; i++)
        offsets[i] = 3 * i;
    for (size_t i = 0; i < (k->features ? 5 : sizeof patterns / sizeof *patterns); i++)
        for (int full = 0; full <= !k->features; full++) {
            const shape s = {.heads = 2, .q_tokens = n, .full = full, .norm = 3, .pattern = patterns[i]};
            char what[32];
            snprintf(what, sizeof what, "everything, way %d", (int)i);
            equals_exact(k, s, what);
        }
    block_free(&lists);
}

/* With q = 0 every key that is seen weighs 1: lse is the logarithm of their number, so a key counted twice, or not at
 * all, shows. */
TEST_LIST(counted_once, SPARSES)
{
    oracle_random r = {6};
    for (int i = 0; i < CASES / 2; i++) {
        shape s = any_shape(k, &r);
        kit t = kit_make(k, SPARSE_PARTS & (int)below(&r, 256), s.heads, s.kv_tokens ? s.kv_tokens : s.q_tokens, &r);
        call c;
        s.pattern = &t.p;
        c = call_make(k, s);
        for (int64_t n = 0; n < s.q_tokens * s.heads; n++)
            memset(row_at(c.a.q, 0, n / s.heads, n % s.heads), 0, (size_t)k->dim * sizeof(float));
        EACH_WAY(k, w)
        {
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t n = 0; n < s.q_tokens * s.heads; n++) {
                const oracle_head o = head_at(&c, 0, n / s.q_tokens, 0, s.q_tokens);
                const double lse = (double)c.a.lse[n];
                int64_t seen = 0;
                for (int64_t j = 0; j < o.kv_tokens; j++)
                    seen += oracle_link(&o, n % s.q_tokens, j) == ORACLE_NEAR;
                CHECK(seen ? fabs(lse - log((double)seen)) < 1e-6 : lse == -INFINITY,
                      "%s: row %d of head %d counts %g keys, sees %d", w.name, (int)(n % s.q_tokens),
                      (int)(n / s.q_tokens), exp(lse), (int)seen);
            }
        }
        call_free(&c);
        kit_free(&t);
    }
}

/* Rows that see nothing are 0, their lse -inf: empty lists, keys that lie behind the query. */
TEST_LIST(empty_rows, SPARSES)
{
    static const int32_t offsets[] = {0, 0, 1, 2, 2}, keys[] = {2, 0};
    const nf_pattern blocks = {.block = k->block,
                               .block_heads = 1,
                               .block_rows = 4,
                               .block_count = 2,
                               .block_offsets = offsets,
                               .block_keys = keys};
    for (int full = 0; full < 2; full++) {
        const int64_t b = k->block;
        const shape s = {.q_tokens = 3 * b + 5, .full = full, .norm = 3, .pattern = &blocks};
        call c = call_make(k, s);
        EACH_WAY(k, w)
        {
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t i = 0; i < s.q_tokens; i++) {
                const int sees = i / b == 2 || (i / b == 1 && full);
                float all = 0;
                for (int d = 0; d < k->dim; d++)
                    all += fabsf(row_at(out_tensor(&c.a), 0, i, 0)[d]);
                CHECK(sees ? isfinite(c.a.lse[i]) && all > 0 : c.a.lse[i] == -INFINITY && all == 0,
                      "%s: row %d is %g, lse %g", w.name, (int)i, (double)all, (double)c.a.lse[i]);
            }
        }
        call_reference(&c, 0);
        agree(&c, 10, "empty rows");
        call_free(&c);
    }
}

/* The far field alone, w = 0: the query's own block exactly, everything before it by features. */
TEST_LIST(far_alone, HYBRIDS)
{
    static const nf_pattern none;
    for (int kind = 0; kind < ORACLE_KINDS; kind++) {
        const shape s = {.q_tokens = 4 * k->block + 9, .kind = (oracle_kind)kind, .norm = 40, .pattern = &none};
        agree_shape(k, s, 40, "no window");
    }
}

/* A gain of -40 leaves no far field, one of 40 nothing else. */
TEST_LIST(gain, HYBRIDS)
{
    static const float gains[] = {-40, 0, 40};
    const nf_pattern p = {.far_gain = gains};
    const shape s = {.heads = 3, .q_tokens = 3 * k->block, .norm = 2, .pattern = &p};
    agree_shape(k, s, 10, "gains");
}

TEST_LIST(calibrated, HYBRIDS)
{
    oracle_random r = {8};
    for (int i = 0; i < 6; i++) {
        const int64_t n = 3 * k->block + 11;
        nf_calibration from = {.tau = i % 2 ? 0.6f : 0, .q_tokens = n, .k_tokens = n, .flags = i % 3 ? optimal(k) : 0};
        shape s = {.q_tokens = n, .norm = 4, .seed = 30 + (uint64_t)i};
        kit t = kit_make(k, i < 2 ? WINDOW : (int)below(&r, 256), 1, n, &r);
        oracle_calibration definition;
        call c;
        s.pattern = &t.p;
        c = call_make(k, s);
        for (int64_t j = 0; j < n; j++) /* something to centre */
            row_at(c.a.k, 0, j, 0)[0] += 3, row_at(c.a.q, 0, j, 0)[1] -= 2;
        from.q = row_at(c.a.q, 0, 0, 0), from.k = row_at(c.a.k, 0, 0, 0);
        definition = oracle_calibrate(from.q, n, 0, from.k, n, 0, k->dim, (double)from.tau, from.flags);
        call_project(&c, 3, &from);
        c.calibration = &definition;
        call_reference(&c, 0);
        agree(&c, 10, "calibrated");
        oracle_calibration_free(&definition);
        call_free(&c);
        kit_free(&t);
    }
}

/* ---- the named patterns, and how many keys a pattern lets a query see -----------------------------------------------
 */

/* Most keys of any query, by looking at each. */
static int64_t most_keys(const call *c)
{
    const nf_args *a = &c->a;
    const int32_t whole[2] = {0, (int32_t)a->q_tokens};
    const int32_t *cu = a->cu_tokens ? a->cu_tokens : whole;
    int64_t most = 0;
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t s = 0; s < (a->cu_tokens ? a->sequences : 1); s++) {
            const oracle_head o = head_at(c, 0, h, cu[s], cu[s + 1] - cu[s]);
            for (int64_t i = 0; i < o.q_tokens; i++) {
                int64_t keys = 0;
                for (int64_t j = 0; j < o.kv_tokens; j++)
                    keys += oracle_link(&o, i, j) != ORACLE_UNSEEN;
                most = keys > most ? keys : most;
            }
        }
    return most;
}

TEST_LIST(bound, SPARSES)
{
    static const int32_t borders[] = {0, 0, 70, 75, 240};
    oracle_random r = {21};
    for (int i = 0; i < 2 * CASES; i++) {
        shape s = any_shape(k, &r);
        kit t;
        call c;
        int64_t most, claimed;
        if (i % 8 == 0)
            s.q_tokens = 240, s.kv_tokens = 0, s.cu_tokens = borders, s.sequences = 4;
        t = kit_make(k, (int)below(&r, 64), s.heads, s.kv_tokens ? s.kv_tokens : s.q_tokens, &r);
        s.pattern = &t.p;
        c = call_make(k, s);
        most = most_keys(&c);
        claimed = nf_pattern_bound(&t.p, &c.a);
        CHECK(claimed == most, "case %d%s, %d queries, %d keys, window %d, %d + %d globals: bound %d, but %d are seen",
              i, s.full ? ", full" : "", (int)s.q_tokens, (int)kv_tokens(&c.a), (int)t.p.window, (int)t.p.globals,
              (int)t.p.global_count, (int)claimed, (int)most);
        if (!t.p.global_count && !t.p.block_offsets && !s.full) {
            c.a.state = &c;
            CHECK(nf_pattern_bound(&t.p, &c.a) >= most, "case %d: the bound with a state is too small", i);
        }
        call_free(&c);
        kit_free(&t);
    }
}

/* Each named pattern by its own definition. */
TEST_LIST(named, SPARSES)
{
    const int64_t n = 9 * k->block + 3, b = k->block;
    for (int which = 0; which < 6; which++) {
        const int full = which % 2, bigbird = which >= 4;
        const int64_t window = b + 3, globals = which / 2 == 1 ? 0 : 3, stride = 3, random = 2;
        nf_pattern p;
        shape s = {.heads = 2, .q_tokens = n, .full = full, .norm = 2, .pattern = &p};
        block memory = {0};
        call c;
        memset(&p, BLANK, sizeof p);
        if (which < 2) {
            nf_pattern_longformer(&p, window, globals);
        } else {
            const int64_t count = bigbird ? nf_pattern_bigbird(&p, n, b, full, window, globals, random, 2, 5, NULL)
                                          : nf_pattern_strided(&p, n, b, full, window, stride, NULL);
            int32_t *lists = ints(&memory, count);
            CHECK(count > 0, "no such pattern");
            CHECK(count == (bigbird ? nf_pattern_bigbird(&p, n, b, full, window, globals, random, 2, 5, lists)
                                    : nf_pattern_strided(&p, n, b, full, window, stride, lists)),
                  "asks for other memory than it takes");
        }
        CHECK(block_intact(&memory), "wrote beside its memory");
        c = call_make(k, s);
        for (int64_t h = 0; h < 2; h++) {
            const oracle_head o = head_at(&c, 0, h, 0, n);
            for (int64_t i = 0; i < n; i++) {
                int64_t apart = 0, whole = 0, available = 0; /* bigbird: keys and key blocks that are neither */
                for (int64_t j = 0; j < (full ? n : i + 1); j++) {
                    const int64_t away = i > j ? i - j : j - i;
                    const int usual = away < window || j < globals || i < globals;
                    const int summary = which / 2 == 1 && (j / b + 1) % stride == 0;
                    const int sees = oracle_link(&o, i, j) == ORACLE_NEAR;
                    const int64_t first = i / b * b - window + 1, last = i / b * b + b - 1 + window - 1;
                    CHECK(sees || !(usual || summary), "pattern %d: %d does not see %d", which, (int)i, (int)j);
                    CHECK(bigbird || !sees || usual || summary, "pattern %d: %d sees %d", which, (int)i, (int)j);
                    apart += sees && !usual;
                    if (j % b == 0 && j >= globals && (j + b <= first || j > last))
                        available++;
                    whole = apart / b;
                }
                if (bigbird && i >= globals)
                    CHECK(apart == whole * b ? whole == (available < random ? available : random)
                                             : full && apart > (random - 1) * b,
                          "bigbird: row %d sees %d keys apart, %d blocks are there", (int)i, (int)apart,
                          (int)available);
            }
        }
        CHECK(nf_pattern_bound(&p, &c.a) == most_keys(&c), "pattern %d: bound", which);
        call_reference(&c, 0);
        agree(&c, 10, "named");
        call_free(&c);
        block_free(&memory);
    }
}

/* Another seed draws other blocks, the same one the same; every head has its own; lists that cannot be are refused. */
TEST_LIST(drawn, SPARSES)
{
    const int64_t n = 40 * k->block, b = k->block, rows = 40;
    int32_t lists[3][512];
    nf_pattern p, other;
    CHECK(nf_pattern_bigbird(&p, n, b, NF_CAUSAL, b, b, 3, 2, 1, NULL) <= 512, "longer than expected");
    for (int i = 0; i < 3; i++) {
        memset(lists[i], 0, sizeof lists[i]);
        nf_pattern_bigbird(i ? &other : &p, n, b, NF_CAUSAL, b, b, 3, 2, i == 2 ? 2 : 1, lists[i]);
    }
    CHECK(memcmp(lists[0], lists[1], sizeof lists[0]) == 0, "the same seed draws other blocks");
    CHECK(memcmp(lists[0], lists[2], sizeof lists[0]) != 0, "another seed draws the same blocks");
    CHECK(memcmp(p.block_keys, p.block_keys + p.block_offsets[rows], sizeof(int32_t) * 30) != 0, "both heads alike");
    CHECK(nf_pattern_strided(&p, 0, b, 0, 1, 2, NULL) == 0 && nf_pattern_strided(&p, n, 0, 0, 1, 2, NULL) == 0 &&
              nf_pattern_strided(&p, n, b, 0, -1, 2, NULL) == 0 && nf_pattern_strided(&p, n, b, 0, 1, 0, NULL) == 0 &&
              nf_pattern_bigbird(&p, n, b, 0, 1, -1, 1, 1, 0, NULL) == 0 &&
              nf_pattern_bigbird(&p, n, b, 0, 1, 1, -1, 1, 0, NULL) == 0 &&
              nf_pattern_bigbird(&p, n, b, 0, 1, 1, 1, 0, 0, NULL) == 0 &&
              nf_pattern_bigbird(&p, INT64_MAX, b, 0, 1, 1, 1, 1, 0, NULL) == 0 &&
              nf_pattern_bigbird(&p, n, INT64_MAX, 0, 1, 1, 1, 1, 0, NULL) == 0,
          "a pattern that cannot be");
}

/* ---- causality and containment -------------------------------------------------------------------------------------
 */

/* Is row i of head h the same to the bit? */
static int same_row(const call *c, const block *out, const block *lse, int64_t i, int64_t h)
{
    const size_t at = (size_t)(h * c->a.q_tokens + i) * sizeof(float);
    nf_input old = out_tensor(&c->a);
    old.data = out->data;
    return memcmp(row_at(old, 0, i, h), row_at(out_tensor(&c->a), 0, i, h), (size_t)c->k->dim * sizeof(float)) == 0 &&
           memcmp(lse->data + at, c->lse.data + at, sizeof(float)) == 0;
}

static void spoil(call *c, int64_t token, int64_t kv_head, int how)
{
    const float with[] = {NAN, INFINITY, 1e30f, -INFINITY};
    for (int d = 0; d < c->k->dim; d++) {
        row_at(c->a.k, 0, token, kv_head)[d] = how == 2 ? (d % 2 ? 40.0f : -40.0f) : with[how];
        row_at(c->a.v, 0, token, kv_head)[d] = with[how];
    }
}

/* What stands behind a query changes no bit of it, whatever the pattern; nor does a single key that it does not see,
 * and a NaN that it does see shows. */
TEST_LIST(unseen, WITH_PATTERN)
{
    oracle_random r = {12};
    for (int i = 0; i < CASES; i++) {
        shape s = any_shape(k, &r);
        const int64_t keys = s.kv_tokens ? s.kv_tokens : s.q_tokens, at = below(&r, keys);
        const int later = i % 2 && !s.full, how = i / 2 % 4; /* all keys from `at` on, or just that one */
        const int parts = (int)below(&r, 256);
        kit t = kit_make(k, parts, s.heads, keys, &r);
        block out, lse;
        s.pattern = &t.p;
        EACH_WAY(k, w)
        {
            call c = call_make(k, s);
            out = block_make(c.out.bytes, 0), lse = block_make(c.lse.bytes, 0);
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            memcpy(out.data, c.out.data, out.bytes);
            memcpy(lse.data, c.lse.data, lse.bytes);
            for (int64_t j = at; j < (later ? keys : at + 1); j++)
                spoil(&c, j, 1, how);
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t h = 0; h < s.heads; h++)
                for (int64_t n = 0; n < s.q_tokens; n++) {
                    const oracle_head o = head_at(&c, 0, h, 0, s.q_tokens);
                    int sees = 0;
                    for (int64_t j = at; h / 2 == 1 && j < (later ? keys : at + 1); j++)
                        sees |= oracle_link(&o, n, j) != ORACLE_UNSEEN;
                    CHECK(sees || same_row(&c, &out, &lse, n, h), "%s, parts %d: row %d of head %d saw key %d", w.name,
                          parts, (int)n, (int)h, (int)at);
                    CHECK(!sees || how || isnan(row_at(out_tensor(&c.a), 0, n, h)[0]), "%s: row %d hides a NaN", w.name,
                          (int)n);
                }
            block_free(&out), block_free(&lse);
            call_free(&c);
        }
        kit_free(&t);
    }
}

#ifdef SIMT
/* ---- numbers that only the GPU sees: where they break a rule, every row says so, and nothing else happens
 * ------------
 */

TEST_LIST(unsound, SPARSES)
{
    static const struct {
        int list, at;
        int32_t number;
    } broken[] = {{0, 1, 0},         {0, 0, -5},        {0, 1, (1 << 20) + 1},
                  {1, 0, -1},        {1, 2, INT32_MAX}, {1, 1, 3},
                  {1, 2, 4},         {2, 0, 1},         {2, 1, -1},
                  {2, 2, 1},         {2, 3, 6},         {2, 4, 4},
                  {2, 4, INT32_MAX}, {2, 2, INT32_MIN}, {3, 0, -1},
                  {3, 1, 0},         {3, 3, 3},         {3, 4, 4},
                  {3, 2, INT32_MAX}, {3, 2, INT32_MIN}};
    static const int32_t sound[4][5] = {{2, 1}, {3, 9, 40}, {0, 2, 3, 3, 5}, {0, 2, 1, 1, 3}};
    const int count = sizeof broken / sizeof *broken;
    for (int i = -1; i <= count; i++) {
        block number[4], borders;
        int32_t *list[4], *const border = ints(&borders, 3);
        nf_pattern p = {.window = 3,
                        .global_count = 3,
                        .block = k->block,
                        .block_heads = 1,
                        .block_rows = i < count ? 4 : 3,
                        .block_count = 5};
        shape s = {.heads = 2, .q_tokens = 3 * k->block + 7, .norm = 3, .pattern = &p};
        call c;
        for (int j = 0; j < 4; j++) {
            list[j] = ints(&number[j], 5);
            memcpy(list[j], sound[j], sizeof sound[j]);
        }
        p.dilation = list[0], p.global_tokens = list[1], p.block_offsets = list[2], p.block_keys = list[3];
        border[0] = 0, border[1] = (int32_t)s.q_tokens, border[2] = (int32_t)s.q_tokens;
        if (i < 0) {
            agree_shape(k, s, 10, "sound");
        } else if (i < count) {
            list[broken[i].list][broken[i].at] = broken[i].number;
        } else { /* rows for less than the longest sequence */
            list[2][3] = 5;
            s.cu_tokens = border, s.sequences = 2;
        }
        c = call_make(k, s);
        EACH_WAY(k, w)
        {
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            for (int64_t row = 0; row < 2 * s.q_tokens; row++)
                CHECK(isnan(c.a.lse[row]) == (i >= 0) &&
                          isnan(row_at(out_tensor(&c.a), 0, row / 2, row % 2)[5]) == (i >= 0),
                      "%s: case %d, row %d", w.name, i, (int)row);
            CHECK(call_intact(&c), "%s: case %d: wrote beside its rows", w.name, i);
        }
        call_free(&c);
        for (int j = 0; j < 4; j++)
            block_free(&number[j]);
        block_free(&borders);
    }
}
#endif
