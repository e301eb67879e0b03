/* One contract's header, compiled once: the table through which the tests reach it. The build says -DCONTRACT=<name>,
 * -DFEATURES where it has any, and -DNO_BACKWARD where it has none. */
#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define PASTE(a, b, c) a##b##c
#define JOIN(a, b, c) PASTE(a, b, c)
#define K(entry) JOIN(nf_, CONTRACT, _cpu_##entry)

#define NEARFAR_IMPLEMENTATION
#include NAME(JOIN(nf_, CONTRACT, _cpu).h)

#include "kernels.h"

const kernel JOIN(kernel_, CONTRACT, ) = {
    .name = NAME(CONTRACT),
    .workspace = K(workspace),
    .forward = K(forward),
    .decode = K(decode),
#ifndef NO_BACKWARD
    .backward = K(backward),
#endif
    .state_bytes = K(state_bytes),
    .state_reset = K(state_reset),
    .state_merge = K(state_merge),
#ifdef FEATURES
    .projection_bytes = K(projection_bytes),
    .projection_init = K(projection_init),
    .projection_from = K(projection_from),
    .projection_read = K(projection_read),
#endif
    .variants = K(variants),
};
