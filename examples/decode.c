/* A prompt, then token after token: the state carries what was seen, its size does not grow, and the rows are those of
 * one long call. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m128_cpu.h"

#define K(entry) nf_favor_cosh_f32_d64_m128_cpu_##entry

enum { PROMPT = 100, TOKENS = 150, DIM = 64, SIZE = TOKENS * DIM };

int main(void)
{
    static float q[SIZE], k[SIZE], v[SIZE], out[SIZE], whole[SIZE];
    const size_t bytes = K(workspace)(NULL);
    void *workspace = aligned_alloc(NF_ALIGN, bytes), *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)());
    nf_args a = {.batch = 1, .heads = 1, .projection = projection};
    nf_status s = K(projection_init)(projection, 1, NULL);
    float worst = 0;
    for (int i = 0; i < SIZE; i++) {
        q[i] = (float)(i * 7 % 31 - 15) / 16;
        k[i] = (float)(i * 5 % 29 - 14) / 16;
        v[i] = (float)(i * 3 % 37 - 18) / 16;
    }

    /* all at once, for comparison */
    a.q_tokens = TOKENS;
    a.q.data = q, a.k.data = k, a.v.data = v, a.out.data = whole;
    if (s == NF_OK)
        s = K(forward)(&a, workspace, bytes);

    /* the prompt into an empty state */
    a.state = aligned_alloc(NF_ALIGN, K(state_bytes)(&a));
    a.q_tokens = PROMPT;
    a.out.data = out;
    if (s == NF_OK)
        s = K(state_reset)(&a);
    if (s == NF_OK)
        s = K(forward)(&a, workspace, bytes);

    /* one token at a time */
    a.q_tokens = 1;
    for (int t = PROMPT; t < TOKENS && s == NF_OK; t++) {
        a.q.data = q + t * DIM, a.k.data = k + t * DIM, a.v.data = v + t * DIM, a.out.data = out + t * DIM;
        s = K(decode)(&a, workspace, bytes);
    }

    for (int i = 0; i < SIZE; i++)
        worst = fmaxf(worst, fabsf(out[i] - whole[i]));
    printf("%s; decode and one long call differ by at most %.1e\n", nf_status_text(s), (double)worst);
    free(a.state);
    free(projection);
    free(workspace);
    return s != NF_OK || !(worst < 1e-5f);
}
