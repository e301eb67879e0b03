#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m128_cpu.h"
#include <stdlib.h>

/* Causal attention of 12 heads over n tokens; q, k, v and out are [n][12][64]. */
nf_status attend(const float *q, const float *k, const float *v, float *out, int64_t n)
{
    size_t bytes = nf_favor_cosh_f32_d64_m128_cpu_workspace(NULL);
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    void *projection = aligned_alloc(NF_ALIGN, nf_favor_cosh_f32_d64_m128_cpu_projection_bytes());
    nf_args a = {.batch = 1, .heads = 12, .q_tokens = n, .projection = projection};
    a.q.data = q, a.k.data = k, a.v.data = v, a.out.data = out;
    nf_status s = nf_favor_cosh_f32_d64_m128_cpu_projection_init(projection, 1, NULL);
    if (s == NF_OK)
        s = nf_favor_cosh_f32_d64_m128_cpu_forward(&a, workspace, bytes);
    free(projection);
    free(workspace);
    return s;
}

#include <stdio.h>

int main(void)
{
    enum { N = 1000, SIZE = N * 12 * 64 };
    static float q[SIZE], k[SIZE], v[SIZE], out[SIZE];
    for (int i = 0; i < SIZE; i++) {
        q[i] = (float)(i % 17 - 8) / 16;
        k[i] = (float)(i % 23 - 11) / 16;
        v[i] = 3;
    }
    nf_status s = attend(q, k, v, out, N);
    printf("%s; the mean of equal values is %.4f\n", nf_status_text(s), (double)out[SIZE - 1]);
    return s != NF_OK;
}
