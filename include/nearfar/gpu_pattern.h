/* ---- patterns on a GPU: checked there, and walked along by the blocks of a launch ----
 *
 * args->pattern is the host's, the numbers that it points to are the GPU's. A block takes a chunk of rows, which all
 * see much the same keys; what they see is a few lists that can be indexed, and of every key an interval of rows. So
 * nothing is stored, and whatever a thread looks at it finds by itself.
 */
#ifndef NF_GPU_PATTERN_READY
#define NF_GPU_PATTERN_READY

enum { NF_CHECK_THREADS = 256, NF_CHECK_BYTES = 4 * NF_CHECK_BLOCKS /* of the verdicts, in the workspace */ };

/* What a launch does: all rows, then once more those at global positions. */
enum { NF_ROWS, NF_GLOBAL_ROWS };

/* Does a pattern point to numbers that only the GPU can look at? */
NF_BOTH int nf_pattern_numbers(const nf_pattern *p)
{
    return p->dilation || p->far_gain || p->global_count || p->block_offsets;
}

/* Offset i of all lists: between its neighbours, and a row's blocks within the keys, rising? */
NF_DEVICE int nf_sound_row(const nf_pattern *p, int64_t i, int64_t blocks)
{
    const int64_t last = p->block_heads * (p->block_rows + 1) - 1, from = p->block_offsets[i];
    const int64_t to = i < last ? p->block_offsets[i + 1] : p->block_count;
    if (from < 0 || to < from || to > p->block_count || (i == 0 && from != 0) || (i == last && from != to))
        return 0;
    for (int64_t k = from; k < to && i % (p->block_rows + 1) < p->block_rows; k++)
        if (p->block_keys[k] < 0 || p->block_keys[k] >= blocks ||
            (k > from && p->block_keys[k] <= p->block_keys[k - 1]))
            return 0;
    return 1;
}

/* Look at the pattern's numbers, each block at its share: verdict[block] is 1 where they are sound. */
NF_KERNEL(NF_CHECK_THREADS, 1) nf_check_numbers(nf_work w)
{
    const nf_pattern *const p = &w.pattern;
    const nf_args *const a = &w.plan.args;
    const int64_t first = nf_block_x() * NF_CHECK_THREADS + nf_thread(),
                  step = (int64_t)NF_CHECK_THREADS * NF_CHECK_BLOCKS;
    const int64_t blocks = (a->kv_tokens + w.contract.block - 1) / w.contract.block;
    int *const sound = (int *)nf_shared();
    int good = 1;
    for (int64_t h = first; p->dilation && h < a->heads; h += step)
        good &= p->dilation[h] >= 1 && p->dilation[h] <= 1 << 20;
    for (int64_t h = first; p->far_gain && h < a->heads; h += step)
        good &= nf_finite(p->far_gain[h]);
    for (int64_t i = first; i < p->global_count; i += step)
        good &= p->global_tokens[i] >= 0 && p->global_tokens[i] < a->kv_tokens &&
                (i == 0 || p->global_tokens[i] > p->global_tokens[i - 1]);
    for (int64_t i = first; p->block_offsets && i < p->block_heads * (p->block_rows + 1); i += step)
        good &= nf_sound_row(p, i, blocks);
    for (int64_t s = first; p->block_offsets && a->cu_tokens && s < a->sequences; s += step)
        good &= (int64_t)a->cu_tokens[s + 1] - a->cu_tokens[s] <= p->block_rows * w.contract.block;
    if (nf_thread() == 0)
        *sound = 1;
    nf_barrier();
    if (!good)
        nf_smallest(sound, 0);
    nf_barrier();
    if (nf_thread() == 0)
        w.verdict[nf_block_x()] = *sound;
}

/* Launch the check where there is something to check. */
NF_UNUSED static nf_status nf_launch_check(nf_work *w)
{
    if (nf_pattern_numbers(&w->pattern))
        return nf_launch(nf_check_numbers, w, NF_CHECK_BLOCKS, 1, NF_CHECK_THREADS, sizeof(int));
    w->verdict = NULL;
    return NF_OK;
}

/* What rows see: parts, each a list of keys. NF_FULL has the first three twice: for the queries behind a key, and ahead
 * of it. NF_EVERY is the part of rows at global positions, which see all that the mask allows, and nothing else. */
enum {
    NF_GLOBALS,
    NF_LISTED,
    NF_BLOCKS,
    NF_GLOBALS_AHEAD,
    NF_LISTED_AHEAD,
    NF_BLOCKS_AHEAD,
    NF_WINDOW,
    NF_EVERY,
    NF_PARTS
};

/* A block's rows. Row i is query (skip + i) / heads, at position first + step * query, of head + (skip + i) % heads;
 * or, of rows at global positions, global row + i / group of head (row + i) % group. */
typedef struct nf_chunk {
    int64_t head, heads, first, step, skip, rows, queries;
    int64_t row;                          /* of rows at global positions, else -1 */
    const int32_t *blocks;                /* the key blocks that the pattern lists for these queries */
    int64_t from[NF_PARTS], to[NF_PARTS]; /* the keys of each part, by their number in its list */
} nf_chunk;

/* The position of the unit's first query. */
NF_DEVICE int64_t nf_first_position(const nf_unit *u)
{
    return u->past + u->kv_tokens - u->q_tokens;
}

/* Have all heads of a group the same keys, so that they may share a chunk? */
NF_BOTH int nf_heads_alike(const nf_pattern *p)
{
    return !p->dilation && p->block_heads <= 1;
}

/* How many of rising numbers are below x? */
NF_DEVICE int64_t nf_below(const int32_t *numbers, int64_t count, int64_t x)
{
    int64_t low = 0;
    while (low < count) {
        const int64_t middle = low + (count - low) / 2;
        if (NF_GMEM(numbers)[middle] < x)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

/* The lists of a chunk. A key is left out of a part where the window shows it to all rows: keys behind `behind` for
 * the queries behind them, before `ahead` for those ahead. */
NF_DEVICE void nf_chunk_parts(const nf_unit *u, nf_chunk *c, int64_t block)
{
    const nf_pattern *const p = u->pattern;
    const int64_t last = c->first + (c->queries - 1) * c->step, tokens = u->past + u->kv_tokens, window = u->window;
    const int64_t end = u->mask == NF_FULL ? tokens : last + 1, reach = u->mask == NF_FULL ? window - 1 : 0;
    const int64_t covered = window > 0 && c->step == 1 ? last + 1 - window : end;
    const int64_t behind = covered < 0 ? 0 : covered < end ? covered : end;
    const int64_t ahead = c->first + window * c->step < end ? c->first + window * c->step : end;
    for (int part = 0; part < NF_PARTS; part++)
        c->from[part] = c->to[part] = 0;
    for (int side = 0; side < (u->mask == NF_FULL && window > 0 ? 2 : 1); side++) {
        const int64_t from = side ? ahead : 0, to = side ? end : behind, at = side * NF_GLOBALS_AHEAD;
        c->from[at + NF_GLOBALS] = from;
        c->to[at + NF_GLOBALS] = p->globals < to ? p->globals : to;
        c->from[at + NF_LISTED] = nf_below(p->global_tokens, p->global_count, from > p->globals ? from : p->globals);
        c->to[at + NF_LISTED] = nf_below(p->global_tokens, p->global_count, to);
        if (p->block_offsets) {
            const int64_t list = p->block_heads > 1 ? u->first_head + c->head : 0;
            const int32_t *const offset = NF_GMEM(p->block_offsets) + list * (p->block_rows + 1) + c->first / block;
            c->blocks = p->block_keys + offset[0];
            c->from[at + NF_BLOCKS] = nf_below(c->blocks, offset[1] - offset[0], from / block) * block;
            c->to[at + NF_BLOCKS] = nf_below(c->blocks, offset[1] - offset[0], (to + block - 1) / block) * block;
        }
    }
    if (window) {
        const int64_t before = c->first / c->step, beyond = (end - 1 - c->first) / c->step + 1;
        c->from[NF_WINDOW] = window - 1 < before ? 1 - window : -before;
        c->to[NF_WINDOW] = c->queries + reach < beyond ? c->queries + reach : beyond;
    }
}

/* Chunk number `index` of up to `rows` rows of a head, or of all heads where they are alike: along the stretches of
 * queries that have the same list of blocks, there class by class of the dilation. Returns -1 behind the last, 0 for
 * one without rows. */
NF_DEVICE int nf_chunk_at(const nf_unit *u, int64_t head, int64_t index, int64_t rows, int64_t block, nf_chunk *c)
{
    const nf_pattern *const p = u->pattern;
    const int64_t begin = nf_first_position(u), end = begin + u->q_tokens;
    const int64_t length = p->block_offsets ? block : u->q_tokens;
    const int64_t step = p->dilation ? NF_GMEM(p->dilation)[u->first_head + head] : 1,
                  heads = nf_heads_alike(p) ? u->group : 1;
    const int64_t classes = step < length ? step : length;
    const int64_t parts = length ? ((length + step - 1) / step * heads + rows - 1) / rows : 0;
    int64_t from, to, row, left;
    if (!length)
        return -1;
    from = (p->block_offsets ? begin / block * block : begin) + index / (classes * parts) * length;
    if (from >= end)
        return -1;
    to = from + length < end ? from + length : end;
    from = (from > begin ? from : begin) + index / parts % classes;
    row = index % parts * rows;
    left = from < to ? ((to - 1 - from) / step + 1) * heads - row : 0;
    if (left <= 0)
        return 0;
    c->head = head, c->heads = heads;
    c->first = from + row / heads * step, c->step = step;
    c->skip = row % heads;
    c->rows = left < rows ? left : rows;
    c->queries = (c->skip + c->rows - 1) / heads + 1;
    c->row = -1;
    nf_chunk_parts(u, c, block);
    return 1;
}

/* Global positions of queries that see every key, more than the parts give them: listed ones, and of NF_FULL the first
 * globals (causal, these see nothing but globals). */
NF_BOTH int64_t nf_leading_globals(const nf_pattern *p, int32_t mask, int64_t tokens)
{
    return mask != NF_FULL ? 0 : p->globals < tokens ? p->globals : tokens;
}

/* The unit's query at global position number g, or -1. */
NF_DEVICE int64_t nf_global_query(const nf_unit *u, int64_t g)
{
    const nf_pattern *const p = u->pattern;
    const int64_t leading = nf_leading_globals(p, u->mask, u->kv_tokens);
    const int64_t at = g < leading ? g : g < leading + p->global_count ? NF_GMEM(p->global_tokens)[g - leading] : -1;
    const int64_t query = at - nf_first_position(u);
    return query >= 0 && query < u->q_tokens && (g < leading || at >= p->globals) ? query : -1;
}

/* The same of rows at global positions. */
NF_DEVICE int nf_chunk_of_globals(const nf_unit *u, int64_t index, int64_t rows, nf_chunk *c)
{
    const nf_pattern *const p = u->pattern;
    const int64_t all = (nf_leading_globals(p, u->mask, u->kv_tokens) + p->global_count) * u->group;
    const int64_t left = all - index * rows;
    if (left <= 0)
        return -1;
    for (int part = 0; part < NF_PARTS; part++)
        c->from[part] = c->to[part] = 0;
    c->row = index * rows;
    c->rows = left < rows ? left : rows;
    for (int64_t i = 0; i < c->rows; i++) {
        const int64_t query = nf_global_query(u, (c->row + i) / u->group);
        if (query >= 0)
            c->to[NF_EVERY] = u->mask == NF_FULL ? u->kv_tokens : nf_first_position(u) + query + 1;
    }
    return c->to[NF_EVERY] > 0;
}

/* The query and the head of row i; the query is -1 where there is none. */
NF_DEVICE int64_t nf_chunk_query(const nf_unit *u, const nf_chunk *c, int i, int32_t *head)
{
    const int64_t row = c->row < 0 ? c->skip + i : c->row + i, heads = c->row < 0 ? c->heads : u->group;
    *head = (int32_t)((c->row < 0 ? c->head : 0) + row % heads);
    if (i >= c->rows)
        return -1;
    return c->row < 0 ? c->first - nf_first_position(u) + row / heads * c->step : nf_global_query(u, row / heads);
}

/* Is a key of a listed block a global as well? */
NF_DEVICE int nf_key_is_global(const nf_pattern *p, int64_t at)
{
    const int64_t i = nf_below(p->global_tokens, p->global_count, at);
    return at < p->globals || (i < p->global_count && NF_GMEM(p->global_tokens)[i] == at);
}

/* The chunk's first row of its query number q, cut off at its ends. */
NF_DEVICE int nf_chunk_row(const nf_chunk *c, int64_t q)
{
    const int within = q < 0 ? 0 : q < c->queries ? (int)q : (int)c->queries;
    return within * (int)c->heads - (int)c->skip;
}

/* Key k of a part: its position, and the rows from .. to that see it; query: of each row. In units of the step, a key
 * stands at t: ceil(t) is the first query at or behind it. Where t is whole the window shows it to [t, t + window), and
 * NF_FULL to as many before t. */
NF_DEVICE int64_t nf_chunk_key(const nf_unit *u, const nf_chunk *c, const int64_t *query, int part, int64_t k,
                               int64_t block, int *from, int *to)
{
    const nf_pattern *const p = u->pattern;
    const int64_t window = u->window;
    const int full = u->mask == NF_FULL, kind = part % NF_GLOBALS_AHEAD;
    int64_t at = k, t;
    int inside = window > 0;
    if (part == NF_WINDOW) {
        *from = nf_chunk_row(c, full ? k - window + 1 : k);
        *to = nf_chunk_row(c, k + window);
        return c->first + k * c->step;
    }
    if (part == NF_EVERY) {
        for (*from = 0; !full && *from < c->rows && query[*from] + nf_first_position(u) < at;)
            ++*from;
        *to = (int)c->rows;
        return at;
    }
    if (kind == NF_LISTED)
        at = NF_GMEM(p->global_tokens)[k];
    if (kind == NF_BLOCKS)
        at = NF_GMEM(c->blocks)[k / block] * block + k % block;
    *from = *to = 0;
    if (kind == NF_BLOCKS && (at >= u->past + u->kv_tokens || nf_key_is_global(p, at)))
        return 0;
    t = at - c->first;
    if (c->step > 1) {
        const int64_t whole = t / c->step, rest = t - whole * c->step;
        inside = inside && rest == 0;
        t = whole + (rest > 0);
    }
    if (part >= NF_GLOBALS_AHEAD)
        *to = nf_chunk_row(c, inside ? t - window + 1 : 0);
    else
        *from = nf_chunk_row(c, inside ? t + window : full ? 0 : t), *to = nf_chunk_row(c, c->queries);
    return at;
}

#endif /* NF_GPU_PATTERN_READY */
