"""What this machine's memory can do, measured beside whatever is compared with it."""

from collections.abc import Sequence

import numpy as np

from endor import kernels
from endor.bench.cpu.cases import Entry
from endor.bench.timing import Subject

COPY = "non-temporal copy"
READ = "read"


def copy_entry(source: np.ndarray, outs: Sequence[np.ndarray], threads: int) -> Entry:
    """Return a copy of `source` into each of `outs` in turn; reads and writes count as traffic."""
    read = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
    written = [out.reshape(-1).view(np.uint8) for out in outs]

    def run(turn: int) -> None:
        kernels.probe_copy(written[turn % len(written)], read, threads)

    return Entry(Subject(COPY, run), 2 * read.nbytes)


def read_entry(sources: Sequence[np.ndarray], threads: int) -> Entry:
    """Return a pass over each of `sources` in turn."""
    read = [source.reshape(-1).view(np.uint8) for source in sources]

    def run(turn: int) -> None:
        kernels.probe_read(read[turn % len(read)], threads)

    return Entry(Subject(READ, run), read[0].nbytes)
