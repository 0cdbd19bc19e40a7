/* Many small reads of one file, all on their way at once: what a disk does in parallel it is given in parallel, by one
 * thread, a system call for many requests.
 *
 *   io_submit   [ r0 r1 r2 ... ]  at most DEPTH on their way; as some end, others follow
 *   io_getevents    <- r1 r0 ...  in any order
 *
 * The kernel's own interface (io_submit(2)), without a library. It is asynchronous where the file bypasses the page cache
 * (O_DIRECT). io_uring does the same and is what containers forbid more often. */
#define _GNU_SOURCE
#include "endor.h"

#include <errno.h>

#if defined(__linux__)
#include <linux/aio_abi.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEPTH 128

/* Made once and kept: to take one down makes the kernel wait for all processors. */
static aio_context_t context;
static atomic_int owner;  /* the process that it belongs to */
static atomic_flag taken = ATOMIC_FLAG_INIT;

static void wait_for_some(uint64_t *flying, int64_t *results) {
    struct io_event events[DEPTH];
    const long least = *flying > DEPTH / 2 ? DEPTH / 4 : 1;
    const long found = syscall(SYS_io_getevents, context, least, (long)DEPTH, events, NULL);
    if (found < 0 && errno == EINTR) return;
    if (found < 0) { /* cannot be; nothing may be on its way when the caller frees its memory */
        syscall(SYS_io_destroy, context);
        context = 0;
        *flying = 0;
        return;
    }
    for (long i = 0; i < found; i++) results[events[i].data] = events[i].res;
    *flying -= (uint64_t)found;
}

/* Read lengths[i] bytes at offsets[i] of fd to addresses[i]; results[i] becomes the bytes read, or an error below 0.
 * Returns ENDOR_UNSUPPORTED where the system has no such reads, or another thread is at it: results are then unchanged. */
ENDOR_API int endor_read_many(int fd, uint64_t count, const uint64_t *offsets, const uint64_t *lengths,
                              const uint64_t *addresses, int64_t *results) {
    if (atomic_flag_test_and_set(&taken)) return ENDOR_UNSUPPORTED;
    int me = (int)getpid(), status = ENDOR_UNSUPPORTED;
    struct iocb *requests = malloc((count + 1) * sizeof *requests), **queue = malloc((count + 1) * sizeof *queue);
    if (atomic_load(&owner) && atomic_load(&owner) != me) goto done; /* of the process that this one was forked from */
    if (!requests || !queue || (!context && syscall(SYS_io_setup, DEPTH, &context))) goto done;
    atomic_store(&owner, me);
    for (uint64_t i = 0; i < count; i++) {
        requests[i] = (struct iocb){.aio_data = i, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)fd,
                                    .aio_buf = addresses[i], .aio_nbytes = lengths[i], .aio_offset = (int64_t)offsets[i]};
        queue[i] = &requests[i];
        results[i] = -EAGAIN;
    }
    status = ENDOR_OK;
    for (uint64_t sent = 0, flying = 0; context && (sent < count || flying);) {
        const uint64_t room = min64(DEPTH - flying, count - sent);
        const long taken_on = room ? syscall(SYS_io_submit, context, (long)room, queue + sent) : 0;
        if (taken_on > 0) {
            sent += (uint64_t)taken_on;
            flying += (uint64_t)taken_on;
        } else if (room && !flying) {
            if (errno != EAGAIN && errno != EINTR) results[sent] = -errno;
            break; /* the caller reads what is left in its own way */
        }
        if (flying) wait_for_some(&flying, results);
    }
done:
    free(requests);
    free(queue);
    atomic_flag_clear(&taken);
    return status;
}
#else
ENDOR_API int endor_read_many(int fd, uint64_t count, const uint64_t *offsets, const uint64_t *lengths,
                              const uint64_t *addresses, int64_t *results) {
    (void)fd, (void)count, (void)offsets, (void)lengths, (void)addresses, (void)results;
    return ENDOR_UNSUPPORTED;
}
#endif
