#include "copy.h"

#include <stdint.h>
#include <string.h>

enum {
    STREAM_SEGMENT = 1024, /* below, the ends would cost more than the middle saves: through the cache */
    PAGE = 4096,           /* what the processor reads ahead in */
    RUN = 512,             /* bytes of a page before the next page's turn */
    PAGES = 4,             /* pages in turn, which keeps so many more reads under way */
};

static void copy_plain(char *to, const char *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

/* A kernel that streams: the target is brought to a full line; pages follow, some at a time, then whole
 * steps of STEP bytes, and what is left goes through the cache. BODY moves one step. */
#define STREAM_KERNEL(NAME, ATTRIBUTES, STEP, BODY)                                                \
    ATTRIBUTES static inline void NAME##_run(char *to, const char *from, size_t bytes)             \
    {                                                                                              \
        for (; bytes >= (STEP); bytes -= (STEP), to += (STEP), from += (STEP)) {                   \
            BODY                                                                                   \
        }                                                                                          \
    }                                                                                              \
    ATTRIBUTES static inline void NAME##_pages(char *to, const char *from, int pages)              \
    {                                                                                              \
        for (size_t at = 0; at < PAGE; at += RUN)                                                  \
            for (int page = 0; page < pages; page++)                                               \
                NAME##_run(to + page * PAGE + at, from + page * PAGE + at, RUN);                   \
    }                                                                                              \
    ATTRIBUTES static void NAME(char *to, const char *from, size_t bytes)                          \
    {                                                                                              \
        if (bytes >= STREAM_SEGMENT) {                                                             \
            size_t part = -(uintptr_t)to & 63;                                                     \
            memcpy(to, from, part);                                                                \
            to += part, from += part, bytes -= part;                                               \
            for (int pages = PAGES; pages > 1; pages /= 2)                                         \
                for (part = (size_t)pages * PAGE; bytes >= part; bytes -= part) {                  \
                    NAME##_pages(to, from, pages);                                                 \
                    to += part, from += part;                                                      \
                }                                                                                  \
            NAME##_run(to, from, bytes);                                                           \
            part = bytes - bytes % (STEP);                                                         \
            to += part, from += part, bytes -= part;                                               \
        }                                                                                          \
        memcpy(to, from, bytes);                                                                   \
    }

#if defined(__x86_64__) && !defined(DATADIST_PORTABLE)

#include <immintrin.h>

STREAM_KERNEL(copy_sse2, , 64, {
    __m128i a = _mm_loadu_si128((const __m128i *)from);
    __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
    __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
    _mm_stream_si128((__m128i *)to, a);
    _mm_stream_si128((__m128i *)(to + 16), b);
    _mm_stream_si128((__m128i *)(to + 32), c);
    _mm_stream_si128((__m128i *)(to + 48), d);
})

STREAM_KERNEL(copy_avx2, __attribute__((target("avx2"))), 128, {
    __m256i a = _mm256_loadu_si256((const __m256i *)from);
    __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
    __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
    __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)(to + 32), b);
    _mm256_stream_si256((__m256i *)(to + 64), c);
    _mm256_stream_si256((__m256i *)(to + 96), d);
})

Copy copy_kernel(int kernel)
{
    if (kernel == KERNEL_AVX2)
        return __builtin_cpu_supports("avx2") ? copy_avx2 : NULL;
    if (kernel == KERNEL_SSE2)
        return copy_sse2;
    return kernel == KERNEL_PLAIN ? copy_plain : NULL;
}

void copy_fence(void)
{
    _mm_sfence();
}

#else

#if defined(__aarch64__) && defined(__has_builtin) && !defined(DATADIST_PORTABLE)
#if __has_builtin(__builtin_nontemporal_store)
#define HAVE_ARM_KERNEL
#endif
#endif

#ifdef HAVE_ARM_KERNEL

#include <arm_neon.h>

STREAM_KERNEL(copy_arm, , 64, {
    uint8x16_t a = vld1q_u8((const uint8_t *)from);
    uint8x16_t b = vld1q_u8((const uint8_t *)from + 16);
    uint8x16_t c = vld1q_u8((const uint8_t *)from + 32);
    uint8x16_t d = vld1q_u8((const uint8_t *)from + 48);
    __builtin_nontemporal_store(a, (uint8x16_t *)to);
    __builtin_nontemporal_store(b, (uint8x16_t *)(to + 16));
    __builtin_nontemporal_store(c, (uint8x16_t *)(to + 32));
    __builtin_nontemporal_store(d, (uint8x16_t *)(to + 48));
})

#endif

Copy copy_kernel(int kernel)
{
#ifdef HAVE_ARM_KERNEL
    if (kernel == KERNEL_ARM)
        return copy_arm;
#endif
    return kernel == KERNEL_PLAIN ? copy_plain : NULL;
}

void copy_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif
