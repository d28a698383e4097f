/* Mappings of shared memory. Each returns 0, or -1 with errno. */
#ifndef DATADIST_MEMORY_H
#define DATADIST_MEMORY_H

#include <stddef.h>

/* Whether an errno says that the call itself is not permitted here, as by a filter of system calls. */
int is_refused(int error);

/* Map size bytes of fd; huge asks for huge pages, which the kernel gives where it is set up to. */
int map_shared(int fd, size_t size, int writable, int huge, void **address);

/* The same for memory of a peer, for which nothing is reserved here. */
int map_peer(int fd, size_t size, int writable, int huge, void **address);

/* In steps, between which other threads can map. */
int unmap(char *address, size_t size);

/* Make all pages that do not exist yet, in up to threads threads; errno is ENOMEM where memory is short. */
int populate(char *address, size_t size, int threads);

#endif
