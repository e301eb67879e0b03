/* A decode step as a CUDA graph: captured once, launched for every token. The rows are those of one long call.
 *
 *     ../../nearfar generate favor_cosh_f32_d64_m128 --backend cuda
 *
 * graph: graph.c attention.cu
 *         nvcc -O2 -arch=native graph.c attention.cu -o graph
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

#include "nf_favor_cosh_f32_d64_m128_cuda.h"

#define K(entry) nf_favor_cosh_f32_d64_m128_cuda_##entry

enum { TOKENS = 50, HEADS = 8, ROW = HEADS * 64, SIZE = TOKENS * ROW }; /* tensors are [token][head][64] */

/* Calls of CUDA and of the kernel alike give 0 where all is well. */
static void must(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "%s failed with %d\n", what, status);
    exit(1);
}

static float *gpu_floats(size_t bytes)
{
    void *p = NULL;
    must(cudaMalloc(&p, bytes), "cudaMalloc");
    return (float *)p;
}

int main(void)
{
    static float in[3][SIZE], out[SIZE], whole[SIZE];
    const size_t bytes = K(workspace)(NULL), row = ROW * sizeof(float);
    void *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)()), *workspace = gpu_floats(bytes);
    float *all[3], *step[3], *gpu_out = gpu_floats(sizeof out), *gpu_projection = gpu_floats(K(projection_bytes)());
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS, .projection = gpu_projection};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t decode;
    float worst = 0;

    must(cudaStreamCreate(&stream), "cudaStreamCreate");
    must(K(projection_init)(projection, 1, NULL), "projection_init");
    must(cudaMemcpy(gpu_projection, projection, K(projection_bytes)(), cudaMemcpyHostToDevice), "copy");
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < SIZE; i++)
            in[t][i] = (float)(i * (7 - 2 * t) % 31 - 15) / 16;
        all[t] = gpu_floats(sizeof in[t]), step[t] = gpu_floats(row);
        must(cudaMemcpy(all[t], in[t], sizeof in[t], cudaMemcpyHostToDevice), "copy");
    }

    /* all at once, for comparison */
    a.stream = stream;
    a.q.data = all[0], a.k.data = all[1], a.v.data = all[2], a.out.data = gpu_out;
    must(K(forward)(&a, workspace, bytes), "forward");
    must(cudaMemcpyAsync(whole, gpu_out, sizeof whole, cudaMemcpyDeviceToHost, stream), "copy");

    /* capture a step: its buffers stay where they are, the state goes on from launch to launch */
    a.q_tokens = 1;
    a.q.data = step[0], a.k.data = step[1], a.v.data = step[2];
    a.state = gpu_floats(K(state_bytes)(&a));
    must(K(state_reset)(&a), "state_reset");
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    must(K(decode)(&a, workspace, bytes), "decode");
    must(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    must(cudaGraphInstantiateWithFlags(&decode, graph, 0), "cudaGraphInstantiateWithFlags");

    for (int n = 0; n < TOKENS; n++) {
        for (int t = 0; t < 3; t++)
            must(cudaMemcpyAsync(step[t], in[t] + n * ROW, row, cudaMemcpyHostToDevice, stream), "copy");
        must(cudaGraphLaunch(decode, stream), "cudaGraphLaunch");
        must(cudaMemcpyAsync(out + n * ROW, gpu_out, row, cudaMemcpyDeviceToHost, stream), "copy");
    }
    must(cudaStreamSynchronize(stream), "cudaStreamSynchronize");

    for (int i = 0; i < SIZE; i++)
        worst = fmaxf(worst, fabsf(out[i] - whole[i]));
    printf("%d launches of the graph and one long call differ by at most %.1e\n", TOKENS, (double)worst);
    free(projection);
    return !(worst < 1e-5f);
}
