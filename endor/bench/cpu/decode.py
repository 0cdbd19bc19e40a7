"""Packed to dense on the CPU, against this machine's own copy bandwidth and the peers."""

import numpy as np

from endor import kernels
from endor.bench.cpu import peers
from endor.bench.cpu.cases import BenchRun, Case, Entry, compare, weight
from endor.bench.cpu.ceilings import copy_entry
from endor.bench.records import last_level_cache_bytes
from endor.bench.timing import Subject, rotation
from endor.codecs import Encoded
from endor.errors import BackendError


def decode(case: Case) -> BenchRun:
    """Measure decoding into reused buffers.

    Traffic is packed bytes read plus dense bytes written; the ceiling is a copy of the dense weight
    with non-temporal stores, its bytes counted twice.

    Raises:
        ConfigError: A field of `case` is out of range.
        BackendError: A decoder of ours gave wrong bits.
    """
    item = case.check()
    bits = weight(case)
    sets = rotation(2 * bits.nbytes, last_level_cache_bytes())
    outs = [np.zeros(bits.size, bits.dtype) for _ in range(sets)]
    ours = []
    for codec in case.codecs:
        name = f"endor {codec}"
        encoded = [
            kernels.encode(bits, item, codec=codec, bitmap=True, threads=case.threads)
            for _ in range(sets)
        ]
        kernels.decode(encoded[0], outs[0], threads=case.threads)
        if not np.array_equal(outs[0], bits.reshape(-1)):
            raise BackendError(f"{name}: decoded bits differ from the weight; please report this")
        subject = _subject(name, encoded, outs, case.threads)
        ours.append(_entry(subject, encoded[0].nbytes, bits.nbytes))
    rivals, missing = peers.decoders(case, bits) if case.peers else ([], {})
    others = []
    for rival in rivals:
        if rival.dense is not None and not np.array_equal(rival.dense(), bits):
            missing[rival.subject.name] = "gave other bits than the weight's"
        else:
            others.append(_entry(rival.subject, rival.packed_bytes, bits.nbytes, rival.note))
    ceiling = copy_entry(bits, outs, case.thread_count)
    return compare(case, "decode", ceiling, ours, others, missing)


def _entry(subject: Subject, packed_bytes: int, dense_bytes: int, note: str = "") -> Entry:
    return Entry(subject, packed_bytes + dense_bytes, dense_bytes, packed_bytes, note)


def _subject(
    name: str, encoded: list[Encoded], outs: list[np.ndarray], threads: int | None
) -> Subject:
    def run(turn: int) -> np.ndarray:
        place = turn % len(outs)
        return kernels.decode(encoded[place], outs[place], threads=threads)

    return Subject(name, run)
