/* Mappings of shared memory. Each returns 0, or -1 with errno. */
#ifndef DATADIST_MEMORY_H
#define DATADIST_MEMORY_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Whether an errno says that the call itself is not permitted here, as by a filter of system calls. */
int is_refused(int error);

/* Map size bytes of fd; huge: so that there can be huge pages, for which the kernel is asked as well. */
int map_shared(int fd, size_t size, int writable, int huge, void **address);

/* The same for memory of a peer, for which nothing is reserved here. */
int map_peer(int fd, size_t size, int writable, int huge, void **address);

/* In steps, between which other threads can map. */
int unmap(char *address, size_t size);

/* Make all pages that do not exist yet, in up to threads threads; errno is ENOMEM where memory is short.
 * With the file that is mapped there, and offset, where that begins in it: nobody who maps or unmaps has to
 * wait meanwhile, but a file knows nothing of the huge pages that its mapping asked for. Else file is -1.
 * Unless stop is NULL this ends early, without an error, once *stop is not 0; and with a file the program's threads
 * go first. */
int populate(char *address, size_t size, int threads, int file, off_t offset, const _Atomic int64_t *stop);

#endif
