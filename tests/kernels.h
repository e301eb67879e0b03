/* The kernels under test: every contract's header compiled once (kernel.c) and reached through one table, and the
 * buffers of a call, laid out so that a stray byte is noticed. */
#ifndef KERNELS_H
#define KERNELS_H

#include "nearfar/core.h"

#include "nearfar/pattern.h"

#include "oracle.h"

#include "nearfar/request.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef nf_status (*attend_fn)(const nf_args *args, void *workspace, size_t bytes);
typedef nf_status (*backward_fn)(const nf_args *args, const nf_grads *grads, void *workspace, size_t bytes);

typedef struct kernel {
    const char *name;               /* the contract's */
    int dim, features, block, rows; /* D, M, B, rows of W: read from the name */
    int far;                        /* features that a state sums up; features, but of linear */
    oracle_map map;                 /* of linear */
    size_t (*workspace)(const nf_args *args);
    attend_fn forward, decode;
    backward_fn backward; /* NULL where the build said so */
    size_t (*state_bytes)(const nf_args *args);
    nf_status (*state_reset)(const nf_args *args);
    nf_status (*state_merge)(void *dst, const void *a, const void *b);
    size_t (*projection_bytes)(void);
    nf_status (*projection_init)(void *projection, uint64_t seed, const nf_calibration *calibration);
    nf_status (*projection_from)(void *projection, const float *w, uint32_t flags);
    nf_status (*projection_read)(const void *projection, float *w);
    const nf_variant *(*variants)(int32_t *count);
} kernel;

/* The number behind a key letter in a name: number_in("avx2_c32_r6x2", 'c') is 32. */
static inline int number_in(const char *name, char letter)
{
    for (const char *p = strchr(name, '_'); p; p = strchr(p + 1, '_'))
        if (p[1] == letter && p[2] >= '0' && p[2] <= '9')
            return atoi(p + 2);
    return 0;
}

/* A kernel of the table, with its numbers. */
static inline kernel kernel_of(const kernel *k)
{
    kernel ready = *k;
    nf_amx_request(); /* variants for it count as supported from now on */
    ready.dim = number_in(k->name, 'd');
    ready.features = number_in(k->name, 'm');
    ready.block = number_in(k->name, 'b');
    for (int i = ORACLE_ELU; i < ORACLE_MAPS && strstr(k->name, "linear"); i++)
        if (strstr(k->name, oracle_map_name[i]))
            ready.map = (oracle_map)i;
    ready.far = ready.map == ORACLE_TAYLOR2 ? (1 + ready.dim + ready.dim * (ready.dim + 1) / 2 + 7) / 8 * 8
                : ready.map                 ? ready.dim
                                            : ready.features;
    ready.rows = strstr(k->name, "cosh") || strstr(k->name, "trig") ? ready.features / 2 : ready.features;
    return ready;
}

/* From the build: X(name, y) for every contract of an operator in the program. */
#ifdef FAVORS
#define LINEARS(X, y) CAUSAL_LINEARS(X, y) FULL_LINEARS(X, y)
#define CAUSALS(X, y) FAVORS(X, y) CAUSAL_LINEARS(X, y) EXACTS(X, y) SPARSES(X, y) HYBRIDS(X, y)
#define CONTRACTS(X, y) CAUSALS(X, y) FULL_LINEARS(X, y)
#define WITH_FEATURES(X, y) FAVORS(X, y) HYBRIDS(X, y)
#define WITH_PATTERN(X, y) SPARSES(X, y) HYBRIDS(X, y)
#define WITH_STATE(X, y) FAVORS(X, y) CAUSAL_LINEARS(X, y) SPARSES(X, y) HYBRIDS(X, y)
#define WITHOUT_FEATURES(X, y) EXACTS(X, y) SPARSES(X, y)
#define KERNEL_DECLARE(contract, unused) extern const kernel kernel_##contract;
CONTRACTS(KERNEL_DECLARE, unused)
#endif

/* One test per contract of a list: a topic is a function of a kernel. */
#define TEST_ONE(contract, topic) \
    Test(topic, contract) \
    { \
        const kernel k = kernel_of(&kernel_##contract); \
        topic(&k); \
    }
#define TEST_LIST(topic, LIST) \
    static void topic(const kernel *k) __attribute__((unused)); \
    LIST(TEST_ONE, topic) \
    static void topic(const kernel *k)
#define TEST_EACH(topic) TEST_LIST(topic, CONTRACTS)

/* A way to run a kernel: a variant that this machine supports; the first of them through the entry point, which picks
 * it (test_arguments: entry). */
typedef struct way {
    const char *name;
    attend_fn forward, decode;
    backward_fn backward;
    int chunk; /* tokens per chunk */
} way;

/* The i-th way; 0 where there are no more. */
static inline int way_at(const kernel *k, int i, way *w)
{
    int32_t count;
    const nf_variant *v = k->variants(&count);
    for (int32_t j = 0, n = 0; j < count; j++)
        if (v[j].supported() && n++ == i) {
            const int chunk = number_in(v[j].name + strlen("nf_") + strlen(k->name), 'c');
            *w = (way){v[j].name, i ? v[j].forward : k->forward, i ? v[j].decode : k->decode,
                       i ? v[j].backward : k->backward, chunk ? chunk : 32};
            return 1;
        }
    return 0;
}

#define EACH_WAY(k, w) \
    way w; \
    for (int w##_i = 0; way_at(k, w##_i, &w); w##_i++)

#endif
