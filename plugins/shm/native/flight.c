#define _GNU_SOURCE
#include "flight.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "parallel.h"

enum {
    LOOK_NS = 5000000,    /* from one look at the abort flag and the peer to the next */
    GRACE_NS = 100000000, /* for a thread that only has to end its chunk */
};

struct Flight {
    Job job;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int ended;
    int result;
};

static void *run(void *argument)
{
    Flight *flight = argument;
    expect_waiter();
    int result = transfer(&flight->job);
    pthread_mutex_lock(&flight->lock);
    flight->result = result;
    flight->ended = 1;
    pthread_cond_signal(&flight->changed);
    pthread_mutex_unlock(&flight->lock);
    return NULL;
}

static Flight *make(const Job *job)
{
    pthread_condattr_t attributes;
    Flight *flight = calloc(1, sizeof(*flight));
    if (flight == NULL)
        return NULL;
    flight->job = *job;
    pthread_mutex_init(&flight->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&flight->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return flight;
}

static void drop(Flight *flight)
{
    pthread_cond_destroy(&flight->changed);
    pthread_mutex_destroy(&flight->lock);
    free(flight);
}

/* Whether it has ended by a moment (CLOCK_MONOTONIC); called with the lock held. */
static int ends_by(Flight *flight, int64_t ns)
{
    struct timespec until = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    while (!flight->ended)
        if (pthread_cond_timedwait(&flight->changed, &flight->lock, &until) != 0)
            break;
    return flight->ended;
}

/* Why the caller need not wait any longer, or DONE. */
static int reason_to_leave(const Job *job, int64_t now)
{
    if (atomic_load(job->abort_flag))
        return ABORTED;
    if (now >= job->deadline_ns)
        return TIMED_OUT;
    return peer_is_gone(job) ? PEER_GONE : DONE;
}

int fly(Job *job, Flight **left)
{
    Flight *flight = make(job);
    int result = DONE, error = flight ? start_detached(run, flight) : ENOMEM;
    *left = NULL;
    if (error) {
        if (flight)
            drop(flight);
        job->error = error;
        return FAILED;
    }
    pthread_mutex_lock(&flight->lock);
    while (result == DONE) {
        int64_t now = now_ns(), next = now + LOOK_NS;
        if (ends_by(flight, next < job->deadline_ns ? next : job->deadline_ns))
            break;
        result = reason_to_leave(job, now_ns());
    }
    atomic_store(&flight->job.given_up, result != DONE);
    if (!ends_by(flight, now_ns() + GRACE_NS))
        *left = flight;
    else if (flight->result != ABORTED || result == DONE)
        result = flight->result;
    if (*left == NULL) {
        job->control_readable = flight->job.control_readable;
        job->error = flight->job.error;
        job->index = flight->job.index;
    }
    pthread_mutex_unlock(&flight->lock);
    if (*left == NULL)
        drop(flight);
    return result;
}

int settle(Flight *flight)
{
    pthread_mutex_lock(&flight->lock);
    int ended = flight->ended;
    pthread_mutex_unlock(&flight->lock);
    if (ended)
        drop(flight);
    return ended;
}
