/* A small thread pool. Not OpenMP: the process usually holds torch's OpenMP runtime, whose threads spin between
 * regions and would fight a second runtime for the same cores.
 *
 * The caller always takes part, so nothing waits for a thread to start: a worker that wakes late finds the job closed
 * and goes back to sleep. A second caller, while the pool is busy, does its whole job alone. Threads that sleep are woken
 * for large work only.
 */
#define _GNU_SOURCE
#include "endor.h"

#include <pthread.h>
#include "glibc.h"
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

#define MAX_WORKERS 63
#define SPINS 8000        /* about 0.1 ms: from one product of a model to the next */
#define SHARED (1u << 16) /* bytes of work that threads which spin help with */
#define WAKING (2u << 20) /* bytes that are worth a wake-up, which takes the caller up to 60 us in a virtual machine */
#define CLOSED (1u << 31)
#define SLOT (1u << 16) /* bits 16..30: workers that may still join; bits 0..15: workers inside */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held by the caller that owns the pool */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_uint generation;
static atomic_uint gate = CLOSED;
static atomic_int sleepers;
static int workers; /* guarded by busy */
static void (*job)(void *);
static void *job_context;

ENDOR_INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int enter(void) {
    unsigned g = atomic_load_explicit(&gate, memory_order_relaxed);
    while (!(g & CLOSED) && g >= SLOT) {
        if (atomic_compare_exchange_weak_explicit(&gate, &g, g - SLOT + 1, memory_order_acquire,
                                                  memory_order_relaxed)) {
            return 1;
        }
    }
    return 0;
}

static void *work(void *unused) {
    unsigned seen = 0;
    (void)unused;
    for (;;) {
        unsigned now = atomic_load_explicit(&generation, memory_order_acquire);
        for (int i = 0; now == seen && i < SPINS; i++) {
            relax();
            now = atomic_load_explicit(&generation, memory_order_acquire);
        }
        if (now == seen) {
            pthread_mutex_lock(&sleep_lock);
            atomic_fetch_add(&sleepers, 1);
            while ((now = atomic_load(&generation)) == seen) pthread_cond_wait(&wake, &sleep_lock);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&sleep_lock);
        }
        seen = now;
        if (enter()) {
            job(job_context);
            atomic_fetch_sub_explicit(&gate, 1, memory_order_release);
        }
    }
    return NULL;
}

/* A child of fork has only the thread that forked: forget the workers, and whoever held the locks. */
static void after_fork(void) {
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
    atomic_store(&sleepers, 0);
    atomic_store(&gate, CLOSED);
    workers = 0;
}

static void register_fork(void) { pthread_atfork(NULL, NULL, after_fork); }

static void grow(int wanted) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals stay with the interpreter's threads */
    while (workers < wanted && workers < MAX_WORKERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) break;
        pthread_detach(thread);
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void endor_parallel(int threads, uint64_t nbytes, void (*fn)(void *), void *context) {
    pthread_once(&once, register_fork);
    if (threads <= 1 || nbytes < SHARED || pthread_mutex_trylock(&busy)) {
        fn(context);
        return;
    }
    if (nbytes >= WAKING) grow(threads - 1);
    int helpers = threads - 1 < workers ? threads - 1 : workers;
    job = fn;
    job_context = context;
    atomic_store_explicit(&gate, (unsigned)helpers * SLOT, memory_order_release);
    atomic_fetch_add(&generation, 1);
    if (nbytes >= WAKING && atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    fn(context);
    atomic_fetch_or(&gate, CLOSED);
    for (unsigned i = 0; atomic_load_explicit(&gate, memory_order_acquire) & 0xffff; i++) {
        if (i < SPINS) relax();
        else sched_yield();
    }
    pthread_mutex_unlock(&busy);
}
