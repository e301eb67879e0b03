/* Patterns for the tests: any union of parts, at random, every list in a guarded buffer of its own. */
#ifndef PATTERNS_H
#define PATTERNS_H

#include "call.h"

enum {
    WINDOW = 1,
    DILATION = 2, /* of the window, another one for every head */
    GLOBALS = 4,
    LISTED = 8,
    BLOCKS = 16,     /* sparse */
    HEAD_LISTS = 32, /* blocks: another list for every head */
    GAIN = 64,       /* hybrid */
    FAR_EXACT = 128, /* hybrid */
    SPARSE_PARTS = WINDOW | DILATION | GLOBALS | LISTED | BLOCKS | HEAD_LISTS,
    HYBRID_PARTS = WINDOW | GLOBALS | LISTED | GAIN | FAR_EXACT,
#ifdef SIMT
    STATE_PARTS = WINDOW | GLOBALS | GAIN | FAR_EXACT /* that a GPU's state can carry */
#else
    STATE_PARTS = WINDOW | DILATION | GLOBALS | GAIN | FAR_EXACT /* that a state can carry */
#endif
};

typedef struct kit {
    nf_pattern p;
    block dilation, listed, offsets, keys, gain;
} kit;

static inline int64_t below(oracle_random *r, int64_t n)
{
    return (int64_t)(oracle_next(r) % (uint64_t)n);
}

static inline int32_t *ints(block *b, int64_t count)
{
    *b = block_make((size_t)count * sizeof(int32_t), 0);
    return (int32_t *)(void *)b->data;
}

/* A list of key blocks for every query block: about a third of them, sometimes none. */
static inline void kit_blocks(kit *t, const kernel *k, int64_t lists, int64_t rows, int64_t blocks, oracle_random *r)
{
    int32_t *offsets = ints(&t->offsets, lists * (rows + 1)), *keys = ints(&t->keys, lists * rows * blocks), count = 0;
    for (int64_t h = 0; h < lists; h++)
        for (int64_t b = 0; b <= rows; b++) {
            const int64_t often = below(r, 4); /* in thirds */
            offsets[h * (rows + 1) + b] = count;
            for (int64_t j = 0; j < blocks && b < rows; j++)
                if (below(r, 3) < often)
                    keys[count++] = (int32_t)j;
        }
    t->p.block = k->block;
    t->p.block_heads = lists;
    t->p.block_rows = rows;
    t->p.block_count = count;
    t->p.block_offsets = offsets;
    t->p.block_keys = keys;
}

/* The parts of a pattern, for so many heads, and keys per sequence. Without any other part a window is there. */
static inline kit kit_make(const kernel *k, int parts, int64_t heads, int64_t tokens, oracle_random *r)
{
    const int64_t windows[] = {1, 2, k->block - 1, k->block, k->block + 1, 3 * k->block, 1 + below(r, tokens + 20)};
    kit t;
    memset(&t, 0, sizeof t);
    parts &= k->features ? HYBRID_PARTS : SPARSE_PARTS;
    if ((parts & WINDOW) || !(parts & (GLOBALS | LISTED | BLOCKS | FAR_EXACT)))
        t.p.window = windows[below(r, 7)];
    if (parts & DILATION) {
        int32_t *dilation = ints(&t.dilation, heads);
        for (int64_t h = 0; h < heads; h++)
            dilation[h] = (int32_t)(1 + below(r, h % 2 ? 40 : 4));
        t.p.dilation = dilation;
    }
    if (parts & GLOBALS)
        t.p.globals = 1 + below(r, below(r, 4) ? 5 : tokens + 5);
    if ((parts & LISTED) && tokens) {
        int32_t *listed = ints(&t.listed, tokens);
        const int64_t every = 1 + below(r, 40);
        for (int64_t j = below(r, tokens); j < tokens; j += 1 + below(r, every))
            listed[t.p.global_count++] = (int32_t)j;
        t.p.global_tokens = listed;
    }
    if (parts & BLOCKS) {
        const int64_t blocks = (tokens + k->block - 1) / k->block;
        kit_blocks(&t, k, parts & HEAD_LISTS ? heads : 1, blocks + below(r, 2), blocks, r);
    }
    if (parts & GAIN) {
        float *gain = (float *)(void *)(t.gain = block_make((size_t)heads * sizeof(float), 0)).data;
        for (int64_t h = 0; h < heads; h++)
            gain[h] = (float)(below(r, 9) - 4) / 2;
        t.p.far_gain = gain;
    }
    if (parts & FAR_EXACT)
        t.p.flags = NF_FAR_EXACT;
    return t;
}

static inline int kit_intact(const kit *t)
{
    return block_intact(&t->dilation) && block_intact(&t->listed) && block_intact(&t->offsets) &&
           block_intact(&t->keys) && block_intact(&t->gain);
}

static inline void kit_free(kit *t)
{
    block *const all[] = {&t->dilation, &t->listed, &t->offsets, &t->keys, &t->gain};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        block_free(all[i]);
}

#endif
