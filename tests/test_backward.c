/* The gradients of every operator against the dense fp64 oracle (whose own gradients check_oracle.c holds against
 * finite differences), and the promises that they share with the forward. */
#include "check.h"
#include "patterns.h"

/* A backward call: the forward's, what comes back, and what goes out. */
typedef struct reverse {
    call c;
    nf_args a; /* the call's without out and lse, which a backward does not look at */
    nf_grads g;
    block dout, dlse, dq, dk, dv;
    double *rq, *rk, *rv; /* references, as [batch, heads, tokens, dim] */
} reverse;

static nf_output written(nf_input t)
{
    return (nf_output){(void *)(uintptr_t)t.data, t.batch_stride, t.token_stride, t.head_stride};
}

static nf_input readable(nf_output t)
{
    return (nf_input){t.data, t.batch_stride, t.token_stride, t.head_stride};
}

static reverse reverse_make(const kernel *k, shape s)
{
    reverse r;
    nf_input t;
    oracle_random random = {s.seed + 77};
    const nf_args *a = &r.c.a;
    memset(&r, 0, sizeof r);
    r.c = call_make(k, s);
    r.dout = tensor_make(&r.g.dout, a->batch, a->q_tokens, a->heads, k->dim, s.odd ? 9 : 0);
    r.dq = tensor_make(&t, a->batch, a->q_tokens, a->heads, k->dim, s.odd ? 3 : 0), r.g.dq = written(t);
    r.dk = tensor_make(&t, a->batch, kv_tokens(a), kv_heads(a), k->dim, s.odd ? 5 : 0), r.g.dk = written(t);
    r.dv = tensor_make(&t, a->batch, kv_tokens(a), kv_heads(a), k->dim, s.odd ? 1 : 0), r.g.dv = written(t);
    r.dlse = block_make(r.c.lse.bytes, 0);
    for (int64_t n = 0; n < a->batch * a->heads * a->q_tokens; n++) {
        const int64_t i = n % a->q_tokens, h = n / a->q_tokens % a->heads, b = n / a->q_tokens / a->heads;
        oracle_vector(&random, row_at(r.g.dout, b, i, h), k->dim, -sqrt((double)k->dim));
        ((float *)(void *)r.dlse.data)[n] = (float)oracle_normal(&random);
        if (k->map) /* whose lse is a sum, not its logarithm */
            ((float *)(void *)r.dlse.data)[n] /= (float)(1 + kv_tokens(a) * k->dim);
    }
    r.g.out = out_tensor(a);
    r.g.lse = a->lse;
    r.g.dlse = (const float *)(const void *)r.dlse.data;
    return r;
}

static void reverse_free(reverse *r)
{
    block *const all[] = {&r->dout, &r->dlse, &r->dq, &r->dk, &r->dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        block_free(all[i]);
    free(r->rq), free(r->rk), free(r->rv);
    call_free(&r->c);
}

/* The backward alone, its output and workspace NaN before. */
static nf_status back(reverse *r, way w)
{
    memset(r->dq.data, BLANK, r->dq.bytes);
    memset(r->dk.data, BLANK, r->dk.bytes);
    memset(r->dv.data, BLANK, r->dv.bytes);
    memset(r->c.workspace.data, BLANK, r->c.bytes);
    r->a = r->c.a;
    memset(&r->a.out, 0, sizeof r->a.out);
    r->a.lse = NULL;
    return w.backward(&r->a, &r->g, r->c.workspace.data, r->c.bytes);
}

static nf_status forth_and_back(reverse *r, way w)
{
    const nf_status s = call_run(&r->c, w.forward);
    return s == NF_OK ? back(r, w) : s;
}

static int reverse_intact(const reverse *r)
{
    const nf_args *a = &r->c.a;
    const int dim = r->c.k->dim;
    return call_intact(&r->c) && block_intact(&r->dout) && block_intact(&r->dlse) && block_intact(&r->dq) &&
           block_intact(&r->dk) && block_intact(&r->dv) &&
           gaps_blank(&r->dq, readable(r->g.dq), a->batch, a->q_tokens, a->heads, dim) &&
           gaps_blank(&r->dk, readable(r->g.dk), a->batch, kv_tokens(a), kv_heads(a), dim) &&
           gaps_blank(&r->dv, readable(r->g.dv), a->batch, kv_tokens(a), kv_heads(a), dim);
}

/* ---- reference and error -------------------------------------------------------------------------------------------
 */

static void reverse_reference(reverse *r)
{
    const nf_args *a = &r->c.a;
    const int dim = r->c.k->dim;
    const int64_t group = a->heads / kv_heads(a), n = a->q_tokens, m = kv_tokens(a);
    const int32_t whole[2] = {0, (int32_t)n};
    const int32_t *cu = a->cu_tokens ? a->cu_tokens : whole;
    free(r->rq), free(r->rk), free(r->rv);
    r->rq = oracle_doubles((size_t)(a->batch * a->heads * n * dim));
    r->rk = oracle_doubles((size_t)(a->batch * kv_heads(a) * m * dim));
    r->rv = oracle_doubles((size_t)(a->batch * kv_heads(a) * m * dim));
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t s = 0; s < (a->cu_tokens ? a->sequences : 1); s++) {
                const int64_t row = (b * a->heads + h) * n + cu[s];
                const int64_t key = (b * kv_heads(a) + h / group) * m + (a->cu_tokens ? cu[s] : 0);
                const oracle_head o = head_at(&r->c, b, h, cu[s], cu[s + 1] - cu[s]);
                const oracle_loss loss = {row_at(r->g.dout, b, cu[s], h),
                                          r->g.dlse ? r->g.dlse + row : NULL,
                                          r->g.dout.token_stride,
                                          r->rq + row * dim,
                                          r->rk + key * dim,
                                          r->rv + key * dim};
                oracle_backward(&o, &loss);
            }
}

/* The longest row of a tensor. */
static double longest(nf_input t, int64_t batch, int64_t tokens, int64_t heads, int dim)
{
    double most = 0;
    for (int64_t n = 0; n < batch * tokens * heads; n++) {
        const float *x = row_at(t, n / tokens / heads, n % tokens, n / tokens % heads);
        double sum = 0;
        for (int d = 0; d < dim; d++)
            sum += (double)x[d] * (double)x[d];
        most = fmax(most, sqrt(sum));
    }
    return most;
}

/* The largest |dx - ref| of a row, relative to the longest row of ref, or to a hundredth of `terms` where that is more:
 * where the sum cancels, what is left has the rounding of its terms. */
static double gradient_error(nf_input t, const double *ref, int64_t batch, int64_t tokens, int64_t heads, int dim,
                             double terms)
{
    double worst = 0, size = terms / 100;
    for (int64_t n = 0; n < batch * heads * tokens; n++) {
        const float *x = row_at(t, n / tokens / heads, n % tokens, n / tokens % heads);
        double sum = 0, length = 0;
        for (int d = 0; d < dim; d++) {
            sum += pow((double)x[d] - ref[n * dim + d], 2);
            length += pow(ref[n * dim + d], 2);
        }
        worst = larger(worst, sqrt(sum));
        size = fmax(size, sqrt(length));
    }
    return worst > 0 ? worst / size : 0;
}

/* linear: the size of a term of dq or dk, dout . v / sum_j A_ij times what A_ij changes by with the other point. */
static double linear_terms(const reverse *r, double dout_v, double q, double k)
{
    const nf_args *a = &r->c.a;
    const oracle_head o = head_at(&r->c, 0, 0, 0, a->q_tokens);
    const double scale = oracle_scale(&o), point = fmax(q, k) + (o.map == ORACLE_ELU ? sqrt((double)o.dim) : 0);
    double least = INFINITY;
    for (int64_t n = 0; n < a->batch * a->heads * a->q_tokens; n++)
        least = r->g.lse[n] > 0 ? fmin(least, (double)r->g.lse[n]) : least;
    return o.map == ORACLE_SOFTMAXQK
               ? dout_v
               : dout_v / least * scale * point * (o.map == ORACLE_TAYLOR2 ? 1 + scale * q * k : 1);
}

/* The worst of dq, dk and dv. The terms of dq are dout . v times scale k, through features scale (w + q'). */
static double reverse_error(const reverse *r)
{
    const nf_args *a = &r->c.a;
    const int dim = r->c.k->dim;
    const int64_t n = a->q_tokens, m = kv_tokens(a);
    const double s = sqrt(a->scale > 0 ? (double)a->scale : 1 / sqrt((double)dim));
    const double q = longest(a->q, a->batch, n, a->heads, dim), k = longest(a->k, a->batch, m, kv_heads(a), dim);
    const double dout = longest(r->g.dout, a->batch, n, a->heads, dim);
    const double dout_v = dout * longest(a->v, a->batch, m, kv_heads(a), dim);
    const double terms = r->c.k->map ? linear_terms(r, dout_v, q, k)
                                     : dout_v * s * (s * fmax(q, k) + (r->c.k->features ? sqrt((double)dim) : 0));
    const double dq = gradient_error(readable(r->g.dq), r->rq, a->batch, n, a->heads, dim, terms);
    const double dk = gradient_error(readable(r->g.dk), r->rk, a->batch, m, kv_heads(a), dim, terms);
    const double dv = gradient_error(readable(r->g.dv), r->rv, a->batch, m, kv_heads(a), dim, dout);
#ifdef MEASURE
    printf("    dq %.2g dk %.2g dv %.2g\n", dq, dk, dv);
#endif
    return larger(larger(dq, dk), dv);
}

/* Twice the forward's bound up to |k'| = 10. Beyond, the weights e^(l - lse) come from floats that are themselves
 * rounded: at 40 a logit of 1600, 2300 in log2 units, to 8e-5, its lse to 6e-5 and to 8e-5 once more in log2 units. */
static double bound(double norm)
{
    return norm <= 10 ? 2e-5 : norm <= 20 ? 1e-4 : 2.4e-4;
}

static void agree(reverse *r, double norm, const char *what)
{
    reverse_reference(r);
    EACH_WAY(r->c.k, w)
    {
        if (w.backward) {
            const nf_status s = forth_and_back(r, w);
            double error;
            CHECK(s == NF_OK, "%s %s: %s", w.name, what, nf_status_text(s));
            error = reverse_error(r);
            CHECK(error <= bound(norm), "%s %s, %d queries, %d keys: error %.3g > %.3g", w.name, what,
                  (int)r->c.a.q_tokens, (int)kv_tokens(&r->c.a), error, bound(norm));
            CHECK(reverse_intact(r), "%s %s: wrote beside its rows", w.name, what);
        }
    }
}

static void agree_shape(const kernel *k, shape s, double norm, const char *what)
{
    if (map_of(k) == ORACLE_TRIG) /* where its sums do not cancel */
        s.norm = fmin(s.norm, 0.3);
    if (s.kind == ORACLE_INTEGER && (map_of(k) == ORACLE_TRIG || map_of(k) == ORACLE_RELU)) /* long; on relu's kink */
        s.kind = ORACLE_GAUSS;
    if (takes(k, s)) {
        reverse r = reverse_make(k, s);
        agree(&r, norm, what);
        reverse_free(&r);
    }
}

/* ---- agreement -----------------------------------------------------------------------------------------------------
 */

/* The build says which operators have no backward; all others have one in every variant. */
TEST_EACH(present)
{
    EACH_WAY(k, w)
    {
        CHECK(!w.backward == !k->backward, "%s has %s backward", w.name, w.backward ? "a" : "no");
    }
}

TEST_EACH(inputs)
{
    static const double norms[] = {1, 10, 20, 40};
    for (int kind = 0; kind < ORACLE_KINDS; kind++)
        for (int i = 0; i < (kind == ORACLE_INTEGER ? 1 : 4); i++) {
            const shape s = {
                .q_tokens = (QUICK ? 60 : 140) + 2 * k->block, .kind = (oracle_kind)kind, .norm = norms[i], .seed = 11};
            char what[64];
            snprintf(what, sizeof what, "kind %d norm %g", kind, s.norm);
            agree_shape(k, s, kind == ORACLE_INTEGER ? 10 : s.norm, what);
        }
}

TEST_EACH(lengths)
{
    static const int64_t lengths[] = {0,  1,  2,  15, 16, 17, 31, 32,  33,  47, 48,
                                      49, 63, 64, 65, 95, 96, 97, 129, 193, 300};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths - (QUICK ? 3 : 0); i++) {
        const shape s = {.q_tokens = lengths[i], .norm = 3, .seed = 7 + i};
        agree_shape(k, s, 10, "length");
    }
}

TEST_EACH(layouts)
{
    shape s;
    for (int i = 0; layout_at(k, i, &s); i++) {
        char what[32];
        snprintf(what, sizeof what, "layout %d", i);
        agree_shape(k, s, 10, what);
    }
}

TEST_EACH(packed)
{
    static const int32_t borders[] = {0, 0, 5, 5, 5, 69, 70, 134, 134};
    for (int i = 0; i < 4; i++) {
        const shape s = {.heads = 4,
                         .kv_heads = 2,
                         .q_tokens = 134,
                         .cu_tokens = borders,
                         .sequences = 8,
                         .full = i & 1,
                         .odd = i / 2,
                         .norm = 3,
                         .seed = 5};
        agree_shape(k, s, 10, "packed");
    }
}

/* Every union of the parts of a pattern. */
TEST_LIST(patterns, WITH_PATTERN)
{
    const int alone[] = {WINDOW, WINDOW | DILATION, GLOBALS,   LISTED,
                         BLOCKS, WINDOW | GAIN,     FAR_EXACT, FAR_EXACT | GLOBALS | GAIN};
    const int count = sizeof alone / sizeof *alone;
    oracle_random random = {2};
    for (int i = 0; i < count + (QUICK ? 5 : 25); i++) {
        const int parts = i < count ? alone[i] : (int)below(&random, 256);
        const int64_t n = below(&random, 3) ? 2 * k->block + below(&random, k->block + 9) : 1 + below(&random, 70);
        shape s = {.heads = 4, .kv_heads = 2, .q_tokens = n, .norm = 3, .seed = (uint64_t)i};
        char what[64];
        kit t;
        s.full = !k->features && i % 3 == 0;
        s.odd = i % 2;
        s.kv_tokens = s.full || i % 4 ? 0 : n + below(&random, 2 * k->block);
        t = kit_make(k, parts, s.heads, s.kv_tokens ? s.kv_tokens : n, &random);
        s.pattern = &t.p;
        snprintf(what, sizeof what, "parts %d, case %d%s, window %d, globals %d", parts, i, s.full ? ", full" : "",
                 (int)t.p.window, (int)t.p.globals);
        agree_shape(k, s, 10, what);
        CHECK(kit_intact(&t), "%s: wrote beside a list", what);
        kit_free(&t);
    }
}

/* Where the sums of trig cancel, gradients are of no use, yet finite. */
TEST_LIST(cancelled, FAVORS)
{
    static const double norms[] = {3, 10, 40};
    for (int i = 0; i < 3 && map_of(k) == ORACLE_TRIG; i++) {
        const shape s = {.q_tokens = 150, .norm = norms[i], .kind = ORACLE_MIXED, .seed = 3};
        reverse r = reverse_make(k, s);
        const nf_input all[] = {readable(r.g.dq), readable(r.g.dk), readable(r.g.dv)};
        EACH_WAY(k, w)
        {
            CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
            for (int64_t n = 0; n < 3 * 150 * k->dim; n++)
                CHECK(isfinite(row_at(all[n % 3], 0, n / 3 / k->dim, 0)[n / 3 % k->dim]), "%s: not finite", w.name);
        }
        reverse_free(&r);
    }
}

TEST_LIST(calibrated, WITH_FEATURES)
{
    if (!estimates(k))
        return;
    for (int i = 0; i < 3; i++) {
        const int64_t n = 2 * k->block + 75;
        const double norm = map_of(k) == ORACLE_TRIG ? 0.3 : 4;
        const shape s = {.heads = 2, .kv_heads = 1, .q_tokens = n, .norm = norm, .seed = 30 + (uint64_t)i};
        nf_calibration from = {.tau = i == 1 ? 0.6f : 0, .q_tokens = n, .k_tokens = n, .flags = i ? optimal(k) : 0};
        oracle_calibration definition;
        reverse r = reverse_make(k, s);
        for (int64_t j = 0; j < n; j++) /* something to centre */
            row_at(r.c.a.k, 0, j, 0)[0] += 3, row_at(r.c.a.q, 0, j, 0)[1] -= 2;
        from.q = row_at(r.c.a.q, 0, 0, 0), from.k = row_at(r.c.a.k, 0, 0, 0);
        from.q_stride = r.c.a.q.token_stride;
        definition = oracle_calibrate(from.q, n, from.q_stride, from.k, n, 0, k->dim, (double)from.tau, from.flags);
        call_project(&r.c, 3, &from);
        r.c.calibration = &definition;
        agree(&r, 10, "calibrated");
        oracle_calibration_free(&definition);
        reverse_free(&r);
    }
}

/* Queries that see nothing, keys that nobody sees: zeros. */
TEST_LIST(empty_rows, SPARSES)
{
    static const int32_t offsets[] = {0, 0, 1, 2, 2}, keys[] = {2, 0};
    const nf_pattern blocks = {.block = k->block,
                               .block_heads = 1,
                               .block_rows = 4,
                               .block_count = 2,
                               .block_offsets = offsets,
                               .block_keys = keys};
    const shape s = {.q_tokens = 3 * k->block + 5, .norm = 3, .pattern = &blocks};
    agree_shape(k, s, 10, "empty rows");
}

/* Keys without queries have no gradient, and that is written. */
TEST_EACH(no_queries)
{
    const shape s = {.heads = 2, .q_tokens = 1, .kv_tokens = 33, .norm = 3};
    reverse r = reverse_make(k, s);
    r.c.a.q_tokens = 0;
    EACH_WAY(k, w)
    {
        if (w.backward) {
            CHECK(back(&r, w) == NF_OK, "%s", w.name);
            CHECK(longest(readable(r.g.dk), 1, 33, 2, k->dim) == 0 && longest(readable(r.g.dv), 1, 33, 2, k->dim) == 0,
                  "%s: keys without queries have a gradient", w.name);
        }
    }
    reverse_free(&r);
}

/* ---- bits ----------------------------------------------------------------------------------------------------------
 */

/* Copies of dq, dk and dv. */
typedef struct result {
    block dq, dk, dv;
} result;

static result result_of(const reverse *r)
{
    result x = {block_make(r->dq.bytes, 0), block_make(r->dk.bytes, 0), block_make(r->dv.bytes, 0)};
    memcpy(x.dq.data, r->dq.data, r->dq.bytes);
    memcpy(x.dk.data, r->dk.data, r->dk.bytes);
    memcpy(x.dv.data, r->dv.data, r->dv.bytes);
    return x;
}

static void result_free(result *x)
{
    block_free(&x->dq), block_free(&x->dk), block_free(&x->dv);
}

static int result_equal(const result *x, const reverse *r)
{
    return memcmp(x->dq.data, r->dq.data, r->dq.bytes) == 0 && memcmp(x->dk.data, r->dk.data, r->dk.bytes) == 0 &&
           memcmp(x->dv.data, r->dv.data, r->dv.bytes) == 0;
}

/* The same bits again, whatever the workspace held, whatever dq, dk, dv held; no dlse is a dlse of zeros. */
TEST_EACH(repeat)
{
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 75 + 2 * k->block, .norm = 6, .odd = 1};
    reverse r = reverse_make(k, s);
    EACH_WAY(k, w)
    {
        if (w.backward) {
            result first;
            memset(r.dlse.data, 0, r.dlse.bytes);
            r.g.dlse = (const float *)(const void *)r.dlse.data;
            CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
            first = result_of(&r);
            memset(r.c.workspace.data, 0xa5, r.c.bytes);
            CHECK(w.backward(&r.a, &r.g, r.c.workspace.data, r.c.bytes) == NF_OK, "%s", w.name);
            CHECK(result_equal(&first, &r), "%s: the second run differs", w.name);
            r.g.dlse = NULL;
            CHECK(back(&r, w) == NF_OK && result_equal(&first, &r), "%s: no dlse is not 0", w.name);
            result_free(&first);
        }
    }
    reverse_free(&r);
}

/* Any cut of the units into calls gives the bits of one call; a call writes its own units only. */
TEST_EACH(splits)
{
    static const int32_t borders[] = {0, 10, 10, 60, 175};
    const shape table[] = {
        {.batch = 3, .heads = 4, .kv_heads = 2, .q_tokens = 41 + 2 * k->block, .norm = 6},
        {.heads = 4, .kv_heads = 2, .q_tokens = 175, .cu_tokens = borders, .sequences = 4, .norm = 6}};
    for (int i = 0; i < 2; i++) {
        reverse r = reverse_make(k, table[i]);
        const int64_t units = i ? 8 : 6;
        EACH_WAY(k, w)
        {
            if (w.backward) {
                result whole;
                CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
                whole = result_of(&r);
                for (int64_t step = 1; step < units; step += 2) {
                    memset(r.dk.data, BLANK, r.dk.bytes);
                    memset(r.dq.data, BLANK, r.dq.bytes);
                    memset(r.dv.data, BLANK, r.dv.bytes);
                    for (int64_t end = units; end > 0; end -= step) { /* last first */
                        r.a.split_begin = end > step ? end - step : 0;
                        r.a.split_count = end - r.a.split_begin;
                        CHECK(w.backward(&r.a, &r.g, r.c.workspace.data, r.c.bytes) == NF_OK, "%s", w.name);
                        CHECK(i || !r.a.split_begin || blank(r.dk.data, (size_t)k->dim * sizeof(float)),
                              "%s: wrote another unit", w.name);
                    }
                    CHECK(result_equal(&whole, &r), "%s: splits of %d units change bits", w.name, (int)step);
                }
                result_free(&whole);
            }
        }
        reverse_free(&r);
    }
}

/* Finite input, finite gradients. */
TEST_EACH(enormous)
{
    static const float sizes[] = {1e3f, 1e5f, 1e6f, 1e10f, 1e18f};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int which = 0; which < 4; which++) { /* q, k, both, a single key */
            const shape s = {.q_tokens = 70 + 2 * k->block, .norm = 1, .seed = 3};
            reverse r = reverse_make(k, s);
            for (int64_t j = 0; j < s.q_tokens; j++)
                for (int d = 0; d < k->dim; d++) {
                    const float sign = row_at(r.c.a.v, 0, j, 0)[d] < 0 ? -1.0f : 1.0f;
                    if (which == 0 || which == 2)
                        row_at(r.c.a.q, 0, j, 0)[d] = sign * sizes[i];
                    if (which == 1 || which == 2 || (which == 3 && j == 40))
                        row_at(r.c.a.k, 0, j, 0)[d] = j % 3 ? -sizes[i] : sign * sizes[i];
                }
            EACH_WAY(k, w)
            {
                if (w.backward) {
                    const int64_t n = s.q_tokens;
                    CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
                    for (int64_t t = 0; t < n * k->dim; t++)
                        CHECK(isfinite(((float *)(void *)r.dq.data)[t]) && isfinite(((float *)(void *)r.dk.data)[t]) &&
                                  isfinite(((float *)(void *)r.dv.data)[t]),
                              "%s: token %d is not finite for %s of %g", w.name, (int)(t / k->dim),
                              ((const char *[]){"q", "k", "q and k", "one key"})[which], (double)sizes[i]);
                }
            }
            reverse_free(&r);
        }
}

/* ---- NaN stays with those who see it -------------------------------------------------------------------------------
 */

static float *poisoned_row(const reverse *r, int which, int64_t t)
{
    const nf_input tensors[] = {r->c.a.q, r->g.dout, r->c.a.k, r->c.a.v};
    return row_at(tensors[which], 0, t, which < 2 ? 1 : 0);
}

/* Query i of head h has NaN in hand: its own, or it sees the key's. */
static int tainted(const reverse *r, int which, int64_t t, int64_t i, int64_t h)
{
    const oracle_head o = head_at(&r->c, 0, h, 0, r->c.a.q_tokens);
    if (which < 2)
        return h == 1 && i == t;
    return h < 2 && oracle_link(&o, i, t) != ORACLE_UNSEEN;
}

static int row_same(const block *old, const block *now, nf_output t, int64_t i, int64_t h, int dim)
{
    const size_t at = (size_t)(h * t.head_stride + i * t.token_stride) * sizeof(float);
    return memcmp(old->data + at, now->data + at, (size_t)dim * sizeof(float)) == 0;
}

static void contained(reverse *r, way w, int which, int64_t t)
{
    const kernel *k = r->c.k;
    const int64_t n = r->c.a.q_tokens;
    float *row = poisoned_row(r, which, t), kept[512];
    result clean;
    CHECK(forth_and_back(r, w) == NF_OK, "%s", w.name);
    clean = result_of(r);
    memcpy(kept, row, (size_t)k->dim * sizeof(float));
    for (int d = 0; d < k->dim; d++)
        row[d] = NAN;
    CHECK(forth_and_back(r, w) == NF_OK, "%s", w.name);
    for (int64_t h = 0; h < 4; h++)
        for (int64_t i = 0; i < n; i++)
            CHECK(tainted(r, which, t, i, h) ? isnan(row_at(readable(r->g.dq), 0, i, h)[0])
                                             : row_same(&clean.dq, &r->dq, r->g.dq, i, h, k->dim),
                  "%s: NaN in %s of token %d, dq of token %d, head %d is %g", w.name,
                  ((const char *[]){"q", "dout", "k", "v"})[which], (int)t, (int)i, (int)h,
                  (double)row_at(readable(r->g.dq), 0, i, h)[0]);
    for (int64_t g = 0; g < 2; g++)
        for (int64_t j = 0; j < n; j++) {
            int seen = 0; /* by a query that has NaN in hand */
            for (int64_t h = 2 * g; h < 2 * g + 2; h++)
                for (int64_t i = 0; i < n; i++) {
                    const oracle_head o = head_at(&r->c, 0, h, 0, n);
                    seen |= tainted(r, which, t, i, h) && oracle_link(&o, i, j) != ORACLE_UNSEEN;
                }
            CHECK(seen || (row_same(&clean.dk, &r->dk, r->g.dk, j, g, k->dim) &&
                           row_same(&clean.dv, &r->dv, r->g.dv, j, g, k->dim)),
                  "%s: NaN in %s of token %d shows in the gradients of key %d, head %d", w.name,
                  ((const char *[]){"q", "dout", "k", "v"})[which], (int)t, (int)j, (int)g);
        }
    memcpy(row, kept, (size_t)k->dim * sizeof(float));
    result_free(&clean);
}

TEST_EACH(poison)
{
    const shape s = {.heads = 4, .kv_heads = 2, .q_tokens = 70 + 2 * k->block, .norm = 3, .seed = 4};
    reverse r = reverse_make(k, s);
    EACH_WAY(k, w)
    {
        const int64_t at[] = {0, 31, 40, 69, 50 + k->block, s.q_tokens - 1};
        for (int which = 0; which < 4 && w.backward; which++)
            for (int i = 0; i < 6; i++)
                contained(&r, w, which, at[i]);
    }
    reverse_free(&r);
}

/* The gradient of a query does not depend, not even in rounding, on what stands behind it. */
TEST_LIST(causal, CAUSALS)
{
    const shape s = {.q_tokens = 100 + 2 * k->block, .norm = 6, .seed = 4};
    EACH_WAY(k, w)
    {
        const int64_t at[] = {1, 32, 50, 96, 50 + 2 * k->block};
        for (int i = 0; i < 5 && w.backward; i++) {
            reverse r = reverse_make(k, s);
            result before;
            CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
            before = result_of(&r);
            for (int64_t j = at[i]; j < s.q_tokens; j++)
                for (int d = 0; d < k->dim; d++) {
                    row_at(r.c.a.k, 0, j, 0)[d] *= i % 2 ? -9 : NAN;
                    row_at(r.c.a.v, 0, j, 0)[d] += 1e6f;
                    row_at(r.g.dout, 0, j, 0)[d] = d % 2 ? -1e3f : 1e3f;
                }
            CHECK(forth_and_back(&r, w) == NF_OK, "%s", w.name);
            for (int64_t j = 0; j < at[i]; j++)
                CHECK(row_same(&before.dq, &r.dq, r.g.dq, j, 0, k->dim), "%s: dq of %d saw %d", w.name, (int)j,
                      (int)at[i]);
            result_free(&before);
            reverse_free(&r);
        }
    }
}
