/* The same work in several threads at once.
 *
 * Threads are made for each call and joined before it returns: nothing lives on between calls, so
 * that there is nothing to stop, to leak, or to be missing in a forked child. Making and joining one
 * costs some 20 microseconds, which the callers' thresholds make small. */
#ifndef DATADIST_PARALLEL_H
#define DATADIST_PARALLEL_H

#include <pthread.h>

enum { MAX_THREADS = 64 };

/* Take every processor for idle: for tests of the threads themselves, on machines however busy. Set
 * before the first call of in_parallel, and not changed afterwards. */
extern int always_help;

/* Run work(argument) here and in up to threads - 1 helpers; returns when all have returned. No more
 * helpers run than processors are idle, so work must share out its parts itself. */
void in_parallel(int threads, void *(*work)(void *), void *argument);

/* Processors that nothing runs on just now; below 0 where threads wait for one. */
int idle_processors(void);

/* Another thread waits for this one, and only looks now and then what became of it: from now on it is not
 * counted as one that runs, neither here nor in helpers of this thread. */
void expect_waiter(void);

/* A thread with a small stack that gets no signals; an errno. */
int start_thread(pthread_t *thread, void *(*work)(void *), void *argument);

/* The same; nobody waits for its end. */
int start_detached(void *(*work)(void *), void *argument);

/* To be asked by work between parts, each worth some microseconds. A helper hears that it should return:
 * other threads wait for a processor, such as one that the caller let go on when it released the GIL.
 * The caller's thread never does; helpers that found no idle processor at first are started here. */
int should_stop(void);

#endif
