/* The few declarations of HIP's runtime that a header needs, so that clang can compile its device part where no ROCm
 * is. */
#ifndef HIP_RUNTIME_API_H
#define HIP_RUNTIME_API_H

#include <stddef.h>

typedef enum hipError_t { hipSuccess = 0 } hipError_t;
typedef enum hipDeviceAttribute_t {
    hipDeviceAttributeMaxSharedMemoryPerBlock,
    hipDeviceAttributeWarpSize
} hipDeviceAttribute_t;
typedef struct hipDeviceProp_t {
    char gcnArchName[256];
} hipDeviceProp_t;
typedef struct ihipStream_t *hipStream_t;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

extern "C" {
hipError_t hipGetDevice(int *device);
hipError_t hipDeviceGetAttribute(int *value, hipDeviceAttribute_t attribute, int device);
hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device);
hipError_t hipLaunchKernel(const void *kernel, dim3 blocks, dim3 threads, void **arguments, size_t shared,
                           hipStream_t stream);
}
#endif
