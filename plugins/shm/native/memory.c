#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "parallel.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum {
    SLICE = 8 << 20,
    STEP = 256 << 10, /* between two of them others can map: the kernel lets nobody in meanwhile */
    UNMAP_STEP = 64 << 20, /* the same where memory is unmapped, which takes less per byte */
};

static int map_with(int flags, int fd, size_t size, int writable, int huge, void **address)
{
    *address = mmap(NULL, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | flags, fd, 0);
    if (*address == MAP_FAILED)
        return -1;
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

static int populate_step(char *address, size_t size)
{
    if (madvise(address, size, MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno != EINVAL && !is_refused(errno))
        return errno == EFAULT ? ENOMEM : errno;
    /* Linux before 5.14, or a filter of system calls; adds nothing, and loses nothing */
    for (size_t at = 0; at < size; at += PAGE)
        __atomic_fetch_add(address + at, 0, __ATOMIC_RELAXED);
    return 0;
}

static int populate_slice(char *address, size_t size)
{
    for (size_t at = 0; at < size; at += STEP) {
        int error = populate_step(address + at, size - at < STEP ? size - at : STEP);
        if (error)
            return error;
    }
    return 0;
}

static void *populate_some(void *argument)
{
    Task *task = argument;
    while (!task->error && !should_stop()) {
        size_t at = atomic_fetch_add(&task->next, SLICE);
        if (at >= task->size)
            break;
        size_t left = task->size - at;
        int error = populate_slice(task->address + at, left < SLICE ? left : SLICE);
        if (error)
            task->error = error;
    }
    return NULL;
}

int populate(char *address, size_t size, int threads)
{
    Task task = {.address = address, .size = size};
    int most = (int)(size / SLICE) + 1;
    in_parallel(most < threads ? most : threads, populate_some, &task);
    errno = task.error;
    return task.error ? -1 : 0;
}
