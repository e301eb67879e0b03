/* ---- GPU: one vocabulary for CUDA, for HIP, and for the executor of the tests (tests/simt), which runs kernels on a
 * CPU
 *
 * Kernels are C in the common subset of C and C++. A block is one row of threads; lanes of a warp are neighbours. A
 * group of lanes (a power of two, up to 32) shuffles alike in warps of 32 and of 64.
 */
#ifndef NF_GPU_READY
#define NF_GPU_READY

#if defined(NEARFAR_SIMT)

/* tests/simt/simt.h has been included before and defines all of it. */

#elif defined(__CUDACC__)

#ifdef __cplusplus
extern "C++" {
#endif
#include <cuda_runtime.h>
#ifdef __cplusplus
}
#endif

#define NF_GPU(name) cuda##name
#define NF_KERNEL(threads) static __global__ void __launch_bounds__(threads)
#define NF_DEVICE static __device__ __forceinline__ __attribute__((unused))
#define NF_UNROLL _Pragma("unroll")

typedef float4 nf_float4;

NF_DEVICE int nf_thread(void)
{
    return (int)threadIdx.x;
}

NF_DEVICE int64_t nf_block_x(void)
{
    return (int64_t)blockIdx.x;
}

NF_DEVICE int64_t nf_block_y(void)
{
    return (int64_t)blockIdx.y;
}

/* The block's shared memory, as large as the launch says; its content is arbitrary. */
NF_DEVICE void *nf_shared(void)
{
    extern __shared__ __align__(16) unsigned char nf_shared_memory[];
    return nf_shared_memory;
}

/* All threads of the block arrive; what they wrote before is seen by all. */
NF_DEVICE void nf_barrier(void)
{
    __syncthreads();
}

/* The lanes of the warp arrive; what they wrote before is seen by them. */
NF_DEVICE void nf_warp_barrier(void)
{
    __syncwarp();
}

/* x of the lane whose number differs in the bits of `other`, below 32. All lanes of the warp take part. */
NF_DEVICE float nf_lane_xor(float x, int other)
{
    return __shfl_xor_sync(0xffffffffu, x, other);
}

NF_DEVICE double nf_lane_xor_double(double x, int other)
{
    return __shfl_xor_sync(0xffffffffu, x, other);
}

/* The smallest of many threads' numbers in shared memory. */
NF_DEVICE void nf_smallest(int *p, int x)
{
    atomicMin(p, x);
}

NF_DEVICE float nf_exp2(float x)
{
    return exp2f(x);
}

NF_DEVICE float nf_floor(float x)
{
    return floorf(x);
}

NF_DEVICE float nf_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}

#elif defined(__HIPCC__) || defined(__HIP__)

/* The device's side stands on the compiler's builtins alone, so that clang can check it where no ROCm is. */
#ifdef __cplusplus
extern "C++" {
#endif
#include <hip/hip_runtime_api.h>
#ifdef __cplusplus
}
#endif

#define NF_GPU(name) hip##name
#define NF_KERNEL(threads) \
    static __attribute__((global)) void __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define NF_DEVICE static inline __attribute__((device, always_inline, unused))
#define NF_UNROLL _Pragma("unroll")

typedef struct __attribute__((aligned(16))) nf_float4 {
    float x, y, z, w;
} nf_float4;

NF_DEVICE int nf_thread(void)
{
    return (int)__builtin_amdgcn_workitem_id_x();
}

NF_DEVICE int64_t nf_block_x(void)
{
    return (int64_t)__builtin_amdgcn_workgroup_id_x();
}

NF_DEVICE int64_t nf_block_y(void)
{
    return (int64_t)__builtin_amdgcn_workgroup_id_y();
}

extern __attribute__((shared, aligned(16))) unsigned char nf_shared_memory[];

NF_DEVICE void *nf_shared(void)
{
    return (void *)nf_shared_memory;
}

NF_DEVICE void nf_barrier(void)
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

NF_DEVICE void nf_warp_barrier(void)
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

NF_DEVICE int nf_lane_xor_bits(int bits, int other)
{
    const int lane = (int)__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
    return __builtin_amdgcn_ds_bpermute((lane ^ other) * 4, bits);
}

NF_DEVICE float nf_lane_xor(float x, int other)
{
    return __builtin_bit_cast(float, nf_lane_xor_bits(__builtin_bit_cast(int, x), other));
}

NF_DEVICE double nf_lane_xor_double(double x, int other)
{
    const uint64_t bits = __builtin_bit_cast(uint64_t, x);
    const uint64_t low = (uint32_t)nf_lane_xor_bits((int)(uint32_t)bits, other);
    const uint64_t high = (uint32_t)nf_lane_xor_bits((int)(uint32_t)(bits >> 32), other);
    return __builtin_bit_cast(double, high << 32 | low);
}

NF_DEVICE void nf_smallest(int *p, int x)
{
    __hip_atomic_fetch_min(p, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

NF_DEVICE float nf_exp2(float x)
{
    return __builtin_amdgcn_exp2f(x);
}

NF_DEVICE float nf_floor(float x)
{
    return __builtin_floorf(x);
}

NF_DEVICE float nf_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

#else
#error \
    "the implementation of a GPU header needs nvcc or hipcc (or clang -x cuda, -x hip); without it, only declarations"
#endif

#endif /* NF_GPU_READY */
