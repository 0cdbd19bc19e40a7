"""Many reads of one file that are all on their way at once, past the page cache."""

import numpy as np

from endor.kernels import native


def read_at_once(
    fd: int, offsets: np.ndarray, lengths: np.ndarray, addresses: np.ndarray
) -> np.ndarray | None:
    """Read `lengths` bytes at `offsets` of a file to `addresses`, in any order; no errors raised.

    Args:
        fd: The file, opened with O_DIRECT.
        offsets: u64, multiples of 4096, as the two others.
        lengths: Of each read.
        addresses: Where each goes, in memory that stays.

    Returns:
        Bytes that came, or an error number below 0, of each; None where the system or the library
        has no such reads, or another thread is at it.
    """
    library, _ = native.load()
    if library is None:
        return None
    given = [np.ascontiguousarray(one, dtype=np.uint64) for one in (offsets, lengths, addresses)]
    results = np.empty(len(offsets), dtype=np.int64)
    pointers = [array.ctypes.data for array in (*given, results)]
    return None if library.endor_read_many(fd, len(offsets), *pointers) else results
