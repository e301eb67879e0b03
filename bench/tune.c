/* The tuner: which variant of a kernel is fastest on this machine?
 *
 * Every candidate runs in a child process of its own. It is verified against the fp64 oracle on hostile inputs, between
 * canaries and unreadable pages; only then it is timed: interleaved with the others, over rotating buffers larger than
 * the cache. The best three and the shipped default meet again in fresh processes, one after the other, and the default
 * gives way only to a clear margin. The result is a table and, with --json, one line appended to a file of records.
 *
 *     cc -O2 *.c -o tune -lm && ./tune --json records.jsonl
 *     nvcc -O2 -arch=native *.c *.cu -o tune -lm && ./tune --json records.jsonl
 */
#define _DEFAULT_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define _POSIX_C_SOURCE 200809L

#define PROGRAM "tune"
#include "kernel.h"
#include "device.h"
#include "measure.h"
#include "verify.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <sys/wait.h>

enum {
    MAX_CANDIDATES = 64,
    MAX_SAMPLES = 64,
    MAX_LENGTHS = 8,
    MAX_SETS = 40,     /* of buffers */
    MIN_SAMPLES = 15,  /* of a candidate that stays in the race */
    TRIAL_SAMPLES = 5, /* before a slow one is dropped */
    FINALISTS = 3,     /* beside the default */
    MIN_VISITS = 5,    /* of each finalist, in turn, each in a fresh process */
    MAX_VISITS = 15,
    VISIT_SAMPLES = 5 /* whose median is what the visit counts */
};
static const double SAMPLE_SECONDS = 0.010; /* at least, per sample */
static const double WARM_SECONDS = 0.030;
static const double SLOW = 1.25;    /* dropped after TRIAL_SAMPLES */
static const double HOPELESS = 3.0; /* dropped at once */
static const double MARGIN = 0.02;  /* by which the default must be beaten */

typedef struct options {
    double budget, timeout;
    int64_t tokens[MAX_LENGTHS], batch, heads;
    int lengths, warm, events;
    uint64_t seed;
    const char *json, *contract;
} options;

#ifdef NF_ON_GPU /* many heads fill a GPU; its runtime takes seconds to start */
enum { HEADS = 32, PATIENCE = 60 };
#else
enum { HEADS = 4, PATIENCE = 10 };
#endif
static options opt = {60, PATIENCE, {1024, 4096}, 1, HEADS, 2, 0, 0, 1, NULL, NULL};

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
}

/* ---- in the child: a candidate is timed ------------------------------------------------------------------------ */

/* The shape that is timed, and buffer sets that together exceed the cache. */
typedef struct load {
    int64_t tokens;
    int sets;
    nf_args *args;
    arrays *data;
} load;

static load load_new(const kernel *k, int64_t tokens, const void *projection, long l2)
{
    const int64_t rows = opt.batch * tokens * opt.heads;
    const double bytes = 2.0 * (double)(rows * (k->d + k->v)) * (double)kernel_element(k),
                 cache = 2.0 * (double)(l2 > 0 ? l2 : 2097152);
    const double sets = opt.warm || bytes > 8 * cache ? 1 : fmin(MAX_SETS, 2 + cache / bytes);
    load l = {tokens, (int)sets, NULL, NULL};
    l.args = (nf_args *)calloc((size_t)l.sets, sizeof *l.args);
    l.data = (arrays *)calloc((size_t)l.sets, sizeof *l.data);
    if (!l.args || !l.data)
        fail("out of memory");
    for (int i = 0; i < l.sets; i++) {
        l.data[i] = arrays_new(k, ORACLE_GAUSS, rows, rows, 3, opt.seed + 77u + (uint64_t)i);
        l.args[i] = kernel_args(k, opt.batch, tokens, opt.heads, l.data[i].of_q, l.data[i].of_k, l.data[i].of_v,
                                l.data[i].of_out, projection);
    }
    return l;
}

static void load_free(load *l)
{
    for (int i = 0; i < l->sets; i++)
        arrays_free(&l->data[i]);
    free(l->data);
    free(l->args);
}

typedef struct runner {
    const kernel *kernel;
    const load *load;
    const nf_variant *variant;
    nf_args *args; /* of the load's sets, with the device's addresses */
    void *workspace;
    size_t bytes;
    int next, launches;
    nf_status status;
} runner;

/* Heads of a launch: one of all on a CPU (with the strides of all), so that even a long sequence takes little time. */
static int64_t launch_heads(void)
{
#ifdef NF_ON_GPU
    return opt.batch * opt.heads;
#else
    return 1;
#endif
}

static void launch(void *on)
{
    runner *r = (runner *)on;
    const int64_t heads = launch_heads();
    const int parts = (int)(opt.batch * opt.heads / heads);
    for (int i = 0; i < r->launches; i++) {
        nf_args a = r->args[r->next / parts];
        nf_status status;
        a.split_begin = r->next % parts * heads;
        a.split_count = heads;
        status = r->variant->forward(&a, r->workspace, r->bytes);
        r->next = (r->next + 1) % (parts * r->load->sets);
        if (status != NF_OK)
            r->status = status;
    }
}

/* Seconds per launch, over `launches` of them. */
static double run_launches(runner *r, int launches)
{
    r->launches = launches;
    return device_time(launch, r) / launches;
}

/* Bring the load to the device; the pages of the output are touched. */
static void runner_prepare(runner *r)
{
    const kernel *k = r->kernel;
    const size_t rows = (size_t)(opt.batch * opt.heads * r->load->tokens), element = kernel_element(k);
    const size_t q = rows * (size_t)k->d * element, v = rows * (size_t)k->v * element;
    void *workspace = kernel_memory(r->bytes);
    r->args = (nf_args *)malloc((size_t)r->load->sets * sizeof *r->args);
    if (!r->args)
        fail("out of memory");
    device_mirror(workspace, r->bytes);
    r->workspace = device_scratch(workspace, r->bytes);
    if (k->m)
        device_mirror(r->load->args->projection, k->projection_bytes());
    for (int i = 0; i < r->load->sets; i++) {
        const nf_args *a = &r->load->args[i];
        memset(a->out.data, 0, v);
        device_mirror(a->q.data, q);
        device_mirror(a->k.data, q);
        device_mirror(a->v.data, v);
        device_mirror(a->out.data, v);
        r->args[i] = device_args(a);
    }
}

/* Run until the clocks have settled; the fastest launch estimates how many make a sample. */
static double run_warm(runner *r)
{
    const double start = measure_now();
    double best = 1e300;
    if (!r->args)
        runner_prepare(r);
    for (int i = 0; i < 2 || measure_now() - start < WARM_SECONDS; i++)
        best = fmin(best, run_launches(r, 1));
    return best;
}

/* ---- parent and child ------------------------------------------------------------------------------------------ */

typedef enum order { VERIFY, WARM, SAMPLE } order;

typedef struct request {
    order order;
    int launches;
} request;

typedef enum standing { OK, CONSTRAINT, LAUNCH, TIMEOUT, WRONG, SLOW_ONE } standing;
static const char *const standing_name[] = {"ok", "constraint", "launch", "timeout", "wrong", "slow"};

typedef struct reply {
    standing standing; /* OK: verified, or the launches returned NF_OK */
    double value;      /* seconds per launch, or the largest error */
    char why[96];
} reply;

typedef struct candidate {
    const nf_variant *variant;
    const char *suffix, *code;
    int is_default, finalist;
    standing standing;
    char why[96];
    double err;
    pid_t pid; /* 0: no process */
    int to, from, launches;
    double sample[MAX_SAMPLES]; /* seconds per launch; after the finals the medians of the visits */
    double visit[MAX_VISITS];
    int samples, visits;
} candidate;

typedef struct race {
    const kernel *kernel;
    const exam *exam;
    load load;
    candidate all[MAX_CANDIDATES];
    int count, reference; /* index of the default */
    int winner, tie;
    double margin, peak[2], race_end, end;
} race;

static void child_verify(const race *r, const candidate *c, reply *answer)
{
    pupil p;
    if (!c->variant->supported()) {
        answer->standing = CONSTRAINT;
        snprintf(answer->why, sizeof answer->why, "this device lacks the target");
        return;
    }
    pupil_new(&p, r->exam, c->variant);
    sit(&p);
    answer->standing = p.why[0] ? WRONG : OK;
    answer->value = p.err;
    memcpy(answer->why, p.why, sizeof answer->why);
}

static void child_sample(runner *r, const request *wanted, reply *answer)
{
    answer->value = wanted->order == WARM ? run_warm(r) : run_launches(r, wanted->launches);
    answer->standing = r->status == NF_OK ? OK : LAUNCH;
    if (r->status != NF_OK)
        snprintf(answer->why, sizeof answer->why, "%s", nf_status_text(r->status));
}

/* The child's life: obey until the parent hangs up. The alarm ends it should the parent be gone while it hangs. */
__attribute__((noreturn)) static void child_main(const race *r, const candidate *c, int from, int to)
{
    runner run = {r->kernel, &r->load, c->variant, NULL, NULL, r->kernel->workspace(NULL), 0, 0, NF_OK};
    request wanted;
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_DFL);
    while (read(from, &wanted, sizeof wanted) == (ssize_t)sizeof wanted) {
        reply answer;
        memset(&answer, 0, sizeof answer);
        alarm((unsigned)opt.timeout + 5);
        if (wanted.order == VERIFY)
            child_verify(r, c, &answer);
        else
            child_sample(&run, &wanted, &answer);
        alarm(0);
        if (write(to, &answer, sizeof answer) != (ssize_t)sizeof answer)
            break;
    }
    _exit(0);
}

static void child_start(race *r, candidate *c)
{
    int down[2], up[2];
    pid_t pid;
    if (pipe(down) != 0 || pipe(up) != 0 || (pid = fork()) < 0)
        fail("cannot start a process: %s", strerror(errno));
    if (pid == 0) {
        close(down[1]);
        close(up[0]);
        child_main(r, c, down[0], up[1]);
    }
    close(down[0]);
    close(up[1]);
    c->pid = pid;
    c->to = down[1];
    c->from = up[0];
}

static void child_stop(candidate *c)
{
    if (!c->pid)
        return;
    kill(c->pid, SIGKILL);
    while (waitpid(c->pid, NULL, 0) < 0 && errno == EINTR)
        continue;
    close(c->to);
    close(c->from);
    c->pid = 0;
}

static void stop_all(race *r)
{
    for (int i = 0; i < r->count; i++)
        child_stop(&r->all[i]);
}

static void leave_if_interrupted(race *r)
{
    if (!interrupted)
        return;
    stop_all(r);
    fputs("tune: interrupted, nothing recorded\n", stderr);
    exit(130);
}

static void drop(candidate *c, standing s, const char *why)
{
    c->standing = s;
    snprintf(c->why, sizeof c->why, "%s", why);
    child_stop(c);
}

/* The child's end of the pipe is closed: it died. */
static void drop_dead(candidate *c)
{
    int status = 0;
    char why[96];
    while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR)
        continue;
    close(c->to);
    close(c->from);
    c->pid = 0;
    if (WIFSIGNALED(status))
        snprintf(why, sizeof why, "killed by signal %d%s", WTERMSIG(status),
                 WTERMSIG(status) == SIGSEGV ? " (memory access)" : "");
    else
        snprintf(why, sizeof why, "ended with status %d", WEXITSTATUS(status));
    drop(c, LAUNCH, why);
}

/* Wait for a reply until the timeout; 1: it is there. */
static int wait_reply(race *r, candidate *c)
{
    const double end = measure_now() + opt.timeout;
    for (;;) {
        struct pollfd p = {c->from, POLLIN, 0};
        const double left = end - measure_now();
        const int ready = poll(&p, 1, left > 0 ? (int)(left * 1000) + 1 : 0);
        leave_if_interrupted(r);
        if (ready > 0)
            return 1;
        if (ready == 0 && measure_now() >= end)
            return 0;
    }
}

/* Ask a candidate; 0 where it failed and was dropped. */
static int ask(race *r, candidate *c, order what, reply *answer)
{
    const request wanted = {what, c->launches};
    ssize_t got;
    if (write(c->to, &wanted, sizeof wanted) != (ssize_t)sizeof wanted) {
        drop_dead(c);
        return 0;
    }
    if (!wait_reply(r, c)) {
        char why[96];
        snprintf(why, sizeof why, "no answer within %g s", opt.timeout);
        drop(c, TIMEOUT, why);
        return 0;
    }
    while ((got = read(c->from, answer, sizeof *answer)) < 0 && errno == EINTR)
        leave_if_interrupted(r);
    if (got != (ssize_t)sizeof *answer) {
        drop_dead(c);
        return 0;
    }
    if (answer->standing != OK)
        drop(c, answer->standing, answer->why);
    return answer->standing == OK;
}

/* ---- events for a program, progress for a person --------------------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static void progress(const char *format, ...)
{
    va_list list;
    if (opt.events || !isatty(STDERR_FILENO))
        return;
    va_start(list, format);
    fputs("\r\033[K", stderr);
    vfprintf(stderr, format, list);
    va_end(list);
    fflush(stderr);
}

static void event(measure_text *t)
{
    if (opt.events) {
        puts(t->data);
        fflush(stdout);
    }
    free(t->data);
}

static void event_candidate(const char *what, const candidate *c)
{
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"event\":\"%s\",\"n\":\"%s\",\"st\":\"%s\",", what, c->suffix, standing_name[c->standing]);
    measure_number(&t, "err", c->err);
    measure_add(&t, ",\"why\":");
    measure_string(&t, c->why);
    measure_add(&t, "}");
    event(&t);
}

static void event_progress(const race *r, const char *phase, double part)
{
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"event\":\"progress\",\"contract\":\"%s\",\"tokens\":%lld,\"phase\":\"%s\",\"part\":%.3f}",
                r->kernel->contract, (long long)r->load.tokens, phase, part);
    event(&t);
    progress("%s, %lld tokens: %s %.0f %%", r->kernel->contract, (long long)r->load.tokens, phase, 100 * part);
}

/* ---- the race -------------------------------------------------------------------------------------------------- */

/* Nanoseconds per token and head. */
static double per_token(const race *r, double seconds)
{
    return 1e9 * seconds / (double)(r->load.tokens * launch_heads());
}

static double median_of(const candidate *c)
{
    double x[MAX_SAMPLES];
    memcpy(x, c->sample, sizeof x);
    return measure_median(x, c->samples);
}

static double quantile_of(const candidate *c, double p)
{
    double x[MAX_SAMPLES];
    memcpy(x, c->sample, sizeof x);
    return measure_quantile(x, c->samples, p);
}

static double noise_of(const candidate *c)
{
    double x[MAX_SAMPLES];
    memcpy(x, c->sample, sizeof x);
    return measure_noise(x, c->samples);
}

static int in_race(const candidate *c)
{
    return c->standing == OK && c->samples > 0;
}

/* Index of the fastest among the finalists, or among those that are not; -1: there is none. */
static int fastest(const race *r, int finalist)
{
    int best = -1;
    for (int i = 0; i < r->count; i++)
        if (in_race(&r->all[i]) && r->all[i].finalist == finalist &&
            (best < 0 || median_of(&r->all[i]) < median_of(&r->all[best])))
            best = i;
    return best;
}

static void enter(race *r)
{
    int32_t count;
    const nf_variant *v = r->kernel->variants(&count);
    if (count > MAX_CANDIDATES)
        fail("%s: %d variants, at most %d can be tuned", r->kernel->name, (int)count, MAX_CANDIDATES);
    r->count = count;
    for (int i = 0; i < r->count; i++) {
        candidate *c = &r->all[i];
        memset(c, 0, sizeof *c);
        c->variant = &v[i];
        c->suffix = kernel_suffix(r->kernel, &v[i]);
        c->code = kernel_code_of(r->kernel, c->suffix)->code;
        if (!c->code)
            c->code = "";
    }
}

/* What the contract's own symbol runs here, the reference, is the first shipped variant that the device supports. */
static void verify_all(race *r)
{
    r->reference = -1;
    for (int i = 0; i < r->count; i++) {
        candidate *c = &r->all[i];
        reply answer;
        event_progress(r, "verify", (double)i / r->count);
        child_start(r, c);
        if (ask(r, c, VERIFY, &answer) || c->standing == WRONG)
            c->err = answer.value;
        child_stop(c);
        c->is_default =
            r->reference < 0 && c->standing != CONSTRAINT && kernel_code_of(r->kernel, c->suffix)->is_default;
        if (c->is_default)
            r->reference = i;
        event_candidate("verified", c);
    }
}

/* Warm up, and find out how many launches make a sample. 0: the candidate was dropped. */
static int warm(race *r, candidate *c)
{
    reply answer;
    if (!ask(r, c, WARM, &answer))
        return 0;
    c->launches = 1 + (int)(SAMPLE_SECONDS / answer.value);
    c->sample[0] = answer.value;
    return 1;
}

static void sample(race *r, candidate *c)
{
    reply answer;
    if (ask(r, c, SAMPLE, &answer))
        c->sample[c->samples++] = answer.value;
}

static void warm_all(race *r)
{
    double best = 1e300;
    for (int i = 0; i < r->count; i++)
        if (r->all[i].standing == OK)
            child_start(r, &r->all[i]);
    for (int i = 0; i < r->count; i++)
        if (r->all[i].standing == OK && warm(r, &r->all[i]))
            best = fmin(best, r->all[i].sample[0]);
    for (int i = 0; i < r->count; i++)
        if (r->all[i].standing == OK && r->all[i].sample[0] > HOPELESS * best && !r->all[i].is_default) {
            r->all[i].samples = 1; /* all that is known of it */
            drop(&r->all[i], SLOW_ONE, "more than 3 times the best");
        }
}

static void drop_slow(race *r)
{
    const int best = fastest(r, 0);
    const double limit = best < 0 ? 0 : median_of(&r->all[best]);
    for (int i = 0; i < r->count; i++) {
        candidate *c = &r->all[i];
        if (!in_race(c) || i == best || c->is_default)
            continue;
        if (median_of(c) > HOPELESS * limit)
            drop(c, SLOW_ONE, "more than 3 times the best");
        else if (c->samples >= TRIAL_SAMPLES && median_of(c) > SLOW * limit)
            drop(c, SLOW_ONE, "more than 1.25 times the best");
    }
}

/* Does every candidate have its samples, and are they steady? */
static int settled(const race *r)
{
    for (int i = 0; i < r->count; i++)
        if (r->all[i].standing == OK && (r->all[i].samples < MIN_SAMPLES || noise_of(&r->all[i]) > 0.01))
            return 0;
    return 1;
}

/* Rounds in which every candidate gives one sample, the first of a round changing. */
static void run_rounds(race *r)
{
    warm_all(r);
    for (int round = 0; round < MAX_SAMPLES && !settled(r); round++) {
        for (int i = 0; i < r->count; i++) {
            candidate *c = &r->all[(i + round) % r->count];
            if (c->standing == OK)
                sample(r, c);
        }
        drop_slow(r);
        event_progress(r, "race", (double)(round + 1) / MAX_SAMPLES);
        if (round + 1 >= TRIAL_SAMPLES && measure_now() > r->race_end)
            break;
    }
    stop_all(r);
}

/* ---- finals ---------------------------------------------------------------------------------------------------- */

/* Enter the fastest FINALISTS and the default; who becomes their indices, slowest first. */
static int choose_finalists(race *r, int *who)
{
    int n = 0;
    for (int best; n < FINALISTS && (best = fastest(r, 0)) >= 0; n++) {
        r->all[best].finalist = 1;
        who[n] = best;
    }
    if (r->reference >= 0 && in_race(&r->all[r->reference]) && !r->all[r->reference].finalist) {
        r->all[r->reference].finalist = 1;
        who[n++] = r->reference;
    }
    for (int i = 0; i < n / 2; i++) {
        const int t = who[i];
        who[i] = who[n - 1 - i];
        who[n - 1 - i] = t;
    }
    return n;
}

static void visit(race *r, candidate *c)
{
    c->samples = 0;
    child_start(r, c);
    if (warm(r, c))
        for (int i = 0; i < VISIT_SAMPLES && c->standing == OK; i++)
            sample(r, c);
    child_stop(c);
    if (c->standing == OK)
        c->visit[c->visits++] = median_of(c);
}

/* Has every finalist been visited enough for its median to be known to 1 %? */
static int visited(const race *r, const int *who, int n)
{
    for (int i = 0; i < n; i++) {
        double x[MAX_VISITS];
        const candidate *c = &r->all[who[i]];
        memcpy(x, c->visit, sizeof x);
        if (c->standing == OK && (c->visits < MIN_VISITS || measure_noise(x, c->visits) > 0.01))
            return 0;
    }
    return 1;
}

/* Fresh processes, one at a time: slowest to fastest, back, and again. What differs from process to process (where its
 * memory lies, who else is busy) is part of the noise, so a visit counts as one value. */
static void run_finals(race *r)
{
    int who[FINALISTS + 1];
    const int n = choose_finalists(r, who);
    for (int pass = 0; pass < MAX_VISITS && !visited(r, who, n); pass++) {
        for (int i = 0; i < n; i++) {
            candidate *c = &r->all[who[pass % 2 ? n - 1 - i : i]];
            if (c->standing == OK)
                visit(r, c);
            event_progress(r, "finals", (double)(pass * n + i + 1) / (MAX_VISITS * n));
        }
        if (pass + 1 >= MIN_VISITS && measure_now() > r->end)
            break;
    }
    for (int i = 0; i < n; i++) {
        candidate *c = &r->all[who[i]];
        memcpy(c->sample, c->visit, sizeof c->visit);
        c->samples = c->visits;
    }
}

/* Is a faster than b by more than the margin and the noise of both? */
static int clearly_faster(const candidate *a, const candidate *b)
{
    const double noise = noise_of(a) + noise_of(b);
    return median_of(b) > (1 + fmax(MARGIN, noise)) * median_of(a);
}

/* The winner: the default unless one is clearly faster; else the first of the table among those that the best does not
 * clearly beat. A tie is whenever somebody else was that close. */
static void decide(race *r)
{
    const candidate *ref = r->reference < 0 ? NULL : &r->all[r->reference];
    const int best = fastest(r, 1), have_ref = ref && in_race(ref);
    r->winner = -1;
    if (best < 0)
        return;
    if (have_ref && !clearly_faster(&r->all[best], ref))
        r->winner = r->reference;
    for (int i = 0; i < r->count; i++) {
        const candidate *c = &r->all[i];
        if (!in_race(c) || !c->finalist || clearly_faster(&r->all[best], c))
            continue;
        if (r->winner < 0 && (!have_ref || clearly_faster(c, ref)))
            r->winner = i;
        else if (i != r->winner)
            r->tie = 1;
    }
    r->margin = have_ref ? median_of(ref) / median_of(&r->all[r->winner]) - 1 : 0;
}

/* ---- results --------------------------------------------------------------------------------------------------- */

/* How many samples a candidate's figures stand on. */
static int values_of(const candidate *c)
{
    return c->visits ? c->visits * VISIT_SAMPLES : c->samples;
}

static void record_candidate(measure_text *t, const race *r, const candidate *c)
{
    measure_add(t, "{\"n\":\"%s\",\"code\":\"%s\",\"st\":\"%s\"", c->suffix, c->code, standing_name[c->standing]);
    if (c->samples > 0) {
        measure_add(t, ",");
        measure_number(t, "med", per_token(r, median_of(c)));
        measure_add(t, ",");
        measure_number(t, "p20", per_token(r, quantile_of(c, 0.2)));
        measure_add(t, ",");
        measure_number(t, "p80", per_token(r, quantile_of(c, 0.8)));
        measure_add(t, ",");
        measure_number(t, "min", per_token(r, quantile_of(c, 0)));
        measure_add(t, ",\"k\":%d", values_of(c));
    }
    if (c->standing != CONSTRAINT) {
        measure_add(t, ",");
        measure_number(t, "err", c->err);
    }
    if (c->why[0]) {
        measure_add(t, ",\"why\":");
        measure_string(t, c->why);
    }
    measure_add(t, "}");
}

/* The record: one line. Times are nanoseconds per token and head. */
static measure_text record(const race *r, const measure_device *device)
{
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"v\":1,\"contract\":\"%s\",\"backend\":\"%s\",", r->kernel->contract, NF_BACKEND);
    measure_add(&t, "\"shape\":{\"tokens\":%lld,\"batch\":%lld,\"heads\":%lld},\"cache\":\"%s\",\"device\":",
                (long long)r->load.tokens, (long long)opt.batch, (long long)opt.heads, opt.warm ? "warm" : "cold");
    measure_device_json(&t, device);
    measure_add(&t, ",\"toolchain\":");
    measure_string(&t, device->compiler);
    measure_add(&t, ",\"tool\":\"%s\",\"ref\":", NF_TOOL);
    measure_string(&t, r->reference < 0 ? "" : r->all[r->reference].suffix);
    measure_add(&t, ",\"winner\":");
    measure_string(&t, r->winner < 0 ? "" : r->all[r->winner].suffix);
    measure_add(&t, ",\"margin\":%.4f,\"tie\":%s,", r->margin, r->tie ? "true" : "false");
    if (r->peak[0] > 0)
        measure_add(&t, "\"peak\":[%.1f,%.1f],", 1e-9 * r->peak[0], 1e-9 * r->peak[1]);
    measure_add(&t, "\"tried\":[");
    for (int i = 0; i < r->count; i++) {
        if (i)
            measure_add(&t, ",");
        record_candidate(&t, r, &r->all[i]);
    }
    measure_add(&t, "]}\n");
    return t;
}

/* Append the line with a single write: whatever happens, the file holds whole lines. */
static void append(const char *path, const measure_text *t)
{
    const int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    ssize_t wrote;
    if (file < 0)
        fail("cannot write '%s': %s", path, strerror(errno));
    while ((wrote = write(file, t->data, t->length)) < 0 && errno == EINTR)
        continue;
    if (wrote != (ssize_t)t->length || close(file) != 0)
        fail("cannot write '%s': %s", path, strerror(errno));
}

static void print_candidate(const race *r, const candidate *c)
{
    const char *mark = r->winner >= 0 && c == &r->all[r->winner] ? "winner" : c->is_default ? "default" : "";
    printf("  %-20s %-10s ", c->suffix, standing_name[c->standing]);
    if (c->samples > 0)
        printf("%9.1f %9.1f %9.1f %4d ", per_token(r, median_of(c)), per_token(r, quantile_of(c, 0.2)),
               per_token(r, quantile_of(c, 0.8)), values_of(c));
    else
        printf("%9s %9s %9s %4s ", "", "", "", "");
    if (c->err > 0)
        printf("%8.1e  ", c->err);
    else
        printf("%8s  ", "");
    printf("%s%s%s\n", mark, mark[0] && c->why[0] ? ": " : "", c->why);
}

static void print_race(const race *r, const measure_device *device)
{
    if (opt.events)
        return;
    printf("%s, %lld tokens, batch %lld, heads %lld, %s cache, on %s\n", r->kernel->contract, (long long)r->load.tokens,
           (long long)opt.batch, (long long)opt.heads, opt.warm ? "warm" : "cold", device->name);
    printf("  %-20s %-10s %9s %9s %9s %4s %8s\n", "variant", "status", "ns/token", "p20", "p80", "n", "error");
    for (int i = 0; i < r->count; i++)
        print_candidate(r, &r->all[i]);
    if (r->winner < 0)
        printf("  no candidate is left\n");
    else
        printf("  %s: %.1f %% faster than the default%s\n", r->all[r->winner].suffix, 100 * r->margin,
               r->tie ? " (a tie: within the noise or 2 % of another)" : "");
    fflush(stdout);
}

/* The FMA peak of a CPU. */
static double peak_now(void)
{
    double best = 0;
    for (int i = 0; i < 50 && strcmp(NF_BACKEND, "cpu") == 0; i++)
        best = fmax(best, measure_peak(measure_target()));
    return best;
}

/* Everything that a finished race leaves behind. */
static void report(const race *r, const measure_device *device)
{
    measure_text line = record(r, device);
    if (opt.json)
        append(opt.json, &line);
    progress("%s", "");
    print_race(r, device);
    line.data[line.length - 1] = 0;
    if (opt.events)
        printf("{\"event\":\"record\",\"record\":%s}\n", line.data);
    fflush(stdout);
    free(line.data);
}

/* One length, within `seconds`; r holds the verified candidates. */
static int tune_length(race *r, int64_t tokens, double seconds, const measure_device *device)
{
    r->race_end = measure_now() + 0.7 * seconds;
    r->end = measure_now() + seconds;
    r->load = load_new(r->kernel, tokens, r->exam->projection, device->l2);
    r->peak[0] = peak_now();
    run_rounds(r);
    run_finals(r);
    decide(r);
    r->peak[1] = peak_now();
    leave_if_interrupted(r);
    report(r, device);
    load_free(&r->load);
    return r->winner >= 0;
}

/* One contract at every length, until `end`. */
static int tune(const kernel *k, double end, const measure_device *device)
{
    static race verified, r;
    exam *e = exam_new(k, opt.seed);
    int good = 1;
    memset(&verified, 0, sizeof verified);
    verified.kernel = k;
    verified.exam = e;
    enter(&verified);
    verify_all(&verified);
    for (int n = 0; n < opt.lengths; n++) {
        r = verified;
        good &= tune_length(&r, opt.tokens[n], (end - measure_now()) / (opt.lengths - n), device);
    }
    exam_free(e);
    return good;
}

/* ---- command line ---------------------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: tune [--budget SECONDS] [--tokens N,...] [--batch N] [--heads N] [--contract NAME] [--json FILE]\n"
    "            [--timeout SECONDS] [--seed N] [--warm] [--events]\n"
    "  --budget    for everything together (default 60)\n"
    "  --tokens    lengths to tune at (default 1024,4096)\n"
    "  --contract  only this one\n"
    "  --json      append one record per contract and length to this file\n"
    "  --timeout   of a candidate that does not answer (default 10)\n"
    "  --warm      one buffer set instead of several that exceed the cache\n"
    "  --events    JSON lines for a program on the standard output instead of the table\n";

static double number(const char *option, const char *text, double least, double most)
{
    char *end = NULL;
    const double x = text ? strtod(text, &end) : 0;
    if (!text || end == text || *end || !(x >= least && x <= most))
        fail("option %s = '%s': must be a number from %g to %g", option, text ? text : "", least, most);
    return x;
}

static void parse_tokens(const char *text)
{
    char copy[128], *at;
    if (!text || strlen(text) >= sizeof copy)
        fail("option --tokens = '%s': must be up to %d numbers, separated by commas", text ? text : "", MAX_LENGTHS);
    strcpy(copy, text);
    opt.lengths = 0;
    for (at = strtok(copy, ","); at; at = strtok(NULL, ",")) {
        if (opt.lengths == MAX_LENGTHS)
            fail("option --tokens = '%s': at most %d lengths", text, MAX_LENGTHS);
        opt.tokens[opt.lengths++] = (int64_t)number("--tokens", at, 1, 1 << 20);
    }
    if (!opt.lengths)
        fail("option --tokens = '%s': must be a number from 1 on", text);
}

static void parse(int count, char **words)
{
    for (int i = 1; i < count; i++) {
        const char *word = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
        if (strcmp(word, "--help") == 0) {
            fputs(usage, stdout);
            exit(0);
        }
        i++;
        if (strcmp(word, "--budget") == 0)
            opt.budget = number(word, value, 0.1, 86400);
        else if (strcmp(word, "--timeout") == 0)
            opt.timeout = number(word, value, 0.1, 600);
        else if (strcmp(word, "--batch") == 0)
            opt.batch = (int64_t)number(word, value, 1, 1024);
        else if (strcmp(word, "--heads") == 0)
            opt.heads = (int64_t)number(word, value, 1, 1024);
        else if (strcmp(word, "--seed") == 0)
            opt.seed = (uint64_t)number(word, value, 0, 4294967295.0);
        else if (strcmp(word, "--tokens") == 0)
            parse_tokens(value);
        else if (strcmp(word, "--json") == 0 && value)
            opt.json = value;
        else if (strcmp(word, "--contract") == 0 && value)
            opt.contract = value;
        else if (i--, strcmp(word, "--warm") == 0)
            opt.warm = 1;
        else if (strcmp(word, "--events") == 0)
            opt.events = 1;
        else
            fail("option '%s': unknown or without its value, see --help", word);
    }
}

static void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal; /* without SA_RESTART: a poll returns */
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* What is known of the device: found out in a process of its own, as only a child may start a GPU's runtime. */
static measure_device survey(void)
{
    struct {
        measure_device device;
        char none[160];
    } found;
    int ends[2];
    pid_t pid;
    memset(&found, 0, sizeof found);
    if (pipe(ends) != 0 || (pid = fork()) < 0)
        fail("cannot start a process: %s", strerror(errno));
    if (pid == 0) {
        const char *why = device_describe(&found.device);
        snprintf(found.none, sizeof found.none, "%s", why ? why : "");
        _exit(write(ends[1], &found, sizeof found) != (ssize_t)sizeof found);
    }
    close(ends[1]);
    if (read(ends[0], &found, sizeof found) != (ssize_t)sizeof found)
        fail("the device cannot be described");
    close(ends[0]);
    waitpid(pid, NULL, 0);
    if (found.none[0]) {
        fprintf(stderr, "tune: no GPU here: %s\n", found.none);
        exit(1);
    }
    return found.device;
}

static int selected(const kernel *k)
{
    return !opt.contract || strcmp(opt.contract, k->contract) == 0;
}

int main(int count, char **words)
{
    const double start = measure_now();
    measure_device device;
    int steps = 0, good = 1;
    parse(count, words);
    device = survey();
    kernel_request();
    catch_signals();
    for (int i = 0; i < KERNELS; i++)
        steps += selected(&kernel_table[i]);
    if (!steps)
        fail("option --contract = '%s': not in this program", opt.contract);
    for (int i = 0; i < KERNELS; i++) {
        if (!selected(&kernel_table[i]))
            continue;
        good &= tune(&kernel_table[i], measure_now() + (start + opt.budget - measure_now()) / steps, &device);
        steps--;
    }
    return good ? 0 : 1;
}
