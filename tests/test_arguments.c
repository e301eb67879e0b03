/* Bad input: every fault has its status, and on any status but NF_OK nothing at all has been written. */
#include "check.h"
#include "call.h"

#include <limits.h>

/* A valid call to be spoilt: 2 batch entries, 4 heads on 2 kv heads, 10 tokens. */
typedef struct victim {
    call c;
    nf_args a;
    int no_args; /* call with NULL */
    void *workspace;
    size_t bytes;
    block other, spare; /* a projection, a state for a call to break */
    int32_t cu[4];
    unsigned char *copy[10]; /* of every block before the call */
} victim;

static block *victim_block(victim *v, int i)
{
    block *const all[] = {&v->c.q,         &v->c.key,        &v->c.v,     &v->c.out, &v->c.lse,
                          &v->c.workspace, &v->c.projection, &v->c.state, &v->other, &v->spare};
    return i < 10 ? all[i] : NULL;
}

static victim victim_make(const kernel *k)
{
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 10, .norm = 2, .seed = 1};
    victim v;
    memset(&v, 0, sizeof v);
    v.c = call_make(k, s);
    if (k->features) {
        call_state(&v.c);
        v.other = block_make(2 * v.c.projection.bytes, 0);
        v.spare = block_make(2 * v.c.state.bytes, 0);
        memcpy(v.other.data, v.c.projection.data, v.c.projection.bytes);
        memcpy(v.other.data + v.c.projection.bytes, v.c.projection.data, v.c.projection.bytes);
        memcpy(v.spare.data, v.c.state.data, v.c.state.bytes);
    }
    call_blank(&v.c);
    v.a = v.c.a;
    v.workspace = v.c.workspace.data;
    v.bytes = v.c.bytes;
    return v;
}

static void victim_free(victim *v)
{
    for (int i = 0; i < 10; i++)
        free(v->copy[i]);
    block_free(&v->other);
    block_free(&v->spare);
    call_free(&v->c);
}

static void victim_remember(victim *v)
{
    for (int i = 0; i < 10; i++) {
        const block *b = victim_block(v, i);
        v->copy[i] = (unsigned char *)malloc(b->bytes + 1);
        if (b->bytes)
            memcpy(v->copy[i], b->data, b->bytes);
    }
}

static int victim_untouched(victim *v)
{
    for (int i = 0; i < 10; i++) {
        const block *b = victim_block(v, i);
        if (!block_intact(b) || (b->bytes && memcmp(v->copy[i], b->data, b->bytes) != 0))
            return 0;
    }
    return 1;
}

#define FAULT(status, change) \
    if (which-- == 0) { \
        change; \
        *expected = status; \
        return #change; \
    }

/* Add `by` bytes to a pointer. */
#define SHIFT(pointer, by) ((pointer) = (void *)((unsigned char *)(uintptr_t)(pointer) + (by)))

/* Fault number `which` of those that every operator knows; NULL where there are no more. */
static const char *shape_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    const int dim = v->c.k->dim;
    const int64_t huge = INT64_MAX / 2;
    FAULT(NF_E_NULL, v->no_args = 1)
    FAULT(NF_E_NULL, a->q.data = NULL)
    FAULT(NF_E_NULL, a->k.data = NULL)
    FAULT(NF_E_NULL, a->v.data = NULL)
    FAULT(NF_E_NULL, a->out.data = NULL)
    FAULT(NF_E_NULL, v->workspace = NULL)
    FAULT(NF_E_SIZE, a->batch = 0)
    FAULT(NF_E_SIZE, a->batch = -1)
    FAULT(NF_E_SIZE, a->heads = 0)
    FAULT(NF_E_SIZE, a->heads = -4)
    FAULT(NF_E_SIZE, a->kv_heads = -2)
    FAULT(NF_E_SIZE, a->q_tokens = -1)
    FAULT(NF_E_SIZE, a->kv_tokens = -1)
    FAULT(NF_E_SIZE, a->kv_tokens = INT64_MIN)
    FAULT(NF_E_SIZE, a->sequences = -1)
    FAULT(NF_E_HEADS, a->kv_heads = 3)
    FAULT(NF_E_HEADS, a->kv_heads = 8)
    FAULT(NF_E_TOKENS, a->kv_tokens = 9)
    FAULT(NF_E_OVERFLOW, a->batch = huge)
    FAULT(NF_E_OVERFLOW, (a->heads = huge - huge % 2, a->kv_heads = 2))
    FAULT(NF_E_OVERFLOW, (a->heads = huge, a->kv_heads = huge))
    FAULT(NF_E_OVERFLOW, a->kv_tokens = huge)
    FAULT(NF_E_OVERFLOW, (a->q_tokens = huge, a->kv_tokens = huge))
    FAULT(NF_E_OVERFLOW, (a->batch = (int64_t)1 << 31, a->heads = (int64_t)1 << 33))
    FAULT(NF_E_OVERFLOW, (a->batch = (int64_t)1 << 32, a->q_tokens = (int64_t)1 << 32, a->kv_tokens = 0))
    FAULT(NF_E_OVERFLOW, a->q.token_stride = huge)
    FAULT(NF_E_OVERFLOW, a->k.batch_stride = INT64_MAX)
    FAULT(NF_E_OVERFLOW, a->v.head_stride = INT64_MAX)
    FAULT(NF_E_OVERFLOW, a->out.batch_stride = INT64_MAX)
    FAULT(NF_E_STRIDE, a->q.token_stride = -dim)
    FAULT(NF_E_STRIDE, a->k.head_stride = dim - 1)
    FAULT(NF_E_STRIDE, a->v.batch_stride = INT64_MIN)
    FAULT(NF_E_STRIDE, a->out.head_stride = 1)
    FAULT(NF_E_STRIDE, a->out.token_stride = dim)
    FAULT(NF_E_STRIDE, a->out.batch_stride = a->out.token_stride)
    FAULT(NF_E_SCALE, a->scale = -1)
    FAULT(NF_E_SCALE, a->scale = NAN)
    FAULT(NF_E_SCALE, a->scale = INFINITY)
    FAULT(NF_E_SCALE, a->scale = 3e38f)
    FAULT(NF_E_MASK, a->mask = 2)
    FAULT(NF_E_MASK, a->mask = -1)
    FAULT(NF_E_SPLIT, a->split_begin = -1)
    FAULT(NF_E_SPLIT, a->split_begin = 5)
    FAULT(NF_E_SPLIT, a->split_count = -1)
    FAULT(NF_E_SPLIT, a->split_count = 5)
    FAULT(NF_E_SPLIT, (a->split_begin = 2, a->split_count = 3))
    FAULT(NF_E_SPLIT, (a->split_begin = 2, a->split_count = INT64_MAX))
    FAULT(NF_E_ALIGN, SHIFT(v->workspace, 4))
    FAULT(NF_E_ALIGN, SHIFT(a->q.data, 1))
    FAULT(NF_E_ALIGN, SHIFT(a->k.data, 2))
    FAULT(NF_E_ALIGN, SHIFT(a->v.data, 3))
    FAULT(NF_E_ALIGN, SHIFT(a->out.data, 1))
    FAULT(NF_E_ALIGN, a->lse = (float *)(void *)(v->c.lse.data + 1))
    FAULT(NF_E_WORKSPACE, v->bytes = 0)
    FAULT(NF_E_WORKSPACE, v->bytes = v->c.bytes - 1)
    FAULT(NF_E_OVERLAP, a->out.data = v->c.q.data)
    FAULT(NF_E_OVERLAP, a->out.data = v->c.v.data)
    FAULT(NF_E_OVERLAP, a->v.data = v->c.out.data + v->c.out.bytes - 4)
    FAULT(NF_E_OVERLAP, a->k.data = v->c.workspace.data)
    FAULT(NF_E_OVERLAP, v->workspace = v->c.q.data)
    FAULT(NF_E_OVERLAP, a->lse = (float *)(void *)(v->c.out.data + v->c.out.bytes - 4))
    FAULT(NF_E_OVERLAP, a->q.data = v->c.lse.data + v->c.lse.bytes - 4)
    return NULL;
}

/* Packed sequences: 10 tokens in 3. */
static const char *packed_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    a->batch = 1;
    a->state = NULL;
    a->cu_tokens = v->cu;
    a->sequences = 3;
    v->cu[0] = 0, v->cu[1] = 4, v->cu[2] = 4, v->cu[3] = 10;
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_PACKED, a->sequences = 0)
    FAULT(NF_E_PACKED, a->cu_tokens = NULL)
    FAULT(NF_E_PACKED, a->batch = 2)
    FAULT(NF_E_PACKED, a->kv_tokens = 11)
    FAULT(NF_E_PACKED, v->cu[0] = 1)
    FAULT(NF_E_PACKED, v->cu[0] = -1)
    FAULT(NF_E_PACKED, v->cu[2] = 3)
    FAULT(NF_E_PACKED, v->cu[1] = -4)
    FAULT(NF_E_PACKED, v->cu[3] = 9)
    FAULT(NF_E_PACKED, v->cu[3] = 11)
    FAULT(NF_E_SPLIT, a->split_count = 7)
    FAULT(NF_E_OVERLAP, a->lse = (float *)(void *)v->cu)
    return NULL;
}

/* Projections and states. */
static const char *feature_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_projection_head *p = (nf_projection_head *)(void *)v->other.data;
    nf_state_head *s = (nf_state_head *)(void *)v->spare.data;
    nf_state_unit *unit = (nf_state_unit *)(void *)(s + 1);
    const size_t one = v->c.projection.bytes;
    a->projection = p;
    a->state = s;
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, a->projection_stride = one)
    FAULT(NF_E_NULL, a->projection = NULL)
    FAULT(NF_E_ALIGN, SHIFT(a->projection, 4))
    FAULT(NF_E_ALIGN, a->projection_stride = one + 4)
    FAULT(NF_E_STRIDE, a->projection_stride = one - NF_ALIGN)
    FAULT(NF_E_OVERFLOW, a->projection_stride = SIZE_MAX / 2 / NF_ALIGN * NF_ALIGN)
    FAULT(NF_E_OVERFLOW, a->projection_stride = SIZE_MAX / 2 + 1 + one)
    FAULT(NF_E_PROJECTION, p->magic++)
    FAULT(NF_E_PROJECTION, p->abi++)
    FAULT(NF_E_PROJECTION, p->contract++)
    FAULT(NF_E_PROJECTION, memset(p, 0, one))
    FAULT(NF_E_PROJECTION, memset(p, 0xff, one))
    FAULT(NF_E_PROJECTION, (a->projection_stride = one, memset(v->other.data + one, 0, one)))
    FAULT(NF_E_ALIGN, SHIFT(a->state, 4))
    FAULT(NF_E_STATE, memset(s, 0, v->c.state.bytes))
    FAULT(NF_E_STATE, memset(s, 0xff, v->c.state.bytes))
    FAULT(NF_E_STATE, s->magic++)
    FAULT(NF_E_STATE, s->abi++)
    FAULT(NF_E_STATE, s->contract++)
    FAULT(NF_E_STATE, s->units--)
    FAULT(NF_E_STATE, unit->hash++)
    FAULT(NF_E_STATE, unit->tokens = -1)
    FAULT(NF_E_STATE, a->scale = 0.5f)
    FAULT(NF_E_STATE, (a->batch = 1))
    FAULT(NF_E_STATE, v->c.k->projection_init(p, 99, NULL))
    FAULT(NF_E_OVERLAP, a->out.data = v->c.state.data; a->state = v->c.state.data)
    FAULT(NF_E_OVERLAP, a->q.data = v->spare.data + v->c.state.bytes - 4)
    FAULT(NF_E_OVERLAP, v->workspace = (unsigned char *)p + one - NF_ALIGN)
    FAULT(NF_E_OVERLAP, a->lse = (float *)(void *)((unsigned char *)p + one - 4))
    return NULL;
}

typedef const char *(*fault_fn)(int which, victim *v, nf_status *expected);

static void provoke(const kernel *k, attend_fn attend, const char *name, fault_fn fault, int with_state)
{
    for (int i = 0;; i++) {
        victim v = victim_make(k);
        nf_status expected = NF_OK, got;
        const char *what;
        if (!with_state)
            v.a.state = NULL;
        what = fault(i, &v, &expected);
        if (what) {
            victim_remember(&v);
            got = attend(v.no_args ? NULL : &v.a, v.workspace, v.bytes);
            CHECK(got == expected, "%s: %s: got '%s', expected '%s'", name, what, nf_status_text(got),
                  nf_status_text(expected));
            CHECK(got == NF_OK || victim_untouched(&v), "%s: %s: wrote something", name, what);
        }
        victim_free(&v);
        if (!what)
            break;
    }
}

TEST_EACH(forward_faults)
{
    EACH_WAY(k, w)
    {
        provoke(k, w.forward, w.name, shape_fault, 0);
        provoke(k, w.forward, w.name, packed_fault, 0);
        if (k->features) {
            provoke(k, w.forward, w.name, shape_fault, 1);
            provoke(k, w.forward, w.name, feature_fault, 1);
        }
    }
}

static const char *decode_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_NULL, a->state = NULL)
    FAULT(NF_E_TOKENS, a->kv_tokens = 11)
    FAULT(NF_E_MASK, a->mask = NF_FULL)
    return NULL;
}

TEST_EACH(decode_faults)
{
    EACH_WAY(k, w)
    {
        provoke(k, w.decode, w.name, shape_fault, k->features > 0);
        if (k->features) {
            provoke(k, w.decode, w.name, feature_fault, 1);
            provoke(k, w.decode, w.name, decode_fault, 1);
        }
    }
}

/* exact carries no state and needs no projection. */
TEST_EXACT(no_state)
{
    victim v = victim_make(k);
    block state = block_make(4096, 0);
    memset(state.data, 0, 4096);
    CHECK(k->state_bytes(&v.a) == 0, "state_bytes");
    v.a.state = state.data;
    victim_remember(&v);
    EACH_WAY(k, w)
    {
        CHECK(w.forward(&v.a, v.workspace, v.bytes) == NF_E_STATE && victim_untouched(&v), "%s", w.name);
        CHECK(w.decode(&v.a, v.workspace, v.bytes) == NF_E_STATE && victim_untouched(&v), "%s", w.name);
    }
    CHECK(k->state_reset(&v.a) == NF_E_STATE, "state_reset");
    block_free(&state);
    victim_free(&v);
}

/* Nothing to do is no fault, and needs no data. */
TEST_EACH(nothing)
{
    EACH_WAY(k, w)
    {
        victim v = victim_make(k);
        v.a.q_tokens = v.a.kv_tokens = 0;
        v.a.state = NULL;
        v.a.q.data = v.a.k.data = v.a.v.data = NULL;
        v.a.out.data = NULL;
        v.a.lse = NULL;
        CHECK(w.forward(&v.a, v.workspace, v.bytes) == NF_OK, "%s", w.name);
        victim_free(&v);
    }
}

/* ---- states --------------------------------------------------------------------------------------------------------
 */

static const char *reset_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_projection_head *p = (nf_projection_head *)(void *)v->other.data;
    a->projection = p;
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_NULL, v->no_args = 1)
    FAULT(NF_E_NULL, a->state = NULL)
    FAULT(NF_E_NULL, a->projection = NULL)
    FAULT(NF_E_SIZE, a->batch = 0)
    FAULT(NF_E_HEADS, a->kv_heads = 3)
    FAULT(NF_E_SCALE, a->scale = NAN)
    FAULT(NF_E_OVERFLOW, a->batch = INT64_MAX)
    FAULT(NF_E_PROJECTION, p->magic = 0)
    FAULT(NF_E_ALIGN, SHIFT(a->projection, 4))
    FAULT(NF_E_ALIGN, SHIFT(a->state, 4))
    FAULT(NF_E_OVERLAP, a->state = (unsigned char *)p + v->c.projection.bytes - NF_ALIGN)
    return NULL;
}

TEST_FAVOR(reset_faults)
{
    for (int i = 0;; i++) {
        victim v = victim_make(k);
        nf_status expected = NF_OK, got;
        const char *what = reset_fault(i, &v, &expected);
        if (what) {
            victim_remember(&v);
            got = k->state_reset(v.no_args ? NULL : &v.a);
            CHECK(got == expected, "%s: got '%s', expected '%s'", what, nf_status_text(got), nf_status_text(expected));
            CHECK(got == NF_OK || victim_untouched(&v), "%s: wrote something", what);
        }
        victim_free(&v);
        if (!what)
            break;
    }
}

typedef struct merging {
    void *dst, *a, *b;
} merging;

static const char *merge_fault(int which, victim *v, merging *m, nf_status *expected)
{
    nf_state_head *a = (nf_state_head *)m->a, *b = (nf_state_head *)m->b;
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, m->dst = m->a)
    FAULT(NF_OK, m->dst = m->b)
    FAULT(NF_OK, m->dst = m->a = m->b)
    FAULT(NF_E_NULL, m->dst = NULL)
    FAULT(NF_E_NULL, m->a = NULL)
    FAULT(NF_E_NULL, m->b = NULL)
    FAULT(NF_E_ALIGN, SHIFT(m->dst, 4))
    FAULT(NF_E_ALIGN, SHIFT(m->a, 4))
    FAULT(NF_E_ALIGN, SHIFT(m->b, 4))
    FAULT(NF_E_STATE, a->magic++)
    FAULT(NF_E_STATE, b->abi++)
    FAULT(NF_E_STATE, b->contract++)
    FAULT(NF_E_STATE, b->units--)
    FAULT(NF_E_STATE, a->units = -1)
    FAULT(NF_E_STATE, (a->units = INT64_MAX, b->units = INT64_MAX))
    FAULT(NF_E_STATE, ((nf_state_unit *)(void *)(b + 1))->hash++)
    FAULT(NF_E_STATE, memset(m->a, 0, v->c.state.bytes))
    FAULT(NF_E_OVERLAP, m->dst = (unsigned char *)m->a + NF_ALIGN)
    FAULT(NF_E_OVERLAP, m->dst = (unsigned char *)m->b - NF_ALIGN)
    return NULL;
}

TEST_FAVOR(merge_faults)
{
    for (int i = 0;; i++) {
        victim v = victim_make(k);
        merging m = {v.other.data, v.c.state.data, v.spare.data + v.c.state.bytes / 2 / NF_ALIGN * NF_ALIGN};
        block dst = block_make(v.c.state.bytes, 0);
        nf_status expected = NF_OK, got;
        const char *what;
        memcpy(m.b, m.a, v.c.state.bytes);
        m.dst = dst.data;
        what = merge_fault(i, &v, &m, &expected);
        if (what) {
            victim_remember(&v);
            got = k->state_merge(m.dst, m.a, m.b);
            CHECK(got == expected, "%s: got '%s', expected '%s'", what, nf_status_text(got), nf_status_text(expected));
            CHECK(got == NF_OK || (victim_untouched(&v) && blank(dst.data, dst.bytes)), "%s: wrote something", what);
            CHECK(block_intact(&dst), "%s: wrote beside the state", what);
        }
        block_free(&dst);
        victim_free(&v);
        if (!what)
            break;
    }
}

/* ---- projections ---------------------------------------------------------------------------------------------------
 */

TEST_FAVOR(projection_faults)
{
    const size_t n = (size_t)(k->rows * k->dim);
    block p = block_make(k->projection_bytes() + NF_ALIGN, 0), w = block_make(n * sizeof(float), 0);
    float *matrix = (float *)(void *)w.data;
    for (size_t i = 0; i < n; i++)
        matrix[i] = 1;
    CHECK(k->projection_bytes() % NF_ALIGN == 0, "projection_bytes is no multiple of NF_ALIGN");
    CHECK(k->projection_init(NULL, 1, NULL) == NF_E_NULL, "init NULL");
    CHECK(k->projection_init(p.data + 4, 1, NULL) == NF_E_ALIGN, "init misaligned");
    CHECK(k->projection_from(NULL, matrix, 0) == NF_E_NULL, "from NULL");
    CHECK(k->projection_from(p.data, NULL, 0) == NF_E_NULL, "from a NULL matrix");
    CHECK(k->projection_from(p.data + 4, matrix, 0) == NF_E_ALIGN, "from misaligned");
    CHECK(k->projection_from(p.data, (float *)(void *)(w.data + 1), 0) == NF_E_ALIGN, "from a misaligned matrix");
    CHECK(k->projection_from(p.data, matrix, 2) == NF_E_VALUE, "from with an unknown flag");
    CHECK(k->projection_from(p.data, (float *)(void *)(p.data + 64), 0) == NF_E_OVERLAP, "from itself");
    for (size_t at = 0; at < n; at += n - 1) {
        const float bad[] = {NAN, INFINITY, -INFINITY};
        for (int i = 0; i < 3; i++) {
            matrix[at] = bad[i];
            CHECK(k->projection_from(p.data, matrix, i & 1 ? NF_KEEP_F32 : 0) == NF_E_VALUE, "from %g", (double)bad[i]);
        }
        matrix[at] = 1;
    }
    CHECK(blank(p.data, p.bytes), "a refused call wrote a projection");
    CHECK(k->projection_read(p.data, matrix) == NF_E_PROJECTION, "read what was never initialised");
    CHECK(k->projection_init(p.data, 1, NULL) == NF_OK, "init");
    CHECK(k->projection_read(NULL, matrix) == NF_E_NULL, "read NULL");
    CHECK(k->projection_read(p.data, NULL) == NF_E_NULL, "read into NULL");
    CHECK(k->projection_read(p.data, (float *)(void *)(w.data + 1)) == NF_E_ALIGN, "read misaligned");
    ((nf_projection_head *)(void *)p.data)->contract++;
    CHECK(k->projection_read(p.data, matrix) == NF_E_PROJECTION, "read another contract's");
    CHECK(matrix[0] == 1 && matrix[n - 1] == 1, "a refused read wrote");
    block_free(&p);
    block_free(&w);
}

static const char *calibration_fault(int which, nf_calibration *s, float *data, nf_status *expected)
{
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, s->tau = 1)
    FAULT(NF_E_NULL, s->q = NULL)
    FAULT(NF_E_NULL, s->k = NULL)
    FAULT(NF_E_SIZE, s->q_tokens = 0)
    FAULT(NF_E_SIZE, s->k_tokens = -1)
    FAULT(NF_E_STRIDE, s->q_stride = 1)
    FAULT(NF_E_STRIDE, s->k_stride = -64)
    FAULT(NF_E_OVERFLOW, (s->q_tokens = INT64_MAX, s->q_stride = 1024))
    FAULT(NF_E_ALIGN, s->q = (const float *)(const void *)((const char *)s->q + 1))
    FAULT(NF_E_VALUE, s->tau = -0.5f)
    FAULT(NF_E_VALUE, s->tau = 1.5f)
    FAULT(NF_E_VALUE, s->tau = NAN)
    FAULT(NF_E_VALUE, s->flags = 4)
    FAULT(NF_E_VALUE, data[0] = NAN)
    FAULT(NF_E_VALUE, data[11] = INFINITY)
    return NULL;
}

TEST_FAVOR(calibration_faults)
{
    for (int i = 0;; i++) {
        block p = block_make(k->projection_bytes(), 0), data = block_make((size_t)k->dim * 40, 0);
        float *x = (float *)(void *)data.data;
        nf_calibration s = {x, x, 10, 10, 0, 0, 0, 0};
        nf_status expected = NF_OK, got;
        const char *what;
        for (int n = 0; n < 10 * k->dim; n++)
            x[n] = (float)(n % 7) - 2.5f;
        what = calibration_fault(i, &s, x, &expected);
        if (what) {
            got = k->projection_init(p.data, 1, &s);
            CHECK(got == expected, "%s: got '%s', expected '%s'", what, nf_status_text(got), nf_status_text(expected));
            CHECK(got == NF_OK || blank(p.data, p.bytes), "%s: wrote something", what);
        }
        block_free(&p);
        block_free(&data);
        if (!what)
            break;
    }
}

/* ---- texts and variants --------------------------------------------------------------------------------------------
 */

Test(status, texts)
{
    const char *none = nf_status_text((nf_status)7);
    for (int s = 0; s > -NF_STATUS_COUNT; s--) {
        CHECK(strcmp(nf_status_text((nf_status)s), none) != 0, "status %d has no text", s);
        for (int t = 0; t > s; t--)
            CHECK(strcmp(nf_status_text((nf_status)s), nf_status_text((nf_status)t)) != 0, "%d and %d", s, t);
    }
    CHECK(strcmp(nf_status_text((nf_status)-NF_STATUS_COUNT), none) == 0, "NF_STATUS_COUNT is too small");
}

/* Variants are named after their kernel and target; one that this machine lacks refuses, and writes nothing. */
TEST_EACH(variants)
{
    int32_t count = -1;
    const nf_variant *v = k->variants(&count);
    int supported = 0;
    CHECK(count >= 1, "no variant");
    for (int32_t i = 0; i < count; i++) {
        CHECK(strncmp(v[i].name, "nf_", 3) == 0 && strncmp(v[i].name + 3, k->name, strlen(k->name)) == 0, "%s",
              v[i].name);
        CHECK(strstr(v[i].name + strlen(k->name), v[i].target) != NULL, "%s on %s", v[i].name, v[i].target);
        supported += v[i].supported() != 0;
        for (int decode = 0; decode < 2 && !v[i].supported(); decode++) {
            victim here = victim_make(k);
            victim_remember(&here);
            CHECK((decode ? v[i].decode : v[i].forward)(&here.a, here.workspace, here.bytes) == NF_E_UNSUPPORTED, "%s",
                  v[i].name);
            CHECK(victim_untouched(&here), "%s wrote something", v[i].name);
            victim_free(&here);
        }
    }
    CHECK(supported >= 1 && strcmp(v[count - 1].target, "c") == 0 && v[count - 1].supported(), "portable C is missing");
}

/* The entry point gives the bits of the first supported variant, in forward and decode. */
TEST_EACH(entry)
{
    const shape s = {.heads = 2, .q_tokens = 50, .norm = 3, .seed = 1};
    call c = call_make(k, s);
    block first = block_make(c.out.bytes, 0);
    int32_t count;
    const nf_variant *v = k->variants(&count);
    while (!v->supported())
        v++;
    for (int decode = 0; decode < 2; decode++) {
        if (decode && k->features)
            call_state(&c);
        CHECK(call_run(&c, decode ? v->decode : v->forward) == NF_OK, "%s", v->name);
        memcpy(first.data, c.out.data, first.bytes);
        if (decode && k->features)
            call_state(&c);
        CHECK(call_run(&c, decode ? k->decode : k->forward) == NF_OK, "entry");
        CHECK(memcmp(first.data, c.out.data, first.bytes) == 0, "the entry point does not run %s", v->name);
    }
    block_free(&first);
    call_free(&c);
}
