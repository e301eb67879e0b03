/* ---- matrix tiles of bf16: Intel AMX ----
 *
 * A tile is 16 rows of 64 bytes. A product of tiles takes A as rows of 32 bf16, B as 16 rows of 16 pairs (B[k / 2][n][k
 * % 2]) and adds to C, 16 x 16 floats. Rows that straddle cache lines load four times slower: everything is aligned to
 * 64 bytes.
 */
#ifndef NF_AMX_READY
#define NF_AMX_READY

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define NF_AMX __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define NF_IF_amx(function) function

/* Has the process the permission (bit 18)? Every processor with these tiles has the parts of AVX-512 used here. */
NF_UNUSED static int nf_supports_amx(void)
{
    unsigned long granted = 0;
    return nf_supports_avx512() && nf_amx_permission(NF_AMX_GRANTED, (unsigned long)(uintptr_t)&granted) == 0 &&
           (granted >> 18 & 1);
}

/* A product of tiles that is to be summed up: rows of A, rows of B, and how deep (in 32s). Strides in elements. */
typedef struct nf_amx_term {
    const uint16_t *a, *b;
    int a_stride, b_stride, depth;
} nf_amx_term;

NF_INLINE NF_AMX void nf_amx_begin(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles;
    memset(&tiles, 0, sizeof tiles);
    tiles.palette = 1;
    for (int i = 0; i < 8; i++)
        tiles.bytes[i] = 64, tiles.rows[i] = 16;
    __asm__ volatile("" : : "r"(&tiles) : "memory"); /* GCC 12 believes that only 8 bytes of it are read */
    _tile_loadconfig(&tiles);
}

NF_INLINE NF_AMX void nf_amx_end(void)
{
    _tile_release();
}

/* c [rows][cols] tiles = (add: c +) the sum of the terms, from tile (i, j) on; rows and cols are 1 or 2. */
NF_INLINE NF_AMX void nf_amx_block(float *c, int c_stride, int rows, int cols, const nf_amx_term *terms, int count,
                                   int i, int j, int add)
{
    const long step = (long)c_stride * 4;
    float *c0 = c + i * 16 * c_stride + j * 16, *c1 = c0 + 16 * c_stride;
    __asm__ volatile("" ::: "memory"); /* the compiler does not know what a tile is loaded from */
    if (add) {
        _tile_loadd(0, c0, step);
        if (cols > 1)
            _tile_loadd(1, c0 + 16, step);
        if (rows > 1)
            _tile_loadd(2, c1, step);
        if (rows > 1 && cols > 1)
            _tile_loadd(3, c1 + 16, step);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int t = 0; t < count; t++) {
        const long as = (long)terms[t].a_stride * 2, bs = (long)terms[t].b_stride * 2;
        const uint16_t *a = terms[t].a + i * 16 * terms[t].a_stride, *b = terms[t].b + j * 32;
        for (int k = 0; k < terms[t].depth; k++, a += 32, b += 16 * terms[t].b_stride) {
            _tile_loadd(4, a, as);
            _tile_loadd(6, b, bs);
            _tile_dpbf16ps(0, 4, 6);
            if (cols > 1) {
                _tile_loadd(7, b + 32, bs);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (rows > 1) {
                _tile_loadd(5, a + 16 * terms[t].a_stride, as);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (rows > 1 && cols > 1)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c0, step);
    if (cols > 1)
        _tile_stored(1, c0 + 16, step);
    if (rows > 1)
        _tile_stored(2, c1, step);
    if (rows > 1 && cols > 1)
        _tile_stored(3, c1 + 16, step);
    __asm__ volatile("" ::: "memory");
}

/* The same for any number of tiles, 2 x 2 at a time. */
NF_INLINE NF_AMX void nf_amx_product(float *c, int c_stride, int rows, int cols, const nf_amx_term *terms, int count,
                                     int add)
{
    int i = 0;
    for (; i + 2 <= rows; i += 2) {
        int j = 0;
        for (; j + 2 <= cols; j += 2)
            nf_amx_block(c, c_stride, 2, 2, terms, count, i, j, add);
        if (j < cols)
            nf_amx_block(c, c_stride, 2, 1, terms, count, i, j, add);
    }
    for (int j = 0; i < rows && j < cols; j++)
        nf_amx_block(c, c_stride, 1, 1, terms, count, i, j, add);
}

/* The largest of 16 floats. */
NF_INLINE NF_AMX float nf_amx_max(__m512 x)
{
    const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(NF_ALL8, _mm512_castps_pd(x), 1));
    const __m256 low = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(NF_ALL8, _mm512_castps_pd(x), 0));
    const __m256 half = _mm256_max_ps(low, high);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

/* 16 floats as bf16. */
NF_INLINE NF_AMX __m256i nf_amx_round(__m512 x)
{
    return (__m256i)_mm512_maskz_cvtneps_pbh(NF_ALL16, x);
}

/* 2^x as good as bf16 shows it: relative error 9e-5, exact at whole numbers. */
NF_INLINE NF_AMX __m512 nf_amx_exp2(__m512 x)
{
    const __m512 f = _mm512_maskz_reduce_ps(NF_ALL16, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(7.706437900e-2f), f, _mm512_set1_ps(2.276478990e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.951161349e-1f));
    return _mm512_maskz_scalef_ps(NF_ALL16, _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), x);
}

/* Pairs (a, b) of bf16. */
NF_INLINE NF_AMX __m512i nf_amx_pairs(__m256i a, __m256i b)
{
    const __m512i upper = _mm512_maskz_slli_epi32(NF_ALL16, _mm512_maskz_cvtepu16_epi32(NF_ALL16, b), 16);
    return _mm512_or_si512(_mm512_maskz_cvtepu16_epi32(NF_ALL16, a), upper);
}

NF_INLINE NF_AMX __m512 nf_amx_float(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(NF_ALL16, _mm512_maskz_cvtepu16_epi32(NF_ALL16, x), 16));
}

/* A row of 32 floats as bf16, and what that leaves of them. Returns whether anything is left. */
NF_INLINE NF_AMX int nf_amx_split(uint16_t *high, uint16_t *low, const float *x)
{
    int left = 0;
    NF_UNROLL
    for (int i = 0; i < 32; i += 16) {
        const __m512 y = _mm512_loadu_ps(x + i);
        const __m256i h = nf_amx_round(y);
        const __m512 rest = _mm512_sub_ps(y, nf_amx_float(h));
        _mm256_storeu_si256((__m256i *)(void *)(high + i), h);
        _mm256_storeu_si256((__m256i *)(void *)(low + i), nf_amx_round(rest));
        left |= _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
    }
    return left;
}

/* Rows of pairs [16 i ..][pair] become B: b[pair][row]. Counts are multiples of 16, strides are in pairs. */
NF_INLINE NF_AMX void nf_amx_turn(uint16_t *b, int b_stride, const uint16_t *a, int a_stride, int rows, int pairs)
{
    for (int i = 0; i < rows; i += 16)
        for (int p = 0; p < pairs; p += 16)
            nf_v16_transpose((float *)(void *)b + p * b_stride + i, b_stride,
                             (const float *)(const void *)a + i * a_stride + p, a_stride, 16);
}
#else
#define NF_IF_amx(function) 0
NF_UNUSED static int nf_supports_amx(void)
{
    return 0;
}
#endif

#endif
