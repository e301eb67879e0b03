/* The executor of simt.h: fibers by ucontext and _setjmp, a shadow of every word that kernels may touch. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE /* its longjmp takes a jump between stacks for an error */
#include "simt.h"

#include <elf.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef WARP
#define WARP 32
#endif
#ifndef BACKWARDS
#define BACKWARDS 0
#endif
#ifndef SHARED
#define SHARED (64 * 1024)
#endif
simt_setting simt = {.warp = WARP, .backwards = BACKWARDS, .shared_limit = SHARED};

enum { MOST_THREADS = 1024, MOST_WARPS = 32, STACK = 64 * 1024, MOST_REGIONS = 256, MOST_COPIES = 256, GRANULE = 2 };
enum { SHARED_SPACE = 256 * 1024 };
enum {
    LANES = 0x8000,
    SEVERAL = 0xfffe,
    ATOMIC = 0xffff
}; /* instead of a thread: LANES + a warp, several, an atomic */

typedef enum state { READY, AT_BARRIER, AT_WARP, DONE } state;

typedef struct copy {
    unsigned char *to;
    unsigned char bytes[16];
    int group, line;
} copy;

typedef struct fiber {
    jmp_buf at;
    ucontext_t entry;
    char *stack;
    int started, line, copies, group; /* line: of the barrier or warp operation it waits at */
    state state;
    copy copy[MOST_COPIES];
} fiber;

typedef struct warp_state {
    int arrived, line, syncs, turn; /* syncs: warp barriers so far */
    unsigned char slots[2][64 * SIMT_SLOT];
} warp_state;

/* The last write and the last read of a granule: when (the running number of the barrier) and by whom. */
typedef struct shadow {
    uint32_t written, read;
    uint16_t writer, reader, write_sync, read_sync;
} shadow;

typedef struct region {
    const unsigned char *at;
    size_t bytes;
    shadow *granules;
} region;

static struct {
    jmp_buf scheduler, launch;
    fiber *fibers;
    warp_state warps[MOST_WARPS];
    region regions[MOST_REGIONS];
    int count, threads, running;
    uint32_t now, block_start, launch_start; /* numbers of barriers: `now` rises at each, and at each block */
    unsigned char *shared;
    size_t shared_bytes;
    shadow *shared_shadow;
    void (*enter)(const void *context);
    const void *context;
} run;

extern const char __executable_start[], edata[]; /* of the program: named so by the linker */

/* ---- faults ------------------------------------------------------------------------------------------------------ */

/* The source line of an address of the program, by addr2line; otherwise the address. */
static void name_line(char *out, size_t size, const void *pc)
{
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)(const void *)__executable_start;
    const uintptr_t base = header->e_type == ET_DYN ? (uintptr_t)header : 0;
    char command[160];
    FILE *answer;
    snprintf(out, size, "address %p", pc);
    snprintf(command, sizeof command, "addr2line -s -e /proc/%d/exe %#lx 2>/dev/null", (int)getpid(),
             (unsigned long)((uintptr_t)pc - base - 1));
    answer = popen(command, "r");
    if (answer) {
        char line[100];
        if (fgets(line, sizeof line, answer) && line[0] != '?') {
            line[strcspn(line, "\n ")] = 0;
            snprintf(out, size, "%s", line);
        }
        pclose(answer);
    }
}

/* End the launch. `where` is a line of the source, or 0 and pc is an address of the code. */
__attribute__((format(printf, 3, 4), noreturn)) static void fault(int line, const void *pc, const char *format, ...)
{
    char what[250], where[110];
    va_list rest;
    va_start(rest, format);
    vsnprintf(what, sizeof what, format, rest);
    va_end(rest);
    if (line)
        snprintf(where, sizeof where, "line %d", line);
    else
        name_line(where, sizeof where, pc);
    if (!simt.fault[0])
        snprintf(simt.fault, sizeof simt.fault, "thread %d of block (%d, %d), %s: %s", simt.thread, (int)simt.block[0],
                 (int)simt.block[1], where, what);
    if (!simt.quiet) {
        fprintf(stderr, "executor: %s\n", simt.fault);
        abort();
    }
    run.running = 0;
    _longjmp(run.launch, 1);
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

void simt_memory(const void *at, size_t bytes)
{
    if (run.count == MOST_REGIONS)
        abort();
    run.regions[run.count].at = (const unsigned char *)at;
    run.regions[run.count].bytes = bytes;
    run.regions[run.count++].granules = (shadow *)calloc(bytes / GRANULE + 2, sizeof(shadow));
}

void simt_forget(const void *at)
{
    for (int i = 0; i < run.count; i++)
        if (run.regions[i].at == (const unsigned char *)at) {
            free(run.regions[i].granules);
            run.regions[i] = run.regions[--run.count];
            return;
        }
}

/* The shadow of the granule at p, or NULL where memory is the thread's own; otherwise a fault. */
static shadow *shadow_of(const unsigned char *p, size_t bytes, const char *what, int line, const void *pc)
{
    const fiber *f = run.fibers + simt.thread;
    if (p >= run.shared && p + bytes <= run.shared + run.shared_bytes)
        return run.shared_shadow + (p - run.shared) / GRANULE;
    if ((const char *)p >= f->stack && (const char *)p + bytes <= f->stack + STACK)
        return NULL;
    for (int i = 0; i < run.count; i++) {
        const region *r = run.regions + i;
        if (p >= r->at && p + bytes <= r->at + r->bytes) {
            if (i) { /* the next look-up is likely the same */
                const region first = run.regions[0];
                run.regions[0] = *r;
                run.regions[i] = first;
            }
            return run.regions[0].granules + (p - run.regions[0].at) / GRANULE;
        }
    }
    if (what[0] == 'l' && (const char *)p >= __executable_start && (const char *)p + bytes <= edata)
        return NULL; /* a constant of the program */
    if (p + bytes > run.shared && p < run.shared + SHARED_SPACE)
        fault(line, pc, "%s of %d bytes at shared + %d, outside the block's %d bytes", what, (int)bytes,
              (int)(p - run.shared), (int)run.shared_bytes);
    fault(line, pc, "%s of %d bytes at %p, outside every buffer", what, (int)bytes, (const void *)p);
}

/* Is an earlier access, `when` and by `who`, not ordered before one that `me` makes now? */
static int unordered(uint32_t when, int who, int sync, int me, int shared)
{
    const int warp = who < LANES ? who / simt.warp : who < SEVERAL ? who - LANES : -1;
    if (when < run.launch_start)
        return 0;
    if (when < run.block_start)
        return !shared; /* blocks have no order */
    if (when < run.now || who == me)
        return 0;
    return warp != me / simt.warp || me == ATOMIC || sync == run.warps[warp].syncs;
}

/* Note a load: who has read since the last barrier. */
static void note_load(shadow *s, int me, int sync, int shared)
{
    const int warp = me / simt.warp, before = s->reader;
    if (s->read >= run.launch_start && s->read < run.block_start && !shared)
        return; /* another block's: stays */
    if (s->read != run.now || before == me)
        s->reader = (uint16_t)me;
    else if (before < LANES ? before / simt.warp == warp : before == LANES + warp)
        s->reader = (uint16_t)(s->read_sync == sync ? LANES + warp : me); /* a warp barrier orders the earlier ones */
    else
        s->reader = SEVERAL;
    s->read = run.now;
    s->read_sync = (uint16_t)sync;
}

static void touch(const unsigned char *p, size_t bytes, int write, int atomic, int line, const void *pc)
{
    const int me = atomic ? ATOMIC : simt.thread, sync = (uint16_t)run.warps[simt.thread / simt.warp].syncs;
    const int shared = p >= run.shared && p < run.shared + SHARED_SPACE;
    const char *what = write ? "store" : "load";
    shadow *s;
    if ((uintptr_t)p % bytes)
        fault(line, pc, "%s of %d bytes at %p, misaligned", what, (int)bytes, (const void *)p);
    s = shadow_of(p, bytes, what, line, pc);
    if (s)
        *(shared  ? write ? &simt.counts.shared_stored : &simt.counts.shared_loaded
          : write ? &simt.counts.stored
                  : &simt.counts.loaded) += (int64_t)bytes;
    for (size_t i = 0; s && i < bytes; i += GRANULE, s++) {
        if (unordered(s->written, s->writer, s->write_sync, me, shared))
            fault(line, pc, "race: %s of what thread %d has stored, with no barrier between", what, (int)s->writer);
        if (write && unordered(s->read, s->reader, s->read_sync, me, shared))
            fault(line, pc, "race: store to what thread %d has loaded, with no barrier between", (int)s->reader);
        if (write)
            s->written = run.now, s->writer = (uint16_t)me, s->write_sync = (uint16_t)sync;
        else
            note_load(s, me, sync, shared);
    }
}

void simt_access(const void *at, size_t bytes, int write, int line)
{
    touch((const unsigned char *)at, bytes, write, 0, line, NULL);
}

void simt_smallest(int *p, int x, int line)
{
    touch((const unsigned char *)p, sizeof *p, 1, 1, line, NULL);
    *p = x < *p ? x : *p;
}

/* ---- fibers ------------------------------------------------------------------------------------------------------ */

static void stop(state why, int line)
{
    fiber *f = run.fibers + simt.thread;
    f->state = why;
    f->line = line;
    if (!_setjmp(f->at))
        _longjmp(run.scheduler, 1);
}

static void fiber_main(void)
{
    for (;;) {
        fiber *f = run.fibers + simt.thread;
        run.enter(run.context);
        f = run.fibers + simt.thread;
        if (f->copies)
            fault(f->copy[0].line, NULL, "an async copy that nobody waits for");
        stop(DONE, 0);
    }
}

static void go_on(int thread)
{
    fiber *f = run.fibers + thread;
    simt.thread = thread;
    if (_setjmp(run.scheduler))
        return;
    if (f->started)
        _longjmp(f->at, 1);
    f->started = 1;
    setcontext(&f->entry);
}

static void prepare(int thread)
{
    fiber *f = run.fibers + thread;
    if (!f->stack)
        f->stack =
            (char *)mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED)
        abort();
    if (!f->started) {
        getcontext(&f->entry);
        f->entry.uc_stack.ss_sp = f->stack;
        f->entry.uc_stack.ss_size = STACK;
        f->entry.uc_link = NULL;
        makecontext(&f->entry, fiber_main, 0);
    }
    f->state = READY;
    f->copies = f->group = 0;
}

/* Nothing is ready: open the barrier that all have reached, or say what is wrong. 0: all are done. */
static int open_barrier(void)
{
    int done = 0, first = -1;
    for (int t = 0; t < run.threads; t++) {
        const fiber *f = run.fibers + t;
        done += f->state == DONE;
        if (f->state == AT_WARP) {
            simt.thread = t;
            fault(f->line, NULL, "a warp operation that not all lanes reach");
        }
        if (f->state == AT_BARRIER && first < 0)
            first = t;
    }
    if (done == run.threads)
        return 0;
    for (int t = 0; t < run.threads; t++) {
        const fiber *f = run.fibers + t;
        simt.thread = first;
        if (f->state == DONE)
            fault(run.fibers[first].line, NULL, "divergent barrier: thread %d has ended without it", t);
        if (f->line != run.fibers[first].line)
            fault(run.fibers[first].line, NULL, "divergent barrier: thread %d waits at line %d", t, f->line);
    }
    for (int t = 0; t < run.threads; t++)
        run.fibers[t].state = READY;
    run.now++;
    return 1;
}

static void run_block(void)
{
    run.block_start = ++run.now;
    memset(run.shared, 0xff, run.shared_bytes); /* NaN */
    memset(run.shared_shadow, 0, (run.shared_bytes / GRANULE + 1) * sizeof(shadow));
    memset(run.warps, 0, (size_t)(run.threads / simt.warp + 1) * sizeof *run.warps);
    for (int t = 0; t < run.threads; t++)
        prepare(t);
    do {
        int ready;
        do {
            ready = 0;
            for (int i = 0; i < run.threads; i++) {
                const int t = simt.backwards ? run.threads - 1 - i : i;
                if (run.fibers[t].state == READY) {
                    ready = 1;
                    go_on(t);
                }
            }
        } while (ready);
    } while (open_barrier());
}

int simt_launch(void (*enter)(const void *context), const void *context, const int64_t *blocks, int threads,
                size_t shared)
{
    const int64_t count = blocks[0] * blocks[1];
    if (!run.fibers) {
        run.fibers = (fiber *)calloc(MOST_THREADS, sizeof(fiber));
        if (posix_memalign((void **)&run.shared, 1024, SHARED_SPACE))
            abort();
        run.shared_shadow = (shadow *)calloc(SHARED_SPACE / GRANULE + 1, sizeof(shadow));
    }
    if (threads < 1 || threads > MOST_THREADS || threads % simt.warp % 32 || shared > simt.shared_limit)
        abort();
    run.enter = enter;
    run.context = context;
    run.threads = threads;
    run.shared_bytes = shared;
    run.launch_start = ++run.now;
    simt.launches++;
    if (_setjmp(run.launch)) {
        for (int t = 0; t < MOST_THREADS; t++)
            run.fibers[t].started = 0;
        return -1;
    }
    run.running = 1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t b = simt.backwards ? count - 1 - i : i;
        simt.block[0] = b % blocks[0];
        simt.block[1] = b / blocks[0];
        run_block();
    }
    run.running = 0;
    return 0;
}

/* ---- what kernels call ------------------------------------------------------------------------------------------- */

void *simt_shared(void)
{
    return run.shared;
}

void simt_barrier(int line)
{
    stop(AT_BARRIER, line);
}

/* The lanes that a warp has: the last one may be short. */
static int lanes(int w)
{
    const int rest = run.threads - w * simt.warp;
    return rest < simt.warp ? rest : simt.warp;
}

const unsigned char *simt_exchange(const void *mine, size_t bytes, int line)
{
    const int t = simt.thread, w = t / simt.warp;
    warp_state *here = run.warps + w;
    unsigned char *slots = here->slots[here->turn];
    if (bytes > SIMT_SLOT)
        abort();
    if (!here->arrived++)
        here->line = line;
    if (here->line != line)
        fault(line, NULL, "divergent warp: another lane is at line %d", here->line);
    memcpy(slots + t % simt.warp * SIMT_SLOT, mine, bytes);
    if (here->arrived < lanes(w)) {
        stop(AT_WARP, line);
    } else {
        for (int i = 0; i < lanes(w); i++)
            run.fibers[w * simt.warp + i].state = READY;
        here->arrived = 0;
        here->turn ^= 1;
    }
    return slots;
}

void simt_warp_barrier(int line)
{
    const int w = simt.thread / simt.warp, before = run.warps[w].syncs;
    const char nothing = 0;
    simt_exchange(&nothing, 1, line);
    if (run.warps[w].syncs == before)
        run.warps[w].syncs++;
}

void simt_copy(void *to, const void *from, int there, int line)
{
    fiber *f = run.fibers + simt.thread;
    copy *c = f->copy + f->copies++;
    if (f->copies == MOST_COPIES)
        fault(line, NULL, "too many async copies at once");
    if ((uintptr_t)from % 16)
        fault(line, NULL, "load of 16 bytes at %p, misaligned", from);
    for (int i = 0; there && i < 16; i += GRANULE)
        simt_access((const unsigned char *)from + i, GRANULE, 0, line);
    simt_access(to, 16, 1, line);
    memset(c->bytes, 0, sizeof c->bytes);
    if (there)
        memcpy(c->bytes, from, sizeof c->bytes);
    memset(to, 0xff, 16); /* until it lands */
    c->to = (unsigned char *)to;
    c->group = f->group;
    c->line = line;
}

void simt_copy_commit(void)
{
    run.fibers[simt.thread].group++;
}

void simt_copy_wait(int open)
{
    fiber *f = run.fibers + simt.thread;
    int left = 0;
    for (int i = 0; i < f->copies; i++)
        if (f->copy[i].group < f->group - open) {
            simt_access(f->copy[i].to, 16, 1, f->copy[i].line);
            simt.counts.shared_stored -= 16; /* counted when it was asked for */
            memcpy(f->copy[i].to, f->copy[i].bytes, 16);
        } else {
            f->copy[left++] = f->copy[i];
        }
    f->copies = left;
}

/* ---- what the compiler calls at every load and store of code compiled with -fsanitize=thread --------------------- */

#define HOOK(name, bytes, write) \
    void __tsan_##name(void *p); \
    void __tsan_##name(void *p) \
    { \
        if (run.running) \
            touch((const unsigned char *)p, bytes, write, 0, 0, __builtin_return_address(0)); \
    }
HOOK(read1, 1, 0)
HOOK(read2, 2, 0)
HOOK(read4, 4, 0)
HOOK(read8, 8, 0)
HOOK(read16, 16, 0)
HOOK(write1, 1, 1)
HOOK(write2, 2, 1)
HOOK(write4, 4, 1)
HOOK(write8, 8, 1)
HOOK(write16, 16, 1)

/* Structs, and what may lie anywhere: word by word. */
static void touch_range(const unsigned char *p, long bytes, int write, const void *pc)
{
    for (long i = 0, n; run.running && i < bytes; i += n) {
        n = bytes - i < 4 || (uintptr_t)p % 4 ? 1 : 4;
        touch(p + i, (size_t)n, write, 0, 0, pc);
    }
}

#define HOOK_RANGE(name, write) \
    void __tsan_##name(void *p, long bytes); \
    void __tsan_##name(void *p, long bytes) \
    { \
        touch_range((const unsigned char *)p, bytes, write, __builtin_return_address(0)); \
    }
HOOK_RANGE(read_range, 0)
HOOK_RANGE(write_range, 1)

#define HOOK_ANYWHERE(name, bytes, write) \
    void __tsan_unaligned_##name(void *p); \
    void __tsan_unaligned_##name(void *p) \
    { \
        touch_range((const unsigned char *)p, bytes, write, __builtin_return_address(0)); \
    }
HOOK_ANYWHERE(read2, 2, 0)
HOOK_ANYWHERE(read4, 4, 0)
HOOK_ANYWHERE(read8, 8, 0)
HOOK_ANYWHERE(read16, 16, 0)
HOOK_ANYWHERE(write2, 2, 1)
HOOK_ANYWHERE(write4, 4, 1)
HOOK_ANYWHERE(write8, 8, 1)
HOOK_ANYWHERE(write16, 16, 1)

void __tsan_init(void);
void __tsan_init(void)
{
}

void __tsan_func_entry(void *pc);
void __tsan_func_entry(void *pc)
{
    (void)pc;
}

void __tsan_func_exit(void);
void __tsan_func_exit(void)
{
}
