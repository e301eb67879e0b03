/* One long sequence over processes: every rank holds a segment of it, sums up its keys, gets the sum of all segments
 * before its own in one exchange, and attends. Needs MPI; docs/long-sequences.md says what it sends and how it scales.
 *
 *     mpicc -O2 -Igenerated examples/long_sequence_mpi.c -o long_sequence_mpi && mpirun -n 4 ./long_sequence_mpi
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef NEARFAR_FORWARD_ONLY
#define NEARFAR_FORWARD_ONLY
#endif
#define NEARFAR_IMPLEMENTATION
#include "nf_favor_cosh_f32_d64_m256_cpu.h"

#define K(entry) nf_favor_cosh_f32_d64_m256_cpu_##entry

enum { D = 64, HEADS = 2, ROW = HEADS * D, TOKENS = 1000 };

/* An MPI operation on whole states, in rank order: later = earlier + later. MPI's own buffers may lie anywhere, so they
 * are copied to where a state may lie. */
static void merge(void *earlier, void *later, int *count, MPI_Datatype *type)
{
    int bytes;
    MPI_Type_size(*type, &bytes);
    for (int i = 0; i < *count; i++) {
        char *both = aligned_alloc(NF_ALIGN, 2 * (size_t)bytes), *state = (char *)later + (size_t)i * (size_t)bytes;
        memcpy(both, (const char *)earlier + (size_t)i * (size_t)bytes, (size_t)bytes);
        memcpy(both + bytes, state, (size_t)bytes);
        if (K(state_merge)(both, both, both + bytes) != NF_OK)
            MPI_Abort(MPI_COMM_WORLD, 1);
        memcpy(state, both, (size_t)bytes);
        free(both);
    }
}

/* The forward of a sequence of which the call holds this rank's segment. `mine` and args->state are states of the call;
 * args->state becomes the state of everything up to the end of the segment. */
static nf_status forward(const nf_args *args, void *mine, void *workspace, size_t bytes)
{
    const int state_bytes = (int)K(state_bytes)(args);
    int rank, ranks;
    nf_args keys = *args;
    nf_status status = K(state_reset)(args); /* on rank 0, to which nothing is sent */
    MPI_Datatype state;
    MPI_Op op;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    keys.state = mine;
    keys.kv_tokens = args->q_tokens;
    keys.q_tokens = 0; /* no queries: only the state takes in the keys */
    if (status == NF_OK)
        status = K(state_reset)(&keys);
    if (status == NF_OK && rank + 1 < ranks) /* nobody comes after the last rank */
        status = K(forward)(&keys, workspace, bytes);
    MPI_Type_contiguous(state_bytes, MPI_BYTE, &state);
    MPI_Type_commit(&state);
    MPI_Op_create(merge, 0, &op);
    MPI_Exscan(mine, args->state, 1, state, op, MPI_COMM_WORLD);
    MPI_Op_free(&op);
    MPI_Type_free(&state);
    return status == NF_OK ? K(forward)(args, workspace, bytes) : status;
}

/* Tokens first .. first + n of the whole sequence. */
static void fill(float *q, float *k, float *v, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < n * ROW; i++) {
        const int64_t at = first * ROW + i;
        q[i] = (float)(at * 7 % 31) / 16 - 1;
        k[i] = (float)(at * 5 % 29) / 16 - 1;
        v[i] = (float)(at * 3 % 37) / 16 - 1;
    }
}

int main(int argc, char **argv)
{
    const size_t bytes = K(workspace)(NULL), segment = (size_t)TOKENS * ROW;
    void *projection = aligned_alloc(NF_ALIGN, K(projection_bytes)()), *workspace = aligned_alloc(NF_ALIGN, bytes);
    nf_args a = {.batch = 1, .heads = HEADS, .q_tokens = TOKENS, .projection = projection};
    nf_status status = K(projection_init)(projection, 1, NULL); /* the same bits on every rank */
    float *rows[5], off = 0;                                    /* q, k, v, out, out of a single call */
    void *mine;
    int rank, ranks, failed;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int i = 0; i < 5; i++) /* rank 0 has room for the whole sequence, to compare with */
        rows[i] = calloc(segment * (rank ? 1 : (size_t)ranks), sizeof(float));
    fill(rows[0], rows[1], rows[2], (int64_t)rank * TOKENS, TOKENS);
    a.q.data = rows[0], a.k.data = rows[1], a.v.data = rows[2], a.out.data = rows[3];
    a.state = aligned_alloc(NF_ALIGN, K(state_bytes)(&a)), mine = aligned_alloc(NF_ALIGN, K(state_bytes)(&a));
    if (status == NF_OK)
        status = forward(&a, mine, workspace, bytes);
    MPI_Gather(rank ? rows[3] : MPI_IN_PLACE, (int)segment, MPI_FLOAT, rows[3], (int)segment, MPI_FLOAT, 0,
               MPI_COMM_WORLD);
    if (rank == 0 && status == NF_OK) {
        a.q_tokens = (int64_t)TOKENS * ranks, a.out.data = rows[4], a.state = NULL;
        fill(rows[0], rows[1], rows[2], 0, a.q_tokens);
        status = K(forward)(&a, workspace, bytes);
        for (size_t i = 0; i < segment * (size_t)ranks; i++) {
            const float difference = rows[3][i] > rows[4][i] ? rows[3][i] - rows[4][i] : rows[4][i] - rows[3][i];
            off = difference <= off ? off : difference; /* NaN stays */
        }
    }
    failed = status != NF_OK || !(off <= 1e-5f);
    MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%s; %d ranks within %.1e of one process, %d KiB of state sent per rank\n", nf_status_text(status),
               ranks, (double)off, (int)(K(state_bytes)(&a) / 1024));
    for (int i = 0; i < 5; i++)
        free(rows[i]);
    free(projection), free(workspace), free(mine); /* and the state, with the process */
    MPI_Finalize();
    return failed;
}
