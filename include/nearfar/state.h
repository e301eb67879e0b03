/* ---- states: made, merged, copied ----------------------------------------------------------------------------------
 */
#ifndef NF_STATE_READY
#define NF_STATE_READY

/* 2^step of a whole step <= 0, exact; 0 below the normal numbers. */
static float nf_power_of_two(float step)
{
    uint32_t bits;
    float x;
    if (!(step >= -126.0f))
        return 0;
    bits = (uint32_t)((int32_t)step + 127) << 23;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A state's R, z, S [m][dim] into the workspace or back, there S in panels of `panel` dims, each [m][panel]. */
NF_UNUSED static void nf_state_copy(nf_state_unit *state, int m, int dim, int panel, float *r, float *z, float *s,
                                    int store)
{
    float *at = (float *)(void *)(state + 1);
    const size_t sums = (size_t)m * sizeof(float);
    memcpy(store ? at : r, store ? r : at, sums);
    memcpy(store ? at + m : z, store ? z : at + m, sums);
    for (int v0 = 0; v0 < dim; v0 += panel) {
        const size_t used = (size_t)(dim - v0 < panel ? dim - v0 : panel) * sizeof(float);
        for (int i = 0; i < m; i++) {
            float *here = s + v0 * m + i * panel, *there = at + 2 * m + i * dim + v0;
            memcpy(store ? there : here, store ? here : there, used);
        }
    }
}

/* The same from no state at all, or from one that has seen nothing. */
NF_UNUSED static void nf_state_empty(int m, int width, float *r, float *z, float *s)
{
    memset(z, 0, (size_t)m * sizeof(float));
    memset(s, 0, (size_t)m * (size_t)width * sizeof(float));
    for (int i = 0; i < m; i++)
        r[i] = NF_NO_KEY;
}

/* dst = a + b of one unit, feature by feature on the larger of both references, a having decayed over b's tokens; dst
 * may be a or b. */
static void nf_far_merge(nf_state_unit *dst, const nf_state_unit *a, const nf_state_unit *b, int m, int dim)
{
    const float left = (float)nf_exp((double)a->decay * (double)b->tokens);
    const float *x = (const float *)(const void *)(a + 1), *y = (const float *)(const void *)(b + 1);
    float *to = (float *)(void *)(dst + 1);
    const float top = x[0] > y[0] ? x[0] : y[0];
    dst->mass = a->mass * nf_power_of_two(x[0] - top) + b->mass * nf_power_of_two(y[0] - top);
    for (int i = 0; i < m; i++) {
        const float r = x[i] > y[i] ? x[i] : y[i];
        const float fa = left * nf_power_of_two(x[i] - r), fb = nf_power_of_two(y[i] - r);
        to[i] = r;
        to[m + i] = x[m + i] * fa + y[m + i] * fb;
        for (int d = 0; d < dim; d++)
            to[2 * m + i * dim + d] = x[2 * m + i * dim + d] * fa + y[2 * m + i * dim + d] * fb;
    }
}

/* Row i of `count` rows becomes row (i + by) % count, 0 <= by < count, in place: three times turned around. */
static void nf_rotate(float *rows, int64_t count, int64_t by, int64_t dim)
{
    const int64_t begin[3] = {0, 0, by}, end[3] = {count, by, count};
    for (int turn = 0; turn < 3; turn++)
        for (int64_t i = begin[turn], j = end[turn] - 1; i < j; i++, j--)
            for (int64_t d = 0; d < dim; d++) {
                const float x = rows[i * dim + d];
                rows[i * dim + d] = rows[j * dim + d];
                rows[j * dim + d] = x;
            }
}

/* A near field's keys or values, a's and then b's: b's token p stands at position a_tokens + p. dst may be a or b. */
static void nf_near_merge(float *dst, const float *a, int64_t a_tokens, const float *b, int64_t b_tokens,
                          const nf_state_head *head, int64_t dim)
{
    const int64_t globals = head->globals, ring = head->ring, tokens = a_tokens + b_tokens;
    const int64_t kept = tokens > ring ? tokens - ring : 0; /* the first token that the ring still holds */
    const size_t row = (size_t)dim * sizeof(float);
    for (int64_t g = globals - 1; g >= 0; g--) /* from the last on: a row of b moves up */
        if (g < a_tokens || g >= tokens)
            memmove(dst + g * dim, a + g * dim, row);
        else
            memmove(dst + g * dim, b + (g - a_tokens) * dim, row);
    if (!ring)
        return;
    dst += globals * dim, a += globals * dim, b += globals * dim;
    if (dst == b && (dst != a || b_tokens >= ring)) {
        nf_rotate(dst, ring, a_tokens % ring, dim);
        for (int64_t p = kept; p < a_tokens; p++)
            memcpy(dst + p % ring * dim, a + p % ring * dim, row);
    } else {
        memmove(dst, a, (size_t)ring * row);
        for (int64_t p = kept > a_tokens ? kept : a_tokens; p < tokens; p++)
            memmove(dst + p % ring * dim, b + (p - a_tokens) % ring * dim, row);
    }
}

/* Reset the units of a state, or merge two: the checks first, then the work. */
static nf_status nf_state_reset(const nf_contract *c, const nf_args *args)
{
    nf_plan p;
    nf_memory m = {{NULL}, {0}, 0};
    nf_state_head *head;
    nf_status status = nf_check_shape(c, args, &p);
    if (status != NF_OK || (status = nf_check_projection(&p)) != NF_OK)
        return status;
    if (!p.args.state)
        return NF_E_NULL;
    if (!p.state_bytes)
        return NF_E_OVERFLOW;
    if (!nf_aligned(p.args.state, NF_ALIGN))
        return NF_E_ALIGN;
    nf_claim(&m, p.args.state, p.state_bytes);
    nf_claim_constants(&p, &m);
    if (nf_meet(&m, 1))
        return NF_E_OVERLAP;
    head = (nf_state_head *)p.args.state;
    memset(head, 0, p.state_bytes);
    head->magic = NF_MAGIC_STATE;
    head->abi = NF_CORE_ABI;
    head->contract = c->hash;
    head->units = p.units;
    head->unit_bytes = (int64_t)p.state_unit;
    head->globals = p.globals;
    head->ring = p.ring;
    for (int64_t u = 0; u < p.units; u++) {
        nf_state_unit *unit = nf_state_at(&p, u);
        float *r = (float *)(void *)(unit + 1);
        unit->hash = nf_state_hash(&p, u);
        unit->decay = nf_decay(&p, u);
        for (int64_t i = 0; i < c->features; i++)
            r[i] = NF_NO_KEY;
    }
    return NF_OK;
}

/* What a unit with so many rows in its near field takes, or -1. */
static int64_t nf_state_unit_bytes(const nf_contract *c, int64_t globals, int64_t ring)
{
    const int64_t limit = (int64_t)1 << 46, far = c->features * (c->values + 2) * (int64_t)sizeof(float);
    const int64_t rows = globals < 0 || ring < 0 || globals > limit || ring > limit ? -1 : globals + ring;
    const int64_t near = nf_product(rows, c->dim * 2 * (int64_t)sizeof(float));
    return near < 0 ? -1 : (int64_t)sizeof(nf_state_unit) + far + near;
}

static nf_status nf_state_merge(const nf_contract *c, void *dst, const void *a, const void *b)
{
    const nf_state_head *ha = (const nf_state_head *)a, *hb = (const nf_state_head *)b;
    size_t bytes;
    if (!dst || !a || !b)
        return NF_E_NULL;
    if (!nf_aligned(dst, NF_ALIGN) || !nf_aligned(a, NF_ALIGN) || !nf_aligned(b, NF_ALIGN))
        return NF_E_ALIGN;
    if (ha->magic != NF_MAGIC_STATE || ha->abi != NF_CORE_ABI || ha->contract != c->hash ||
        nf_product(ha->units, ha->unit_bytes) < 0 || memcmp(ha, hb, sizeof *ha) != 0 ||
        ha->unit_bytes != nf_state_unit_bytes(c, ha->globals, ha->ring) || (c->features && c->block))
        return NF_E_STATE;
    bytes = sizeof *ha + (size_t)ha->units * (size_t)ha->unit_bytes;
    if ((dst != a && nf_overlap(dst, bytes, a, bytes)) || (dst != b && nf_overlap(dst, bytes, b, bytes)))
        return NF_E_OVERLAP;
    for (int64_t u = 0; u < ha->units; u++) {
        const size_t at = sizeof *ha + (size_t)u * (size_t)ha->unit_bytes;
        const nf_state_unit *x = (const nf_state_unit *)(const void *)((const char *)a + at);
        const nf_state_unit *y = (const nf_state_unit *)(const void *)((const char *)b + at);
        if (x->hash != y->hash || x->tokens < 0 || y->tokens < 0)
            return NF_E_STATE;
        if (x->tokens > INT64_MAX - y->tokens)
            return NF_E_OVERFLOW;
    }
    memmove(dst, a, sizeof *ha);
    for (int64_t u = 0; u < ha->units; u++) {
        const size_t at = sizeof *ha + (size_t)u * (size_t)ha->unit_bytes;
        nf_state_unit *to = (nf_state_unit *)(void *)((char *)dst + at);
        const nf_state_unit *x = (const nf_state_unit *)(const void *)((const char *)a + at);
        const nf_state_unit *y = (const nf_state_unit *)(const void *)((const char *)b + at);
        const int64_t tokens = x->tokens + y->tokens;
        if (c->features)
            nf_far_merge(to, x, y, (int)c->features, (int)c->values);
        else
            to->mass = 0;
        if (c->block)
            for (int i = 0; i < 2; i++) { /* keys, values */
                const int64_t rows = i * (ha->globals + ha->ring) * c->dim;
                nf_near_merge((float *)(void *)(to + 1) + rows, (const float *)(const void *)(x + 1) + rows, x->tokens,
                              (const float *)(const void *)(y + 1) + rows, y->tokens, ha, c->dim);
            }
        memset(to->reserved, 0, sizeof to->reserved);
        to->hash = x->hash;
        to->decay = x->decay;
        to->tokens = tokens;
    }
    return NF_OK;
}

#endif /* NF_STATE_READY */
