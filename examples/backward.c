/* Gradients: the loss is the sum of weight * out; one entry of dq, dk and dv each is compared with finite differences.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_sparse_f32_d64_b64_cpu.h"

#define K(entry) nf_sparse_f32_d64_b64_cpu_##entry

enum { HEADS = 2, TOKENS = 300, SIZE = TOKENS * HEADS * 64, AT = 150 * HEADS * 64 + 7 };

static float q[SIZE], k[SIZE], v[SIZE], out[SIZE], weight[SIZE], lse[HEADS * TOKENS]; /* lse [batch][heads][q_tokens] */
static float dq[SIZE], dk[SIZE], dv[SIZE];

static double loss(nf_args *a, void *workspace, size_t bytes)
{
    double sum = 0;
    if (K(forward)(a, workspace, bytes) != NF_OK)
        return NAN;
    for (int i = 0; i < SIZE; i++)
        sum += (double)weight[i] * (double)out[i];
    return sum;
}

int main(void)
{
    const nf_pattern pattern = {.window = 100, .globals = 2};
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS, .q = {q}, .k = {k}, .v = {v}, .out = {out}};
    const nf_grads g = {.out = {out}, .dout = {weight}, .lse = lse, .dq = {dq}, .dk = {dk}, .dv = {dv}};
    const size_t bytes = K(workspace)(NULL);
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    float *const input[] = {q, k, v};
    const float *const found[] = {dq, dk, dv};
    double worst = 0;
    nf_status s;
    for (int i = 0; i < SIZE; i++) {
        q[i] = (float)(i * 7 % 31 - 15) / 16;
        k[i] = (float)(i * 5 % 29 - 14) / 16;
        v[i] = (float)(i * 3 % 37 - 18) / 16;
        weight[i] = (float)(i * 11 % 23 - 11) / 16;
    }
    a.pattern = &pattern;
    a.lse = lse;
    s = K(forward)(&a, workspace, bytes);
    if (s == NF_OK)
        s = K(backward)(&a, &g, workspace, bytes);
    for (int i = 0; i < 3 && s == NF_OK; i++) {
        const float before = input[i][AT], step = 0.05f;
        double up, down;
        input[i][AT] = before + step;
        up = loss(&a, workspace, bytes);
        input[i][AT] = before - step;
        down = loss(&a, workspace, bytes);
        input[i][AT] = before;
        worst = fmax(worst, fabs((up - down) / (2 * (double)step) - (double)found[i][AT]));
    }
    printf("%s; gradients and differences are at most %.1e apart\n", nf_status_text(s), worst);
    free(workspace);
    return s != NF_OK || !(worst < 2e-3);
}
