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
    Crew crew;
    int has_leader; /* else whoever asks ends it, once its helpers have returned */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int ended;
    int result;
};

static void *run(void *argument)
{
    Flight *flight = argument;
    int result = end_transfer(&flight->job, &flight->crew);
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
    flight->has_leader = 1;
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

/* Of a flight that was given up before it had a leader; called with the lock held. */
static void end_without_leader(Flight *flight)
{
    if (flight->has_leader || flight->ended || atomic_load(&flight->crew.busy) > 0)
        return;
    flight->result = end_transfer(&flight->job, &flight->crew); /* moves nothing more */
    flight->ended = 1;
}

/* No thread can be had for it: its helpers, if there are any, return after their chunks. */
static void give_up(Flight *flight, int64_t until)
{
    static const struct timespec pause = {.tv_nsec = 1000000};
    atomic_store(&flight->job.given_up, 1);
    flight->has_leader = 0;
    for (end_without_leader(flight); !flight->ended && now_ns() < until; end_without_leader(flight))
        nanosleep(&pause, NULL);
}

/* Until it has ended, or there is a reason not to wait any longer: DONE, or that reason. Called with the
 * lock held. */
static int await_end(Flight *flight)
{
    int64_t deadline = flight->job.deadline_ns;
    int result = DONE;
    while (result == DONE) {
        int64_t next = now_ns() + LOOK_NS;
        if (ends_by(flight, next < deadline ? next : deadline))
            break;
        result = reason_to_leave(&flight->job, now_ns());
    }
    atomic_store(&flight->job.given_up, result != DONE);
    (void)ends_by(flight, now_ns() + GRACE_NS);
    return result;
}

int fly(Job *job, Flight **left)
{
    Flight *flight = make(job);
    *left = NULL;
    if (flight == NULL) {
        job->error = ENOMEM;
        return FAILED;
    }
    int result = begin_transfer(&flight->job, &flight->crew, 1);
    if (result != DONE) {
        drop(flight);
        return result;
    }
    pthread_mutex_lock(&flight->lock);
    int error = start_in_place(run, flight); /* cannot end before it has the lock */
    if (error)
        give_up(flight, now_ns() + GRACE_NS);
    result = error ? FAILED : await_end(flight);
    if (!flight->ended)
        *left = flight;
    else if (flight->result != ABORTED || result == DONE)
        result = flight->result;
    if (*left == NULL) {
        job->control_readable = flight->job.control_readable;
        job->error = flight->job.error;
        job->index = flight->job.index;
    }
    if (error)
        job->error = error;
    pthread_mutex_unlock(&flight->lock);
    if (*left == NULL)
        drop(flight);
    return result;
}

int settle(Flight *flight)
{
    pthread_mutex_lock(&flight->lock);
    end_without_leader(flight);
    int ended = flight->ended;
    pthread_mutex_unlock(&flight->lock);
    if (ended)
        drop(flight);
    return ended;
}
