/* One contract's header, compiled once: the table through which the tests reach it. The build says -DCONTRACT=<name>,
 * -DBACKEND=cuda or hip to run a GPU's header in the executor, with -DDEVICE on a GPU (another file implements it),
 * -DFEATURES where the contract has any, and -DNO_STATE, -DNO_BACKWARD where it has none. */
#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define PASTE(a, b, c) a##b##c
#define JOIN(a, b, c) PASTE(a, b, c)
#ifdef BACKEND
#ifdef DEVICE
#include "device.h"
#else
#include "simt/simt.h"
#endif
#define KERNEL JOIN(CONTRACT, _, BACKEND)
#else
#define KERNEL JOIN(CONTRACT, _, cpu)
#endif
#define K(entry) JOIN(nf_, KERNEL, _##entry)

#ifndef DEVICE
#define NEARFAR_IMPLEMENTATION
#endif
#include NAME(JOIN(nf_, KERNEL, ).h)

#include "kernels.h"

#ifdef DEVICE
/* The tests' memory goes to the device and back with every call. */
static nf_status fetched(nf_status status)
{
    const char *trouble = device_fetch();
    if (trouble) {
        fprintf(stderr, NAME(KERNEL) ": %s\n", trouble);
        abort();
    }
    return status;
}

#define ENTRY(name) name
#define CALL(name, attend) \
    static nf_status name(const nf_args *args, void *workspace, size_t bytes) \
    { \
        const nf_args there = device_args(args); \
        return fetched((attend)(&there, device_scratch(workspace, bytes), bytes)); \
    }
CALL(forward, K(forward))
CALL(decode, K(decode))
#define CALLS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) /* as many variants as a header under test has */
#define CALL_VARIANT(i) \
    CALL(forward_##i, K(variants)(NULL)[i].forward) \
    CALL(decode_##i, K(variants)(NULL)[i].decode)
CALLS(CALL_VARIANT)

static const nf_variant *variants(int32_t *count)
{
#define VARIANT(i) {NULL, NULL, forward_##i, decode_##i, NULL, NULL},
    static nf_variant table[] = {CALLS(VARIANT)};
    const nf_variant *v = K(variants)(count);
    for (int32_t i = 0; i < *count; i++)
        table[i].name = v[i].name, table[i].target = v[i].target, table[i].supported = v[i].supported;
    return table;
}
#else
#define ENTRY(name) K(name)
#define device_args(args) *(args)
#define device_address(p) (p)
#define fetched(status) (status)
#endif

#if defined(BACKEND) && !defined(NO_STATE)
/* A GPU's merge asks for the sizes, the pattern and the stream. */
static nf_status merge(void *dst, const void *a, const void *b)
{
    const nf_state_head *head = (const nf_state_head *)a;
    const nf_pattern pattern = {.window = head->ring, .globals = head->globals};
    nf_args args = {.heads = 1, .pattern = &pattern};
    args.batch = head->units;
    args.mask = strstr(NAME(CONTRACT), "softmaxqk") ? NF_FULL : NF_CAUSAL;
    args = device_args(&args);
    return fetched(K(state_merge)(&args, device_address(dst), device_address(a), device_address(b)));
}

static nf_status reset(const nf_args *args)
{
    const nf_args there = device_args(args);
    return fetched(K(state_reset)(&there));
}
#define STATE(name) name
#else
#define STATE(name) K(state_##name)
#endif

const kernel JOIN(kernel_, CONTRACT, ) = {
    .name = NAME(CONTRACT),
    .workspace = K(workspace),
    .forward = ENTRY(forward),
    .decode = ENTRY(decode),
#ifndef NO_BACKWARD
    .backward = K(backward),
#endif
#ifndef NO_STATE
    .state_bytes = K(state_bytes),
    .state_reset = STATE(reset),
    .state_merge = STATE(merge),
#endif
#ifdef FEATURES
    .projection_bytes = K(projection_bytes),
    .projection_init = K(projection_init),
    .projection_from = K(projection_from),
    .projection_read = K(projection_read),
#endif
    .variants = ENTRY(variants),
};
