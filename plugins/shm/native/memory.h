/* Mappings of shared memory. Each returns 0, or -1 with errno. */
#ifndef DATADIST_MEMORY_H
#define DATADIST_MEMORY_H

#include <stddef.h>

/* Map size bytes of fd; huge asks for huge pages, which the kernel gives where it is set up to. */
int map_shared(int fd, size_t size, int writable, int huge, void **address);

/* How to populate: FOR_WRITING and FOR_READING make pages that do not exist yet. PRESENT is for
 * memory whose pages all exist, made by somebody else: one read per 64 KiB has the kernel map the
 * pages around it, which takes a fraction of the time of the other ways. */
enum { FOR_READING = 0, FOR_WRITING = 1, PRESENT = 2 };

/* Have all pages in the page table, in up to threads threads; errno is ENOMEM where memory is short. */
int populate(char *address, size_t size, int how, int threads);

#endif
