/* ---- the near field of a state: merged ---- */
#ifndef NF_NEAR_STATE_READY
#define NF_NEAR_STATE_READY

/* Row i of `count` rows becomes row (i + by) % count, 0 <= by < count, in place: three times turned around. */
static void nf_rotate(float *rows, int64_t count, int64_t by, int64_t dim)
{
    const int64_t begin[3] = {0, 0, by}, end[3] = {count, by, count};
    for (int turn = 0; turn < 3; turn++)
        for (int64_t i = begin[turn], j = end[turn] - 1; i < j; i++, j--)
            for (int64_t d = 0; d < dim; d++) {
                const float x = rows[i * dim + d];
                rows[i * dim + d] = rows[j * dim + d];
                rows[j * dim + d] = x;
            }
}

/* A near field's keys or values, a's and then b's: b's token p stands at position a_tokens + p. dst may be a or b. */
static void nf_near_join(float *dst, const float *a, int64_t a_tokens, const float *b, int64_t b_tokens,
                         const nf_state_head *head, int64_t dim)
{
    const int64_t globals = head->globals, ring = head->ring, tokens = a_tokens + b_tokens;
    const int64_t kept = tokens > ring ? tokens - ring : 0; /* the first token that the ring still holds */
    const size_t row = (size_t)dim * sizeof(float);
    for (int64_t g = globals - 1; g >= 0; g--) /* from the last on: a row of b moves up */
        if (g < a_tokens || g >= tokens)
            memmove(dst + g * dim, a + g * dim, row);
        else
            memmove(dst + g * dim, b + (g - a_tokens) * dim, row);
    if (!ring)
        return;
    dst += globals * dim, a += globals * dim, b += globals * dim;
    if (dst == b && (dst != a || b_tokens >= ring)) {
        nf_rotate(dst, ring, a_tokens % ring, dim);
        for (int64_t p = kept; p < a_tokens; p++)
            memcpy(dst + p % ring * dim, a + p % ring * dim, row);
    } else {
        memmove(dst, a, (size_t)ring * row);
        for (int64_t p = kept > a_tokens ? kept : a_tokens; p < tokens; p++)
            memmove(dst + p % ring * dim, b + (p - a_tokens) % ring * dim, row);
    }
}

/* to = a, then b, of one unit; `to` may be a or b. */
static void nf_near_merge(const nf_contract *c, const nf_state_head *head, nf_state_unit *to, const nf_state_unit *a,
                          const nf_state_unit *b)
{
    const int64_t size = (head->globals + head->ring) * c->dim;
    for (int i = 0; i < 2; i++) /* keys, values */
        nf_near_join((float *)(void *)(to + 1) + i * size, (const float *)(const void *)(a + 1) + i * size, a->tokens,
                     (const float *)(const void *)(b + 1) + i * size, b->tokens, head, c->dim);
    to->mass = 0;
}

#endif
