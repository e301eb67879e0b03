/* Promise 3: prefill, chunked prefill and decode agree to rounding, states merge in any order, and a state is plain
 * bytes. And decode of exact attention against cached keys. */
#include "check.h"
#include "call.h"

#define LONG (QUICK ? 90 : 300)

/* Run tokens [from, to) of every sequence through the kernel, into their rows of out and lse. */
static nf_status run_range(const call *c, attend_fn attend, int64_t from, int64_t to)
{
    nf_args a = c->a;
    const int64_t n = to - from;
    block lse = block_make((size_t)(a.batch * a.heads * n) * sizeof(float), 0);
    nf_status s;
    a.q.data = row_at(a.q, 0, from, 0);
    a.k.data = row_at(a.k, 0, from, 0);
    a.v.data = row_at(a.v, 0, from, 0);
    a.out.data = row_at(out_tensor(&a), 0, from, 0);
    a.lse = (float *)(void *)lse.data;
    a.q_tokens = n;
    memset(c->workspace.data, BLANK, c->bytes);
    s = attend(&a, c->workspace.data, c->bytes);
    for (int64_t row = 0; row < a.batch * a.heads; row++)
        memcpy(c->a.lse + row * c->a.q_tokens + from, a.lse + row * n, (size_t)n * sizeof(float));
    block_free(&lse);
    return s;
}

static const nf_state_unit *state_unit(const block *state, int64_t unit)
{
    const size_t units = (size_t)((const nf_state_head *)(const void *)state->data)->units;
    const size_t bytes = (state->bytes - sizeof(nf_state_head)) / units;
    return (const nf_state_unit *)(const void *)(state->data + sizeof(nf_state_head) + (size_t)unit * bytes);
}

/* The largest difference of two states: of ln(z 2^R), and of S / z relative to the longest v. */
static double state_difference(const call *c, const block *a, const block *b)
{
    const int m = c->k->features, dim = c->k->dim;
    double worst = 0;
    for (int64_t u = 0; u < ((const nf_state_head *)(const void *)a->data)->units; u++) {
        const float *x = (const float *)(const void *)(state_unit(a, u) + 1);
        const float *y = (const float *)(const void *)(state_unit(b, u) + 1);
        for (int r = 0; r < m; r++) {
            const double lx = log((double)x[m + r]) + log(2) * (double)x[r];
            const double ly = log((double)y[m + r]) + log(2) * (double)y[r];
            double sum = 0;
            for (int d = 0; d < dim; d++) {
                const int at = 2 * m + r * dim + d;
                sum += pow((double)x[at] / (double)x[m + r] - (double)y[at] / (double)y[m + r], 2);
            }
            worst = fmax(worst, fabs(lx - ly) / fmax(1, fabs(lx)));
            worst = fmax(worst, sqrt(sum) / c->v_norm);
            if (isnan(lx - ly) || isnan(sum))
                return INFINITY;
        }
    }
    return worst;
}

static int64_t random_below(oracle_random *r, int64_t n)
{
    return (int64_t)(oracle_next(r) % (uint64_t)n);
}

/* ---- one stream, cut anywhere --------------------------------------------------------------------------------------
 */

/* Random pieces through forward, few tokens at a time also through decode. */
static void run_in_pieces(const call *c, way w, oracle_random *random, int64_t largest)
{
    for (int64_t t = 0, n; t < c->a.q_tokens; t += n) {
        n = 1 + random_below(random, largest);
        n = n < c->a.q_tokens - t ? n : c->a.q_tokens - t;
        {
            const attend_fn attend = n <= 3 && random_below(random, 2) ? w.decode : w.forward;
            const nf_status s = run_range(c, attend, t, t + n);
            CHECK(s == NF_OK, "%s tokens %d + %d: %s", w.name, (int)t, (int)n, nf_status_text(s));
        }
    }
}

TEST_FAVOR(pieces)
{
    static const struct {
        oracle_kind kind;
        double norm;
    } inputs[] = {{ORACLE_GAUSS, 2}, {ORACLE_CONSTANT, 10}, {ORACLE_EARLY, 20}, {ORACLE_MIXED, 40}};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        const shape s = {.batch = 2,
                         .heads = 4,
                         .kv_heads = 2,
                         .q_tokens = LONG / 2,
                         .odd = i % 2 ? 1 : 0,
                         .kind = inputs[i].kind,
                         .norm = inputs[i].norm,
                         .seed = 10 + i};
        oracle_random random = {i};
        call c = call_make(k, s);
        call_reference(&c, 0);
        call_state(&c);
        EACH_WAY(k, w)
        {
            const double tol = tolerance(s.norm);
            static const int64_t largest[] = {1000, 70, 5, 1};
            block whole = block_make(c.state.bytes, 0);
            for (size_t p = 0; p < sizeof largest / sizeof *largest; p++) {
                call_state(&c);
                call_blank(&c);
                run_in_pieces(&c, w, &random, largest[p]);
                CHECK(call_error(&c, 0) <= tol, "%s kind %d norm %g, pieces up to %d: error %.3g > %.3g", w.name,
                      (int)s.kind, s.norm, (int)largest[p], call_error(&c, 0), tol);
                CHECK(call_intact(&c), "%s: wrote beside its rows", w.name);
                CHECK(state_unit(&c.state, 3)->tokens == s.q_tokens, "%s: token count", w.name);
                if (p == 0)
                    memcpy(whole.data, c.state.data, whole.bytes);
                CHECK(state_difference(&c, &whole, &c.state) <= 2 * tol, "%s: state off by %.3g", w.name,
                      state_difference(&c, &whole, &c.state));
            }
            block_free(&whole);
        }
        call_free(&c);
    }
}

/* Token by token, every token through decode. */
TEST_FAVOR(decode)
{
    const shape s = {.heads = 4, .kv_heads = 2, .q_tokens = LONG / 2, .kind = ORACLE_MIXED, .norm = 10, .seed = 3};
    call c = call_make(k, s);
    call_reference(&c, 0);
    call_state(&c);
    EACH_WAY(k, w)
    {
        call_state(&c);
        call_blank(&c);
        for (int64_t t = 0; t < s.q_tokens; t++)
            CHECK(run_range(&c, w.decode, t, t + 1) == NF_OK, "%s", w.name);
        CHECK(call_error(&c, 0) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 0));
        CHECK(call_intact(&c), "%s: wrote beside its rows", w.name);
    }
    call_free(&c);
}

/* Absorb keys with no queries, then ask: the rows of the whole. */
TEST_FAVOR(absorb)
{
    const shape s = {.heads = 2, .q_tokens = 120, .norm = 5, .seed = 6};
    call c = call_make(k, s);
    call_reference(&c, 0);
    call_state(&c);
    EACH_WAY(k, w)
    {
        nf_args a = c.a;
        call_state(&c);
        call_blank(&c);
        a.q_tokens = 0;
        a.kv_tokens = 100;
        a.q.data = NULL;
        a.out.data = NULL;
        a.lse = NULL;
        CHECK(w.forward(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
        CHECK(state_unit(&c.state, 1)->tokens == 100, "%s: token count", w.name);
        CHECK(run_range(&c, w.forward, 100, 120) == NF_OK, "%s", w.name);
        CHECK(call_error(&c, 100) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 100));
    }
    call_free(&c);
}

/* With a state, the full mask sees every key of the state and of the call. */
TEST_FAVOR(full_with_state)
{
    const shape s = {.heads = 2, .q_tokens = 20, .kv_tokens = 120, .full = 1, .norm = 5, .seed = 6};
    call c = call_make(k, s);
    call_reference(&c, 0);
    EACH_WAY(k, w)
    {
        nf_args absorb;
        call_state(&c);
        absorb = c.a;
        absorb.q_tokens = 0;
        absorb.kv_tokens = 70;
        absorb.out.data = NULL;
        absorb.lse = NULL;
        CHECK(w.forward(&absorb, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
        call_blank(&c);
        {
            nf_args rest = c.a;
            rest.kv_tokens = 50;
            rest.k.data = row_at(c.a.k, 0, 70, 0);
            rest.v.data = row_at(c.a.v, 0, 70, 0);
            CHECK(w.forward(&rest, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
        }
        CHECK(call_error(&c, 0) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 0));
    }
    call_free(&c);
}

/* ---- states are bytes ----------------------------------------------------------------------------------------------
 */

/* A state may be stored, moved and taken up by another variant; its size does not depend on the length. */
TEST_FAVOR(serialised)
{
    const shape s = {.heads = 2, .q_tokens = 100, .norm = 5, .seed = 6};
    call c = call_make(k, s);
    nf_args longer = c.a;
    block stored;
    longer.q_tokens = 1 << 20;
    CHECK(k->state_bytes(&longer) == k->state_bytes(&c.a) && k->state_bytes(&c.a) > 0, "state bytes depend on N");
    CHECK(k->state_bytes(&c.a) % NF_ALIGN == 0, "state bytes are no multiple of NF_ALIGN");
    CHECK(k->workspace(&longer) == k->workspace(NULL) && k->workspace(NULL) % NF_ALIGN == 0, "workspace depends on N");
    longer.batch = 0;
    CHECK(k->state_bytes(&longer) == 0, "state bytes of invalid sizes must be 0");
    call_reference(&c, 0);
    call_state(&c);
    stored = block_make(c.state.bytes, 0);
    EACH_WAY(k, w)
    {
        call_state(&c);
        CHECK(run_range(&c, k->forward, 0, 61) == NF_OK, "%s", w.name);
        memcpy(stored.data, c.state.data, stored.bytes);
        memset(c.state.data, BLANK, c.state.bytes);
        c.a.state = stored.data;
        call_blank(&c);
        CHECK(run_range(&c, w.forward, 61, 100) == NF_OK, "%s: a moved state is not taken", w.name);
        CHECK(call_error(&c, 61) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, 61));
    }
    block_free(&stored);
    call_free(&c);
}

/* References are whole numbers (so that rescaling by them is exact), -1e30 while empty, and the weights stay sane. */
TEST_FAVOR(layout)
{
    const shape s = {.q_tokens = 60, .norm = 20, .kind = ORACLE_MIXED, .seed = 6};
    call c = call_make(k, s);
    const float *r;
    call_state(&c);
    r = (const float *)(const void *)(state_unit(&c.state, 0) + 1);
    for (int i = 0; i < k->features; i++)
        CHECK(r[i] == -1e30f && r[k->features + i] == 0, "an empty feature is (0, 0, -1e30)");
    CHECK(run_range(&c, k->forward, 0, 60) == NF_OK, "forward");
    for (int i = 0; i < k->features; i++) {
        CHECK(r[i] == rintf(r[i]) && fabsf(r[i]) < 1e6f, "R = %g is no whole number", (double)r[i]);
        CHECK(r[k->features + i] > 0 && isfinite(r[k->features + i]), "z = %g", (double)r[k->features + i]);
    }
    call_free(&c);
}

/* ---- merging -------------------------------------------------------------------------------------------------------
 */

/* Cut the stream into segments, make each one's state alone, merge them in random order, as a random tree. */
static void merge_randomly(call *c, const block *sequential, int segments, oracle_random *random, double tol)
{
    block part[20];
    int64_t at = 0;
    for (int i = 0; i < segments; i++) {
        const int64_t left = c->a.q_tokens - at - (segments - 1 - i);
        const int64_t n = i == segments - 1 ? c->a.q_tokens - at : 1 + random_below(random, left);
        call_state(c);
        CHECK(run_range(c, c->k->forward, at, at + n) == NF_OK, "segment");
        part[i] = block_make(c->state.bytes, 0);
        memcpy(part[i].data, c->state.data, c->state.bytes);
        at += n;
    }
    for (int left = segments; left > 1; left--) {
        const int64_t a = random_below(random, left), b = (a + 1 + random_below(random, left - 1)) % left;
        const int64_t into = random_below(random, 3); /* a third buffer, the first, the second */
        block out = block_make(c->state.bytes, 0);
        void *dst = into == 0 ? out.data : part[into == 1 ? a : b].data;
        CHECK(c->k->state_merge(dst, part[a].data, part[b].data) == NF_OK, "merge");
        memcpy(out.data, dst, out.bytes);
        block_free(&part[a]);
        block_free(&part[b]);
        part[a] = out;
        if (b != left - 1)
            part[b] = part[left - 1];
    }
    CHECK(state_difference(c, sequential, &part[0]) <= tol, "%d segments: merged state off by %.3g > %.3g", segments,
          state_difference(c, sequential, &part[0]), tol);
    CHECK(state_unit(&part[0], 0)->tokens == c->a.q_tokens, "merged token count");
    block_free(&part[0]);
}

TEST_FAVOR(merge_trees)
{
    static const double norms[] = {3, 10, 40};
    for (size_t i = 0; i < 3; i++) {
        const shape s = {.heads = 2, .q_tokens = LONG, .kind = ORACLE_MIXED, .norm = norms[i], .seed = 20 + i};
        oracle_random random = {i};
        call c = call_make(k, s);
        block sequential;
        call_reference(&c, s.q_tokens - 1); /* for v_norm */
        call_state(&c);
        CHECK(run_range(&c, k->forward, 0, s.q_tokens) == NF_OK, "forward");
        sequential = block_make(c.state.bytes, 0);
        memcpy(sequential.data, c.state.data, c.state.bytes);
        for (int segments = 2; segments <= 20; segments += QUICK ? 6 : 3)
            merge_randomly(&c, &sequential, segments, &random, 2 * tolerance(s.norm));
        block_free(&sequential);
        call_free(&c);
    }
}

/* The empty state is the exact identity on both sides, and a merged state goes on as if it had seen every key. */
TEST_FAVOR(merge_identity)
{
    const shape s = {.heads = 2, .q_tokens = 100, .kind = ORACLE_MIXED, .norm = 10, .seed = 6};
    call c = call_make(k, s);
    block empty, some, both, first;
    call_reference(&c, 0);
    call_state(&c);
    empty = block_make(c.state.bytes, 0);
    some = block_make(c.state.bytes, 0);
    both = block_make(c.state.bytes, 0);
    first = block_make(c.state.bytes, 0);
    memcpy(empty.data, c.state.data, empty.bytes);
    CHECK(run_range(&c, k->forward, 0, 50) == NF_OK, "forward");
    memcpy(some.data, c.state.data, some.bytes);
    CHECK(k->state_merge(both.data, some.data, empty.data) == NF_OK, "merge");
    CHECK(memcmp(both.data, some.data, some.bytes) == 0, "state + empty is not the state");
    CHECK(k->state_merge(both.data, empty.data, some.data) == NF_OK, "merge");
    CHECK(memcmp(both.data, some.data, some.bytes) == 0, "empty + state is not the state");
    CHECK(k->state_merge(both.data, empty.data, empty.data) == NF_OK, "merge");
    CHECK(memcmp(both.data, empty.data, some.bytes) == 0, "empty + empty is not empty");

    call_state(&c);
    CHECK(run_range(&c, k->forward, 50, 80) == NF_OK, "forward");
    CHECK(k->state_merge(first.data, c.state.data, some.data) == NF_OK, "merge");
    CHECK(k->state_merge(both.data, some.data, c.state.data) == NF_OK, "merge");
    CHECK(memcmp(both.data, first.data, both.bytes) == 0, "merge is not commutative");
    c.a.state = both.data;
    CHECK(run_range(&c, k->forward, 80, 100) == NF_OK, "forward");
    CHECK(call_error(&c, 80) <= tolerance(10), "after a merge: error %.3g", call_error(&c, 80));
    block_free(&empty);
    block_free(&some);
    block_free(&both);
    block_free(&first);
    call_free(&c);
}

/* ---- decode without a state ----------------------------------------------------------------------------------------
 */

/* Exact decode: a few new queries against all cached keys. */
TEST_EXACT(exact_decode)
{
    static const shape table[] = {{.q_tokens = 1, .kv_tokens = 1},
                                  {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 1, .kv_tokens = 100, .odd = 1},
                                  {.heads = 2, .q_tokens = 1, .kv_tokens = 1025},
                                  {.heads = 6, .kv_heads = 1, .q_tokens = 3, .kv_tokens = 129},
                                  {.heads = 2, .q_tokens = 5, .kv_tokens = 5},
                                  {.heads = 2, .q_tokens = 2, .kv_tokens = 64, .norm = 40}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        shape s = table[i];
        call c;
        s.norm = s.norm > 0 ? s.norm : 4;
        c = call_make(k, s);
        call_reference(&c, 0);
        EACH_WAY(k, w)
        {
            const nf_status status = call_run(&c, w.decode);
            CHECK(status == NF_OK, "%s shape %d: %s", w.name, (int)i, nf_status_text(status));
            CHECK(call_error(&c, 0) <= tolerance(s.norm), "%s shape %d: error %.3g", w.name, (int)i, call_error(&c, 0));
            CHECK(call_intact(&c), "%s shape %d: wrote beside its rows", w.name, (int)i);
        }
        call_free(&c);
    }
}
