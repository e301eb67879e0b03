/* CUDA's runtime over the executor: everything is done when a call returns. */
#define _POSIX_C_SOURCE 200809L
#include "cuda/cuda_runtime.h"
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct cudaEvent {
    double seconds; /* that this thread had run */
};

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess         ? "no error"
           : error == cudaErrorNoDevice ? "no CUDA-capable device is detected"
                                        : "out of memory";
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = getenv("NO_GPU") ? 0 : 1;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    (void)device;
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "the executor, not a GPU");
    properties->multiProcessorCount = 1;
    properties->l2CacheSize = 65536;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    if (posix_memalign(p, 256, bytes ? bytes : 1))
        return cudaErrorMemoryAllocation;
    simt_memory(*p, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    simt_forget(p);
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    (void)kind, (void)stream;
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    (void)stream;
    memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    (void)flags;
    *stream = NULL;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    (void)stream;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    *event = (cudaEvent_t)calloc(1, sizeof **event);
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    struct timespec t;
    (void)stream;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    event->seconds = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to)
{
    *milliseconds = (float)(1e3 * (to->seconds - from->seconds));
    return cudaSuccess;
}
