/* The same work in several threads at once.
 *
 * Threads are made for each call and joined before it returns: nothing lives on between calls, so
 * that there is nothing to stop, to leak, or to be missing in a forked child. Making and joining one
 * costs some 20 microseconds, which the callers' thresholds make small. */
#ifndef DATADIST_PARALLEL_H
#define DATADIST_PARALLEL_H

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_THREADS = 64 };

/* Take every processor for idle: for tests of the threads themselves, on machines however busy. Set
 * before anything is gathered, and not changed afterwards. */
extern int always_help;

/* Threads at the same work: a leader, and helpers. */
typedef struct {
    void *(*work)(void *);
    void *argument;
    int wanted;       /* helpers at work, at most */
    int waiters;      /* threads that only look now and then what became of it: they do not count as running */
    int processors;   /* of the machine; asked for once, since that takes longer than the load */
    int started;      /* helpers in all, those that have returned included */
    _Atomic int busy; /* helpers that have not returned */
    pthread_t helpers[MAX_THREADS];
} Crew;

/* Begin work(argument) in up to threads - 1 helpers. No more helpers run than processors are idle, so work
 * must share out its parts itself. */
void gather(Crew *crew, int threads, int waiters, void *(*work)(void *), void *argument);

/* Work here as well, in the thread that gathered it or another; returns when all have returned. */
void lead(Crew *crew);

/* Both at once. */
void in_parallel(int threads, void *(*work)(void *), void *argument);

/* Processors that nothing runs on just now; below 0 where threads wait for one. */
int idle_processors(void);

/* Whether what can wait may take a processor: another one is left for who has to go on, or there is none. */
int is_processor_spare(void);

/* This thread gets a low priority, unless it has one. Not for threads that hold the lock of the interpreter: where
 * all processors are busy they would keep it for long. */
void go_last(void);

/* A thread with a small stack that gets no signals; an errno. */
int start_thread(pthread_t *thread, void *(*work)(void *), void *argument);

/* The same; nobody waits for its end. */
int start_detached(void *(*work)(void *), void *argument);

/* The same, on the processor of the caller, who is about to wait for its result: the others are left to
 * helpers, and none has to be woken up for it. It must not end before this has returned. */
int start_in_place(void *(*work)(void *), void *argument);

/* To be asked by work between parts, each worth some microseconds. A helper hears that it should return:
 * other threads wait for a processor, such as one that the caller let go on when it released the GIL.
 * The caller's thread never does; helpers that found no idle processor at first are started here. */
int should_stop(void);

#endif
