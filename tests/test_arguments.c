/* Bad input: every fault has its status, and on any status but NF_OK nothing at all has been written. */
#include "check.h"
#include "patterns.h"

#include <limits.h>

/* A valid call to be spoilt: 2 batch entries, 4 heads on 2 kv heads, 10 tokens. Or its backward. */
typedef struct victim {
    call c;
    nf_args a;
    nf_grads g;
    int no_args; /* call with NULL */
    int no_grads;
    void *workspace;
    size_t bytes;
    block other, spare; /* a projection, a state for a call to break */
    block lists;        /* of a pattern, as struct lists */
    block dout, dq, dk, dv;
    int32_t cu[4];
    unsigned char *copy[17]; /* of every block before the call */
} victim;

/* Valid lists for the victim's pattern to take up: one query block and a spare, the key block 0 for the first. */
typedef struct lists {
    int32_t dilation[4], globals[3], offsets[3], offsets_of_heads[12], keys[4];
    float gain[4];
} lists;

static const lists valid_lists = {{1, 1, 1, 1}, {2, 5, 9},    {0, 1, 1}, {0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4},
                                  {0, 0, 0, 0}, {0, 1, -1, 0}};

static block *victim_block(victim *v, int i)
{
    block *const all[] = {&v->c.q,         &v->c.key,        &v->c.v,     &v->c.out,     &v->c.lse,  &v->dq,
                          &v->c.workspace, &v->c.projection, &v->c.state, &v->c.pattern, &v->other,  &v->dk,
                          &v->spare,       &v->lists,        &v->dout,    &v->dv,        &v->c.decay};
    return i < 17 ? all[i] : NULL;
}

static victim victim_make(const kernel *k)
{
    const shape s = {.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 10, .norm = 2, .seed = 1};
    victim v;
    nf_input t;
    memset(&v, 0, sizeof v);
    v.c = call_make(k, s);
    if (k->features) {
        v.other = block_make(2 * v.c.projection.bytes, 0);
        memcpy(v.other.data, v.c.projection.data, v.c.projection.bytes);
        memcpy(v.other.data + v.c.projection.bytes, v.c.projection.data, v.c.projection.bytes);
    }
    if (stateful(k)) {
        call_state(&v.c);
        v.spare = block_make(2 * v.c.state.bytes, 0);
        memcpy(v.spare.data, v.c.state.data, v.c.state.bytes);
    }
    v.lists = block_make(sizeof(lists), 0);
    memcpy(v.lists.data, &valid_lists, sizeof(lists));
    call_blank(&v.c);
    v.a = v.c.a;
    v.g.out = out_tensor(&v.a);
    v.dout = tensor_make(&v.g.dout, 2, 10, 4, k->dim, 0);
    memset(v.dout.data, 0, v.dout.bytes);
    v.dq = tensor_make(&t, 2, 10, 4, k->dim, 0), v.g.dq.data = v.dq.data;
    v.dk = tensor_make(&t, 2, 10, 2, k->dim, 0), v.g.dk.data = v.dk.data;
    v.dv = tensor_make(&t, 2, 10, 2, k->dim, 0), v.g.dv.data = v.dv.data;
    v.g.lse = v.a.lse;
    v.workspace = v.c.workspace.data;
    v.bytes = v.c.bytes;
    return v;
}

static void victim_free(victim *v)
{
    for (int i = 0; i < 17; i++)
        free(v->copy[i]);
    for (int i = 0; i < 17; i++)
        block_free(victim_block(v, i));
    call_free(&v->c);
}

static void victim_remember(victim *v)
{
    for (int i = 0; i < 17; i++) {
        const block *b = victim_block(v, i);
        v->copy[i] = (unsigned char *)malloc(b->bytes + 1);
        if (b->bytes)
            memcpy(v->copy[i], b->data, b->bytes);
    }
}

static int victim_untouched(victim *v)
{
    for (int i = 0; i < 17; i++) {
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
    if (a->mask == NF_CAUSAL) {
        FAULT(NF_E_TOKENS, a->kv_tokens = 9)
    }
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
    FAULT(NF_E_VALUE, a->flags = 4)
    FAULT(NF_E_VALUE, a->flags = 0x80000001u)
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
    FAULT(NF_E_ALIGN, a->cu_tokens = (const int32_t *)(const void *)((const char *)v->cu + 2))
    FAULT(NF_E_SPLIT, a->split_count = 7)
    FAULT(NF_E_OVERLAP, a->lse = (float *)(void *)v->cu)
    return NULL;
}

static const char *projection_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_projection_head *p = (nf_projection_head *)(void *)v->other.data;
    const size_t one = v->c.projection.bytes;
    a->projection = p;
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
    FAULT(NF_E_OVERLAP, v->workspace = (unsigned char *)p + one - NF_ALIGN)
    FAULT(NF_E_OVERLAP,
          (a->lse = (float *)(void *)((unsigned char *)p + one - 4), v->g.dq.data = (unsigned char *)p + one - 4))
    if (a->state) { /* a state knows its projection */
        FAULT(NF_E_STATE, v->c.k->projection_init(p, 99, NULL))
    }
    return NULL;
}

static const char *state_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_state_head *s = (nf_state_head *)(void *)v->spare.data;
    nf_state_unit *unit = (nf_state_unit *)(void *)(s + 1);
    a->state = s;
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_ALIGN, SHIFT(a->state, 4))
    FAULT(NF_E_STATE, memset(s, 0, v->c.state.bytes))
    FAULT(NF_E_STATE, memset(s, 0xff, v->c.state.bytes))
    FAULT(NF_E_STATE, s->magic++)
    FAULT(NF_E_STATE, s->abi++)
    FAULT(NF_E_STATE, s->contract++)
    FAULT(NF_E_STATE, s->units--)
    FAULT(NF_E_STATE, s->unit_bytes += NF_ALIGN)
    FAULT(NF_E_STATE, s->globals++)
    FAULT(NF_E_STATE, (s->globals++, s->ring--))
    FAULT(NF_E_STATE, unit->hash++)
    FAULT(NF_E_STATE, unit->tokens = -1)
    FAULT(NF_E_STATE, (a->batch = 1))
    FAULT(NF_E_OVERLAP, (a->out.data = v->c.state.data, a->state = v->c.state.data))
    FAULT(NF_E_OVERLAP, a->q.data = v->spare.data + v->c.state.bytes - 4)
    if (v->c.k->far) {
        FAULT(NF_E_STATE, a->scale = 0.5f)
    }
    if (a->decay) {
        FAULT(NF_E_STATE, a->decay = NULL)
        FAULT(NF_E_STATE, ((float *)(void *)v->c.decay.data)[1] = -0.5f)
    }
    return NULL;
}

static lists *lists_of(victim *v)
{
    return (lists *)(void *)v->lists.data;
}

/* The victim's pattern, to be changed: it takes up the parts asked for. */
static nf_pattern *patterned(victim *v, int parts)
{
    nf_pattern *p = (nf_pattern *)(void *)v->c.pattern.data;
    lists *l = lists_of(v);
    if (parts & DILATION)
        p->dilation = l->dilation;
    if (parts & LISTED)
        p->global_tokens = l->globals, p->global_count = 3;
    if (parts & BLOCKS) {
        p->block = v->c.k->block, p->block_heads = 1, p->block_rows = 2, p->block_count = 1;
        p->block_offsets = l->offsets, p->block_keys = l->keys;
    }
    if (parts & HEAD_LISTS)
        p->block_heads = 4, p->block_count = 4, p->block_offsets = l->offsets_of_heads;
    if (parts & GAIN)
        p->far_gain = l->gain;
    return p;
}

/* What both operators over patterns refuse. */
static const char *pattern_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_pattern *p = patterned(v, LISTED | DILATION | GAIN);
    lists *l = lists_of(v);
    const int64_t most = (int64_t)1 << 40;
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, p->window = p->globals = most)
    FAULT(NF_E_NULL, a->pattern = NULL)
    FAULT(NF_E_ALIGN, SHIFT(a->pattern, 4))
    FAULT(NF_E_NULL, p->global_tokens = NULL)
    FAULT(NF_E_WINDOW, p->window = -1)
    FAULT(NF_E_WINDOW, p->window = INT64_MIN)
    FAULT(NF_E_WINDOW, p->window = most + 1)
    FAULT(NF_E_WINDOW, p->window = INT64_MAX)
    FAULT(NF_E_WINDOW, l->dilation[0] = 0)
    FAULT(NF_E_WINDOW, l->dilation[3] = -1)
    FAULT(NF_E_WINDOW, l->dilation[2] = (1 << 20) + 1)
    FAULT(NF_E_WINDOW, l->dilation[2] = INT32_MIN)
    FAULT(NF_E_GLOBALS, p->globals = -1)
    FAULT(NF_E_GLOBALS, p->globals = INT64_MIN)
    FAULT(NF_E_GLOBALS, p->globals = INT64_MAX)
    FAULT(NF_E_GLOBALS, p->global_count = -1)
    FAULT(NF_E_GLOBALS, p->global_count = INT64_MIN)
    FAULT(NF_E_GLOBALS, l->globals[1] = 2)
    FAULT(NF_E_GLOBALS, l->globals[1] = 1)
    FAULT(NF_E_GLOBALS, l->globals[0] = -1)
    FAULT(NF_E_GLOBALS, l->globals[2] = 10)
    FAULT(NF_E_GLOBALS, l->globals[2] = INT32_MAX)
    FAULT(NF_E_GLOBALS, (a->q_tokens = 9, a->kv_tokens = 9))
    FAULT(NF_E_ALIGN, SHIFT(p->dilation, 2))
    FAULT(NF_E_ALIGN, SHIFT(p->global_tokens, 1))
    FAULT(NF_E_ALIGN, SHIFT(p->far_gain, 2))
    FAULT(NF_E_VALUE, l->gain[3] = NAN)
    FAULT(NF_E_VALUE, l->gain[0] = -INFINITY)
    FAULT(NF_E_VALUE, p->flags = 2)
    FAULT(NF_E_PATTERN, (a->state = v->c.state.data))
    FAULT(NF_E_OVERFLOW, (a->heads = a->kv_heads = (int64_t)1 << 46))
    FAULT(NF_E_OVERLAP, v->workspace = v->c.pattern.data)
    FAULT(NF_E_OVERLAP, (a->out.data = l->dilation + 3, v->g.dq.data = l->dilation + 3))
    FAULT(NF_E_OVERLAP, (a->lse = (float *)(void *)(l->globals + 2), v->g.dk.data = l->globals + 2))
    FAULT(NF_E_OVERLAP, (a->lse = l->gain + 3, v->g.dv.data = l->gain + 3))
    if (v->c.k->features) {
        FAULT(NF_OK, memset(p, 0, sizeof *p))
        FAULT(NF_OK, p->flags = NF_FAR_EXACT)
        FAULT(NF_E_PATTERN, l->dilation[1] = 2)
        FAULT(NF_E_PATTERN, patterned(v, BLOCKS))
        FAULT(NF_E_MASK, a->mask = NF_FULL)
    } else {
        FAULT(NF_OK, (a->mask = NF_FULL))
        FAULT(NF_E_TOKENS, (a->mask = NF_FULL, a->q_tokens = 9, a->kv_tokens = 10))
        FAULT(NF_E_PATTERN, memset(p, 0, sizeof *p))
        FAULT(NF_E_VALUE, p->flags = NF_FAR_EXACT)
    }
    return NULL;
}

/* Lists of blocks, of sparse alone. */
static const char *blocks_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_pattern *p = patterned(v, which % 2 ? BLOCKS : BLOCKS | HEAD_LISTS);
    lists *l = lists_of(v);
    const int32_t *offsets = p->block_offsets;
    int32_t *first = which % 2 ? l->offsets : l->offsets_of_heads;
    which /= 2;
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, (p->window = 0, p->globals = 0))
    FAULT(NF_E_NULL, p->block_keys = NULL)
    FAULT(NF_E_BLOCKS, p->block_offsets = NULL)
    FAULT(NF_E_BLOCKS, p->block *= 2)
    FAULT(NF_E_BLOCKS, p->block = 0)
    FAULT(NF_E_BLOCKS, p->block = -16)
    FAULT(NF_E_BLOCKS, p->block_heads = 0)
    FAULT(NF_E_BLOCKS, p->block_heads = 2)
    FAULT(NF_E_BLOCKS, p->block_heads = -1)
    FAULT(NF_E_BLOCKS, p->block_heads = INT64_MAX)
    FAULT(NF_E_BLOCKS, p->block_rows = 0)
    FAULT(NF_E_BLOCKS, p->block_rows = -1)
    FAULT(NF_E_BLOCKS, p->block_rows = INT64_MAX)
    FAULT(NF_E_BLOCKS, p->block_rows = (int64_t)1 << 45)
    FAULT(NF_E_BLOCKS, p->block_count = -1)
    FAULT(NF_E_BLOCKS, p->block_count++)
    FAULT(NF_E_BLOCKS, p->block_count--)
    FAULT(NF_E_BLOCKS, p->block_count = INT64_MAX)
    FAULT(NF_E_BLOCKS, first[0] = 1)
    FAULT(NF_E_BLOCKS, first[0] = -1)
    FAULT(NF_E_BLOCKS, first[1] = 2)
    FAULT(NF_E_BLOCKS, first[1] = -1)
    FAULT(NF_E_BLOCKS, first[1] = INT32_MAX)
    FAULT(NF_E_BLOCKS, first[p->block_heads * 3 - 1] = 0)
    FAULT(NF_E_BLOCKS, first[p->block_heads * 3 - 1] = 5)
    FAULT(NF_E_BLOCKS, l->keys[0] = 1)
    FAULT(NF_E_BLOCKS, l->keys[0] = -1)
    FAULT(NF_E_BLOCKS, l->keys[p->block_count - 1] = INT32_MAX)
    FAULT(NF_E_ALIGN, SHIFT(p->block_offsets, 2))
    FAULT(NF_E_ALIGN, SHIFT(p->block_keys, 3))
    FAULT(NF_E_PATTERN, (a->state = v->c.state.data))
    FAULT(NF_E_OVERLAP, v->workspace = v->c.pattern.data)
    FAULT(NF_E_OVERLAP, (a->lse = (float *)(uintptr_t)offsets, v->g.dk.data = (void *)(uintptr_t)offsets))
    FAULT(NF_E_OVERLAP, (a->out.data = l->keys, v->g.dq.data = l->keys))
    return NULL;
}

/* A state holds the near field of its pattern. */
static const char *pattern_state_fault(int which, victim *v, nf_status *expected)
{
    nf_pattern *p = patterned(v, DILATION);
    lists *l = lists_of(v);
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_STATE, p->window += v->c.k->block)
    FAULT(NF_E_STATE, p->globals++)
    FAULT(NF_E_STATE, p->globals = 0)
    FAULT(NF_E_OVERLAP, (v->a.state = v->c.state.data, v->a.out.data = v->c.state.data + v->c.state.bytes - 4))
    if (v->c.k->features) {
        FAULT(NF_OK, p->window++)
        FAULT(NF_OK, patterned(v, GAIN))
        FAULT(NF_E_STATE, p->flags = NF_FAR_EXACT)
    } else {
        FAULT(NF_E_STATE, p->window++)
        FAULT(NF_E_STATE, l->dilation[1] = 2)
        FAULT(NF_E_MASK, v->a.mask = NF_FULL)
    }
    return NULL;
}

typedef const char *(*fault_fn)(int which, victim *v, nf_status *expected);

/* Fault after fault, in a forward or decode; in the backward if there is one to call. */
static void provoke(const kernel *k, attend_fn attend, backward_fn back, const char *name, fault_fn fault,
                    int with_state)
{
    for (int i = 0;; i++) {
        victim v = victim_make(k);
        nf_status expected = NF_OK, got;
        const char *what;
        if (!with_state)
            v.a.state = NULL;
        what = fault(i, &v, &expected);
        if (what) {
            const nf_args *a = v.no_args ? NULL : &v.a;
            victim_remember(&v);
            got = back ? back(a, v.no_grads ? NULL : &v.g, v.workspace, v.bytes) : attend(a, v.workspace, v.bytes);
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
        provoke(k, w.forward, NULL, w.name, shape_fault, 0);
        provoke(k, w.forward, NULL, w.name, packed_fault, 0);
        if (stateful(k)) {
            provoke(k, w.forward, NULL, w.name, shape_fault, 1);
            provoke(k, w.forward, NULL, w.name, state_fault, 1);
        }
        if (k->features)
            provoke(k, w.forward, NULL, w.name, projection_fault, 1);
    }
}

static const char *decode_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    FAULT(NF_OK, (void)0)
    FAULT(NF_E_TOKENS, a->kv_tokens = 11)
    FAULT(NF_E_MASK, (a->decay = NULL, a->mask = NF_FULL))
    if (v->c.k->far) {
        FAULT(NF_E_NULL, a->state = NULL)
    }
    return NULL;
}

/* Decay and flags, of linear. */
static const char *decay_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    float *decay = (float *)(void *)v->c.decay.data;
    FAULT(NF_OK, a->flags = NF_UNNORMALISED)
    if (a->mask == NF_FULL) { /* softmaxqk */
        FAULT(NF_E_MASK, a->mask = NF_CAUSAL)
        FAULT(NF_E_DECAY, a->decay = (const float *)(const void *)v->lists.data)
        return NULL;
    }
    FAULT(NF_OK, (a->state = NULL, a->decay = NULL, a->mask = NF_FULL))
    FAULT(NF_OK, (a->state = NULL, decay[1] = -3e38f))
    FAULT(NF_E_DECAY, a->mask = NF_FULL)
    FAULT(NF_E_DECAY, decay[0] = 1e-30f)
    FAULT(NF_E_DECAY, decay[1] = NAN)
    FAULT(NF_E_DECAY, decay[1] = -INFINITY)
    FAULT(NF_E_ALIGN, a->decay = (const float *)(const void *)(v->c.decay.data + 2))
    FAULT(NF_E_OVERLAP, (a->out.data = decay + 1, v->g.dq.data = decay + 1))
    return NULL;
}

TEST_LIST(decay_faults, LINEARS)
{
    EACH_WAY(k, w)
    {
        provoke(k, w.forward, NULL, w.name, decay_fault, 1);
        provoke(k, w.forward, NULL, w.name, decay_fault, 0);
        provoke(k, NULL, w.backward, w.name, decay_fault, 0);
    }
}

/* softmaxqk has all its keys before the first query: there is nothing to decode. */
TEST_LIST(no_decode, FULL_LINEARS)
{
    victim v = victim_make(k);
    victim_remember(&v);
    EACH_WAY(k, w)
    {
        CHECK(w.decode(&v.a, v.workspace, v.bytes) == NF_E_MASK && victim_untouched(&v), "%s", w.name);
        v.a.mask = NF_CAUSAL;
        CHECK(w.decode(&v.a, v.workspace, v.bytes) == NF_E_MASK && victim_untouched(&v), "%s", w.name);
        v.a.mask = NF_FULL;
    }
    victim_free(&v);
}

TEST_LIST(decode_faults, CAUSALS)
{
    EACH_WAY(k, w)
    {
        provoke(k, w.decode, NULL, w.name, shape_fault, stateful(k));
        if (stateful(k)) {
            provoke(k, w.decode, NULL, w.name, state_fault, 1);
            provoke(k, w.decode, NULL, w.name, decode_fault, 1);
        }
        if (k->features)
            provoke(k, w.decode, NULL, w.name, projection_fault, 1);
    }
}

/* Queries that see a state alone. */
static const char *no_keys_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    const float *decay = a->decay;
    a->flags = NF_NO_KEYS;
    a->k.data = a->v.data = NULL;
    a->decay = NULL;
    if (v->c.k->state_reset(a) != NF_OK)
        abort();
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, a->mask = NF_CAUSAL)
    FAULT(NF_OK, a->mask = NF_FULL)
    FAULT(NF_OK, (a->q_tokens = 0, a->q.data = NULL, a->out.data = NULL))
    FAULT(NF_OK, a->k.data = v->c.out.data) /* not looked at */
    FAULT(NF_E_MASK, a->mask = 2)
    FAULT(NF_E_TOKENS, a->kv_tokens = 1)
    FAULT(NF_E_TOKENS, a->kv_tokens = a->q_tokens)
    FAULT(NF_E_SIZE, a->kv_tokens = -1)
    FAULT(NF_E_VALUE, a->flags |= 4)
    FAULT(NF_E_NULL, a->state = NULL)
    FAULT(NF_E_NULL, a->q.data = NULL)
    FAULT(NF_E_PACKED, (a->cu_tokens = v->cu, a->sequences = 3))
    FAULT(NF_E_STATE, a->scale = 0.5f)
    FAULT(NF_E_STATE, a->batch = 1)
    FAULT(NF_E_OVERLAP, a->out.data = v->c.state.data)
    FAULT(NF_E_OVERLAP, a->lse = (float *)(void *)(v->c.state.data + v->c.state.bytes - 4))
    FAULT(NF_E_OVERLAP, v->workspace = v->c.state.data)
    if (decay) {
        FAULT(NF_E_DECAY, a->decay = decay)
        FAULT(NF_E_DECAY, (a->decay = decay, a->mask = NF_FULL))
    }
    if (strstr(v->c.k->name, "favor_exp_")) {
        FAULT(NF_E_EPS, a->eps = 1e-4f)
        FAULT(NF_E_EPS, (a->eps = 1e-4f, a->mask = NF_FULL))
    }
    return NULL;
}

/* Where there is no such call. */
static const char *needs_keys_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    a->decay = NULL;
    FAULT(NF_E_VALUE, a->flags = NF_NO_KEYS)
    FAULT(NF_E_VALUE, (a->flags = NF_NO_KEYS | NF_UNNORMALISED, a->k.data = a->v.data = NULL))
    FAULT(NF_E_VALUE, (a->flags = NF_NO_KEYS, a->state = NULL))
    return NULL;
}

TEST_EACH(no_keys)
{
    EACH_WAY(k, w)
    {
        if (k->far && !k->block) {
            provoke(k, w.forward, NULL, w.name, no_keys_fault, 1);
            provoke(k, w.decode, NULL, w.name, no_keys_fault, 1);
        } else {
            provoke(k, w.forward, NULL, w.name, needs_keys_fault, stateful(k));
            provoke(k, w.decode, NULL, w.name, needs_keys_fault, stateful(k));
        }
        provoke(k, NULL, w.backward, w.name, needs_keys_fault, 0);
    }
}

TEST_LIST(pattern_faults, WITH_PATTERN)
{
    EACH_WAY(k, w)
    {
        provoke(k, w.forward, NULL, w.name, pattern_fault, 0);
        provoke(k, w.forward, NULL, w.name, pattern_state_fault, 1);
        provoke(k, w.decode, NULL, w.name, pattern_state_fault, 1);
        if (!k->features) {
            provoke(k, w.forward, NULL, w.name, blocks_fault, 0);
            provoke(k, w.decode, NULL, w.name, blocks_fault, 0);
        }
        if (w.backward)
            provoke(k, NULL, w.backward, w.name, pattern_fault, 0);
        if (w.backward && !k->features)
            provoke(k, NULL, w.backward, w.name, blocks_fault, 0);
    }
}

/* Within a row of a list, key blocks rise: needs more of them than the victim has. */
TEST_LIST(block_rows, SPARSES)
{
    static const int32_t rows[][3] = {{0, 1, 2}, {0, 0, 2}, {0, 2, 1}, {1, 0, 2}, {0, 1, 3}, {-1, 1, 2}, {2, 2, 2}};
    int32_t offsets[] = {0, 0, 0, 3}, keys[3];
    nf_pattern p = {.block = k->block,
                    .block_heads = 1,
                    .block_rows = 3,
                    .block_count = 3,
                    .block_offsets = offsets,
                    .block_keys = keys};
    const shape s = {.q_tokens = 2 * k->block + 1, .norm = 2, .pattern = &p};
    call c = call_make(k, s);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        memcpy(keys, rows[i], sizeof keys);
        CHECK(call_run(&c, k->forward) == (i ? NF_E_BLOCKS : NF_OK), "row %d", (int)i);
        CHECK(!i || blank(c.out.data, c.out.bytes), "row %d: wrote something", (int)i);
    }
    call_free(&c);
    memcpy(keys, rows[0], sizeof keys);
    p.block_rows = 2;
    c = call_make(k, s);
    CHECK(call_run(&c, k->forward) == NF_E_BLOCKS, "a query block without a row");
    call_free(&c);
}

static const char *backward_fault(int which, victim *v, nf_status *expected)
{
    nf_args *a = &v->a;
    nf_grads *g = &v->g;
    const int dim = v->c.k->dim;
    FAULT(NF_OK, (void)0)
    FAULT(NF_OK, (a->out.data = NULL, a->lse = NULL))
    FAULT(NF_OK, (a->out.data = v->c.q.data, a->out.token_stride = -7)) /* not looked at */
    FAULT(NF_E_NULL, v->no_args = 1)
    FAULT(NF_E_NULL, v->no_grads = 1)
    FAULT(NF_E_NULL, g->out.data = NULL)
    FAULT(NF_E_NULL, g->dout.data = NULL)
    FAULT(NF_E_NULL, g->lse = NULL)
    FAULT(NF_E_NULL, g->dq.data = NULL)
    FAULT(NF_E_NULL, g->dk.data = NULL)
    FAULT(NF_E_NULL, g->dv.data = NULL)
    FAULT(NF_E_NULL, v->workspace = NULL)
    FAULT(NF_E_ALIGN, SHIFT(g->out.data, 2))
    FAULT(NF_E_ALIGN, SHIFT(g->dout.data, 1))
    FAULT(NF_E_ALIGN, g->lse = (const float *)(const void *)((const char *)g->lse + 2))
    FAULT(NF_E_ALIGN, g->dlse = (const float *)(const void *)((const char *)g->lse + 1))
    FAULT(NF_E_ALIGN, SHIFT(g->dk.data, 3))
    FAULT(NF_E_ALIGN, SHIFT(v->workspace, 4))
    FAULT(NF_E_STRIDE, g->out.token_stride = -1)
    FAULT(NF_E_STRIDE, g->dout.head_stride = dim - 1)
    FAULT(NF_E_STRIDE, g->dq.token_stride = dim)
    FAULT(NF_E_STRIDE, g->dk.head_stride = 1)
    FAULT(NF_E_STRIDE, g->dv.batch_stride = 2 * dim)
    FAULT(NF_E_OVERFLOW, g->dout.batch_stride = INT64_MAX)
    FAULT(NF_E_OVERFLOW, g->dv.token_stride = INT64_MAX / 2)
    FAULT(NF_E_WORKSPACE, v->bytes--)
    FAULT(NF_E_OVERLAP, g->dk.data = g->dq.data)
    FAULT(NF_E_OVERLAP, g->dv.data = (char *)g->dk.data + v->dk.bytes - 4)
    FAULT(NF_E_OVERLAP, g->dq.data = v->c.q.data)
    FAULT(NF_E_OVERLAP, g->dk.data = v->c.key.data)
    FAULT(NF_E_OVERLAP, g->dv.data = v->c.v.data)
    FAULT(NF_E_OVERLAP, g->dq.data = v->c.out.data)
    FAULT(NF_E_OVERLAP, g->dv.data = v->dout.data)
    FAULT(NF_E_OVERLAP, g->dk.data = v->c.lse.data + v->c.lse.bytes - 4)
    FAULT(NF_E_OVERLAP, g->dlse = (const float *)g->dv.data)
    FAULT(NF_E_OVERLAP, g->dv.data = v->c.workspace.data)
    FAULT(NF_E_OVERLAP, v->workspace = v->dout.data)
    FAULT(NF_E_OVERLAP, v->workspace = v->c.key.data)
    if (stateful(v->c.k)) {
        FAULT(NF_E_STATE, a->state = v->c.state.data)
    }
    return NULL;
}

/* The shape's faults that do not concern the forward's output. */
static const char *backward_shape_fault(int which, victim *v, nf_status *expected)
{
    const char *what = shape_fault(which, v, expected);
    if (what && (strstr(what, "out") || strstr(what, "lse")))
        *expected = NF_OK, v->a = v->c.a, v->a.state = NULL;
    return what;
}

TEST_EACH(backward_faults)
{
    EACH_WAY(k, w)
    {
        if (w.backward) {
            provoke(k, NULL, w.backward, w.name, backward_fault, 0);
            provoke(k, NULL, w.backward, w.name, backward_shape_fault, 0);
            if (k->features)
                provoke(k, NULL, w.backward, w.name, projection_fault, 0);
        }
    }
}

/* exact carries no state and needs no projection. */
TEST_LIST(no_state, EXACTS)
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

/* A dim of one entry has no use for its stride: any that is not negative gives the same bits. */
TEST_EACH(single_entries)
{
    static const int64_t strides[] = {1, INT64_MAX};
    const shape s = {.q_tokens = 1, .norm = 2, .seed = 1};
    EACH_WAY(k, w)
    {
        call c = call_make(k, s);
        block dense = block_make(c.out.bytes, 0);
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        memcpy(dense.data, c.out.data, dense.bytes);
        for (int i = 0; i < 2; i++) {
            const int64_t x = strides[i];
            c.a.q = (nf_input){c.q.data, x, x, x};
            c.a.k = (nf_input){c.key.data, x, x, x};
            c.a.v = (nf_input){c.v.data, x, x, x};
            c.a.out = (nf_output){c.out.data, x, x, x};
            CHECK(call_run(&c, w.forward) == NF_OK, "%s, stride %lld", w.name, (long long)x);
            CHECK(memcmp(c.out.data, dense.data, dense.bytes) == 0, "%s, stride %lld", w.name, (long long)x);
        }
        block_free(&dense);
        call_free(&c);
    }
}

/* One token a batch entry, out of rows of three: a dense batch stride follows the token stride. */
TEST_EACH(single_tokens)
{
    const shape s = {.batch = 2, .q_tokens = 3, .norm = 2, .seed = 1};
    EACH_WAY(k, w)
    {
        call c = call_make(k, s);
        block expected = block_make(c.out.bytes, 0);
        c.a.q_tokens = c.a.kv_tokens = 1;
        c.a.q.token_stride = c.a.q.batch_stride = c.a.k.token_stride = c.a.k.batch_stride = 3 * k->dim;
        c.a.v.token_stride = c.a.v.batch_stride = c.a.out.token_stride = c.a.out.batch_stride = 3 * k->dim;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        memcpy(expected.data, c.out.data, expected.bytes);
        c.a.q.batch_stride = c.a.k.batch_stride = c.a.v.batch_stride = c.a.out.batch_stride = 0;
        CHECK(call_run(&c, w.forward) == NF_OK, "%s", w.name);
        CHECK(memcmp(c.out.data, expected.data, expected.bytes) == 0, "%s", w.name);
        block_free(&expected);
        call_free(&c);
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
    FAULT(NF_E_SIZE, a->batch = 0)
    FAULT(NF_E_HEADS, a->kv_heads = 3)
    FAULT(NF_E_SCALE, a->scale = NAN)
    FAULT(NF_E_OVERFLOW, a->batch = INT64_MAX)
    FAULT(NF_E_ALIGN, SHIFT(a->state, 4))
    if (v->c.k->features) {
        FAULT(NF_E_NULL, a->projection = NULL)
        FAULT(NF_E_PROJECTION, p->magic = 0)
        FAULT(NF_E_ALIGN, SHIFT(a->projection, 4))
        FAULT(NF_E_OVERLAP, a->state = (unsigned char *)p + v->c.projection.bytes - NF_ALIGN)
    }
    if (v->c.k->block) {
        nf_pattern *pattern = patterned(v, DILATION | GAIN);
        FAULT(NF_E_NULL, a->pattern = NULL)
        FAULT(NF_E_WINDOW, pattern->window = -1)
        FAULT(NF_E_PATTERN, patterned(v, LISTED))
        FAULT(NF_E_OVERFLOW, pattern->window = pattern->globals = (int64_t)1 << 40)
        FAULT(NF_E_OVERLAP, a->state = v->c.pattern.data)
        FAULT(NF_E_OVERLAP, a->state = v->lists.data) /* the dilations; far longer than the lists: */
    }
    return NULL;
}

TEST_LIST(reset_faults, WITH_STATE)
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
    FAULT(NF_E_STATE, (a->unit_bytes = NF_ALIGN, b->unit_bytes = NF_ALIGN))
    FAULT(NF_E_STATE, (a->globals--, b->globals--))
    FAULT(NF_E_STATE, ((nf_state_unit *)(void *)(b + 1))->hash++)
    FAULT(NF_E_STATE, memset(m->a, 0, v->c.state.bytes))
    FAULT(NF_E_OVERLAP, m->dst = (unsigned char *)m->a + NF_ALIGN)
    FAULT(NF_E_OVERLAP, m->dst = (unsigned char *)m->b - NF_ALIGN)
    return NULL;
}

#define MERGING(X, y) FAVORS(X, y) LINEARS(X, y) SPARSES(X, y)
TEST_LIST(merge_faults, MERGING)
{
    for (int i = 0;; i++) {
        victim v = victim_make(k);
        merging m = {NULL, v.c.state.data, v.spare.data + v.c.state.bytes / 2 / NF_ALIGN * NF_ALIGN};
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

TEST_LIST(projection_faults, WITH_FEATURES)
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
    for (int i = 0; i < k->dim; i++) /* a row longer than features can be held: the sum of |w| exceeds 32000 */
        matrix[n - 1 - (size_t)i] = (i % 2 ? 32001.0f : -32001.0f) / (float)k->dim;
    CHECK(k->projection_from(p.data, matrix, 0) == NF_E_VALUE, "from a matrix too large");
    CHECK(k->projection_from(p.data, matrix, NF_KEEP_F32) == NF_E_VALUE, "from a matrix too large");
    for (size_t i = 0; i < n; i++)
        matrix[i] = 1;
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
    ((nf_projection_head *)(void *)p.data)->contract--;
    ((nf_projection_head *)(void *)p.data)->abi--;
    CHECK(k->projection_read(p.data, matrix) == NF_E_PROJECTION, "read an older version's");
    CHECK(matrix[0] == 1 && matrix[n - 1] == 1, "a refused read wrote");
    block_free(&p);
    block_free(&w);
}

static const char *calibration_fault(const kernel *k, int which, nf_calibration *s, float *data, nf_status *expected)
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
    FAULT(NF_OK, s->flags = 31)
    FAULT(NF_OK, (s->q = s->k = NULL, s->q_tokens = s->k_tokens = 0)) /* no sample */
    FAULT(NF_E_NULL, s->q = s->k = NULL)
    FAULT(NF_E_NULL, (s->q = NULL, s->q_tokens = 0))
    FAULT(NF_E_VALUE, (s->q = s->k = NULL, s->q_tokens = s->k_tokens = 0, s->tau = 2))
    FAULT(optimal(k) ? NF_OK : NF_E_VALUE, s->flags = NF_OPTIMAL_FEATURES)
    FAULT(NF_E_NULL, (s->q = s->k = NULL, s->q_tokens = s->k_tokens = 0, s->flags = NF_OPTIMAL_FEATURES))
    FAULT(NF_E_VALUE, s->flags = 64)
    FAULT(NF_E_VALUE, data[0] = NAN)
    FAULT(NF_E_VALUE, data[11] = INFINITY)
    return NULL;
}

TEST_LIST(calibration_faults, WITH_FEATURES)
{
    for (int i = 0;; i++) {
        block p = block_make(k->projection_bytes(), 0), data = block_make((size_t)k->dim * 40, 0);
        float *x = (float *)(void *)data.data;
        nf_calibration s = {x, x, 10, 10, 0, 0, 0, 0};
        nf_status expected = NF_OK, got;
        const char *what;
        for (int n = 0; n < 10 * k->dim; n++)
            x[n] = (float)(n % 7) - 2.5f;
        what = calibration_fault(k, i, &s, x, &expected);
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

/* A sample may not lie where the projection goes. */
TEST_LIST(calibration_overlap, WITH_FEATURES)
{
    const size_t bytes = k->projection_bytes(), row = (size_t)k->dim * sizeof(float);
    block all = block_make(bytes + 2 * row, 0), same = block_make(bytes + 2 * row, 0);
    float *const first = (float *)(void *)all.data, *const last = (float *)(void *)(all.data + bytes - sizeof(float));
    nf_calibration s = {first, first, 2, 2, 0, 0, 0, 0};
    float *const behind = (float *)(void *)(all.data + bytes);
    memset(all.data, 0, all.bytes);
    memset(same.data, 0, same.bytes);
    for (int i = 0; i < 3; i++) {
        s.q = i == 0 ? first : i == 1 ? last - 2 * k->dim + 1 : behind;
        s.k = i == 2 ? last : behind;
        CHECK(k->projection_init(all.data, 1, &s) == NF_E_OVERLAP, "case %d", i);
        CHECK(memcmp(all.data, same.data, all.bytes) == 0, "a refused call wrote a projection");
    }
    s.q = s.k = behind;
    CHECK(k->projection_init(all.data, 1, &s) == NF_OK, "a sample right behind the projection");
    block_free(&all), block_free(&same);
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
    for (int decode = 0; decode < (k->map == ORACLE_SOFTMAXQK ? 1 : 2); decode++) {
        if (decode && stateful(k))
            call_state(&c);
        CHECK(call_run(&c, decode ? v->decode : v->forward) == NF_OK, "%s", v->name);
        memcpy(first.data, c.out.data, first.bytes);
        if (decode && stateful(k))
            call_state(&c);
        CHECK(call_run(&c, decode ? k->decode : k->forward) == NF_OK, "entry");
        CHECK(memcmp(first.data, c.out.data, first.bytes) == 0, "the entry point does not run %s", v->name);
    }
    block_free(&first);
    call_free(&c);
}
