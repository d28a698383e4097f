/* Copying bytes: through the cache, or past it with non-temporal stores.
 *
 * A store past the cache does not first read the line that it overwrites, which saves a third of the
 * traffic to memory; it pays where more is moved than the caches hold. */
#ifndef DATADIST_COPY_H
#define DATADIST_COPY_H

#include <stddef.h>

/* Kernels, by the number that Python uses. PLAIN is memcpy and exists everywhere. */
enum { KERNEL_PLAIN = 0, KERNEL_SSE2 = 1, KERNEL_AVX2 = 2, KERNEL_ARM = 3, KERNELS = 4 };

/* Copy ranges that do not overlap. */
typedef void (*Copy)(char *to, const char *from, size_t bytes);

/* The function of a kernel, or NULL where this machine or build does not have it. */
Copy copy_kernel(int kernel);

/* Make non-temporal stores of this thread visible before whatever it does next. */
void copy_fence(void);

#endif
