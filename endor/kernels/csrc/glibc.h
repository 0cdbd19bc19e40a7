/* Versions of the C library's functions that the library asks for.
 *
 * glibc 2.32 and 2.34 moved these threads' functions into libc under new versions, with the same behaviour. A
 * library that is linked there asks for the new versions and does not load on an older system, though it could:
 * ask for those that glibc has had from the start, so that one build runs from glibc 2.28 on (manylinux_2_28).
 * Only for a shared library: an archive, which a program is linked with statically, has no versions.
 */
#ifndef ENDOR_GLIBC_H
#define ENDOR_GLIBC_H

#include <stdlib.h> /* defines __GLIBC__, where it is that library */

#if !defined(__PIC__) || defined(__PIE__)
#elif defined(__GLIBC__) && defined(__x86_64__)
#define ENDOR_FIRST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define ENDOR_FIRST "GLIBC_2.17"
#endif

#ifdef ENDOR_FIRST
#define ENDOR_OLD(name) __asm__(".symver " #name ", " #name "@" ENDOR_FIRST)
ENDOR_OLD(pthread_create);
ENDOR_OLD(pthread_detach);
ENDOR_OLD(pthread_mutex_trylock);
ENDOR_OLD(pthread_once);
ENDOR_OLD(pthread_sigmask);
#undef ENDOR_OLD
#undef ENDOR_FIRST
#endif

#endif
