/* The exam that every candidate sits before it is timed: hostile inputs against the fp64 oracle, in memory that notices
 * every stray access. POSIX. */
#ifndef VERIFY_H
#define VERIFY_H

#include "device.h"
#include "kernel.h"

#include <sys/mman.h>
#include <unistd.h>

/* ---- fenced memory: a page that cannot be touched follows it, and canaries fill what surrounds the data -------- */

enum { CANARY = 0xc5, GAP = 256 };

typedef struct fence {
    unsigned char *base, *data;
    size_t room, bytes;
} fence;

static fence fence_new(size_t most)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    fence f;
    void *p;
    f.room = (most + 2 * GAP + page - 1) / page * page;
    p = mmap(NULL, f.room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (p == MAP_FAILED || mprotect((char *)p + f.room, page, PROT_NONE) != 0)
        fail("out of memory: %zu bytes", f.room);
    f.base = (unsigned char *)p;
    f.data = f.base + f.room;
    f.bytes = 0;
    memset(f.base, CANARY, f.room);
    device_mirror(f.base, f.room);
    return f;
}

/* Place `bytes` in the fence: gap 0 ends them at the forbidden page, GAP leaves canaries behind them too. */
static void *fence_place(fence *f, size_t bytes, size_t gap)
{
    memset(f->base, CANARY, f->room);
    f->data = f->base + f->room - gap - bytes;
    f->bytes = bytes;
    memset(f->data, 0xff, bytes); /* NaN in every float */
    return f->data;
}

static void *fence_copy(fence *f, const void *from, size_t bytes)
{
    void *p = fence_place(f, bytes, 0);
    if (bytes)
        memcpy(p, from, bytes);
    return p;
}

static int fence_broken(const fence *f)
{
    for (const unsigned char *p = f->base; p < f->data; p++)
        if (*p != CANARY)
            return 1;
    for (const unsigned char *p = f->data + f->bytes; p < f->base + f->room; p++)
        if (*p != CANARY)
            return 1;
    return 0;
}

/* ---- the exam: inputs and what the oracle says about them ------------------------------------------------------ */

enum { EXAM_TOKENS = 300, EXAM_HEADS = 2, EXAM_LENGTHS = 32 };

typedef struct topic {
    const char *name;
    oracle_kind kind;
    double norm;  /* of q' and k' */
    double bound; /* on |out - ref|_2 / max |v|_2, over the rows; see oracle_row_scale */
} topic;

/* The bounds are twice those that kernels promise: a candidate must not fail by an unlucky rounding, and what is wrong
 * misses them by far. */
static const topic questions[] = {
    {"norm 0.5", ORACLE_CONSTANT, 0.5, 2e-5},   {"norm 2", ORACLE_CONSTANT, 2, 2e-5},
    {"norm 10", ORACLE_CONSTANT, 10, 2e-5},     {"norm 40", ORACLE_CONSTANT, 40, 1e-4},
    {"whole numbers", ORACLE_INTEGER, 8, 2e-5}, {"mixed norms", ORACLE_MIXED, 40, 1e-4},
    {"q near -k", ORACLE_OPPOSITE, 40, 1e-4},   {"large first", ORACLE_EARLY, 40, 1e-4},
};
enum { QUESTIONS = sizeof questions / sizeof *questions };

/* What rounding the output adds to the bounds; of bf16 also that of features and weights, where a target rounds them.
 * By the dtypes of kernel.h. */
static const double rounding[] = {0, 1.6e-2, 1e-3};

/* out [EXAM_HEADS][tokens][v], lse and cancellation [EXAM_HEADS][tokens] of one call with as many queries as keys. */
typedef struct solution {
    double *out, *lse, *ratio;
} solution;

/* Two query heads share one kv head: q [token][2][d], k and v [token][1][d]. */
typedef struct exam {
    const kernel *kernel;
    void *projection;
    nf_pattern pattern; /* small enough for the exam's lengths */
    float *w;
    arrays in[QUESTIONS];
    int lengths;
    int64_t length[EXAM_LENGTHS]; /* of the full mask */
    double v_norm[QUESTIONS];
    solution causal[QUESTIONS]; /* its first n rows are the answer for n tokens */
    solution full[QUESTIONS][EXAM_LENGTHS];
} exam;

static solution exam_solve(const exam *e, int question, int64_t tokens, int full)
{
    const int d = e->kernel->v;
    solution a = {oracle_doubles((size_t)(EXAM_HEADS * tokens * d)), oracle_doubles((size_t)(EXAM_HEADS * tokens)),
                  oracle_doubles((size_t)(EXAM_HEADS * tokens))};
    for (int h = 0; h < EXAM_HEADS; h++) {
        oracle_head head = kernel_head(e->kernel, tokens, EXAM_HEADS, 1, h, e->in[question].q, e->in[question].k,
                                       e->in[question].v, e->w);
        head.full = full;
        kernel_oracle(e->kernel, &e->pattern, &head, a.out + h * tokens * d, a.lse + h * tokens);
        oracle_cancellation(&head, a.lse + h * tokens, a.ratio + h * tokens);
    }
    return a;
}

static int exam_find(const exam *e, int64_t tokens)
{
    int i = 0;
    while (i < e->lengths && e->length[i] != tokens)
        i++;
    return i;
}

static void exam_length(exam *e, int64_t tokens)
{
    const int i = exam_find(e, tokens);
    if (i == e->lengths && i < EXAM_LENGTHS && tokens <= EXAM_TOKENS) {
        e->length[i] = tokens;
        e->lengths++;
    }
}

/* Inputs, and answers for the lengths around every candidate's chunk. */
static exam *exam_new(const kernel *k, uint64_t seed)
{
    exam *e = (exam *)calloc(1, sizeof *e);
    int32_t count;
    const nf_variant *v = k->variants(&count);
    if (!e)
        fail("out of memory");
    e->kernel = k;
    e->pattern = k->pattern;
    e->pattern.window = k->op == HYBRID ? k->b : 70;
    e->pattern.globals = 3;
    e->projection = kernel_projection(k, seed, &e->w);
    exam_length(e, 0);
    exam_length(e, 1);
    exam_length(e, EXAM_TOKENS);
    for (int32_t i = 0; i < count; i++)
        for (int64_t c = kernel_chunk(kernel_suffix(k, &v[i])), n = c - 1; n <= c + 1; n++)
            exam_length(e, n);
    for (int i = 0; i < QUESTIONS; i++) {
        oracle_head head;
        e->in[i] = arrays_new(k, questions[i].kind, EXAM_TOKENS * EXAM_HEADS, EXAM_TOKENS, questions[i].norm,
                              seed + (uint64_t)i);
        head = kernel_head(k, EXAM_TOKENS, 1, 1, 0, e->in[i].q, e->in[i].k, e->in[i].v, NULL);
        e->v_norm[i] = oracle_v_norm(&head);
        e->causal[i] = exam_solve(e, i, EXAM_TOKENS, 0);
        for (int n = 0; n < e->lengths && k->op != HYBRID; n++)
            e->full[i][n] = exam_solve(e, i, e->length[n], 1);
    }
    return e;
}

static void exam_free(exam *e)
{
    for (int i = 0; i < QUESTIONS; i++) {
        arrays_free(&e->in[i]);
        free(e->causal[i].out);
        free(e->causal[i].lse);
        free(e->causal[i].ratio);
        for (int n = 0; n < e->lengths; n++) {
            free(e->full[i][n].out);
            free(e->full[i][n].lse);
            free(e->full[i][n].ratio);
        }
    }
    free(e->projection);
    free(e->w);
    free(e);
}

/* ---- a candidate sits the exam ------------------------------------------------------------------- */

typedef struct pupil {
    const exam *exam;
    const nf_variant *variant;
    fence q, k, v, out, lse, workspace, state, projection;
    double err;   /* the largest so far */
    char why[96]; /* what was wrong; empty: nothing yet */
} pupil;

__attribute__((format(printf, 2, 3))) static void blame(pupil *p, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    if (!p->why[0])
        vsnprintf(p->why, sizeof p->why, format, list);
    va_end(list);
}

/* Rows [first, first + tokens) of an answer of `all` tokens against what the call left in out and lse. */
static void compare(pupil *p, int question, const solution *a, int64_t all, int64_t first, int64_t tokens,
                    const char *what)
{
    const kernel *k = p->exam->kernel;
    const int d = k->v;
    const topic *asked = &questions[question];
    const double bound = asked->bound + rounding[k->dtype];
    float *out = kernel_unpack(k, p->out.data, EXAM_HEADS * tokens * d);
    const float *lse = (const float *)(const void *)p->lse.data;
    for (int64_t h = 0; h < EXAM_HEADS; h++) {
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t row = h * all + first + t;
            const oracle_error e = oracle_compare(out + (t * EXAM_HEADS + h) * d, 0, a->out + row * d, 1, d);
            const double error =
                e.length / oracle_row_scale(a->out + row * d, d, a->ratio[row], p->exam->v_norm[question]);
            const double off = fabs((double)lse[h * tokens + t] - a->lse[row]) / a->ratio[row];
            const double lse_bound = k->op == LINEAR ? 1e-4 * fabs(a->lse[row]) : 2e-6 * asked->norm * asked->norm;
            if (error > p->err)
                p->err = error;
            if (!(error <= bound))
                blame(p, "%s, %s: error %.1e at token %lld", what, asked->name, error, (long long)(first + t));
            if (!(off <= 2e-5 + 2 * rounding[k->dtype] + lse_bound))
                blame(p, "%s, %s: lse off by %.1e at token %lld", what, asked->name, off, (long long)(first + t));
        }
    }
    free(out);
}

/* The arguments of a call with queries [first, last) and keys [keys, last) of a question. */
static nf_args lay_out(pupil *p, int question, int64_t keys, int64_t first, int64_t last, int mask)
{
    const exam *e = p->exam;
    const int64_t d = e->kernel->d, queries = last - first;
    const size_t element = kernel_element(e->kernel), row = (size_t)d * element;
    const size_t v_row = (size_t)e->kernel->v * element;
    const arrays *in = &e->in[question];
    nf_args a = kernel_args(e->kernel, 1, queries, EXAM_HEADS, NULL, NULL, NULL, NULL, NULL);
    if (e->kernel->b)
        a.pattern = &e->pattern;
    a.kv_heads = 1;
    a.kv_tokens = last - keys;
    a.mask = mask;
    a.q.data = fence_copy(&p->q, (const char *)in->of_q + (size_t)(first * EXAM_HEADS) * row,
                          (size_t)(queries * EXAM_HEADS) * row);
    a.k.data = fence_copy(&p->k, (const char *)in->of_k + (size_t)keys * row, (size_t)(last - keys) * row);
    a.v.data = fence_copy(&p->v, (const char *)in->of_v + (size_t)keys * v_row, (size_t)(last - keys) * v_row);
    a.out.data = fence_place(&p->out, (size_t)(queries * EXAM_HEADS) * v_row, GAP);
    a.lse = (float *)fence_place(&p->lse, (size_t)(queries * EXAM_HEADS) * sizeof(float), GAP);
    if (e->kernel->m)
        a.projection = p->projection.data;
    return a;
}

/* One call; everything that it may not do is noticed. */
static void call(pupil *p, int decode, const nf_args *a, int question, int64_t keys, int64_t first, const char *what)
{
    const kernel *k = p->exam->kernel;
    const arrays *in = &p->exam->in[question];
    const size_t bytes = k->workspace(NULL), element = kernel_element(k);
    void *workspace = fence_place(&p->workspace, bytes, GAP);
    const char *trouble, *name = questions[question].name;
    const nf_status status =
        device_call(decode ? p->variant->decode : p->variant->forward, a, workspace, bytes, &trouble);
    const struct {
        const char *name;
        const fence *at;
    } fences[] = {{"q", &p->q},     {"k", &p->k},     {"v", &p->v},
                  {"out", &p->out}, {"lse", &p->lse}, {"the workspace", &p->workspace}};
    if (status != NF_OK)
        blame(p, "%s, %s: %s", what, name, nf_status_text(status));
    if (trouble)
        blame(p, "%s, %s: %s", what, name, trouble);
    for (int i = 0; i < 6; i++)
        if (fence_broken(fences[i].at))
            blame(p, "%s, %s: wrote outside %s", what, name, fences[i].name);
    if ((kernel_stateful(k) && fence_broken(&p->state)) || (k->m && fence_broken(&p->projection)))
        blame(p, "%s, %s: wrote outside the state or the projection", what, name);
    if (memcmp(p->q.data, (const char *)in->of_q + (size_t)(first * EXAM_HEADS * k->d) * element, p->q.bytes) != 0 ||
        memcmp(p->k.data, (const char *)in->of_k + (size_t)(keys * k->d) * element, p->k.bytes) != 0 ||
        memcmp(p->v.data, (const char *)in->of_v + (size_t)(keys * k->v) * element, p->v.bytes) != 0)
        blame(p, "%s, %s: changed its input", what, name);
}

static void try_forward(pupil *p, int question, int64_t tokens)
{
    const exam *e = p->exam;
    char what[48];
    nf_args a;
    if (!kernel_full_only(e->kernel)) {
        a = lay_out(p, question, 0, 0, tokens, NF_CAUSAL);
        snprintf(what, sizeof what, "causal, %lld tokens", (long long)tokens);
        call(p, 0, &a, question, 0, 0, what);
        compare(p, question, &e->causal[question], EXAM_TOKENS, 0, tokens, what);
    }
    if (e->kernel->op == HYBRID) /* causal only */
        return;
    a = lay_out(p, question, 0, 0, tokens, NF_FULL);
    snprintf(what, sizeof what, "full, %lld tokens", (long long)tokens);
    call(p, 0, &a, question, 0, 0, what);
    compare(p, question, &e->full[question][exam_find(e, tokens)], tokens, 0, tokens, what);
}

/* Prefill in two pieces, then decode against the state, token by token and two at once. */
static void try_state(pupil *p, int question)
{
    static const int64_t cuts[] = {0, 33, 200, 201, 202, 204};
    const kernel *k = p->exam->kernel;
    nf_args a = lay_out(p, question, 0, 0, cuts[1], NF_CAUSAL);
    void *state = fence_place(&p->state, k->state_bytes(&a), GAP);
    nf_args there;
    a.state = state;
    there = device_args(&a);
    if (k->state_reset(&there) != NF_OK || device_fetch())
        blame(p, "state_reset failed");
    for (int i = 0; i + 1 < (int)(sizeof cuts / sizeof *cuts); i++) {
        const char *what = i < 2 ? "prefill" : "decode";
        a = lay_out(p, question, cuts[i], cuts[i], cuts[i + 1], NF_CAUSAL);
        a.state = state;
        call(p, i >= 2, &a, question, cuts[i], cuts[i], what);
        compare(p, question, &p->exam->causal[question], EXAM_TOKENS, cuts[i], cuts[i + 1] - cuts[i], what);
    }
}

/* A few new queries against cached keys. */
static void try_cache(pupil *p, int question)
{
    static const int64_t cases[][2] = {{0, 1}, {32, 33}, {64, 67}, {EXAM_TOKENS - 1, EXAM_TOKENS}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        nf_args a = lay_out(p, question, 0, cases[i][0], cases[i][1], NF_CAUSAL);
        call(p, 1, &a, question, 0, cases[i][0], "decode");
        compare(p, question, &p->exam->causal[question], EXAM_TOKENS, cases[i][0], cases[i][1] - cases[i][0], "decode");
    }
}

static void pupil_new(pupil *p, const exam *e, const nf_variant *v)
{
    const kernel *k = e->kernel;
    const size_t rows = EXAM_TOKENS * (size_t)(k->d > k->v ? k->d : k->v) * kernel_element(k);
    nf_args a = kernel_args(k, 1, 1, 1, NULL, NULL, NULL, NULL, e->projection);
    if (k->b)
        a.pattern = &e->pattern;
    memset(p, 0, sizeof *p);
    p->exam = e;
    p->variant = v;
    p->q = fence_new(EXAM_HEADS * rows);
    p->k = fence_new(rows);
    p->v = fence_new(rows);
    p->out = fence_new(EXAM_HEADS * rows);
    p->lse = fence_new(EXAM_HEADS * EXAM_TOKENS * sizeof(float));
    p->workspace = fence_new(k->workspace(NULL));
    if (kernel_stateful(k))
        p->state = fence_new(k->state_bytes(&a));
    if (k->m) {
        p->projection = fence_new(k->projection_bytes());
        fence_copy(&p->projection, e->projection, k->projection_bytes());
    }
}

/* Sit the exam; p->why stays empty when everything is right. */
static void sit(pupil *p)
{
    const int64_t c = kernel_chunk(kernel_suffix(p->exam->kernel, p->variant));
    const int64_t lengths[] = {0, 1, c - 1, c, c + 1, EXAM_TOKENS};
    for (int i = 0; i < QUESTIONS && !p->why[0]; i++) {
        for (int n = 0; n < 6; n++)
            if (lengths[n] <= EXAM_TOKENS && exam_find(p->exam, lengths[n]) < p->exam->lengths)
                try_forward(p, i, lengths[n]);
        if (kernel_stateful(p->exam->kernel) && !kernel_full_only(p->exam->kernel))
            try_state(p, i);
        if (!p->exam->kernel->m && p->exam->kernel->op != LINEAR)
            try_cache(p, i);
    }
}

#endif /* VERIFY_H */
