/* Promise 3: prefill, chunked prefill and decode agree to rounding, states merge in any order, and a state is plain
 * bytes. And decode of exact attention against cached keys. */
#include "check.h"
#include "patterns.h"

#include <sys/mman.h>
#include <unistd.h>

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

/* The near field of a unit, K rows and then V rows. */
static const float *near_field(const kernel *k, const nf_state_unit *unit)
{
    return (const float *)(const void *)(unit + 1) + k->far * (k->dim + 2);
}

/* The same where sums may have any sign: of z, and of S relative to the longest v, both relative to the largest z. */
static double linear_difference(const call *c, const block *a, const block *b)
{
    const int m = c->k->far, dim = c->k->dim;
    double worst = 0;
    for (int64_t u = 0; u < ((const nf_state_head *)(const void *)a->data)->units; u++) {
        const float *x = (const float *)(const void *)(state_unit(a, u) + 1);
        const float *y = (const float *)(const void *)(state_unit(b, u) + 1);
        double most = 0, off = 0;
        for (int r = 0; r < m; r++) {
            double sum = 0;
            if (x[r] != y[r])
                return INFINITY;
            for (int d = 0; d < dim; d++)
                sum += pow((double)x[2 * m + r * dim + d] - (double)y[2 * m + r * dim + d], 2);
            most = fmax(most, fabs((double)x[m + r]));
            off = larger(off, fmax(fabs((double)x[m + r] - (double)y[m + r]), sqrt(sum) / c->v_norm));
        }
        worst = larger(worst, off > 0 ? off / most : 0);
    }
    return worst;
}

/* Of plain features: of z and S, relative to the mass of the keys (relu: to z), S to the longest v as well. */
static double plain_difference(const call *c, const nf_state_unit *a, const nf_state_unit *b)
{
    const int m = c->k->features, dim = c->k->dim;
    const float *x = (const float *)(const void *)(a + 1), *y = (const float *)(const void *)(b + 1);
    const double top = fmax((double)x[0], (double)y[0]), fx = exp2((double)x[0] - top), fy = exp2((double)y[0] - top);
    double worst = 0;
    for (int r = 0; r < m; r++) {
        const double mass = map_of(c->k) == ORACLE_TRIG ? fx * (double)a->mass : (double)x[m + r];
        double sum = 0;
        if (mass == 0 && a->mass == b->mass && x[m + r] == y[m + r])
            continue;
        for (int d = 0; d < dim; d++)
            sum += pow(fx * (double)x[2 * m + r * dim + d] - fy * (double)y[2 * m + r * dim + d], 2);
        worst = larger(worst, fabs(fx * (double)x[m + r] - fy * (double)y[m + r]) / mass);
        worst = larger(worst, sqrt(sum) / mass / c->v_norm);
        worst = larger(worst, fabs(fx * (double)a->mass - fy * (double)b->mass) / mass);
    }
    return worst;
}

/* The largest difference of two states: of ln(z 2^R), and of S / z relative to the longest v. */
static double state_difference(const call *c, const block *a, const block *b)
{
    const int m = c->k->far, dim = c->k->dim;
    double worst = 0;
    if (c->k->map && c->k->map != ORACLE_SOFTMAXQK)
        return linear_difference(c, a, b);
    for (int64_t u = 0; u < ((const nf_state_head *)(const void *)a->data)->units; u++) {
        const float *x = (const float *)(const void *)(state_unit(a, u) + 1);
        const float *y = (const float *)(const void *)(state_unit(b, u) + 1);
        if (map_of(c->k) == ORACLE_TRIG || map_of(c->k) == ORACLE_RELU) {
            worst = larger(worst, plain_difference(c, state_unit(a, u), state_unit(b, u)));
            continue;
        }
        for (int r = 0; r < m; r++) {
            const int empty = x[m + r] == 0 && y[m + r] == 0 && x[r] == y[r];
            const double lx = log((double)x[m + r]) + log(2) * (double)x[r];
            const double ly = log((double)y[m + r]) + log(2) * (double)y[r];
            double sum = 0;
            if (empty)
                continue;
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

/* ---- one stream, cut anywhere --------------------------------------------------------------------------------------
 */

/* Random pieces through forward, few tokens at a time also through decode. */
static void run_in_pieces(const call *c, way w, oracle_random *random, int64_t largest)
{
    for (int64_t t = 0, n; t < c->a.q_tokens; t += n) {
        n = 1 + below(random, largest);
        n = n < c->a.q_tokens - t ? n : c->a.q_tokens - t;
        {
            const attend_fn attend = n <= 3 && below(random, 2) ? w.decode : w.forward;
            const nf_status s = run_range(c, attend, t, t + n);
            CHECK(s == NF_OK, "%s tokens %d + %d: %s", w.name, (int)t, (int)n, nf_status_text(s));
        }
    }
}

TEST_LIST(pieces, WITH_STATE)
{
    static const struct {
        oracle_kind kind;
        double norm;
    } inputs[] = {{ORACLE_GAUSS, 2}, {ORACLE_CONSTANT, 10}, {ORACLE_EARLY, 20}, {ORACLE_MIXED, 40}};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        const shape s = {.batch = 2,
                         .heads = 4,
                         .kv_heads = 2,
                         .q_tokens = LONG / 2 + 2 * k->block,
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
            for (size_t p = 0, other = 1 + i % 3; p < sizeof largest / sizeof *largest; p++) {
                if (QUICK && p && p != other)
                    continue;
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

/* Every pattern that a state can carry, another dilation for each head among them. */
TEST_LIST(pieces_of_patterns, WITH_PATTERN)
{
    oracle_random random = {9};
    for (int i = 0; i < (QUICK ? 6 : 24); i++) {
        shape s = {.heads = 4, .kv_heads = 2, .norm = 3, .seed = (uint64_t)i};
        kit t;
        call c;
        s.q_tokens = 1 + below(&random, i % 2 ? 60 : 6 * k->block);
        t = kit_make(k, STATE_PARTS & (int)below(&random, 256), s.heads, s.q_tokens, &random);
        s.pattern = &t.p;
        c = call_make(k, s);
        call_reference(&c, 0);
        call_state(&c);
        EACH_WAY(k, w)
        {
            for (int p = 0; p < 3; p++) {
                const int64_t largest[] = {2 * k->block, 9, 1};
                call_state(&c);
                call_blank(&c);
                run_in_pieces(&c, w, &random, largest[p]);
                CHECK(call_error(&c, 0) <= tolerance(10),
                      "%s case %d, %d tokens, window %d, %d globals, flags %d, pieces up to %d: error %.3g", w.name, i,
                      (int)s.q_tokens, (int)t.p.window, (int)t.p.globals, (int)t.p.flags, (int)largest[p],
                      call_error(&c, 0));
                CHECK(call_intact(&c) && kit_intact(&t), "%s: wrote beside its rows", w.name);
            }
        }
        call_free(&c);
        kit_free(&t);
    }
}

/* Token by token, every token through decode. */
TEST_LIST(decode, WITH_STATE)
{
    const int64_t n = LONG / 2 + 2 * k->block;
    const shape s = {.heads = 4, .kv_heads = 2, .q_tokens = n, .kind = ORACLE_MIXED, .norm = 10, .seed = 3};
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
TEST_LIST(absorb, WITH_STATE)
{
    const int64_t n = 100 + 2 * k->block;
    const shape s = {.heads = 2, .q_tokens = n + 20, .norm = 5, .seed = 6};
    call c = call_make(k, s);
    call_reference(&c, 0);
    call_state(&c);
    EACH_WAY(k, w)
    {
        nf_args a = c.a;
        call_state(&c);
        call_blank(&c);
        a.q_tokens = 0;
        a.kv_tokens = n;
        a.q.data = NULL;
        a.out.data = NULL;
        a.lse = NULL;
        CHECK(w.forward(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
        CHECK(state_unit(&c.state, 1)->tokens == n, "%s: token count", w.name);
        CHECK(run_range(&c, w.forward, n, n + 20) == NF_OK, "%s", w.name);
        CHECK(call_error(&c, n) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, n));
    }
    call_free(&c);
}

/* A chunk that asks for its last queries only: the keys before them are taken in all the same. */
TEST_LIST(fewer_queries, WITH_STATE)
{
    const int64_t first = 2 * k->block + 13, ends[] = {first + 9, first + 70 + k->block};
    for (int i = 0; i < (k->features && k->block ? 4 : 2); i++) {
        const nf_pattern p = {.window = i % 2 ? 0 : k->block + 5, .globals = 2, .flags = i / 2 ? NF_FAR_EXACT : 0};
        const shape s = {.heads = 2, .q_tokens = ends[1], .norm = 5, .seed = 6, .pattern = &p};
        call c = call_make(k, s);
        call_reference(&c, 0);
        call_state(&c);
        EACH_WAY(k, w)
        {
            call_state(&c);
            call_blank(&c);
            CHECK(run_range(&c, w.forward, 0, first) == NF_OK, "%s", w.name);
            for (int j = 0; j < 2; j++) {
                const int64_t from = j ? ends[0] : first, n = ends[j] - from;
                nf_args a = c.a;
                double error;
                a.q_tokens = 3;
                a.kv_tokens = n;
                a.q.data = row_at(a.q, 0, ends[j] - 3, 0);
                a.k.data = row_at(a.k, 0, from, 0);
                a.v.data = row_at(a.v, 0, from, 0);
                a.out.data = row_at(out_tensor(&a), 0, ends[j] - 3, 0);
                a.lse = NULL;
                CHECK(w.forward(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
                error = 0;
                for (int64_t t = ends[j] - 3; t < ends[j]; t++)
                    for (int64_t x = 0; x < 2 * k->dim; x++) {
                        const int64_t h = x / k->dim, d = x % k->dim;
                        const int64_t row = h * ends[1] + t;
                        error =
                            larger(error, fabs((double)row_at(out_tensor(&c.a), 0, t, h)[d] - c.ref[row * k->dim + d]) /
                                              row_scale(&c, row));
                    }
                CHECK(error <= tolerance(10), "%s case %d, up to token %d: error %.3g", w.name, i, (int)ends[j], error);
            }
        }
        call_free(&c);
    }
}

/* With a state, the full mask sees every key of the state and of the call. */
#define UNORDERED(X, y) FAVORS(X, y) LINEARS(X, y)
TEST_LIST(full_with_state, UNORDERED)
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

/* The call without its keys and values: over a state alone. */
static nf_args alone(nf_args a)
{
    a.flags |= NF_NO_KEYS;
    a.kv_tokens = 0;
    a.k.data = a.v.data = NULL;
    return a;
}

/* Whole pages, to be read only or written again. */
static void protect(void *at, size_t bytes, int how)
{
#if defined(DEVICE) /* brings back what it has read, too */
    (void)at, (void)bytes, (void)how;
#else
    CHECK(mprotect(at, bytes, how) == 0, "mprotect");
#endif
}

/* Queries after a state: by forward the bits of a forward that had its keys too, by decode its rows; under either mask,
 * in any split. The state is only read: it may lie where nobody can write. */
static void check_alone(call *c, way w)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t pages;
    block out = block_make(c->out.bytes, 0), lse = block_make(c->lse.bytes, 0);
    void *kept = NULL;
    nf_args a;
    call_state(c);
    CHECK(call_run(c, w.forward) == NF_OK, "%s", w.name);
    memcpy(out.data, c->out.data, out.bytes), memcpy(lse.data, c->lse.data, lse.bytes);
    pages = (c->state.bytes + page - 1) / page * page;
    CHECK(posix_memalign(&kept, page, pages) == 0, "memory");
    memcpy(kept, c->state.data, c->state.bytes);
    simt_memory(kept, c->state.bytes);
    protect(kept, pages, PROT_READ);
    a = alone(c->a);
    a.state = kept;
    for (int full = 0; full < 2; full++) {
        a.mask = full ? NF_FULL : NF_CAUSAL;
        call_blank(c);
        for (a.split_begin = 1; a.split_begin >= 0; a.split_begin--) {
            a.split_count = a.split_begin ? 0 : 1;
            CHECK(w.forward(&a, c->workspace.data, c->bytes) == NF_OK, "%s", w.name);
        }
        a.split_begin = a.split_count = 0;
        CHECK(memcmp(out.data, c->out.data, out.bytes) == 0 && memcmp(lse.data, c->lse.data, lse.bytes) == 0,
              "%s: not the bits of a forward with the keys", w.name);
        call_blank(c);
        CHECK(w.decode(&a, c->workspace.data, c->bytes) == NF_OK, "%s", w.name);
        CHECK(c->a.flags || call_error(c, 0) <= tolerance(10), "%s decode: error %.3g", w.name, call_error(c, 0));
        CHECK(memcmp(kept, c->state.data, c->state.bytes) == 0, "%s: the state has changed", w.name);
    }
    CHECK(call_intact(c), "%s: wrote beside its rows", w.name);
    protect(kept, pages, PROT_READ | PROT_WRITE);
    simt_forget(kept);
    free(kept);
    block_free(&out), block_free(&lse);
}

TEST_LIST(queries_alone, UNORDERED)
{
    static const int32_t borders[] = {0, 9, 9, 64, 65, 100};
    shape s;
    for (int i = 0, more = 1; more; i++) {
        call c;
        more = layout_at(k, i, &s);
        if (!more)
            s = (shape){.heads = 4, .kv_heads = 2, .q_tokens = 100, .norm = 5, .cu_tokens = borders, .sequences = 5};
        s.full = 1;
        c = call_make(k, s);
        call_reference(&c, 0);
        EACH_WAY(k, w)
        {
            for (c.a.flags = 0; c.a.flags <= (k->map ? NF_UNNORMALISED : 0); c.a.flags++) {
                check_alone(&c, w);
                CHECK(c.a.flags || call_error(&c, 0) <= tolerance(10), "%s layout %d: error %.3g", w.name, i,
                      call_error(&c, 0));
            }
        }
        call_free(&c);
    }
}

/* Nothing to attend to: rows of 0, lse -inf (linear: the sum, 0). */
TEST_LIST(queries_of_nothing, UNORDERED)
{
    const shape s = {.heads = 4, .kv_heads = 2, .q_tokens = 41, .full = 1, .norm = 5};
    call c = call_make(k, s);
    EACH_WAY(k, w)
    {
        for (int decode = 0; decode < 2; decode++) {
            nf_args a;
            call_state(&c);
            call_blank(&c);
            a = alone(c.a);
            CHECK((decode ? w.decode : w.forward)(&a, c.workspace.data, c.bytes) == NF_OK, "%s", w.name);
            for (int64_t i = 0; i < s.heads * s.q_tokens; i++) {
                CHECK(c.a.lse[i] == (k->map ? 0 : -INFINITY), "%s: lse %d is %g", w.name, (int)i, (double)c.a.lse[i]);
                for (int d = 0; d < k->dim; d++)
                    CHECK(row_at(out_tensor(&c.a), 0, i % s.q_tokens, i / s.q_tokens)[d] == 0, "%s: row %d", w.name,
                          (int)i);
            }
        }
    }
    call_free(&c);
}

/* ---- states are bytes ----------------------------------------------------------------------------------------------
 */

/* A state may be stored, moved and taken up by another variant; its size does not depend on the length. */
TEST_LIST(serialised, WITH_STATE)
{
    const int64_t n = 61 + 2 * k->block;
    const shape s = {.heads = 2, .q_tokens = n + 39, .norm = 5, .seed = 6};
    call c = call_make(k, s);
    nf_args longer = c.a;
    block stored;
    const nf_pattern *p = c.a.pattern;
    const size_t window = k->block ? (size_t)p->window : 0, ring = k->features ? (size_t)2 * (size_t)k->block : window;
    const size_t unit = (size_t)(k->far * (k->dim + 2)) + 2 * (k->block ? 3 + ring : 0) * (size_t)k->dim;
    CHECK(k->state_bytes(&c.a) == sizeof(nf_state_head) + 2 * (sizeof(nf_state_unit) + unit * sizeof(float)),
          "%d bytes are not what core.h says", (int)k->state_bytes(&c.a));
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
        CHECK(run_range(&c, k->forward, 0, n) == NF_OK, "%s", w.name);
        memcpy(stored.data, c.state.data, stored.bytes);
        memset(c.state.data, BLANK, c.state.bytes);
        c.a.state = stored.data;
        call_blank(&c);
        CHECK(run_range(&c, w.forward, n, n + 39) == NF_OK, "%s: a moved state is not taken", w.name);
        CHECK(call_error(&c, n) <= tolerance(10), "%s: error %.3g", w.name, call_error(&c, n));
    }
    block_free(&stored);
    call_free(&c);
}

/* What a state holds after tokens that came by forward, the last by decode: one whole reference for all features, and
 * their sums within tol of the mass. */
static void plain_layout(const kernel *k, way w, double norm, double tol)
{
    const shape s = {.q_tokens = 64, .norm = norm, .kind = ORACLE_MIXED, .seed = 6};
    const int m = k->features, trig = map_of(k) == ORACLE_TRIG;
    call c = call_make(k, s);
    const oracle_head o = head_at(&c, 0, 0, 0, s.q_tokens);
    double *l = oracle_doubles((size_t)m + 1), *sums = oracle_doubles((size_t)m + 1);
    for (int64_t n = 1; n <= 64; n += 21) {
        const nf_state_unit *unit;
        const float *r;
        call_state(&c);
        unit = state_unit(&c.state, 0), r = (const float *)(const void *)(unit + 1);
        CHECK(r[0] == -1e30f && r[m - 1] == -1e30f && r[m] == 0 && unit->mass == 0,
              "an empty feature is (0, 0, -1e30)");
        memset(sums, 0, ((size_t)m + 1) * sizeof *sums);
        for (int64_t j = 0; j < n; j++) {
            oracle_key_features(&o, j, l);
            for (int i = 0; i <= m; i++)
                sums[i] += (i < m ? l[i] : 1) * exp(l[m]);
        }
        CHECK(run_range(&c, w.forward, 0, n - 1) == NF_OK && run_range(&c, w.decode, n - 1, n) == NF_OK, "%s", w.name);
        CHECK(trig ? fabs((double)unit->mass * exp2((double)r[0]) / sums[m] - 1) < tol : unit->mass == 0,
              "%s, %d tokens: the mass is %g, not %g", w.name, (int)n, (double)unit->mass * exp2((double)r[0]),
              sums[m]);
        for (int i = 0; i < m; i++) {
            CHECK(r[i] == rintf(r[i]) && r[i] == r[0] && (trig || r[i] == 0), "%s: R = %g", w.name, (double)r[i]);
            CHECK(fabs((double)r[m + i] * exp2((double)r[i]) - sums[i]) <= tol * fmax(sums[m], sums[i]),
                  "%s, %d tokens: feature %d holds %g, not %g", w.name, (int)n, i,
                  (double)r[m + i] * exp2((double)r[i]), sums[i]);
        }
    }
    free(l);
    free(sums);
    call_free(&c);
}

/* References are whole numbers (so that rescaling by them is exact), -1e30 while empty, and hold what core.h says: of
 * the hybrid the blocks before (P - 1) / B - w, but no global. */
static void far_layout_of_exponentials(const kernel *k)
{
    const int64_t lengths[] = {1, 60, 2 * k->block + 1, 3 * k->block, 3 * k->block + 1, 4 * k->block + 7};
    const shape s = {.q_tokens = 60 + 4 * k->block, .norm = 20, .kind = ORACLE_MIXED, .seed = 6};
    call c = call_make(k, s);
    const oracle_head o = head_at(&c, 0, 0, 0, s.q_tokens);
    double *l = oracle_doubles((size_t)k->features + 1), *sums = oracle_doubles((size_t)k->features);
    for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) {
        const int64_t whole = k->block ? (lengths[n] - 1) / k->block - 1 : 0,
                      end = k->block ? whole * k->block : lengths[n];
        const float *r;
        call_state(&c);
        r = (const float *)(const void *)(state_unit(&c.state, 0) + 1);
        for (int i = 0; i < k->features; i++) {
            CHECK(r[i] == -1e30f && r[k->features + i] == 0, "an empty feature is (0, 0, -1e30)");
            sums[i] = -INFINITY;
        }
        for (int64_t j = 0; j < end; j++) {
            oracle_key_features(&o, j, l);
            for (int i = 0; i < k->features && !(k->block && j < 3); i++)
                sums[i] = fmax(sums[i], l[i]) + log1p(exp(-fabs(sums[i] - l[i])));
        }
        CHECK(run_range(&c, k->forward, 0, lengths[n]) == NF_OK, "forward");
        for (int i = 0; i < k->features; i++) {
            const double held = log(2) * (double)r[i] + log((double)r[k->features + i]);
            if (sums[i] == -INFINITY) {
                CHECK(r[i] == -1e30f && r[k->features + i] == 0, "%d tokens: a far field too early", (int)lengths[n]);
                continue;
            }
            CHECK(r[i] == rintf(r[i]) && fabsf(r[i]) < 1e6f, "R = %g is no whole number", (double)r[i]);
            CHECK(fabs(held - sums[i]) <= 1e-4 * fmax(1, fabs(sums[i])), "%d tokens: feature %d holds %g, not %g",
                  (int)lengths[n], i, held, sums[i]);
        }
    }
    free(l);
    free(sums);
    call_free(&c);
}

TEST_LIST(far_layout, WITH_FEATURES)
{
    if (map_of(k) == ORACLE_TRIG || map_of(k) == ORACLE_RELU) {
        EACH_WAY(k, w)
        {
            plain_layout(k, w, 1, 5e-6);
            plain_layout(k, w, 20, 1e-4);
        }
    } else {
        far_layout_of_exponentials(k);
    }
}

/* The near field: the globals in order, then a ring of the tokens last seen, to the bit. */
TEST_LIST(near_layout, WITH_PATTERN)
{
    const nf_pattern p = {.window = k->block + 3, .globals = 5};
    const int64_t ring = k->features ? 3 * k->block : p.window, dim = k->dim;
    const shape s = {.q_tokens = 5 * k->block + 3, .norm = 3, .pattern = &p};
    call c = call_make(k, s);
    EACH_WAY(k, w)
    {
        for (int64_t n = 1; n <= s.q_tokens; n += 1 + n / 2) {
            const float *near;
            call_state(&c);
            CHECK(run_range(&c, w.forward, 0, n / 2) == NF_OK && run_range(&c, w.forward, n / 2, n) == NF_OK, "%s",
                  w.name);
            near = near_field(k, state_unit(&c.state, 0));
            for (int64_t t = 0; t < n; t++) {
                const int64_t row = t < 5 ? t : 5 + t % ring;
                if (t >= 5 && t < n - ring)
                    continue;
                CHECK(memcmp(near + row * dim, row_at(c.a.k, 0, t, 0), (size_t)dim * sizeof(float)) == 0 &&
                          memcmp(near + (5 + ring + row) * dim, row_at(c.a.v, 0, t, 0), (size_t)dim * sizeof(float)) ==
                              0,
                      "%s: %d tokens, row %d does not hold token %d", w.name, (int)n, (int)row, (int)t);
            }
        }
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
        const int64_t n = i == segments - 1 ? c->a.q_tokens - at : 1 + below(random, left);
        call_state(c);
        CHECK(run_range(c, c->k->forward, at, at + n) == NF_OK, "segment");
        part[i] = block_make(c->state.bytes, 0);
        memcpy(part[i].data, c->state.data, c->state.bytes);
        at += n;
    }
    for (int left = segments; left > 1; left--) {
        const int64_t a = below(random, left), b = (a + 1 + below(random, left - 1)) % left;
        const int64_t into = below(random, 3); /* a third buffer, the first, the second */
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

TEST_LIST(merge_trees, UNORDERED)
{
    static const double norms[] = {3, 10, 40};
    for (size_t i = 0; i < 3; i++) {
        const shape s = {
            .heads = 2, .q_tokens = LONG, .kind = ORACLE_MIXED, .norm = norms[i], .seed = 20 + i, .steady = 1};
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
TEST_LIST(merge_identity, UNORDERED)
{
    const shape s = {.heads = 2, .q_tokens = 100, .kind = ORACLE_MIXED, .norm = 10, .seed = 6, .steady = 1};
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
    CHECK(k->map == ORACLE_SOFTMAXQK || call_error(&c, 80) <= tolerance(10), "after a merge: error %.3g",
          call_error(&c, 80)); /* whose earlier queries see the later keys, too */
    block_free(&empty);
    block_free(&some);
    block_free(&both);
    block_free(&first);
    call_free(&c);
}

/* Sparse states follow one another: a, then b, goes on as the whole stream would, whichever is written over. */
TEST_LIST(merge_in_order, SPARSES)
{
    oracle_random random = {5};
    for (int i = 0; i < (QUICK ? 24 : 60); i++) {
        shape s = {.heads = 4, .kv_heads = 2, .q_tokens = 3 * k->block + 40, .norm = 3, .seed = (uint64_t)i};
        const int64_t first = below(&random, i % 2 ? 8 : s.q_tokens / 2);
        const int64_t second = first + below(&random, i % 3 ? s.q_tokens / 2 : 8);
        const int parts = (i % 4 ? GLOBALS : 0) | (i % 5 ? WINDOW : 0) | (i % 2 ? DILATION : 0);
        kit t = kit_make(k, STATE_PARTS & parts, 4, s.q_tokens, &random);
        block a, out;
        call c;
        s.pattern = &t.p;
        c = call_make(k, s);
        call_reference(&c, 0);
        call_state(&c);
        a = block_make(c.state.bytes, 0), out = block_make(c.state.bytes, 0);
        CHECK(run_range(&c, k->forward, 0, first) == NF_OK, "first");
        memcpy(a.data, c.state.data, a.bytes);
        call_state(&c);
        CHECK(run_range(&c, k->forward, first, second) == NF_OK, "second");
        {
            void *const dst[] = {out.data, a.data, c.state.data};
            CHECK(k->state_merge(dst[i % 3], a.data, c.state.data) == NF_OK, "merge");
            c.a.state = dst[i % 3];
        }
        CHECK(run_range(&c, k->forward, second, s.q_tokens) == NF_OK, "rest");
        CHECK(call_error(&c, second) <= tolerance(10), "case %d, %d + %d tokens, window %d, %d globals: error %.3g", i,
              (int)first, (int)(second - first), (int)t.p.window, (int)t.p.globals, call_error(&c, second));
        CHECK(block_intact(&a) && block_intact(&out) && call_intact(&c), "wrote beside a state");
        block_free(&a), block_free(&out);
        call_free(&c);
        kit_free(&t);
    }
}

/* With decay, states follow one another: a merged state goes on as the whole stream would, and how three were put
 * together does not matter. */
TEST_LIST(merge_decaying, CAUSAL_LINEARS)
{
    oracle_random random = {5};
    for (int i = 0; i < (QUICK ? 4 : 12); i++) {
        const shape s = {.heads = 8, .kv_heads = 4, .q_tokens = 200, .norm = 3, .seed = (uint64_t)i};
        const int64_t cut[] = {0, 1 + below(&random, 60), 61 + below(&random, 60), 130};
        block part[3], left, right;
        call c = call_make(k, s);
        call_reference(&c, 0);
        for (int n = 0; n < 3; n++) {
            call_state(&c);
            CHECK(run_range(&c, k->forward, cut[n], cut[n + 1]) == NF_OK, "part %d", n);
            part[n] = block_make(c.state.bytes, 0);
            memcpy(part[n].data, c.state.data, c.state.bytes);
        }
        left = block_make(c.state.bytes, 0), right = block_make(c.state.bytes, 0);
        CHECK(k->state_merge(left.data, part[0].data, part[1].data) == NF_OK, "merge");
        CHECK(k->state_merge(left.data, left.data, part[2].data) == NF_OK, "merge");
        CHECK(k->state_merge(right.data, part[1].data, part[2].data) == NF_OK, "merge");
        CHECK(k->state_merge(right.data, part[0].data, right.data) == NF_OK, "merge");
        CHECK(state_difference(&c, &left, &right) <= tolerance(10), "grouping: %.3g",
              state_difference(&c, &left, &right));
        c.a.state = i % 2 ? left.data : right.data;
        CHECK(run_range(&c, k->forward, cut[3], s.q_tokens) == NF_OK, "rest");
        CHECK(call_error(&c, cut[3]) <= tolerance(10), "cut at %d and %d: error %.3g", (int)cut[1], (int)cut[2],
              call_error(&c, cut[3]));
        for (int n = 0; n < 3; n++)
            block_free(&part[n]);
        block_free(&left), block_free(&right);
        call_free(&c);
    }
}

/* Near fields with a far field behind them do not follow one another. */
TEST_LIST(no_merge, HYBRIDS)
{
    const shape s = {.q_tokens = 40, .norm = 3};
    call c = call_make(k, s);
    block before;
    call_state(&c);
    before = block_make(c.state.bytes, 0);
    memcpy(before.data, c.state.data, before.bytes);
    CHECK(k->state_merge(c.state.data, c.state.data, c.state.data) == NF_E_STATE, "merge");
    CHECK(memcmp(before.data, c.state.data, before.bytes) == 0, "a refused merge wrote");
    block_free(&before);
    call_free(&c);
}

/* ---- decode without a state ----------------------------------------------------------------------------------------
 */

/* Exact and sparse decode: a few new queries against all cached keys. */
TEST_LIST(exact_decode, WITHOUT_FEATURES)
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
