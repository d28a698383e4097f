#define _GNU_SOURCE
#include "huge.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "parallel.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum {
    PAGE = 4096,
    STRETCH = 16 << 20, /* what is made in one call: some milliseconds, where the kernel has memory at hand */
    LOOKS = 64,         /* a millisecond apart, at most, for a processor that is spare; then a stretch is copied anyway */
};

static size_t next_huge(size_t offset)
{
    return (offset + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
}

void *huge_place(size_t size)
{
    if (size < HUGE_PAGE)
        return NULL;
    void *place = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED)
        return NULL;
    (void)munmap(place, size + HUGE_PAGE);
    return (void *)next_huge((size_t)place);
}

static int is_stopped(const _Atomic int64_t *stop)
{
    return atomic_load_explicit(stop, memory_order_relaxed) != 0;
}

/* Whether the kernel has taken that, but for what others use just now. */
static int collapse(char *address, size_t size)
{
    return madvise(address, size, MADV_COLLAPSE) == 0 || errno == EAGAIN;
}

/* Whether the file has nothing there yet; then it is given one page: the kernel makes a huge one where it finds a part
 * of it, and on the same node. The read has the kernel clear what it has set aside, which may be a whole huge page: it
 * would map that as it is, and clear it later, with what was written meanwhile. */
static int begin_one(const char *address, int file, off_t at)
{
    off_t data = lseek(file, at, SEEK_DATA);
    if (data < 0 ? errno != ENXIO : data < at + HUGE_PAGE)
        return 0;
    if (fallocate(file, 0, at, PAGE) != 0)
        return 0;
    (void)*(const volatile char *)address;
    return 1;
}

int huge_make(char *address, size_t size, int file, off_t offset, const _Atomic int64_t *stop)
{
    size_t at = next_huge((size_t)address) - (size_t)address;
    if ((offset + (off_t)at) % HUGE_PAGE != 0 || sysconf(_SC_PAGESIZE) != PAGE)
        return 0;
    while (at + HUGE_PAGE <= size && !is_stopped(stop)) {
        size_t from = at, end = size - at < STRETCH ? size : at + STRETCH;
        while (at + HUGE_PAGE <= end && begin_one(address + at, file, offset + (off_t)at))
            at += HUGE_PAGE;
        if (at > from && !collapse(address + from, at - from))
            return 0;
        if (at + HUGE_PAGE <= end)
            at += HUGE_PAGE; /* which is in use */
    }
    return 1;
}

static void wait_for_a_processor(const _Atomic int64_t *stop)
{
    struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; i < LOOKS && !is_stopped(stop) && !is_processor_spare(); i++)
        nanosleep(&moment, NULL);
}

void huge_merge(char *address, size_t size, const _Atomic int64_t *stop)
{
    for (size_t at = 0; at < size; at += STRETCH) {
        wait_for_a_processor(stop);
        if (is_stopped(stop) || !collapse(address + at, size - at < STRETCH ? size - at : STRETCH))
            return;
    }
}
