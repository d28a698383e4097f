#include "processor.h"

#include "copy.h"

#ifdef HAVE_X86_KERNELS

#include <cpuid.h>

/* __builtin_cpu_supports would say it too, but Clang's run-time library for it brings a memcpy of its own,
 * which takes the place of the C library's, which is faster. */

/* Which registers the kernel saves, by the processor's mask XCR0. */
static unsigned saved_registers(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int ask(void)
{
    enum { OSXSAVE = 1 << 27, ERMS = 1 << 9, AVX2 = 1 << 5, AVX512F = 1 << 16 };
    enum { OF_AVX = 0x6, OF_AVX512 = 0xe6 };
    unsigned a, b, c, d, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    unsigned saved = c & OSXSAVE ? saved_registers() : 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if (b & ERMS)
        found |= HAS_ERMS;
    if (b & AVX2 && (saved & OF_AVX) == OF_AVX)
        found |= HAS_AVX2;
    if (b & AVX512F && (saved & OF_AVX512) == OF_AVX512)
        found |= HAS_AVX512F;
    return (int)found;
}

/* Asked once: a virtual machine leaves to its host for each CPUID. */
int processor_features(void)
{
    enum { KNOWN = 1 << 30 };
    static _Atomic int known;
    if (!known)
        known = ask() | KNOWN;
    return known;
}

#else

int processor_features(void)
{
    return 0;
}

#endif
