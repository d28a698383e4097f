/* A kernel that stores past the cache, made of one that moves a line: copy_<NAME>(). To be included by
 * the file of that kernel, after it has defined
 *   STREAM_TARGET         attributes of functions that use its instructions,
 *   move_line(to, from)   which moves LINE bytes to where a line begins,
 *   STREAM_COPY           the name of the function that is made.
 *
 * The order of the stores is a part of the kernel: a line that is written in pieces, with stores to
 * another line between them, may leave the processor's write-combining buffers in pieces, each a
 * transfer of its own. A compiler may reorder stores (GCC 12 does at -O3): KEEP_ORDER prevents that. */
#include <stdint.h>
#include <string.h>

enum {
    LINE = 64,
    STREAM_SEGMENT = 1024, /* below, the ends would cost more than the middle saves: through the cache */
    PAGE = 4096,           /* what the processor reads ahead in */
    RUN = 256,             /* bytes of a page before the next page's turn */
    PAGES = 8,             /* pages in turn, which keeps so many more reads under way */
};

#define KEEP_ORDER __asm__ volatile("" ::: "memory")

STREAM_TARGET static inline void move_run(char *to, const char *from, size_t bytes)
{
    for (; bytes >= LINE; bytes -= LINE, to += LINE, from += LINE) {
        move_line(to, from);
        KEEP_ORDER;
    }
}

STREAM_TARGET static inline void move_pages(char *to, const char *from, int pages)
{
    for (size_t at = 0; at < PAGE; at += RUN)
        for (int page = 0; page < pages; page++)
            move_run(to + page * PAGE + at, from + page * PAGE + at, RUN);
}

/* The target is brought to a full line; pages follow, some at a time, then lines, and what is left goes
 * through the cache. */
STREAM_TARGET static void STREAM_COPY(char *to, const char *from, size_t bytes)
{
    if (bytes >= STREAM_SEGMENT) {
        size_t part = -(uintptr_t)to & (LINE - 1);
        memcpy(to, from, part);
        to += part, from += part, bytes -= part;
        for (int pages = PAGES; pages > 1; pages /= 2)
            for (part = (size_t)pages * PAGE; bytes >= part; bytes -= part) {
                move_pages(to, from, pages);
                to += part, from += part;
            }
        part = bytes - bytes % LINE;
        move_run(to, from, part);
        to += part, from += part, bytes -= part;
    }
    memcpy(to, from, bytes);
}
