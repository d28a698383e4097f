/* A peer's memory, mapped here: which of its pages exist.
 *
 * A fault in a mapping of shared memory makes a page that does not exist yet, and charges it to who
 * touched it. What a peer has not populated is therefore not touched: it is read through the
 * descriptor, which makes nothing, and not written until the owner has populated it. */
#ifndef DATADIST_PAGES_H
#define DATADIST_PAGES_H

#include <stddef.h>
#include <stdint.h>

typedef struct Pages Pages;

/* Map size bytes of fd, which is duplicated. stays: a page that exists cannot be taken away again, which
 * the owner has sealed; else what was seen counts for some milliseconds. search: have those
 * pages in the page table that exist, which makes the first transfers faster; a thread of low priority does
 * that, some milliseconds later. NULL with errno. */
Pages *pages_map(int fd, size_t size, int writable, int huge, int stays, int search);

/* Ends a search, too. */
void pages_unmap(Pages *pages);

/* In a forked child, which does not have the mapping: let go of the memory. pages_unmap comes later. */
void pages_leave(Pages *pages);

char *pages_address(const Pages *pages);

/* Hold all searches of this process while something large moves (1), which needs the processors and maps
 * its pages itself, or no longer (-1). */
void pages_hold_searches(int count);

/* Whether the search has ended, or none was begun; waits for that for some milliseconds. */
int pages_found(Pages *pages, int milliseconds);

/* What pages_exist takes for the present moment. */
uint32_t pages_moment(const Pages *pages, int64_t now_ns);

/* Whether all pages of a range exist. Asks the kernel about what is not known yet. */
int pages_exist(Pages *pages, size_t offset, size_t bytes, uint32_t moment);

/* Read a range, whose pages need not exist; 0, or errno. */
int pages_read(const Pages *pages, size_t offset, char *to, size_t bytes);

/* The bytes from offset on, at most bytes, whose pages are looked up together. */
size_t pages_piece(size_t offset, size_t bytes);

#endif
