/* A plain C program that attends on the GPU: causal attention of equal values is their mean.
 *
 *     ../../nearfar generate favor_cosh_f32_d64_m128 --backend cuda
 *
 * engine: engine.c attention.cu
 *         nvcc -O2 -arch=native engine.c attention.cu -o engine
 */
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

#include "nf_favor_cosh_f32_d64_m128_cuda.h"

#define K(entry) nf_favor_cosh_f32_d64_m128_cuda_##entry

enum { TOKENS = 100, HEADS = 2, SIZE = TOKENS * HEADS * 64 }; /* tensors are [token][head][64] */

/* The GPU's copy of some bytes. */
static void *upload(const void *from, size_t bytes)
{
    void *p = NULL;
    cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaSuccess && from)
        error = cudaMemcpyAsync(p, from, bytes, cudaMemcpyHostToDevice, 0);
    if (error != cudaSuccess) {
        fprintf(stderr, "upload: %s\n", cudaGetErrorString(error));
        exit(1);
    }
    return p;
}

int main(void)
{
    static float q[SIZE], k[SIZE], v[SIZE], out[SIZE];
    void *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)());
    size_t bytes = K(workspace)(NULL);
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS};
    nf_status s;
    for (int i = 0; i < SIZE; i++) {
        q[i] = (float)(i % 17 - 8) / 16;
        k[i] = (float)(i % 23 - 11) / 16;
        v[i] = 3;
    }
    if (K(projection_init)(projection, 1, NULL) != NF_OK) /* on the host */
        return 1;
    a.projection = upload(projection, K(projection_bytes)());
    a.q.data = upload(q, sizeof q), a.k.data = upload(k, sizeof k), a.v.data = upload(v, sizeof v);
    a.out.data = upload(NULL, sizeof out);
    a.stream = NULL; /* the default stream; or a cudaStream_t */
    s = K(forward)(&a, upload(NULL, bytes), bytes);
    cudaMemcpyAsync(out, a.out.data, sizeof out, cudaMemcpyDeviceToHost, 0);
    if (cudaStreamSynchronize(0) != cudaSuccess)
        return 1;
    printf("%s; the mean of equal values is %.4f\n", nf_status_text(s), (double)out[SIZE - 1]);
    free(projection);
    return s != NF_OK || out[SIZE - 1] < 2.9999f || out[SIZE - 1] > 3.0001f;
}
