/* One layer of linear, then sparse attention, on the public interface: h = x + favor(x), h = h + sparse(h), y =
 * norm(h). Both operators take the same nf_args, so a layer chooses its attention by the function it calls. The prompt
 * goes through at once, the rest token by token with a state for each operator; both ways agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m256_cpu.h"
#include "nf_sparse_f32_d64_b512_cpu.h"

#define FAVOR(entry) nf_favor_cosh_f32_d64_m256_cpu_##entry
#define SPARSE(entry) nf_sparse_f32_d64_b512_cpu_##entry

enum { HEADS = 2, DIM = 64 * HEADS, TOKENS = 700, PROMPT = 650 };

/* The weights of one attention: queries, keys, values, output [DIM][DIM]. */
typedef struct weights {
    float q[DIM * DIM], k[DIM * DIM], v[DIM * DIM], out[DIM * DIM];
} weights;

typedef nf_status (*attention)(const nf_args *args, void *workspace, size_t bytes);

/* y = x w' of `rows` rows. */
static void linear(float *y, const float *x, const float *w, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++)
        for (int o = 0; o < DIM; o++) {
            float sum = 0;
            for (int i = 0; i < DIM; i++)
                sum += x[r * DIM + i] * w[o * DIM + i];
            y[r * DIM + o] = sum;
        }
}

/* h = x + attention(x) of `rows` new tokens. */
static nf_status attend(float *h, const float *x, const weights *w, attention run, nf_args *args, void *workspace,
                        size_t bytes, int64_t rows)
{
    static float q[TOKENS * DIM], k[TOKENS * DIM], v[TOKENS * DIM], out[TOKENS * DIM];
    nf_status status;
    linear(q, x, w->q, rows);
    linear(k, x, w->k, rows);
    linear(v, x, w->v, rows);
    args->q_tokens = rows;
    args->q.data = q, args->k.data = k, args->v.data = v, args->out.data = out;
    status = run(args, workspace, bytes);
    linear(h, out, w->out, rows);
    for (int64_t i = 0; i < rows * DIM; i++)
        h[i] += x[i];
    return status;
}

/* Every row of h: mean 0, variance 1. */
static void norm(float *h, int64_t rows)
{
    for (; rows > 0; rows--, h += DIM) {
        float mean = 0, variance = 0;
        for (int i = 0; i < DIM; i++)
            mean += h[i] / DIM;
        for (int i = 0; i < DIM; i++)
            variance += (h[i] - mean) * (h[i] - mean) / DIM;
        for (int i = 0; i < DIM; i++)
            h[i] = (h[i] - mean) / sqrtf(variance + 1e-5f);
    }
}

/* The layer: rows of y from rows of x. The args hold what differs between the operators: projection, pattern, state. */
typedef struct layer {
    const weights *far, *near;
    nf_args favor, sparse;
    void *workspace;
    size_t bytes;
} layer;

static nf_status forward(layer *l, float *y, const float *x, int64_t rows, int decode)
{
    static float h[TOKENS * DIM];
    nf_status status =
        attend(h, x, l->far, decode ? FAVOR(decode) : FAVOR(forward), &l->favor, l->workspace, l->bytes, rows);
    if (status == NF_OK)
        status =
            attend(y, h, l->near, decode ? SPARSE(decode) : SPARSE(forward), &l->sparse, l->workspace, l->bytes, rows);
    norm(y, rows);
    return status;
}

int main(void)
{
    static weights far, near;
    static float x[TOKENS * DIM], whole[TOKENS * DIM], steps[TOKENS * DIM];
    const nf_pattern pattern = {.window = 512, .globals = 4};
    const size_t most =
        FAVOR(workspace)(NULL) > SPARSE(workspace)(NULL) ? FAVOR(workspace)(NULL) : SPARSE(workspace)(NULL);
    layer l = {&far, &near, {.batch = 1, .heads = HEADS}, {.batch = 1, .heads = HEADS}, NULL, most};
    float *const arrays[] = {(float *)&far, (float *)&near, x};
    const size_t counts[] = {sizeof far / sizeof(float), sizeof near / sizeof(float), TOKENS * DIM};
    uint32_t dice = 1;
    float worst = 0;
    nf_status s;
    for (int a = 0; a < 3; a++)
        for (size_t i = 0; i < counts[a]; i++) {
            dice = dice * 1664525u + 1013904223u;
            arrays[a][i] = ((float)(dice >> 8) / 8388608 - 1) * (a < 2 ? 0.15f : 1.7f);
        }
    l.workspace = aligned_alloc(NF_ALIGN, most);
    l.favor.projection = aligned_alloc(NF_ALIGN, FAVOR(projection_bytes)());
    s = FAVOR(projection_init)((void *)(uintptr_t)l.favor.projection, 1, NULL);
    l.sparse.pattern = &pattern;

    if (s == NF_OK)
        s = forward(&l, whole, x, TOKENS, 0); /* all tokens at once */

    l.favor.state = aligned_alloc(NF_ALIGN, FAVOR(state_bytes)(&l.favor));
    l.sparse.state = aligned_alloc(NF_ALIGN, SPARSE(state_bytes)(&l.sparse));
    if (s == NF_OK)
        s = FAVOR(state_reset)(&l.favor);
    if (s == NF_OK)
        s = SPARSE(state_reset)(&l.sparse);
    if (s == NF_OK)
        s = forward(&l, steps, x, PROMPT, 0); /* the prompt, then one token at a time */
    for (int t = PROMPT; t < TOKENS && s == NF_OK; t++)
        s = forward(&l, steps + t * DIM, x + t * DIM, 1, 1);

    for (int i = 0; i < TOKENS * DIM; i++)
        worst = fmaxf(worst, fabsf(whole[i] - steps[i]));
    printf("%s; %d tokens at once and with states differ by at most %.1e\n", nf_status_text(s), TOKENS, (double)worst);
    free((void *)(uintptr_t)l.favor.projection);
    free(l.favor.state);
    free(l.sparse.state);
    free(l.workspace);
    return s != NF_OK || !(worst < 1e-4f);
}
