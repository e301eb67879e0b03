/* The frame of a test file: Criterion, or with -DNO_CRITERION a stand-in of the same words, so that the very same tests
 * also run under emulators, sanitizers and odd compiler flags where Criterion does not. */
#ifndef CHECK_H
#define CHECK_H

#ifndef NO_CRITERION
#include <criterion/criterion.h>

#define CHECK(condition, ...) cr_assert(condition, __VA_ARGS__)

#else
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

typedef struct check_case {
    const char *name;
    void (*run)(void);
    struct check_case *next;
} check_case;

static check_case *check_cases;
static jmp_buf check_failed;

#define Test(suite, test) \
    static void suite##_##test(void); \
    static check_case suite##_##test##_case = {#suite "::" #test, suite##_##test, NULL}; \
    __attribute__((constructor)) static void suite##_##test##_enter(void) \
    { \
        suite##_##test##_case.next = check_cases; \
        check_cases = &suite##_##test##_case; \
    } \
    static void suite##_##test(void)

/* The first failure ends its test. */
#define CHECK(condition, ...) \
    do { \
        if (!(condition)) { \
            printf("%s:%d: %s\n  ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__); \
            printf("\n"); \
            longjmp(check_failed, 1); \
        } \
    } while (0)

/* Run the tests whose name contains the argument; all without one. */
int main(int argc, char **argv)
{
    static const check_case *c; /* static: what longjmp leaves alone */
    static int failures;
    for (c = check_cases; c; c = c->next) {
        if (argc > 1 && !strstr(c->name, argv[1]))
            continue;
        printf("%s\n", c->name);
        fflush(stdout);
        if (setjmp(check_failed) == 0)
            c->run();
        else
            failures++;
    }
    return failures != 0;
}
#endif
#endif
