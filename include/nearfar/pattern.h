/* ---- patterns: which keys a query sees ---- */
#ifndef NF_PATTERN_READY
#define NF_PATTERN_READY

/* Which keys a query sees, within the mask: the union of the parts, each key once. Positions count from the first token
 * of the sequence (with a state: from the first token that it has seen). The query of the last token sees the last key.
 *
 * window: sparse, the last `window` keys, the query's own among them (NF_FULL: as many on the other side too), of a
 * head with dilation d every d-th of them; hybrid, at least so many keys before the query's, in whole blocks.
 *
 * globals: the first `globals` tokens and those listed. Every query sees them, and they see every key.
 *
 * blocks (sparse only): query block b of list h sees the key blocks block_keys[block_offsets[h * (block_rows + 1) + b]]
 * up to that of b + 1. Offsets run through all lists: the first is 0, the last block_count.
 *
 * A state carries window and `globals`; for listed tokens and blocks the call must hold all the keys. */
typedef struct nf_pattern {
    int64_t window;               /* 0: none (hybrid: the query's own block alone) */
    const int32_t *dilation;      /* [heads], or NULL: 1 for all */
    int64_t globals;              /* 0: none */
    const int32_t *global_tokens; /* [global_count] rising positions, or NULL */
    int64_t global_count;
    int64_t block;                /* tokens of a block in the lists: the contract's, or 0 without lists */
    int64_t block_heads;          /* number of lists: 1, the same for all heads, or heads */
    int64_t block_rows;           /* query blocks of each list */
    int64_t block_count;          /* length of block_keys */
    const int32_t *block_offsets; /* [block_heads * (block_rows + 1)], or NULL: no lists */
    const int32_t *block_keys;    /* [block_count] numbers of key blocks, rising within each row */
    const float *far_gain;        /* hybrid: [heads] added to the logits of the far field, or NULL: 0 */
    uint32_t flags;               /* hybrid: NF_FAR_EXACT */
} nf_pattern;

/* The other way round: features (with their far_gain) within the window and the own block, exact softmax to the
 * globals, nothing else; global queries are exact as ever. The far field of a state then holds the window up to the
 * last token. */
#define NF_FAR_EXACT 1u

#endif
