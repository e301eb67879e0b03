/* A kernel for the tuner's own tests: exact attention in plain loops, with variants that are slow, wrong, hanging,
 * overflowing, crashing or of exactly known speed. The interface is that of a generated header. */
#ifndef FAULTY_H
#define FAULTY_H

#include "nearfar/core.h"

size_t nf_faulty_cpu_workspace(const nf_args *args);
nf_status nf_faulty_cpu_forward(const nf_args *args, void *workspace, size_t bytes);
nf_status nf_faulty_cpu_decode(const nf_args *args, void *workspace, size_t bytes);
const nf_variant *nf_faulty_cpu_variants(int32_t *count);

#endif

#ifdef NEARFAR_IMPLEMENTATION

#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* FAULTS(X): X(name, microseconds per forward, fault), from the test; the first is the default. */
#define FAULT_none 0
#define FAULT_wrong 1 /* the last token of a longer sequence */
#define FAULT_hang 2
#define FAULT_overflow 3 /* one float behind out */
#define FAULT_crash 4
#define FAULT_constraint 5
#define FAULT_overread 6  /* one float behind v */
#define FAULT_error 7     /* returns a status */
#define FAULT_nan 8       /* leaves a row of out as it was */
#define FAULT_workspace 9 /* one byte before its workspace */
#define FAULT_late 10     /* hangs when it is timed */
#define FAULT_stray 11    /* some hundred bytes behind out */

enum { FAULTY_D = 8 };

static void faulty_row(const nf_args *a, int64_t h, int64_t i)
{
    const int64_t kv = a->kv_tokens ? a->kv_tokens : a->q_tokens, heads = a->heads;
    const int64_t kv_heads = a->kv_heads ? a->kv_heads : heads, g = h / (heads / kv_heads);
    const int64_t keys = a->mask == NF_FULL ? kv : i + 1 + kv - a->q_tokens;
    const float *q = (const float *)a->q.data + (i * heads + h) * FAULTY_D;
    float *out = (float *)a->out.data + (i * heads + h) * FAULTY_D;
    double sum = 0, top = -1e300, o[FAULTY_D] = {0};
    for (int64_t j = 0; j < keys; j++) {
        const float *k = (const float *)a->k.data + (j * kv_heads + g) * FAULTY_D;
        const float *v = (const float *)a->v.data + (j * kv_heads + g) * FAULTY_D;
        double l = 0, e;
        for (int d = 0; d < FAULTY_D; d++)
            l += (double)q[d] * (double)k[d];
        l /= sqrt((double)FAULTY_D);
        if (l > top) {
            const double shrink = exp(top - l);
            sum *= shrink;
            for (int d = 0; d < FAULTY_D; d++)
                o[d] *= shrink;
            top = l;
        }
        e = exp(l - top);
        sum += e;
        for (int d = 0; d < FAULTY_D; d++)
            o[d] += e * (double)v[d];
    }
    for (int d = 0; d < FAULTY_D; d++)
        out[d] = (float)(o[d] / sum);
    if (a->lse)
        a->lse[h * a->q_tokens + i] = (float)(top + log(sum));
}

static void faulty_attend(const nf_args *a)
{
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t i = 0; i < a->q_tokens; i++)
                faulty_row(a, h, i);
}

static void faulty_wait(double microseconds)
{
    struct timespec start, now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    do
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    while ((double)(now.tv_sec - start.tv_sec) * 1e6 + (double)(now.tv_nsec - start.tv_nsec) * 1e-3 < microseconds);
}

static nf_status faulty_forward(const nf_args *a, void *workspace, int fault, double microseconds)
{
    static volatile float sink;
    const int64_t count = a->q_tokens * a->heads * FAULTY_D;
    const int timed = !a->lse; /* the tuner verifies with lse and times without */
    if (fault == FAULT_constraint)
        return NF_E_UNSUPPORTED;
    if (fault == FAULT_error && a->q_tokens == 33)
        return NF_E_VALUE;
    if (timed) {
        if (fault == FAULT_late)
            pause();
        faulty_wait(microseconds);
        return NF_OK;
    }
    faulty_attend(a);
    if (count == 0)
        return NF_OK;
    if (fault == FAULT_wrong && a->q_tokens == 300)
        ((float *)a->out.data)[count - 1] *= 1.01f;
    if (fault == FAULT_hang)
        for (;;)
            sink = 0;
    if (fault == FAULT_overflow)
        ((float *)a->out.data)[count] = 0;
    if (fault == FAULT_stray)
        ((float *)a->out.data)[count + 100] = 0;
    if (fault == FAULT_crash)
        _exit(3);
    if (fault == FAULT_overread)
        sink = ((const float *)a->v.data)[a->kv_tokens * (a->kv_heads ? a->kv_heads : a->heads) * FAULTY_D];
    if (fault == FAULT_nan)
        memset(a->out.data, 0xff, FAULTY_D * sizeof(float));
    (void)sink;
    if (fault == FAULT_workspace)
        ((char *)workspace)[-1] = 0;
    return NF_OK;
}

#define FAULTY_DEFINE(name, microseconds, fault) \
    static nf_status faulty_##name(const nf_args *a, void *workspace, size_t bytes) \
    { \
        (void)bytes; \
        return faulty_forward(a, workspace, FAULT_##fault, microseconds); \
    } \
    static int faulty_##name##_supported(void) \
    { \
        return FAULT_##fault != FAULT_constraint; \
    }
FAULTS(FAULTY_DEFINE)

#define FAULTY_ROW(name, microseconds, fault) \
    {"nf_faulty_cpu_" #name, "c", faulty_##name, faulty_##name, NULL, faulty_##name##_supported},
static const nf_variant faulty_table[] = {FAULTS(FAULTY_ROW)};

const nf_variant *nf_faulty_cpu_variants(int32_t *count)
{
    *count = (int32_t)(sizeof faulty_table / sizeof *faulty_table);
    return faulty_table;
}

size_t nf_faulty_cpu_workspace(const nf_args *args)
{
    (void)args;
    return NF_ALIGN;
}

nf_status nf_faulty_cpu_forward(const nf_args *args, void *workspace, size_t bytes)
{
    return faulty_table[0].forward(args, workspace, bytes);
}

nf_status nf_faulty_cpu_decode(const nf_args *args, void *workspace, size_t bytes)
{
    return faulty_table[0].decode(args, workspace, bytes);
}

#endif
