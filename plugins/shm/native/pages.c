#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"
#include "parallel.h"

enum {
    GRANULE = 64 << 10, /* what is known or not; no smaller than a page */
    PIECE = 512 << 10,  /* what the kernel is asked about at a time */
    STRETCH = 4 << 20,  /* what a search maps at a time: some hundred microseconds */
    SMALLEST_PAGE = 4096,
    HUGETLB = 0x958458f6, /* HUGETLBFS_MAGIC */
    MOMENT_SHIFT = 22,    /* 4 ms */
    FIRST_PAUSE_NS = 20000000, /* in which a link is made and the first transfers may be under way */
    LEAST_PAUSE_NS = 1000000,  /* from one look to the next whether these have ended; twice as long each time, */
    MOST_PAUSE_NS = 32000000,  /* since a look is in their way; after the longest a stretch is mapped anyway */
    UNMAP_MS = 2, /* that unmapping waits for the end of a search, which takes microseconds unless all
                   * processors are busy; then the search unmaps */
};

struct Pages {
    char *address;
    size_t size;
    int fd;
    int stays;
    int reserved;              /* huge pages of hugetlbfs, of which mincore knows nothing */
    size_t page;               /* bytes */
    _Atomic int whole;         /* all of it exists, and stays */
    _Atomic int unmapping;     /* the search is to end */
    _Atomic int users;         /* who mapped it, and the search; the last one unmaps */
    _Atomic uint16_t known[]; /* per granule: the moment at which all of its pages existed, or 0 */
};

static void begin_search(Pages *pages);

Pages *pages_map(int fd, size_t size, int writable, int huge, int stays, int search)
{
    struct statfs kind = {.f_type = HUGETLB}; /* where the call is refused, the stricter way serves both */
    void *address;
    Pages *pages = calloc(1, sizeof(*pages) + (size / GRANULE + 1) * sizeof(uint16_t));
    if (pages == NULL)
        return NULL;
    pages->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int known = fstatfs(fd, &kind) == 0 || is_refused(errno);
    if (pages->fd < 0 || !known || map_peer(fd, size, writable, huge, &address) != 0) {
        int error = errno;
        if (pages->fd >= 0)
            close(pages->fd);
        free(pages);
        errno = error;
        return NULL;
    }
    pages->address = address;
    pages->size = size;
    pages->users = 1;
    pages->stays = stays;
    pages->reserved = kind.f_type == HUGETLB;
    pages->page = (size_t)sysconf(_SC_PAGESIZE);
    if (search && size > STRETCH) /* less is mapped in a moment */
        begin_search(pages);
    return pages;
}

/* Transfers that hold the searches of this process. */
static _Atomic int holding;

/* Wait while *word has that value, at most so many ns. */
static void wait_for_change(_Atomic int *word, int value, long ns)
{
    struct timespec most = {.tv_nsec = ns};
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &most, NULL, 0);
}

static void tell_change(_Atomic int *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void let_go(Pages *pages)
{
    if (atomic_fetch_sub(&pages->users, 1) > 1) {
        tell_change(&pages->users); /* who waited may have freed it: then the address wakes nobody */
        return;
    }
    if (pages->fd >= 0) {
        (void)unmap(pages->address, pages->size);
        close(pages->fd);
    }
    free(pages);
}

int pages_found(Pages *pages, int milliseconds)
{
    int users;
    for (int i = 0; i < milliseconds && (users = atomic_load(&pages->users)) > 1; i++)
        wait_for_change(&pages->users, users, 1000000);
    return atomic_load(&pages->users) == 1;
}

void pages_unmap(Pages *pages)
{
    atomic_store(&pages->unmapping, 1);
    tell_change(&pages->unmapping);
    (void)pages_found(pages, UNMAP_MS);
    let_go(pages);
}

void pages_leave(Pages *pages)
{
    if (pages->fd >= 0)
        close(pages->fd);
    pages->fd = -1;
    pages->users = 1; /* searches and transfers go on in the parent only */
    holding = 0;
}

char *pages_address(const Pages *pages)
{
    return pages->address;
}

uint32_t pages_moment(const Pages *pages, int64_t now_ns)
{
    return pages->stays ? 1 : ((uint32_t)(now_ns >> MOMENT_SHIFT) & 0x7fff) | 0x8000;
}

/* Of reserved huge pages, and where mincore is refused, only the number of pages is known: all of them, or
 * none that counts. */
static int is_whole(const Pages *pages)
{
    struct stat now;
    return fstat(pages->fd, &now) == 0 && (uint64_t)now.st_blocks * 512 >= pages->size;
}

/* Mark the granules that lie in a range of pages that exist. */
static void mark(Pages *pages, size_t begin, size_t end, uint32_t moment)
{
    if (end == pages->size)
        end += GRANULE - 1; /* the last granule may be a part of one */
    for (size_t at = (begin + GRANULE - 1) / GRANULE; (at + 1) * GRANULE <= end; at++)
        atomic_store_explicit(&pages->known[at], (uint16_t)moment, memory_order_relaxed);
}

static int look_up_all(Pages *pages, uint32_t moment)
{
    if (!is_whole(pages))
        return 0;
    mark(pages, 0, pages->size, moment);
    return 1;
}

/* Ask the kernel about whole granules, at most PIECE and one; whether the range itself exists. */
static int look_up(Pages *pages, size_t offset, size_t bytes, uint32_t moment)
{
    if (pages->reserved)
        return look_up_all(pages, moment);
    if (pages->stays && is_whole(pages)) {
        pages->whole = 1;
        return 1;
    }
    unsigned char found[(PIECE + 2 * GRANULE) / SMALLEST_PAGE];
    size_t begin = offset / GRANULE * GRANULE, end = (offset + bytes + GRANULE - 1) / GRANULE * GRANULE;
    int all = 1;
    if (end > pages->size)
        end = pages->size;
    if (mincore(pages->address + begin, end - begin, found) != 0)
        return is_refused(errno) && look_up_all(pages, moment);
    for (size_t at = begin; at < end; at += GRANULE) {
        size_t stop = at + GRANULE < end ? at + GRANULE : end;
        int whole = 1;
        for (size_t page = at; page < stop; page += pages->page)
            if (!(found[(page - begin) / pages->page] & 1)) {
                whole = 0;
                all &= page + pages->page <= offset || page >= offset + bytes;
            }
        if (whole)
            mark(pages, at, stop, moment);
    }
    return all;
}

static int is_known(const Pages *pages, size_t offset, size_t bytes, uint32_t moment)
{
    if (pages->whole)
        return 1;
    for (size_t at = offset / GRANULE; at <= (offset + bytes - 1) / GRANULE; at++)
        if (atomic_load_explicit(&pages->known[at], memory_order_relaxed) != moment)
            return 0;
    return 1;
}

size_t pages_piece(size_t offset, size_t bytes)
{
    size_t left = PIECE - offset % PIECE;
    return bytes < left ? bytes : left;
}

int pages_exist(Pages *pages, size_t offset, size_t bytes, uint32_t moment)
{
    while (bytes > 0) {
        size_t part = pages_piece(offset, bytes);
        if (!is_known(pages, offset, part, moment) && !look_up(pages, offset, part, moment))
            return 0;
        offset += part;
        bytes -= part;
    }
    return 1;
}

int pages_read(const Pages *pages, size_t offset, char *to, size_t bytes)
{
    while (bytes > 0) {
        ssize_t moved = pread(pages->fd, to, bytes, (off_t)offset);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return moved < 0 ? errno : EIO;
        to += moved;
        offset += (size_t)moved;
        bytes -= (size_t)moved;
    }
    return 0;
}

/* Have the kernel map pages that exist, by reads: each maps its neighbours, too. That takes half the time of
 * MADV_POPULATE_READ, during which nobody else could map or unmap. What is read does not matter, so it may be
 * written meanwhile. */
__attribute__((no_sanitize("thread"))) static void map_range(Pages *pages, size_t begin, size_t bytes)
{
    for (size_t at = begin; at < begin + bytes; at += GRANULE)
        (void)*(volatile char *)(pages->address + at);
}

static void map_piece(Pages *pages, size_t begin)
{
    size_t left = pages->size - begin, bytes = left < PIECE ? left : PIECE;
    uint32_t moment = pages_moment(pages, 0);
    (void)look_up(pages, begin, bytes, moment);
    if (is_known(pages, begin, bytes, moment)) {
        map_range(pages, begin, bytes);
        return;
    }
    for (size_t at = begin; at < begin + bytes; at += GRANULE) {
        size_t part = begin + bytes - at < GRANULE ? begin + bytes - at : GRANULE;
        if (is_known(pages, at, part, moment))
            map_range(pages, at, part);
    }
}

void pages_hold_searches(int count)
{
    atomic_fetch_add(&holding, count);
}

static int is_needed_elsewhere(const Pages *pages)
{
    return !atomic_load(&pages->unmapping) && (atomic_load(&holding) > 0 || !is_processor_spare());
}

/* Let go first what moves just now, here or in another process; whether the search is to go on. */
static int wait_for_others(Pages *pages)
{
    for (long pause = LEAST_PAUSE_NS; pause <= MOST_PAUSE_NS && is_needed_elsewhere(pages); pause *= 2)
        wait_for_change(&pages->unmapping, 0, pause);
    return !atomic_load(&pages->unmapping);
}

static void map_stretch(Pages *pages, size_t begin)
{
    size_t end = pages->size - begin < STRETCH ? pages->size : begin + STRETCH;
    for (size_t at = begin; at < end && !atomic_load(&pages->unmapping); at += PIECE)
        map_piece(pages, at);
}

static void *search(void *argument)
{
    Pages *pages = argument;
    go_last();
    wait_for_change(&pages->unmapping, 0, FIRST_PAUSE_NS);
    for (size_t at = 0; at < pages->size && wait_for_others(pages); at += STRETCH)
        map_stretch(pages, at);
    let_go(pages);
    return NULL;
}

/* Where no thread can be started, whatever moves maps what it uses. */
static void begin_search(Pages *pages)
{
    atomic_fetch_add(&pages->users, 1);
    if (start_detached(search, pages) != 0)
        atomic_fetch_sub(&pages->users, 1);
}
