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
 * norm at which that feature is largest, |k'| = |w|. */
static void leaping_keys(call *c)
{
    const int dim = c->k->dim;
    const double unit = 1 / sqrt(1 / sqrt((double)dim));
    oracle_random r = {99};
    for (int64_t j = 0; j < c->a.q_tokens; j++) {
        const double norms[] = {40, 39, 30, 36, 25, 40, 20, 12, 30, 1};
        float *key = row_at(c->a.k, 0, j, 0);
        oracle_vector(&r, key, dim, unit * norms[(j + j / 50) % 10]);
        for (int d = 0; d < dim && c->w && j % 7 == 6; d++)
            key[d] = (float)unit * c->w[(j / 7 % c->k->rows) * dim + d];
    }
}

/* How often a chunk of C keys must be cut, by the rule itself: base = max(largest feature so far, the first key's). */
static int count_cuts(const call *c, int chunk)
{
    const oracle_head o = head_at(c, 0, 0, 0, c->a.q_tokens);
    const int m = c->k->features;
    double *l = oracle_doubles((size_t)m), *top = oracle_doubles((size_t)m), *base = oracle_doubles((size_t)m);
    int cuts = 0;
    for (int64_t j = 0, begin = 0; j < o.kv_tokens; j++) {
        int leap = 0;
        oracle_key_features(&o, j, l);
        for (int r = 0; r < m; r++)
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

TEST_LIST(cuts, FAVORS)
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
