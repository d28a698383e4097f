/* Stores past the cache by 32 bytes. */
#include "copy.h"
#include "processor.h"

#ifdef HAVE_X86_KERNELS

#include <immintrin.h>

#define STREAM_TARGET __attribute__((target("avx2")))
#define STREAM_COPY copy_avx2

STREAM_TARGET static inline void move_line(char *to, const char *from)
{
    __m256i a = _mm256_loadu_si256((const __m256i *)from);
    __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)(to + 32), b);
}

#include "copy_stream.h"

static int is_supported(void)
{
    return processor_features() & HAS_AVX2;
}

const Kernel avx2_kernel = {"avx2", copy_avx2, is_supported};

#else
typedef int nothing; /* a file must not be empty */
#endif
