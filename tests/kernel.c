/* One contract's header, compiled once: the table through which the tests reach it. The build says -DCONTRACT=<name>,
 * -DBACKEND=cuda or hip to run a GPU's header in the executor, -DFEATURES where the contract has any, and -DNO_STATE,
 * -DNO_BACKWARD where it has none. */
#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define PASTE(a, b, c) a##b##c
#define JOIN(a, b, c) PASTE(a, b, c)
#ifdef BACKEND
#include "simt/simt.h"
#define KERNEL JOIN(CONTRACT, _, BACKEND)
#else
#define KERNEL JOIN(CONTRACT, _, cpu)
#endif
#define K(entry) JOIN(nf_, KERNEL, _##entry)

#define NEARFAR_IMPLEMENTATION
#include NAME(JOIN(nf_, KERNEL, ).h)

#include "kernels.h"

#if defined(BACKEND) && !defined(NO_STATE)
/* A GPU's merge asks for the sizes, the pattern and the stream. */
static nf_status merge(void *dst, const void *a, const void *b)
{
    const nf_state_head *head = (const nf_state_head *)a;
    const nf_pattern pattern = {.window = head->ring, .globals = head->globals};
    nf_args args = {.heads = 1, .pattern = &pattern};
    args.batch = head->units;
    args.mask = strstr(NAME(CONTRACT), "softmaxqk") ? NF_FULL : NF_CAUSAL;
    return K(state_merge)(&args, dst, a, b);
}
#elif !defined(BACKEND)
#define merge K(state_merge)
#endif

const kernel JOIN(kernel_, CONTRACT, ) = {
    .name = NAME(CONTRACT),
    .workspace = K(workspace),
    .forward = K(forward),
    .decode = K(decode),
#ifndef NO_BACKWARD
    .backward = K(backward),
#endif
#ifndef NO_STATE
    .state_bytes = K(state_bytes),
    .state_reset = K(state_reset),
    .state_merge = merge,
#endif
#ifdef FEATURES
    .projection_bytes = K(projection_bytes),
    .projection_init = K(projection_init),
    .projection_from = K(projection_from),
    .projection_read = K(projection_read),
#endif
    .variants = K(variants),
};
