/* Stores past the cache by 16 bytes, which every x86-64 processor has. */
#include "copy.h"

#ifdef HAVE_X86_KERNELS

#include <immintrin.h>

#define STREAM_TARGET
#define STREAM_COPY copy_sse2

STREAM_TARGET static inline void move_line(char *to, const char *from)
{
    __m128i a = _mm_loadu_si128((const __m128i *)from);
    __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
    __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
    _mm_stream_si128((__m128i *)to, a);
    _mm_stream_si128((__m128i *)(to + 16), b);
    _mm_stream_si128((__m128i *)(to + 32), c);
    _mm_stream_si128((__m128i *)(to + 48), d);
}

#include "copy_stream.h"

static int is_supported(void)
{
    return 1;
}

const Kernel sse2_kernel = {"sse2", copy_sse2, is_supported};

#else
typedef int nothing; /* a file must not be empty */
#endif
