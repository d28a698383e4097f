#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "parallel.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum { SLICE = 8 << 20 };

int map_shared(int fd, size_t size, int writable, int huge, void **address)
{
    *address = mmap(NULL, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (*address == MAP_FAILED)
        return -1;
    (void)madvise(*address, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); /* a wish, no more */
    return 0;
}

typedef struct {
    char *address;
    size_t size;
    int how;
    _Atomic size_t next;
    _Atomic int error;
} Task;

enum { PAGE = 4096, AROUND = 64 << 10 };

static void touch(volatile char *memory, size_t size, size_t step, int write)
{
    for (size_t at = 0; at < size; at += step) {
        if (write) /* adds nothing, and loses nothing that another thread writes meanwhile */
            __atomic_fetch_add(memory + at, 0, __ATOMIC_RELAXED);
        else
            (void)memory[at];
    }
}

static int populate_slice(char *address, size_t size, int how)
{
    if (how == PRESENT) {
        touch(address, size, AROUND, 0);
        touch(address + size - 1, 1, AROUND, 0); /* windows lie at multiples of 64 KiB, we may not */
        return 0;
    }
    if (madvise(address, size, how == FOR_WRITING ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) == 0)
        return 0;
    if (errno != EINVAL)
        return errno == EFAULT ? ENOMEM : errno;
    touch(address, size, PAGE, how == FOR_WRITING); /* Linux before 5.14 */
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
        int error = populate_slice(task->address + at, left < SLICE ? left : SLICE, task->how);
        if (error)
            task->error = error;
    }
    return NULL;
}

int populate(char *address, size_t size, int how, int threads)
{
    Task task = {.address = address, .size = size, .how = how};
    int most = (int)(size / SLICE) + 1;
    in_parallel(most < threads ? most : threads, populate_some, &task);
    errno = task.error;
    return task.error ? -1 : 0;
}
