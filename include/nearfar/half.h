/* ---- tensors of 16-bit floats: loaded as and rounded from float, to nearest, ties to even ----
 *
 * get and put of simd.h for bf16 and f16: n lanes, n a constant, a multiple of 8 (of 4 on four lanes) or not positive.
 */
#ifndef NF_HALF_READY
#define NF_HALF_READY

NF_INLINE float nf_bf16_float(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

NF_INLINE uint16_t nf_bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Exponent and places move into a float's; a subnormal number becomes a normal one by the subtraction. */
NF_INLINE float nf_f16_float(uint16_t half)
{
    const uint32_t places = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = places & 0xf800000u;
    uint32_t bits = places + (exponent == 0xf800000u ? (uint32_t)(255 - 31) << 23 : (uint32_t)(127 - 15) << 23);
    float x;
    if (exponent == 0)
        bits += 1u << 23;
    memcpy(&x, &bits, sizeof x);
    if (exponent == 0) {
        x -= 6.103515625e-05f;
        memcpy(&bits, &x, sizeof bits);
    }
    bits |= sign;
    memcpy(&x, &bits, sizeof x);
    return x;
}

NF_INLINE uint16_t nf_f16_of(float x)
{
    uint32_t bits, sign;
    memcpy(&bits, &x, sizeof bits);
    sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (bits >= 0x477ff000u) /* 65520 and more */
        return (uint16_t)(sign | 0x7c00u);
    if (bits < 0x38800000u) { /* subnormal: 0.5 has its last place at 2^-24 */
        memcpy(&x, &bits, sizeof x);
        x += 0.5f;
        memcpy(&bits, &x, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits - ((uint32_t)(127 - 15) << 23) + 0xfffu + (bits >> 13 & 1)) >> 13));
}

#if defined(NF_X86)
NF_INLINE NF_V16 __m256i nf_v16_get_half(const uint16_t *p, int n)
{
    if (n >= 16)
        return _mm256_loadu_si256((const __m256i *)(const void *)p);
    return n > 0 ? _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128((const __m128i *)(const void *)p), 0)
                 : _mm256_setzero_si256();
}

NF_INLINE NF_V16 void nf_v16_put_half(uint16_t *p, __m256i x, int n)
{
    if (n >= 16)
        _mm256_storeu_si256((__m256i *)(void *)p, x);
    else if (n > 0)
        _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(x));
}

NF_INLINE NF_V16 nf_v16_t nf_v16_get_bf16(const uint16_t *p, int n)
{
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(NF_ALL16, nf_v16_get_half(p, n));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(NF_ALL16, wide, 16));
}

NF_INLINE NF_V16 void nf_v16_put_bf16(uint16_t *p, nf_v16_t x, int n)
{
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_maskz_srli_epi32(NF_ALL16, bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __m512i y =
        _mm512_mask_mov_epi32(_mm512_maskz_srli_epi32(NF_ALL16, up, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
    nf_v16_put_half(p, _mm512_maskz_cvtepi32_epi16(NF_ALL16, y), n);
}

NF_INLINE NF_V16 nf_v16_t nf_v16_get_f16(const uint16_t *p, int n)
{
    return _mm512_maskz_cvtph_ps(NF_ALL16, nf_v16_get_half(p, n));
}

NF_INLINE NF_V16 void nf_v16_put_f16(uint16_t *p, nf_v16_t x, int n)
{
    nf_v16_put_half(p, _mm512_maskz_cvtps_ph(NF_ALL16, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

NF_INLINE NF_V8 __m128i nf_v8_get_half(const uint16_t *p, int n)
{
    return n > 0 ? _mm_loadu_si128((const __m128i *)(const void *)p) : _mm_setzero_si128();
}

NF_INLINE NF_V8 void nf_v8_put_half(uint16_t *p, __m128i x, int n)
{
    if (n > 0)
        _mm_storeu_si128((__m128i *)(void *)p, x);
}

NF_INLINE NF_V8 nf_v8_t nf_v8_get_bf16(const uint16_t *p, int n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(nf_v8_get_half(p, n)), 16));
}

NF_INLINE NF_V8 void nf_v8_put_bf16(uint16_t *p, nf_v8_t x, int n)
{
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i y = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), nan, is_nan);
    nf_v8_put_half(p, _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)), n);
}

NF_INLINE NF_V8 nf_v8_t nf_v8_get_f16(const uint16_t *p, int n)
{
    return _mm256_cvtph_ps(n > 0 ? _mm_loadu_si128((const __m128i *)(const void *)p) : _mm_setzero_si128());
}

NF_INLINE NF_V8 void nf_v8_put_f16(uint16_t *p, nf_v8_t x, int n)
{
    if (n > 0)
        _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

#define NF_V4_HALF(dtype) \
    NF_INLINE nf_v4_t nf_v4_get_##dtype(const uint16_t *p, int n) \
    { \
        float lane[4] = {0, 0, 0, 0}; \
        for (int i = 0; i < 4 && n > 0; i++) \
            lane[i] = nf_##dtype##_float(p[i]); \
        return nf_v4_load(lane); \
    } \
    NF_INLINE void nf_v4_put_##dtype(uint16_t *p, nf_v4_t x, int n) \
    { \
        float lane[4]; \
        nf_v4_store(lane, x); \
        for (int i = 0; i < 4 && n > 0; i++) \
            p[i] = nf_##dtype##_of(lane[i]); \
    }
NF_V4_HALF(bf16)
NF_V4_HALF(f16)
#undef NF_V4_HALF

#endif
