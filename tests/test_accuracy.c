/* Promises 2 and 4: every way to run a kernel agrees with the fp64 oracle, on kind and on hostile inputs, at all
 * lengths and layouts, and is finite for finite input. */
#include "check.h"
#include "call.h"

/* Run the call in every way and compare its rows from `first` on with the oracle. */
static void agree(call *c, double norm, int64_t first, const char *what)
{
    EACH_WAY(c->k, w)
    {
        const nf_status s = call_run(c, w.forward);
        const double tol = tolerance(norm);
        double error;
        CHECK(s == NF_OK, "%s %s: %s", w.name, what, nf_status_text(s));
        error = call_error(c, first);
        CHECK(error <= tol, "%s %s, %d queries, %d keys: error %.3g > %.3g", w.name, what, (int)c->a.q_tokens,
              (int)kv_tokens(&c->a), error, tol);
        CHECK(call_intact(c), "%s %s: wrote beside its rows", w.name, what);
    }
}

static void agree_shape(const kernel *k, shape s, double norm, int64_t first, const char *what)
{
    call c;
    if (!takes(k, s))
        return;
    c = call_make(k, s);
    call_reference(&c, first);
    agree(&c, norm, first, what);
    call_free(&c);
}

/* Around the chunk of every variant, and long. */
TEST_EACH(lengths)
{
    static const int64_t lengths[] = {0,  1,  2,  15, 16, 17, 23, 24, 25,  31,  32,  33,   47,
                                      48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 1000, 4097};
    const size_t count = sizeof lengths / sizeof *lengths - (QUICK ? 2 : 0);
    for (size_t i = 0; i < count; i++) {
        const shape s = {.q_tokens = lengths[i], .kind = ORACLE_GAUSS, .norm = 3, .seed = 7 + i};
        agree_shape(k, s, 10, lengths[i] > 2000 ? lengths[i] - 64 : 0, "length");
    }
    EACH_WAY(k, w)
    {
        int around = 0;
        for (size_t i = 0; i < count; i++)
            around += lengths[i] >= w.chunk - 1 && lengths[i] <= w.chunk + 1;
        CHECK(around == 3, "%s: the lengths must enclose its chunk of %d", w.name, w.chunk);
    }
}

TEST_EACH(inputs)
{
    static const struct {
        oracle_kind kind;
        double norm;
    } table[] = {{ORACLE_GAUSS, 1},     {ORACLE_GAUSS, 8},     {ORACLE_CONSTANT, 0},  {ORACLE_CONSTANT, 5},
                 {ORACLE_CONSTANT, 10}, {ORACLE_CONSTANT, 20}, {ORACLE_CONSTANT, 40}, {ORACLE_MIXED, 10},
                 {ORACLE_MIXED, 40},    {ORACLE_EARLY, 10},    {ORACLE_EARLY, 20},    {ORACLE_EARLY, 40},
                 {ORACLE_OPPOSITE, 10}, {ORACLE_OPPOSITE, 20}, {ORACLE_OPPOSITE, 40}, {ORACLE_INTEGER, 10}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const shape s = {.q_tokens = QUICK ? 70 : 300, .kind = table[i].kind, .norm = table[i].norm, .seed = 11};
        char what[64];
        snprintf(what, sizeof what, "kind %d norm %g", (int)s.kind, s.norm);
        agree_shape(k, s, s.norm, 0, what);
    }
}

TEST_EACH(layouts)
{
    shape s;
    for (int i = 0; layout_at(k, i, &s); i++) {
        char what[32];
        snprintf(what, sizeof what, "layout %d", i);
        agree_shape(k, s, 10, 0, what);
    }
}

/* Packed sequences, empty ones among them, against each sequence alone. */
TEST_EACH(packed)
{
    static const int32_t borders[] = {0, 0, 5, 5, 5, 69, 70, 102, 102};
    for (int i = 0; i < 4; i++) {
        const shape s = {.heads = 4,
                         .kv_heads = 2,
                         .q_tokens = 102,
                         .cu_tokens = borders,
                         .sequences = 8,
                         .full = i & 1,
                         .odd = i / 2,
                         .norm = 3,
                         .seed = 5};
        agree_shape(k, s, 10, 0, "packed");
    }
}

/* lse is optional and changes nothing. */
TEST_EACH(without_lse)
{
    const shape s = {.heads = 2, .q_tokens = 70, .norm = 3, .seed = 5};
    call c = call_make(k, s);
    block first = block_make(c.out.bytes, 0);
    EACH_WAY(k, w)
    {
        c.a.lse = (float *)(void *)c.lse.data;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        memcpy(first.data, c.out.data, first.bytes);
        c.a.lse = NULL;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        CHECK(memcmp(first.data, c.out.data, first.bytes) == 0, "%s: out depends on lse", w.name);
        CHECK(blank(c.lse.data, c.lse.bytes) && call_intact(&c), "%s: wrote where it must not", w.name);
    }
    block_free(&first);
    call_free(&c);
}

/* ---- the chunk that has to be cut (math: a key more than 60 log2 units above the chunk's base) ------------------- */

/* Keys whose features rise by leaps: norms fall step by step, and now and then a key lies along a row of W with the
 * norm at which that feature is largest, |k'| = |w|. Of trig, where features grow with the norm, norms rise. */
static void leaping_keys(call *c)
{
    const int dim = c->k->dim;
    const double unit = 1 / sqrt(1 / sqrt((double)dim));
    oracle_random r = {99};
    for (int64_t j = 0; j < c->a.q_tokens; j++) {
        const double norms[] = {40, 39, 30, 36, 25, 40, 20, 12, 30, 1};
        float *key = row_at(c->a.k, 0, j, 0);
        oracle_vector(&r, key, dim,
                      unit * (map_of(c->k) == ORACLE_TRIG ? norms[9 - j % 10] : norms[(j + j / 50) % 10]));
        for (int d = 0; d < dim && c->w && j % 7 == 6; d++)
            key[d] = (float)unit * c->w[(j / 7 % c->k->rows) * dim + d];
    }
}

/* How often a chunk of C keys must be cut, by the rule itself: base = max(largest feature so far, the first key's). */
static int count_cuts(const call *c, int chunk)
{
    const oracle_head o = head_at(c, 0, 0, 0, c->a.q_tokens);
    const int trig = o.map == ORACLE_TRIG, first = trig ? c->k->features : 0; /* there, all share one exponent */
    const int m = c->k->features + trig;
    double *l = oracle_doubles((size_t)m + 1), *top = oracle_doubles((size_t)m), *base = oracle_doubles((size_t)m);
    int cuts = 0;
    for (int64_t j = 0, begin = 0; j < o.kv_tokens; j++) {
        int leap = 0;
        oracle_key_features(&o, j, l);
        for (int r = first; r < m; r++)
            leap |= j > begin && (l[r] - base[r]) / log(2) > 61;
        cuts += leap;
        if (leap || j == begin + chunk)
            begin = j;
        for (int r = 0; r < m; r++) {
            top[r] = j ? fmax(top[r], l[r]) : l[r];
            if (j == begin)
                base[r] = top[r];
        }
    }
    free(l);
    free(top);
    free(base);
    return cuts;
}

static void keys_leap(const kernel *k)
{
    const shape s = {.q_tokens = QUICK ? 100 : 500, .kind = ORACLE_GAUSS, .norm = 10, .seed = 3};
    call c = call_make(k, s);
    leaping_keys(&c);
    EACH_WAY(k, w)
    {
        CHECK(count_cuts(&c, w.chunk) >= 2, "%s: these inputs must cut chunks", w.name);
    }
    call_reference(&c, 0);
    agree(&c, 40, 0, "leaping keys");
    call_free(&c);
}

TEST_LIST(cuts, FAVORS)
{
    if (map_of(k) == ORACLE_RELU)
        return; /* nothing to be cut */
    keys_leap(k);
}

/* ---- cosines that cancel -------------------------------------------------------------------------------------------
 */

/* Short queries and keys, where trig cancels little and has to be as exact as the others. */
TEST_LIST(short_inputs, FAVORS)
{
    static const double norms[] = {0.1, 0.3, 0.6};
    for (size_t i = 0; i < 3; i++)
        for (int full = 0; full < 2; full++) {
            const shape s = {
                .heads = 4, .kv_heads = 2, .q_tokens = 131, .full = full, .norm = norms[i], .seed = 17 + i};
            call c = call_make(k, s);
            double most = 0;
            call_reference(&c, 0);
            for (int64_t row = 0; row < 4 * s.q_tokens; row++)
                most = fmax(most, c.ratio[row]);
            CHECK(i > 1 || most < 2, "norm %g: a sum cancels %g times", s.norm, most);
            agree(&c, s.norm, 0, "short");
            call_free(&c);
        }
}

/* Where the cosines of trig cancel, the sum counts as 2^-20 of what it would be without: the row stays finite, and is
 * the definition's. */
static void guarded_rows(const call *c, const char *name, const char *what)
{
    const double most = 1048576, v = c->v_norm;
    int count = 0;
    CHECK(call_finite(c), "%s %s: not finite", name, what);
    for (int64_t i = 0; i < c->a.q_tokens; i++) {
        const double *ref = c->ref + i * c->k->dim;
        double length = 0, error = 0;
        for (int d = 0; d < c->k->dim; d++) {
            length += pow(ref[d], 2);
            error += pow((double)row_at(out_tensor(&c->a), 0, i, 0)[d] - ref[d], 2);
        }
        if (c->ratio[i] < 0.999 * most || sqrt(length) < 0.01 * most * v)
            continue;
        count++;
        CHECK(sqrt(length) < most * v, "a row of the oracle is too long");
        CHECK(sqrt(error) < 1e-4 * sqrt(length), "%s %s: row %d, error %.3g", name, what, (int)i, sqrt(error / length));
        CHECK(fabs((double)c->a.lse[i] - c->ref_lse[i]) <= 1e-5 * fmax(1, fabs(c->ref_lse[i])), "%s %s: row %d, lse",
              name, what, (int)i);
    }
    CHECK(count >= 5, "%s: only %d rows", what, count);
}

TEST_LIST(guard, FAVORS)
{
    for (int full = 0; full < 2 && map_of(k) == ORACLE_TRIG; full++) {
        const shape s = {.q_tokens = full ? 50 : 150, .full = full, .kind = ORACLE_CONSTANT, .norm = 6, .seed = 4};
        call c = call_make(k, s);
        call_reference(&c, 0);
        EACH_WAY(k, w)
        {
            CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
            guarded_rows(&c, w.name, full ? "full" : "causal");
            if (full)
                continue;
            call_state(&c);
            call_blank(&c);
            for (int64_t t = 0; t < s.q_tokens; t++) {
                nf_args a = c.a;
                a.q_tokens = 1;
                a.q.data = row_at(c.a.q, 0, t, 0), a.k.data = row_at(c.a.k, 0, t, 0), a.v.data = row_at(c.a.v, 0, t, 0);
                a.out.data = row_at(out_tensor(&c.a), 0, t, 0), a.lse = c.a.lse + t;
                CHECK((t % 50 < 20 ? w.forward : w.decode)(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
            }
            guarded_rows(&c, w.name, "token by token");
            c.a.state = NULL;
        }
        call_free(&c);
    }
}

/* ---- finite input, finite output -----------------------------------------------------------------------------------
 */

/* Values far beyond any model's: out is finite, lse no NaN (it may leave float's range). v stays below 1e15, so that
 * sums of it exist. */
TEST_EACH(enormous)
{
    static const float sizes[] = {1e4f, 1e10f, 1e18f, 1e30f, 3.4028234e38f};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int which = 0; which < 5; which++) { /* q, k, both, v, a single key */
            const shape s = {.q_tokens = 70, .norm = 1, .seed = 3};
            call c = call_make(k, s);
            for (int64_t j = 0; j < s.q_tokens; j++)
                for (int d = 0; d < k->dim; d++) {
                    const float sign = row_at(c.a.v, 0, j, 0)[d] < 0 ? -1.0f : 1.0f;
                    if (which == 0 || which == 2)
                        row_at(c.a.q, 0, j, 0)[d] = sign * sizes[i];
                    if (which == 1 || which == 2 || (which == 4 && j == 40))
                        row_at(c.a.k, 0, j, 0)[d] = j % 3 ? -sizes[i] : sign * sizes[i];
                    if (which == 3)
                        row_at(c.a.v, 0, j, 0)[d] *= fminf(sizes[i], 1e15f);
                }
            EACH_WAY(k, w)
            {
                CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
                CHECK(call_finite(&c), "%s: not finite for %s of %g", w.name,
                      ((const char *[]){"q", "k", "q and k", "v", "one key"})[which], (double)sizes[i]);
            }
            call_free(&c);
        }
}
