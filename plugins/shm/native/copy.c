#include "copy.h"

#include "tuning.h"

#ifdef HAVE_X86_KERNELS
#include <immintrin.h>
#endif

static const Kernel *const kernels[KERNELS] = {
    [KERNEL_MEMCPY] = &memcpy_kernel,
#ifdef HAVE_X86_KERNELS
    [KERNEL_REP_MOVSB] = &rep_movsb_kernel,
    [KERNEL_SSE2] = &sse2_kernel,
    [KERNEL_AVX2] = &avx2_kernel,
    [KERNEL_AVX512] = &avx512_kernel,
#endif
#ifdef HAVE_ARM_KERNELS
    [KERNEL_NEON] = &neon_kernel,
#endif
};

const Kernel *find_kernel(int number)
{
    if (number < 0 || number >= KERNELS || kernels[number] == NULL)
        return NULL;
    return kernels[number]->is_supported() ? kernels[number] : NULL;
}

/* The widest stores past the cache. */
int default_kernel(void)
{
    int number = KERNELS - 1;
    while (find_kernel(number) == NULL)
        number--;
    return number;
}

Copy copy_kernel(int number)
{
    const Kernel *kernel = find_kernel(number == KERNEL_AUTO ? chosen_kernel() : number);
    return kernel ? kernel->copy : NULL;
}

void copy_fence(void)
{
#ifdef HAVE_X86_KERNELS
    _mm_sfence();
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
