/* What tuner and bench measure with: clock, FMA peak, device description, statistics, JSON strings. POSIX, C99. */
#ifndef MEASURE_H
#define MEASURE_H

#include "device.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define MEASURE_X86 1
#include <immintrin.h>
#elif defined(__ARM_NEON)
#define MEASURE_NEON 1
#include <arm_neon.h>
#endif

#define MEASURE_FN static inline __attribute__((unused))

/* ---- clock and statistics -------------------------------------------------------------------------------------- */

/* Seconds on a clock that never runs backwards. */
MEASURE_FN double measure_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds that this thread has run: what its work costs, however busy the machine is with others. On an idle machine
 * the difference of two readings is that of measure_now. */
MEASURE_FN double measure_work(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

MEASURE_FN int measure_order(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The quantile p of n samples, interpolated; leaves them sorted. */
MEASURE_FN double measure_quantile(double *x, int n, double p)
{
    const double at = p * (double)(n - 1);
    const int i = (int)at;
    if (n < 1)
        return 0;
    qsort(x, (size_t)n, sizeof *x, measure_order);
    return i + 1 < n ? x[i] + (at - (double)i) * (x[i + 1] - x[i]) : x[i];
}

MEASURE_FN double measure_median(double *x, int n)
{
    return measure_quantile(x, n, 0.5);
}

/* Half the width of the 95 % interval of the median, relative to it: the notch of a box plot. */
MEASURE_FN double measure_noise(double *x, int n)
{
    const double spread = measure_quantile(x, n, 0.75) - measure_quantile(x, n, 0.25);
    return n < 3 ? 1 : 1.57 * spread / sqrt((double)n) / measure_median(x, n);
}

/* ---- FMA peak ----------------------------------------------------------------------------------------------------
 * Twelve independent chains of multiply-adds in registers: enough to cover a latency of four cycles on two units and
 * one cycle more, and they fit where there are only sixteen registers. The numbers change sign at every step: operands
 * that stand still draw less power than data does, the clock then runs above what any kernel can have (by up to 40 %
 * with AVX-512), and the peak would be one of a processor doing nothing. */

#define MEASURE_STEPS 20000
#define MEASURE_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define MEASURE_START(i) x##i = SET(seed * (float)(i + 1));
#define MEASURE_STEP(i) x##i = MADD(x##i, a, b);
#define MEASURE_SUM(i) sum = ADD(sum, x##i);
#define MEASURE_BODY(vec) \
    const vec a = SET(-0.97f), b = SET(seed); \
    vec x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, sum = b; \
    MEASURE_CHAINS(MEASURE_START) \
    for (int i = 0; i < MEASURE_STEPS; i++) { \
        MEASURE_CHAINS(MEASURE_STEP) \
    } \
    MEASURE_CHAINS(MEASURE_SUM) \
    memcpy(sink, &sum, sizeof sum); \
    return (int)(sizeof sum / sizeof(float))

#if defined(MEASURE_X86)
#define SET(x) _mm512_set1_ps(x)
#define MADD(x, a, b) _mm512_fmadd_ps(x, a, b)
#define ADD(x, y) _mm512_add_ps(x, y)
__attribute__((target("avx512f"), noinline)) static int measure_chains_avx512(float seed, float *sink)
{
    MEASURE_BODY(__m512);
}
#undef SET
#undef MADD
#undef ADD
#define SET(x) _mm256_set1_ps(x)
#define MADD(x, a, b) _mm256_fmadd_ps(x, a, b)
#define ADD(x, y) _mm256_add_ps(x, y)
__attribute__((target("avx2,fma"), noinline)) static int measure_chains_avx2(float seed, float *sink)
{
    MEASURE_BODY(__m256);
}
#undef SET
#undef MADD
#undef ADD
#elif defined(MEASURE_NEON)
#define SET(x) vdupq_n_f32(x)
#define MADD(x, a, b) vfmaq_f32(b, x, a)
#define ADD(x, y) vaddq_f32(x, y)
__attribute__((noinline)) static int measure_chains_neon(float seed, float *sink)
{
    MEASURE_BODY(float32x4_t);
}
#undef SET
#undef MADD
#undef ADD
#endif

typedef float measure_vec __attribute__((vector_size(16)));
#define SET(x) ((measure_vec){x, x, x, x})
#define MADD(x, a, b) (x * a + b)
#define ADD(x, y) (x + y)
__attribute__((noinline)) static int measure_chains_c(float seed, float *sink)
{
    MEASURE_BODY(measure_vec);
}
#undef SET
#undef MADD
#undef ADD

/* Does this processor have the target? */
MEASURE_FN int measure_has(const char *target)
{
#if defined(MEASURE_X86)
    if (strcmp(target, "avx512") == 0 || strcmp(target, "amx") == 0) /* amx is held against floats */
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (strcmp(target, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(MEASURE_NEON)
    if (strcmp(target, "neon") == 0)
        return 1;
#endif
    return strcmp(target, "c") == 0;
}

/* The widest target of this processor. */
MEASURE_FN const char *measure_target(void)
{
    static const char *const targets[] = {"avx512", "avx2", "neon", "c"};
    int i = 0;
    while (!measure_has(targets[i]))
        i++;
    return targets[i];
}

/* One reading of the peak of a target, in flop per second: about a tenth of a millisecond. Repeat it between the runs
 * that it is compared with, and take the largest. */
MEASURE_FN double measure_peak(const char *target)
{
    float sink[16];
    volatile float keep;
    const double start = measure_now();
    double seconds;
    int lanes;
#if defined(MEASURE_X86)
    if ((strcmp(target, "avx512") == 0 || strcmp(target, "amx") == 0) && measure_has(target))
        lanes = measure_chains_avx512(1.37f, sink);
    else if (strcmp(target, "avx2") == 0 && measure_has(target))
        lanes = measure_chains_avx2(1.37f, sink);
    else
#elif defined(MEASURE_NEON)
    if (strcmp(target, "neon") == 0)
        lanes = measure_chains_neon(1.37f, sink);
    else
#endif
        lanes = measure_chains_c(1.37f, sink);
    seconds = measure_now() - start;
    keep = sink[0];
    (void)keep;
    return 2.0 * 12 * lanes * MEASURE_STEPS / seconds;
}

/* ---- the device ------------------------------------------------------------------------------------------------ */

/* The first line of a small system file, without its newline. */
MEASURE_FN int measure_line(const char *path, char *text, int size)
{
    FILE *f = fopen(path, "r");
    char *got = f ? fgets(text, size, f) : NULL;
    if (f)
        fclose(f);
    if (!got)
        return 0;
    text[strcspn(text, "\n")] = 0;
    return 1;
}

/* Data cache sizes of the first processor, where the system tells them. */
MEASURE_FN void measure_caches(measure_device *d)
{
    for (int i = 0; i < 8; i++) {
        char path[96], level[16], type[32], size[32], *unit;
        long bytes;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        if (!measure_line(path, level, sizeof level))
            return;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/type", i);
        if (!measure_line(path, type, sizeof type) || strcmp(type, "Instruction") == 0)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        if (!measure_line(path, size, sizeof size))
            continue;
        bytes = strtol(size, &unit, 10) * (*unit == 'K' ? 1024L : *unit == 'M' ? 1048576L : 1L);
        *(level[0] == '1' ? &d->l1d : level[0] == '2' ? &d->l2 : &d->l3) = bytes;
    }
}

/* "key : value" of /proc/cpuinfo into value where the key is wanted. */
MEASURE_FN int measure_field(const char *line, const char *key, char *value, size_t size)
{
    const char *colon = strchr(line, ':');
    const size_t n = strlen(key);
    if (!colon || strncmp(line, key, n) != 0 || strspn(line + n, " \t") != (size_t)(colon - line) - n)
        return 0;
    colon += 1 + strspn(colon + 1, " \t");
    snprintf(value, size, "%.*s", (int)strcspn(colon, "\n"), colon);
    return 1;
}

MEASURE_FN void measure_cpuinfo(measure_device *d)
{
    char line[512], text[96];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (measure_field(line, "vendor_id", text, sizeof text))
            snprintf(d->vendor, sizeof d->vendor, "%s",
                     strcmp(text, "GenuineIntel") == 0   ? "intel"
                     : strcmp(text, "AuthenticAMD") == 0 ? "amd"
                                                         : "other");
        else if (measure_field(line, "CPU implementer", text, sizeof text))
            snprintf(d->vendor, sizeof d->vendor, "%s", strcmp(text, "0x41") == 0 ? "arm" : "other");
        else if (measure_field(line, "cpu family", text, sizeof text))
            d->family = strtol(text, NULL, 0);
        else if (measure_field(line, "model", text, sizeof text) || measure_field(line, "CPU part", text, sizeof text))
            d->model = strtol(text, NULL, 0);
        else if (measure_field(line, "model name", text, sizeof text))
            snprintf(d->name, sizeof d->name, "%s", text);
        else if (line[0] == '\n')
            break;
    }
    if (f)
        fclose(f);
}

/* The compiler, as a string literal. */
#if defined(__clang__)
#define MEASURE_COMPILER "clang " __clang_version__
#else
#define MEASURE_COMPILER "gcc " __VERSION__
#endif

/* What is known of this machine; never its host name, user or paths. */
MEASURE_FN measure_device measure_describe(void)
{
    measure_device d;
    struct utsname system;
    memset(&d, 0, sizeof d);
    strcpy(d.backend, "cpu");
    strcpy(d.vendor, "unknown");
    snprintf(d.compiler, sizeof d.compiler, "%.60s", MEASURE_COMPILER);
    if (uname(&system) < 0)
        strcpy(system.machine, "unknown");
    snprintf(d.arch, sizeof d.arch, "%.40s/%s", system.machine, measure_target());
    d.units = sysconf(_SC_NPROCESSORS_ONLN);
    measure_cpuinfo(&d);
    measure_caches(&d);
    if (!d.name[0])
        snprintf(d.name, sizeof d.name, "%s family %ld model %ld", d.vendor, d.family, d.model);
    return d;
}

/* ---- JSON ------------------------------------------------------------------------------------------------------ */

/* A growing line of text. */
typedef struct measure_text {
    char *data;
    size_t length, room;
} measure_text;

MEASURE_FN void measure_put(measure_text *t, const char *s, size_t n)
{
    if (t->length + n + 1 > t->room) {
        t->room = 2 * (t->length + n + 1);
        t->data = (char *)realloc(t->data, t->room);
        if (!t->data)
            abort();
    }
    memcpy(t->data + t->length, s, n);
    t->length += n;
    t->data[t->length] = 0;
}

/* Append what printf would print (up to 400 characters). */
#define measure_add(t, ...) \
    do { \
        char measure_part[400]; \
        snprintf(measure_part, sizeof measure_part, __VA_ARGS__); \
        measure_put(t, measure_part, strlen(measure_part)); \
    } while (0)

/* Append a JSON string. */
MEASURE_FN void measure_string(measure_text *t, const char *s)
{
    measure_put(t, "\"", 1);
    for (; *s; s++) {
        const unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            measure_add(t, "\\%c", c);
        else if (c < 32)
            measure_add(t, "\\u%04x", c);
        else
            measure_put(t, s, 1);
    }
    measure_put(t, "\"", 1);
}

/* Append "key":value of a number; JSON knows neither infinity nor NaN: null. */
MEASURE_FN void measure_number(measure_text *t, const char *key, double value)
{
    if (value - value == 0)
        measure_add(t, "\"%s\":%.6g", key, value);
    else
        measure_add(t, "\"%s\":null", key);
}

/* One more number of an object. */
MEASURE_FN void measure_member(measure_text *t, const char *key, double value)
{
    measure_add(t, ",");
    measure_number(t, key, value);
}

/* The object as a line on stdout. */
MEASURE_FN void measure_print(measure_text *t)
{
    printf("%s}\n", t->data);
    fflush(stdout);
    free(t->data);
}

MEASURE_FN void measure_device_json(measure_text *t, const measure_device *d)
{
    measure_add(t, "{\"backend\":\"%s\",\"vendor\":\"%s\",\"arch\":\"%s\",\"name\":", d->backend, d->vendor, d->arch);
    measure_string(t, d->name);
    measure_add(t, ",\"family\":%ld,\"model\":%ld,\"units\":%ld,\"l1d\":%ld,\"l2\":%ld,\"l3\":%ld}", d->family,
                d->model, d->units, d->l1d, d->l2, d->l3);
}

/* ---- device.h on a CPU ----------------------------------------------------------------------------------------- */

#ifndef NF_ON_GPU
MEASURE_FN const char *device_describe(measure_device *d)
{
    *d = measure_describe();
    return NULL;
}

MEASURE_FN double device_time(void (*work)(void *on), void *on)
{
    const double start = measure_work();
    work(on);
    return measure_work() - start;
}
#endif

#endif /* MEASURE_H */
