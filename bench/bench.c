/* The bench: how fast and how exact are these kernels on this machine? One JSON object per line and measurement; the
 * FMA peak is read between the runs that it is compared with.
 *
 *     cc -O2 *.c -o bench -lm -lpthread && ./bench --tests speed,error
 */
#define _DEFAULT_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define _POSIX_C_SOURCE 200809L

#define PROGRAM "bench"
#include "kernel.h"
#include "measure.h"

#include <pthread.h>

enum { MAX_SAMPLES = 64, MAX_SUBJECTS = 64, MAX_LIST = 16, DECODE_HEADS = 32, DECODE_BEFORE = 640, SPLIT_HEADS = 8 };
static const double SAMPLE_SECONDS = 0.004; /* at least, per sample */
static const double SPLIT_SECONDS = 0.060;  /* with threads: long enough for the system to spread them */

typedef struct options {
    const char *tests, *contract, *way, *input[MAX_LIST];
    int64_t tokens[MAX_LIST], cached[MAX_LIST], split_tokens;
    int lengths, caches, inputs;
    double seconds; /* per measurement */
} options;

static options opt = {"speed,error", NULL, "entry", {NULL}, {1024, 4096}, {60, 120, 240}, 4096, 2, 3, 0, 0.25};

/* ---- what is measured ------------------------------------------------------------------------------------------ */

typedef struct subject {
    const kernel *kernel;
    const nf_variant *variant;
    nf_args args;
    int decode, threads, masked; /* masked: the dense baseline instead of the variant */
    nf_grads *grads;             /* NULL: a forward or decode */
    double (*clock)(void);       /* of this thread's work; of the wall where threads are compared */
    void *workspace[2];
    size_t bytes;
    double least; /* seconds per sample */
    double units; /* what the time is divided by: tokens * heads */
    int launches, samples;
    double sample[MAX_SAMPLES];   /* seconds per launch */
    double possible[MAX_SAMPLES]; /* flop that the peak would have done meanwhile */
} subject;

typedef nf_status (*attend)(const nf_args *args, void *workspace, size_t bytes);

typedef struct share {
    attend run;
    nf_args args;
    const subject *backward; /* instead of run */
    void *workspace;
    size_t bytes;
    int launches;
    nf_status status;
} share;

static void *run_share(void *data)
{
    share *s = (share *)data;
    for (int i = 0; i < s->launches && s->status == NF_OK; i++)
        s->status = s->backward ? s->backward->variant->backward(&s->args, s->backward->grads, s->workspace, s->bytes)
                                : s->run(&s->args, s->workspace, s->bytes);
    return NULL;
}

static nf_status masked(const nf_args *args, void *workspace, size_t bytes);

/* Half of the units on a second thread, the other half on this one. */
static nf_status run_split(const subject *s, attend run, int launches)
{
    const int64_t units = s->args.batch * s->args.heads, half = units / 2;
    share mine = {run, s->args, NULL, s->workspace[0], s->bytes, launches, NF_OK};
    share other = {run, s->args, NULL, s->workspace[1], s->bytes, launches, NF_OK};
    pthread_t thread;
    mine.args.split_count = half;
    other.args.split_begin = half;
    other.args.split_count = units - half;
    if (pthread_create(&thread, NULL, run_share, &other) != 0)
        fail("cannot start a thread");
    run_share(&mine);
    pthread_join(thread, NULL);
    return mine.status != NF_OK ? mine.status : other.status;
}

/* Seconds per launch. */
static double run_launches(const subject *s, int launches)
{
    const attend run = s->masked ? masked : s->decode ? s->variant->decode : s->variant->forward;
    const double start = s->clock();
    share all = {run, s->args, s->grads ? s : NULL, s->workspace[0], s->bytes, launches, NF_OK};
    if (s->threads > 1)
        all.status = run_split(s, run, launches);
    else
        run_share(&all);
    if (all.status != NF_OK)
        fail("%s: %s", s->variant->name, nf_status_text(all.status));
    return (s->clock() - start) / launches;
}

static subject subject_new(const kernel *k, const nf_variant *v, const nf_args *args)
{
    subject s;
    memset(&s, 0, sizeof s);
    s.kernel = k;
    s.variant = v;
    s.args = *args;
    s.threads = 1;
    s.clock = measure_work;
    s.least = SAMPLE_SECONDS;
    s.bytes = k->workspace(NULL);
    s.workspace[0] = kernel_memory(s.bytes);
    s.workspace[1] = kernel_memory(s.bytes);
    s.units = (double)(args->batch * args->heads * args->q_tokens);
    return s;
}

static void subject_free(subject *s)
{
    free(s->workspace[0]);
    free(s->workspace[1]);
}

/* Time all subjects in turn, round after round, so that a change of the clock meets all of them; read the peak of its
 * target right before and after every sample. possible[i]: flop that the peak would have done in the time of one launch
 * of subject i (median). */
static void measure_all(subject *s, int count, double *possible_flop)
{
    int rounds = 3;
    for (int i = 0; i < count; i++) {
        double once = run_launches(&s[i], 1);
        once = fmin(once, run_launches(&s[i], 1 + (int)(0.5 * s[i].least / once)));
        s[i].launches = 1 + (int)(s[i].least / once);
        rounds = (int)fmax(rounds, opt.seconds / (once * s[i].launches));
    }
    rounds = rounds > MAX_SAMPLES ? MAX_SAMPLES : rounds;
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < count; i++) {
            const char *target = s[i].variant->target;
            if (s[i].samples < 3 || s[i].sample[0] * s[i].launches * s[i].samples < opt.seconds) {
                const double before = measure_peak(target);
                const double seconds = run_launches(&s[i], s[i].launches), after = measure_peak(target);
                s[i].possible[s[i].samples] = seconds * (before + after) / 2;
                s[i].sample[s[i].samples++] = seconds;
            }
        }
    }
    for (int i = 0; i < count; i++) {
        double possible[MAX_SAMPLES];
        memcpy(possible, s[i].possible, sizeof possible);
        possible_flop[i] = measure_median(possible, s[i].samples);
    }
}

/* ---- lines ----------------------------------------------------------------------------------------------------- */

static measure_text line_new(const char *bench, const kernel *k, const nf_variant *v)
{
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"bench\":\"%s\",\"contract\":\"%s\",\"variant\":\"%s\",\"target\":\"%s\"", bench, k->contract,
                kernel_suffix(k, v), v->target);
    return t;
}

/* Nanoseconds per unit: the fastest sample and the median. */
static void line_times(measure_text *t, subject *s, double *fastest)
{
    const double median = measure_median(s->sample, s->samples);
    *fastest = 1e9 * s->sample[0] / s->units;
    measure_member(t, "ns_min", *fastest);
    measure_member(t, "ns_med", 1e9 * median / s->units);
    measure_add(t, ",\"k\":%d", s->samples);
}

/* ---- the ways that were asked for ------------------------------------------------------------------------------ */

static int word_in(const char *list, const char *word)
{
    const size_t n = strlen(word);
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (strcspn(at, ",") == n && strncmp(at, word, n) == 0)
            return 1;
    return 0;
}

/* --way: entry (what the contract's symbol runs), all, a target (its first variant) or a suffix. */
static int wanted(const kernel *k, int32_t index)
{
    int32_t count;
    const nf_variant *v = k->variants(&count);
    if (!v[index].supported() || (opt.contract && !word_in(opt.contract, k->contract)))
        return 0;
    if (word_in(opt.way, "all") || word_in(opt.way, kernel_suffix(k, &v[index])))
        return 1;
    if (word_in(opt.way, "entry") && index == kernel_default(k))
        return 1;
    return word_in(opt.way, v[index].target) && (index == 0 || strcmp(v[index - 1].target, v[index].target) != 0);
}

typedef struct way {
    const kernel *kernel;
    const nf_variant *variant;
    void *projection;
    float *w;
} way;

static int ways(way *list)
{
    int n = 0;
    for (int i = 0; i < KERNELS; i++) {
        int32_t count;
        const nf_variant *v = kernel_table[i].variants(&count);
        for (int32_t j = 0; j < count && n < MAX_SUBJECTS; j++)
            if (wanted(&kernel_table[i], j)) {
                list[n].kernel = &kernel_table[i];
                list[n].variant = &v[j];
                list[n].projection = kernel_projection(&kernel_table[i], 1, &list[n].w);
                n++;
            }
    }
    return n;
}

/* ---- speed ----------------------------------------------------------------------------------------------------- */

/* Every way at one length; heads so many that all lengths up to 4096 do about the same work. */
static void speed_at(const way *list, int count, int64_t tokens)
{
    static subject s[MAX_SUBJECTS];
    static arrays data[MAX_SUBJECTS];
    const int64_t heads = tokens < 4096 ? 4096 / tokens : 1;
    double possible[MAX_SUBJECTS], fastest;
    for (int i = 0; i < count; i++) {
        const way *w = &list[i];
        nf_args a;
        data[i] = arrays_new(w->kernel, ORACLE_CONSTANT, tokens * heads, tokens * heads, 3, 5);
        a = kernel_args(w->kernel, 1, tokens, heads, data[i].of_q, data[i].of_k, data[i].of_v, data[i].of_out,
                        w->projection);
        s[i] = subject_new(w->kernel, w->variant, &a);
    }
    measure_all(s, count, possible);
    for (int i = 0; i < count; i++) {
        measure_text t = line_new("speed", list[i].kernel, list[i].variant);
        const double work = kernel_flops(list[i].kernel, kernel_suffix(list[i].kernel, list[i].variant), tokens);
        measure_add(&t, ",\"tokens\":%lld,\"heads\":%lld", (long long)tokens, (long long)heads);
        line_times(&t, &s[i], &fastest);
        measure_member(&t, "flops", work);
        measure_member(&t, "peak", 1e-9 * possible[i] / measure_median(s[i].sample, s[i].samples));
        measure_member(&t, "percent", 1e2 * work * s[i].units / possible[i]);
        measure_print(&t);
        subject_free(&s[i]);
        arrays_free(&data[i]);
    }
}

/* ---- error against fp64 ---------------------------------------------------------------------------------------- */

static void error_at(const way *w, int64_t tokens, double norm)
{
    enum { HEADS = 2 };
    const int d = w->kernel->v;
    float *out;
    arrays data = arrays_new(w->kernel, ORACLE_CONSTANT, tokens * HEADS, tokens * HEADS, norm, 5);
    const nf_args a =
        kernel_args(w->kernel, 1, tokens, HEADS, data.of_q, data.of_k, data.of_v, data.of_out, w->projection);
    double *ref = oracle_doubles((size_t)(tokens * d));
    subject s = subject_new(w->kernel, w->variant, &a);
    measure_text t = line_new("error", w->kernel, w->variant);
    double row = 0, length = 0;
    run_launches(&s, 1);
    out = kernel_unpack(w->kernel, data.of_out, tokens * HEADS * d);
    for (int h = 0; h < HEADS; h++) {
        const oracle_head head = kernel_head(w->kernel, tokens, HEADS, HEADS, h, data.q, data.k, data.v, w->w);
        oracle_error e;
        kernel_oracle(w->kernel, &w->kernel->pattern, &head, ref, NULL);
        e = oracle_compare(out + h * d, HEADS * d, ref, tokens, d);
        row = fmax(row, e.row);
        length = fmax(length, e.length / oracle_v_norm(&head));
    }
    measure_add(&t, ",\"tokens\":%lld", (long long)tokens);
    measure_member(&t, "norm", norm);
    measure_member(&t, "row", row);
    measure_member(&t, "scaled", length);
    measure_print(&t);
    subject_free(&s);
    arrays_free(&data);
    free(out);
    free(ref);
}

/* ---- decode ---------------------------------------------------------------------------------------------------- */

/* With a state: one token against one that has seen some; it goes on growing, its size does not. */
static subject decode_state(const way *w, arrays *data)
{
    nf_args a = kernel_args(w->kernel, 1, DECODE_BEFORE, DECODE_HEADS, data->of_q, data->of_k, data->of_v, data->of_out,
                            w->projection);
    subject s = subject_new(w->kernel, w->variant, &a);
    s.args.state = kernel_memory(w->kernel->state_bytes(&a));
    if (w->kernel->state_reset(&s.args) != NF_OK)
        fail("%s: state_reset failed", w->kernel->name);
    run_launches(&s, 1);
    s.args.q_tokens = 1;
    s.decode = 1;
    s.units = DECODE_HEADS;
    return s;
}

/* Without: one query against `cached` keys, every head's cache in one piece. */
static subject decode_cache(const way *w, arrays *data, int64_t cached)
{
    const int64_t d = w->kernel->d;
    nf_args a = kernel_args(w->kernel, 1, 1, DECODE_HEADS, data->of_q, data->of_k, data->of_v, data->of_out, NULL);
    a.kv_tokens = cached;
    a.k.token_stride = a.v.token_stride = d;
    a.k.head_stride = a.v.head_stride = cached * d;
    {
        subject s = subject_new(w->kernel, w->variant, &a);
        s.decode = 1;
        return s;
    }
}

static void decode(const way *list, int count)
{
    static subject s[MAX_SUBJECTS];
    static arrays data[MAX_SUBJECTS];
    const way *of[MAX_SUBJECTS];
    double possible[MAX_SUBJECTS], fastest;
    int n = 0;
    for (int i = 0; i < count; i++)
        for (int c = kernel_full_only(list[i].kernel); /* no decode */
             c < (kernel_stateful(list[i].kernel) ? 1 : opt.caches) && n < MAX_SUBJECTS; c++, n++) {
            const int64_t cached = kernel_stateful(list[i].kernel) ? DECODE_BEFORE : opt.cached[c];
            of[n] = &list[i];
            data[n] =
                arrays_new(list[i].kernel, ORACLE_CONSTANT, DECODE_BEFORE * DECODE_HEADS, cached * DECODE_HEADS, 3, 5);
            s[n] = kernel_stateful(list[i].kernel) ? decode_state(&list[i], &data[n])
                                                   : decode_cache(&list[i], &data[n], cached);
        }
    measure_all(s, n, possible);
    for (int i = 0; i < n; i++) {
        measure_text t = line_new("decode", of[i]->kernel, of[i]->variant);
        measure_add(&t, ",\"heads\":%d,\"cached\":%lld", DECODE_HEADS,
                    (long long)(kernel_stateful(of[i]->kernel) ? 0 : s[i].args.kv_tokens));
        line_times(&t, &s[i], &fastest);
        measure_print(&t);
        free(s[i].args.state);
        subject_free(&s[i]);
        arrays_free(&data[i]);
    }
}

/* ---- backward -------------------------------------------------------------------------------------------------- */

/* Forward and backward in turn: their ratio. */
static void backward(const way *w)
{
    enum { TOKENS = 4096 };
    arrays data = arrays_new(w->kernel, ORACLE_CONSTANT, TOKENS, TOKENS, 3, 5);
    arrays by = arrays_new(w->kernel, ORACLE_CONSTANT, TOKENS, TOKENS, 3, 5);
    nf_args a = kernel_args(w->kernel, 1, TOKENS, 1, data.of_q, data.of_k, data.of_v, data.of_out, w->projection);
    subject s[2];
    nf_grads g;
    double possible[2], fastest[2];
    measure_text t = line_new("backward", w->kernel, w->variant);
    memset(&g, 0, sizeof g);
    a.lse = kernel_floats(TOKENS);
    g.out.data = data.of_out, g.lse = a.lse;
    g.dout.data = by.of_v;
    g.dq.data = by.of_q, g.dk.data = by.of_k, g.dv.data = by.of_out;
    for (int i = 0; i < 2; i++)
        s[i] = subject_new(w->kernel, w->variant, &a);
    run_launches(&s[0], 1);
    s[1].grads = &g;
    measure_all(s, 2, possible);
    measure_add(&t, ",\"tokens\":%d", TOKENS);
    for (int i = 0; i < 2; i++) {
        const double median = measure_median(s[i].sample, s[i].samples);
        fastest[i] = 1e9 * s[i].sample[0] / s[i].units;
        measure_member(&t, i ? "ns_backward" : "ns_forward", 1e9 * median / s[i].units);
        subject_free(&s[i]);
    }
    measure_member(&t, "ratio", fastest[1] / fastest[0]);
    measure_print(&t);
    free(a.lse);
    arrays_free(&data);
    arrays_free(&by);
}

/* ---- patterns -------------------------------------------------------------------------------------------------- */

/* The dense baseline: every score of the N x N, a mask [key][query] of bytes laid over it, softmax, every value. As
 * fast as plain vectors make it: tiles of 8 keys by 32 queries, 8 queries by 32 dims. Causal; one head. */
enum { MASK_QUERIES = 32 };
typedef float masked_vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t masked_int __attribute__((vector_size(64), aligned(4), may_alias));
static unsigned char *masked_bytes; /* 255: seen, [N][N] */

#ifdef __x86_64__
#define MASKED_TARGET __attribute__((target("avx512f,fma")))
#else
#define MASKED_TARGET
#endif

/* 2^x for x <= 0. */
MASKED_TARGET static inline masked_vector masked_exp2(masked_vector x)
{
    const masked_vector low = x - (x - -126.0f), y = (masked_vector)(((masked_int)(x > -126.0f) & (masked_int)x) |
                                                                     ((masked_int)(x <= -126.0f) & (masked_int)low));
    const masked_int n = __builtin_convertvector(y - 0.5f, masked_int);
    const masked_vector f = y - __builtin_convertvector(n, masked_vector);
    masked_vector p = f * 1.339887e-3f + 9.618437e-3f;
    p = p * f + 5.550332e-2f;
    p = p * f + 2.402265e-1f;
    p = p * f + 6.931472e-1f;
    p = p * f + 1.0f;
    return (masked_vector)((masked_int)p + (n << 23));
}

MASKED_TARGET static void masked_block(const nf_args *a, float *score, int64_t first)
{
    const int64_t n = a->q_tokens, d = 64;
    const float *q = (const float *)a->q.data, *k = (const float *)a->k.data, *v = (const float *)a->v.data;
    float *out = (float *)a->out.data, x[64 * MASK_QUERIES];
    masked_vector top[2] = {{0}, {0}}, den[2] = {{0}, {0}};
    float inverse[MASK_QUERIES];
    for (int i = 0; i < MASK_QUERIES; i++)
        for (int64_t c = 0; c < d; c++)
            x[c * MASK_QUERIES + i] = q[(first + i) * d + c] * 0.18033688f; /* log2 e / sqrt(64) */
    for (int h = 0; h < 2; h++)
        top[h] = top[h] - 1e30f;
    for (int64_t j = 0; j < n; j += 8) {
        masked_vector acc[8][2] = {{{0}}};
        for (int64_t c = 0; c < d; c++) {
            const masked_vector x0 = *(masked_vector *)(x + c * MASK_QUERIES);
            const masked_vector x1 = *(masked_vector *)(x + c * MASK_QUERIES + 16);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                acc[r][0] += k[(j + r) * d + c] * x0;
                acc[r][1] += k[(j + r) * d + c] * x1;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int h = 0; h < 2; h++) {
                typedef signed char masked_byte __attribute__((vector_size(16), aligned(1), may_alias));
                const masked_byte seen = *(masked_byte *)(masked_bytes + (j + r) * n + first + 16 * h);
                const masked_int mask = __builtin_convertvector(seen, masked_int);
                const masked_vector hidden = (masked_vector){0} - 1e30f;
                const masked_vector s = (masked_vector)((mask & (masked_int)acc[r][h]) | (~mask & (masked_int)hidden));
                const masked_int more = s > top[h];
                top[h] = (masked_vector)((more & (masked_int)s) | (~more & (masked_int)top[h]));
                *(masked_vector *)(score + (j + r) * MASK_QUERIES + 16 * h) = s;
            }
    }
    for (int64_t j = 0; j < n; j++)
        for (int h = 0; h < 2; h++) {
            masked_vector *at = (masked_vector *)(score + j * MASK_QUERIES + 16 * h);
            *at = masked_exp2(*at - top[h]);
            den[h] += *at;
        }
    for (int i = 0; i < MASK_QUERIES; i++)
        inverse[i] = 1 / den[i / 16][i % 16];
    for (int i = 0; i < MASK_QUERIES; i += 8)
        for (int64_t c = 0; c < d; c += 32) {
            masked_vector acc[8][2] = {{{0}}};
            for (int64_t j = 0; j < n; j++) {
                const masked_vector v0 = *(const masked_vector *)(v + j * d + c);
                const masked_vector v1 = *(const masked_vector *)(v + j * d + c + 16);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) {
                    acc[r][0] += score[j * MASK_QUERIES + i + r] * v0;
                    acc[r][1] += score[j * MASK_QUERIES + i + r] * v1;
                }
            }
            for (int r = 0; r < 8; r++)
                for (int h = 0; h < 2; h++)
                    *(masked_vector *)(out + (first + i + r) * d + c + 16 * h) = acc[r][h] * inverse[i + r];
        }
}

static nf_status masked(const nf_args *args, void *workspace, size_t bytes)
{
    (void)bytes;
    for (int64_t first = 0; first < args->q_tokens; first += MASK_QUERIES)
        masked_block(args, (float *)workspace, first);
    return NF_OK;
}

typedef struct pattern_case {
    const char *name;
    int64_t tokens;
    int window, globals, dilation, random; /* random: blocks of each block of queries, beside its own */
    int masked;
} pattern_case;

static const pattern_case pattern_cases[] = {
    {"window 512", 4096, 512, 0, 1, 0, 0},
    {"window 512", 32768, 512, 0, 1, 0, 0},
    {"window 512", 262144, 512, 0, 1, 0, 0},
    {"window 512, 4 globals", 4096, 512, 4, 1, 0, 0},
    {"window 512, dilation 4", 4096, 512, 0, 4, 0, 0},
    {"8 random blocks", 4096, 0, 0, 1, 8, 0},
    {"window 512, masked dense", 4096, 512, 0, 1, 0, 1},
};
enum { PATTERN_CASES = sizeof pattern_cases / sizeof *pattern_cases };

/* Rows of `random` earlier blocks and the own one, rising, into offsets and keys; the pairs that they stand for. */
static double random_blocks(const pattern_case *c, int b, int32_t *offset, int32_t *keys)
{
    oracle_random r = {7};
    double pairs = 0;
    int32_t n = 0;
    for (int32_t row = 0; row * b < c->tokens; row++) {
        offset[row] = n;
        for (int32_t j = 0, left = row < c->random ? row : c->random; j < row && left; j++)
            if (oracle_uniform(&r) * (row - j) < left) {
                keys[n++] = j;
                left--;
            }
        pairs += (double)(n - offset[row]) * b * b + (double)b * (b + 1) / 2;
        keys[n++] = row;
        offset[row + 1] = n;
    }
    return pairs;
}

/* The named patterns of a sparse kernel, in turn; flops are those of the pairs that attend. */
static void patterns(const way *w)
{
    static subject s[PATTERN_CASES];
    static arrays data[PATTERN_CASES];
    static nf_pattern pattern[PATTERN_CASES];
    static double pairs[PATTERN_CASES];
    static int32_t dilation[1] = {4};
    double possible[PATTERN_CASES], fastest;
    const int b = w->kernel->b, d = w->kernel->d;
    int32_t *offset = (int32_t *)kernel_memory(4096 * sizeof(int32_t));
    int32_t *keys = (int32_t *)kernel_memory(65536 * sizeof(int32_t));
    int count = d == 64 && strcmp(w->variant->target, "avx512") == 0 ? PATTERN_CASES : PATTERN_CASES - 1;
    for (int i = 0; i < count; i++) {
        const pattern_case *c = &pattern_cases[i];
        nf_args a;
        data[i] = arrays_new(w->kernel, ORACLE_CONSTANT, c->tokens, c->tokens, 3, 5);
        a = kernel_args(w->kernel, 1, c->tokens, 1, data[i].of_q, data[i].of_k, data[i].of_v, data[i].of_out, NULL);
        memset(&pattern[i], 0, sizeof pattern[i]);
        pattern[i].window = c->window;
        pattern[i].globals = c->globals;
        pattern[i].dilation = c->dilation > 1 ? dilation : NULL;
        a.pattern = &pattern[i];
        pairs[i] = 0;
        for (int64_t t = 0; t < c->tokens && c->window; t++) {
            const int64_t seen = t / c->dilation + 1, kept = seen < c->window ? seen : c->window;
            const int64_t before = t + 1 - c->window;
            pairs[i] += (double)(kept + (before < 0 ? 0 : before < c->globals ? before : c->globals));
        }
        if (c->random) {
            pairs[i] = random_blocks(c, b, offset, keys);
            pattern[i].block = b, pattern[i].block_heads = 1;
            pattern[i].block_rows = (c->tokens + b - 1) / b;
            pattern[i].block_offsets = offset, pattern[i].block_keys = keys;
            pattern[i].block_count = offset[pattern[i].block_rows];
        }
        s[i] = subject_new(w->kernel, w->variant, &a);
        if (c->masked) {
            s[i].masked = 1;
            free(s[i].workspace[0]);
            s[i].workspace[0] = kernel_floats(c->tokens * MASK_QUERIES);
            masked_bytes = (unsigned char *)kernel_memory((size_t)(c->tokens * c->tokens));
            for (int64_t j = 0; j < c->tokens; j++)
                for (int64_t q = 0; q < c->tokens; q++)
                    masked_bytes[j * c->tokens + q] = j <= q && q < j + c->window ? 255 : 0;
        }
    }
    measure_all(s, count, possible);
    for (int i = 0; i < count; i++) {
        measure_text t = line_new("pattern", w->kernel, w->variant);
        const double work = 4 * d * pairs[i] / (double)pattern_cases[i].tokens;
        measure_add(&t, ",\"pattern\":\"%s\",\"tokens\":%lld", pattern_cases[i].name,
                    (long long)pattern_cases[i].tokens);
        measure_member(&t, "keys", pairs[i] / (double)pattern_cases[i].tokens);
        line_times(&t, &s[i], &fastest);
        measure_member(&t, "percent", 1e2 * work * s[i].units / possible[i]);
        measure_print(&t);
        subject_free(&s[i]);
        arrays_free(&data[i]);
    }
    free(offset);
    free(keys);
    free(masked_bytes);
    masked_bytes = NULL;
}

/* ---- two threads ----------------------------------------------------------------------------------------------- */

static void splits(const way *w)
{
    const int64_t rows = opt.split_tokens * SPLIT_HEADS;
    arrays data[2] = {arrays_new(w->kernel, ORACLE_CONSTANT, rows, rows, 3, 5),
                      arrays_new(w->kernel, ORACLE_CONSTANT, rows, rows, 3, 5)};
    subject s[2];
    double possible[2], one, two;
    measure_text t = line_new("splits", w->kernel, w->variant);
    for (int i = 0; i < 2; i++) {
        const nf_args a = kernel_args(w->kernel, 1, opt.split_tokens, SPLIT_HEADS, data[i].of_q, data[i].of_k,
                                      data[i].of_v, data[i].of_out, w->projection);
        s[i] = subject_new(w->kernel, w->variant, &a);
        s[i].threads = i + 1;
        s[i].clock = measure_now;
        s[i].least = SPLIT_SECONDS;
    }
    measure_all(s, 2, possible);
    one = measure_median(s[0].sample, s[0].samples);
    two = measure_median(s[1].sample, s[1].samples);
    measure_add(&t, ",\"tokens\":%lld,\"heads\":%d", (long long)opt.split_tokens, SPLIT_HEADS);
    measure_member(&t, "ns_one", 1e9 * s[0].sample[0] / s[0].units);
    measure_member(&t, "ns_two", 1e9 * s[1].sample[0] / s[1].units);
    measure_member(&t, "speedup", s[0].sample[0] / s[1].sample[0]);
    measure_member(&t, "speedup_med", one / two);
    measure_print(&t);
    for (int i = 0; i < 2; i++) {
        subject_free(&s[i]);
        arrays_free(&data[i]);
    }
}

/* ---- real input: error against exact softmax ------------------------------------------------------------------- */

/* A file of four int64 (batch, tokens, heads, dim), then q, k and v as floats [batch][token][head][dim]. */
typedef struct input {
    int64_t batch, tokens, heads, dim;
    float *q, *k, *v;
    double *exact[2]; /* by mask: [batch][head][token][dim] */
} input;

static input input_read(const char *path)
{
    input in;
    int64_t sizes[4] = {0, 0, 0, 0}, count;
    FILE *f = fopen(path, "rb");
    memset(&in, 0, sizeof in);
    if (!f || fread(sizes, sizeof *sizes, 4, f) != 4)
        fail("cannot read '%s'", path);
    in.batch = sizes[0];
    in.tokens = sizes[1];
    in.heads = sizes[2];
    in.dim = sizes[3];
    count = in.batch * in.tokens * in.heads * in.dim;
    if (count < 1 || count > (1 << 28))
        fail("'%s': bad sizes", path);
    in.q = kernel_floats(count);
    in.k = kernel_floats(count);
    in.v = kernel_floats(count);
    if (fread(in.q, sizeof(float), (size_t)count, f) != (size_t)count ||
        fread(in.k, sizeof(float), (size_t)count, f) != (size_t)count ||
        fread(in.v, sizeof(float), (size_t)count, f) != (size_t)count)
        fail("'%s': it ends too early", path);
    fclose(f);
    return in;
}

/* Where a head of a batch entry begins. */
static int64_t input_at(const input *in, int64_t batch, int64_t head)
{
    return batch * in->tokens * in->heads * in->dim + head * in->dim;
}

static oracle_head input_head(const kernel *k, const input *in, int64_t batch, int64_t head, int mask)
{
    const int64_t at = batch * in->tokens * in->heads * in->dim;
    oracle_head h = kernel_head(k, in->tokens, in->heads, in->heads, head, in->q + at, in->k + at, in->v + at, NULL);
    h.full = mask;
    return h;
}

static void input_solve(const kernel *k, input *in)
{
    for (int mask = 0; mask < 2 && !in->exact[mask]; mask++) {
        in->exact[mask] = oracle_doubles((size_t)(in->batch * in->heads * in->tokens * in->dim));
        for (int64_t b = 0; b < in->batch; b++)
            for (int64_t h = 0; h < in->heads; h++) {
                const oracle_head head = input_head(k, in, b, h, mask);
                oracle_exact(&head, in->exact[mask] + (b * in->heads + h) * in->tokens * in->dim, NULL);
            }
    }
}

/* Mean over the heads of |out - exact|_F / |exact|_F, and the largest. */
static double input_error(const input *in, const float *out, int mask, double *worst)
{
    double sum = 0;
    *worst = 0;
    for (int64_t b = 0; b < in->batch; b++)
        for (int64_t h = 0; h < in->heads; h++) {
            const double *ref = in->exact[mask] + (b * in->heads + h) * in->tokens * in->dim;
            const oracle_error e =
                oracle_compare(out + input_at(in, b, h), in->heads * in->dim, ref, in->tokens, (int)in->dim);
            sum += e.mean;
            *worst = fmax(*worst, e.mean);
        }
    return sum / (double)(in->batch * in->heads);
}

/* What a plain average of the visible values would give: the error to stay well below. */
static double input_uniform(const input *in, int mask)
{
    const int64_t row = in->heads * in->dim;
    float *out = kernel_floats(in->batch * in->tokens * row);
    double worst, error;
    for (int64_t b = 0; b < in->batch; b++)
        for (int64_t x = 0; x < row; x++) {
            const float *v = in->v + b * in->tokens * row + x;
            double sum = 0;
            for (int64_t t = 0; t < in->tokens; t++) {
                sum += (double)v[t * row];
                out[(b * in->tokens + t) * row + x] = (float)(sum / (double)(t + 1));
            }
            for (int64_t t = 0; mask && t < in->tokens; t++)
                out[(b * in->tokens + t) * row + x] = (float)(sum / (double)in->tokens);
        }
    error = input_error(in, out, mask, &worst);
    free(out);
    return error;
}

enum { PLAIN, BALANCED, CALIBRATED, FITS };
static const char *const fit_name[] = {"plain", "balanced", "calibrated"};

/* One projection per head. Calibrations are fitted to the first half of the tokens and judged on all of them. */
static char *input_projections(const kernel *k, const input *in, uint64_t seed, int fit)
{
    const size_t bytes = k->projection_bytes();
    char *p = (char *)kernel_memory((size_t)in->heads * bytes);
    for (int64_t h = 0; h < in->heads; h++) {
        nf_calibration c;
        memset(&c, 0, sizeof c);
        c.q = in->q + h * in->dim;
        c.k = in->k + h * in->dim;
        c.q_tokens = c.k_tokens = (in->tokens + 1) / 2;
        c.q_stride = c.k_stride = in->heads * in->dim;
        c.tau = fit == BALANCED ? 1.0f : 0.0f;
        if (k->projection_init(p + (size_t)h * bytes, seed, fit == PLAIN ? NULL : &c) != NF_OK)
            fail("%s: projection_init failed", k->name);
    }
    return p;
}

/* The error of one fit, averaged over a few seeds of the projection. */
static double input_fit(const way *w, const input *in, int mask, int fit, double *worst)
{
    enum { SEEDS = 3 };
    const kernel *k = w->kernel;
    const int64_t count = in->batch * in->tokens * in->heads * in->dim;
    void *q = kernel_copy(k, in->q, count), *key = kernel_copy(k, in->k, count), *v = kernel_copy(k, in->v, count);
    void *of_out = kernel_memory((size_t)count * kernel_element(k));
    double sum = 0, largest = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        char *projections = k->m ? input_projections(k, in, seed, fit) : NULL;
        nf_args a = kernel_args(k, in->batch, in->tokens, in->heads, q, key, v, of_out, projections);
        subject s;
        float *out;
        a.projection_stride = k->m ? k->projection_bytes() : 0;
        a.mask = kernel_full_only(k) ? NF_FULL : mask;
        s = subject_new(k, w->variant, &a);
        run_launches(&s, 1);
        out = kernel_unpack(k, of_out, count);
        sum += input_error(in, out, mask, worst);
        largest = fmax(largest, *worst);
        subject_free(&s);
        free(projections);
        free(out);
    }
    *worst = largest;
    free(q);
    free(key);
    free(v);
    free(of_out);
    return sum / SEEDS;
}

static void real_input(const way *w, input *in, const char *name)
{
    if (in->dim != w->kernel->d || in->dim != w->kernel->v)
        return;
    input_solve(w->kernel, in);
    for (int mask = 0; mask < 2; mask++) {
        measure_text t = line_new("input", w->kernel, w->variant);
        measure_add(&t, ",\"input\":");
        measure_string(&t, name);
        measure_add(&t, ",\"mask\":\"%s\",\"tokens\":%lld,\"heads\":%lld", mask ? "full" : "causal",
                    (long long)in->tokens, (long long)in->heads);
        measure_member(&t, "uniform", input_uniform(in, mask));
        for (int fit = 0; fit < (w->kernel->m ? FITS : 1); fit++) {
            double worst;
            char key[32];
            measure_member(&t, fit_name[fit], input_fit(w, in, mask, fit, &worst));
            snprintf(key, sizeof key, "%s_worst", fit_name[fit]);
            measure_member(&t, key, worst);
        }
        measure_print(&t);
    }
}

/* ---- command line ---------------------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: bench [--tests speed,error,decode,backward,patterns,splits,input] [--contract NAME,...] [--way "
    "entry|all|TARGET|SUFFIX,...]\n"
    "             [--tokens N,...] [--cached N,...] [--seconds PER_MEASUREMENT] [--input FILE]...\n";

static int numbers(const char *option, const char *text, int64_t *list)
{
    int n = 0;
    for (const char *at = text; n < MAX_LIST; at++) {
        char *end;
        const long x = strtol(at, &end, 10);
        if (end == at || x < 1 || x > (1 << 20) || (*end && *end != ','))
            break;
        list[n++] = x;
        at = end;
        if (!*at)
            return n;
    }
    fail("option %s = '%s': must be up to %d numbers from 1 to 1048576, separated by commas", option, text, MAX_LIST);
}

static void parse(int count, char **words)
{
    for (int i = 1; i < count; i += 2) {
        const char *word = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
        if (strcmp(word, "--help") == 0) {
            fputs(usage, stdout);
            exit(0);
        }
        if (!value)
            fail("option '%s': its value is missing, see --help", word);
        else if (strcmp(word, "--tests") == 0)
            opt.tests = value;
        else if (strcmp(word, "--contract") == 0)
            opt.contract = value;
        else if (strcmp(word, "--way") == 0)
            opt.way = value;
        else if (strcmp(word, "--tokens") == 0)
            opt.lengths = numbers(word, value, opt.tokens);
        else if (strcmp(word, "--cached") == 0)
            opt.caches = numbers(word, value, opt.cached);
        else if (strcmp(word, "--seconds") == 0)
            opt.seconds = atof(value);
        else if (strcmp(word, "--input") == 0 && opt.inputs < MAX_LIST)
            opt.input[opt.inputs++] = value;
        else
            fail("option '%s': unknown, see --help", word);
    }
}

/* A file's name without folder and ending. */
static void bare_name(const char *path, char *name, size_t size)
{
    const char *slash = strrchr(path, '/');
    snprintf(name, size, "%s", slash ? slash + 1 : path);
    name[strcspn(name, ".")] = 0;
}

int main(int count, char **words)
{
    static way list[MAX_SUBJECTS];
    const measure_device device = measure_describe();
    measure_text t = {NULL, 0, 0};
    int n;
    parse(count, words);
    kernel_request();
    n = ways(list);
    measure_add(&t, "{\"bench\":\"device\",\"device\":");
    measure_device_json(&t, &device);
    measure_add(&t, ",\"toolchain\":");
    measure_string(&t, device.compiler);
    measure_print(&t);
    for (int i = 0; i < opt.lengths && word_in(opt.tests, "speed"); i++)
        speed_at(list, n, opt.tokens[i]);
    for (int i = 0; i < n && word_in(opt.tests, "error"); i++) {
        error_at(&list[i], 1000, 3);
        error_at(&list[i], 1000, 10);
        error_at(&list[i], 1000, 40);
    }
    if (word_in(opt.tests, "decode"))
        decode(list, n);
    for (int i = 0; i < n && word_in(opt.tests, "backward"); i++)
        if (list[i].variant->backward)
            backward(&list[i]);
    for (int i = 0; i < n && word_in(opt.tests, "patterns"); i++)
        if (list[i].kernel->op == SPARSE)
            patterns(&list[i]);
    for (int i = 0; i < n && word_in(opt.tests, "splits"); i++)
        splits(&list[i]);
    for (int f = 0; f < opt.inputs && word_in(opt.tests, "input"); f++) {
        char name[64];
        input in = input_read(opt.input[f]);
        bare_name(opt.input[f], name, sizeof name);
        for (int i = 0; i < n; i++)
            real_input(&list[i], &in, name);
        free(in.q);
        free(in.k);
        free(in.v);
        free(in.exact[0]);
        free(in.exact[1]);
    }
    for (int i = 0; i < n; i++) {
        free(list[i].projection);
        free(list[i].w);
    }
    return 0;
}
