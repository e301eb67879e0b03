/* ---- states on a GPU: the same bytes as on a CPU; made, merged and carried from segment to segment by kernels ------
 *
 * A long sequence is cut into segments of a fixed length. Each one's keys make a state of their own, in a slot of the
 * workspace; the slots are merged in their order, so that a slot then holds all the keys before its segment. The order
 * never changes, so the bits depend neither on how many slots there are nor on what comes behind.
 */
#ifndef NF_GPU_STATE_READY
#define NF_GPU_STATE_READY

enum { NF_STATE_THREADS = 256, NF_STATE_BLOCKS = 8 /* per unit */ };

/* A slot: R, z and S as in a state, then R and z of what is before the segment (its S takes the place of the own). */
NF_BOTH int64_t nf_slot_floats(const nf_contract *c)
{
    return c->features * (c->dim + 4);
}

/* A slot of this block's unit: `count` of segments, and two more for what goes on from round to round. */
NF_DEVICE float *nf_slot(const nf_work *w, int64_t slot)
{
    return w->slots + (nf_block_x() * (w->count + 2) + slot) * nf_slot_floats(&w->contract);
}

/* The slot that holds everything before a round. */
NF_DEVICE float *nf_slot_of_round(const nf_work *w, int64_t round)
{
    return nf_slot(w, w->count + round % 2);
}

/* The far field in a state or a slot; all NULL: empty. */
typedef struct nf_far {
    float *r, *z, *s;
} nf_far;

NF_DEVICE nf_far nf_far_of(float *at, int64_t features)
{
    nf_far far;
    far.r = at;
    far.z = at ? at + features : NULL;
    far.s = at ? at + 2 * features : NULL;
    return far;
}

/* What is before a slot's segment. */
NF_DEVICE nf_far nf_far_before(float *slot, const nf_contract *c)
{
    nf_far far = nf_far_of(slot, c->features);
    far.r = far.s + c->features * c->dim;
    far.z = far.r + c->features;
    return far;
}

NF_DEVICE nf_far nf_far_state(const nf_unit *u, const nf_contract *c)
{
    return nf_far_of(u->state ? (float *)(void *)(u->state + 1) : NULL, c->features);
}

/* Of hybrid: up to which position keys are in the far field while the last of so many tokens attends. */
NF_DEVICE int64_t nf_far_end(const nf_unit *u, int64_t tokens, int64_t block)
{
    const int64_t blocks = tokens > 0 ? (tokens - 1) / block : 0;
    return blocks > u->window ? (blocks - u->window) * block : 0;
}

/* The number of a unit's last segment. Under the causal mask, and in hybrid, it is merged with none. */
NF_DEVICE int64_t nf_last_segment(const nf_work *w, const nf_unit *u)
{
    const int64_t block = w->contract.block, end = u->past + u->kv_tokens;
    if (block)
        return (nf_far_end(u, end, block) - nf_far_end(u, u->past, block)) / w->length;
    return (u->kv_tokens + w->length - 1) / w->length - (u->mask == NF_CAUSAL);
}

/* What a launch does: all of a unit, the state of a segment's keys, a segment against its slot, queries alone. */
enum { NF_WHOLE, NF_KEYS, NF_SEGMENT, NF_QUERIES };

/* A block's share: keys [key, keys), queries [row, rows), and where the state comes from and goes to. */
typedef struct nf_segment {
    int64_t key, keys, row, rows;
    nf_far from, to;
    int nothing;
} nf_segment;

NF_DEVICE nf_segment nf_segment_of(const nf_work *w, const nf_unit *u)
{
    const int64_t index = w->first + nf_block_y(), begin = index * w->length;
    const int64_t before = u->kv_tokens - u->q_tokens; /* under the causal mask */
    const int last = begin + w->length >= u->kv_tokens, causal = u->mask == NF_CAUSAL;
    const nf_far none = nf_far_of(NULL, 0), state = nf_far_state(u, &w->contract);
    nf_segment s;
    __builtin_memset(&s, 0, sizeof s);
    s.key = begin;
    s.keys = last ? u->kv_tokens : begin + w->length;
    s.rows = u->q_tokens;
    s.from = s.to = none;
    if (w->part == NF_WHOLE) {
        s.from = s.to = state;
    } else if (w->part == NF_KEYS) {
        s.row = s.rows = 0;
        s.to = nf_far_of(nf_slot(w, nf_block_y()), w->contract.features);
        s.nothing = begin >= u->kv_tokens || (causal && last);
    } else if (w->part == NF_SEGMENT) {
        s.row = begin > before ? begin - before : 0;
        s.rows = s.keys > before ? s.keys - before : 0;
        s.from = nf_far_before(nf_slot(w, nf_block_y()), &w->contract);
        s.to = last ? state : none;
        s.nothing = begin >= u->kv_tokens;
    } else {
        s.key = s.keys = 0;
        s.row = begin;
        s.rows = begin + w->length < u->q_tokens ? begin + w->length : u->q_tokens;
        s.from = u->kv_tokens ? nf_far_before(nf_slot_of_round(w, w->round), &w->contract) : state;
        s.to = u->kv_tokens && index == 0 ? state : none;
        s.nothing = begin >= u->q_tokens && index > 0;
    }
    return s;
}

/* Merge the slots of a round in their order, from the state or from where the last round ended. Every thread has its
 * own numbers of S and z; what it reads of R nobody writes. */
NF_KERNEL(NF_STATE_THREADS, 1) nf_carry(nf_work w)
{
    const nf_contract *c = &w.contract;
    const int64_t m = c->features, width = c->dim + 1, stride = NF_STATE_THREADS * NF_STATE_BLOCKS;
    const nf_far to = nf_far_before(nf_slot_of_round(&w, w.round + 1), c);
    nf_far from;
    int64_t last; /* segments that are merged */
    float left;   /* of what is before a segment, behind it */
    nf_unit u;
    nf_open(&w, &u);
    from = w.round ? nf_far_before(nf_slot_of_round(&w, w.round), c) : nf_far_state(&u, c);
    last = nf_last_segment(&w, &u);
    left = u.decay < 0 ? (float)nf_exp((double)u.decay * (double)w.length) : 1;
    for (int64_t e = nf_block_y() * NF_STATE_THREADS + nf_thread(); e < m * width; e += stride) {
        const int64_t r = e / width, d = e % width, at = d < c->dim ? r * c->dim + d : r;
        float reference = from.r ? from.r[r] : NF_NO_KEY, sum = 0;
        if (from.r)
            sum = d < c->dim ? from.s[at] : from.z[r];
        for (int64_t i = 0; i < w.count && w.first + i <= last; i++) {
            float *const slot = nf_slot(&w, i);
            const nf_far own = nf_far_of(slot, m), before = nf_far_before(slot, c);
            float *const place = (d < c->dim ? before.s : before.z) + at;
            const int merged = w.first + i < last;
            const float x = !merged ? 0 : d < c->dim ? own.s[at] : own.z[r], y = merged ? own.r[r] : reference;
            const float higher = y > reference ? y : reference;
            *place = sum; /* where x was */
            if (d == c->dim)
                before.r[r] = reference;
            sum = sum * (left * nf_power_of_two(reference - higher)) + x * nf_power_of_two(y - higher);
            reference = higher;
        }
        *((d < c->dim ? to.s : to.z) + at) = sum;
        if (d == c->dim)
            to.r[r] = reference;
    }
}

/* Count a call's tokens, behind the launches whose blocks read the count. */
NF_KERNEL(32, 1) nf_count(nf_work w)
{
    nf_unit u;
    if (nf_thread() == 0 && nf_open(&w, &u))
        u.state->tokens += u.kv_tokens;
}

/* The state that has seen nothing. */
NF_KERNEL(NF_STATE_THREADS, 1) nf_reset(nf_work w)
{
    const nf_plan *p = &w.plan;
    const int64_t index = nf_block_x(), floats = ((int64_t)p->state_unit - (int64_t)sizeof(nf_state_unit)) / 4;
    nf_state_unit *const unit = nf_state_at(p, index);
    float *const r = (float *)(void *)(unit + 1);
    for (int64_t i = nf_thread(); i < floats; i += NF_STATE_THREADS)
        r[i] = i < w.contract.features ? NF_NO_KEY : 0.0f;
    if (nf_thread() == 0) {
        nf_state_unit fresh;
        __builtin_memset(&fresh, 0, sizeof fresh);
        fresh.hash = nf_state_hash(&w.contract, p, index);
        fresh.decay = nf_decay(&w.contract, p, index);
        *unit = fresh;
    }
    if (nf_thread() == 0 && index == 0) {
        nf_state_head head;
        __builtin_memset(&head, 0, sizeof head);
        head.magic = NF_MAGIC_STATE;
        head.abi = NF_CORE_ABI;
        head.contract = w.contract.hash;
        head.units = p->units;
        head.unit_bytes = (int64_t)p->state_unit;
        head.globals = p->globals;
        head.ring = p->ring;
        *(nf_state_head *)p->args.state = head;
    }
}

/* A unit of a state. */
NF_DEVICE nf_state_unit *nf_unit_in(const nf_work *w, const void *state)
{
    return (nf_state_unit *)(void *)((char *)(uintptr_t)state + sizeof(nf_state_head) +
                                     (size_t)nf_block_x() * w->plan.state_unit);
}

/* Do this block's units of a and b belong together, and to the call? */
NF_DEVICE int nf_mergeable(const nf_work *w)
{
    const nf_state_head *const ha = (const nf_state_head *)w->a, *const hb = (const nf_state_head *)w->b;
    const nf_state_unit *const a = nf_unit_in(w, w->a), *const b = nf_unit_in(w, w->b);
    return nf_state_fits(&w->contract, &w->plan, ha) && nf_state_fits(&w->contract, &w->plan, hb) &&
           a->hash == b->hash && a->tokens >= 0 && b->tokens >= 0; /* the heads first: a unit may not be there */
}

/* Numbers from .. to of a column, turned around. */
NF_DEVICE void nf_turn(float *column, int64_t from, int64_t to, int64_t stride)
{
    for (to--; from < to; from++, to--) {
        const float x = column[from * stride];
        column[from * stride] = column[to * stride];
        column[to * stride] = x;
    }
}

/* The near field of dst: a's tokens and then b's, so b's token p stands at position a->tokens + p. A thread has a
 * column of the keys or values for itself, as dst may be a or b. */
NF_KERNEL(NF_STATE_THREADS, 1) nf_merge_near(nf_work w)
{
    const int64_t globals = w.plan.globals, ring = w.plan.ring, dim = w.contract.dim;
    const int alike = nf_mergeable(&w);
    const int64_t before = alike ? nf_unit_in(&w, w.a)->tokens : 0;
    const int64_t tokens = alike ? before + nf_unit_in(&w, w.b)->tokens : 0;
    const int64_t kept = tokens > ring ? tokens - ring : 0; /* the first token that the ring still holds */
    for (int64_t e = nf_thread(); e < 2 * dim && alike; e += NF_STATE_THREADS) {
        const int64_t at = e / dim * (globals + ring) * dim + e % dim;
        const float *const a = (const float *)(const void *)(nf_unit_in(&w, w.a) + 1) + at, *const x =
                                                                                                a + globals * dim;
        const float *const b = (const float *)(const void *)(nf_unit_in(&w, w.b) + 1) + at, *const y =
                                                                                                b + globals * dim;
        float *const dst = (float *)(void *)(nf_unit_in(&w, w.dst) + 1) + at, *const to = dst + globals * dim;
        for (int64_t g = globals - 1; g >= 0; g--) /* from the last on: a number of b moves up */
            dst[g * dim] = g < before || g >= tokens ? a[g * dim] : b[(g - before) * dim];
        if (to == y && (to != x || tokens - before >= ring)) {
            const int64_t by = ring ? before % ring : 0;
            nf_turn(to, 0, ring, dim), nf_turn(to, 0, by, dim), nf_turn(to, by, ring, dim);
            for (int64_t p = kept; p < before; p++)
                to[p % ring * dim] = x[p % ring * dim];
        } else {
            for (int64_t p = 0; p < ring; p++)
                to[p * dim] = x[p * dim];
            for (int64_t p = kept > before ? kept : before; p < tokens && ring; p++)
                to[p % ring * dim] = y[(p - before) % ring * dim];
        }
    }
}

/* dst = a + b of one unit, a having decayed over b's tokens; dst may be a or b. If these do not belong together, dst is
 * of no call any more. */
NF_KERNEL(NF_STATE_THREADS, 1) nf_merge(nf_work w)
{
    const int64_t m = w.contract.features, dim = w.contract.dim;
    const nf_state_unit *const a = nf_unit_in(&w, w.a), *const b = nf_unit_in(&w, w.b);
    nf_state_unit *const dst = nf_unit_in(&w, w.dst);
    const float *const x = (const float *)(const void *)(a + 1), *const y = (const float *)(const void *)(b + 1);
    float *const to = (float *)(void *)(dst + 1);
    const int alike = nf_mergeable(&w);
    const float left = alike && a->decay < 0 ? (float)nf_exp((double)a->decay * (double)b->tokens) : 1;
    for (int64_t e = nf_thread(); alike && e < m * (dim + 1); e += NF_STATE_THREADS) { /* z, S */
        const int64_t r = e < m ? e : (e - m) / dim;
        const float reference = x[r] > y[r] ? x[r] : y[r];
        to[m + e] =
            x[m + e] * (left * nf_power_of_two(x[r] - reference)) + y[m + e] * nf_power_of_two(y[r] - reference);
    }
    nf_barrier(); /* only now may R be written, where dst is a or b */
    for (int64_t r = nf_thread(); alike && r < m; r += NF_STATE_THREADS)
        to[r] = x[r] > y[r] ? x[r] : y[r];
    if (nf_thread() == 0) {
        nf_state_unit merged;
        __builtin_memset(&merged, 0, sizeof merged);
        if (alike) {
            merged = *a;
            merged.tokens = a->tokens + b->tokens;
        }
        *dst = merged;
        if (nf_block_x() == 0 && w.dst != w.a && w.dst != w.b)
            *(nf_state_head *)w.dst = *(const nf_state_head *)w.a;
    }
}

/* Slots of a call; beyond so many units there is nothing to gain from segments. A workspace holds them. */
enum { NF_SLOTS = 256 };

/* Run a call in segments of `length` tokens, or whole: short ones, and those with units enough to fill a GPU. Which of
 * them is decided by what neither a split nor later tokens change: so neither changes bits. */
NF_UNUSED static nf_status nf_launch_segments(nf_kernel kernel, nf_work *w, int threads, size_t shared, int64_t length)
{
    const nf_args *a = &w->plan.args;
    const int64_t units = w->plan.end - w->plan.begin, count = NF_SLOTS / (w->plan.units > 0 ? w->plan.units : 1) - 2;
    const int64_t block = w->contract.block;
    const int64_t segments =
        (a->kv_tokens + (block ? block + length : length) - 1) / length; /* hybrid: up to so many */
    nf_status status = NF_OK;
    w->first = w->round = 0;
    w->count = 1;
    w->length = (int64_t)1 << 48; /* more than there are */
    w->part = NF_WHOLE;
    if (!(a->flags & NF_NO_KEYS) && (count < 2 || segments < 2)) /* its blocks count the tokens */
        return nf_launch(kernel, w, units, 1, threads, shared);
    w->count = count;
    w->length = length;
    for (; status == NF_OK && w->first < segments; w->first += count, w->round++) {
        const int64_t here = segments - w->first < count ? segments - w->first : count;
        w->part = NF_KEYS;
        if ((status = nf_launch(kernel, w, units, here, threads, shared)) == NF_OK)
            status = nf_launch(nf_carry, w, units, NF_STATE_BLOCKS, NF_STATE_THREADS, 0);
        w->part = NF_SEGMENT;
        if (status == NF_OK && a->mask == NF_CAUSAL)
            status = nf_launch(kernel, w, units, here, threads, shared);
    }
    w->part = NF_QUERIES;
    if (a->mask == NF_FULL)
        for (w->first = 0; status == NF_OK && (w->first == 0 || w->first * length < a->q_tokens); w->first += 0xffff) {
            const int64_t left = (a->q_tokens + length - 1) / length - w->first;
            status = nf_launch(kernel, w, units, left > 0xffff ? 0xffff : left > 1 ? left : 1, threads, shared);
        }
    return status == NF_OK && a->state && a->kv_tokens && !block ? nf_launch(nf_count, w, units, 1, 32, 0) : status;
}

/* Check, then launch. */
NF_UNUSED static nf_status nf_launch_reset(const nf_contract *c, const nf_args *args)
{
    nf_work w;
    nf_memory m;
    nf_status status = nf_check_shape(c, args, &w.plan);
    if (status != NF_OK || (status = nf_check_projection(&w.plan)) != NF_OK)
        return status;
    if (!w.plan.args.state)
        return NF_E_NULL;
    if (!w.plan.state_bytes)
        return NF_E_OVERFLOW;
    if (!nf_aligned(w.plan.args.state, NF_ALIGN))
        return NF_E_ALIGN;
    m.count = 0;
    nf_claim(&m, w.plan.args.state, w.plan.state_bytes, 1);
    nf_claim_constants(&w.plan, &m);
    if (nf_meet(&m))
        return NF_E_OVERLAP;
    w.contract = *c;
    return nf_launch(nf_reset, &w, w.plan.units, 1, NF_STATE_THREADS, 0);
}

NF_UNUSED static nf_status nf_launch_merge(const nf_contract *c, const nf_args *args, void *dst, const void *a,
                                           const void *b)
{
    nf_work w;
    nf_status status = nf_check_shape(c, args, &w.plan);
    if (status != NF_OK)
        return status;
    if (!w.plan.state_bytes) /* no state of this pattern can be: a dilation, or more than an address reaches */
        return c->block && args->pattern->dilation ? NF_E_PATTERN : NF_E_OVERFLOW;
    if (!dst || !a || !b)
        return NF_E_NULL;
    if (!nf_aligned(dst, NF_ALIGN) || !nf_aligned(a, NF_ALIGN) || !nf_aligned(b, NF_ALIGN))
        return NF_E_ALIGN;
    if ((dst != a && nf_overlap(dst, w.plan.state_bytes, a, w.plan.state_bytes)) ||
        (dst != b && nf_overlap(dst, w.plan.state_bytes, b, w.plan.state_bytes)))
        return NF_E_OVERLAP;
    w.contract = *c;
    w.dst = dst, w.a = a, w.b = b;
    if (c->features && c->block) /* what is near depends on where the sequence ends */
        return NF_E_STATE;
    if (c->block && (status = nf_launch(nf_merge_near, &w, w.plan.units, 1, NF_STATE_THREADS, 0)) != NF_OK)
        return status;
    return nf_launch(nf_merge, &w, w.plan.units, 1, NF_STATE_THREADS, 0);
}

#endif /* NF_GPU_STATE_READY */
