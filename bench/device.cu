/* device.h on a GPU, by CUDA or HIP. Every buffer has guard bytes around its mirror. */
#define NF_ON_GPU
#include "device.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __HIPCC__
#include <hip/hip_runtime.h>
#define GPU(name) hip##name
#define hipDeviceProp hipDeviceProp_t
#define VENDOR "amd"
#else
#include <cuda_runtime.h>
#define GPU(name) cuda##name
#define VENDOR "nvidia"
#endif

enum { GUARD = 1024, FILL = 0xa5, MOST = 512 };

typedef struct mirror {
    const unsigned char *host;
    unsigned char *base, *data; /* on the device: guard, mirror, guard */
    size_t bytes, room;         /* room: with the guards */
    size_t begin, end;          /* what a call may touch of it: all but of scratch */
    int used, is_scratch;       /* since the last fetch */
} mirror;

static mirror mirrors[MOST];
static int count;

static void must(GPU(Error_t) status, const char *what)
{
    if (status == GPU(Success))
        return;
    fprintf(stderr, "device: %s: %s\n", what, GPU(GetErrorString)(status));
    exit(1);
}

/* Not the default stream: that would hide a kernel that is launched there. */
static GPU(Stream_t) stream(void)
{
    static GPU(Stream_t) made;
    static int ready;
    if (!ready)
        must(GPU(StreamCreateWithFlags)(&made, GPU(StreamNonBlocking)), "cannot make a stream");
    ready = 1;
    return made;
}

const char *device_describe(measure_device *d)
{
    static GPU(DeviceProp) properties;
    int devices = 0;
    GPU(Error_t) status = GPU(GetDeviceCount)(&devices);
    memset(d, 0, sizeof *d);
    if (status == GPU(Success) && devices)
        status = GPU(GetDeviceProperties)(&properties, 0);
    if (status != GPU(Success) || !devices)
        return status != GPU(Success) ? GPU(GetErrorString)(status) : "there is none";
    snprintf(d->vendor, sizeof d->vendor, VENDOR);
    snprintf(d->name, sizeof d->name, "%.90s", properties.name);
    d->units = properties.multiProcessorCount;
    d->l2 = properties.l2CacheSize;
#ifdef __HIPCC__
    snprintf(d->backend, sizeof d->backend, "hip");
    snprintf(d->arch, sizeof d->arch, "%.*s", (int)strcspn(properties.gcnArchName, ":"), properties.gcnArchName);
    snprintf(d->compiler, sizeof d->compiler, "hipcc, HIP %d.%d", HIP_VERSION_MAJOR, HIP_VERSION_MINOR);
#else
    snprintf(d->backend, sizeof d->backend, "cuda");
    snprintf(d->arch, sizeof d->arch, "sm_%d%d", properties.major, properties.minor);
    snprintf(d->compiler, sizeof d->compiler, "nvcc %d.%d", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
#endif
    return NULL;
}

void device_mirror(const void *at, size_t bytes)
{
    const size_t off = (uintptr_t)at % 256; /* the mirror is aligned as the memory is */
    mirror *m = &mirrors[count++];
    if (count == MOST) {
        fputs("device: too many buffers\n", stderr);
        exit(1);
    }
    memset(m, 0, sizeof *m);
    m->host = (const unsigned char *)at;
    m->bytes = bytes;
    m->room = bytes + off + 2 * GUARD;
    must(GPU(Malloc)((void **)&m->base, m->room), "out of memory");
    m->data = m->base + GUARD + off;
    must(GPU(MemsetAsync)(m->base, FILL, m->room, stream()), "cannot fill memory");
}

void device_forget(const void *at)
{
    for (int i = 0; i < count; i++)
        if (mirrors[i].host == (const unsigned char *)at) {
            GPU(Free)(mirrors[i].base);
            mirrors[i] = mirrors[--count];
            return;
        }
}

/* The mirror of announced memory, or NULL. */
static mirror *find(const void *p)
{
    const unsigned char *at = (const unsigned char *)p;
    for (int i = 0; i < count; i++) {
        mirror *m = &mirrors[i];
        if (at >= m->host && (at < m->host + m->bytes || (at == m->host && !m->bytes)))
            return m;
    }
    return NULL;
}

/* What fails here, device_fetch tells. */
void *device_address(const void *p)
{
    mirror *m = find(p);
    if (!m)
        return (void *)(uintptr_t)p;
    if (!m->used)
        GPU(MemcpyAsync)(m->data, m->host, m->bytes, GPU(MemcpyHostToDevice), stream());
    m->used = 1;
    m->is_scratch = 0;
    m->begin = 0;
    m->end = m->bytes;
    return m->data + ((const unsigned char *)p - m->host);
}

void *device_scratch(void *p, size_t bytes)
{
    mirror *m = find(p);
    if (!m)
        return p;
    m->used = m->is_scratch = 1;
    m->begin = (size_t)((unsigned char *)p - m->host);
    m->end = m->begin + bytes;
    GPU(MemsetAsync)(m->base, FILL, m->room, stream());
    GPU(MemsetAsync)(m->data + m->begin, 0xff, bytes, stream());
    return m->data + m->begin;
}

nf_args device_args(const nf_args *args)
{
    static nf_pattern pattern;
    nf_args a = *args;
    a.q.data = device_address(a.q.data);
    a.k.data = device_address(a.k.data);
    a.v.data = device_address(a.v.data);
    a.out.data = device_address(a.out.data);
    a.lse = (float *)device_address(a.lse);
    a.cu_tokens = (const int32_t *)device_address(a.cu_tokens);
    a.projection = device_address(a.projection);
    a.state = device_address(a.state);
    a.decay = (const float *)device_address(a.decay);
    a.stream = stream();
    if (a.pattern) { /* itself the host's */
        pattern = *a.pattern;
        pattern.dilation = (const int32_t *)device_address(pattern.dilation);
        pattern.global_tokens = (const int32_t *)device_address(pattern.global_tokens);
        pattern.block_offsets = (const int32_t *)device_address(pattern.block_offsets);
        pattern.block_keys = (const int32_t *)device_address(pattern.block_keys);
        pattern.far_gain = (const float *)device_address(pattern.far_gain);
        a.pattern = &pattern;
    }
    return a;
}

/* Does the guard at p still have its filling? */
static int intact(const unsigned char *p)
{
    unsigned char bytes[GUARD];
    if (GPU(MemcpyAsync)(bytes, p, GUARD, GPU(MemcpyDeviceToHost), stream()) != GPU(Success) ||
        GPU(StreamSynchronize)(stream()) != GPU(Success))
        return 0;
    for (int i = 0; i < GUARD; i++)
        if (bytes[i] != FILL)
            return 0;
    return 1;
}

const char *device_fetch(void)
{
    const char *trouble = NULL;
    const GPU(Error_t) status = GPU(StreamSynchronize)(stream());
    if (status != GPU(Success))
        trouble = GPU(GetErrorString)(status);
    for (int i = 0; i < count && !trouble; i++) {
        const mirror *m = &mirrors[i];
        if (m->used && (!intact(m->data + m->begin - GUARD) || !intact(m->data + m->end)))
            trouble = m->is_scratch ? "wrote beside its workspace" : "wrote beside its memory";
        else if (m->used && !m->is_scratch)
            GPU(MemcpyAsync)((void *)(uintptr_t)m->host, m->data, m->bytes, GPU(MemcpyDeviceToHost), stream());
    }
    for (int i = 0; i < count; i++)
        mirrors[i].used = 0;
    if (GPU(StreamSynchronize)(stream()) != GPU(Success) && !trouble)
        trouble = "cannot copy from the device";
    return trouble;
}

void *device_new(size_t bytes, const void *from, size_t some)
{
    unsigned char *p;
    size_t done = some < bytes ? some : bytes;
    must(GPU(Malloc)((void **)&p, bytes), "out of memory");
    must(GPU(MemcpyAsync)(p, from, done, GPU(MemcpyHostToDevice), stream()), "cannot copy");
    for (; done < bytes; done += done < bytes - done ? done : bytes - done)
        must(GPU(MemcpyAsync)(p + done, p, done < bytes - done ? done : bytes - done, GPU(MemcpyDeviceToDevice),
                              stream()),
             "cannot copy");
    return p;
}

void device_delete(void *p)
{
    GPU(Free)(p);
}

double device_time(void (*work)(void *on), void *on)
{
    static GPU(Event_t) from, to;
    float milliseconds = 0;
    if (!from) {
        must(GPU(EventCreate)(&from), "cannot make an event");
        must(GPU(EventCreate)(&to), "cannot make an event");
    }
    must(GPU(EventRecord)(from, stream()), "cannot record an event");
    work(on);
    must(GPU(EventRecord)(to, stream()), "cannot record an event");
    must(GPU(EventSynchronize)(to), "a kernel failed");
    must(GPU(EventElapsedTime)(&milliseconds, from, to), "cannot read an event");
    return 1e-3 * (double)milliseconds;
}

enum { COPIED = 1 << 28 }; /* bytes: more than caches hold */

static void copy(void *on)
{
    unsigned char *p = (unsigned char *)on;
    GPU(MemcpyAsync)(p, p + COPIED, COPIED, GPU(MemcpyDeviceToDevice), stream());
}

double device_copy_rate(void)
{
    const unsigned char zero[16] = {0};
    void *p = device_new((size_t)2 * COPIED, zero, sizeof zero);
    double best = 1e300;
    for (int i = 0; i < 10; i++) {
        const double seconds = device_time(copy, p);
        best = seconds < best ? seconds : best;
    }
    device_delete(p);
    return 2.0 * COPIED / best;
}
