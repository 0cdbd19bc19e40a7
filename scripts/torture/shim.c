/* Makes the n-th system call on files below one directory fail, come up short, or kill the process.
 *
 * Preloaded; idle until torture_arm() is called. Calls are counted over all threads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL_EIO, FAIL_ENOSPC, FAIL_EINTR, SHORT, KILL_BEFORE, KILL_AFTER };

static char root[4096];
static long nth;
static int mode;
static atomic_long count;

void torture_arm(const char *directory, long call, int what) {
    snprintf(root, sizeof root, "%s", directory);
    nth = call;
    mode = what;
    atomic_store(&count, 0);
}

long torture_count(void) { return atomic_load(&count); }

static int below(const char *path) { return !strncmp(path, root, strlen(root)); }

static int fd_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int at_below(int fd, const char *path) { return path[0] == '/' || fd == AT_FDCWD ? below(path) : fd_below(fd); }

/* What this call has to suffer. */
static int turn(int concerned) {
    if (!root[0] || !concerned) return NONE;
    if (atomic_fetch_add(&count, 1) + 1 != nth) return NONE;
    if (mode == KILL_BEFORE) kill(getpid(), SIGKILL);
    return mode;
}

static int failing(int what) {
    if (what == FAIL_EIO) errno = EIO;
    else if (what == FAIL_ENOSPC) errno = ENOSPC;
    else if (what == FAIL_EINTR) errno = EINTR;
    else return 0;
    return 1;
}

static void after(int what) {
    if (what == KILL_AFTER) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define SIMPLE(type, name, parameters, concerned, arguments) \
    type name parameters {                                   \
        int what = turn(concerned);                          \
        if (failing(what)) return -1;                        \
        type out = REAL(name) arguments;                     \
        int saved = errno;                                   \
        after(what);                                         \
        errno = saved;                                       \
        return out;                                          \
    }

#define SIZED(name, parameters, concerned, size, arguments) \
    ssize_t name parameters {                               \
        int what = turn(concerned);                         \
        if (failing(what)) return -1;                       \
        if (what == SHORT && size > 1) size /= 2;           \
        ssize_t out = REAL(name) arguments;                 \
        after(what);                                        \
        return out;                                         \
    }

SIZED(read, (int fd, void *data, size_t n), fd_below(fd), n, (fd, data, n))
SIZED(write, (int fd, const void *data, size_t n), fd_below(fd), n, (fd, data, n))
SIZED(pread, (int fd, void *data, size_t n, off_t at), fd_below(fd), n, (fd, data, n, at))
SIZED(pread64, (int fd, void *data, size_t n, off64_t at), fd_below(fd), n, (fd, data, n, at))
SIZED(pwrite, (int fd, const void *data, size_t n, off_t at), fd_below(fd), n, (fd, data, n, at))
SIZED(pwrite64, (int fd, const void *data, size_t n, off64_t at), fd_below(fd), n, (fd, data, n, at))

#define VECTOR(name, parameters, arguments)                              \
    ssize_t name parameters {                                            \
        int what = turn(fd_below(fd));                                   \
        if (failing(what)) return -1;                                    \
        struct iovec half;                                               \
        if (what == SHORT && n > 0) {                                    \
            half = iov[0];                                               \
            if (half.iov_len > 1) half.iov_len /= 2;                     \
            iov = &half;                                                 \
            n = 1;                                                       \
        }                                                                \
        ssize_t out = REAL(name) arguments;                              \
        after(what);                                                     \
        return out;                                                      \
    }

VECTOR(preadv, (int fd, const struct iovec *iov, int n, off_t at), (fd, iov, n, at))
VECTOR(preadv64, (int fd, const struct iovec *iov, int n, off64_t at), (fd, iov, n, at))
VECTOR(preadv2, (int fd, const struct iovec *iov, int n, off_t at, int flags), (fd, iov, n, at, flags))
VECTOR(preadv64v2, (int fd, const struct iovec *iov, int n, off64_t at, int flags), (fd, iov, n, at, flags))

SIMPLE(int, fsync, (int fd), fd_below(fd), (fd))
SIMPLE(int, ftruncate, (int fd, off_t n), fd_below(fd), (fd, n))
SIMPLE(int, ftruncate64, (int fd, off64_t n), fd_below(fd), (fd, n))
SIMPLE(int, mkdir, (const char *path, mode_t m), below(path), (path, m))
SIMPLE(int, mkdirat, (int at, const char *path, mode_t m), at_below(at, path), (at, path, m))
SIMPLE(int, rmdir, (const char *path), below(path), (path))
SIMPLE(int, unlink, (const char *path), below(path), (path))
SIMPLE(int, unlinkat, (int at, const char *path, int f), at_below(at, path), (at, path, f))
SIMPLE(int, rename, (const char *from, const char *to), below(from), (from, to))
SIMPLE(int, renameat, (int a, const char *from, int b, const char *to), at_below(a, from), (a, from, b, to))

/* A failing close has closed all the same. */
int close(int fd) {
    int what = turn(root[0] && fd_below(fd));
    int out = REAL(close)(fd);
    if (what == FAIL_EIO || what == FAIL_ENOSPC) {
        failing(what);
        return -1;
    }
    after(what);
    return out;
}

#define OPEN(name, parameters, concerned, arguments)       \
    int name parameters {                                  \
        mode_t m = 0;                                      \
        if (flags & (O_CREAT | __O_TMPFILE)) {             \
            va_list rest;                                  \
            va_start(rest, flags);                         \
            m = va_arg(rest, mode_t);                      \
            va_end(rest);                                  \
        }                                                  \
        int what = turn(concerned);                        \
        if (failing(what)) return -1;                      \
        int out = REAL(name) arguments;                    \
        after(what);                                       \
        return out;                                        \
    }

OPEN(open, (const char *path, int flags, ...), below(path), (path, flags, m))
OPEN(open64, (const char *path, int flags, ...), below(path), (path, flags, m))
OPEN(openat, (int at, const char *path, int flags, ...), at_below(at, path), (at, path, flags, m))
OPEN(openat64, (int at, const char *path, int flags, ...), at_below(at, path), (at, path, flags, m))
