/* Where kernels run, as tuner, bench and tests see it. On a CPU this is the memory and the clock of the process. On a
 * GPU (NF_ON_GPU; device.cu) announced memory has a mirror on the device, and a call gets the mirror's addresses. A
 * GPU's runtime does not survive a fork: only the child that uses it may call it. */
#ifndef DEVICE_H
#define DEVICE_H

#include "core.h"

#include "pattern.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct measure_device {
    char backend[8], vendor[32], arch[64], name[96], compiler[64];
    long family, model, units;
    long l1d, l2, l3; /* bytes; 0 = unknown */
} measure_device;

typedef nf_status (*device_attend)(const nf_args *args, void *workspace, size_t bytes);

#ifdef NF_ON_GPU

/* Describe the GPU. NULL, or why there is none. */
const char *device_describe(measure_device *d);

/* Announce memory of the host that calls may be given pointers into, and take it back. */
void device_mirror(const void *at, size_t bytes);
void device_forget(const void *at);

/* The address in the mirror, which has now what the host has. NULL stays NULL. */
void *device_address(const void *p);

/* The same for a workspace within announced memory: filled with NaN instead, and never brought back. */
void *device_scratch(void *p, size_t bytes);

/* The arguments with all addresses, and with a stream; valid until the next call. */
nf_args device_args(const nf_args *args);

/* Wait for what was launched, and bring back every mirror whose address was asked for since the last time. NULL, or
 * what went wrong: a fault, or a write beside announced memory. */
const char *device_fetch(void);

/* Seconds that the device needs for what work(on) launches. */
double device_time(void (*work)(void *on), void *on);

/* Memory of the device alone: `bytes` of it, filled with the `some` bytes at from over and over. */
void *device_new(size_t bytes, const void *from, size_t some);
void device_delete(void *p);

/* Ceilings: bytes per second of a copy on the device, read and written; flop per second of products of bf16
 * (products.cu; 0: no matrix units), for a GPU of so many units. */
double device_copy_rate(void);
double device_product_rate(long units);

#else

static inline void device_mirror(const void *at, size_t bytes)
{
    (void)at, (void)bytes;
}

static inline void *device_address(void *p)
{
    return p;
}

static inline void *device_scratch(void *p, size_t bytes)
{
    (void)bytes;
    return p;
}

static inline nf_args device_args(const nf_args *args)
{
    return *args;
}

static inline const char *device_fetch(void)
{
    return NULL;
}

#endif

/* One call, all of whose memory was announced; *trouble as of device_fetch. */
NF_UNUSED static nf_status device_call(device_attend attend, const nf_args *args, void *workspace, size_t bytes,
                                       const char **trouble)
{
    const nf_args there = device_args(args);
    const nf_status status = attend(&there, device_scratch(workspace, bytes), bytes);
    *trouble = device_fetch();
    return status;
}

#ifdef __cplusplus
}
#endif
#endif /* DEVICE_H */
