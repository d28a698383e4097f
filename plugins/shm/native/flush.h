/* Taking memory out of the caches, so that what is measured next comes from memory. */
#ifndef DATADIST_FLUSH_H
#define DATADIST_FLUSH_H

#include <stddef.h>

/* Where the processor cannot be asked to, nothing happens. */
void flush(const char *address, size_t bytes);

#endif
