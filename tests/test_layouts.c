/* Tensors that take turns in one buffer, as fused layers keep q, k, v, what comes of them and the gradients: a call
 * takes them, with the bits of separate buffers, and refuses them as soon as two meet. */
#include "check.h"
#include "call.h"

#include "nearfar/args.h"

enum { Q, K, V, OUT, DOUT, DQ, DK, DV, SLOTS };

/* A buffer of all tensors, and the place of `slot` among its dims. */
typedef enum place {
    SLOT_BATCH_TOKEN_HEAD, /* one behind the other */
    BATCH_SLOT_TOKEN_HEAD,
    BATCH_TOKEN_SLOT_HEAD,
    BATCH_TOKEN_HEAD_SLOT,
    BATCH_HEAD_TOKEN_SLOT,
    LAYOUTS
} place;

typedef struct fused {
    place layout;
    int64_t batch, tokens, heads[SLOTS];
    int dim[SLOTS], element; /* element: bytes */
} fused;

static int of_keys(int slot)
{
    return slot == K || slot == V || slot == DK || slot == DV;
}

static fused fused_make(place slots, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int dim,
                        int values, int element)
{
    fused f = {slots, batch, tokens, {0}, {0}, element};
    for (int i = 0; i < SLOTS; i++) {
        f.heads[i] = of_keys(i) ? kv_heads : heads;
        f.dim[i] = i == V || i == OUT || i == DOUT || i == DV ? values : dim;
    }
    return f;
}

/* Elements in the slots before i, of a token or of one of its heads. */
static int64_t before(const fused *f, int i, int of_token)
{
    int64_t sum = 0;
    while (i-- > 0)
        sum += f->dim[i] * (of_token ? f->heads[i] : 1);
    return sum;
}

/* Where the slot stands behind the heads, each has place for every tensor, used or not. */
static size_t fused_bytes(const fused *f)
{
    const int64_t token = f->layout < BATCH_TOKEN_HEAD_SLOT ? before(f, SLOTS, 1) : f->heads[Q] * before(f, SLOTS, 0);
    return (size_t)(f->batch * f->tokens * token * f->element);
}

/* The tensor in slot i of a buffer. */
static nf_input slot(const fused *f, int i, unsigned char *data)
{
    const int64_t n = f->tokens, token = before(f, SLOTS, 1), head = before(f, SLOTS, 0), row = f->heads[i] * f->dim[i];
    int64_t at = before(f, i, f->layout < BATCH_TOKEN_HEAD_SLOT);
    nf_input t = {NULL, n * row, row, f->dim[i]};
    if (f->layout == SLOT_BATCH_TOKEN_HEAD)
        at *= f->batch * n;
    else if (f->layout == BATCH_SLOT_TOKEN_HEAD)
        at *= n, t.batch_stride = n * token;
    else if (f->layout == BATCH_TOKEN_SLOT_HEAD)
        t.batch_stride = n * token, t.token_stride = token;
    else if (f->layout == BATCH_TOKEN_HEAD_SLOT)
        t.batch_stride = n * f->heads[Q] * head, t.token_stride = f->heads[Q] * head, t.head_stride = head;
    else
        t.batch_stride = n * f->heads[Q] * head, t.token_stride = head, t.head_stride = n * head;
    t.data = data + at * f->element;
    return t;
}

/* The same, some elements away. */
static nf_input moved(nf_input t, int by, int element)
{
    t.data = (const unsigned char *)t.data + by * element;
    return t;
}

static nf_output written(nf_input t)
{
    return (nf_output){(void *)(uintptr_t)t.data, t.batch_stride, t.token_stride, t.head_stride};
}

/* ---- the rule ------------------------------------------------------------------------------------------------------
 */

static int64_t below(oracle_random *r, int64_t n)
{
    return (int64_t)(oracle_next(r) % (uint64_t)n);
}

/* Two tensors at random in an arena, every byte marked: none that meet are taken for apart. */
Test(layouts, rule)
{
    enum { ARENA = 1 << 13 };
    static unsigned char arena[ARENA], mark[ARENA];
    oracle_random r = {1};
    int pairs = 0, meeting = 0, interleaved = 0;
    for (int round = 0; round < (QUICK ? 20000 : 400000); round++) {
        const nf_contract c = {.element = (size_t)1 << below(&r, 3)};
        const int64_t period = 1 + below(&r, 12);
        nf_memory m = {0};
        int valid = 1, met = 0;
        memset(mark, 0, sizeof mark);
        for (int i = 0; i < 2 && valid; i++) {
            const int64_t dim = 1 + below(&r, 3), batch = 1 + below(&r, 4), tokens = 1 + below(&r, 4);
            const int64_t heads = 1 + below(&r, 4);
            int64_t stride[3];
            nf_input t;
            for (int j = 0; j < 3; j++) { /* dense, a multiple of the period or anything */
                const int64_t how = below(&r, 8);
                stride[j] = how == 0 ? 0 : how < 6 ? period * below(&r, 12) : below(&r, 100);
            }
            t = (nf_input){arena + (size_t)below(&r, 64) * c.element, stride[0], stride[1], stride[2]};
            valid = nf_claim_tensor(&m, &c, dim, batch, tokens, heads, NF_TENSOR(t), i) == NF_OK &&
                    (const unsigned char *)t.data + m.part[i].bytes <= arena + ARENA;
            for (int64_t n = 0; n < batch * tokens * heads && valid; n++) {
                const int64_t at = n / heads / tokens * t.batch_stride + n / heads % tokens * t.token_stride +
                                   n % heads * t.head_stride;
                unsigned char *row = mark + ((const unsigned char *)t.data - arena) + at * (int64_t)c.element;
                for (size_t b = 0; b < (size_t)dim * c.element; b++)
                    i ? (met |= row[b]) : (row[b] = 1);
            }
        }
        if (valid) {
            const int apart = !nf_meet(&m);
            CHECK(!met || !apart, "round %d: tensors that meet are taken for apart", round);
            pairs++;
            meeting += met;
            interleaved += apart && nf_overlap(m.part[0].at, m.part[0].bytes, m.part[1].at, m.part[1].bytes);
        }
    }
    CHECK(pairs > 1000 && meeting > pairs / 10 && interleaved > pairs / 50, "%d pairs: %d meet, %d interleave", pairs,
          meeting, interleaved);
}

/* Every layout of any size is taken, with fewer tokens than it has place for, too; one element away it is not. */
Test(layouts, accepted)
{
    oracle_random r = {2};
    for (int round = 0; round < (QUICK ? 2000 : 50000); round++) {
        const int64_t kv_heads = 1 + below(&r, 4), heads = kv_heads * (1 + below(&r, 3)), batch = 1 + below(&r, 3);
        const int dim = 8 * (1 + (int)below(&r, 9)), values = 8 * (1 + (int)below(&r, 9));
        const fused f = fused_make((place)(round % LAYOUTS), batch, 1 + below(&r, 9), heads, kv_heads, dim, values,
                                   below(&r, 2) ? 4 : 2);
        const int64_t queries = 1 + below(&r, f.tokens), keys = 1 + below(&r, f.tokens);
        const nf_contract c = {.element = (size_t)f.element};
        unsigned char *const data = (unsigned char *)(uintptr_t)(4096 + 4 * below(&r, 1000));
        const int away = (int)below(&r, SLOTS);
        for (int meet = 0; meet < 2; meet++) {
            nf_memory m = {0};
            for (int i = 0; i < SLOTS; i++) {
                const int64_t tokens = meet ? f.tokens : of_keys(i) ? keys : queries;
                nf_input t = slot(&f, i, data);
                if (t.batch_stride == tokens * t.token_stride && below(&r, 2))
                    t.batch_stride = 0;
                if (t.token_stride == f.heads[i] * f.dim[i] && below(&r, 2))
                    t.token_stride = 0;
                if (meet && i == away)
                    t = moved(t, away ? -1 : 1, f.element);
                CHECK(nf_claim_tensor(&m, &c, f.dim[i], batch, tokens, f.heads[i], NF_TENSOR(t), 1) == NF_OK,
                      "round %d: slot %d", round, i);
            }
            CHECK(nf_meet(&m) == meet, "round %d: layout %d is %s", round, (int)f.layout, meet ? "taken" : "refused");
        }
    }
}

/* ---- kernels -------------------------------------------------------------------------------------------------------
 */

/* A call whose tensors stand in one buffer. */
typedef struct scene {
    call *c; /* the numbers of q, k, v and dout; what else a call needs */
    fused f;
    block b;
    nf_args a;
    nf_grads g;
} scene;

/* Row n of slot i, [batch][token][head]. */
static unsigned char *row_in(const scene *s, int i, int64_t n)
{
    const int64_t heads = s->f.heads[i], tokens = s->f.tokens;
    const nf_input t = slot(&s->f, i, s->b.data);
    return (unsigned char *)(uintptr_t)t.data +
           (n / heads / tokens * t.batch_stride + n / heads % tokens * t.token_stride + n % heads * t.head_stride) *
               s->f.element;
}

static int64_t rows_in(const scene *s, int i)
{
    return s->f.batch * s->f.tokens * s->f.heads[i];
}

static scene scene_make(call *c, fused f)
{
    scene s;
    const block *const numbers[] = {&c->q, &c->key, &c->v, NULL, &c->q};
    const int dim = c->k->dim, f16 = strstr(c->k->name, "_f16_") != NULL;
    unsigned char *data;
    memset(&s, 0, sizeof s);
    s.c = c, s.f = f, s.b = block_make(fused_bytes(&f), 0), s.a = c->a;
    data = s.b.data;
    for (int i = Q; i <= DOUT; i++)
        for (int64_t n = 0; n < (i == OUT ? 0 : rows_in(&s, i)); n++)
            for (int d = 0; d < f.dim[i]; d++) {
                const float x = ((const float *)(const void *)numbers[i]->data)[n * dim + d % dim];
                if (f.element == 4)
                    ((float *)(void *)row_in(&s, i, n))[d] = x;
                else
                    ((uint16_t *)(void *)row_in(&s, i, n))[d] = oracle_half_of(f16, x);
            }
    s.a.q = slot(&f, Q, data), s.a.k = slot(&f, K, data), s.a.v = slot(&f, V, data);
    s.a.out = written(slot(&f, OUT, data));
    s.g.out = slot(&f, OUT, data), s.g.dout = slot(&f, DOUT, data), s.g.lse = c->a.lse;
    s.g.dq = written(slot(&f, DQ, data)), s.g.dk = written(slot(&f, DK, data)), s.g.dv = written(slot(&f, DV, data));
    return s;
}

static void scene_run(scene *s, way w)
{
    call_blank(s->c);
    CHECK(w.forward(&s->a, s->c->workspace.data, s->c->bytes) == NF_OK, "%s: layout %d", w.name, (int)s->f.layout);
    if (w.backward)
        CHECK(w.backward(&s->a, &s->g, s->c->workspace.data, s->c->bytes) == NF_OK, "%s: layout %d, backward", w.name,
              (int)s->f.layout);
}

/* out or gradients one element away meet a neighbour: refused, and nothing is written. */
static void scene_refuse(scene *s, way w)
{
    const call *c = s->c;
    for (int i = OUT; i < (w.backward ? SLOTS : OUT + 1); i++) {
        const nf_output t = written(moved(slot(&s->f, i, s->b.data), -1, s->f.element));
        nf_args a = s->a;
        nf_grads g = s->g;
        if (i == DOUT)
            continue;
        *(i == OUT ? &a.out : i == DQ ? &g.dq : i == DK ? &g.dk : &g.dv) = t;
        CHECK((i == OUT ? w.forward(&a, c->workspace.data, c->bytes)
                        : w.backward(&a, &g, c->workspace.data, c->bytes)) == NF_E_OVERLAP,
              "%s: layout %d, slot %d", w.name, (int)s->f.layout, i);
    }
}

/* Every layout gives the bits of separate buffers, and writes nothing but its rows. */
static void same_bits(const kernel *k)
{
    const int values = number_in(k->name, 'v') ? number_in(k->name, 'v') : k->dim;
    const shape table[] = {{.batch = 2, .heads = 4, .kv_heads = 2, .q_tokens = 37 + 2 * k->block, .norm = 3, .seed = 1},
                           {.batch = 3, .heads = 2, .kv_heads = 2, .q_tokens = 1, .norm = 3, .seed = 2}};
    for (int i = 0; i < 2; i++) {
        const shape x = table[i];
        call c = call_make(k, x);
        const fused f = fused_make(SLOT_BATCH_TOKEN_HEAD, x.batch, x.q_tokens, x.heads, x.kv_heads, k->dim, values,
                                   strstr(k->name, "_f32_") ? 4 : 2);
        scene separate = scene_make(&c, f);
        block lse = block_make(c.lse.bytes, 0);
        EACH_WAY(k, w)
        {
            scene_run(&separate, w);
            memcpy(lse.data, c.lse.data, lse.bytes);
            for (int l = 1; l < LAYOUTS; l++) {
                fused g = f;
                scene s;
                block given;
                g.layout = (place)l;
                s = scene_make(&c, g);
                given = block_make(s.b.bytes, 0);
                memcpy(given.data, s.b.data, s.b.bytes);
                scene_refuse(&s, w);
                scene_run(&s, w);
                CHECK(memcmp(lse.data, c.lse.data, lse.bytes) == 0, "%s: layout %d, lse", w.name, l);
                for (int o = OUT; o < SLOTS; o++)
                    for (int64_t n = 0; n < rows_in(&s, o); n++) {
                        unsigned char *const row = row_in(&s, o, n);
                        const size_t bytes = (size_t)(g.dim[o] * g.element);
                        CHECK(memcmp(row, row_in(&separate, o, n), bytes) == 0, "%s: layout %d, slot %d, row %d",
                              w.name, l, o, (int)n);
                        if (o != DOUT)
                            memset(row, BLANK, bytes);
                    }
                CHECK(memcmp(given.data, s.b.data, s.b.bytes) == 0 && block_intact(&s.b),
                      "%s: layout %d, written beside the rows", w.name, l);
                block_free(&s.b), block_free(&given);
            }
        }
        block_free(&separate.b), block_free(&lse);
        call_free(&c);
    }
}

#define LAID_OUT(contract, ...) \
    extern const kernel kernel_##contract; \
    Test(same_bits, contract) \
    { \
        const kernel k = kernel_of(&kernel_##contract); \
        same_bits(&k); \
    }
CONTRACTS(LAID_OUT, unused)
OTHER_LINEARS(LAID_OUT, unused)
TWINS(LAID_OUT, unused)
