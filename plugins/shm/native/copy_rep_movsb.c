/* The processor's own instruction for copies, where it is fast (Enhanced REP MOVSB). */
#include "copy.h"
#include "processor.h"

#ifdef HAVE_X86_KERNELS

static void copy_rep_movsb(char *to, const char *from, size_t bytes)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

static int is_supported(void)
{
    return processor_features() & HAS_ERMS;
}

const Kernel rep_movsb_kernel = {"rep_movsb", copy_rep_movsb, is_supported};

#else
typedef int nothing; /* a file must not be empty */
#endif
