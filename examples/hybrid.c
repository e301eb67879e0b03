/* Hybrid attention in an engine: the projections fitted to each head once, a prompt, then token after token. Eight
 * heads of queries share four of keys. The state holds the far field and the keys of the window; its size never
 * changes. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_hybrid_cosh_f32_d64_m128_b64_cpu.h"

#define K(entry) nf_hybrid_cosh_f32_d64_m128_b64_cpu_##entry

enum { HEADS = 8, KV_HEADS = 4, DIM = 64, PROMPT = 400, TOKENS = 430, Q_ROW = HEADS * DIM, K_ROW = KV_HEADS * DIM };

static float q[TOKENS * Q_ROW], k[TOKENS * K_ROW], v[TOKENS * K_ROW], out[TOKENS * Q_ROW], whole[TOKENS * Q_ROW];

static void fill(float *x, int count, uint32_t dice)
{
    for (int i = 0; i < count; i++) {
        dice = dice * 1664525u + 1013904223u;
        x[i] = (float)(dice >> 8) / 8388608 - 1;
    }
}

int main(void)
{
    const nf_pattern pattern = {.window = 64, .globals = 4};
    nf_args a = {.batch = 1, .heads = HEADS, .kv_heads = KV_HEADS, .pattern = &pattern};
    const size_t bytes = K(workspace)(NULL), one = K(projection_bytes)();
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    char *projection = aligned_alloc(NF_ALIGN, KV_HEADS * one);
    nf_status s = NF_OK;
    float worst = 0;
    fill(q, TOKENS * Q_ROW, 1), fill(k, TOKENS * K_ROW, 2), fill(v, TOKENS * K_ROW, 3);
    for (size_t h = 0; h < KV_HEADS && s == NF_OK;
         h++) { /* one projection per kv head: a sample of its queries and keys */
        const nf_calibration c = {.q = q + h * HEADS / KV_HEADS * DIM,
                                  .k = k + h * DIM,
                                  .q_tokens = PROMPT,
                                  .k_tokens = PROMPT,
                                  .q_stride = Q_ROW,
                                  .k_stride = K_ROW};
        s = K(projection_init)(projection + h * one, 1, &c);
    }
    a.projection = projection, a.projection_stride = one;

    a.q_tokens = TOKENS; /* all at once, for comparison */
    a.q.data = q, a.k.data = k, a.v.data = v, a.out.data = whole;
    if (s == NF_OK)
        s = K(forward)(&a, workspace, bytes);

    a.state = aligned_alloc(NF_ALIGN, K(state_bytes)(&a)); /* the prompt */
    a.q_tokens = PROMPT;
    a.out.data = out;
    if (s == NF_OK)
        s = K(state_reset)(&a);
    if (s == NF_OK)
        s = K(forward)(&a, workspace, bytes);

    a.q_tokens = 1; /* token after token */
    for (int t = PROMPT; t < TOKENS && s == NF_OK; t++) {
        a.q.data = q + t * Q_ROW, a.k.data = k + t * K_ROW, a.v.data = v + t * K_ROW, a.out.data = out + t * Q_ROW;
        s = K(decode)(&a, workspace, bytes);
    }
    for (int i = 0; i < TOKENS * Q_ROW; i++)
        worst = fmaxf(worst, fabsf(out[i] - whole[i]));
    printf("%s; decode and one long call differ by at most %.1e, a state of %zu KiB\n", nf_status_text(s),
           (double)worst, K(state_bytes)(&a) / 1024);
    free(a.state);
    free(projection);
    free(workspace);
    return s != NF_OK || !(worst < 1e-5f);
}
