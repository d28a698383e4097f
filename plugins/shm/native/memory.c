#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "huge.h"
#include "parallel.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum {
    SLICE = 8 << 20,
    STEP = 256 << 10, /* between two of them others can map: the kernel lets nobody in meanwhile */
    TRIES = 3,
    UNMAP_STEP = 64 << 20, /* the same where memory is unmapped, which takes less per byte */
};

static int map_with(int flags, int fd, size_t size, int writable, int huge, void **address)
{
    int access = PROT_READ | (writable ? PROT_WRITE : 0);
    void *place;
    for (int left = huge ? TRIES : 1; left > 0; left--) {
        place = left > 1 ? huge_place(size) : NULL;
        *address = mmap(place, size, access, MAP_SHARED | flags, fd, 0);
        if (*address == MAP_FAILED)
            return -1;
        if (place == NULL || *address == place)
            break;
        (void)munmap(*address, size); /* another thread was faster */
    }
    (void)madvise(*address, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); /* a wish, no more */
    return 0;
}

int map_shared(int fd, size_t size, int writable, int huge, void **address)
{
    return map_with(0, fd, size, writable, huge, address);
}

int map_peer(int fd, size_t size, int writable, int huge, void **address)
{
    if (map_with(MAP_NORESERVE, fd, size, writable, huge, address) != 0)
        return -1;
    (void)madvise(*address, size, MADV_DONTFORK); /* a child would keep the peer's memory */
    return 0;
}

typedef struct {
    char *address;
    size_t size;
    int file;
    off_t offset;
    int threads;
    const _Atomic int64_t *stop;
    _Atomic size_t next;
    _Atomic int error;
} Task;

enum { PAGE = 4096 };

int is_refused(int error)
{
    return error == EPERM || error == ENOSYS || error == EACCES;
}

int unmap(char *address, size_t size)
{
    size_t at = 0;
    while (size - at > UNMAP_STEP && munmap(address + at, UNMAP_STEP) == 0)
        at += UNMAP_STEP;
    return munmap(address + at, size - at); /* the last step, or all where pages are larger than a step */
}

/* Adds nothing, and loses nothing that the program writes meanwhile. Reads would take longer: for each the kernel
 * looks for neighbours that it could map, too. */
__attribute__((no_sanitize("thread"))) static void touch(char *address, size_t size)
{
    for (size_t at = 0; at < size; at += PAGE)
        __atomic_fetch_add(address + at, 0, __ATOMIC_RELAXED);
}

static int populate_mapping(char *address, size_t size)
{
    if (madvise(address, size, MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno != EINVAL && !is_refused(errno))
        return errno == EFAULT ? ENOMEM : errno;
    touch(address, size); /* Linux before 5.14, or a filter of system calls */
    return 0;
}

static int is_stopped(const Task *task)
{
    return task->stop != NULL && atomic_load_explicit(task->stop, memory_order_relaxed);
}

/* Asks at each step whether to stop: where all processors are busy, a slice can take a second. */
static int populate_slice(const Task *task, size_t begin, size_t end)
{
    int error = 0;
    for (size_t at = begin; at < end && !error && !is_stopped(task); at += STEP) {
        size_t size = end - at < STEP ? end - at : STEP;
        if (task->file < 0)
            error = populate_mapping(task->address + at, size);
        else
            touch(task->address + at, size);
    }
    return error;
}

static void *populate_some(void *argument)
{
    Task *task = argument;
    while (!task->error && !is_stopped(task) && !should_stop()) {
        size_t at = atomic_fetch_add(&task->next, SLICE);
        if (at >= task->size)
            break;
        int error = populate_slice(task, at, task->size - at < SLICE ? task->size : at + SLICE);
        if (error)
            task->error = error;
    }
    return NULL;
}

static void *populate_last(void *argument)
{
    Task *task = argument;
    go_last();
    in_parallel(task->threads, populate_some, task);
    return NULL;
}

/* The file has its pages before they are touched, so that nothing can be short then. The kernel lets nobody seal
 * the file meanwhile: this is no work for a thread of low priority. An errno. */
static int make_in_file(const Task *task)
{
    int error = 0;
    for (size_t at = 0; at < task->size && !error && !is_stopped(task); at += STEP) {
        size_t size = task->size - at < STEP ? task->size - at : STEP;
        do
            error = fallocate(task->file, 0, task->offset + (off_t)at, (off_t)size) == 0 ? 0 : errno;
        while (error == EINTR);
    }
    return error == ENOSPC ? ENOMEM : error;
}

/* The kernel lets nobody map while it populates a mapping, also while this thread waits for a processor; a touch
 * has no such moment, so that it can be left to a thread of low priority. */
static void populate_task(Task *task)
{
    pthread_t thread;
    if (task->file >= 0 && task->stop != NULL && start_thread(&thread, populate_last, task) == 0)
        pthread_join(thread, NULL);
    else
        in_parallel(task->threads, populate_some, task);
}

int populate(char *address, size_t size, int threads, int file, off_t offset, const _Atomic int64_t *stop)
{
    int most = (int)(size / SLICE) + 1;
    Task task = {
        .address = address, .size = size, .threads = most < threads ? most : threads,
        .file = file, .offset = offset, .stop = stop,
    };
    int error = file < 0 ? 0 : make_in_file(&task);
    if (error == EOPNOTSUPP || is_refused(error))
        task.file = -1;
    else
        task.error = error;
    if (!task.error)
        populate_task(&task);
    errno = task.error;
    return task.error ? -1 : 0;
}
