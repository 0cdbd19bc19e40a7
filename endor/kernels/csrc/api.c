/* Which instruction sets this CPU has, and the bandwidth probes. */
#include "endor.h"

#include <stdatomic.h>

const endor_ops *endor_ops_of(int kernel) {
    if (kernel == ENDOR_AVX512) return endor_avx512_ops();
    if (kernel == ENDOR_AVX2) return endor_avx2_ops();
    if (kernel == ENDOR_NEON) return endor_neon_ops();
    return kernel == ENDOR_SCALAR ? endor_scalar_ops() : NULL;
}

/* Bit i is set when kernel i runs here. */
ENDOR_API unsigned endor_kernels(void) {
    unsigned mask = 0;
    for (int i = 0; i < ENDOR_KERNELS; i++) mask |= (endor_ops_of(i) != NULL) << i;
    return mask;
}

ENDOR_API int endor_has_bf16_pairs(int kernel) {
    const endor_ops *ops = endor_ops_of(kernel);
    return ops && ops->bf16_pairs;
}

/* The features that the choice of kernel rests on, those this CPU has, by space. */
ENDOR_API const char *endor_cpu_features(void) {
    static char names[128];
    char found[128] = "";
#if defined(__x86_64__)
#define ADD(feature) \
    if (__builtin_cpu_supports(feature)) strcat(found, found[0] ? " " feature : feature)
    ADD("avx2");
    ADD("bmi2");
    ADD("fma");
    ADD("avx512f");
    ADD("avx512bw");
    ADD("avx512vl");
    ADD("avx512dq");
    ADD("avx512vbmi");
    ADD("avx512vbmi2");
    ADD("avx512bf16");
#elif defined(__aarch64__)
    strcat(found, "neon");
#endif
    memcpy(names, found, sizeof names);
    return names;
}

#define PIECE (1u << 18)

typedef struct {
    const endor_ops *ops;
    const uint8_t *src;
    uint8_t *dst; /* NULL: read only */
    uint64_t nbytes;
    atomic_uint_fast64_t next, sum;
} probe_job;

static void probe_pieces(void *context) {
    probe_job *job = context;
    uint64_t sum = 0;
    for (;;) {
        uint64_t at = atomic_fetch_add(&job->next, PIECE);
        if (at >= job->nbytes) break;
        uint64_t size = min64(PIECE, job->nbytes - at);
        if (job->dst) job->ops->copy_streaming(job->dst + at, job->src + at, size);
        else sum ^= job->ops->read(job->src + at, size);
    }
    if (job->dst) job->ops->fence();
    atomic_fetch_xor(&job->sum, sum);
}

/* dst[0:nbytes] = src[0:nbytes], with non-temporal stores; without dst only read. Returns a value that depends on the
 * bytes read, so that the reads happen. */
ENDOR_API uint64_t endor_probe(int kernel, void *dst, const void *src, uint64_t nbytes, int threads) {
    probe_job job = {.ops = endor_ops_of(kernel), .src = src, .dst = dst, .nbytes = nbytes};
    if (!job.ops) return 0;
    atomic_init(&job.next, 0);
    atomic_init(&job.sum, 0);
    endor_parallel(threads, nbytes, probe_pieces, &job);
    return atomic_load(&job.sum);
}
