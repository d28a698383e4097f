/* The C library's copy: through the cache, until what it takes for large. */
#include "copy.h"

#include <string.h>

static void copy_memcpy(char *to, const char *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static int is_supported(void)
{
    return 1;
}

const Kernel memcpy_kernel = {"memcpy", copy_memcpy, is_supported};
