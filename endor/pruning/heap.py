"""How glibc's malloc serves a run that must stay small: large blocks are never kept by accident.

The same calls do nothing where the C library has no such options.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""Numbers of the options, from glibc's malloc.h."""

_LARGE_BYTES = 1 << 20
_REUSED_BYTES = 16 << 20
"""Twice that saves hardly more time, and the peak of resident memory is higher."""

_TRIM_BYTES = 128 << 10
"""glibc's own threshold."""


def map_large_blocks() -> None:
    """Have every large block of memory mapped by itself, and given back when it is freed.

    glibc otherwise learns to cut blocks of up to 32 MiB out of its heap, where the matrices of a
    layer and their statistics leave gaps that add up to more than they take.
    """
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def return_memory() -> None:
    """Give freed blocks of the heap back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def reused_blocks() -> Iterator[None]:
    """Serve blocks of up to 16 MiB from the heap meanwhile: for loops that free what they allocate.

    The first touch of a newly mapped page costs more than many an operation on it: nearly a third
    of the time of `auto` on a small model.
    """
    _set(_M_MMAP_THRESHOLD, _REUSED_BYTES)
    _set(_M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        map_large_blocks()
        return_memory()


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
