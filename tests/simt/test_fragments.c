/* The matrix units: the product of two tiles through fragments, against plain loops, in the layout that the build says
 * (-DNF_FRAGMENTS, 1 to 4: PTX, CDNA, RDNA3, RDNA4). */
#include "check.h"
#include "simt.h"

#include "nearfar/core.h"

#include "nearfar/pattern.h"

#include "nearfar/args.h"

#include "nearfar/gpu.h"

#include <stdio.h>
#include <stdlib.h>

enum { STRIDE = 24, WARPS = 2, ALONG = 0, DOWN = 1, BY_LEFT = 2 };

/* Two tiles and their product. */
typedef struct work {
    uint16_t a[WARPS][16 * STRIDE], b[WARPS][16 * STRIDE];
    float c[WARPS][16 * 16];
    int bf16, down; /* down: the left operand's tile lies with k down the rows */
    int how;        /* the right one's: along rows, down the rows, or along rows by way of a left operand */
} work;

static work memory __attribute__((aligned(64)));

NF_KERNEL(WARPS *NF_FRAGMENT_LANES, 1) product_kernel(work *w)
{
    uint16_t *s = (uint16_t *)nf_shared();
    const int warp = nf_thread() / NF_FRAGMENT_LANES;
    nf_fragment a, b;
    nf_sums c;
    for (int i = nf_thread(); i < WARPS * 16 * STRIDE; i += WARPS * NF_FRAGMENT_LANES) {
        s[i] = w->a[i / (16 * STRIDE)][i % (16 * STRIDE)];
        s[WARPS * 16 * STRIDE + i] = w->b[i / (16 * STRIDE)][i % (16 * STRIDE)];
    }
    nf_barrier();
    s += warp * 16 * STRIDE;
    a = w->down ? nf_left_columns(s, STRIDE) : nf_left_rows(s, STRIDE);
    s += WARPS * 16 * STRIDE;
    b = w->how == ALONG  ? nf_right_rows(s, STRIDE)
        : w->how == DOWN ? nf_right_columns(s, STRIDE)
                         : nf_right(nf_left_rows(s, STRIDE));
    for (int i = 0; i < NF_SUMS; i++)
        c.at[i] = w->c[warp][nf_sum_row(i) * 16 + nf_sum_column(i)];
    if (w->bf16)
        nf_product_bf16(&c, a, b);
    else
        nf_product_f16(&c, a, b);
    for (int i = 0; i < NF_SUMS; i++)
        w->c[warp][nf_sum_row(i) * 16 + nf_sum_column(i)] = c.at[i];
}

SIMT_ENTER enter(const void *context)
{
    (void)context;
    product_kernel(&memory);
}

/* Whole numbers up to 15, as bf16 or f16: all sums are exact. */
static uint16_t number(int x, int bf16)
{
    const float y = (float)x;
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    if (bf16)
        return (uint16_t)(bits >> 16);
    return (uint16_t)(x ? (bits >> 31) << 15 | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 0x3ff) : 0);
}

static void product_is_right(int bf16, int down, int how)
{
    static int a[WARPS][16][16], b[WARPS][16][16]; /* row (column), k */
    const int64_t blocks[2] = {1, 1};
    memset(&memory, 0xff, sizeof memory);
    memory.bf16 = bf16, memory.down = down, memory.how = how;
    for (int i = 0; i < WARPS * 256; i++) {
        const int w = i / 256, r = i / 16 % 16, k = i % 16;
        a[w][r][k] = (i * 37 + i / 7) % 31 - 15, b[w][r][k] = (i * 53 + i / 5) % 31 - 15;
        memory.a[w][down ? k * STRIDE + r : r * STRIDE + k] = number(a[w][r][k], bf16);
        memory.b[w][how == DOWN ? k * STRIDE + r : r * STRIDE + k] = number(b[w][r][k], bf16);
        memory.c[w][i % 256] = (float)i;
    }
    simt_memory(&memory, sizeof memory);
    simt.warp = NF_FRAGMENT_LANES, simt.quiet = 1, simt.fault[0] = 0;
    simt_launch(enter, NULL, blocks, WARPS * NF_FRAGMENT_LANES, 2 * WARPS * 16 * STRIDE * sizeof(uint16_t));
    simt_forget(&memory);
    CHECK(!simt.fault[0], "%s", simt.fault);
    for (int i = 0; i < WARPS * 256; i++) {
        const int w = i / 256, r = i / 16 % 16, n = i % 16;
        int sum = i;
        for (int k = 0; k < 16; k++)
            sum += a[w][r][k] * b[w][n][k];
        CHECK(memory.c[w][i % 256] == (float)sum, "warp %d row %d column %d (%d, %d): %g, not %d", w, r, n, down, how,
              (double)memory.c[w][i % 256], sum);
    }
}

Test(fragments, products)
{
    for (int i = 0; i < 12; i++)
        product_is_right(i & 1, i >> 1 & 1, i >> 2);
}

/* f16 with its denormal numbers, infinity and sign. */
Test(fragments, halves)
{
    CHECK(simt_number(0x3c00, 0) == 1 && simt_number(0xc500, 0) == -5 && simt_number(0x0001, 0) == ldexpf(1, -24),
          "f16");
    CHECK(isinf(simt_number(0x7c00, 0)) && isnan(simt_number(0x7e00, 0)) && simt_number(0x7bff, 0) == 65504, "f16");
    CHECK(nf_f16_round(0) == 0 && nf_f16_round(-1) == 0xbc00 && nf_f16_round(ldexpf(3, -25)) == 2 &&
              nf_f16_round(65520) == 0x7c00 && nf_f16_round(65519) == 0x7bff,
          "rounding to f16");
    CHECK(simt_number(0x3f80, 1) == 1 && simt_number(0xc0a0, 1) == -5, "bf16");
}
