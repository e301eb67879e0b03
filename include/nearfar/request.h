/* ---- the permission to use Intel AMX ----
 *
 * Linux gives a process its matrix tiles on demand. Nothing here asks by itself: call nf_amx_request() once, before the
 * threads that are to use them; until then, and where there are none, kernels run their other variants.
 */
#ifndef NF_REQUEST_READY
#define NF_REQUEST_READY

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>

#define NF_AMX_GRANTED 0x1022 /* of arch_prctl: the parts of the processor's state that were granted */
#define NF_AMX_WANTED 0x1023
NF_UNUSED static long nf_amx_permission(long code, unsigned long argument)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(158L), "D"(code), "S"(argument) : "rcx", "r11", "memory");
    return result;
}
#endif

/* Asks Linux for the tiles, for the whole process. 1: granted, now or before; 0: there are none here. */
NF_UNUSED static int nf_amx_request(void)
{
#ifdef NF_AMX_WANTED
    unsigned a = 0, b = 0, c = 0,
             d = 0; /* AMX-BF16, AMX-TILE, AVX512BW, AVX512VL; AVX512-BF16: some virtual machines hide one */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || b >> 30 != 3)
        return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1))
        return 0;
    return nf_amx_permission(NF_AMX_WANTED, 18) == 0;
#else
    return 0;
#endif
}

#endif
