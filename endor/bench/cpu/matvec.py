"""The product with a packed weight on the CPU, against read bandwidth and dense products."""

import numpy as np

from endor import kernels
from endor.bench.cpu import peers
from endor.bench.cpu.cases import BenchRun, Case, Entry, compare, weight
from endor.bench.cpu.ceilings import read_entry
from endor.bench.records import last_level_cache_bytes
from endor.bench.timing import Subject, rotation
from endor.codecs import Encoded
from endor.errors import BackendError, ConfigError
from endor.packed import bits_of, tensor_of

DTYPES = ("BF16", "F16", "F32")

TOLERANCE = 1e-4
"""Largest error of a product that accumulates in float32, as a share of the largest output."""


def matvec(case: Case) -> BenchRun:
    """Measure `x @ weight.T` for `case.batch` vectors of the weight's element type.

    Traffic is the weight's bytes, packed or dense; the ceiling is a pass over the dense weight.

    Raises:
        ConfigError: A field of `case` is out of range, or its element type has no product.
        BackendError: A product of ours is wrong.
    """
    item = case.check()
    if case.dtype not in DTYPES:
        raise ConfigError(f"matvec takes {', '.join(DTYPES)}, got {case.dtype}")
    bits = weight(case)
    vectors = np.random.default_rng(case.seed + 1).standard_normal(
        (case.batch, case.cols), dtype=np.float32
    )
    import torch

    dense = tensor_of(bits, item)
    x = torch.from_numpy(vectors).to(dense.dtype)
    expected = (x.double() @ dense.double().T).numpy()
    out = np.zeros((case.batch, case.rows), np.float32)

    ours: list[Entry] = []
    for codec in case.codecs:
        name = f"endor {codec}"
        first = kernels.encode(bits, item, codec=codec, bitmap=True, threads=case.threads)
        sets = rotation(first.nbytes, last_level_cache_bytes())
        encoded = [first] + [
            kernels.encode(bits, item, codec=codec, bitmap=True, threads=case.threads)
            for _ in range(sets - 1)
        ]
        kernels.matvec(first, bits_of(x), out, threads=case.threads)
        error = float(np.abs(out - expected).max() / np.abs(expected).max())
        if not error < TOLERANCE:
            raise BackendError(f"{name}: product off by {error:.2e}; please report this")
        subject = _subject(name, encoded, bits_of(x), out, case.threads)
        ours.append(Entry(subject, first.nbytes, bits.nbytes, first.nbytes))
    rivals, missing = peers.products(case, bits, x) if case.peers else ([], {})
    others = [Entry(peer.subject, bits.nbytes, bits.nbytes, 0, peer.note) for peer in rivals]
    ceiling = read_entry([bits, bits.copy()], case.thread_count)
    return compare(case, "matvec", ceiling, ours, others, missing)


def _subject(
    name: str, encoded: list[Encoded], x: np.ndarray, out: np.ndarray, threads: int | None
) -> Subject:
    def run(turn: int) -> object:
        return kernels.matvec(encoded[turn % len(encoded)], x, out, threads=threads)

    return Subject(name, run)
