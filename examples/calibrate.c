/* Fit projections to a model's heads, once, and use them: keys with a mean and uneven channels, as real ones have, cost
 * random features most of their accuracy; a calibrated projection takes both out. Prints the error against exact
 * softmax with and without. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_exact_f32_d64_cpu.h"
#include "nf_favor_cosh_f32_d64_m128_cpu.h"

#define EXACT(entry) nf_exact_f32_d64_cpu_##entry
#define FAVOR(entry) nf_favor_cosh_f32_d64_m128_cpu_##entry

enum { HEADS = 2, TOKENS = 512, ROW = 64 * HEADS, SIZE = TOKENS * ROW };

/* A sum of uniform numbers: nearly normal. */
static float normal(void)
{
    static uint32_t dice = 1;
    float sum = 0;
    for (int i = 0; i < 12; i++) {
        dice = dice * 1664525u + 1013904223u;
        sum += (float)(dice >> 8) / 16777216;
    }
    return sum - 6;
}

static double distance(const float *a, const float *b)
{
    double off = 0, size = 0;
    for (int i = 0; i < SIZE; i++) {
        off += (double)(a[i] - b[i]) * (double)(a[i] - b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(off / size);
}

int main(void)
{
    static float q[SIZE], k[SIZE], v[SIZE], truth[SIZE], out[2][SIZE];
    const size_t one = FAVOR(projection_bytes)(), bytes = EXACT(workspace)(NULL) + FAVOR(workspace)(NULL);
    char *projection = aligned_alloc(NF_ALIGN, HEADS * one);
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS, .q = {q}, .k = {k}, .v = {v}, .out = {truth}};
    nf_status s;
    for (int i = 0; i < SIZE; i++) {
        const float channel = i % 8 ? 0.5f : 1.5f; /* large in keys, small in queries */
        q[i] = 0.4f * normal() / channel;
        k[i] = 0.4f * normal() * channel + (i % 16 ? 0.0f : 2.0f);
        v[i] = normal();
    }
    s = EXACT(forward)(&a, workspace, bytes);
    a.projection = projection, a.projection_stride = one; /* one projection per kv head, behind one another */
    for (int fitted = 0; fitted < 2 && s == NF_OK; fitted++) {
        for (size_t h = 0; h < HEADS && s == NF_OK; h++) {
            /* in practice: queries and keys of a few hundred tokens that the model has run on */
            const nf_calibration c = {.q = q + h * 64,
                                      .k = k + h * 64,
                                      .q_tokens = TOKENS,
                                      .k_tokens = TOKENS,
                                      .q_stride = ROW,
                                      .k_stride = ROW};
            s = FAVOR(projection_init)(projection + h * one, 1, fitted ? &c : NULL);
        }
        a.out.data = out[fitted];
        if (s == NF_OK)
            s = FAVOR(forward)(&a, workspace, bytes);
    }
    printf("%s; error against softmax %.2f as sampled, %.2f calibrated\n", nf_status_text(s), distance(out[0], truth),
           distance(out[1], truth));
    free(projection);
    free(workspace);
    return s != NF_OK || !(distance(out[1], truth) < distance(out[0], truth));
}
