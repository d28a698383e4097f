/* Stores past the cache by 64 bytes: a whole line at once. */
#include "copy.h"
#include "processor.h"

#ifdef HAVE_X86_KERNELS

#include <immintrin.h>

#define STREAM_TARGET __attribute__((target("avx512f")))
#define STREAM_COPY copy_avx512

STREAM_TARGET static inline void move_line(char *to, const char *from)
{
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}

#include "copy_stream.h"

static int is_supported(void)
{
    return processor_features() & HAS_AVX512F;
}

const Kernel avx512_kernel = {"avx512", copy_avx512, is_supported};

#else
typedef int nothing; /* a file must not be empty */
#endif
