/* The ceiling of a GPU's matrix units for 16-bit kernels: products of bf16 tiles held in registers, as the kernels
 * themselves make them (gpu.h). On NVIDIA that is mma.sync; what wgmma adds on sm_90 is not in it. */
#define NF_ON_GPU
#include "device.h"

#include <string.h>

#include "args.h"

#include "gpu.h"

enum { THREADS = 256, TILES = 6 };

/* w.length times TILES products per warp. Operands are random signs, so that the units draw the power that data does;
 * slots[0] becomes the warps of a block, 0 where there are no matrix units. */
NF_KERNEL(THREADS, 2) products(nf_work w)
{
#if defined(NF_FRAGMENTS) && !(defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
    nf_fragment a, b[TILES];
    nf_sums sums[TILES];
    float all = 0;
    for (int i = 0; i < NF_FRAGMENT_WORDS; i++) {
        a.word[i] = 0x3f803f80u ^ ((uint32_t)(nf_thread() * 0x9e3779b1u + (unsigned)i * 0x85ebca6bu) & 0x80008000u);
        for (int t = 0; t < TILES; t++)
            b[t].word[i] = a.word[i] ^ ((uint32_t)(t * 0x10001) << 15 & 0x80008000u);
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < NF_SUMS; i++)
            sums[t].at[i] = 0;
    for (int64_t step = 0; step < w.length; step++) {
        NF_UNROLLED
        for (int t = 0; t < TILES; t++)
            nf_product_bf16(&sums[t], a, b[t]);
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < NF_SUMS; i++)
            all += sums[t].at[i];
    if (nf_block_x() == 0 && nf_thread() == 0)
        w.slots[0] = (float)(THREADS / NF_FRAGMENT_LANES);
    if (all != all) /* never: but the sums are needed */
        w.slots[1] = all;
#else
    (void)w;
#endif
}

static void launch(void *on)
{
    const nf_work *w = (const nf_work *)on;
    nf_launch(products, w, w->count, 1, THREADS, 0);
}

double device_product_rate(long units)
{
    static float slots[2];
    nf_work w;
    double best = 1e300;
    memset(&w, 0, sizeof w);
    device_mirror(slots, sizeof slots);
    w.plan.args = device_args(&w.plan.args);
    w.slots = (float *)device_address(slots);
    w.count = 2 * units;
    for (w.length = 1; w.length < 1 << 20 && device_time(launch, &w) < 3e-3; w.length *= 2)
        continue;
    for (int i = 0; i < 10; i++) {
        const double seconds = device_time(launch, &w);
        best = seconds < best ? seconds : best;
    }
    device_fetch();
    device_forget(slots);
    return 2.0 * 16 * 16 * 16 * TILES * (double)slots[0] * (double)(w.length * w.count) / best;
}
