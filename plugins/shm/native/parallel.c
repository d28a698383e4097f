#define _GNU_SOURCE
#include "parallel.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

enum { STACK = 256 << 10, HELPER_NICE = 10 };

/* One call of in_parallel. */
typedef struct {
    void *(*work)(void *);
    void *argument;
    int wanted;       /* helpers at work, at most */
    int waiters;
    int started;      /* in all, those that have returned included */
    _Atomic int busy; /* that have not returned */
    pthread_t helpers[MAX_THREADS];
} Crew;

static _Thread_local Crew *called; /* by this thread */
static _Thread_local int helping;
static _Thread_local int waiters; /* for this thread, or the one that it helps */

int always_help;

/* A helper that has to wait holds its part of the work back for a time slice of somebody else, which
 * costs more than a helper gains. */
int idle_processors(void)
{
    if (always_help)
        return MAX_THREADS;
    char text[128] = "";
    int running = 1, file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        if (read(file, text, sizeof(text) - 1) <= 0 || sscanf(text, "%*s %*s %*s %d/", &running) != 1)
            running = 1;
        close(file);
    }
    return (int)sysconf(_SC_NPROCESSORS_ONLN) - running + waiters;
}

void expect_waiter(void)
{
    waiters = 1;
}

/* The program's own threads, when they wake up, go before helpers. */
static void *help(void *argument)
{
    Crew *crew = argument;
    (void)setpriority(PRIO_PROCESS, 0, HELPER_NICE); /* of this thread alone, on Linux */
    helping = 1;
    waiters = crew->waiters;
    if (!should_stop())
        crew->work(crew->argument);
    atomic_fetch_sub(&crew->busy, 1);
    return NULL;
}

int start_thread(pthread_t *thread, void *(*work)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's threads */
    int error = pthread_create(thread, &attributes, work, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

int start_detached(void *(*work)(void *), void *argument)
{
    pthread_t thread;
    int error = start_thread(&thread, work, argument);
    if (error == 0)
        pthread_detach(thread);
    return error;
}

/* As many helpers as are missing and find an idle processor. */
static void start_helpers(Crew *crew)
{
    int missing = crew->wanted - atomic_load(&crew->busy);
    int idle = missing > 0 && crew->started < MAX_THREADS ? idle_processors() : 0;
    if (missing > idle)
        missing = idle;
    for (; missing > 0 && crew->started < MAX_THREADS; missing--) {
        atomic_fetch_add(&crew->busy, 1);
        if (start_thread(&crew->helpers[crew->started], help, crew) != 0) {
            atomic_fetch_sub(&crew->busy, 1);
            break;
        }
        crew->started++;
    }
}

int should_stop(void)
{
    if (helping)
        return idle_processors() < 0;
    if (called)
        start_helpers(called);
    return 0;
}

void in_parallel(int threads, void *(*work)(void *), void *argument)
{
    Crew crew = {.work = work, .argument = argument, .wanted = threads - 1, .waiters = waiters};
    called = &crew;
    start_helpers(&crew);
    work(argument);
    called = NULL;
    while (crew.started > 0)
        pthread_join(crew.helpers[--crew.started], NULL);
}
