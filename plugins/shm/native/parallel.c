#define _GNU_SOURCE
#include "parallel.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

enum { STACK = 256 << 10, NICE = 10 };

static _Thread_local Crew *led;    /* by this thread */
static _Thread_local Crew *helped; /* by this thread */
static _Thread_local int waiters;  /* of either */

int always_help;

static int count_processors(void)
{
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static int idle_of(int processors)
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
    return processors - running + waiters;
}

/* A helper that has to wait holds its part of the work back for a time slice of somebody else, which
 * costs more than a helper gains. */
int idle_processors(void)
{
    return idle_of(count_processors());
}

int is_processor_spare(void)
{
    int processors = count_processors();
    return idle_of(processors) >= (processors > 1);
}

void go_last(void)
{
    if (getpriority(PRIO_PROCESS, 0) < NICE) /* of this thread alone, on Linux */
        (void)setpriority(PRIO_PROCESS, 0, NICE);
}

/* The program's own threads, when they wake up, go before helpers. */
static void *help(void *argument)
{
    Crew *crew = argument;
    go_last();
    helped = crew;
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

/* Have a thread of ours run on this processor next, and later wherever it may. */
static void move_here(pthread_t thread)
{
    cpu_set_t all, here;
    int processor = sched_getcpu();
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof(all), &all) != 0)
        return;
    CPU_ZERO(&here);
    CPU_SET(processor, &here);
    if (pthread_setaffinity_np(thread, sizeof(here), &here) == 0)
        pthread_setaffinity_np(thread, sizeof(all), &all);
}

int start_in_place(void *(*work)(void *), void *argument)
{
    pthread_t thread;
    int error = start_thread(&thread, work, argument);
    if (error == 0) {
        move_here(thread);
        pthread_detach(thread);
    }
    return error;
}

/* Have a thread of ours run on another processor than this one, and later wherever it may: kernels that gather the
 * threads of a machine with little to do on few processors would leave it here for some milliseconds. If it has ended,
 * its number is 0, which means this thread: that gets back what it had. */
static void move_away(pthread_t thread)
{
    cpu_set_t all, others;
    int processor = sched_getcpu();
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof(all), &all) != 0)
        return;
    others = all;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) > 0 && pthread_setaffinity_np(thread, sizeof(others), &others) == 0)
        pthread_setaffinity_np(thread, sizeof(all), &all);
}

/* As many helpers as are missing and find an idle processor. */
static void start_helpers(Crew *crew)
{
    int missing = crew->wanted - atomic_load(&crew->busy);
    int idle = missing > 0 && crew->started < MAX_THREADS ? idle_of(crew->processors) : 0;
    if (missing > idle)
        missing = idle;
    for (; missing > 0 && crew->started < MAX_THREADS; missing--) {
        atomic_fetch_add(&crew->busy, 1);
        if (start_thread(&crew->helpers[crew->started], help, crew) != 0) {
            atomic_fetch_sub(&crew->busy, 1);
            break;
        }
        move_away(crew->helpers[crew->started++]);
    }
}

int should_stop(void)
{
    if (helped)
        return idle_of(helped->processors) < 0;
    if (led)
        start_helpers(led);
    return 0;
}

void gather(Crew *crew, int threads, int those_who_wait, void *(*work)(void *), void *argument)
{
    crew->work = work;
    crew->argument = argument;
    crew->wanted = threads - 1;
    crew->waiters = those_who_wait;
    crew->processors = crew->wanted > 0 ? count_processors() : 1;
    crew->started = 0;
    atomic_init(&crew->busy, 0);
    start_helpers(crew);
}

void lead(Crew *crew)
{
    led = crew;
    waiters = crew->waiters;
    crew->work(crew->argument);
    led = NULL;
    waiters = 0;
    while (crew->started > 0)
        pthread_join(crew->helpers[--crew->started], NULL);
}

void in_parallel(int threads, void *(*work)(void *), void *argument)
{
    Crew crew;
    gather(&crew, threads, 0, work, argument);
    lead(&crew);
}
