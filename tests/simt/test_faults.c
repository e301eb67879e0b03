/* The executor itself: kernels that each hold one fault, and the same kernels without it. Compiled with
 * -fsanitize=thread, linked without it. */
#include "check.h"
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>

enum { THREADS = 128, BLOCKS = 3, WORDS = THREADS * BLOCKS };

typedef struct work {
    float *in, *out; /* [WORDS] */
    int broken;      /* 1: with the fault */
} work;

typedef void (*kernel)(work w);

typedef struct call {
    kernel run;
    work w;
} call;

static float input[WORDS] __attribute__((aligned(64))), output[WORDS] __attribute__((aligned(64)));

SIMT_ENTER enter(const void *context)
{
    const call *c = (const call *)context;
    c->run(c->w);
}

/* Run a kernel; its fault, or "". */
static const char *fault_of(kernel k, int broken, int warp, int backwards)
{
    const int64_t blocks[2] = {BLOCKS, 1};
    const call c = {k, {input, output, broken}};
    simt_memory(input, sizeof input);
    simt_memory(output, sizeof output);
    for (int i = 0; i < WORDS; i++)
        input[i] = (float)i, output[i] = NAN;
    simt.quiet = 1, simt.warp = warp, simt.backwards = backwards;
    simt.fault[0] = 0;
    simt_launch(enter, &c, blocks, THREADS, 2 * THREADS * sizeof(float));
    simt.warp = 32, simt.backwards = 0;
    simt_forget(input);
    simt_forget(output);
    return simt.fault;
}

/* Broken, the kernel is reported with `what` at a line of this file (0: at any), in either order of threads and either
 * width of warps; sound, it is not. */
static void reports(kernel k, const char *what, int line)
{
    char at[64], by_line[64];
    snprintf(at, sizeof at, "test_faults.c:%d:", line);
    snprintf(by_line, sizeof by_line, "line %d:", line);
    for (int i = 0; i < 4; i++) {
        const int warp = i % 2 ? 64 : 32, backwards = i / 2;
        const char *fault = fault_of(k, 0, warp, backwards);
        CHECK(!fault[0], "a sound kernel is reported: %s", fault);
        fault = fault_of(k, 1, warp, backwards);
        CHECK(strstr(fault, what) != NULL, "not '%s' but '%s'", what, fault);
        CHECK(strncmp(fault, "thread ", 7) == 0 && strstr(fault, " of block (") != NULL, "who? %s", fault);
        CHECK(!line || strstr(fault, at) || strstr(fault, by_line), "not at line %d: %s", line, fault);
    }
}

/* The line of a kernel's fault, so many lines below. */
#define LINE(name, below) enum { name##_line = __LINE__ + below }
#define HERE ((int)nf_block_x() * THREADS + nf_thread())

/* ---- barriers and warps ------------------------------------------------------------------------------------------ */

static void barrier_kernel(work w)
{
    if (w.broken && nf_thread() % 2)
        nf_barrier();
    else
        nf_barrier();
    w.out[HERE] = 1;
}

Test(faults, barrier)
{
    reports(barrier_kernel, "divergent barrier: thread ", 0);
}

LINE(exit, 5);
static void exit_kernel(work w)
{
    if (w.broken && nf_thread() == 77)
        return;
    nf_barrier();
    w.out[HERE] = 1;
}

Test(faults, exit)
{
    reports(exit_kernel, "divergent barrier: thread 77 has ended without it", exit_line);
}

LINE(lanes, 5);
static void lanes_kernel(work w)
{
    float x = w.in[HERE];
    if (!w.broken || nf_thread() != 5)
        x = nf_lane_xor(x, 1);
    w.out[HERE] = x;
}

Test(faults, lanes)
{
    reports(lanes_kernel, "a warp operation that not all lanes reach", lanes_line);
}

LINE(vote, 5);
static void vote_kernel(work w)
{
    int any = 0;
    if (!w.broken || nf_thread() % 32 != 7)
        any = nf_any(nf_thread() % 64 == 33);
    w.out[HERE] = (float)any;
}

Test(faults, vote)
{
    reports(vote_kernel, "a warp operation that not all lanes reach", vote_line);
    for (int warp = 32; warp <= 64; warp += 32) {
        CHECK(!fault_of(vote_kernel, 0, warp, 0)[0], "%s", simt.fault);
        for (int t = 0; t < WORDS; t++)
            CHECK(output[t] == (t % 64 / warp == 33 / warp), "thread %d: %g", t, (double)output[t]);
    }
}

static void lines_kernel(work w)
{
    float x = w.in[HERE];
    if (w.broken && nf_thread() % 64 >= 31)
        x = nf_lane_xor(x, 2);
    else
        x = nf_lane_xor(x, 2);
    w.out[HERE] = x;
}

Test(faults, lines)
{
    reports(lines_kernel, "divergent warp: another lane is at line ", 0);
}

static void shuffle_kernel(work w)
{
    const int t = nf_thread();
    w.out[HERE] = 0;
    for (int other = 1; other < 32; other *= 2) {
        const float x = nf_lane_xor((float)t, other);
        const double y = nf_lane_xor_double(t + 1e-9, other);
        if (x != (float)(t ^ other) || y != (t ^ other) + 1e-9)
            w.out[HERE] = 1;
    }
}

Test(faults, shuffle)
{
    for (int i = 0; i < 4; i++) {
        CHECK(!fault_of(shuffle_kernel, 0, i % 2 ? 64 : 32, i / 2)[0], "%s", simt.fault);
        for (int t = 0; t < WORDS; t++)
            CHECK(output[t] == 0, "thread %d got another lane's number", t);
    }
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

LINE(outside, 4);
static void outside_kernel(work w)
{
    const int at = w.broken && HERE == WORDS - 1 ? WORDS + 100000 : HERE;
    w.out[HERE] = w.in[at];
}

Test(faults, outside)
{
    reports(outside_kernel, "load of 4 bytes", outside_line);
    CHECK(strstr(simt.fault, "thread 127 of block (2, 0)") && strstr(simt.fault, "outside every buffer"), "%s",
          simt.fault);
}

LINE(below, 5);
static void below_kernel(work w)
{
    const int at = w.broken && HERE == 0 ? -100000 : HERE;
    const float x = w.in[HERE];
    w.out[at] = x;
}

Test(faults, below)
{
    reports(below_kernel, "store of 4 bytes", below_line);
}

LINE(shared, 5);
static void shared_kernel(work w)
{
    float *s = (float *)nf_shared() + 2 * nf_thread() + (w.broken ? 2 : 1);
    const float x = w.in[HERE];
    s[0] = x;
    w.out[HERE] = s[0];
}

Test(faults, shared)
{
    reports(shared_kernel, "", shared_line);
    CHECK(strstr(simt.fault, "thread 127") && strstr(simt.fault, "at shared + 1024, outside the block's 1024 bytes"),
          "%s", simt.fault);
}

LINE(crooked, 4);
static void crooked_kernel(work w)
{
    const float *p = w.in + nf_thread() / 4 * 4 + w.broken;
    const nf_float4 x = nf_load4(p);
    w.out[HERE] = x.x + x.w;
}

Test(faults, crooked)
{
    reports(crooked_kernel, "load of 16 bytes", crooked_line);
    CHECK(strstr(simt.fault, "misaligned") != NULL, "%s", simt.fault);
}

LINE(crooked_store, 5);
static void crooked_store_kernel(work w)
{
    const nf_float4 x = {1, 2, 3, 4};
    if (nf_thread() < 32)
        nf_store4((float *)nf_shared() + 4 * nf_thread() + w.broken, x);
}

Test(faults, crooked_store)
{
    reports(crooked_store_kernel, "store of 16 bytes", crooked_store_line);
    CHECK(strstr(simt.fault, "misaligned") != NULL, "%s", simt.fault);
}

/* Of a matrix that is loaded every row begins at a multiple of 16 bytes. */
LINE(crooked_row, 5);
static void crooked_row_kernel(work w)
{
    uint32_t r[4];
    const uint16_t *row = (const uint16_t *)nf_shared() + nf_thread() % 32 * 8 + (nf_thread() == 9) * w.broken;
    nf_ldmatrix(r, row);
}

Test(faults, crooked_row)
{
    reports(crooked_row_kernel, "load of 16 bytes", crooked_row_line);
    CHECK(strstr(simt.fault, "thread 9 ") && strstr(simt.fault, "misaligned"), "%s", simt.fault);
}

/* Shared memory starts as NaN, in every block. */
static void fresh_kernel(work w)
{
    float *s = (float *)nf_shared();
    w.out[HERE] = s[nf_thread()];
    s[nf_thread()] = 1;
}

Test(faults, fresh)
{
    CHECK(!fault_of(fresh_kernel, 0, 32, 0)[0], "%s", simt.fault);
    for (int t = 0; t < WORDS; t++)
        CHECK(isnan(output[t]), "shared memory holds something at the start of a block");
}

/* ---- races ------------------------------------------------------------------------------------------------------- */

/* Another warp's word. */
static void race_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int t = nf_thread();
    s[t] = w.in[HERE];
    if (!w.broken)
        nf_barrier();
    w.out[HERE] = s[t ^ 64];
}

Test(faults, race)
{
    reports(race_kernel, "race: ", 0);
}

/* Another lane's word: a warp barrier is enough. */
static void lanes_race_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int t = nf_thread();
    s[t] = w.in[HERE];
    if (!w.broken)
        nf_warp_barrier();
    w.out[HERE] = s[t ^ 1] + s[t ^ 2] + s[t];
    nf_warp_barrier();
    s[t ^ 1] = 0;
}

Test(faults, race_in_a_warp)
{
    reports(lanes_race_kernel, "race: ", 0);
}

/* The second store comes too early: others still read the first. */
static void overwritten_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int t = nf_thread();
    s[t] = w.in[HERE];
    nf_barrier();
    w.out[HERE] = s[0] + s[1];
    if (!w.broken)
        nf_barrier();
    if (t == THREADS - 1) /* in one order nobody reads after it */
        s[0] = 0;
}

Test(faults, overwritten)
{
    reports(overwritten_kernel, "race: ", 0);
}

/* What other lanes have read before a warp barrier, a lane reads and writes after it. */
static void reread_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int next = nf_thread() ^ 1;
    s[nf_thread()] = 1;
    nf_warp_barrier();
    w.out[HERE] = s[next];
    if (!w.broken)
        nf_warp_barrier();
    s[nf_thread()] = s[nf_thread()] + 1;
}

Test(faults, read_again)
{
    reports(reread_kernel, "race: ", 0);
}

/* Two threads of different warps have read what one of them stores. */
static void own_too_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int t = nf_thread();
    if (t == 0)
        s[0] = 1;
    nf_barrier();
    if (t == 0 || t == THREADS - 1)
        w.out[HERE] = s[0];
    if (!w.broken)
        nf_barrier();
    if (t == THREADS - 1)
        s[0] = 0;
}

Test(faults, overwritten_by_a_reader)
{
    const char *fault = fault_of(own_too_kernel, 0, 32, 0);
    CHECK(!fault[0], "a sound kernel is reported: %s", fault);
    fault = fault_of(own_too_kernel, 1, 32, 0);
    CHECK(strstr(fault, "race: store") != NULL, "not a race but '%s'", fault);
}

static void blocks_kernel(work w)
{
    w.out[HERE] = 1;
    if (w.broken && nf_block_x() == 1)
        w.out[nf_thread()] = 2;
}

Test(faults, race_between_blocks)
{
    reports(blocks_kernel, "race: store", 0);
}

static void smallest_kernel(work w)
{
    int *p = (int *)nf_shared();
    if (nf_thread() == 0)
        *p = 1000;
    nf_barrier();
    nf_smallest(p, 500 + nf_thread());
    if (!w.broken)
        nf_barrier();
    w.out[HERE] = (float)*p;
}

Test(faults, atomics)
{
    reports(smallest_kernel, "race: ", 0);
    fault_of(smallest_kernel, 0, 32, 1);
    CHECK(output[7] == 500, "%g", (double)output[7]);
}

/* ---- async copies ------------------------------------------------------------------------------------------------ */

LINE(forgotten, 5);
static void forgotten_kernel(work w)
{
    float *s = (float *)nf_shared();
    if (nf_thread() < 32) {
        nf_copy_async(s + 4 * nf_thread(), w.in + 4 * nf_thread(), 1);
        nf_copy_commit();
        nf_copy_wait(w.broken);
    }
}

Test(faults, forgotten)
{
    reports(forgotten_kernel, "an async copy that nobody waits for", forgotten_line);
}

/* From an odd place, and from behind the buffer. */
LINE(crooked_copy, 4);
static void crooked_copy_kernel(work w)
{
    if (HERE == 0) {
        nf_copy_async(nf_shared(), w.in + w.broken, 1);
        nf_copy_commit();
        nf_copy_wait(0);
    }
}

LINE(far_copy, 4);
static void far_copy_kernel(work w)
{
    if (HERE == 0) {
        nf_copy_async(nf_shared(), w.in + w.broken * (WORDS + 100000), 1);
        nf_copy_commit();
        nf_copy_wait(0);
    }
}

Test(faults, copies_from_elsewhere)
{
    reports(crooked_copy_kernel, "misaligned", crooked_copy_line);
    reports(far_copy_kernel, "outside every buffer", far_copy_line);
}

/* Another thread's copy may be read behind a barrier behind its wait. */
static void handed_kernel(work w)
{
    float *s = (float *)nf_shared();
    const int t = nf_thread() % 64;
    if (nf_thread() < 64) {
        nf_copy_async(s + 4 * t, w.in + 4 * t, 1);
        nf_copy_commit();
        if (!w.broken)
            nf_copy_wait(0);
    }
    nf_barrier();
    if (w.broken)
        nf_copy_wait(0);
    w.out[HERE] = s[4 * (t ^ 32)];
}

Test(faults, waited_too_late)
{
    reports(handed_kernel, "race: ", 0);
}

static void arrival_kernel(work w)
{
    float *s = (float *)nf_shared();
    if (HERE == 0) {
        nf_copy_async(s, w.in + 4, 1);
        nf_copy_commit();
        nf_copy_async(s + 4, w.in + 8, 0);
        nf_copy_commit();
        w.out[0] = s[0];
        nf_copy_wait(1);
        w.out[1] = s[0], w.out[2] = s[4];
        nf_copy_wait(0);
        w.out[3] = s[4], w.out[4] = s[7];
    }
}

Test(faults, arrival)
{
    CHECK(!fault_of(arrival_kernel, 0, 32, 0)[0], "%s", simt.fault);
    CHECK(isnan(output[0]), "a copy has landed before its wait");
    CHECK(output[1] == 4 && isnan(output[2]), "the older group alone has landed");
    CHECK(output[3] == 0 && output[4] == 0, "a copy of what is not there is zero");
}
