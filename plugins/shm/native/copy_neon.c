/* Stores past the cache by pairs of 16 bytes (STNP). */
#include "copy.h"

#ifdef HAVE_ARM_KERNELS

#include <arm_neon.h>

#define STREAM_TARGET
#define STREAM_COPY copy_neon

STREAM_TARGET static inline void move_line(char *to, const char *from)
{
    uint8x16_t a = vld1q_u8((const uint8_t *)from);
    uint8x16_t b = vld1q_u8((const uint8_t *)from + 16);
    uint8x16_t c = vld1q_u8((const uint8_t *)from + 32);
    uint8x16_t d = vld1q_u8((const uint8_t *)from + 48);
    /* GCC has no intrinsic for it */
    __asm__ volatile("stnp %q1, %q2, [%0]\n\t"
                     "stnp %q3, %q4, [%0, #32]"
                     :
                     : "r"(to), "w"(a), "w"(b), "w"(c), "w"(d)
                     : "memory");
}

#include "copy_stream.h"

static int is_supported(void)
{
    return 1;
}

const Kernel neon_kernel = {"neon", copy_neon, is_supported};

#else
typedef int nothing; /* a file must not be empty */
#endif
