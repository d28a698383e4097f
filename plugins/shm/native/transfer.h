/* Vectored copies between local memory and a peer's, mapped here or reached through its process. */
#ifndef DATADIST_TRANSFER_H
#define DATADIST_TRANSFER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "copy.h"
#include "pages.h"
#include "parallel.h"

/* What the Python side turns into errors. */
enum { DONE = 0, BAD_ADDRESS = 1, TIMED_OUT = 2, ABORTED = 3, PEER_GONE = 4, REVOKED = 5, FAILED = 6 };

/* A range of the owner's memory. mapped is 0 where it has to be reached through the process; pages is
 * what is known of a mapping, NULL where all of it exists. */
typedef struct {
    int64_t base;
    int64_t size;
    int64_t mapped;
    Pages *pages;
} Window;

/* A range of a pool of our own. */
typedef struct {
    int64_t base;
    int64_t size;
} Pool;

/* One page per direction, shared by writer and owner: see fence.py. */
typedef struct {
    _Atomic int64_t active;
    _Atomic int64_t revoked;
} Fence;

enum { BRIEF_SEGMENTS = 16 }; /* most segments of what takes some microseconds only */

typedef struct {
    int write;
    const Window *windows; /* sorted by base */
    ssize_t n_windows;
    const Pool *pools; /* of our own: their pages always come */
    ssize_t n_pools;
    int own_pagemap, peer_pagemap; /* descriptors, or -1 */
    pid_t pid; /* 0: it is in another pid namespace, and has no number here */
    int pidfd;
    int control; /* descriptor to look at when all was read, or -1 */
    const int64_t *local, *remote, *length; /* n segments */
    ssize_t n;
    const _Atomic int64_t *abort_flag;
    Fence *fence;
    int64_t deadline_ns; /* of CLOCK_MONOTONIC */
    int threads;         /* see chosen_threads */
    int kernel;          /* for large totals */

    _Atomic int given_up; /* not 0: who waited for it has gone on, so it ends */

    /* Set by transfer(). */
    int control_readable;     /* whether control was readable */
    int error;     /* errno of FAILED and BAD_ADDRESS; EXDEV where the process has no number here */
    ssize_t index; /* segment of BAD_ADDRESS */
    int64_t total;
    int foreign; /* whether some segment is reached through the process */
    int strange; /* whether some local range is outside of our pools */
    int alive;   /* whether the peer's process was seen after the call began */
    Copy copy;
    pthread_mutex_t lock; /* of the five that follow */
    ssize_t at;
    int64_t offset;
    int64_t left; /* bytes that no thread has taken */
    int64_t chunks;
    int result;
} Job;

/* The present moment of CLOCK_MONOTONIC. */
int64_t now_ns(void);

/* The deadline_ns of a job that may take so many seconds from now. */
int64_t deadline_after(double seconds);

/* Whether the peer's process has ended. */
int peer_is_gone(const Job *job);

/* Whether something has arrived from the peer that was not read yet, also where that cannot be told. */
int is_control_readable(Job *job);

/* Bounds of every segment, and what the whole is; to be called first. Returns a result. */
int check(Job *job);

/* Whether it takes some microseconds only: few bytes, none of which has to be waited for. */
int is_brief(const Job *job);

/* Whether all pages are pools', or can be seen to exist: then the calling thread may move them. Others
 * may never come (userfaultfd, a file system of a process that hangs), and no signal but a fatal one
 * wakes who waits for them. */
int is_safe(Job *job);

/* Move every segment, or fail; after check(); returns a result. */
int transfer(Job *job);

/* The same in two steps, for a caller that is not to move anything itself, but to wait for who does. The
 * first one never waits; helpers are at work from then on. DONE, or a result: nothing has begun. */
int begin_transfer(Job *job, Crew *crew, int waiters);

/* In any thread, after DONE; returns a result. */
int end_transfer(Job *job, Crew *crew);

/* Local copies; ranges may overlap, in which case segments are moved in order. */
void copy_local(const int64_t *dst, const int64_t *src, const int64_t *length, ssize_t n,
                int threads, int kernel);

#endif
