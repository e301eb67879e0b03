/* Many heads over a few threads: the caller owns the threads, the kernel a share of the work. A unit is one kv head of
 * one batch entry; every thread brings its own workspace, and the bits do not depend on how many threads there are. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m128_cpu.h"

#define K(entry) nf_favor_cosh_f32_d64_m128_cpu_##entry

enum { HEADS = 6, TOKENS = 500, SIZE = HEADS * TOKENS * 64, THREADS = 3 };

typedef struct share {
    nf_args args;
    nf_status status;
} share;

static void *run(void *arg)
{
    share *mine = (share *)arg;
    const size_t bytes = K(workspace)(&mine->args);
    void *workspace = aligned_alloc(NF_ALIGN, bytes);
    mine->status = K(forward)(&mine->args, workspace, bytes);
    free(workspace);
    return NULL;
}

/* One call with its units shared out over `threads`; all of them carry on the one state. */
static nf_status forward(const nf_args *args, int threads)
{
    pthread_t id[THREADS];
    share shares[THREADS];
    nf_status status = NF_OK;
    for (int i = 0; i < threads; i++) {
        shares[i].args = *args;
        shares[i].args.split_begin = HEADS * i / threads;
        shares[i].args.split_count = HEADS * (i + 1) / threads - HEADS * i / threads;
        if (pthread_create(&id[i], NULL, run, &shares[i]) != 0)
            abort();
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(id[i], NULL);
        if (shares[i].status != NF_OK)
            status = shares[i].status;
    }
    return status;
}

int main(void)
{
    static float q[SIZE], k[SIZE], v[SIZE], out[2][SIZE];
    void *state[2], *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)());
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS, .projection = projection};
    nf_status s = K(projection_init)(projection, 1, NULL);
    int same;
    for (int i = 0; i < SIZE; i++) {
        q[i] = (float)(i * 7 % 31 - 15) / 16;
        k[i] = (float)(i * 5 % 29 - 14) / 16;
        v[i] = (float)(i * 3 % 37 - 18) / 16;
    }
    a.q.data = q, a.k.data = k, a.v.data = v;
    for (int i = 0; i < 2 && s == NF_OK; i++) {
        a.out.data = out[i];
        a.state = state[i] = aligned_alloc(NF_ALIGN, K(state_bytes)(&a));
        s = K(state_reset)(&a);
        for (int call = 0; call < 2 && s == NF_OK; call++) /* the second call goes on where the first ended */
            s = forward(&a, i ? THREADS : 1);
    }
    same =
        s == NF_OK && memcmp(out[0], out[1], sizeof out[0]) == 0 && memcmp(state[0], state[1], K(state_bytes)(&a)) == 0;
    printf("%s; %d threads give %s bits as one\n", nf_status_text(s), THREADS, same ? "the same" : "other");
    for (int i = 0; i < 2; i++)
        free(state[i]);
    free(projection);
    return !same;
}
