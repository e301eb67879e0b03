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
/* A kernel of so many threads a block, and at least so many blocks at once (which bounds its registers). */
#define NF_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define NF_DEVICE static __device__ __forceinline__ __attribute__((unused))
#define NF_UNROLL _Pragma("unroll")
#define NF_UNROLL_BY_1 _Pragma("unroll 1")
#define NF_UNROLL_BY_2 _Pragma("unroll 2")
#define NF_UNROLL_BY_4 _Pragma("unroll 4")

typedef float4 nf_float4;

NF_DEVICE nf_float4 nf_load4(const float *p)
{
    return *(const nf_float4 *)(const void *)p;
}

NF_DEVICE void nf_store4(float *p, nf_float4 x)
{
    *(nf_float4 *)(void *)p = x;
}

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
#define NF_KERNEL(threads, blocks) \
    static __attribute__((global)) void __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define NF_DEVICE static inline __attribute__((device, always_inline, unused))
#define NF_UNROLL _Pragma("unroll")
#define NF_UNROLL_BY_1 _Pragma("unroll 1")
#define NF_UNROLL_BY_2 _Pragma("unroll 2")
#define NF_UNROLL_BY_4 _Pragma("unroll 4")

typedef struct __attribute__((aligned(16))) nf_float4 {
    float x, y, z, w;
} nf_float4;

NF_DEVICE nf_float4 nf_load4(const float *p)
{
    return *(const nf_float4 *)(const void *)p;
}

NF_DEVICE void nf_store4(float *p, nf_float4 x)
{
    *(nf_float4 *)(void *)p = x;
}

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

/* ---- launches ---------------------------------------------------------------------------------------------------- */

/* What a kernel gets, by value: a checked call, and which part of it this launch does. */
typedef struct nf_work {
    nf_plan plan; /* its `contract` is the host's: kernels read the copy below */
    nf_contract contract;
    int part;       /* what to do, one of the operator's */
    int64_t first;  /* the launch's first segment; block (x, y) does segment first + y of unit begin + x */
    int64_t length; /* tokens of a segment */
    int64_t round;  /* rounds of segments so far */
    int64_t count;  /* segments of a round, for which there are slots */
    float *slots;   /* the workspace */
    void *dst;      /* of a merge, from a and b */
    const void *a, *b;
} nf_work;

typedef void (*nf_kernel)(nf_work work);

#if defined(NEARFAR_SIMT)

typedef struct nf_entry {
    nf_kernel kernel;
    const nf_work *work;
} nf_entry;

SIMT_ENTER nf_enter(const void *context)
{
    const nf_entry *entry = (const nf_entry *)context;
    entry->kernel(*entry->work);
}

/* Has the device so much shared memory for a block? */
NF_UNUSED static int nf_device_offers(size_t shared)
{
    return shared <= simt.shared_limit;
}

NF_UNUSED static nf_status nf_launch(nf_kernel kernel, const nf_work *work, int64_t x, int64_t y, int threads,
                                     size_t shared)
{
    const nf_entry entry = {kernel, work};
    const int64_t blocks[2] = {x, y};
    return x && y && simt_launch(nf_enter, &entry, blocks, threads, shared) ? NF_E_LAUNCH : NF_OK;
}

#else

NF_UNUSED static int nf_device_offers(size_t shared)
{
    int device, most = 0;
    if (NF_GPU(GetDevice)(&device) != NF_GPU(Success))
        return 0;
#if defined(__CUDACC__)
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
#else
    if (hipDeviceGetAttribute(&most, hipDeviceAttributeMaxSharedMemoryPerBlock, device) != hipSuccess)
        return 0;
#endif
    return shared <= (size_t)most;
}

/* Blocks (x, y) of a kernel on the call's stream: nothing is allocated and nothing waits, so a graph can capture it. */
NF_UNUSED static nf_status nf_launch(nf_kernel kernel, const nf_work *work, int64_t x, int64_t y, int threads,
                                     size_t shared)
{
    nf_work copy = *work;
    void *parameters[1] = {&copy};
    const dim3 blocks((unsigned)x, (unsigned)y), block((unsigned)threads);
    if (!x || !y)
        return NF_OK;
    if (x > 0x7fffffff || y > 0xffff)
        return NF_E_OVERFLOW;
#if defined(__CUDACC__)
    if (shared > 48 * 1024 && cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   (int)shared) != cudaSuccess)
        return NF_E_LAUNCH;
#endif
    return NF_GPU(LaunchKernel)((const void *)kernel, blocks, block, parameters, shared,
                                (NF_GPU(Stream_t))work->plan.args.stream) == NF_GPU(Success)
               ? NF_OK
               : NF_E_LAUNCH;
}

#endif

/* ---- a block's unit ---------------------------------------------------------------------------------------------- */

NF_DEVICE float nf_nan(void)
{
    const uint32_t bits = 0x7fc00000u;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

/* The unit of this block; returns 0 if its projection or state is not of this call. What the host could not look at is
 * looked at here: borders out of order make a sequence of no tokens. */
NF_DEVICE int nf_open(const nf_work *w, nf_unit *unit)
{
    const nf_plan *p = &w->plan;
    const nf_args *a = &p->args;
    const int64_t index = p->begin + nf_block_x();
    const nf_projection_head *projection;
    *unit = nf_unit_at(&w->contract, p, index, NULL);
    if (a->cu_tokens) {
        const int64_t entry = index / a->kv_heads, from = a->cu_tokens[entry], to = a->cu_tokens[entry + 1];
        if (from < 0 || to < from || to > a->q_tokens)
            unit->q_tokens = unit->kv_tokens = 0;
    }
    projection = (const nf_projection_head *)unit->projection;
    if (projection && (projection->magic != NF_MAGIC_PROJECTION || projection->abi != NF_CORE_ABI ||
                       projection->contract != w->contract.hash))
        return 0;
    if (a->state) {
        const nf_state_head *head = (const nf_state_head *)a->state;
        if (head->magic != NF_MAGIC_STATE || head->abi != NF_CORE_ABI || head->contract != w->contract.hash ||
            head->units != p->units || head->unit_bytes != (int64_t)p->state_unit || head->globals != p->globals ||
            head->ring != p->ring || unit->state->hash != nf_state_hash(&w->contract, p, index))
            return 0;
    }
    return 1;
}

#endif /* NF_GPU_READY */
