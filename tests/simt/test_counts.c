/* What kernels of bf16 do per token on matrix units, counted by the executor: no more than their algorithm asks for.
 * The build says -DCONTRACT=<name> and -DNUMBERS: D, M, ROWS of the contract (of linear M = D and ROWS = 0: there is no
 * projection), CHUNK, its tokens, GROUPS, the warps that share 16 of them, X: one of X powers is the special function
 * unit's; and of what attends to single keys NEAR, the keys of a tile (0: nothing does), and the pattern's WINDOW (0:
 * none). docs/gpu.md has the numbers. */
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

/* So many heads that no sequence is cut into segments. Hybrid has no globals: it would fold a chunk without them. */
enum { NUMBERS, WARP = 32, HEADS = 128, GLOBALS = WINDOW && !M ? 4 : 0, BEFORE = WINDOW + CHUNK };

static void *memory(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, NF_ALIGN, bytes))
        abort();
    memset(p, 0, bytes);
    simt_memory(p, bytes);
    return p;
}

/* The counts of one head of a causal forward. */
static simt_counts counts_of(int64_t tokens)
{
    const size_t row = (size_t)tokens * HEADS * D * sizeof(uint16_t), bytes = K(workspace)(NULL);
    void *all[6] = {memory(row), memory(row), memory(row), memory(row), memory(bytes), NULL};
    const nf_pattern pattern = {.window = WINDOW, .globals = GLOBALS};
    nf_args a;
    memset(&a, 0, sizeof a);
#ifdef FEATURES
    all[5] = memory(K(projection_bytes)());
    CHECK(K(projection_init)(all[5], 1, NULL) == NF_OK, "init");
#endif
    a.batch = a.split_count = 1, a.heads = HEADS, a.q_tokens = tokens, a.projection = all[5];
    a.pattern = WINDOW ? &pattern : NULL;
    a.q.data = all[0], a.k.data = all[1], a.v.data = all[2], a.out.data = all[3];
    memset(&simt.counts, 0, sizeof simt.counts);
    CHECK(K(forward)(&a, all[4], bytes) == NF_OK, "forward");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        simt_forget(all[i]), free(all[i]);
    return simt.counts;
}

/* The first key that the chunk behind BEFORE tokens sees near by, and the first query 16 w of it, from the chunk's
 * first token on. (hybrid's window is of blocks before the query's own, as long as a chunk here.) */
static int near_from(int w)
{
    return !WINDOW ? -BEFORE : M ? -WINDOW : 16 * w + 1 - WINDOW;
}

/* Pairs of a warp of the chunk and a tile of keys of which one sees another. */
static int meetings(void)
{
    int count = GLOBALS ? CHUNK / 16 : 0;
    for (int key = near_from(0); key < CHUNK; key += NEAR)
        for (int w = 0; w < CHUNK / 16; w++)
            count += key < 16 * (w + 1) && key + NEAR > near_from(w);
    return count;
}

Test(counts, per_token)
{
    enum { CHANNELS = D / 16, TILES = CHUNK / 16 };
    const simt_counts one = counts_of(BEFORE), two = counts_of(BEFORE + CHUNK);
    /* Tiles that a warp's queries see on average: of 16 keys, through features; of NEAR keys, one by one. */
    const double tokens = CHUNK, seen = NEAR ? 0 : (TILES + 1) / 2.0, near = NEAR ? meetings() / (double)TILES : 0;
    const double products = (double)(two.products - one.products) / WARP / tokens;
    const double matrices = (double)(two.matrices - one.matrices) / WARP / tokens;
    const double powers = (double)(two.powers - one.powers) / tokens;
    const double bytes = (double)(two.loaded - one.loaded + two.stored - one.stored) / tokens;
    /* Of 16 tokens: keys and queries times w, or (ROWS = 0) as they are; S and z, written and read; scores, their sums,
     * and times values; near keys the same. Warps that share tokens read queries, their features and weights from
     * shared memory, and each makes the sums of weights. */
    const int shared = GROUPS > 1 ? GROUPS : 0;
    const double right_products = 2 * (2 * ROWS / 16 * CHANNELS) + M / 16 * (2 * CHANNELS + 1) +
                                  M / 16 * (2 * CHANNELS + GROUPS) + seen * (2 * M / 16 + GROUPS + 2 * CHANNELS) +
                                  near * NEAR / 16 * (4 * CHANNELS + 1);
    const double right_matrices = (ROWS ? ROWS / 16 * CHANNELS * (1.0 / TILES + 1)
                                   : M  ? CHANNELS
                                        : 0) +
                                  (M ? (GROUPS + ROWS / 16) * CHANNELS + TILES * GROUPS * CHANNELS : 0) +
                                  M / 16 * (CHANNELS + GROUPS + shared) +
                                  seen * (M / 16 + CHANNELS + (shared ? M / 16 + shared : 0)) + (NEAR ? CHANNELS : 0) +
                                  near * NEAR / 16 * 2 * CHANNELS;
    /* of features, of near weights, of how far maxima have risen (two lanes' worth a row) */
    const double right_powers = 2 * M / X + near * (NEAR + 4);
    /* queries (hybrid: fitted and as they are) and outputs, once; keys and values of features, and of the near field */
    const double right_bytes = ((NEAR && M ? 3 : 2) + (M ? 2 : 0)) * D * 2 +
                               (NEAR ? (CHUNK - near_from(0) + GLOBALS) / tokens * 2 * D * 2 : 0);
    printf("of a token: %.2f products of 16 x 8 x 16, %.2f ldmatrix, %.0f powers, %.0f bytes of tensors, shared memory "
           "%.0f "
           "bytes by ldmatrix, %.0f read and %.0f written otherwise\n",
           products, matrices, powers, bytes, matrices * 512, (double)(two.shared_loaded - one.shared_loaded) / tokens,
           (double)(two.shared_stored - one.shared_stored) / tokens);
    CHECK(products == right_products / 16, "%g products, not %g", products, right_products / 16);
    CHECK(matrices == right_matrices / 16, "%g ldmatrix, not %g", matrices, right_matrices / 16);
    CHECK(powers == right_powers, "%g powers, not %g", powers, right_powers);
    CHECK(bytes == right_bytes, "%g bytes, not %g", bytes, right_bytes);
}
