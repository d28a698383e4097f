/* Huge pages of a file of memory, made on demand (MADV_COLLAPSE, Linux 6.1): the kernel does that also where it offers
 * none to programs that merely ask (shmem_enabled is never). Huge pages are made in less time than small ones, and
 * whoever maps the file maps each in one step.
 *
 * During such a call nobody in the process can map or unmap until each processor has done a little work of the
 * kernel's, so where processors are busy it can take many milliseconds. */
#ifndef DATADIST_HUGE_H
#define DATADIST_HUGE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What a mapping and its place in the file have to be multiples of. */
enum { HUGE_PAGE = 2 << 20 };

/* Whether more can be had. */
enum {
    HUGE_REFUSED, /* never: not here, or the kernel has no such call, or the processors are too busy for it */
    HUGE_SHORT,   /* not now: it found too little memory */
    HUGE_MADE,
};

/* Where to map so many bytes so that they can have some, if nobody else maps there first; NULL for anywhere. */
void *huge_place(size_t size);

/* Make the huge pages of a mapping where the file has no data yet. left is a byte for each page from the beginning of
 * the file, and becomes 1 for a page that has data, or was not made: huge_merge does these. Ends early once *stop
 * is not 0.
 *
 * *careful: one page in a call, and none where no processor is spare. It becomes 1 where a call took long: a virtual
 * machine that has to get its memory from its host takes some 5 ms for a page, and the kernel runs nobody else on that
 * processor meanwhile. */
int huge_make(char *address, size_t size, int file, off_t offset, char *left, const _Atomic int64_t *stop,
              int *careful);

/* Make huge pages of the small ones of a file, which are copied: those that are left of its first count ones. It is
 * mapped at address. While a processor is spare, else slowly; each page is tried twice. left becomes 0 where it went
 * well. careful: one page in a call. */
void huge_merge(char *address, char *left, size_t count, const _Atomic int64_t *stop, int careful);

#endif
