"""Dense to packed on the CPU, against this machine's own copy bandwidth and the peers."""

import numpy as np

from endor import codecs, kernels
from endor.bench.cpu import peers
from endor.bench.cpu.cases import BenchRun, Case, Entry, compare, weight
from endor.bench.cpu.ceilings import copy_entry
from endor.bench.records import last_level_cache_bytes
from endor.bench.timing import Subject, rotation
from endor.codecs import CodecChoice, DType
from endor.errors import BackendError


def pack(case: Case) -> BenchRun:
    """Measure encoding into buffers used before, as a conversion does tensor after tensor.

    Traffic is dense bytes read plus packed bytes written; the ceiling is that of `decode`.

    Raises:
        ConfigError: A field of `case` is out of range.
        BackendError: An encoder of ours gave a form that does not decode to the weight.
    """
    item = case.check()
    bits = weight(case)
    sets = rotation(2 * bits.nbytes, last_level_cache_bytes())
    sources = [bits, *(bits.copy() for _ in range(sets - 1))]
    names: tuple[CodecChoice, ...] = case.codecs
    if case.codec == "auto":
        names = (*names, "auto")
    ours = []
    for codec in names:
        name = f"endor {codec}"
        encoded = kernels.encode(bits, item, codec=codec, threads=case.threads)
        if not np.array_equal(codecs.decode(encoded), bits):
            raise BackendError(f"{name}: the packed form decodes to other bits; please report this")
        subject = _subject(name, sources, item, codec, case.threads)
        ours.append(_entry(subject, encoded.nbytes, bits.nbytes))
    rivals, missing = peers.encoders(case, bits) if case.peers else ([], {})
    others = [_entry(peer.subject, peer.packed_bytes, bits.nbytes, peer.note) for peer in rivals]
    ceiling = copy_entry(bits, [np.zeros_like(bits)], case.thread_count)
    return compare(case, "pack", ceiling, ours, others, missing)


def _entry(subject: Subject, packed_bytes: int, dense_bytes: int, note: str = "") -> Entry:
    return Entry(subject, packed_bytes + dense_bytes, dense_bytes, packed_bytes, note)


def _subject(
    name: str, sources: list[np.ndarray], item: DType, codec: CodecChoice, threads: int | None
) -> Subject:
    scratch = kernels.Scratch()

    def run(turn: int) -> object:
        source = sources[turn % len(sources)]
        return kernels.encode(source, item, codec=codec, threads=threads, scratch=scratch)

    return Subject(name, run)
