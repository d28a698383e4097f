#include "flush.h"

#include "copy.h"

enum { LINE = 64 };

#if defined(HAVE_X86_KERNELS)

#include <cpuid.h>
#include <immintrin.h>

/* Several times faster than the other one, which keeps the order of lines. */
__attribute__((target("clflushopt"))) static void flush_unordered(const char *address, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE)
        _mm_clflushopt((void *)(address + at));
}

static void flush_ordered(const char *address, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE)
        _mm_clflush(address + at);
}

void flush(const char *address, size_t bytes)
{
    enum { CLFLUSHOPT = 1 << 23 };
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && b & CLFLUSHOPT)
        flush_unordered(address, bytes);
    else
        flush_ordered(address, bytes);
    _mm_mfence();
}

#elif defined(HAVE_ARM_KERNELS)

void flush(const char *address, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE)
        __asm__ volatile("dc civac, %0" : : "r"(address + at) : "memory");
    __asm__ volatile("dsb ish" : : : "memory");
}

#else

void flush(const char *address, size_t bytes)
{
    (void)address;
    (void)bytes;
}

#endif
