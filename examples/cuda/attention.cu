/* The file that implements the kernel: all others include the header as plain C. */
#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m128_cuda.h"
