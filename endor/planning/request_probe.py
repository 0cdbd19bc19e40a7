"""What a small read costs a disk, when many are wanted at once."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from endor.storage.at_once import read_at_once
from endor.storage.buffers import HostBuffer
from endor.storage.layout import ALIGN

REQUEST_BYTES = (4096, 16384)
"""Sizes of requests that are timed: what both cost tells a request's price from that of bytes."""

REQUESTS = 4096
BATCH = 512
"""Reads that are asked for at once: about what a step needs of one matrix stored by neuron."""

PROBE_S = 0.2


def request_seconds(
    pool: ThreadPoolExecutor, threads: int, fd: int, size: int, nbytes: int
) -> float:
    """Return the time of one of many reads of `nbytes`, anywhere in a file.

    As `endor.storage.scattered` does them: all at once, or else by threads, when that time holds
    what these do for a request as well, and that they take turns at it.

    Args:
        pool: Has so many threads.
        threads: That read where the system takes no reads at once.
        fd: The file; with O_DIRECT where it can be.
        size: Its bytes.
        nbytes: Of a read, a multiple of `ALIGN`.
    """
    blocks, places = max(1, (size - nbytes) // ALIGN), random.Random(0)
    buffer = HostBuffer(BATCH * nbytes)
    addresses = buffer.address + nbytes * np.arange(BATCH, dtype=np.uint64)
    lengths = np.full(BATCH, nbytes, dtype=np.uint64)
    count, start = 0, time.perf_counter()
    while count < REQUESTS and time.perf_counter() < start + PROBE_S:
        offsets = np.array([places.randrange(blocks) * ALIGN for _ in range(BATCH)], np.uint64)
        if count == 0:
            start = time.perf_counter()
        found = read_at_once(fd, offsets, lengths, addresses)
        if found is None or (found != nbytes).any():
            return _by_threads(pool, threads, fd, blocks, nbytes)
        count += BATCH
    return (time.perf_counter() - start) / count


def _by_threads(pool: ThreadPoolExecutor, threads: int, fd: int, blocks: int, nbytes: int) -> float:
    end = time.perf_counter() + PROBE_S

    def some(seed: int) -> int:
        block, places = HostBuffer(nbytes), random.Random(seed)
        for done in range(REQUESTS // threads):
            os.preadv(fd, [block.array.data], places.randrange(blocks) * ALIGN)
            if time.perf_counter() > end:  # a disk that turns makes a hundred a second
                return done + 1
        return REQUESTS // threads

    start = time.perf_counter()
    count = sum(pool.map(some, range(threads)))
    return (time.perf_counter() - start) / count
