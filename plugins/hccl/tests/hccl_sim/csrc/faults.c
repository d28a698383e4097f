/* Fault injection, counters and what tests may ask; none of this exists in the real libraries. */
#define _GNU_SOURCE
#include "sim.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_RULES = 64, MAX_SYMBOLS = 64, MAX_TEXT = 4096 };

typedef struct {
    char symbol[64];
    int first, last; /* calls, from 1, counted from when the rule was made */
    int seen;
    int32_t code;
    bool after; /* the call has its effect, and fails all the same */
    int delay_ms;
} Rule;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Rule rules[MAX_RULES];
static int rule_count;
static struct { char symbol[64]; long calls; } calls[MAX_SYMBOLS];
static char violations[MAX_TEXT];
static __thread char recent[512];
static __thread bool recent_set;
static __thread int32_t pending_code;

_Atomic int sim_task_delay_ms, sim_stuck, sim_peer_code = 507057;
static _Atomic int delayed, may_go_on;
_Atomic long sim_live_count[LIVE_KINDS];

double sim_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void sim_sleep(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

const char *sim_setting(const char *name, const char *fallback) {
    const char *value = getenv(name);
    return value && *value ? value : fallback;
}

int sim_number(const char *name, int fallback) {
    const char *value = getenv(name);
    return value && *value ? atoi(value) : fallback;
}

static void count_call(const char *symbol) {
    for (int i = 0; i < MAX_SYMBOLS; i++) {
        if (!calls[i].symbol[0]) snprintf(calls[i].symbol, sizeof calls[i].symbol, "%s", symbol);
        if (strcmp(calls[i].symbol, symbol) == 0) {
            calls[i].calls++;
            return;
        }
    }
}

/* Until the time is over, or a test has seen it and lets it go on. */
static void take_long(int delay_ms) {
    delayed++;
    double until = sim_now() + delay_ms / 1000.0;
    while (sim_now() < until && !may_go_on) sim_sleep(0.001);
    delayed--;
}

int32_t sim_enter(const char *symbol) {
    int32_t code = 0;
    int delay = 0;
    pthread_mutex_lock(&lock);
    count_call(symbol);
    pending_code = 0;
    for (int i = 0; i < rule_count; i++) {
        Rule *rule = &rules[i];
        if (strcmp(rule->symbol, symbol) != 0) continue;
        rule->seen++;
        if (rule->seen < rule->first || rule->seen > rule->last) continue;
        delay += rule->delay_ms;
        if (rule->after) pending_code = rule->code;
        else if (rule->code) code = rule->code;
    }
    pthread_mutex_unlock(&lock);
    if (delay) take_long(delay);
    return code ? sim_error(code, "injected fault in %s", symbol) : 0;
}

int32_t sim_leave(const char *symbol, int32_t result) {
    if (result || !pending_code) return result;
    return sim_error(pending_code, "injected fault after %s", symbol);
}

int32_t sim_error(int32_t code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(recent, sizeof recent, format, list);
    va_end(list);
    recent_set = true;
    return code;
}

void sim_violation(const char *format, ...) {
    va_list list;
    char text[512];
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    pthread_mutex_lock(&lock);
    if (strlen(violations) + strlen(text) + 2 < sizeof violations) {
        strcat(violations, text);
        strcat(violations, "\n");
    }
    pthread_mutex_unlock(&lock);
}

void sim_crash(const char *format, ...) {
    va_list list;
    fputs("simulator: ", stderr);
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputs("\n", stderr);
    abort();
}

EXPORT const char *aclGetRecentErrMsg(void) {
    static __thread char given[512];
    if (!recent_set) return NULL;
    recent_set = false;
    memcpy(given, recent, sizeof given);
    return given;
}

/* -- for tests ---------------------------------------------------------------------------------- */

EXPORT void sim_fault(const char *symbol, int first, int last, int32_t code, int after, int delay) {
    pthread_mutex_lock(&lock);
    if (rule_count < MAX_RULES) {
        Rule *rule = &rules[rule_count++];
        memset(rule, 0, sizeof *rule);
        snprintf(rule->symbol, sizeof rule->symbol, "%s", symbol);
        rule->first = first, rule->last = last, rule->code = code;
        rule->after = after, rule->delay_ms = delay;
    }
    pthread_mutex_unlock(&lock);
}

EXPORT int sim_delayed(void) { return delayed; }
EXPORT void sim_let_go(void) { may_go_on = 1; }

EXPORT void sim_clear(void) {
    pthread_mutex_lock(&lock);
    rule_count = 0;
    pthread_mutex_unlock(&lock);
    may_go_on = 0;
    sim_task_delay_ms = 0;
    sim_stuck = 0;
    sim_peer_code = 507057;
}

EXPORT void sim_set_tasks(int delay_ms, int stuck) {
    sim_task_delay_ms = delay_ms;
    sim_stuck = stuck;
}
EXPORT void sim_set_peer_code(int code) { sim_peer_code = code; }
EXPORT long sim_live(int kind) { return sim_live_count[kind]; }

EXPORT long sim_calls(const char *symbol) {
    long found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_SYMBOLS; i++)
        if (strcmp(calls[i].symbol, symbol) == 0) found = calls[i].calls;
    pthread_mutex_unlock(&lock);
    return found;
}

EXPORT void sim_violations(char *text, size_t size) {
    pthread_mutex_lock(&lock);
    snprintf(text, size, "%s", violations);
    pthread_mutex_unlock(&lock);
}
