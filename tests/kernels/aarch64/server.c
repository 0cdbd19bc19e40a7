/* Runs the kernels' functions for another process: reads calls from standard input, writes results to standard output.
 *
 * A call is   u32 function, u32 count, then `count` arguments, each
 *     u32 0, u64 value            an integer
 *     u32 1, u64 nbytes, bytes    an array that the function reads
 *     u32 2, u64 nbytes, bytes    an array that it writes as well
 *     u32 3, u64 nbytes, bytes    a structure; wherever a u64 of it equals POINTER + i, it becomes the address of
 *                                 argument i, which came before
 * and the answer u64 result, then the arrays of kind 2 in order. Every array ends where a page without access begins, so
 * a kernel that reads or writes past one is killed.
 */
#include "endor.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define POINTER 0xe17d0f0000000000u
#define MAX_ARGUMENTS 24

unsigned endor_kernels(void);
const char *endor_cpu_features(void);
int endor_has_bf16_pairs(int);
int endor_decode(int, const endor_tensor *, void *, uint64_t, uint64_t, int, int);
uint64_t endor_scan(int, const void *, uint64_t, int, int, int, uint8_t *, uint8_t *, uint64_t *, int);
uint64_t endor_pack_raw(int, const void *, uint64_t, int, uint8_t *, uint8_t *, uint8_t *, int);
void *endor_exp_start(int, const endor_tensor *, const void *, uint64_t *, uint64_t *, int);
int endor_exp_finish(const void *, const endor_tensor *);
void endor_exp_free(void *);
int endor_matvec(int, const endor_tensor *, int, uint64_t, uint64_t, const void *, int, uint64_t, float *, int);
uint64_t endor_probe(int, void *, const void *, uint64_t, int);

typedef struct {
    uint32_t kind;
    uint64_t value, mapped; /* value: the integer, or the array's size */
    uint8_t *map, *data;
} argument;

static void take(void *p, size_t nbytes) {
    if (fread(p, 1, nbytes, stdin) != nbytes) exit(0);
}

static void give(const void *p, size_t nbytes) {
    if (fwrite(p, 1, nbytes, stdout) != nbytes) exit(1);
}

static void receive(argument *a, const argument *before, uint32_t index) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    memset(a, 0, sizeof *a);
    take(&a->kind, 4);
    take(&a->value, 8);
    if (!a->kind) return;
    uint64_t body = (a->value + page - 1) / page * page;
    a->mapped = body + page;
    a->map = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a->map == MAP_FAILED || mprotect(a->map + body, page, PROT_NONE)) exit(3);
    a->data = a->map + body - a->value;
    take(a->data, a->value);
    if (a->kind != 3) return;
    for (uint64_t i = 0; i + 8 <= a->value; i += 8) {
        uint64_t word = load64(a->data + i);
        if (word >= POINTER && word < POINTER + index) store64(a->data + i, (uint64_t)(uintptr_t)before[word - POINTER].data);
    }
}

#define INT(i) ((int)a[i].value)
#define U64(i) (a[i].value)
#define PTR(i) ((void *)a[i].data)

static uint64_t call(uint32_t function, argument *a) {
    switch (function) {
    case 0: return endor_kernels();
    case 1: return (uint64_t)endor_has_bf16_pairs(INT(0));
    case 2: return (uint64_t)endor_decode(INT(0), PTR(9), PTR(10), U64(11), U64(12), INT(13), INT(14));
    case 3: return endor_scan(INT(0), PTR(1), U64(2), INT(3), INT(4), INT(5), PTR(6), PTR(7), PTR(8), INT(9));
    case 4: return endor_pack_raw(INT(0), PTR(1), U64(2), INT(3), PTR(4), PTR(5), PTR(6), INT(7));
    case 5: return (uintptr_t)endor_exp_start(INT(0), PTR(9), PTR(10), PTR(11), PTR(12), INT(13));
    case 6:
        return (uint64_t)endor_matvec(INT(0), PTR(9), INT(10), U64(11), U64(12), PTR(13), INT(14), U64(15), PTR(16), INT(17));
    case 7: return endor_probe(INT(0), PTR(1), PTR(2), U64(3), INT(4));
    case 8: return (uint64_t)endor_exp_finish((void *)(uintptr_t)U64(0), PTR(9));
    case 9: endor_exp_free((void *)(uintptr_t)U64(0)); return 0;
    default: exit(2);
    }
}

int main(void) {
    for (;;) {
        argument arguments[MAX_ARGUMENTS];
        uint32_t function, count;
        take(&function, 4);
        take(&count, 4);
        if (count > MAX_ARGUMENTS) return 2;
        for (uint32_t i = 0; i < count; i++) receive(&arguments[i], arguments, i);
        uint64_t result = call(function, arguments);
        give(&result, 8);
        for (uint32_t i = 0; i < count; i++) {
            if (arguments[i].kind == 2) give(arguments[i].data, arguments[i].value);
            if (arguments[i].kind) munmap(arguments[i].map, arguments[i].mapped);
        }
        fflush(stdout);
    }
}
