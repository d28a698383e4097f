/* Huge pages of a file of memory, made on demand (MADV_COLLAPSE, Linux 6.1): the kernel does that also where it offers
 * none to programs that merely ask (shmem_enabled is never). They take a third of the time of small pages, and whoever
 * maps the file maps each in one step. */
#ifndef DATADIST_HUGE_H
#define DATADIST_HUGE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What a mapping and its place in the file have to be multiples of. */
enum { HUGE_PAGE = 2 << 20 };

/* Where to map so many bytes so that they can have some, if nobody else maps there first; NULL for anywhere. */
void *huge_place(size_t size);

/* Make those of a mapping of which the file has nothing yet. What cannot be made is left out; it may be made of
 * small pages. Ends early once *stop is not 0. Whether more can be had. */
int huge_make(char *address, size_t size, int file, off_t offset, const _Atomic int64_t *stop);

/* Make them of the small pages that a file has, which are copied; while a processor is spare, else slowly. */
void huge_merge(char *address, size_t size, const _Atomic int64_t *stop);

#endif
