/* ---- decays ---- */
#ifndef NF_DECAY_READY
#define NF_DECAY_READY

/* e^x of x <= 0 (of NaN: 0), relative error below 1e-14, without libm. */
NF_BOTH double nf_exp(double x)
{
    const double y = x > -700 ? x * 1.4426950408889634 : -1010;
    const int64_t whole = -(int64_t)(0.5 - y);
    const double f = 0.69314718055994531 * (y - (double)whole);
    const uint64_t bits = (uint64_t)(whole + 1023) << 52;
    double sum = 1, power;
    if (!(x > -700))
        return 0;
    for (int i = 14; i > 0; i--)
        sum = 1 + sum * f / i;
    __builtin_memcpy(&power, &bits, sizeof power);
    return sum * power;
}

NF_UNUSED static nf_status nf_check_decay(nf_plan *p)
{
    const nf_args *a = &p->args;
    if (!nf_aligned(a->decay, sizeof(float)))
        return NF_E_ALIGN;
    if (a->decay && a->mask != NF_CAUSAL)
        return NF_E_DECAY;
    for (int64_t h = 0; a->decay && h < a->kv_heads && !p->contract->device; h++)
        if (!nf_finite(a->decay[h]) || a->decay[h] > 0)
            return NF_E_DECAY;
    return NF_OK;
}

NF_UNUSED static void nf_claim_decay(const nf_plan *p, nf_memory *m)
{
    nf_claim(m, p->args.decay, (size_t)p->args.kv_heads * sizeof(float), 0);
}

#endif
