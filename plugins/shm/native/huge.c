#define _GNU_SOURCE
#include "huge.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "parallel.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum {
    PAGE = 4096,
    PAGES = HUGE_PAGE / PAGE,
    AT_ONCE = 8,        /* made in one call: a millisecond, where the kernel has memory at hand */
    MOST_CALL_MS = 8,   /* of the processor's time, about; where one takes more, care is taken from then on */
    MOST_WAIT_MS = 200, /* of a call for processors; one that waits longer is the last one */
    MAKE_LOOKS = 4,     /* for a processor that is spare, 1 ms apart, before pages are made in any case, or left small */
    MERGE_LOOKS = 64,   /* the same before pages are merged: one, if no processor was spare */
    ROUNDS = 2,         /* of merging: others may use a page just then */
    MOST_SHORTAGES = 3, /* one after another, until merging ends */
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

/* Wait until a processor is spare, for at most so many looks; whether one is. */
static int wait_for_a_processor(int looks, const _Atomic int64_t *stop)
{
    struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; i < looks && !is_stopped(stop); i++) {
        if (i > 0)
            nanosleep(&moment, NULL);
        if (is_processor_spare())
            return 1;
    }
    return 0;
}

static int64_t milliseconds(const struct timespec *time)
{
    return time->tv_sec * 1000 + time->tv_nsec / 1000000;
}

/* What has passed, and how much of that this thread has run; from some moment on. */
static void read_clocks(int64_t *passed_ms, int64_t *ran_ms)
{
    struct timespec passed, ran;
    clock_gettime(CLOCK_MONOTONIC, &passed);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ran);
    *passed_ms = milliseconds(&passed);
    *ran_ms = milliseconds(&ran);
}

/* Have the kernel make count pages; *whole is whether it has made all. *careful becomes 1 where it took long. */
static int collapse(char *address, size_t count, int *whole, int *careful)
{
    int64_t began, began_ran, ended, ended_ran;
    read_clocks(&began, &began_ran);
    *whole = madvise(address, count * HUGE_PAGE, MADV_COLLAPSE) == 0;
    int error = *whole ? 0 : errno;
    read_clocks(&ended, &ended_ran);
    *careful |= ended_ran - began_ran > MOST_CALL_MS;
    if (ended - began - (ended_ran - began_ran) > MOST_WAIT_MS)
        return HUGE_REFUSED;
    if (error == ENOMEM || error == EBUSY)
        return HUGE_SHORT;
    return error == 0 || error == EAGAIN ? HUGE_MADE : HUGE_REFUSED; /* EAGAIN: others use some of it just now */
}

/* Have the kernel clear what it has set aside there, which may be a whole huge page: it would map that as it is, and
 * clear it later, with what was written meanwhile. What is read does not matter, so it may be written just now. */
__attribute__((no_sanitize("thread"))) static void have_cleared(const char *address)
{
    (void)*(const volatile char *)address;
}

/* Whether the file has nothing there yet; then it is given one page: the kernel makes a huge one where it finds a part
 * of it, and on the same node. That is another one of the huge page each time, since it decides about the node where
 * these are to alternate. */
static int begin_one(const char *address, int file, off_t at)
{
    off_t data = lseek(file, at, SEEK_DATA), place = at / HUGE_PAGE % PAGES * PAGE;
    if (data < 0 ? errno != ENXIO : data < at + HUGE_PAGE)
        return 0;
    if (fallocate(file, 0, at + place, PAGE) != 0)
        return 0;
    have_cleared(address + place);
    return 1;
}

int huge_make(char *address, size_t size, int file, off_t offset, char *left, const _Atomic int64_t *stop,
              int *careful)
{
    size_t first = next_huge((size_t)address) - (size_t)address;
    if ((offset + (off_t)first) % HUGE_PAGE != 0 || sysconf(_SC_PAGESIZE) != PAGE || first > size)
        return HUGE_REFUSED;
    char *pages = address + first;
    size_t count = (size - first) / HUGE_PAGE, at = 0;
    off_t begin = offset + (off_t)first;
    int result = HUGE_MADE, spare = 1;
    left += begin / HUGE_PAGE;
    while (at < count && result == HUGE_MADE && !is_stopped(stop)) {
        size_t most = *careful ? 1 : AT_ONCE, from = at, end = count - at < most ? count : at + most;
        int whole = 1;
        while (at < end && begin_one(pages + at * HUGE_PAGE, file, begin + (off_t)(at * HUGE_PAGE)))
            at++;
        if (at > from) {
            spare = wait_for_a_processor(spare || !*careful ? MAKE_LOOKS : 1, stop);
            whole = spare || !*careful;
            if (whole)
                result = collapse(pages + from * HUGE_PAGE, at - from, &whole, careful);
        }
        if (!whole)
            memset(left + from, 1, at - from);
        if (at < end)
            left[at++] = 1; /* which is in use */
    }
    if (result == HUGE_SHORT)
        memset(left + at, 1, count - at);
    return result;
}

static void merge_round(
    char *address, char *left, size_t count, const _Atomic int64_t *stop, int *careful, int *result)
{
    int whole, shortages = 0;
    for (size_t at = 0, end; at < count && *result != HUGE_REFUSED && !is_stopped(stop); at = end) {
        end = at + 1;
        if (!left[at])
            continue;
        size_t most = wait_for_a_processor(MERGE_LOOKS, stop) && !*careful ? AT_ONCE : 1;
        while (end < count && left[end] && end - at < most)
            end++;
        *result = collapse(address + at * HUGE_PAGE, end - at, &whole, careful);
        if (whole)
            memset(left + at, 0, end - at);
        shortages = *result == HUGE_SHORT ? shortages + 1 : 0;
        if (shortages == MOST_SHORTAGES)
            *result = HUGE_REFUSED;
    }
}

void huge_merge(char *address, char *left, size_t count, const _Atomic int64_t *stop, int careful)
{
    int result = HUGE_MADE;
    for (int round = 0; round < ROUNDS && result != HUGE_REFUSED && memchr(left, 1, count) != NULL; round++)
        merge_round(address, left, count, stop, &careful, &result);
}
