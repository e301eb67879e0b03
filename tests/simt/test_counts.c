/* What favor and linear in bf16 do per token on matrix units, counted by the executor: no more than their algorithm
 * asks for. The build says -DCONTRACT=<name> and -DNUMBERS="D = .., M = .., ROWS = .., GROUPS = .., X = ..": its own
 * (of linear M = D and ROWS = 0: there is no projection), the warps that share 16 tokens, and the special function
 * unit's share of the powers, one of X. docs/gpu.md has the numbers. */
#include "check.h"
#include "simt.h"

#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define PASTE(c, entry) nf_##c##_cuda##entry
#define JOIN(c, entry) PASTE(c, entry)
#define K(entry) JOIN(CONTRACT, _##entry)

#define NEARFAR_STATIC
#include NAME(JOIN(CONTRACT, ).h)

#include <stdio.h>
#include <stdlib.h>

enum { NUMBERS, CHUNK = 64, WARP = 32 };

static void *memory(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, NF_ALIGN, bytes))
        abort();
    memset(p, 0, bytes);
    simt_memory(p, bytes);
    return p;
}

/* The counts of a causal forward of one head. */
static simt_counts counts_of(int64_t tokens)
{
    const size_t row = (size_t)tokens * D * sizeof(uint16_t), bytes = K(workspace)(NULL);
    void *all[6] = {memory(row), memory(row), memory(row), memory(row), memory(bytes), NULL};
    nf_args a;
    memset(&a, 0, sizeof a);
#ifdef FEATURES
    all[5] = memory(K(projection_bytes)());
    CHECK(K(projection_init)(all[5], 1, NULL) == NF_OK, "init");
#endif
    a.batch = a.heads = 1, a.q_tokens = tokens, a.projection = all[5];
    a.q.data = all[0], a.k.data = all[1], a.v.data = all[2], a.out.data = all[3];
    memset(&simt.counts, 0, sizeof simt.counts);
    CHECK(K(forward)(&a, all[4], bytes) == NF_OK, "forward");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        simt_forget(all[i]), free(all[i]);
    return simt.counts;
}

Test(counts, per_token)
{
    enum { CHANNELS = D / 16, TILES = CHUNK / 16 };
    const simt_counts one = counts_of(CHUNK), two = counts_of(2 * CHUNK);
    const double tokens = CHUNK, seen = (TILES + 1) / 2.0; /* tiles of keys that a warp's queries see, on average */
    const double products = (double)(two.products - one.products) / WARP / tokens;
    const double matrices = (double)(two.matrices - one.matrices) / WARP / tokens;
    const double powers = (double)(two.powers - one.powers) / tokens;
    const double bytes = (double)(two.loaded - one.loaded + two.stored - one.stored) / tokens;
    /* Of 16 tokens: keys and queries times w, or (ROWS = 0) as they are; S and z, written and read; scores, their sums,
     * and times values. Warps that share tokens read queries, their features and weights from shared memory, and each
     * makes the sums of weights. */
    const int shared = GROUPS > 1 ? GROUPS : 0;
    const double right_products = 2 * (2 * ROWS / 16 * CHANNELS) + M / 16 * (2 * CHANNELS + 1) +
                                  M / 16 * (2 * CHANNELS + GROUPS) + seen * (2 * M / 16 + GROUPS + 2 * CHANNELS);
    const double right_matrices = (ROWS ? ROWS / 16 * CHANNELS * (1.0 / TILES + 1) : CHANNELS) +
                                  (GROUPS + ROWS / 16) * CHANNELS + TILES * GROUPS * CHANNELS +
                                  M / 16 * (CHANNELS + GROUPS + shared) +
                                  seen * (M / 16 + CHANNELS + (shared ? M / 16 + shared : 0));
    printf("of a token: %.2f products of 16 x 8 x 16, %.2f ldmatrix, %.0f powers, %.0f bytes of tensors, shared memory "
           "%.0f "
           "bytes by ldmatrix, %.0f read and %.0f written otherwise\n",
           products, matrices, powers, bytes, matrices * 512, (double)(two.shared_loaded - one.shared_loaded) / tokens,
           (double)(two.shared_stored - one.shared_stored) / tokens);
    CHECK(products == right_products / 16, "%g products, not %g", products, right_products / 16);
    CHECK(matrices == right_matrices / 16, "%g ldmatrix, not %g", matrices, right_matrices / 16);
    CHECK(powers == 2 * M / X, "%g powers, not %d", powers, 2 * M / X);
    CHECK(bytes == 4 * D * 2, "%g bytes: every number is to be read or written once", bytes);
}
