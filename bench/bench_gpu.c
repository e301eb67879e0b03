/* The bench of a GPU: what its memory and its matrix units give, and how long the shipped variants take, whole
 * sequences and decode. One JSON object per line.
 *
 *     nvcc -O2 -arch=native *.c *.cu -o bench_gpu -lm && ./bench_gpu --tokens 1024,16384
 */
#define _POSIX_C_SOURCE 200809L

#define PROGRAM "bench_gpu"
#include "kernel.h"
#include "device.h"
#include "measure.h"

enum { MAX_LENGTHS = 16, MAX_SAMPLES = 15, MIN_SAMPLES = 3, SETS = 4, ROWS = 2048, CACHED = 4096 };
static const double SAMPLE_SECONDS = 0.003; /* at least */
static const double POINT_SECONDS = 0.080;  /* all samples, if the fewest take no longer */
static const double LONGEST = 2.0;          /* launches that would take longer are left out */

static int64_t tokens[MAX_LENGTHS] = {1024, 4096}, heads = 32, decode_heads = 1024;
static int lengths = 2;

/* One call, over and over; decode goes through several states, which together exceed the cache. */
typedef struct subject {
    const kernel *kernel;
    const nf_variant *variant;
    nf_args args;
    nf_pattern pattern;
    void *workspace, *states[SETS], *tensors[4];
    size_t bytes;
    int decode, next, launches, samples;
    double sample[MAX_SAMPLES]; /* seconds per launch */
} subject;

static void launch(void *on)
{
    subject *s = (subject *)on;
    for (int i = 0; i < s->launches; i++) {
        nf_status status;
        s->args.state = s->states[s->next];
        s->next = (s->next + 1) % SETS;
        status = (s->decode ? s->variant->decode : s->variant->forward)(&s->args, s->workspace, s->bytes);
        if (status != NF_OK)
            fail("%s: %s", s->variant->name, nf_status_text(status));
    }
}

/* Median seconds per launch. */
static double measure(subject *s)
{
    double once;
    int count;
    s->launches = 1;
    device_time(launch, s);
    once = device_time(launch, s);
    s->launches = 1 + (int)(SAMPLE_SECONDS / once);
    count = (int)(POINT_SECONDS / (once * s->launches));
    count = count < MIN_SAMPLES ? MIN_SAMPLES : count > MAX_SAMPLES ? MAX_SAMPLES : count;
    for (s->samples = 0; s->samples < count; s->samples++)
        s->sample[s->samples] = device_time(launch, s) / s->launches;
    return measure_median(s->sample, s->samples);
}

/* Queries and cached keys of so many heads on the device; `data` is repeated. */
static subject subject_new(const kernel *k, const nf_variant *v, const arrays *data, const void *projection,
                           int64_t head_count, int64_t queries, int64_t keys)
{
    static const char zero[4] = {0};
    const size_t element = kernel_element(k), some = ROWS * element;
    const size_t q = (size_t)(queries * head_count) * element, kv = (size_t)(keys * head_count) * element;
    const size_t d = (size_t)k->d, wide = (size_t)k->v;
    subject s;
    memset(&s, 0, sizeof s);
    s.kernel = k;
    s.variant = v;
    s.bytes = k->workspace(NULL);
    s.workspace = device_new(s.bytes, zero, sizeof zero);
    s.tensors[0] = device_new(q * d, data->of_q, some * d);
    s.tensors[1] = device_new(kv * d, data->of_k, some * d);
    s.tensors[2] = device_new(kv * wide, data->of_v, some * wide);
    s.tensors[3] = device_new(q * wide, zero, sizeof zero);
    s.args = kernel_args(k, 1, queries, head_count, s.tensors[0], s.tensors[1], s.tensors[2], s.tensors[3], projection);
    s.args.kv_tokens = keys;
    return s;
}

/* The pattern of the measurements: kernel.h's window, and four globals. Last, as the subject must stay where it is. */
static void subject_place(subject *s)
{
    s->pattern = s->kernel->pattern;
    s->pattern.globals = 4;
    if (s->kernel->b)
        s->args.pattern = &s->pattern;
    s->args = device_args(&s->args);
    if (s->kernel->b)
        s->args.pattern = &s->pattern; /* it has no lists that the device would need */
}

static void subject_free(subject *s)
{
    for (int i = 0; i < 4; i++)
        device_delete(s->tensors[i]);
    for (int i = 0; i < SETS; i++)
        device_delete(s->states[i]);
    device_delete(s->workspace);
}

/* ---- lines ----------------------------------------------------------------------------------------------------- */

/* Times are nanoseconds per token and head. */
static measure_text line_new(const char *bench, subject *s, double median)
{
    const kernel *k = s->kernel;
    const double rows = (double)(s->args.heads * s->args.q_tokens) * 1e-9;
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"bench\":\"%s\",\"contract\":\"%s\",\"variant\":\"%s\",\"target\":\"%s\",\"heads\":%lld", bench,
                k->contract, kernel_suffix(k, s->variant), s->variant->target, (long long)s->args.heads);
    measure_member(&t, "ns_min", s->sample[0] / rows); /* sorted by the median */
    measure_member(&t, "ns_med", median / rows);
    measure_add(&t, ",\"k\":%d", s->samples);
    return t;
}

/* ---- what is measured ------------------------------------------------------------------------------------------ */

/* Causal forward at every length that does not take too long. */
static void speed(const kernel *k, const nf_variant *v, const arrays *data, const void *projection, double ceiling)
{
    double median = 0, growth = 1;
    for (int i = 0; i < lengths && median * growth < LONGEST; i++) {
        const double flops = kernel_flops(k, kernel_suffix(k, v), tokens[i]) * (double)(heads * tokens[i]);
        subject s = subject_new(k, v, data, projection, heads, tokens[i], tokens[i]);
        measure_text t;
        subject_place(&s);
        median = measure(&s);
        t = line_new("speed", &s, median);
        measure_add(&t, ",\"tokens\":%lld", (long long)tokens[i]);
        measure_member(&t, "tflops", 1e-12 * flops / median);
        measure_member(&t, "percent", 1e2 * flops / median / ceiling);
        measure_print(&t);
        subject_free(&s);
        growth = i + 1 < lengths ? pow((double)tokens[i + 1] / (double)tokens[i], k->op == EXACT ? 2 : 1) : 1;
    }
}

/* One new token per head, against states (or CACHED keys): against what a copy moves in the time. */
static void decode(const kernel *k, const nf_variant *v, const arrays *data, const void *projection, double ceiling)
{
    static const char zero[4] = {0};
    const int64_t keys = kernel_stateful(k) ? 1 : CACHED;
    double bytes = (double)(decode_heads * keys * (k->d + k->v)) * (double)kernel_element(k), median;
    subject s = subject_new(k, v, data, projection, decode_heads, 1, keys);
    measure_text t;
    s.decode = 1;
    subject_place(&s);
    for (int i = 0; i < SETS && kernel_stateful(k); i++) {
        const size_t state = k->state_bytes(&s.args);
        s.args.state = s.states[i] = device_new(state, zero, sizeof zero);
        if (k->state_reset(&s.args) != NF_OK)
            fail("%s: state_reset failed", k->name);
        bytes = 2.0 * (double)state; /* read and written */
    }
    median = measure(&s);
    t = line_new("decode", &s, median);
    measure_add(&t, ",\"cached\":%lld", (long long)(kernel_stateful(k) ? 0 : CACHED));
    measure_member(&t, "gbs", 1e-9 * bytes / median);
    measure_member(&t, "percent", 1e2 * bytes / median / ceiling);
    measure_print(&t);
    subject_free(&s);
}

static void ceiling_line(const char *what, double value)
{
    measure_text t = {NULL, 0, 0};
    measure_add(&t, "{\"bench\":\"ceiling\",\"what\":\"%s\"", what);
    measure_member(&t, "value", value);
    measure_print(&t);
}

/* ---- command line ---------------------------------------------------------------------------------------------- */

static int64_t number(const char *option, const char *text, char **end)
{
    const long long x = text ? strtoll(text, end, 10) : 0;
    if (!text || *end == text || (**end && **end != ',') || x < 1 || x > 1 << 20)
        fail("option %s = '%s': must be whole numbers from 1 to 1048576, separated by commas", option, text);
    return (int64_t)x;
}

static void parse(int count, char **words)
{
    for (int i = 1; i < count; i += 2) {
        char *at = i + 1 < count ? words[i + 1] : NULL, *end = NULL;
        if (strcmp(words[i], "--heads") == 0 && at) {
            heads = number(words[i], at, &end);
        } else if (strcmp(words[i], "--decode-heads") == 0 && at) {
            decode_heads = number(words[i], at, &end);
        } else if (strcmp(words[i], "--tokens") == 0 && at) {
            for (lengths = 0; lengths < MAX_LENGTHS && at; lengths++, at = *end ? end + 1 : NULL)
                tokens[lengths] = number(words[i], at, &end);
        } else {
            fail("option '%s': unknown or without its value: [--tokens N,...] [--heads N] [--decode-heads N]",
                 words[i]);
        }
    }
}

int main(int count, char **words)
{
    measure_device device;
    const char *none = device_describe(&device);
    measure_text t = {NULL, 0, 0};
    double copied, products;
    parse(count, words);
    if (none) {
        fprintf(stderr, PROGRAM ": no GPU here: %s\n", none);
        return 1;
    }
    measure_add(&t, "{\"bench\":\"device\",\"device\":");
    measure_device_json(&t, &device);
    measure_add(&t, ",\"toolchain\":");
    measure_string(&t, device.compiler);
    measure_print(&t);
    copied = device_copy_rate();
    products = device_product_rate(device.units);
    ceiling_line("copy, GB/s", 1e-9 * copied);
    ceiling_line("bf16 products, TFLOP/s", 1e-12 * products);
    for (int i = 0; i < KERNELS; i++) {
        const kernel *k = &kernel_table[i];
        const int entry = kernel_default(k);
        float *w;
        void *projection = kernel_projection(k, 1, &w), *there;
        arrays data;
        int32_t variants;
        if (entry < 0)
            continue;
        data = arrays_new(k, ORACLE_CONSTANT, ROWS, ROWS, 3, 5);
        there = projection ? device_new(k->projection_bytes(), projection, k->projection_bytes()) : NULL;
        speed(k, &k->variants(&variants)[entry], &data, there, products);
        if (!kernel_full_only(k))
            decode(k, &k->variants(&variants)[entry], &data, there, copied);
        arrays_free(&data);
        device_delete(there);
        free(projection);
        free(w);
    }
    return 0;
}
