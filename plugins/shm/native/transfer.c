#define _GNU_SOURCE
#include "transfer.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "sightings.h"
#include "tuning.h"

enum {
    CHUNK = 1 << 20,        /* what a thread takes at a time; between chunks it asks to go on */
    LAST_CHUNK = 512 << 10, /* the same of the last LAST_BYTES, */
    LAST_BYTES = 16 << 20,  /* so that no thread has to wait long for the others */
    PEER_CHECK_CHUNKS = 32, /* chunks from one look at the peer's process to the next */
    HELP_CHUNKS = 8,        /* chunks of a thread from one look at the machine's load to the next; the
                             * first one has another look: who started it may not have gone to sleep */
    STREAM_BYTES = 1 << 20, /* totals from which stores go past the cache */
    THREAD_BYTES = 4 << 20, /* what makes a thread worth its start */
    TUNE_BYTES = 8 << 20,   /* totals with which it begins to matter how they are copied */
    BRIEF_BYTES = 64 << 10, /* at most so much is copied in some microseconds */
    LOOK_BYTES = 4 << 20,   /* above, a thread of its own costs less than the looks at the pages, */
    LOOK_SEGMENTS = 24,     /* as for more segments */
    IOVECS = 128,
};

int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t deadline_after(double seconds)
{
    if (!(seconds > 0))
        return 0;
    return seconds < 1e9 ? now_ns() + (int64_t)(seconds * 1e9) : INT64_MAX;
}

/* Without a descriptor of the process the end of the connection tells: its number may soon be another's. */
int peer_is_gone(const Job *job)
{
    int known = job->pidfd >= 0;
    struct pollfd p = {.fd = known ? job->pidfd : job->control, .events = known ? POLLIN : 0};
    return p.fd >= 0 && poll(&p, 1, 0) > 0;
}

int is_control_readable(Job *job)
{
    struct pollfd p[] = {{.fd = job->control, .events = POLLIN}, {.fd = job->pidfd, .events = POLLIN}};
    if (job->control < 0)
        return 1;
    int ready = poll(p, 2, 0); /* negative descriptors are passed over */
    job->alive |= ready == 0;  /* saves another look at the process */
    return ready < 0 || p[0].revents != 0;
}

/* After the last byte: PEER_GONE or DONE, and job->control_readable, also where that cannot be told. */
static int check_peer_state(Job *job)
{
    struct pollfd p[] = {{.fd = job->pidfd, .events = POLLIN}, {.fd = job->control, .events = POLLIN}};
    int ready = poll(p, 2, 0); /* negative descriptors are passed over */
    job->control_readable = ready < 0 || job->control < 0 || p[1].revents != 0;
    if (ready > 0 && job->pidfd < 0 && p[1].revents & ~POLLIN)
        return PEER_GONE;
    return ready > 0 && p[0].revents != 0 ? PEER_GONE : DONE;
}

static int holds(const Window *w, int64_t address, int64_t length)
{
    return address >= w->base && length <= w->size && address - w->base <= w->size - length;
}

/* The window that holds [address, address + length), or NULL. */
static const Window *find_window(const Job *job, int64_t address, int64_t length)
{
    ssize_t low = 0, high = job->n_windows;
    while (low < high) {
        ssize_t middle = (low + high) / 2;
        if (job->windows[middle].base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low > 0 && holds(&job->windows[low - 1], address, length) ? &job->windows[low - 1] : NULL;
}

/* Whether the owner has yet to make a page that is to be written. */
static int has_to_wait(const Job *job)
{
    int64_t now = now_ns();
    for (ssize_t i = 0; i < job->n; i++) {
        const Window *w = find_window(job, job->remote[i], job->length[i]);
        if (w->pages && !pages_exist(w->pages, job->remote[i] - w->base, job->length[i],
                                     pages_moment(w->pages, now)))
            return 1;
    }
    return 0;
}

int is_brief(const Job *job)
{
    if (job->n > BRIEF_SEGMENTS || job->total > BRIEF_BYTES)
        return 0;
    return !(job->write && !job->foreign && has_to_wait(job));
}

static int is_pools(const Job *job, int64_t address, int64_t length)
{
    for (ssize_t i = 0; i < job->n_pools; i++) {
        const Pool *pool = &job->pools[i];
        if (address >= pool->base && length <= pool->size && address - pool->base <= pool->size - length)
            return 1;
    }
    return 0;
}

int check(Job *job)
{
    const Window *w = NULL;
    job->total = 0;
    for (ssize_t i = 0; i < job->n; i++) {
        int64_t remote = job->remote[i], length = job->length[i];
        job->index = i;
        if (length <= 0 || job->local[i] <= 0 || remote <= 0)
            return BAD_ADDRESS;
        if (w == NULL || !holds(w, remote, length))
            w = find_window(job, remote, length);
        if (w == NULL)
            return BAD_ADDRESS;
        job->foreign |= w->mapped == 0;
        job->strange |= !is_pools(job, job->local[i], length);
        if (__builtin_add_overflow(job->total, length, &job->total))
            job->total = INT64_MAX;
    }
    if (!job->foreign || job->pid > 0)
        return DONE;
    job->error = EXDEV;
    return FAILED;
}

/* -- pages that may never come ---------------------------------------------------------------- */

static const uint64_t PRESENT = (uint64_t)1 << 63, WRITE_PROTECTED = (uint64_t)1 << 57;
enum { OURSELVES = 0 }; /* no peer's pid */

/* A process whose pages are looked at. */
typedef struct {
    pid_t pid;
    int pagemap;
    int64_t now;
    int looked; /* whether the kernel was asked */
} Seen;

/* The pages of a group that are in the page table of a process, by its pagemap. */
static uint32_t look_at(Seen *seen, int64_t group)
{
    uint64_t items[SIGHTING_PAGES];
    uint32_t pages = 0;
    ssize_t bytes = pread(seen->pagemap, items, sizeof(items), group * (int64_t)sizeof(items));
    for (ssize_t i = 0; i < bytes / 8; i++)
        if (items[i] & PRESENT && !(items[i] & WRITE_PROTECTED))
            pages |= (uint32_t)1 << i;
    seen->looked = 1;
    sightings_put(seen->pid, group, seen->now, pages);
    return pages;
}

static int are_there(Seen *seen, int64_t address, int64_t length)
{
    static int64_t page;
    if (page == 0)
        page = sysconf(_SC_PAGESIZE);
    int64_t at = address / page, end = (address + length - 1) / page + 1;
    while (at < end) {
        int64_t group = at / SIGHTING_PAGES, stop = (group + 1) * SIGHTING_PAGES;
        int64_t count = (stop < end ? stop : end) - at;
        uint32_t wanted = (((uint32_t)1 << count) - 1) << at % SIGHTING_PAGES;
        if ((sightings_get(seen->pid, group, seen->now) & wanted) != wanted &&
            (look_at(seen, group) & wanted) != wanted)
            return 0;
        at += count;
    }
    return 1;
}

int is_safe(Job *job)
{
    const Window *w = NULL;
    if (!job->foreign && !job->strange)
        return 1;
    if (job->n > LOOK_SEGMENTS || job->total > LOOK_BYTES || job->own_pagemap < 0 ||
        (job->foreign && job->peer_pagemap < 0))
        return 0;
    Seen own = {OURSELVES, job->own_pagemap, now_ns(), 0}, peer = {job->pid, job->peer_pagemap, own.now, 0};
    for (ssize_t i = 0; i < job->n; i++) {
        int64_t local = job->local[i], remote = job->remote[i], length = job->length[i];
        if (job->strange && !is_pools(job, local, length) && !are_there(&own, local, length))
            return 0;
        if (!job->foreign)
            continue;
        if (w == NULL || !holds(w, remote, length))
            w = find_window(job, remote, length);
        if (w->mapped == 0 && !are_there(&peer, remote, length))
            return 0;
    }
    job->alive = peer.looked; /* its pagemap is empty once it has ended */
    return 1;
}

/* -- sharing out the work -------------------------------------------------------------------- */

/* Part of a job: from byte offset of segment at, bytes in all. */
typedef struct {
    ssize_t at;
    int64_t offset;
    int64_t bytes;
    int64_t number;
    int64_t now; /* when it was begun, in ns */
} Span;

/* The next chunk; 0 when there is none, or some thread failed. */
static int take(Job *job, Span *span)
{
    pthread_mutex_lock(&job->lock);
    *span = (Span){job->at, job->offset, 0, job->chunks++, 0};
    int more = job->result == DONE && job->at < job->n;
    int64_t chunk = job->left > LAST_BYTES ? CHUNK : LAST_CHUNK;
    while (more && job->at < job->n && span->bytes < chunk) {
        int64_t left = job->length[job->at] - job->offset, room = chunk - span->bytes;
        if (left > room) {
            job->offset += room;
            span->bytes += room;
        } else {
            job->at++;
            job->offset = 0;
            span->bytes += left;
        }
    }
    job->left -= span->bytes;
    pthread_mutex_unlock(&job->lock);
    return more;
}

/* The first failure counts. */
static void fail(Job *job, int result, int error, ssize_t index)
{
    pthread_mutex_lock(&job->lock);
    if (job->result == DONE) {
        job->result = result;
        job->error = error;
        job->index = index;
    }
    pthread_mutex_unlock(&job->lock);
}

/* To be asked before every chunk. */
static int check_may_continue(const Job *job, int64_t number, int64_t now)
{
    if (atomic_load_explicit(job->abort_flag, memory_order_relaxed) ||
        atomic_load_explicit(&job->given_up, memory_order_relaxed))
        return ABORTED;
    if (job->fence && atomic_load(&job->fence->revoked))
        return REVOKED;
    if (now >= job->deadline_ns)
        return TIMED_OUT;
    if (number % PEER_CHECK_CHUNKS == PEER_CHECK_CHUNKS - 1 && peer_is_gone(job))
        return PEER_GONE;
    return DONE;
}

/* -- moving ---------------------------------------------------------------------------------- */

/* Pieces that wait for one call into the peer's process. */
typedef struct {
    struct iovec mine[IOVECS], theirs[IOVECS];
    int count;
    int64_t bytes;
} Batch;

static int result_of_errno(void)
{
    if (errno == ESRCH)
        return PEER_GONE;
    return errno == EFAULT ? BAD_ADDRESS : FAILED;
}

/* Drop the first bytes of a vector whose pieces from *at on are still to be moved. */
static void advance(struct iovec *pieces, int at, size_t bytes)
{
    while (bytes >= pieces[at].iov_len && bytes > 0)
        bytes -= pieces[at++].iov_len;
    if (bytes > 0) {
        pieces[at].iov_base = (char *)pieces[at].iov_base + bytes;
        pieces[at].iov_len -= bytes;
    }
}

/* Move a batch through the peer's process; a short count is continued. */
static int flush(const Job *job, Batch *batch)
{
    int at = 0;
    while (batch->bytes > 0) {
        struct iovec *mine = batch->mine + at, *theirs = batch->theirs + at;
        int count = batch->count - at;
        ssize_t moved = job->write ? process_vm_writev(job->pid, mine, count, theirs, count, 0)
                                   : process_vm_readv(job->pid, mine, count, theirs, count, 0);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return result_of_errno();
        batch->bytes -= moved;
        if (batch->bytes > 0) {
            size_t whole = moved;
            while (whole >= batch->mine[at].iov_len)
                whole -= batch->mine[at++].iov_len;
            advance(batch->mine, at, whole);
            advance(batch->theirs, at, whole);
        }
    }
    batch->count = 0;
    return DONE;
}

/* Until the owner has made the pages of a piece, which are not ours to make. */
static int await_pages(const Job *job, Pages *pages, size_t offset, size_t bytes)
{
    static const struct timespec pause = {.tv_nsec = 1000000};
    for (;;) {
        int64_t now = now_ns();
        if (pages_exist(pages, offset, bytes, pages_moment(pages, now)))
            return DONE;
        int result = check_may_continue(job, PEER_CHECK_CHUNKS - 1, now);
        if (result != DONE) {
            errno = result == TIMED_OUT ? ENODATA : 0;
            return result;
        }
        nanosleep(&pause, NULL);
    }
}

/* A piece of a mapping of which some pages may not exist. */
static int move_carefully(const Job *job, const Window *w, char *mine, size_t offset, size_t bytes,
                          uint32_t moment)
{
    while (bytes > 0) {
        size_t part = pages_piece(offset, bytes);
        char *theirs = pages_address(w->pages) + offset;
        int there = pages_exist(w->pages, offset, part, moment);
        if (!there && !job->write && (errno = pages_read(w->pages, offset, mine, part)) != 0)
            return errno == EFAULT ? BAD_ADDRESS : FAILED;
        if (!there && job->write) {
            int result = await_pages(job, w->pages, offset, part);
            if (result != DONE)
                return result;
        }
        if (there || job->write)
            job->copy(job->write ? theirs : mine, job->write ? mine : theirs, part);
        offset += part;
        mine += part;
        bytes -= part;
    }
    return DONE;
}

static int move_piece(const Job *job, Batch *batch, const Window *w, int64_t local, int64_t remote,
                      int64_t bytes, int64_t now)
{
    char *mine = (char *)(intptr_t)local;
    if (w->pages)
        return move_carefully(job, w, mine, remote - w->base, bytes, pages_moment(w->pages, now));
    if (w->mapped) {
        char *theirs = (char *)(intptr_t)(w->mapped + (remote - w->base));
        job->copy(job->write ? theirs : mine, job->write ? mine : theirs, bytes);
        return DONE;
    }
    batch->mine[batch->count] = (struct iovec){mine, bytes};
    batch->theirs[batch->count++] = (struct iovec){(void *)(intptr_t)remote, bytes};
    batch->bytes += bytes;
    return batch->count == IOVECS ? flush(job, batch) : DONE;
}

/* Have the pages of a mapped segment looked up in the page tables while the one before it is copied. A
 * prefetch never makes a page, and never fails. */
static void prefetch(const Job *job, const Window *w, ssize_t at)
{
    if (at >= job->n || w->mapped == 0 || !holds(w, job->remote[at], job->length[at]))
        return;
    __builtin_prefetch((const void *)(intptr_t)(w->mapped + (job->remote[at] - w->base)));
    __builtin_prefetch((const void *)(intptr_t)job->local[at]);
}

/* One chunk. *at is left at the segment that failed. */
static int move_span(const Job *job, Batch *batch, const Span *span, const Window **w, ssize_t *at)
{
    int64_t left = span->bytes, offset = span->offset;
    int result = DONE;
    for (*at = span->at; left > 0 && result == DONE; ++*at) {
        int64_t remote = job->remote[*at], length = job->length[*at];
        if (*w == NULL || !holds(*w, remote, length))
            *w = find_window(job, remote, length);
        int64_t piece = length - offset < left ? length - offset : left;
        prefetch(job, *w, *at + 1);
        result = move_piece(job, batch, *w, job->local[*at] + offset, remote + offset, piece,
                            span->now);
        left -= piece;
        offset = 0;
    }
    --*at;
    return result == DONE ? flush(job, batch) : result;
}

static void *work(void *argument)
{
    Job *job = argument;
    Batch batch;
    const Window *w = NULL;
    Span span;
    batch.count = 0;
    batch.bytes = 0;
    for (int taken = 1; take(job, &span); taken++) {
        ssize_t at = span.at;
        span.now = now_ns();
        int result = check_may_continue(job, span.number, span.now);
        if (result == DONE)
            result = move_span(job, &batch, &span, &w, &at);
        if (result != DONE)
            fail(job, result, errno, at);
        if ((taken == 1 || taken % HELP_CHUNKS == 0) && should_stop())
            break;
    }
    copy_fence();
    return NULL;
}

static int useful_threads(const Job *job)
{
    int64_t most = job->total / THREAD_BYTES;
    int threads = chosen_threads(job->threads);
    return most < threads ? (int)most : threads;
}

static int is_large(const Job *job)
{
    return job->total >= STREAM_BYTES;
}

static void begin_moving(Job *job, Crew *crew, int waiters)
{
    job->copy = copy_kernel(is_large(job) ? job->kernel : KERNEL_MEMCPY);
    job->left = job->total;
    pthread_mutex_init(&job->lock, NULL);
    gather(crew, useful_threads(job), waiters, work, job);
}

static void end_moving(Job *job, Crew *crew)
{
    lead(crew);
    pthread_mutex_destroy(&job->lock);
    if (job->kernel == KERNEL_AUTO && job->total >= TUNE_BYTES)
        tune_soon(abs(job->threads));
}

/* Once the peer has ended, its number may belong to another process. A small read is looked at afterwards
 * only, in any case: what it has found is thrown away then. */
static int has_to_look_before(const Job *job)
{
    return job->foreign && !job->alive &&
           (job->write || job->n > BRIEF_SEGMENTS || job->total > BRIEF_BYTES);
}

int begin_transfer(Job *job, Crew *crew, int waiters)
{
    job->result = DONE;
    if (has_to_look_before(job) && peer_is_gone(job))
        return PEER_GONE;
    if (job->fence)
        atomic_fetch_add(&job->fence->active, 1); /* announced before "revoked" is read: fence.py */
    if (is_large(job))
        pages_hold_searches(1);
    begin_moving(job, crew, waiters);
    return DONE;
}

int end_transfer(Job *job, Crew *crew)
{
    end_moving(job, crew);
    if (is_large(job))
        pages_hold_searches(-1);
    if (job->fence)
        atomic_fetch_sub(&job->fence->active, 1);
    if (job->result == DONE && atomic_load(job->abort_flag))
        return ABORTED;
    if (job->result == DONE)
        return check_peer_state(job);
    int unreachable = job->foreign && (job->result == FAILED || job->result == BAD_ADDRESS);
    return unreachable && peer_is_gone(job) ? PEER_GONE : job->result;
}

int transfer(Job *job)
{
    Crew crew;
    int result = begin_transfer(job, &crew, 0);
    return result == DONE ? end_transfer(job, &crew) : result;
}

/* -- local copies ---------------------------------------------------------------------------- */

/* Whether no byte that is read is written as well: the outer bounds of both sides are apart. */
static int are_disjoint(const int64_t *dst, const int64_t *src, const int64_t *length, ssize_t n)
{
    int64_t first[2] = {INT64_MAX, INT64_MAX}, end[2] = {0, 0};
    for (ssize_t i = 0; i < n; i++) {
        const int64_t begin[2] = {dst[i], src[i]};
        for (int side = 0; side < 2; side++) {
            first[side] = begin[side] < first[side] ? begin[side] : first[side];
            end[side] = begin[side] + length[i] > end[side] ? begin[side] + length[i] : end[side];
        }
    }
    return end[0] <= first[1] || end[1] <= first[0];
}

void copy_local(const int64_t *dst, const int64_t *src, const int64_t *length, ssize_t n,
                int threads, int kernel)
{
    if (!are_disjoint(dst, src, length, n)) {
        for (ssize_t i = 0; i < n; i++)
            memmove((void *)(intptr_t)dst[i], (const void *)(intptr_t)src[i], length[i]);
        return;
    }
    static const Window everything = {.base = 1, .size = INT64_MAX - 1, .mapped = 1};
    static const _Atomic int64_t never = 0;
    Job job = {
        .windows = &everything, .n_windows = 1, .pidfd = -1, .control = -1, .local = dst,
        .remote = src, .length = length, .n = n, .abort_flag = &never,
        .deadline_ns = INT64_MAX, .threads = threads, .kernel = kernel,
    };
    for (ssize_t i = 0; i < n; i++)
        job.total += length[i];
    Crew crew;
    begin_moving(&job, &crew, 0);
    end_moving(&job, &crew);
}
