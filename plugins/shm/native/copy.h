/* Copying bytes: the kernels, and which of them copies large transfers.
 *
 * Most kernels store past the cache. Such a store does not first read the line that it overwrites, which
 * saves a third of the traffic to memory; it pays where more is moved than the caches hold. */
#ifndef DATADIST_COPY_H
#define DATADIST_COPY_H

#include <stddef.h>

/* Kernels, by the number that Python uses. MEMCPY is the C library's and exists everywhere. AUTO stands
 * for the choice of tuning.h. */
enum {
    KERNEL_MEMCPY,
    KERNEL_REP_MOVSB,
    KERNEL_SSE2,
    KERNEL_AVX2,
    KERNEL_AVX512,
    KERNEL_NEON,
    KERNELS,
    KERNEL_AUTO = KERNELS,
};

/* Copy ranges that do not overlap. */
typedef void (*Copy)(char *to, const char *from, size_t bytes);

/* A kernel, each in a file of its own; is_supported tells whether this processor has its instructions. */
typedef struct {
    const char *name;
    Copy copy;
    int (*is_supported)(void);
} Kernel;

/* The kernel of a number, or NULL where this machine or build does not have it. */
const Kernel *find_kernel(int number);

/* The function of a kernel or of KERNEL_AUTO, or NULL. */
Copy copy_kernel(int number);

/* The kernel to use where nothing was measured, by what the processor has. */
int default_kernel(void);

/* Make non-temporal stores of this thread visible before whatever it does next. */
void copy_fence(void);

/* What is built. */
#if defined(__x86_64__) && !defined(DATADIST_PORTABLE)
#define HAVE_X86_KERNELS
#elif defined(__aarch64__) && !defined(DATADIST_PORTABLE)
#define HAVE_ARM_KERNELS
#endif

extern const Kernel memcpy_kernel;
#ifdef HAVE_X86_KERNELS
extern const Kernel rep_movsb_kernel, sse2_kernel, avx2_kernel, avx512_kernel;
#endif
#ifdef HAVE_ARM_KERNELS
extern const Kernel neon_kernel;
#endif

#endif
