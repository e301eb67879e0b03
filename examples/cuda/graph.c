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

static void must(int done, const char *what, const char *why)
{
    if (done)
        return;
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void cuda(cudaError_t error, const char *what)
{
    must(error == cudaSuccess, what, cudaGetErrorString(error));
}

static void kernel(nf_status status, const char *what)
{
    must(status == NF_OK, what, nf_status_text(status));
}

static float *gpu_floats(size_t bytes)
{
    void *p = NULL;
    cuda(cudaMalloc(&p, bytes), "cudaMalloc");
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

    cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
    kernel(K(projection_init)(projection, 1, NULL), "projection_init");
    cuda(cudaMemcpy(gpu_projection, projection, K(projection_bytes)(), cudaMemcpyHostToDevice), "copy");
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < SIZE; i++)
            in[t][i] = (float)(i * (7 - 2 * t) % 31 - 15) / 16;
        all[t] = gpu_floats(sizeof in[t]), step[t] = gpu_floats(row);
        cuda(cudaMemcpy(all[t], in[t], sizeof in[t], cudaMemcpyHostToDevice), "copy");
    }

    /* all at once, for comparison */
    a.stream = stream;
    a.q.data = all[0], a.k.data = all[1], a.v.data = all[2], a.out.data = gpu_out;
    kernel(K(forward)(&a, workspace, bytes), "forward");
    cuda(cudaMemcpyAsync(whole, gpu_out, sizeof whole, cudaMemcpyDeviceToHost, stream), "copy");

    /* capture a step: its buffers stay where they are, the state goes on from launch to launch */
    a.q_tokens = 1;
    a.q.data = step[0], a.k.data = step[1], a.v.data = step[2];
    a.state = gpu_floats(K(state_bytes)(&a));
    kernel(K(state_reset)(&a), "state_reset");
    cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    kernel(K(decode)(&a, workspace, bytes), "decode");
    cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    cuda(cudaGraphInstantiateWithFlags(&decode, graph, 0), "cudaGraphInstantiateWithFlags");

    for (int n = 0; n < TOKENS; n++) {
        for (int t = 0; t < 3; t++)
            cuda(cudaMemcpyAsync(step[t], in[t] + n * ROW, row, cudaMemcpyHostToDevice, stream), "copy");
        cuda(cudaGraphLaunch(decode, stream), "cudaGraphLaunch");
        cuda(cudaMemcpyAsync(out + n * ROW, gpu_out, row, cudaMemcpyDeviceToHost, stream), "copy");
    }
    cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");

    for (int i = 0; i < SIZE; i++)
        worst = fmaxf(worst, fabsf(out[i] - whole[i]));
    printf("%d launches of the graph and one long call differ by at most %.1e\n", TOKENS, (double)worst);
    free(projection);
    return !(worst < 1e-5f);
}
