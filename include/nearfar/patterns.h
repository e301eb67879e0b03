/* ---- patterns: how much they let a query see, and the named ones ----
 *
 * Lengths are in tokens unless said otherwise, `block` is the contract's B. A pattern holds pointers into memory that
 * stays the caller's.
 */
#ifndef NF_PATTERNS_READY
#define NF_PATTERNS_READY

#include <string.h>

/* Is the token at a position global: seen by all, seeing all? */
NF_UNUSED static int nf_pattern_global(const nf_pattern *pattern, int64_t position)
{
    for (int64_t i = 0; i < pattern->global_count; i++)
        if (pattern->global_tokens[i] == position)
            return 1;
    return position < pattern->globals;
}

/* How many of the keys first, first + step, ... last lie in [from, to)? */
NF_UNUSED static int64_t nf_pattern_within(int64_t first, int64_t step, int64_t last, int64_t from, int64_t to)
{
    const int64_t end = to <= last ? to - 1 : last;
    const int64_t skip = from > first ? (from - first + step - 1) / step : 0;
    return end < first || (end - first) / step < skip ? 0 : (end - first) / step - skip + 1;
}

/* The number of keys that the query at a position of a sequence of `tokens` keys sees: exactly, whatever overlaps. */
NF_UNUSED static int64_t nf_pattern_keys(const nf_pattern *pattern, int32_t mask, int64_t head, int64_t position,
                                         int64_t tokens)
{
    const nf_pattern *p = pattern;
    const int64_t step = p->dilation ? p->dilation[head] : 1, visible = mask == NF_CAUSAL ? position + 1 : tokens;
    const int64_t reach = p->window - 1, behind = position / step, before = (visible - 1 - position) / step;
    const int64_t first = position - (reach < behind ? reach : behind) * step;
    const int64_t last = p->window ? position + (reach < before ? reach : before) * step : first - 1;
    const int64_t globals = p->globals < visible ? p->globals : visible;
    int64_t keys;
    if (nf_pattern_global(p, position))
        return visible;
    keys =
        nf_pattern_within(first, step, last, 0, visible) + globals - nf_pattern_within(first, step, last, 0, globals);
    for (int64_t i = 0; i < p->global_count; i++) {
        const int64_t at = p->global_tokens[i];
        if (at >= globals && at < visible)
            keys += !nf_pattern_within(first, step, last, at, at + 1);
    }
    if (p->block_offsets) {
        const int64_t list = p->block_heads > 1 ? head : 0;
        const int32_t *offset = p->block_offsets + list * (p->block_rows + 1) + position / p->block;
        for (int64_t i = offset[0]; i < offset[1]; i++) {
            const int64_t at = p->block_keys[i] * p->block, from = at > globals ? at : globals;
            const int64_t to = at + p->block < visible ? at + p->block : visible;
            if (from >= to)
                continue;
            keys += to - from - nf_pattern_within(first, step, last, from, to);
            for (int64_t g = 0; g < p->global_count; g++) {
                const int64_t x = p->global_tokens[g];
                if (x >= from && x < to)
                    keys -= !nf_pattern_within(first, step, last, x, x + 1);
            }
        }
    }
    return keys;
}

/* The most keys that any query of a call of sparse attends to, and some query does; with a state, of any call that
 * carries it on. args and pattern must be valid. Costs at most a count per query and head, less where the pattern
 * repeats itself. */
NF_UNUSED static int64_t nf_pattern_bound(const nf_pattern *pattern, const nf_args *args)
{
    const nf_pattern *p = pattern;
    int64_t tokens = args->kv_tokens ? args->kv_tokens : args->q_tokens, queries = args->q_tokens, most = 0;
    if (args->state)
        return p->window + p->globals;
    if (args->cu_tokens) {
        tokens = 0;
        for (int64_t s = 0; s < args->sequences; s++)
            if (args->cu_tokens[s + 1] - args->cu_tokens[s] > tokens)
                tokens = args->cu_tokens[s + 1] - args->cu_tokens[s];
        queries = tokens;
    }
    for (int64_t h = 0; h < args->heads; h++) {
        const int same = h && p->block_heads <= 1 && (!p->dilation || p->dilation[h] == p->dilation[h - 1]);
        const int64_t window = args->mask == NF_FULL && p->window ? 2 * p->window - 1 : p->window;
        int64_t limit = window + p->globals + p->global_count;
        if (p->block_offsets || p->global_count || (args->mask == NF_FULL && p->globals) || limit > tokens)
            limit = tokens;
        for (int64_t i = tokens - 1; !same && i >= tokens - queries && most < limit; i--) {
            const int64_t keys = nf_pattern_keys(p, args->mask, h, i, tokens);
            most = keys > most ? keys : most;
        }
    }
    return most;
}

/* A window and global tokens in front (Longformer, Beltagy et al. 2020): causal, the last `window` keys, the query's
 * own among them; NF_FULL, window - 1 on either side. */
NF_UNUSED static void nf_pattern_longformer(nf_pattern *pattern, int64_t window, int64_t globals)
{
    memset(pattern, 0, sizeof *pattern);
    pattern->window = window;
    pattern->globals = globals;
}

/* Attention sinks and a window (StreamingLLM, Xiao et al. 2023): the first `sinks` tokens stay. */
NF_UNUSED static void nf_pattern_streaming(nf_pattern *pattern, int64_t sinks, int64_t window)
{
    nf_pattern_longformer(pattern, window, sinks);
}

/* What the lists of key blocks are made from; strided and bigbird use one of stride and random each. */
typedef struct nf_pattern_lists {
    int64_t tokens, block, window, globals; /* of the sequence, of a block, of the pattern */
    int32_t mask;
    int64_t stride; /* strided: the last of every `stride` block columns */
    int64_t random; /* bigbird: blocks drawn for each query block */
    int64_t lists;  /* 1, or one for every head */
    uint64_t seed;
} nf_pattern_lists;

/* The next number of a sequence of 64 random bits (Steele et al. 2014), below n < 2^31. */
NF_UNUSED static int64_t nf_pattern_draw(uint64_t *state, int64_t n)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (int64_t)(((x ^ (x >> 31)) >> 32) * (uint64_t)n >> 32);
}

/* The key blocks apart from globals and window of query block `row`: [*from, *to) before it and, NF_FULL, those from
 * *resume on behind it. */
NF_UNUSED static void nf_pattern_apart(const nf_pattern_lists *l, int64_t row, int64_t *from, int64_t *to,
                                       int64_t *resume)
{
    const int64_t blocks = (l->tokens + l->block - 1) / l->block, reach = l->window ? l->window - 1 : 0;
    const int64_t first = row * l->block - reach, last = (row + 1) * l->block - 1 + reach;
    *from = (l->globals + l->block - 1) / l->block;
    *to = first > 0 ? first / l->block : 0;
    *resume = l->mask == NF_FULL ? last / l->block + 1 : blocks;
    *from = *from < blocks ? *from : blocks;
    *to = *to > *from ? *to : *from;
    *resume = *resume < *from ? *from : *resume < blocks ? *resume : blocks;
}

/* The key blocks of one query block of one list, rising; returns how many. keys may be NULL. */
NF_UNUSED static int64_t nf_pattern_row(const nf_pattern_lists *l, int64_t list, int64_t row, int32_t *keys)
{
    const int64_t blocks = (l->tokens + l->block - 1) / l->block;
    int64_t from, to, resume, count = 0, all;
    uint64_t state = l->seed + ((uint64_t)list << 40) + (uint64_t)row * 0x632be59bd9b4e019u;
    for (int64_t b = l->stride - 1; l->stride && b < (l->mask == NF_FULL ? blocks : row + 1); b += l->stride) {
        if (keys)
            keys[count] = (int32_t)b;
        count++;
    }
    if (!l->random)
        return count;
    nf_pattern_apart(l, row, &from, &to, &resume);
    all = to - from + blocks - resume;
    if (!keys)
        return count + (l->random < all ? l->random : all);
    for (int64_t i = all > l->random ? all - l->random : 0; i < all; i++) { /* Floyd's draw without repetition */
        const int64_t draw = nf_pattern_draw(&state, i + 1);
        int64_t block[2], at, seen = 0;
        block[0] = draw < to - from ? from + draw : resume + draw - (to - from);
        block[1] = i < to - from ? from + i : resume + i - (to - from);
        for (at = 0; at < count; at++)
            seen |= keys[at] == block[0];
        for (at = count++; at > 0 && keys[at - 1] > block[seen]; at--)
            keys[at] = keys[at - 1];
        keys[at] = (int32_t)block[seen];
    }
    return count;
}

/* Fill in a pattern's lists: first the offsets, then the keys. The number of int32 that they take, or 0 if there cannot
 * be such lists. */
NF_UNUSED static int64_t nf_pattern_fill(nf_pattern *pattern, const nf_pattern_lists *l, int32_t *memory)
{
    const int64_t limit = INT32_MAX;
    int64_t rows, offsets, keys = 0, at = 0;
    if (l->tokens < 1 || l->tokens > limit || l->block < 1 || l->block > limit || l->window < 0 || l->window > limit ||
        l->globals < 0 || l->globals > limit || l->stride < 0 || l->random < 0 || l->lists < 1 || l->lists > limit)
        return 0;
    rows = (l->tokens + l->block - 1) / l->block;
    if (l->lists > limit / (rows + 1))
        return 0;
    offsets = l->lists * (rows + 1);
    for (int64_t list = 0; list < l->lists; list++)
        for (int64_t row = 0; row <= rows; row++) {
            if (memory)
                memory[at] = (int32_t)keys;
            at++;
            if (row < rows)
                keys += nf_pattern_row(l, list, row, memory ? memory + offsets + keys : NULL);
            if (keys > limit)
                return 0;
        }
    if (memory) {
        nf_pattern_longformer(pattern, l->window, l->globals);
        pattern->block = l->block;
        pattern->block_heads = l->lists;
        pattern->block_rows = rows;
        pattern->block_count = keys;
        pattern->block_offsets = memory;
        pattern->block_keys = memory + offsets;
    }
    return offsets + keys;
}

/* A window, and the last of every `stride` blocks as a summary that all later queries see (Sparse Transformer, Child et
 * al. 2019; NF_FULL: earlier ones too). For sequences of up to `tokens` keys. Returns the number of int32 of `memory`
 * that the lists take; with memory NULL that is all it does; 0: there is no such pattern. */
NF_UNUSED static int64_t nf_pattern_strided(nf_pattern *pattern, int64_t tokens, int64_t block, int32_t mask,
                                            int64_t window, int64_t stride, int32_t *memory)
{
    const nf_pattern_lists l = {tokens, block, window, 0, mask, stride, 0, 1, 0};
    return stride < 1 ? 0 : nf_pattern_fill(pattern, &l, memory);
}

/* A window, the first `globals` tokens, and `random` key blocks for each query block (BigBird, Zaheer et al. 2020),
 * drawn from a seed without repetition among those that hold none of the others (causal: behind the query), all of
 * these where there are fewer. heads: 1, one list for all, or the call's heads, one for each. tokens, memory and the
 * result as above. */
NF_UNUSED static int64_t nf_pattern_bigbird(nf_pattern *pattern, int64_t tokens, int64_t block, int32_t mask,
                                            int64_t window, int64_t globals, int64_t random, int64_t heads,
                                            uint64_t seed, int32_t *memory)
{
    const nf_pattern_lists l = {tokens, block, window, globals, mask, 0, random, heads, seed};
    return nf_pattern_fill(pattern, &l, memory);
}

#endif
