#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

enum { STACK = 256 << 10, HELPER_NICE = 19 };

typedef struct {
    void *(*work)(void *);
    void *argument;
} Call;

/* Helpers take what processor time is left over: the program's own threads go first. */
static void *help(void *argument)
{
    const Call *call = argument;
    (void)setpriority(PRIO_PROCESS, 0, HELPER_NICE); /* of this thread alone, on Linux */
    return call->work(call->argument);
}

void in_parallel(int threads, void *(*work)(void *), void *argument)
{
    pthread_t helpers[MAX_THREADS];
    Call call = {work, argument};
    int started = 0;
    if (threads > 1) {
        pthread_attr_t attributes;
        sigset_t all, before;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's threads */
        while (started < threads - 1 && started < MAX_THREADS &&
               pthread_create(&helpers[started], &attributes, help, &call) == 0)
            started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
    }
    work(argument);
    while (started > 0)
        pthread_join(helpers[--started], NULL);
}
