/* ---- vectors: one small vocabulary per instruction set ----
 *
 * nf_<set>_t is a vector of NF_<SET>_LANES floats; + - * / work on it. fma, max and the conversion inside exp2 are
 * intrinsics: no compiler flag changes their numbers. NaN passes through max(a, b) when it is in b, and through exp2.
 */
#ifndef NF_SIMD_READY
#define NF_SIMD_READY

#if defined(__clang__)
#define NF_UNROLL _Pragma("clang loop unroll(full)")
#define NF_UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#else
#define NF_UNROLL _Pragma("GCC unroll 32")
#define NF_UNROLL_BY_4 _Pragma("GCC unroll 4")
#endif

/* For i from 0 to below n, unrolled: arrays over i are registers. */
#define NF_EACH(i, n) NF_UNROLL for (int i = 0; i < (n); i++)

#define NF_NOTHING
#define NF_VECTOR(attributes, set) \
    typedef float set##_unaligned __attribute__((vector_size(sizeof(set##_t)), aligned(4), may_alias)); \
    NF_INLINE attributes set##_t set##_load(const float *p) \
    { \
        return *(const set##_unaligned *)(const void *)p; \
    } \
    NF_INLINE attributes void set##_store(float *p, set##_t x) \
    { \
        *(set##_unaligned *)(void *)p = x; \
    }

/* What AVX-512 and AVX2 call alike. */
#define NF_X86_VECTOR(attributes, set, prefix) \
    NF_VECTOR(attributes, set) \
    NF_INLINE attributes set##_t set##_set(float x) \
    { \
        return prefix##_set1_ps(x); \
    } \
    NF_INLINE attributes set##_t set##_fma(set##_t a, set##_t b, set##_t c) \
    { \
        return prefix##_fmadd_ps(a, b, c); \
    } \
    NF_INLINE attributes set##_t set##_floor(set##_t x) \
    { \
        return prefix##_floor_ps(x); \
    }

/* 2^f on [-1/2, 1/2] by a polynomial: relative error 1.7e-7, exact at 0. */
#define NF_POWER(attributes, set) \
    NF_INLINE attributes set##_t set##_power(set##_t f) \
    { \
        set##_t p = set##_fma(f, set##_set(1.3264727260e-3f), set##_set(9.6715127100e-3f)); \
        p = set##_fma(p, f, set##_set(5.5507337440e-2f)); \
        p = set##_fma(p, f, set##_set(2.4022242080e-1f)); \
        p = set##_fma(p, f, set##_set(6.9314697760e-1f)); \
        return set##_fma(p, f, set##_set(1.0f)); \
    }

/* What is below 2^-126 counts as that, or as 0 where the hardware scales: beside 1 it does not count. */
#define NF_EXP2_LOWEST (-126.0f)
#define NF_EXP2_HIGHEST 126.0f

#if defined(__x86_64__) || defined(__i386__)
#define NF_X86 1
#include <immintrin.h>

#define NF_V16 __attribute__((target("avx512f,avx512dq")))
#define NF_V16_LANES 16
/* Masks that mask nothing: g++ 12 warns of intrinsics without (GCC bug 105593). */
#define NF_ALL16 ((__mmask16)0xffff)
#define NF_ALL8 ((__mmask8)0xff)
typedef __m512 nf_v16_t;
NF_X86_VECTOR(NF_V16, nf_v16, _mm512)

/* n lanes, a constant of any size: a whole vector, or what is left of a row. */
NF_INLINE NF_V16 nf_v16_t nf_v16_get(const float *p, int n)
{
    return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

NF_INLINE NF_V16 void nf_v16_put(float *p, nf_v16_t x, int n)
{
    if (n >= 16)
        _mm512_storeu_ps(p, x);
    else if (n > 0)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
}

NF_INLINE NF_V16 nf_v16_t nf_v16_max(nf_v16_t a, nf_v16_t b)
{
    return _mm512_maskz_max_ps(NF_ALL16, a, b);
}

NF_INLINE NF_V16 nf_v16_t nf_v16_min(nf_v16_t a, nf_v16_t b)
{
    return _mm512_maskz_min_ps(NF_ALL16, a, b);
}

NF_INLINE NF_V16 __m256 nf_v16_high(nf_v16_t x)
{
    return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(NF_ALL8, _mm512_castps_pd(x), 1));
}

NF_INLINE NF_V16 float nf_v16_sum(nf_v16_t x)
{
    const __m256 half = _mm512_castps512_ps256(x) + nf_v16_high(x);
    __m128 s = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    s += _mm_movehl_ps(s, s);
    return _mm_cvtss_f32(s + _mm_movehdup_ps(s));
}

/* The sum in double precision. */
NF_INLINE NF_V16 double nf_v16_total(nf_v16_t x)
{
    const __m512d low = _mm512_maskz_cvtps_pd(NF_ALL8, _mm512_castps512_ps256(x));
    const __m512d all = low + _mm512_maskz_cvtps_pd(NF_ALL8, nf_v16_high(x));
    const __m256d s = _mm512_castpd512_pd256(all) + _mm512_maskz_extractf64x4_pd(NF_ALL8, all, 1);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* x = floor(x) + f, split and scaled by the hardware: 2^f is a polynomial on [0, 1) (1.5e-7, exact at 0). */
NF_INLINE NF_V16 nf_v16_t nf_v16_exp2(nf_v16_t x)
{
    const nf_v16_t f = _mm512_maskz_reduce_ps(NF_ALL16, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    nf_v16_t p = nf_v16_fma(f, nf_v16_set(1.867130279e-3f), nf_v16_set(9.01702988e-3f));
    p = nf_v16_fma(p, f, nf_v16_set(5.579991342e-2f));
    p = nf_v16_fma(p, f, nf_v16_set(2.401644501e-1f));
    p = nf_v16_fma(p, f, nf_v16_set(6.931513118e-1f));
    p = nf_v16_fma(p, f, nf_v16_set(1.0f));
    return _mm512_maskz_scalef_ps(NF_ALL16, p, x);
}

/* dst[d][t] = src[t][d] for t, d below 16; of d the first `dims` are read and written. */
NF_INLINE NF_V16 void nf_v16_transpose(float *dst, int dst_stride, const float *src, int src_stride, int dims)
{
    for (int d = 0; d < 16 && d < dims; d += 4) {
        nf_v16_t a[4];
        NF_UNROLL
        for (int i = 0; i < 4; i++) { /* 4 dims of tokens i, i + 4, i + 8, i + 12 */
            const float *at = src + i * src_stride + d;
            a[i] = _mm512_castps128_ps512(_mm_loadu_ps(at));
            a[i] = _mm512_maskz_insertf32x4(NF_ALL16, a[i], _mm_loadu_ps(at + 4 * src_stride), 1);
            a[i] = _mm512_maskz_insertf32x4(NF_ALL16, a[i], _mm_loadu_ps(at + 8 * src_stride), 2);
            a[i] = _mm512_maskz_insertf32x4(NF_ALL16, a[i], _mm_loadu_ps(at + 12 * src_stride), 3);
        }
        const __m512d x = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(NF_ALL16, a[0], a[1]));
        const __m512d y = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(NF_ALL16, a[0], a[1]));
        const __m512d z = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(NF_ALL16, a[2], a[3]));
        const __m512d w = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(NF_ALL16, a[2], a[3]));
        nf_v16_store(dst + d * dst_stride, _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(NF_ALL8, x, z)));
        nf_v16_store(dst + (d + 1) * dst_stride, _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(NF_ALL8, x, z)));
        nf_v16_store(dst + (d + 2) * dst_stride, _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(NF_ALL8, y, w)));
        nf_v16_store(dst + (d + 3) * dst_stride, _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(NF_ALL8, y, w)));
    }
}

/* x from lane n on, below it `other`; n from 0 to all. */
NF_INLINE NF_V16 nf_v16_t nf_v16_from(nf_v16_t other, nf_v16_t x, int n)
{
    return _mm512_mask_mov_ps(other, (__mmask16)(0xffffu << n), x);
}

/* The upper lanes of a and b by turns; two floats by turns; from such, the sums of a's and b's in the upper lanes. */
NF_INLINE NF_V16 nf_v16_t nf_v16_upper(nf_v16_t a, nf_v16_t b)
{
    const __m512i turns = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, turns, b);
}

NF_INLINE NF_V16 nf_v16_t nf_v16_pair(const float *p)
{
    double both;
    memcpy(&both, p, sizeof both);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
}

NF_INLINE NF_V16 nf_v16_t nf_v16_to_upper(nf_v16_t x)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const nf_v16_t sums = x + _mm512_maskz_permute_ps(NF_ALL16, x, 0xb1);
    return _mm512_maskz_permutexvar_ps(NF_ALL16, even, sums);
}

/* Is any lane above the limit, or NaN? */
NF_INLINE NF_V16 int nf_v16_above(nf_v16_t x, float limit)
{
    return _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0;
}

/* Every processor with AVX2 and FMA has F16C, too. */
#define NF_V8 __attribute__((target("avx2,fma,f16c")))
#define NF_V8_LANES 8
typedef __m256 nf_v8_t;
NF_X86_VECTOR(NF_V8, nf_v8, _mm256)

NF_INLINE NF_V8 __m256i nf_v8_below(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

NF_INLINE NF_V8 nf_v8_t nf_v8_get(const float *p, int n)
{
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, nf_v8_below(n));
}

NF_INLINE NF_V8 void nf_v8_put(float *p, nf_v8_t x, int n)
{
    if (n >= 8)
        _mm256_storeu_ps(p, x);
    else if (n > 0)
        _mm256_maskstore_ps(p, nf_v8_below(n), x);
}

NF_POWER(NF_V8, nf_v8)

NF_INLINE NF_V8 nf_v8_t nf_v8_max(nf_v8_t a, nf_v8_t b)
{
    return _mm256_max_ps(a, b);
}

NF_INLINE NF_V8 nf_v8_t nf_v8_min(nf_v8_t a, nf_v8_t b)
{
    return _mm256_min_ps(a, b);
}

NF_INLINE NF_V8 float nf_v8_sum(nf_v8_t x)
{
    __m128 s = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
    s += _mm_movehl_ps(s, s);
    return _mm_cvtss_f32(s + _mm_movehdup_ps(s));
}

NF_INLINE NF_V8 double nf_v8_total(nf_v8_t x)
{
    const __m256d s = _mm256_cvtps_pd(_mm256_castps256_ps128(x)) + _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    return (s[0] + s[1]) + (s[2] + s[3]);
}

NF_INLINE NF_V8 nf_v8_t nf_v8_exp2(nf_v8_t x)
{
    const nf_v8_t y = nf_v8_max(nf_v8_set(NF_EXP2_LOWEST), nf_v8_min(nf_v8_set(NF_EXP2_HIGHEST), x));
    const __m256i n = _mm256_cvtps_epi32(y);
    const nf_v8_t p = nf_v8_power(y - _mm256_cvtepi32_ps(n));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(n, 23)));
}

NF_INLINE NF_V8 void nf_v8_transpose(float *dst, int dst_stride, const float *src, int src_stride, int dims)
{
    (void)dims; /* always 8: head dims are multiples of 8 */
    for (int d = 0; d < 8; d += 4) {
        nf_v8_t a[4];
        NF_UNROLL
        for (int i = 0; i < 4; i++) { /* 4 dims of tokens i, i + 4 */
            const float *at = src + i * src_stride + d;
            a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + 4 * src_stride), 1);
        }
        const __m256d x = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1]));
        const __m256d y = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
        const __m256d z = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3]));
        const __m256d w = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
        nf_v8_store(dst + d * dst_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(x, z)));
        nf_v8_store(dst + (d + 1) * dst_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(x, z)));
        nf_v8_store(dst + (d + 2) * dst_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(y, w)));
        nf_v8_store(dst + (d + 3) * dst_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(y, w)));
    }
}

NF_INLINE NF_V8 nf_v8_t nf_v8_from(nf_v8_t other, nf_v8_t x, int n)
{
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(nf_v8_below(n)));
}

NF_INLINE NF_V8 int nf_v8_above(nf_v8_t x, float limit)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLE_UQ)) != 0;
}
#endif

/* Four lanes anywhere: NEON, or the vector extension of GCC and Clang. */
#define NF_V4
#define NF_V4_LANES 4
#if defined(__aarch64__)
#define NF_NEON
#include <arm_neon.h>
typedef float32x4_t nf_v4_t;
#else
typedef float nf_v4_t __attribute__((vector_size(16)));
typedef int32_t nf_v4_int __attribute__((vector_size(16)));
typedef uint32_t nf_v4_bits __attribute__((vector_size(16)));
#endif
NF_VECTOR(NF_NOTHING, nf_v4)

NF_INLINE nf_v4_t nf_v4_set(float x)
{
    const nf_v4_t y = {x, x, x, x};
    return y;
}

NF_INLINE float nf_v4_sum(nf_v4_t x)
{
    return (x[0] + x[2]) + (x[1] + x[3]);
}

NF_INLINE double nf_v4_total(nf_v4_t x)
{
    return ((double)x[0] + (double)x[1]) + ((double)x[2] + (double)x[3]);
}

NF_INLINE int nf_v4_above(nf_v4_t x, float limit)
{
    return nf_beyond(x[0], limit) || nf_beyond(x[1], limit) || nf_beyond(x[2], limit) || nf_beyond(x[3], limit);
}

NF_INLINE nf_v4_t nf_v4_from(nf_v4_t other, nf_v4_t x, int n)
{
    for (int i = 0; i < 4 && i < n; i++)
        x[i] = other[i];
    return x;
}

#if defined(NF_NEON)
NF_INLINE nf_v4_t nf_v4_fma(nf_v4_t a, nf_v4_t b, nf_v4_t c)
{
    return vfmaq_f32(c, a, b);
}

NF_POWER(NF_NOTHING, nf_v4)

NF_INLINE nf_v4_t nf_v4_max(nf_v4_t a, nf_v4_t b)
{
    return vmaxq_f32(a, b);
}

NF_INLINE nf_v4_t nf_v4_min(nf_v4_t a, nf_v4_t b)
{
    return vminq_f32(a, b);
}

NF_INLINE nf_v4_t nf_v4_exp2(nf_v4_t x)
{
    const nf_v4_t y = nf_v4_max(nf_v4_set(NF_EXP2_LOWEST), nf_v4_min(nf_v4_set(NF_EXP2_HIGHEST), x));
    const int32x4_t n = vcvtnq_s32_f32(y);
    const nf_v4_t p = nf_v4_power(y - vcvtq_f32_s32(n));
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(n, 23)));
}

NF_INLINE void nf_v4_transpose(float *dst, int dst_stride, const float *src, int src_stride, int dims)
{
    const float32x4x2_t x = vtrnq_f32(nf_v4_load(src), nf_v4_load(src + src_stride));
    const float32x4x2_t y = vtrnq_f32(nf_v4_load(src + 2 * src_stride), nf_v4_load(src + 3 * src_stride));
    (void)dims;
    nf_v4_store(dst, vcombine_f32(vget_low_f32(x.val[0]), vget_low_f32(y.val[0])));
    nf_v4_store(dst + dst_stride, vcombine_f32(vget_low_f32(x.val[1]), vget_low_f32(y.val[1])));
    nf_v4_store(dst + 2 * dst_stride, vcombine_f32(vget_high_f32(x.val[0]), vget_high_f32(y.val[0])));
    nf_v4_store(dst + 3 * dst_stride, vcombine_f32(vget_high_f32(x.val[1]), vget_high_f32(y.val[1])));
}

NF_INLINE nf_v4_t nf_v4_floor(nf_v4_t x)
{
    return vrndmq_f32(x);
}
#else
/* where ? a : b, lane by lane; where is all ones or all zeros. */
NF_INLINE nf_v4_t nf_v4_select(nf_v4_int where, nf_v4_t a, nf_v4_t b)
{
    return (nf_v4_t)((where & (nf_v4_int)a) | (~where & (nf_v4_int)b));
}

NF_INLINE nf_v4_t nf_v4_max(nf_v4_t a, nf_v4_t b)
{
    return nf_v4_select((nf_v4_int)(a > b), a, b);
}

NF_INLINE nf_v4_t nf_v4_min(nf_v4_t a, nf_v4_t b)
{
    return nf_v4_select((nf_v4_int)(a < b), a, b);
}

NF_INLINE nf_v4_t nf_v4_fma(nf_v4_t a, nf_v4_t b, nf_v4_t c)
{
    const nf_v4_t product = a * b;
    return product + c;
}

NF_POWER(NF_NOTHING, nf_v4)

/* Beyond 2^23 every float is whole. */
NF_INLINE nf_v4_t nf_v4_floor(nf_v4_t x)
{
    for (int i = 0; i < 4; i++) {
        const float whole = x[i] > -8388608.0f && x[i] < 8388608.0f ? (float)(int32_t)x[i] : x[i];
        x[i] = whole > x[i] ? whole - 1.0f : whole;
    }
    return x;
}

/* Rounds by truncating positive numbers: no reliance on rounding mode or exact float algebra. */
NF_INLINE nf_v4_t nf_v4_exp2(nf_v4_t x)
{
    const nf_v4_t y = nf_v4_max(nf_v4_set(NF_EXP2_LOWEST), nf_v4_min(nf_v4_set(NF_EXP2_HIGHEST), x));
    const nf_v4_int biased = __builtin_convertvector(y + nf_v4_set(127.5f), nf_v4_int);
    const nf_v4_t f = y - (__builtin_convertvector(biased, nf_v4_t) - nf_v4_set(127.0f));
    return nf_v4_power(f) * (nf_v4_t)((nf_v4_bits)biased << 23);
}

NF_INLINE void nf_v4_transpose(float *dst, int dst_stride, const float *src, int src_stride, int dims)
{
    for (int t = 0; t < 4; t++)
        for (int d = 0; d < dims; d++)
            dst[d * dst_stride + t] = src[t * src_stride + d];
}
#endif

/* Rows end between vectors of four lanes. */
NF_INLINE nf_v4_t nf_v4_get(const float *p, int n)
{
    return n > 0 ? nf_v4_load(p) : nf_v4_set(0.0f);
}

NF_INLINE void nf_v4_put(float *p, nf_v4_t x, int n)
{
    if (n > 0)
        nf_v4_store(p, x);
}

/* What this processor has. The functions of a target that was not compiled in are null. */
#if defined(NF_X86)
#define NF_IF_avx512(what) what
#define NF_IF_avx2(what) what
#else
#define NF_IF_avx512(what) 0
#define NF_IF_avx2(what) 0
#endif
#if defined(NF_NEON)
#define NF_IF_neon(what) what
#else
#define NF_IF_neon(what) 0
#endif
#define NF_IF_c(what) what

#define NF_SUPPORTS(target, test) \
    NF_UNUSED static int nf_supports_##target(void) \
    { \
        return NF_IF_##target(test); \
    }
NF_SUPPORTS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
NF_SUPPORTS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
NF_SUPPORTS(neon, 1)
NF_SUPPORTS(c, 1)

#endif
