"""Time products with chosen rows of one packed matrix against the product with all of them.

    python scripts/chosen_rows_bench.py [--rows 16384 --cols 4096]

Prints milliseconds, the median of the turns, by the share of rows, which lie at random places; in
brackets the part of the time of all rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from endor import kernels
from endor.codecs import DTYPES
from endor.kernels import chosen

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


def milliseconds(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the median time of each call; they take turns, so that a busy moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    rng, item = np.random.default_rng(0), DTYPES["BF16"]

    def bits(*shape: int, density: float = 1.0) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        values[rng.random(shape) >= density] = 0
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    x, out = bits(1, args.cols), np.zeros((1, args.rows), np.float32)
    number, threads = kernels.select(), kernels.thread_count()
    for density in (1.0, 0.5):
        packed = kernels.encode(bits(args.rows, args.cols, density=density), item)
        calls: dict[str, Callable[[], object]] = {"all": partial(kernels.matvec, packed, x, out)}
        for share in SHARES:
            rows = np.flatnonzero(rng.random(args.rows) < share).astype(np.uint32)
            some = partial(chosen.product, packed, x, rows, out, threads, number)
            calls[f"{share:.0%}"] = some
        found = milliseconds(calls, args.turns)
        said = (f"{name} {ms:.2f} ({ms / found['all']:.2f})" for name, ms in found.items())
        print(f"density {density}: {', '.join(said)} ms")


if __name__ == "__main__":
    main()
