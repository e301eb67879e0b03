/* ---- a state that decays: merged ---- */
#ifndef NF_DECAY_STATE_READY
#define NF_DECAY_STATE_READY

/* to = a, then b, of one unit: a has decayed over b's tokens. */
static void nf_decay_merge(const nf_contract *c, const nf_state_head *head, nf_state_unit *to, const nf_state_unit *a,
                           const nf_state_unit *b)
{
    (void)head;
    nf_far_join(c, to, a, b, (float)nf_exp((double)a->decay * (double)b->tokens));
}

#endif
