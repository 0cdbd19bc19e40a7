/* AVX2 kernels (with BMI2, FMA, F16C): elements are placed eight at a time by byte shuffles whose control comes from a
 * table indexed by eight bitmap bits. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <cpuid.h>
#include <pthread.h>
#include "glibc.h"

endor_avx2_controls endor_avx2_tables ENDOR_ALIGNED;
#define tables endor_avx2_tables

static void fill_tables(void) {
    for (int m = 0; m < 256; m++) {
        uint8_t place[8];
        for (int i = 0, k = 0; i < 8; i++) place[i] = m >> i & 1 ? (uint8_t)k++ : 0x80;
        memcpy(&tables.place[m], place, 8);
        for (int i = 0; i < 16; i++) {
            tables.place16[m][i] = place[i / 2] & 0x80 ? 0x80 : (uint8_t)(2 * place[i / 2] + (i & 1));
        }
        for (int i = 0; i < 32; i++) {
            tables.place_bf16[m][i] = i & 2 ? tables.place16[m][i / 4 * 2 + (i & 1)] : 0x80;
        }
    }
}

/* Whole lines where the destination begins one; else 16 bytes at a time up to there, so that pieces that follow each other
 * leave no line half written by an ordinary store. */
static TARGET void copy_streaming(void *dst, const void *src, size_t nbytes) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    size_t head = (size_t)(-(uintptr_t)d & 15);
    if (head > nbytes) head = nbytes;
    memcpy(d, s, head);
    d += head, s += head, nbytes -= head;
    for (; nbytes >= 16 && (uintptr_t)d & 63; nbytes -= 16, d += 16, s += 16) _mm_stream_si128((__m128i *)d, load128(s));
    for (; nbytes >= 128; nbytes -= 128, d += 128, s += 128) {
        __m256i a = load256(s), b = load256(s + 32), c = load256(s + 64), e = load256(s + 96);
        _mm256_stream_si256((__m256i *)d, a);
        _mm256_stream_si256((__m256i *)(d + 32), b);
        _mm256_stream_si256((__m256i *)(d + 64), c);
        _mm256_stream_si256((__m256i *)(d + 96), e);
    }
    for (; nbytes >= 16; nbytes -= 16, d += 16, s += 16) _mm_stream_si128((__m128i *)d, load128(s));
    memcpy(d, s, nbytes);
}

static TARGET uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t i = 0; i + 128 <= nbytes; i += 128) {
        for (int j = 0; j < 4; j++) sum[j] = _mm256_xor_si256(sum[j], load256(s + i + 32 * j));
    }
    sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    uint64_t words[4], total = 0;
    _mm256_storeu_si256((__m256i *)words, sum[0]);
    for (int i = 0; i < 4; i++) total ^= words[i];
    for (size_t i = nbytes / 128 * 128; i + 8 <= nbytes; i += 8) total ^= load64(s + i);
    return total;
}

static TARGET void fence(void) { _mm_sfence(); }

static endor_ops ops = {
    .name = "avx2",
    .expand = {endor_avx2_expand8, endor_avx2_expand16, endor_avx2_expand32},
    .stream_from = endor_avx2_stream,
    .scan = {endor_avx2_scan8, endor_avx2_scan16, endor_avx2_scan32},
    .compress = {endor_avx2_compress8, endor_avx2_compress16, endor_avx2_compress32},
    .histogram = endor_avx2_histogram,
    .split = endor_avx2_split,
    .split_words = endor_avx2_split_words,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .streaming_bytes = 16,
    .dot = endor_avx2_dot,
    .rows = endor_avx2_rows,
    .row_runs = endor_avx2_row_runs,
    .rows_without_bitmap = 1,
    .arrange = endor_avx2_arrange,
    .popcount = endor_avx2_popcount,
};

static int supported;

static int has_f16c(void) { /* which clang's __builtin_cpu_supports does not know */
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
}

static void probe(void) {
    supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                has_f16c() && __builtin_cpu_supports("popcnt");
    fill_tables();
    endor_avx2_fill_gather();
}

const endor_ops *endor_avx2_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, probe);
    return supported ? &ops : NULL;
}

#else

const endor_ops *endor_avx2_ops(void) { return NULL; }

#endif
