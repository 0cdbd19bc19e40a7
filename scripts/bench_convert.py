"""Compare packing a checkpoint with reading and writing the same bytes: conversion's speed limit.

    python scripts/bench_convert.py MODEL SCRATCH [--prune magnitude] [--rounds 3] [--cold]

Each round first reads all of MODEL's weights and writes (and flushes) as many bytes as the packed
checkpoint has, with large plain reads and writes; then packs. Prints one JSON line a round.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import endor

PIECE = 8 << 20


def copy_like(sources: list[Path], target: Path, nbytes: int) -> float:
    """Return the seconds that reading `sources` whole and writing `nbytes` of them takes."""
    buffer = memoryview(bytearray(PIECE))
    written = 0
    start = time.perf_counter()
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source in sources:
        fd = os.open(source, os.O_RDONLY)
        offset = 0
        while count := os.preadv(fd, [buffer], offset):
            offset += count
            if written < nbytes:
                written += os.write(out, buffer[:count])
        os.close(fd)
    os.fsync(out)
    os.close(out)
    return time.perf_counter() - start


def evict(paths: list[Path]) -> None:
    """Drop `paths` from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--prune", default="none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cold", action="store_true", help="Read from the disk, not the cache.")
    options = parser.parse_args()
    model: Path = options.model
    sources = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    options.scratch.mkdir(parents=True, exist_ok=True)
    packed, copied = options.scratch / "packed", options.scratch / "copied"
    nbytes = 0
    for round_ in range(options.rounds + 1):  # the first one warms up and tells the size
        if packed.exists():
            shutil.rmtree(packed)
        if options.cold:
            evict(sources)
        copy_s = copy_like(sources, copied, nbytes)
        copied.unlink()
        if options.cold:
            evict(sources)
        cpu = time.process_time()
        report = endor.pack_checkpoint(model, packed, prune=options.prune, threads=options.threads)
        cpu_s = time.process_time() - cpu
        nbytes = report.sizes.packed_bytes
        if round_:
            record = {
                "dense_bytes": report.sizes.dense_bytes,
                "packed_bytes": nbytes,
                "prune": options.prune,
                "cold": options.cold,
                "copy_s": copy_s,
                "pack_s": report.seconds,
                "share_of_copy_speed": copy_s / report.seconds,
                "cpu_s": cpu_s,
                "mb_per_cpu_s": report.sizes.dense_bytes / cpu_s / 1e6,
                "load": os.getloadavg()[0],
            }
            print(json.dumps(record))
    shutil.rmtree(packed)


if __name__ == "__main__":
    main()
