/* Vectored copies between local memory and a peer's, mapped here or reached through its process. */
#ifndef DATADIST_TRANSFER_H
#define DATADIST_TRANSFER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "copy.h"

/* What the Python side turns into errors. */
enum { DONE = 0, BAD_ADDRESS = 1, TIMED_OUT = 2, ABORTED = 3, PEER_GONE = 4, REVOKED = 5, FAILED = 6 };

/* A range of the owner's memory. mapped is 0 where it has to be reached through the process. */
typedef struct {
    int64_t base;
    int64_t size;
    int64_t mapped;
} Window;

/* One page per direction, shared by writer and owner: see fence.py. */
typedef struct {
    _Atomic int64_t active;
    _Atomic int64_t revoked;
} Fence;

typedef struct {
    int write;
    const Window *windows; /* sorted by base */
    ssize_t n_windows;
    pid_t pid;
    int pidfd;
    int control; /* descriptor to look at when all was read, or -1 */
    const int64_t *local, *remote, *length; /* n segments */
    ssize_t n;
    const _Atomic int64_t *abort_flag;
    Fence *fence;
    int64_t deadline_ns; /* of CLOCK_MONOTONIC */
    int threads;         /* at most so many */
    int kernel;          /* for large totals */

    /* Set by transfer(). */
    int heard;     /* whether control was readable */
    int error;     /* errno of FAILED and BAD_ADDRESS */
    ssize_t index; /* segment of BAD_ADDRESS */
    int64_t total;
    int foreign; /* whether some segment is reached through the process */
    Copy copy;
    pthread_mutex_t lock; /* of the four that follow */
    ssize_t at;
    int64_t offset;
    int64_t chunks;
    int result;
} Job;

/* The deadline_ns of a job that may take so many seconds from now. */
int64_t deadline_after(double seconds);

/* Whether it takes some microseconds only: few bytes, all of them mapped here. */
int is_brief(const Job *job);

/* Move every segment, or fail; returns a result. No byte moves where a segment is out of bounds. */
int transfer(Job *job);

/* Local copies; ranges may overlap, in which case segments are moved in order. */
void copy_local(const int64_t *dst, const int64_t *src, const int64_t *length, ssize_t n,
                int threads, int kernel);

#endif
