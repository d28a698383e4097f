#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

enum { STACK = 256 << 10, HELPER_NICE = 10 };

typedef struct {
    void *(*work)(void *);
    void *argument;
} Call;

/* Processors that nothing runs on just now; below 0 where threads wait for one. A helper that has to
 * wait holds its part of the work back for a time slice of somebody else, which costs more than a
 * helper gains. */
static int idle_processors(void)
{
#ifdef DATADIST_ALWAYS_HELP /* for tests of the threads themselves, on machines however busy */
    return MAX_THREADS;
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN), running = 1;
    FILE *file = fopen("/proc/loadavg", "re");
    if (file) {
        if (fscanf(file, "%*s %*s %*s %ld/", &running) != 1)
            running = 1;
        fclose(file);
    }
    return (int)(online - running);
}

static _Thread_local int helping;

int help_is_unwanted(void)
{
    return helping && idle_processors() < 0;
}

/* The program's own threads, when they wake up, go before helpers. */
static void *help(void *argument)
{
    const Call *call = argument;
    (void)setpriority(PRIO_PROCESS, 0, HELPER_NICE); /* of this thread alone, on Linux */
    helping = 1;
    return help_is_unwanted() ? NULL : call->work(call->argument);
}

void in_parallel(int threads, void *(*work)(void *), void *argument)
{
    pthread_t helpers[MAX_THREADS];
    Call call = {work, argument};
    int started = 0, wanted = threads - 1;
    if (wanted > 0) {
        int idle = idle_processors();
        wanted = wanted < idle ? wanted : idle;
    }
    if (wanted > 0) {
        pthread_attr_t attributes;
        sigset_t all, before;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's threads */
        while (started < wanted && started < MAX_THREADS &&
               pthread_create(&helpers[started], &attributes, help, &call) == 0)
            started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
    }
    work(argument);
    while (started > 0)
        pthread_join(helpers[--started], NULL);
}
