/* One long sequence over a few cores, through the state: a short head and then segments, attended to at the same time,
 * each from the merged state of everything before it. What that costs, and when to do otherwise:
 * docs/long-sequences.md.
 *
 *     cc -O2 -Igenerated examples/long_sequence.c -o long_sequence -lm -pthread && ./long_sequence 65536 20
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef NEARFAR_FORWARD_ONLY
#define NEARFAR_FORWARD_ONLY
#endif
#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m256_cpu.h"

#define K(entry) nf_favor_cosh_f32_d64_m256_cpu_##entry

enum { D = 64, WORKERS = 3, SEGMENTS = 5 };

/* A call over [tokens][1][D] and how it is cut: piece 0 is the head, piece i > 0 the segment i. */
typedef struct sequence {
    nf_args args;
    int64_t head, segment, segments;
    char *states; /* one per segment: what comes before it */
    size_t state_bytes;
} sequence;

typedef struct worker {
    const sequence *all;
    pthread_barrier_t *everyone;
    int number, workers;
    nf_status status;
} worker;

/* The first token of a piece. */
static int64_t begin(const sequence *s, int64_t piece)
{
    const int64_t token = piece ? s->head + (piece - 1) * s->segment : 0;
    return token < s->args.q_tokens ? token : s->args.q_tokens;
}

/* The call over one piece, with one of the states. */
static nf_args call(const sequence *s, int64_t piece, int64_t state)
{
    const int64_t first = begin(s, piece);
    nf_args a = s->args;
    a.state = s->states + (size_t)state * s->state_bytes;
    a.q_tokens = a.kv_tokens = begin(s, piece + 1) - first;
    a.q.data = (const float *)a.q.data + first * D;
    a.k.data = (const float *)a.k.data + first * D;
    a.v.data = (const float *)a.v.data + first * D;
    a.out.data = (float *)a.out.data + first * D;
    return a;
}

/* Every state becomes that of all pieces up to its own. */
static nf_status scan(const sequence *s)
{
    nf_status status = NF_OK;
    for (int64_t i = 1; i < s->segments && status == NF_OK; i++) {
        char *state = s->states + (size_t)i * s->state_bytes;
        status = K(state_merge)(state, state - s->state_bytes, state);
    }
    return status;
}

static void *work(void *arg)
{
    worker *w = (worker *)arg;
    const sequence *s = w->all;
    const size_t bytes = K(workspace)(NULL);
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    nf_status status = NF_OK;
    for (int64_t i = w->number; i < s->segments && status == NF_OK;
         i += w->workers) { /* the head; the segments' keys */
        nf_args a = call(s, i, i);
        if ((status = K(state_reset)(&a)) == NF_OK) {
            a.q_tokens = i ? 0 : a.q_tokens; /* no queries: only the state takes in the keys */
            status = K(forward)(&a, workspace, bytes);
        }
    }
    pthread_barrier_wait(w->everyone);
    if (w->number == 0 && status == NF_OK)
        status = scan(s);
    pthread_barrier_wait(w->everyone);
    for (int64_t i = w->number; i < s->segments && status == NF_OK; i += w->workers) {
        const nf_args a = call(s, i + 1, i);
        status = K(forward)(&a, workspace, bytes);
    }
    w->status = status;
    free(workspace);
    return NULL;
}

/* A forward over a long sequence. The bits depend on head and segment, not on the number of workers. The last of the
 * states becomes the state of the whole sequence, to decode from. */
static nf_status forward(const sequence *s, int workers)
{
    pthread_t thread[WORKERS];
    pthread_barrier_t everyone;
    worker w[WORKERS];
    nf_status status = NF_OK;
    pthread_barrier_init(&everyone, NULL, (unsigned)workers);
    for (int i = workers - 1; i >= 0; i--) {
        const worker mine = {s, &everyone, i, workers, NF_OK};
        w[i] = mine;
        if (i == 0)
            work(&w[i]);
        else if (pthread_create(&thread[i], NULL, work, &w[i]) != 0)
            abort();
    }
    for (int i = 0; i < workers; i++) {
        if (i)
            pthread_join(thread[i], NULL);
        status = status == NF_OK ? w[i].status : status;
    }
    pthread_barrier_destroy(&everyone);
    return status;
}

/* ---- a trial ---- */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Cut a sequence for so many cores. The sums over a segment take 0.45 of a forward over it (measured), so that a head
 * of 0.45 segments takes the same time: nobody waits. */
static void cut(sequence *s, int64_t segments)
{
    s->segments = segments;
    s->segment = (int64_t)((double)s->args.q_tokens / ((double)segments + 0.45) / 32 + 1) * 32;
    s->head = s->args.q_tokens - segments * s->segment;
    s->head = s->head > 0 ? s->head : 0;
}

int main(int argc, char **argv)
{
    const int64_t n = argc > 1 ? atoll(argv[1]) : 3000;
    const int rounds = argc > 2 ? atoi(argv[2]) : 3;
    const size_t floats = (size_t)n * D, bytes = K(workspace)(NULL);
    float *q = calloc(floats, sizeof *q), *k = calloc(floats, sizeof *k), *v = calloc(floats, sizeof *v);
    float *out = calloc(3 * floats, sizeof *out); /* of one call, of 2 workers, of 1 to 3 */
    void *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)()), *workspace = aligned_alloc(NF_ALIGN, bytes);
    sequence s = {.args = {.batch = 1, .heads = 1, .q_tokens = n, .projection = projection}};
    double fastest[2] = {1e9, 1e9}, off = 0;
    int same = 1;
    nf_status status = K(projection_init)(projection, 1, NULL);
    for (size_t i = 0; i < floats; i++) {
        q[i] = (float)(i * 7 % 31) / 16 - 1;
        k[i] = (float)(i * 5 % 29) / 16 - 1;
        v[i] = (float)(i * 3 % 37) / 16 - 1;
    }
    s.args.q.data = q, s.args.k.data = k, s.args.v.data = v;
    s.state_bytes = K(state_bytes)(&s.args);
    s.states = aligned_alloc(NF_ALIGN, SEGMENTS * s.state_bytes);
    cut(&s, 2);
    for (int round = 0; round < rounds && status == NF_OK; round++) {
        double start = seconds(), middle;
        s.args.out.data = out;
        status = K(forward)(&s.args, workspace, bytes);
        middle = seconds();
        s.args.out.data = out + floats;
        status = status == NF_OK ? forward(&s, 2) : status;
        fastest[0] = fmin(fastest[0], middle - start);
        fastest[1] = fmin(fastest[1], seconds() - middle);
    }
    cut(&s, SEGMENTS);
    for (int workers = 1; workers <= WORKERS && status == NF_OK; workers++) {
        s.args.out.data = out + (workers > 1 ? 2 : 1) * floats;
        status = forward(&s, workers);
        same = same && (workers == 1 || memcmp(out + floats, out + 2 * floats, floats * sizeof(float)) == 0);
    }
    for (size_t i = 0; i < floats; i++)
        off = fmax(off, fabs((double)(out[floats + i] - out[i])));
    printf("%s; 2 cores: %.2f times as fast; %d workers give %s bits as one, within %.1e of a single call\n",
           nf_status_text(status), fastest[0] / fastest[1], WORKERS, same ? "the same" : "other", off);
    free(q), free(k), free(v), free(out), free(projection), free(workspace), free(s.states);
    return status != NF_OK || !same || off > 1e-5;
}
