/* ---- running a checked plan ---- */
#ifndef NF_RUN_READY
#define NF_RUN_READY

#if defined(NF_X86)
#define NF_MODE __attribute__((target("sse"))) /* where its register is */
#else
#define NF_MODE
#endif

/* on: denormal numbers, whose products take a hundred times as long, count as zero until the mode that this returns is
 * put back. */
NF_MODE static uint64_t nf_flush(int on, uint64_t mode)
{
#if defined(NF_X86)
    mode = on ? __builtin_ia32_stmxcsr() : mode;
    __builtin_ia32_ldmxcsr((uint32_t)mode | (on ? 0x8040u : 0));
#elif defined(NF_NEON)
    if (on)
        __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (uint64_t)on << 24));
#endif
    return mode;
}

NF_UNUSED static void nf_run(const nf_plan *p, nf_unit_fn run, void *workspace)
{
    const uint64_t mode = nf_flush(1, 0);
    for (int64_t unit = p->begin; unit < p->end; unit++) {
        nf_grads grads;
        const nf_unit u = nf_unit_at(p->contract, p, unit, &grads);
        run(&u, workspace);
        if (u.state && u.kv_tokens)
            u.state->tokens += u.kv_tokens;
    }
    nf_flush(0, mode);
}

#endif
