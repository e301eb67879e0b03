/* ---- arguments: checked and resolved before any work ---- */
#ifndef NF_ARGS_READY
#define NF_ARGS_READY

#include <string.h>

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIP__)
#define NF_BOTH __attribute__((host, device, unused)) static
#else
#define NF_BOTH __attribute__((unused)) static
#endif
#define NF_INLINE static inline __attribute__((always_inline, unused))
#define NF_BOTH_INLINE NF_BOTH inline __attribute__((always_inline))

#define NF_MAGIC_PROJECTION 0x5046524eu /* "NRFP" */
#define NF_MAGIC_STATE 0x5346524eu      /* "NRFS" */
/* Larger inputs (scaled, in log2 units) are cut off: features stay below 2^23, where whole numbers are exact; exact
 * scores do not overflow. */
#define NF_INPUT_LIMIT 256.0f
#define NF_SCORE_LIMIT 1125899906842624.0f
#define NF_NO_KEY (-1e30f) /* the reference R of a feature that has seen no key */

struct nf_plan;
struct nf_memory;

/* What args->eps may be: anything (nobody looks at it); 0; also positive under the full mask; positive by default. */
enum { NF_EPS_IGNORED, NF_EPS_NONE, NF_EPS_FULL, NF_EPS_ALWAYS };
#define NF_EPS_DEFAULT 1e-3f

/* What the common code must know of a contract. */
typedef struct nf_contract {
    uint64_t hash;         /* FNV-1a of the contract's name */
    int64_t dim, values;   /* D of queries and keys, V of values and outputs */
    int64_t features;      /* of a far field; 0: none */
    int64_t block;         /* tokens of a block of the pattern; 0: takes no pattern */
    size_t element;        /* bytes of a tensor element */
    size_t workspace;      /* bytes, enough for every variant of the kernel */
    size_t projection;     /* bytes of one projection; 0: takes none */
    float default_scale;   /* 1/sqrt(D), or 1 */
    int decays, full_only; /* takes decay and NF_UNNORMALISED; no causal mask */
    int32_t eps;           /* NF_EPS_... */
    int device; /* projection, state, decay and cu_tokens lie in a GPU's memory, where the host cannot look */
    /* What only some operators have, or NULL: a pattern or decays, the memory that these take, states that merge. */
    nf_status (*check)(struct nf_plan *plan);
    void (*claim)(const struct nf_plan *plan, struct nf_memory *memory);
    void (*merge)(const struct nf_contract *contract, const nf_state_head *head, nf_state_unit *to,
                  const nf_state_unit *a, const nf_state_unit *b);
} nf_contract;

/* One unit of work: the queries of one group of heads against their kv head. */
typedef struct nf_unit {
    const void *q, *k, *v;
    void *out;
    float *lse;
    int64_t q_tokens, kv_tokens;
    int64_t q_stride, k_stride, v_stride, out_stride; /* elements from token to token */
    int64_t q_head, out_head, lse_head;               /* elements from query head to query head */
    int64_t group;                                    /* query heads that share the kv head */
    float scale, decay, eps;
    int32_t mask;
    uint32_t flags;
    const void *projection;
    nf_state_unit *state;
    const nf_grads *grads; /* the unit's, with strides as in nf_args; NULL in a forward */
    /* of operators over a pattern */
    const struct nf_pattern *pattern;
    int64_t first_head;           /* the group's first query head */
    int64_t past;                 /* position of the call's first key */
    int64_t window;               /* sparse: tokens; hybrid: whole blocks before the query's own */
    int64_t globals, ring;        /* rows of the state's near field */
    float *near_key, *near_value; /* [globals + ring][D] in the state, or NULL */
} nf_unit;

/* The arguments with every default filled in. */
typedef struct nf_plan {
    const nf_contract *contract;
    nf_args args;
    const nf_grads *grads; /* NULL in a forward */
    int64_t group, begin, end, units;
    int64_t window, globals, ring; /* as in nf_unit */
    uint32_t pattern_flags;
    size_t state_unit, state_bytes;
} nf_plan;

typedef void (*nf_unit_fn)(const nf_unit *unit, void *workspace);

/* a * b, or -1 where the product (or an operand) leaves the range of sizes. */
static int64_t nf_product(int64_t a, int64_t b)
{
    const int64_t limit = sizeof(size_t) < 8 ? INT32_MAX : (int64_t)1 << 47;
    if (a < 0 || b < 0 || (b > 0 && a > limit / b))
        return -1;
    return a * b;
}

NF_BOTH uint64_t nf_hash(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ p[i]) * 0x100000001b3u;
    return hash;
}

/* Square root by Newton's rule: no libm, the same bits everywhere. */
NF_BOTH double nf_sqrt(double x)
{
    uint64_t bits;
    double y;
    if (!(x > 0))
        return 0;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits = (bits >> 1) + ((uint64_t)1023 << 51);
    __builtin_memcpy(&y, &bits, sizeof y);
    for (int i = 0; i < 5; i++)
        y = 0.5 * (y + x / y);
    return y;
}

/* Natural logarithm of a positive normal float, relative error below 1e-12, without libm. Inline, as nf_lse: a call
 * from code with vectors to code without costs some processors 50 ns (GCC does not clear upper halves). */
NF_BOTH_INLINE double nf_log(double x)
{
    uint64_t bits;
    int64_t exponent;
    double m, s, s2;
    __builtin_memcpy(&bits, &x, sizeof bits);
    exponent = (int64_t)((bits >> 52) & 2047) - 1023;
    bits = (bits & 0xfffffffffffffu) | ((uint64_t)1023 << 52);
    __builtin_memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        exponent++;
    }
    s = (m - 1) / (m + 1);
    s2 = s * s;
    m = 2 * s *
        (1 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9 + s2 * (1.0 / 11 + s2 * (1.0 / 13)))))));
    return m + 0.69314718055994531 * (double)exponent;
}

NF_BOTH_INLINE uint32_t nf_bits(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* ln of den * 2^exponent, plus shift; -inf for an empty sum. */
NF_BOTH_INLINE float nf_lse(float den, double exponent, double shift)
{
    if (nf_bits(den) << 1 == 0) {
        const uint32_t bits = 0xff800000u;
        __builtin_memcpy(&den, &bits, sizeof den);
    } else if (den > 0) {
        den = (float)(nf_log((double)den) + 0.69314718055994531 * exponent + shift);
    }
    return den;
}

NF_BOTH inline int nf_aligned(const void *p, size_t alignment)
{
    return ((uintptr_t)p & (alignment - 1)) == 0;
}

NF_BOTH inline int nf_finite(float x)
{
    return (nf_bits(x) & 0x7f800000u) != 0x7f800000u;
}

/* Is this the lse of a query that saw no key, -inf? */
NF_BOTH inline int nf_unseen(float lse)
{
    return nf_bits(lse) == 0xff800000u;
}

/* x > limit >= 0, or NaN; from the bits: no compiler flag changes the answer. */
NF_BOTH inline int nf_beyond(float x, float limit)
{
    const uint32_t bits = nf_bits(x);
    return (bits & 0x7fffffffu) > 0x7f800000u || (!(bits >> 31) && bits > nf_bits(limit));
}

/* 2^step of a whole step <= 0, exact; 0 below the normal numbers. */
NF_BOTH float nf_power_of_two(float step)
{
    uint32_t bits;
    float x;
    if (!(step >= -126.0f))
        return 0;
    bits = (uint32_t)((int32_t)step + 127) << 23;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

static int nf_overlap(const void *a, size_t na, const void *b, size_t nb)
{
    const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return a && b && na && nb && (x < y ? y - x < na : x - y < nb);
}

NF_BOTH float nf_decay(const nf_contract *c, const nf_plan *p, int64_t unit)
{
    const nf_args *a = &p->args;
    return c->decays && a->decay ? a->decay[unit % a->kv_heads] : 0;
}

NF_BOTH const nf_projection_head *nf_projection_at(const nf_args *a, int64_t head)
{
    return (const nf_projection_head *)(const void *)((const char *)a->projection +
                                                      (size_t)head * a->projection_stride);
}

/* What ties a state to the features, scale, decay and pattern it was made with. */
NF_BOTH uint64_t nf_state_hash(const nf_contract *c, const nf_plan *p, int64_t unit)
{
    const nf_args *a = &p->args;
    uint64_t hash = c->hash;
    if (c->decays) {
        const float numbers[2] = {a->scale, nf_decay(c, p, unit)};
        hash = nf_hash(hash, numbers, sizeof numbers);
    }
    if (c->projection) {
        hash = nf_hash(nf_projection_at(a, unit % a->kv_heads)->hash, &a->scale, sizeof a->scale);
        if (a->eps > 0)
            hash = nf_hash(hash, &a->eps, sizeof a->eps);
    }
    if (c->block) {
        const int64_t pattern[3] = {p->window, p->globals, (int64_t)p->pattern_flags};
        hash = nf_hash(hash, pattern, sizeof pattern);
    }
    return hash;
}

NF_BOTH nf_state_unit *nf_state_at(const nf_plan *p, int64_t unit)
{
    return (nf_state_unit *)(void *)((char *)p->args.state + sizeof(nf_state_head) + (size_t)unit * p->state_unit);
}

NF_BOTH int nf_state_fits(const nf_contract *c, const nf_plan *p, const nf_state_head *head)
{
    return head->magic == NF_MAGIC_STATE && head->abi == NF_CORE_ABI && head->contract == c->hash &&
           head->units == p->units && head->unit_bytes == (int64_t)p->state_unit && head->globals == p->globals &&
           head->ring == p->ring;
}

static nf_status nf_check_eps(const nf_contract *c, nf_args *a)
{
    const int full = a->mask == NF_FULL && !a->state;
    if (c->eps == NF_EPS_IGNORED)
        a->eps = 0;
    else if (!nf_finite(a->eps) || (a->eps != 0 && !(a->eps >= 1e-9f && a->eps <= 1)))
        return NF_E_EPS;
    else if (a->eps > 0 && (c->eps == NF_EPS_NONE || (c->eps == NF_EPS_FULL && !full)))
        return NF_E_EPS;
    else if (a->eps == 0 && c->eps == NF_EPS_ALWAYS)
        a->eps = NF_EPS_DEFAULT;
    return NF_OK;
}

/* Sizes, heads, mask, scale, decay, eps and packing, with their defaults. Reads no tensor. */
static nf_status nf_check_shape(const nf_contract *c, const nf_args *args, nf_plan *p)
{
    nf_args *a = &p->args;
    memset(p, 0, sizeof *p);
    if (!args)
        return NF_E_NULL;
    *a = *args;
    p->contract = c;
    p->state_unit = sizeof(nf_state_unit) + (size_t)(c->features * (c->values + 2)) * sizeof(float);
    if (a->batch < 1 || a->heads < 1 || a->kv_heads < 0 || a->q_tokens < 0 || a->kv_tokens < 0 || a->sequences < 0)
        return NF_E_SIZE;
    if (a->kv_heads == 0)
        a->kv_heads = a->heads;
    if (a->heads % a->kv_heads != 0)
        return NF_E_HEADS;
    if (a->flags & ~(NF_UNNORMALISED | NF_NO_KEYS))
        return NF_E_VALUE;
    if (a->mask != NF_CAUSAL && a->mask != NF_FULL)
        return NF_E_MASK;
    if (a->flags & NF_NO_KEYS) {
        if (!c->features || c->block)
            return NF_E_VALUE;
        if (a->kv_tokens)
            return NF_E_TOKENS;
        a->mask = NF_FULL;
    } else if (a->kv_tokens == 0) {
        a->kv_tokens = a->q_tokens;
    }
    if (a->mask == NF_CAUSAL && c->full_only)
        return NF_E_MASK;
    if (a->mask == NF_CAUSAL && a->kv_tokens < a->q_tokens)
        return NF_E_TOKENS;
    if (!(a->scale >= 0 && a->scale <= 1e30f) || !nf_finite(a->scale))
        return NF_E_SCALE;
    if (a->scale == 0)
        a->scale = c->default_scale;
    if (nf_check_eps(c, a) != NF_OK)
        return NF_E_EPS;
    p->group = a->heads / a->kv_heads;
    if (a->cu_tokens) {
        if (!nf_aligned(a->cu_tokens, sizeof(int32_t)))
            return NF_E_ALIGN;
        if (a->sequences < 1 || a->batch != 1 || (a->kv_tokens && a->kv_tokens != a->q_tokens))
            return NF_E_PACKED;
        if (!c->device && (a->cu_tokens[0] != 0 || a->cu_tokens[a->sequences] != a->q_tokens))
            return NF_E_PACKED;
        for (int64_t s = 0; s < a->sequences && !c->device; s++)
            if (a->cu_tokens[s + 1] < a->cu_tokens[s])
                return NF_E_PACKED;
    } else if (a->sequences) {
        return NF_E_PACKED;
    }
    p->units = nf_product(a->cu_tokens ? a->sequences : a->batch, a->kv_heads);
    if (p->units < 0 ||
        nf_product(nf_product(nf_product(a->batch, a->heads), a->q_tokens), (c->dim + c->values) * 8) < 0 ||
        nf_product(nf_product(nf_product(a->batch, a->kv_heads), a->kv_tokens), (c->dim + c->values) * 8) < 0)
        return NF_E_OVERFLOW;
    if (c->check) {
        const nf_status status = c->check(p);
        if (status != NF_OK)
            return status;
    }
    if (nf_product(p->units, (int64_t)p->state_unit + 1) < 0) {
        if (a->state || !c->block)
            return NF_E_OVERFLOW;
        p->state_unit = 0; /* a window that no state could hold */
    }
    p->state_bytes =
        (c->features || c->block) && p->state_unit ? sizeof(nf_state_head) + (size_t)p->units * p->state_unit : 0;
    if (a->split_begin < 0 || a->split_count < 0 || a->split_begin > p->units ||
        a->split_count > p->units - a->split_begin)
        return NF_E_SPLIT;
    p->begin = a->split_begin;
    p->end = a->split_count ? a->split_begin + a->split_count : p->units;
    return NF_OK;
}

/* Bytes from the call's first projection to the end of its last. */
static size_t nf_projection_extent(const nf_plan *p)
{
    const nf_args *a = &p->args;
    return p->contract->projection + (a->projection_stride ? (size_t)(a->kv_heads - 1) * a->projection_stride : 0);
}

static nf_status nf_check_projection(const nf_plan *p)
{
    const nf_args *a = &p->args;
    if (!p->contract->projection)
        return NF_OK;
    if (!a->projection)
        return NF_E_NULL;
    if (!nf_aligned(a->projection, NF_ALIGN) || a->projection_stride % NF_ALIGN)
        return NF_E_ALIGN;
    if (a->projection_stride && a->projection_stride < p->contract->projection)
        return NF_E_STRIDE;
    if (nf_product(a->kv_heads, (int64_t)a->projection_stride) < 0)
        return NF_E_OVERFLOW;
    for (int64_t h = 0; h < (a->projection_stride ? a->kv_heads : 1) && !p->contract->device; h++) {
        const nf_projection_head *head = nf_projection_at(a, h);
        if (head->magic != NF_MAGIC_PROJECTION || head->abi != NF_CORE_ABI || head->contract != p->contract->hash)
            return NF_E_PROJECTION;
        if (head->calibrated && a->eps > 0)
            return NF_E_EPS;
    }
    return NF_OK;
}

/* Units outside the split are not looked at. */
static nf_status nf_check_state(const nf_plan *p)
{
    const nf_args *a = &p->args;
    if (!a->state)
        return NF_OK;
    if (!p->state_bytes)
        return NF_E_STATE;
    if (!nf_aligned(a->state, NF_ALIGN))
        return NF_E_ALIGN;
    if (p->contract->device)
        return NF_OK;
    if (!nf_state_fits(p->contract, p, (const nf_state_head *)a->state))
        return NF_E_STATE;
    for (int64_t u = p->begin; u < p->end; u++) {
        const nf_state_unit *unit = nf_state_at(p, u);
        if (unit->hash != nf_state_hash(p->contract, p, u) || unit->tokens < 0 || unit->tokens > (int64_t)1 << 47)
            return NF_E_STATE;
    }
    return NF_OK;
}

typedef struct nf_part {
    const void *at;
    size_t bytes;
    int written;
    size_t stride[3], steps[3]; /* a tensor's: bytes, count - 1 */
} nf_part;

typedef struct nf_memory {
    int count;
    nf_part part[20];
} nf_memory;

static nf_part *nf_claim(nf_memory *m, const void *at, size_t bytes, int written)
{
    const nf_part part = {at, bytes, written, {0}, {0}};
    m->part[m->count] = part;
    return &m->part[m->count++];
}

/* Are two tensors apart modulo a stride? Modulo p each lies in [at, at + width), width its bytes less the whole p in
 * its steps: they are if a's width ends before b begins, and b's before a begins again. */
static int nf_apart(const nf_part *a, const nf_part *b)
{
    for (int i = 0; i < 6 && a->stride[0] && b->stride[0]; i++) {
        const size_t p = i < 3 ? a->stride[i] : b->stride[i - 3];
        const size_t from = ((uintptr_t)b->at % p + p - (uintptr_t)a->at % p) % p;
        size_t width = a->bytes, end = from + b->bytes;
        for (int j = 0; j < 3; j++) {
            width -= a->steps[j] * (a->stride[j] / p * p);
            end -= b->steps[j] * (b->stride[j] / p * p);
        }
        if (width <= from && end <= p)
            return 1;
    }
    return 0;
}

/* Does anything written meet anything else? */
static int nf_meet(const nf_memory *m)
{
    for (const nf_part *a = m->part; a < m->part + m->count; a++)
        for (const nf_part *b = m->part; b < a; b++)
            if ((a->written || b->written) && nf_overlap(a->at, a->bytes, b->at, b->bytes) && !nf_apart(a, b))
                return 1;
    return 0;
}

/* A tensor's data and strides. */
#define NF_TENSOR(t) (t).data, &(t).batch_stride, &(t).token_stride, &(t).head_stride

/* Fill in a tensor's dense strides, and claim its memory. */
static nf_status nf_claim_tensor(nf_memory *m, const nf_contract *c, int64_t dim, int64_t batch, int64_t tokens,
                                 int64_t heads, const void *data, int64_t *batch_stride, int64_t *token_stride,
                                 int64_t *head_stride, int written)
{
    const int64_t width = nf_product(heads, dim), row = *token_stride ? *token_stride : width;
    int64_t count[3] = {heads, tokens, batch}, stride[3], extent = dim;
    nf_part *part = nf_claim(m, data, 0, written);
    stride[0] = *head_stride && heads > 1 ? *head_stride : dim;
    stride[1] = tokens > 1 ? row : width;
    stride[2] = batch == 1 ? width : *batch_stride ? *batch_stride : nf_product(tokens, row);
    if (*head_stride < 0 || *token_stride < 0 || *batch_stride < 0)
        return NF_E_STRIDE;
    if (width < 0 || stride[2] < 0)
        return NF_E_OVERFLOW;
    *head_stride = stride[0], *token_stride = stride[1], *batch_stride = stride[2];
    for (int i = 0; i < 3; i++) { /* smallest stride first */
        int64_t *s = stride + i % 2, *n = count + i % 2;
        const int64_t low = s[1], few = n[1];
        if (s[0] > low)
            s[1] = s[0], n[1] = n[0], s[0] = low, n[0] = few;
    }
    for (int i = 0; i < 3 && tokens > 0; i++) {
        const int64_t reach = nf_product(count[i] - 1, stride[i]);
        if (reach < 0 || nf_product(extent + reach, (int64_t)c->element) < 0)
            return NF_E_OVERFLOW;
        if (stride[i] < dim || (written && count[i] > 1 && stride[i] < extent))
            return NF_E_STRIDE;
        extent += reach;
        part->stride[i] = (size_t)stride[i] * c->element, part->steps[i] = (size_t)count[i] - 1;
    }
    part->bytes = tokens > 0 ? (size_t)extent * c->element : 0;
    if (part->bytes && !data)
        return NF_E_NULL;
    return part->bytes && !nf_aligned(data, c->element) ? NF_E_ALIGN : NF_OK;
}

static void nf_claim_constants(const nf_plan *p, nf_memory *m)
{
    const nf_args *a = &p->args;
    nf_claim(m, a->projection, p->contract->projection ? nf_projection_extent(p) : 0, 0);
    nf_claim(m, a->cu_tokens, ((size_t)a->sequences + 1) * sizeof(int32_t), 0);
    if (p->contract->claim)
        p->contract->claim(p, m);
}

/* Claim a tensor of the call's queries or keys. */
#define NF_CLAIM_Q(m, dim, tensor, written) \
    nf_claim_tensor(m, c, dim, a->batch, a->q_tokens, a->heads, NF_TENSOR(tensor), written)
#define NF_CLAIM_K(m, dim, tensor, written) \
    nf_claim_tensor(m, c, dim, a->batch, a->kv_tokens, a->kv_heads, NF_TENSOR(tensor), written)

static nf_status nf_check_inputs(nf_plan *p, nf_memory *m)
{
    const nf_contract *c = p->contract;
    nf_args *a = &p->args;
    nf_status status;
    if ((status = NF_CLAIM_Q(m, c->dim, a->q, 0)) || (status = NF_CLAIM_K(m, c->dim, a->k, 0)) ||
        (status = NF_CLAIM_K(m, c->values, a->v, 0)) || (status = nf_check_projection(p)))
        return status;
    nf_claim_constants(p, m);
    return NF_OK;
}

static nf_status nf_check_workspace(nf_memory *m, const nf_contract *c, const void *workspace, size_t bytes)
{
    nf_claim(m, workspace, c->workspace, 1);
    if (!workspace)
        return NF_E_NULL;
    if (!nf_aligned(workspace, NF_ALIGN))
        return NF_E_ALIGN;
    return bytes < c->workspace ? NF_E_WORKSPACE : NF_OK;
}

/* Everything about a forward or decode. Writes nothing but *p. */
NF_UNUSED static nf_status nf_check(const nf_contract *c, const nf_args *args, void *workspace, size_t bytes,
                                    int decode, nf_plan *p)
{
    const int stateful = c->features || c->block;
    nf_status status = nf_check_shape(c, args, p);
    nf_args *a = &p->args;
    const int alone = (a->flags & NF_NO_KEYS) != 0; /* a decode then takes in nothing */
    nf_memory m;
    m.count = 0;
    if (status != NF_OK)
        return status;
    if (alone && !a->state)
        return NF_E_NULL;
    decode = decode && !alone;
    if (decode && a->mask != NF_CAUSAL)
        return NF_E_MASK;
    if (decode && c->features && !a->state)
        return NF_E_NULL;
    if (decode && stateful && a->state && a->kv_tokens != a->q_tokens)
        return NF_E_TOKENS;
    if ((status = nf_check_inputs(p, &m)) || (status = NF_CLAIM_Q(&m, c->values, a->out, 1)) ||
        (status = nf_check_state(p)) || (status = nf_check_workspace(&m, c, workspace, bytes)))
        return status;
    if (!nf_aligned(a->lse, sizeof(float)))
        return NF_E_ALIGN;
    nf_claim(&m, a->lse, (size_t)(a->batch * a->heads * a->q_tokens) * sizeof(float), 1);
    nf_claim(&m, a->state, p->state_bytes, !alone);
    return nf_meet(&m) ? NF_E_OVERLAP : NF_OK;
}

/* Everything about a backward; *g becomes grads with dense strides filled in. */
NF_UNUSED static nf_status nf_check_backward(const nf_contract *c, const nf_args *args, const nf_grads *grads,
                                             nf_grads *g, void *workspace, size_t bytes, nf_plan *p)
{
    nf_status status = grads ? nf_check_shape(c, args, p) : NF_E_NULL;
    const nf_args *a = &p->args;
    size_t rows;
    nf_memory m;
    m.count = 0;
    if (status != NF_OK)
        return status;
    if (a->flags & NF_NO_KEYS)
        return NF_E_VALUE;
    if (a->state)
        return NF_E_STATE;
    if (a->eps > 0 && c->eps == NF_EPS_FULL)
        return NF_E_EPS;
    *g = *grads;
    if ((status = nf_check_inputs(p, &m)) || (status = NF_CLAIM_Q(&m, c->values, g->out, 0)) ||
        (status = NF_CLAIM_Q(&m, c->values, g->dout, 0)) || (status = NF_CLAIM_Q(&m, c->dim, g->dq, 1)) ||
        (status = NF_CLAIM_K(&m, c->dim, g->dk, 1)) || (status = NF_CLAIM_K(&m, c->values, g->dv, 1)))
        return status;
    if (!g->lse && a->q_tokens)
        return NF_E_NULL;
    if (!nf_aligned(g->lse, sizeof(float)) || !nf_aligned(g->dlse, sizeof(float)))
        return NF_E_ALIGN;
    if ((status = nf_check_workspace(&m, c, workspace, bytes)))
        return status;
    rows = (size_t)(a->batch * a->heads * a->q_tokens);
    nf_claim(&m, g->lse, rows * sizeof(float), 0);
    nf_claim(&m, g->dlse, rows * sizeof(float), 0);
    p->grads = g;
    return nf_meet(&m) ? NF_E_OVERLAP : NF_OK;
}

/* Elements from a tensor's data to the row of a head and token. */
#define NF_PLACE(tensor, head, token) ((head) * (tensor).head_stride + (token) * (tensor).token_stride)
#define NF_AT(pointer, tensor, head) \
    ((pointer)(tensor).data + (size_t)(batch * (tensor).batch_stride + NF_PLACE(tensor, head, first)) * c->element)

NF_BOTH nf_unit nf_unit_at(const nf_contract *c, const nf_plan *p, int64_t unit, nf_grads *grads)
{
    const nf_args *a = &p->args;
    const int64_t entry = unit / a->kv_heads, h = unit % a->kv_heads, batch = a->cu_tokens ? 0 : entry;
    const int64_t first = a->cu_tokens ? a->cu_tokens[entry] : 0, head = h * p->group;
    const int64_t row = (batch * a->heads + head) * a->q_tokens + first;
    nf_unit u;
    __builtin_memset(&u, 0, sizeof u);
    u.q_tokens = a->cu_tokens ? a->cu_tokens[entry + 1] - first : a->q_tokens;
    u.kv_tokens = a->cu_tokens && a->kv_tokens ? u.q_tokens : a->kv_tokens;
    u.q_stride = a->q.token_stride, u.k_stride = a->k.token_stride;
    u.v_stride = a->v.token_stride, u.out_stride = a->out.token_stride;
    u.q_head = a->q.head_stride, u.out_head = a->out.head_stride, u.lse_head = a->q_tokens;
    if (p->grads && grads) {
        *grads = *p->grads;
        u.grads = grads;
    }
    if (u.q_tokens) {
        u.q = NF_AT(const char *, a->q, head);
        if (!p->grads) {
            u.out = NF_AT(char *, a->out, head);
            u.lse = a->lse ? a->lse + row : NULL;
        } else if (grads) {
            grads->out.data = NF_AT(const char *, grads->out, head);
            grads->dout.data = NF_AT(const char *, grads->dout, head);
            grads->dq.data = NF_AT(char *, grads->dq, head);
            grads->lse += row;
            grads->dlse = grads->dlse ? grads->dlse + row : NULL;
        }
    }
    if (u.kv_tokens) {
        u.k = NF_AT(const char *, a->k, h);
        u.v = NF_AT(const char *, a->v, h);
        if (u.grads) {
            grads->dk.data = NF_AT(char *, grads->dk, h);
            grads->dv.data = NF_AT(char *, grads->dv, h);
        }
    }
    u.group = p->group;
    u.scale = a->scale, u.eps = a->eps;
    u.decay = nf_decay(c, p, unit);
    u.mask = a->mask;
    u.flags = a->flags;
    u.projection = a->projection && c->projection ? nf_projection_at(a, h) : NULL;
    u.pattern = a->pattern;
    u.first_head = head;
    u.window = p->window, u.globals = p->globals, u.ring = p->ring;
    if (a->state && !p->grads &&
        nf_state_fits(c, p, (const nf_state_head *)a->state)) { /* a GPU has not looked before */
        u.state = nf_state_at(p, unit);
        u.past = u.state->tokens;
        u.near_key = (float *)(void *)(u.state + 1) + c->features * (c->values + 2);
        u.near_value = u.near_key + (p->globals + p->ring) * c->dim;
    }
    return u;
}
#undef NF_AT

#endif
