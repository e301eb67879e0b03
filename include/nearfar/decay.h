/* ---- decays: checked before any work -------------------------------------------------------------------------------
 */
#ifndef NF_DECAY_READY
#define NF_DECAY_READY

/* The decays, and the flags beside them. */
static nf_status nf_check_decay(nf_plan *p)
{
    const nf_args *a = &p->args;
    if (a->flags & ~NF_UNNORMALISED)
        return NF_E_VALUE;
    if (!nf_aligned(a->decay, sizeof(float)))
        return NF_E_ALIGN;
    if (a->decay && a->mask != NF_CAUSAL)
        return NF_E_DECAY;
    for (int64_t h = 0; a->decay && h < a->kv_heads && !p->contract->device; h++)
        if (!nf_finite(a->decay[h]) || a->decay[h] > 0)
            return NF_E_DECAY;
    return NF_OK;
}

static void nf_claim_decay(const nf_plan *p, nf_memory *m)
{
    nf_claim(m, p->args.decay, (size_t)p->args.kv_heads * sizeof(float), 0);
}

#endif /* NF_DECAY_READY */
