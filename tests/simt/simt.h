/* The executor: runs the kernels of a GPU header on a CPU, every GPU thread a fiber, one block after the other. It is
 * the third implementation of the vocabulary of include/nearfar/gpu.h; include it before the header.
 *
 * What it knows of a GPU: warps of 32 or 64 lanes; barriers and warp operations that all threads (lanes) must reach at
 * the same line; shared memory that starts as NaN; async copies that land at their wait and not before. If the kernels
 * are compiled with -fsanitize=thread (and linked without it: simt.c has the functions that the compiler calls), every
 * load and store is checked too: outside all buffers, misaligned, or in a race with another thread.
 *
 * A fault ends the launch. It is printed and the program aborts, unless simt.quiet is set: then it is in simt.fault.
 */
#ifndef SIMT_H
#define SIMT_H
#define NEARFAR_SIMT

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What kernels have done, of all threads together; an operation of a whole warp counts once for each of its lanes. */
typedef struct simt_counts {
    int64_t products;                                     /* of 16 x 8 x 16, or of 16 x 16 x 16 on AMD */
    int64_t matrices;                                     /* ldmatrix: four of 8 x 8 */
    int64_t powers;                                       /* on the special function unit */
    int64_t loaded, stored, shared_loaded, shared_stored; /* bytes, outside of ldmatrix */
} simt_counts;

typedef struct simt_setting {
    int warp;            /* lanes: 32 or 64 */
    int backwards;       /* run the threads of a block, and the blocks, last first */
    int quiet;           /* note a fault instead of aborting */
    char fault[400];     /* the first fault since it was cleared */
    int64_t block[2];    /* of the running thread */
    int thread;          /* the running thread */
    size_t shared_limit; /* of a block, bytes */
    int64_t launches;    /* so far */
    simt_counts counts;  /* so far */
} simt_setting;

extern simt_setting simt;

/* Memory of the device: what kernels may touch. simt_forget knows it by its start. */
void simt_memory(const void *at, size_t bytes);
void simt_forget(const void *at);

/* Run enter(context) as every thread of blocks[0] * blocks[1] blocks. 0, or -1 after a fault. SIMT_ENTER marks such a
 * function: it reads the host's memory, unchecked. */
#define SIMT_ENTER __attribute__((no_sanitize("thread"))) static void
int simt_launch(void (*enter)(const void *context), const void *context, const int64_t *blocks, int threads,
                size_t shared);

void *simt_shared(void);
void simt_barrier(int line);
void simt_warp_barrier(int line);

/* All lanes of the warp bring `bytes` of `mine`; returns what they brought, SIMT_SLOT bytes apart. Valid until the
 * lane's next but one warp operation. */
enum { SIMT_SLOT = 64 };
const unsigned char *simt_exchange(const void *mine, size_t bytes, int line);

void simt_smallest(int *p, int x, int line);

/* Async copies of 16 bytes, or of zeros if they are not there: what was committed in a group lands at the wait that
 * leaves fewer groups open. */
void simt_copy(void *to, const void *from, int there, int line);
void simt_copy_commit(void);
void simt_copy_wait(int open);

/* A check of a load or store on behalf of the running thread, as instrumented code makes them. */
void simt_access(const void *at, size_t bytes, int write, int line);

/* Functions of the vocabulary: of the executor, not of the kernel. */
#define SIMT_FN __attribute__((unused, no_sanitize("thread"))) static inline

/* ---- the vocabulary ---------------------------------------------------------------------------------------------- */

#define NF_KERNEL(threads, blocks) static void
#define NF_DEVICE static inline __attribute__((unused))
#define NF_UNROLLED
#define NF_UNROLLED_BY(n)
#define NF_GMEM(p) (p)

typedef struct nf_float4 {
    float x, y, z, w;
} nf_float4;

#define nf_thread() simt.thread
#define nf_block_x() simt.block[0]
#define nf_block_y() simt.block[1]
#define nf_shared() simt_shared()
#define nf_barrier() simt_barrier(__LINE__)
#define nf_warp_barrier() simt_warp_barrier(__LINE__)
#define nf_load4(p) simt_load4(p, __LINE__)
#define nf_store4(p, x) simt_store4(p, x, __LINE__)
#define nf_lane_xor(x, other) simt_lane_xor(x, other, __LINE__)
#define nf_lane_xor_double(x, other) simt_lane_xor_double(x, other, __LINE__)
#define nf_lane_at(x, lane) simt_lane_at(x, lane, __LINE__)
#define nf_any(x) simt_any(x, __LINE__)
#define nf_smallest(p, x) simt_smallest(p, x, __LINE__)
#define nf_copy_async(to, from, there) simt_copy(to, from, there, __LINE__)
#define nf_copy_commit() simt_copy_commit()
#define nf_copy_wait(open) simt_copy_wait(open)

SIMT_FN nf_float4 simt_load4(const float *p, int line)
{
    nf_float4 x;
    simt_access(p, sizeof x, 0, line);
    memcpy(&x, p, sizeof x);
    return x;
}

SIMT_FN void simt_store4(float *p, nf_float4 x, int line)
{
    simt_access(p, sizeof x, 1, line);
    memcpy(p, &x, sizeof x);
}

SIMT_FN float simt_lane_xor(float x, int other, int line)
{
    const unsigned char *all = simt_exchange(&x, sizeof x, line);
    memcpy(&x, all + (simt.thread % simt.warp ^ other) * SIMT_SLOT, sizeof x);
    return x;
}

SIMT_FN double simt_lane_xor_double(double x, int other, int line)
{
    const unsigned char *all = simt_exchange(&x, sizeof x, line);
    memcpy(&x, all + (simt.thread % simt.warp ^ other) * SIMT_SLOT, sizeof x);
    return x;
}

SIMT_FN float simt_lane_at(float x, int lane, int line)
{
    const unsigned char *all = simt_exchange(&x, sizeof x, line);
    memcpy(&x, all + lane * SIMT_SLOT, sizeof x);
    return x;
}

SIMT_FN int simt_any(int x, int line)
{
    const unsigned char *all = simt_exchange(&x, sizeof x, line);
    int any = 0;
    for (int lane = 0; lane < simt.warp; lane++) {
        memcpy(&x, all + lane * SIMT_SLOT, sizeof x);
        any |= x != 0;
    }
    return any;
}

/* ---- matrix units: every lane brings its words, and takes its sums from everybody's -------------------------------
 */

/* A 16-bit number as a float. */
SIMT_FN float simt_number(uint16_t bits, int bf16)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, rest = bits & 0x3ffu;
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    if (!bf16 && exponent == 0)
        return (sign ? -1.0f : 1.0f) * ldexpf((float)rest, -24);
    if (!bf16)
        wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | rest << 13;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* Number `index` of the words that a lane has brought. */
SIMT_FN float simt_word(const unsigned char *all, int lane, int index, int bf16)
{
    uint16_t bits;
    memcpy(&bits, all + lane * SIMT_SLOT + 2 * index, sizeof bits);
    return simt_number(bits, bf16);
}

SIMT_FN void simt_ldmatrix(uint32_t *r, const void *row, int transposed, int line)
{
    const unsigned char *all;
    const int lane = simt.thread % simt.warp;
    simt_access(row, 16, 0, line);
    simt.counts.shared_loaded -= 16, simt.counts.matrices++;
    all = simt_exchange(row, 16, line);
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            const int a = lane / 4, b = lane % 4 * 2 + half;
            uint16_t x;
            memcpy(&x, all + (8 * i + (transposed ? b : a)) * SIMT_SLOT + 2 * (transposed ? a : b), sizeof x);
            r[i] = half ? r[i] | (uint32_t)x << 16 : x;
        }
}

/* mma.m16n8k16, PTX ISA: group = lane / 4, within = lane % 4. Number i of a: row group, + 8 if i / 2 is odd; k 2 within
 * + i % 2, + 8 if i >= 4. Of b: k 2 within + i % 2, + 8 if i >= 2; column group. Of c: row group, + 8 if i >= 2; column
 * 2 within + i % 2. */
SIMT_FN void simt_mma(float *c, const uint32_t *a, const uint32_t *b, int bf16, int line)
{
    const int lane = simt.thread % simt.warp;
    uint32_t mine[6];
    const unsigned char *all;
    simt.counts.products++;
    memcpy(mine, a, 16);
    memcpy(mine + 4, b, 8);
    all = simt_exchange(mine, sizeof mine, line);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int within = k % 8 / 2, odd = k % 2, high = k / 8;
            const float x = simt_word(all, row % 8 * 4 + within, high * 4 + row / 8 * 2 + odd, bf16);
            c[i] += x * simt_word(all, column * 4 + within, 8 + high * 2 + odd, bf16);
        }
    }
}

/* AMD's, 16 x 16 x 16. kind 2: MFMA, a wave of 64 (CDNA3 ISA): lane l has row (column) l % 16 at k 4 (l / 16) + i; of
 * c, row 4 (l / 16) + i of column l % 16. kind 3: WMMA of RDNA3, a wave of 32: row l % 16 at all k, both halves of the
 * wave the same; of c, row 2 i + l / 16. kind 4: WMMA of RDNA4: k 8 (l / 16) + i; of c, row 8 (l / 16) + i. */
SIMT_FN void simt_matrix(float *c, const uint32_t *a, const uint32_t *b, int kind, int bf16, int line)
{
    const int lane = simt.thread % simt.warp, words = kind == 2 ? 2 : kind == 3 ? 8 : 4, sums = kind == 2 ? 4 : 8;
    const int each = kind == 3 ? 16 : 2 * words; /* numbers of a lane */
    uint32_t mine[16];
    const unsigned char *all;
    simt.counts.products++;
    memcpy(mine, a, (size_t)words * 4);
    memcpy(mine + words, b, (size_t)words * 4);
    all = simt_exchange(mine, (size_t)words * 8, line);
    for (int i = 0; i < sums; i++) {
        const int row = kind == 3 ? 2 * i + lane / 16 : sums * (lane / 16) + i, column = lane % 16;
        for (int k = 0; k < 16; k++) {
            const int from = k / each * 16, other = kind == 3 ? lane / 16 * 16 : from;
            const float x = simt_word(all, other + row, k % each, bf16);
            c[i] += x * simt_word(all, other + column, 2 * words + k % each, bf16);
        }
    }
}

SIMT_FN float nf_f16_read(uint16_t half)
{
    return simt_number(half, 0);
}

/* In units of the last place, which of subnormal numbers is 2^-24. */
SIMT_FN uint16_t nf_f16_round(float x)
{
    const int sign = signbit(x) ? 0x8000 : 0;
    int exponent;
    if (isnan(x) || fabsf(x) >= 65536)
        return (uint16_t)(sign | (isnan(x) ? 0x7e00 : 0x7c00));
    (void)frexpf(x, &exponent);
    exponent = exponent < -13 || x == 0 ? -13 : exponent;
    return (uint16_t)(sign | (((exponent + 13) << 10) + (int)nearbyintf(ldexpf(fabsf(x), 11 - exponent))));
}

#define nf_ldmatrix(r, row) simt_ldmatrix(r, row, 0, __LINE__)
#define nf_ldmatrix_transposed(r, row) simt_ldmatrix(r, row, 1, __LINE__)
#define nf_mma_bf16_16x8(c, a, b) simt_mma(c, a, b, 1, __LINE__)
#define nf_mma_f16_16x8(c, a, b) simt_mma(c, a, b, 0, __LINE__)
#define nf_matrix_bf16(c, a, b) simt_matrix(c, a, b, NF_FRAGMENTS, 1, __LINE__)
#define nf_matrix_f16(c, a, b) simt_matrix(c, a, b, NF_FRAGMENTS, 0, __LINE__)

SIMT_FN float nf_exp2(float x)
{
    return exp2f(x);
}

SIMT_FN float nf_exp2_unit(float x)
{
    simt.counts.powers++;
    return x < -126 ? 0 : exp2f(x);
}

SIMT_FN float nf_floor(float x)
{
    return floorf(x);
}

SIMT_FN float nf_nearest(float x)
{
    return rintf(x);
}

SIMT_FN float nf_scale_by(float p, float n)
{
    return ldexpf(p, (int)n);
}

SIMT_FN float nf_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}

SIMT_FN float nf_larger(float a, float b)
{
    return fmaxf(a, b);
}

#ifdef __cplusplus
}
#endif
#endif
