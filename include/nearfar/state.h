/* ---- states: made and merged ---- */
#ifndef NF_STATE_READY
#define NF_STATE_READY

static nf_status nf_state_reset(const nf_contract *c, const nf_args *args)
{
    nf_plan p;
    nf_memory m;
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
    m.count = 0;
    nf_claim(&m, p.args.state, p.state_bytes, 1);
    nf_claim_constants(&p, &m);
    if (nf_meet(&m))
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
        unit->hash = nf_state_hash(c, &p, u);
        unit->decay = nf_decay(c, &p, u);
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

static nf_state_unit *nf_unit_of(const void *state, int64_t unit)
{
    char *first = (char *)(uintptr_t)state + sizeof(nf_state_head);
    return (nf_state_unit *)(void *)(first + unit * ((const nf_state_head *)state)->unit_bytes);
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
        ha->unit_bytes != nf_state_unit_bytes(c, ha->globals, ha->ring) || !c->merge)
        return NF_E_STATE;
    bytes = sizeof *ha + (size_t)ha->units * (size_t)ha->unit_bytes;
    if ((dst != a && nf_overlap(dst, bytes, a, bytes)) || (dst != b && nf_overlap(dst, bytes, b, bytes)))
        return NF_E_OVERLAP;
    for (int64_t u = 0; u < ha->units; u++) {
        const nf_state_unit *x = nf_unit_of(a, u), *y = nf_unit_of(b, u);
        if (x->hash != y->hash || x->tokens < 0 || y->tokens < 0)
            return NF_E_STATE;
        if (x->tokens > INT64_MAX - y->tokens)
            return NF_E_OVERFLOW;
    }
    memmove(dst, a, sizeof *ha);
    for (int64_t u = 0; u < ha->units; u++) {
        const nf_state_unit *x = nf_unit_of(a, u), *y = nf_unit_of(b, u);
        nf_state_unit *to = nf_unit_of(dst, u);
        const int64_t tokens = x->tokens + y->tokens;
        c->merge(c, ha, to, x, y);
        memset(to->reserved, 0, sizeof to->reserved);
        to->hash = x->hash;
        to->decay = x->decay;
        to->tokens = tokens;
    }
    return NF_OK;
}

#endif
