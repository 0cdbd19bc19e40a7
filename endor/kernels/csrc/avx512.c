/* AVX-512: choice and memory. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx512.h"

#include <pthread.h>
#include "glibc.h"

static TARGET void copy_streaming(void *dst, const void *src, size_t nbytes) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    size_t head = (size_t)(-(uintptr_t)d & 63);
    if (head > nbytes) head = nbytes;
    memcpy(d, s, head);
    d += head, s += head, nbytes -= head;
    for (; nbytes >= 256; nbytes -= 256, d += 256, s += 256) {
        __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 64);
        __m512i c = _mm512_loadu_si512(s + 128), e = _mm512_loadu_si512(s + 192);
        _mm512_stream_si512((void *)d, a);
        _mm512_stream_si512((void *)(d + 64), b);
        _mm512_stream_si512((void *)(d + 128), c);
        _mm512_stream_si512((void *)(d + 192), e);
    }
    for (; nbytes >= 64; nbytes -= 64, d += 64, s += 64) _mm512_stream_si512((void *)d, _mm512_loadu_si512(s));
    memcpy(d, s, nbytes);
}

static TARGET uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t i = 0; i + 256 <= nbytes; i += 256) {
        for (int j = 0; j < 4; j++) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(s + i + 64 * j));
    }
    sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    uint64_t words[8], total = 0;
    _mm512_storeu_si512(words, sum[0]);
    for (int i = 0; i < 8; i++) total ^= words[i];
    for (size_t i = nbytes / 256 * 256; i + 8 <= nbytes; i += 8) total ^= load64(s + i);
    return total;
}

static TARGET void fence(void) { _mm_sfence(); }

static endor_ops ops = {
    .name = "avx512",
    .expand = {endor_avx512_expand8, endor_avx512_expand16, endor_avx512_expand32},
    .stream = endor_avx512_stream,
    .scan = {endor_avx512_scan8, endor_avx512_scan16, endor_avx512_scan32},
    .compress = {endor_avx512_compress8}, /* the others, and expand_far, by `probe` */
    .histogram = endor_avx512_histogram,
    .split = endor_avx512_split,
    .split_words = endor_avx512_split_words,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .dot = endor_avx512_dot,
    .rows = endor_avx512_rows,
    .row_runs = endor_avx512_row_runs,
    .exp_rows = endor_avx512_exp_rows,
    .arrange = endor_avx512_arrange,
    .popcount = endor_avx512_popcount,
};

static int supported;

static void probe(void) {
    supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                __builtin_cpu_supports("avx512vpopcntdq") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    /* Zen 5: a 64-byte access of which half is used straddles two lines nearly always. Gathering by 16 bytes is 1.25 times
     * as fast, and so is placing 16-bit values that come from memory; from L1 the wide way is 1.3 times as fast. */
    const endor_ops *narrow = endor_avx2_ops();
    supported = supported && narrow;
    if (!supported) return;
    ops.expand_far[1] = narrow->expand[1];
    ops.compress[1] = narrow->compress[1];
    ops.compress[2] = narrow->compress[2];
    ops.bf16_pairs = __builtin_cpu_supports("avx512bf16") != 0;
}

const endor_ops *endor_avx512_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, probe);
    return supported ? &ops : NULL;
}

#else

const endor_ops *endor_avx512_ops(void) { return NULL; }

#endif
