/* ---- patterns: checked and resolved before any work ---- */
#ifndef NF_PATTERN_CHECK_READY
#define NF_PATTERN_CHECK_READY

/* Strictly rising numbers from 0 to below the limit? */
static int nf_rising(const int32_t *x, int64_t count, int64_t limit)
{
    for (int64_t i = 0; i < count; i++)
        if (x[i] < 0 || x[i] >= limit || (i > 0 && x[i] <= x[i - 1]))
            return 0;
    return 1;
}

/* The lists of a pattern, for sequences of up to `tokens` keys. */
static nf_status nf_check_lists(const nf_contract *c, const nf_pattern *pattern, int64_t heads, int64_t tokens)
{
    const int64_t blocks = (tokens + c->block - 1) / c->block;
    const int32_t *offset = pattern->block_offsets;
    if (pattern->global_count && !pattern->global_tokens)
        return NF_E_NULL;
    if (!nf_aligned(pattern->global_tokens, sizeof(int32_t)) || !nf_aligned(offset, sizeof(int32_t)) ||
        !nf_aligned(pattern->block_keys, sizeof(int32_t)))
        return NF_E_ALIGN;
    if (!c->device && !nf_rising(pattern->global_tokens, pattern->global_count, tokens))
        return NF_E_GLOBALS;
    if (!offset)
        return pattern->block || pattern->block_heads || pattern->block_rows || pattern->block_count ? NF_E_BLOCKS
                                                                                                     : NF_OK;
    if (c->features) /* hybrid: the far field is there for what the near one leaves out */
        return NF_E_PATTERN;
    if (pattern->block_count && !pattern->block_keys)
        return NF_E_NULL;
    if (pattern->block != c->block || (pattern->block_heads != 1 && pattern->block_heads != heads) ||
        pattern->block_rows < blocks || pattern->block_count < 0 || pattern->block_count > INT32_MAX ||
        nf_product(pattern->block_rows, 8) < 0 || nf_product(pattern->block_heads, pattern->block_rows * 8 + 8) < 0)
        return NF_E_BLOCKS;
    if (c->device)
        return NF_OK;
    if (offset[0] != 0)
        return NF_E_BLOCKS;
    for (int64_t h = 0; h < pattern->block_heads; h++)
        for (int64_t b = 0; b <= pattern->block_rows; b++) {
            const int64_t at = h * (pattern->block_rows + 1) + b;
            const int64_t last = at + 1 == pattern->block_heads * (pattern->block_rows + 1);
            if (last ? offset[at] != pattern->block_count
                     : offset[at + 1] < offset[at] || offset[at + 1] > pattern->block_count)
                return NF_E_BLOCKS;
            if (b < pattern->block_rows &&
                !nf_rising(pattern->block_keys + offset[at], offset[at + 1] - offset[at], blocks))
                return NF_E_BLOCKS;
        }
    return NF_OK;
}

/* The pattern, and the rows of the near field that a state carries for it. The numbers in a GPU's memory are looked at
 * there (gpu_pattern.h); its states know no dilation, on which their size depends. */
static nf_status nf_check_pattern(nf_plan *p)
{
    const nf_contract *c = p->contract;
    const nf_args *a = &p->args;
    const nf_pattern *pattern = a->pattern;
    const int unknown = c->device && pattern && pattern->dilation;
    int64_t dilation = 1, tokens = a->kv_tokens, rows;
    nf_status status;
    if (!pattern)
        return NF_E_NULL;
    if (!nf_aligned(pattern, sizeof(int64_t)))
        return NF_E_ALIGN;
    if (pattern->window < 0 || pattern->window > (int64_t)1 << 40)
        return NF_E_WINDOW;
    if (!nf_aligned(pattern->dilation, sizeof(int32_t)) || !nf_aligned(pattern->far_gain, sizeof(float)))
        return NF_E_ALIGN;
    for (int64_t h = 0; pattern->dilation && h < a->heads && !c->device; h++) {
        if (pattern->dilation[h] < 1 || pattern->dilation[h] > 1 << 20)
            return NF_E_WINDOW;
        dilation = pattern->dilation[h] > dilation ? pattern->dilation[h] : dilation;
    }
    for (int64_t h = 0; pattern->far_gain && h < a->heads && !c->device; h++)
        if (!nf_finite(pattern->far_gain[h]))
            return NF_E_VALUE;
    if (pattern->globals < 0 || pattern->globals > (int64_t)1 << 40 || pattern->global_count < 0 ||
        pattern->global_count > a->kv_tokens)
        return NF_E_GLOBALS;
    if (pattern->flags & ~(c->features ? NF_FAR_EXACT : 0u))
        return NF_E_VALUE;
    if ((c->features && (dilation > 1 || unknown)) ||
        (!c->features && !pattern->window && !pattern->globals && !pattern->global_count && !pattern->block_offsets))
        return NF_E_PATTERN;
    if (a->state && (pattern->global_count || pattern->block_offsets || unknown))
        return NF_E_PATTERN;
    if (a->cu_tokens) {
        tokens = 0;
        for (int64_t s = 0; s < a->sequences && !c->device; s++)
            tokens = a->cu_tokens[s + 1] - a->cu_tokens[s] > tokens ? a->cu_tokens[s + 1] - a->cu_tokens[s] : tokens;
    }
    if ((status = nf_check_lists(c, pattern, a->heads, tokens)) != NF_OK)
        return status;
    if (a->mask == NF_FULL && (c->features || a->state))
        return NF_E_MASK;
    if (a->mask == NF_FULL && a->kv_tokens != a->q_tokens)
        return NF_E_TOKENS;
    p->globals = pattern->globals;
    if (c->features) {
        p->window = (pattern->window + c->block - 1) / c->block;
        p->ring = (p->window + 1) * c->block;
    } else {
        p->window = pattern->window;
        p->ring = p->window ? (p->window - 1) * dilation + 1 : 0;
    }
    p->pattern_flags = pattern->flags;
    rows = unknown ? -1 : nf_product(p->globals + p->ring, c->dim * 2 * (int64_t)sizeof(float));
    p->state_unit = rows < 0 ? 0 : p->state_unit + (size_t)rows;
    return rows < 0 && a->state ? NF_E_OVERFLOW : NF_OK;
}

/* The memory of the pattern and of what it points to. */
static void nf_claim_pattern(const nf_plan *p, nf_memory *m)
{
    const nf_pattern *pattern = p->args.pattern;
    const size_t heads = (size_t)p->args.heads;
    nf_claim(m, pattern, sizeof *pattern, 0);
    nf_claim(m, pattern->dilation, heads * sizeof(int32_t), 0);
    nf_claim(m, pattern->far_gain, heads * sizeof(float), 0);
    nf_claim(m, pattern->global_tokens, (size_t)pattern->global_count * sizeof(int32_t), 0);
    nf_claim(m, pattern->block_offsets, (size_t)(pattern->block_heads * (pattern->block_rows + 1)) * sizeof(int32_t),
             0);
    nf_claim(m, pattern->block_keys, (size_t)pattern->block_count * sizeof(int32_t), 0);
}

/* Number of listed tokens before a position. */
NF_UNUSED static int64_t nf_listed_before(const nf_pattern *pattern, int64_t position)
{
    int64_t low = 0, high = pattern->global_count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (pattern->global_tokens[middle] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Where a state keeps the token at a position: a global token in a row of its own (and like all others in the ring). */
NF_BOTH_INLINE int64_t nf_near_row(const nf_unit *u, int64_t position)
{
    return position < u->globals ? position : u->globals + position % u->ring;
}

/* The key and the value at a position: of the call, or from the state. */
NF_BOTH_INLINE const float *nf_key_at(const nf_unit *u, int64_t position, int64_t dim)
{
    return position < u->past ? u->near_key + nf_near_row(u, position) * dim
                              : (const float *)u->k + (position - u->past) * u->k_stride;
}

NF_BOTH_INLINE const float *nf_value_at(const nf_unit *u, int64_t position, int64_t dim)
{
    return position < u->past ? u->near_value + nf_near_row(u, position) * dim
                              : (const float *)u->v + (position - u->past) * u->v_stride;
}

/* The state takes in those of the call's tokens that later queries may see exactly. */
NF_UNUSED static void nf_near_keep(const nf_unit *u, int64_t dim)
{
    const int64_t end = u->past + u->kv_tokens, last = end - u->ring > u->past ? end - u->ring : u->past;
    const size_t row = (size_t)dim * sizeof(float);
    for (int64_t p = u->past; p < u->globals && p < end; p++) {
        memcpy(u->near_key + p * dim, nf_key_at(u, p, dim), row);
        memcpy(u->near_value + p * dim, nf_value_at(u, p, dim), row);
    }
    for (int64_t p = last; p < end; p++) {
        memcpy(u->near_key + (u->globals + p % u->ring) * dim, nf_key_at(u, p, dim), row);
        memcpy(u->near_value + (u->globals + p % u->ring) * dim, nf_value_at(u, p, dim), row);
    }
}

#endif
