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
#define NF_UNROLLED _Pragma("unroll")
#define NF_UNROLLED_BY(n) NF_PRAGMA(unroll n)
#define NF_PRAGMA(text) _Pragma(#text)

/* p, which points to global memory. Of a pointer that itself lies in shared memory the compiler cannot know that: it
 * would load as if it could be either. */
#define NF_GMEM(p) \
    __extension__({ \
        __typeof__(p) nf_at = (p); \
        __builtin_assume(__isGlobal(nf_at)); \
        nf_at; \
    })

typedef struct __attribute__((aligned(16), may_alias)) nf_float4 { /* 16 bytes of anything */
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

/* x of a lane of the warp. */
NF_DEVICE float nf_lane_at(float x, int lane)
{
    return __shfl_sync(0xffffffffu, x, lane);
}

/* Is x not zero in any lane of the warp? */
NF_DEVICE int nf_any(int x)
{
    return __any_sync(0xffffffffu, x);
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

/* 2^x by the special function unit: relative error 2^-22, 0 below the normal numbers. */
NF_DEVICE float nf_exp2_unit(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

NF_DEVICE float nf_floor(float x)
{
    return floorf(x);
}

/* The whole number nearest to x, |x| < 2^22, by additions, which have more units than conversions. */
NF_DEVICE float nf_nearest(float x)
{
    return __fadd_rn(__fadd_rn(x, 12582912.0f), -12582912.0f);
}

/* p * 2^n of a normal p, 1 <= p < 2, and a whole n from -126 to 126. */
NF_DEVICE float nf_scale_by(float p, float n)
{
    return __int_as_float(__float_as_int(p) + (__float_as_int(__fadd_rn(n, 12582912.0f)) << 23));
}

NF_DEVICE float nf_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}

/* The larger of two numbers; beside NaN, the other. */
NF_DEVICE float nf_larger(float a, float b)
{
    return fmaxf(a, b);
}

/* An f16 as a float, and the f16 nearest to a float, ties to even. */
NF_DEVICE float nf_f16_read(uint16_t half)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}

NF_DEVICE uint16_t nf_f16_round(float x)
{
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}

/* Two floats as 16-bit floats in a word, `a` the lower half. */
NF_DEVICE uint32_t nf_bf16_pair(float a, float b)
{
    uint32_t pair = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
#else
    (void)a, (void)b;
#endif
    return pair;
}

NF_DEVICE uint32_t nf_f16_pair(float a, float b)
{
    return (uint32_t)nf_f16_round(a) | (uint32_t)nf_f16_round(b) << 16;
}

/* Four 8 x 8 matrices of 16-bit numbers: lane 8i + j names row j of matrix i (16 aligned bytes) and gets, of each
 * matrix, numbers 2 (lane % 4) and the next of row lane / 4; transposed, of column lane / 4. */
NF_DEVICE void nf_ldmatrix(uint32_t *r, const void *row)
{
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

NF_DEVICE void nf_ldmatrix_transposed(uint32_t *r, const void *row)
{
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

/* c [16][8] += a [16][16] b [16][8] of bf16, and of f16. */
NF_DEVICE void nf_mma_bf16_16x8(float *c, const uint32_t *a, const uint32_t *b)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

NF_DEVICE void nf_mma_f16_16x8(float *c, const uint32_t *a, const uint32_t *b)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* Copy 16 bytes to shared memory behind the program's back, zeros if they are not there; what was committed in a group
 * has landed after the wait that leaves fewer groups open. */
NF_DEVICE void nf_copy_async(void *to, const void *from, int there)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#endif
}

NF_DEVICE void nf_copy_commit(void)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* `open` must be a constant. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define nf_copy_wait(open) asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory")
#else
#define nf_copy_wait(open) (void)(open)
#endif

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
#define NF_UNROLLED _Pragma("unroll")
#define NF_UNROLLED_BY(n) NF_PRAGMA(unroll n)
#define NF_PRAGMA(text) _Pragma(#text)

#define NF_GMEM(p) ((__typeof__(p))(__attribute__((address_space(1))) char *)(uintptr_t)(p))

typedef struct __attribute__((aligned(16), may_alias)) nf_float4 { /* 16 bytes of anything */
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

NF_DEVICE float nf_lane_at(float x, int lane)
{
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute(lane * 4, __builtin_bit_cast(int, x)));
}

NF_DEVICE int nf_any(int x)
{
    return __builtin_amdgcn_ballot_w64(x != 0) != 0;
}

NF_DEVICE void nf_smallest(int *p, int x)
{
    __hip_atomic_fetch_min(p, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

NF_DEVICE float nf_exp2(float x)
{
    return __builtin_amdgcn_exp2f(x);
}

NF_DEVICE float nf_exp2_unit(float x)
{
    return __builtin_amdgcn_exp2f(x);
}

NF_DEVICE float nf_floor(float x)
{
    return __builtin_floorf(x);
}

NF_DEVICE float nf_nearest(float x)
{
    return __builtin_rintf(x);
}

NF_DEVICE float nf_scale_by(float p, float n)
{
    return __builtin_amdgcn_ldexpf(p, (int)n);
}

NF_DEVICE float nf_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

NF_DEVICE float nf_larger(float a, float b)
{
    return __builtin_fmaxf(a, b);
}

NF_DEVICE float nf_f16_read(uint16_t half)
{
    return (float)__builtin_bit_cast(_Float16, half);
}

NF_DEVICE uint16_t nf_f16_round(float x)
{
    return __builtin_bit_cast(uint16_t, (_Float16)x);
}

/* No copies behind the program's back here: what was copied is there at once. (A vector, as clang keeps a struct of 16
 * bytes in a thread's memory.) */
typedef uint32_t nf_copied __attribute__((ext_vector_type(4), may_alias));

NF_DEVICE void nf_copy_async(void *to, const void *from, int there)
{
    nf_copied x = 0;
    if (there)
        x = *(const nf_copied *)from;
    *(nf_copied *)to = x;
}

NF_DEVICE void nf_copy_commit(void)
{
}

NF_DEVICE void nf_copy_wait(int open)
{
    (void)open;
}

/* c += a b for a tile of 16 x 16: MFMA of CDNA (waves of 64), WMMA of RDNA (waves of 32). Other GPUs have none. */
typedef float nf_float4x __attribute__((ext_vector_type(4)));
typedef float nf_float8x __attribute__((ext_vector_type(8)));
typedef short nf_short4x __attribute__((ext_vector_type(4)));
typedef short nf_short8x __attribute__((ext_vector_type(8)));
typedef short nf_short16x __attribute__((ext_vector_type(16)));
typedef _Float16 nf_half4x __attribute__((ext_vector_type(4)));
typedef _Float16 nf_half8x __attribute__((ext_vector_type(8)));
typedef _Float16 nf_half16x __attribute__((ext_vector_type(16)));

#if defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__)
#define NF_FRAGMENTS NF_CDNA
#define NF_MATRIX(type, builtin, sums) \
    type x, y; \
    nf_float##sums##x z; \
    __builtin_memcpy(&x, a, sizeof x), __builtin_memcpy(&y, b, sizeof y), __builtin_memcpy(&z, c, sizeof z); \
    z = builtin(x, y, z, 0, 0, 0); \
    __builtin_memcpy(c, &z, sizeof z);
#elif defined(__GFX11__) || defined(__GFX12__)
#define NF_FRAGMENTS NF_RDNA3
#define NF_MATRIX(type, builtin, sums) \
    type x, y; \
    nf_float##sums##x z; \
    __builtin_memcpy(&x, a, sizeof x), __builtin_memcpy(&y, b, sizeof y), __builtin_memcpy(&z, c, sizeof z); \
    z = builtin(x, y, z); \
    __builtin_memcpy(c, &z, sizeof z);
#if defined(__GFX12__)
#undef NF_FRAGMENTS
#define NF_FRAGMENTS NF_RDNA4
#endif
#endif

NF_DEVICE void nf_matrix_bf16(float *c, const uint32_t *a, const uint32_t *b)
{
#if defined(__GFX12__)
    NF_MATRIX(nf_short8x, __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12, 8)
#elif defined(__GFX11__)
    NF_MATRIX(nf_short16x, __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32, 8)
#elif defined(NF_FRAGMENTS)
    NF_MATRIX(nf_short4x, __builtin_amdgcn_mfma_f32_16x16x16bf16_1k, 4)
#else
    (void)c, (void)a, (void)b;
#endif
}

NF_DEVICE void nf_matrix_f16(float *c, const uint32_t *a, const uint32_t *b)
{
#if defined(__GFX12__)
    NF_MATRIX(nf_half8x, __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12, 8)
#elif defined(__GFX11__)
    NF_MATRIX(nf_half16x, __builtin_amdgcn_wmma_f32_16x16x16_f16_w32, 8)
#elif defined(NF_FRAGMENTS)
    NF_MATRIX(nf_half4x, __builtin_amdgcn_mfma_f32_16x16x16f16, 4)
#else
    (void)c, (void)a, (void)b;
#endif
}

#else
#error \
    "the implementation of a GPU header needs nvcc or hipcc (or clang -x cuda, -x hip); without it, only declarations"
#endif

/* The same of bf16, the upper half of a float. */
NF_DEVICE float nf_bf16_read(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

NF_DEVICE uint16_t nf_bf16_round(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if !defined(__CUDACC__)
NF_DEVICE uint32_t nf_bf16_pair(float a, float b)
{
    return (uint32_t)nf_bf16_round(a) | (uint32_t)nf_bf16_round(b) << 16;
}

NF_DEVICE uint32_t nf_f16_pair(float a, float b)
{
    return (uint32_t)nf_f16_round(a) | (uint32_t)nf_f16_round(b) << 16;
}
#endif

/* 2^x on the units of products, -126 <= x < 126: relative error 1e-4, exact at whole numbers. NaN does not pass. */
NF_DEVICE float nf_exp2_cubic(float x)
{
    const float y = x > -126.0f ? (x < 126.0f ? x : 126.0f) : -126.0f, n = nf_nearest(y), f = y - n;
    return nf_scale_by(nf_fma(nf_fma(nf_fma(5.500893295e-2f, f, 2.422109544e-1f), f, 6.932829022e-1f), f, 1.0f), n);
}

/* 8 numbers of 16 bits, aligned to 16 bytes, in shared memory. */
NF_DEVICE void nf_load8(uint16_t *to, const uint16_t *p)
{
    const nf_float4 x = nf_load4((const float *)(const void *)p);
    __builtin_memcpy(to, &x, sizeof x);
}

NF_DEVICE void nf_store8(uint16_t *p, const uint16_t *x)
{
    nf_float4 y;
    __builtin_memcpy(&y, x, sizeof y);
    nf_store4((float *)(void *)p, y);
}

/* Is one of 8 floats of 16 bits, by its bits without the sign, at least `from`? (NaN is above infinity.) */
NF_DEVICE int nf_reaches(const uint16_t *x, uint32_t from)
{
    uint32_t word[4], found = 0;
    __builtin_memcpy(word, x, sizeof word);
    NF_UNROLLED
    for (int i = 0; i < 4; i++)
        found |= (word[i] & 0x7fff7fffu) + (0x8000u - from) * 0x10001u;
    return (found & 0x80008000u) != 0;
}

/* ---- fragments: tiles of 16 x 16 on the matrix units ----
 *
 * One product for all: c [16][16] += a [16][16] b [16][16], a and b of 16-bit numbers, spread over the lanes of a warp
 * as the vendors document it: NF_SM80, PTX ISA "matrix fragments for mma.m16n8k16"; NF_CDNA, CDNA3 ISA "matrix
 * arithmetic instructions", 16x16x16; NF_RDNA3 and NF_RDNA4, the ISA's "wave matrix multiply accumulate". On AMD a lane
 * has a column of c, a row of a and a column of b: with a and b exchanged it has a row of c instead. So on all of them
 * a lane's sums are of the rows that it has of a, and sums, rounded, are the next product's a (nf_operand) as they lie.
 */
#define NF_SM80 1
#define NF_CDNA 2
#define NF_RDNA3 3
#define NF_RDNA4 4
#if !defined(NF_FRAGMENTS) && !(defined(__HIPCC__) || defined(__HIP__)) && \
    (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define NF_FRAGMENTS NF_SM80
#endif

#ifdef NF_FRAGMENTS
/* Words of a fragment in a lane, its sums, how many rows these are of, and how the lanes that share a row are numbered.
 */
#if NF_FRAGMENTS == NF_SM80
enum { NF_FRAGMENT_WORDS = 4, NF_SUMS = 8, NF_LANE_ROWS = 2, NF_FRAGMENT_LANES = 32, NF_ROW_STEP = 1, NF_ROW_END = 4 };
#elif NF_FRAGMENTS == NF_CDNA
enum {
    NF_FRAGMENT_WORDS = 2,
    NF_SUMS = 4,
    NF_LANE_ROWS = 1,
    NF_FRAGMENT_LANES = 64,
    NF_ROW_STEP = 16,
    NF_ROW_END = 64
};
#else
enum {
    NF_FRAGMENT_WORDS = NF_FRAGMENTS == NF_RDNA3 ? 8 : 4,
    NF_SUMS = 8,
    NF_LANE_ROWS = 1,
    NF_FRAGMENT_LANES = 32,
    NF_ROW_STEP = 16,
    NF_ROW_END = 32
};
#endif

/* A lane's share of a (rows by k) or b (columns by k), and of c. */
typedef struct nf_fragment {
    uint32_t word[NF_FRAGMENT_WORDS];
} nf_fragment;

typedef struct nf_sums {
    float at[NF_SUMS];
} nf_sums;

NF_DEVICE int nf_lane(void)
{
    return nf_thread() % NF_FRAGMENT_LANES;
}

NF_DEVICE int nf_warp(void)
{
    return nf_thread() / NF_FRAGMENT_LANES;
}

/* The row of a that word i of a lane's left operand is of, and the first of its two numbers along k. */
NF_DEVICE int nf_word_row(int i)
{
#if NF_FRAGMENTS == NF_SM80
    return nf_lane() / 4 + i % 2 * 8;
#else
    (void)i;
    return nf_lane() % 16;
#endif
}

NF_DEVICE int nf_word_k(int i)
{
#if NF_FRAGMENTS == NF_SM80
    return nf_lane() % 4 * 2 + i / 2 * 8;
#elif NF_FRAGMENTS == NF_RDNA3
    return 2 * i;
#else
    return (nf_lane() / 16 * NF_FRAGMENT_WORDS + i) * 2;
#endif
}

/* A left operand as a right one, row i as column i. mma.sync takes the middle two words the other way round. */
NF_DEVICE nf_fragment nf_right(nf_fragment f)
{
#if NF_FRAGMENTS == NF_SM80
    const uint32_t word = f.word[1];
    f.word[1] = f.word[2], f.word[2] = word;
#endif
    return f;
}

/* A left operand from shared memory: row i of a at tile + i * stride, along k. Rows begin at multiples of 16 bytes. */
NF_DEVICE nf_fragment nf_left_rows(const uint16_t *tile, int stride)
{
    nf_fragment f;
#if NF_FRAGMENTS == NF_SM80
    nf_ldmatrix(f.word, tile + nf_lane() % 16 * stride + nf_lane() / 16 * 8);
#else
    const uint32_t *row = (const uint32_t *)(const void *)(tile + nf_word_row(0) * stride + nf_word_k(0));
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++)
        f.word[i] = row[i];
#endif
    return f;
}

/* The same as a right operand, whose column i the row is. */
NF_DEVICE nf_fragment nf_right_rows(const uint16_t *tile, int stride)
{
#if NF_FRAGMENTS == NF_SM80
    nf_fragment f;
    nf_ldmatrix(f.word, tile + (nf_lane() % 8 + nf_lane() / 16 * 8) * stride + nf_lane() / 8 % 2 * 8);
    return f;
#else
    return nf_left_rows(tile, stride);
#endif
}

/* Both from a tile that lies the other way: k runs from row to row. */
NF_DEVICE nf_fragment nf_left_columns(const uint16_t *tile, int stride)
{
    nf_fragment f;
#if NF_FRAGMENTS == NF_SM80
    nf_ldmatrix_transposed(f.word, tile + (nf_lane() % 8 + nf_lane() / 16 * 8) * stride + nf_lane() / 8 % 2 * 8);
#else
    const uint16_t *column = tile + nf_word_k(0) * stride + nf_word_row(0);
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++)
        f.word[i] = (uint32_t)column[2 * i * stride] | (uint32_t)column[(2 * i + 1) * stride] << 16;
#endif
    return f;
}

NF_DEVICE nf_fragment nf_right_columns(const uint16_t *tile, int stride)
{
#if NF_FRAGMENTS == NF_SM80
    nf_fragment f;
    nf_ldmatrix_transposed(f.word, tile + nf_lane() % 16 * stride + nf_lane() / 16 * 8);
    return f;
#else
    return nf_left_columns(tile, stride);
#endif
}

/* A left operand back to rows in shared memory. */
NF_DEVICE void nf_put_rows(uint16_t *tile, int stride, nf_fragment f)
{
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++)
        if (NF_FRAGMENTS != NF_RDNA3 || i % 2 == nf_lane() / 16) /* there, two lanes have the same */
            *(uint32_t *)(void *)(tile + nf_word_row(i) * stride + nf_word_k(i)) = f.word[i];
}

/* All numbers the same two. */
NF_DEVICE nf_fragment nf_constant(uint32_t pair)
{
    nf_fragment f;
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++)
        f.word[i] = pair;
    return f;
}

#if NF_FRAGMENTS == NF_SM80
#define NF_PRODUCT(type) \
    nf_mma_##type##_16x8(c->at, a.word, b.word); \
    nf_mma_##type##_16x8(c->at + 4, a.word, b.word + 2)
#else
#define NF_PRODUCT(type) nf_matrix_##type(c->at, b.word, a.word)
#endif

/* c += a b. */
NF_DEVICE void nf_product_bf16(nf_sums *c, nf_fragment a, nf_fragment b)
{
    NF_PRODUCT(bf16);
}

NF_DEVICE void nf_product_f16(nf_sums *c, nf_fragment a, nf_fragment b)
{
    NF_PRODUCT(f16);
}

#if NF_FRAGMENTS == NF_SM80
#define NF_PRODUCT_ROW(type) nf_mma_##type##_16x8(c->at, a.word, b.word)
#else
#define NF_PRODUCT_ROW(type) NF_PRODUCT(type)
#endif

/* The same with a b whose columns are all alike: of c only nf_row_sum is of use. */
NF_DEVICE void nf_product_row_bf16(nf_sums *c, nf_fragment a, nf_fragment b)
{
    NF_PRODUCT_ROW(bf16);
}

NF_DEVICE void nf_product_row_f16(nf_sums *c, nf_fragment a, nf_fragment b)
{
    NF_PRODUCT_ROW(f16);
}

/* The row and the column of number i of a lane's share of c, and which of the lane's rows that is. */
NF_DEVICE int nf_sum_row(int i)
{
#if NF_FRAGMENTS == NF_SM80
    return nf_lane() / 4 + i / 2 % 2 * 8;
#else
    (void)i;
    return nf_lane() % 16;
#endif
}

NF_DEVICE int nf_sum_column(int i)
{
#if NF_FRAGMENTS == NF_SM80
    return i / 4 * 8 + nf_lane() % 4 * 2 + i % 2;
#elif NF_FRAGMENTS == NF_RDNA3
    return 2 * i + nf_lane() / 16;
#else
    return nf_lane() / 16 * NF_SUMS + i;
#endif
}

NF_DEVICE int nf_sum_slot(int i)
{
    return NF_LANE_ROWS == 2 ? i / 2 % 2 : 0;
}

/* The first of a lane's numbers of each of its rows; the number in column 0; the largest of the row. All lanes of the
 * warp take part in the latter two. */
NF_DEVICE float nf_row_sum(const nf_sums *c, int slot)
{
    return c->at[2 * slot];
}

NF_DEVICE float nf_row_first(const nf_sums *c, int slot)
{
    return nf_lane_at(c->at[2 * slot], nf_lane() & (NF_ROW_STEP == 1 ? ~(NF_ROW_END - 1) : NF_ROW_STEP - 1));
}

NF_DEVICE float nf_row_max(float x)
{
    NF_UNROLLED
    for (int other = NF_ROW_STEP; other < NF_ROW_END; other *= 2)
        x = nf_larger(x, nf_lane_xor(x, other));
    return x;
}

/* Sums as bf16, the next product's a: its rows are theirs, its k their columns. What that leaves of the sums stays. */
NF_DEVICE nf_fragment nf_operand(nf_sums *c)
{
    nf_fragment f;
#if NF_FRAGMENTS == NF_RDNA3
    NF_UNROLLED
    for (int i = 0; i < NF_SUMS; i++) {
        const float other = nf_lane_xor(c->at[i], 16);
        f.word[i] = nf_lane() < 16 ? nf_bf16_pair(c->at[i], other) : nf_bf16_pair(other, c->at[i]);
        c->at[i] -= nf_bf16_read((uint16_t)(f.word[i] >> nf_lane() / 16 * 16));
    }
#else
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++) {
        f.word[i] = nf_bf16_pair(c->at[2 * i], c->at[2 * i + 1]);
        c->at[2 * i] -= nf_bf16_read((uint16_t)f.word[i]);
        c->at[2 * i + 1] -= nf_bf16_read((uint16_t)(f.word[i] >> 16));
    }
#endif
    return f;
}
/* The same as f16. */
NF_DEVICE nf_fragment nf_operand_f16(nf_sums *c)
{
    nf_fragment f;
#if NF_FRAGMENTS == NF_RDNA3
    NF_UNROLLED
    for (int i = 0; i < NF_SUMS; i++) {
        const float other = nf_lane_xor(c->at[i], 16);
        f.word[i] = nf_lane() < 16 ? nf_f16_pair(c->at[i], other) : nf_f16_pair(other, c->at[i]);
        c->at[i] -= nf_f16_read((uint16_t)(f.word[i] >> nf_lane() / 16 * 16));
    }
#else
    NF_UNROLLED
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++) {
        f.word[i] = nf_f16_pair(c->at[2 * i], c->at[2 * i + 1]);
        c->at[2 * i] -= nf_f16_read((uint16_t)f.word[i]);
        c->at[2 * i + 1] -= nf_f16_read((uint16_t)(f.word[i] >> 16));
    }
#endif
    return f;
}
#endif /* NF_FRAGMENTS */

/* ---- launches ---- */

/* What a kernel gets, by value: a checked call, and which part of it this launch does. */
typedef struct nf_work {
    nf_plan plan; /* its `contract` is the host's: kernels read the copy below */
    nf_contract contract;
    nf_pattern pattern; /* of operators over one: args.pattern is the host's */
    int part;           /* what to do, one of the operator's */
    int64_t first;      /* the launch's first segment; block (x, y) does segment first + y of unit begin + x */
    int64_t length;     /* tokens of a segment */
    int64_t round;      /* rounds of segments so far */
    int64_t count;      /* segments of a round, for which there are slots; of operators without: blocks along y */
    float *slots;       /* in the workspace */
    int *verdict;       /* in the workspace: 0 where a block of the pattern's check found a fault; NULL: no check */
    void *dst;          /* of a merge, from a and b */
    const void *a, *b;
} nf_work;

enum { NF_CHECK_BLOCKS = 32 };

typedef void (*nf_kernel)(nf_work work);

/* Of a variant: whether it runs on a device, 1 no, 2 yes, 0 not asked yet. Later devices are asked for each time. */
enum { NF_DEVICES = 32 };
typedef struct nf_support {
    signed char answer[NF_DEVICES];
} nf_support;

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

/* Does a variant run here? Its fragments are for warps of their own size. */
NF_UNUSED static int nf_supported(nf_support *known, const char *target, int fragments, nf_kernel kernel, size_t shared)
{
    (void)known, (void)kernel; /* tests change what is here */
#ifdef NF_FRAGMENTS
    return (!target || (fragments == NF_FRAGMENTS && simt.warp == NF_FRAGMENT_LANES)) && shared <= simt.shared_limit;
#else
    (void)fragments;
    return !target && shared <= simt.shared_limit;
#endif
}

NF_UNUSED static nf_status nf_launch(nf_kernel kernel, const nf_work *work, int64_t x, int64_t y, int threads,
                                     size_t shared)
{
    const nf_entry entry = {kernel, work};
    const int64_t blocks[2] = {x, y};
    return x && y && simt_launch(nf_enter, &entry, blocks, threads, shared) ? NF_E_LAUNCH : NF_OK;
}

#else

/* Is the device what a target is for (NULL: any is), has the kernel been compiled for it, and has it so much shared
 * memory for a block? -1: the runtime does not say. */
NF_UNUSED static int nf_ask(int device, const char *target, nf_kernel kernel, size_t shared)
{
    int most = 0;
#if defined(__CUDACC__)
    cudaFuncAttributes a;
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        (target && cudaFuncGetAttributes(&a, (const void *)kernel) != cudaSuccess))
        return -1;
    return shared <= (size_t)most && (!target || a.ptxVersion >= 80);
#else
    hipDeviceProp_t p;
    (void)kernel;
    if (hipDeviceGetAttribute(&most, hipDeviceAttributeMaxSharedMemoryPerBlock, device) != hipSuccess ||
        (target && hipGetDeviceProperties(&p, device) != hipSuccess))
        return -1;
    return shared <= (size_t)most && (!target || strncmp(p.gcnArchName, target, strlen(target)) == 0);
#endif
}

/* Does a variant run on the current device? The runtime is asked once for each; threads that ask at the same time write
 * the same. */
NF_UNUSED static int nf_supported(nf_support *known, const char *target, int fragments, nf_kernel kernel, size_t shared)
{
    int device, answer;
    (void)fragments;
    if (NF_GPU(GetDevice)(&device) != NF_GPU(Success))
        return 0;
    answer = device < NF_DEVICES ? __atomic_load_n(&known->answer[device], __ATOMIC_RELAXED) : 0;
    if (answer)
        return answer - 1;
    answer = nf_ask(device, target, kernel, shared);
    if (answer >= 0 && device < NF_DEVICES)
        __atomic_store_n(&known->answer[device], (signed char)(answer + 1), __ATOMIC_RELAXED);
    return answer > 0;
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

/* ---- a block's unit ---- */

NF_DEVICE float nf_nan(void)
{
    const uint32_t bits = 0x7fc00000u;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

/* The unit of this block; returns 0 if its projection, pattern, decay or state is not of this call. What the host could
 * not look at is looked at here: borders out of order make a sequence of no tokens. */
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
    if (!nf_finite(unit->decay) || unit->decay > 0)
        return 0;
    for (int i = 0; w->verdict && i < NF_CHECK_BLOCKS; i++)
        if (!w->verdict[i])
            return 0;
    projection = (const nf_projection_head *)unit->projection;
    if (projection && (projection->magic != NF_MAGIC_PROJECTION || projection->abi != NF_CORE_ABI ||
                       projection->contract != w->contract.hash))
        return 0;
    if (a->state && (!unit->state || unit->state->hash != nf_state_hash(&w->contract, p, index) || unit->past < 0 ||
                     unit->past > (int64_t)1 << 47))
        return 0;
    return 1;
}

#endif /* NF_GPU_READY */
