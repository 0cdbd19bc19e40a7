"""Other people's code on the same weight: numpy, torch, compressed-tensors, zipnn.

A peer that is not installed, or does not take the element type, is reported with the reason instead
of being measured. Peers get their own best input layout; conversion to it is never timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from endor import codecs
from endor.bench.cpu.cases import Case
from endor.bench.timing import Subject
from endor.packed import tensor_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer, ready to run.

    Attributes:
        subject: What to time.
        packed_bytes: Bytes of its packed form; 0 where it has none.
        dense: Runs it once and returns the dense bits it arrives at; None where it makes none.
        note: What differs from Endor's task.
    """

    subject: Subject
    packed_bytes: int = 0
    dense: Callable[[], np.ndarray] | None = None
    note: str = ""


Missing = dict[str, str]


def decoders(case: Case, bits: np.ndarray) -> tuple[list[Peer], Missing]:
    """Return the peers that turn a packed form of `bits` into the dense weight."""
    return _gather(case, bits, (_numpy_decode, _torch_decode, _bitmask_decode, _zipnn_decode))


def encoders(case: Case, bits: np.ndarray) -> tuple[list[Peer], Missing]:
    """Return the peers that turn `bits` into a packed form."""
    return _gather(case, bits, (_numpy_encode, _bitmask_encode, _zipnn_encode))


def products(case: Case, bits: np.ndarray, x: "torch.Tensor") -> tuple[list[Peer], Missing]:
    """Return the peers that compute `x @ weight.T` for `x` of shape `(batch, cols)`."""
    import torch

    dense = tensor_of(bits, codecs.dtype(case.dtype))
    copies = [dense, dense.clone()]
    single = dense.float().numpy()
    vector = x.float().numpy()

    def run(turn: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, copies[turn % 2])

    return [
        Peer(Subject("torch F.linear, dense", run)),
        Peer(
            Subject("numpy float32, dense", lambda _: vector @ single.T),
            note="reads float32 weights",
        ),
    ], {}


class _Unavailable(Exception):
    """A peer cannot take part; the message says why."""


def _gather(
    case: Case,
    bits: np.ndarray,
    makers: tuple[Callable[[Case, np.ndarray], Peer], ...],
) -> tuple[list[Peer], Missing]:
    peers: list[Peer] = []
    missing: Missing = {}
    for maker in makers:
        try:
            peers.append(maker(case, bits))
        except _Unavailable as error:
            name, _, reason = str(error).partition(": ")
            missing[name] = reason
    return peers, missing


def _numpy_decode(case: Case, bits: np.ndarray) -> Peer:
    encoded = codecs.encode(bits, codecs.dtype(case.dtype), codec="raw")
    out = np.empty_like(bits)
    return Peer(
        Subject("numpy reference, raw", lambda _: codecs.decode(encoded, out)),
        encoded.nbytes,
        lambda: codecs.decode(encoded, out),
    )


def _numpy_encode(case: Case, bits: np.ndarray) -> Peer:
    item = codecs.dtype(case.dtype)
    size = codecs.encode(bits, item, codec="raw").nbytes
    return Peer(
        Subject("numpy reference, raw", lambda _: codecs.encode(bits, item, codec="raw")), size
    )


def _torch_decode(case: Case, bits: np.ndarray) -> Peer:
    """Bitmap bits to a bool mask, then `masked_scatter_`: what one writes without a kernel."""
    import torch

    item = codecs.dtype(case.dtype)
    encoded = codecs.encode(bits, item, codec="raw")
    bitmap = torch.from_numpy(encoded.arrays["bitmap"])
    values = tensor_of(encoded.arrays["values"], item)
    out = torch.empty(bits.shape, dtype=values.dtype)
    places = torch.arange(8, dtype=torch.uint8)

    def run(_: int) -> torch.Tensor:
        mask = (bitmap.unsqueeze(1) >> places & 1).bool().reshape(-1)[: out.numel()]
        return out.zero_().masked_scatter_(mask.reshape(out.shape), values)

    def dense() -> np.ndarray:
        from endor.packed import bits_of

        return bits_of(run(0))

    try:
        run(0)
    except (RuntimeError, NotImplementedError) as error:
        raise _Unavailable(f"torch masked_scatter_: {error}") from error
    return Peer(Subject("torch masked_scatter_", run), encoded.nbytes, dense)


def _import(peer: str, module: str, hint: str = "") -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            raise _Unavailable(f"{peer}: not installed{hint}") from None
        raise _Unavailable(f"{peer}: cannot be imported, {error}") from error
    except ImportError as error:
        raise _Unavailable(f"{peer}: cannot be imported, {error}") from error


def _bitmask_compressor() -> Any:
    hint = " (0.14.0.1 is the last release with the compressor)"
    compressors = _import("compressed-tensors", "compressed_tensors.compressors", hint)
    config = _import("compressed-tensors", "compressed_tensors.config", hint)
    if not hasattr(compressors, "BitmaskCompressor"):
        raise _Unavailable("compressed-tensors: this release dropped BitmaskCompressor (<= 0.14)")
    return compressors.BitmaskCompressor(config=config.BitmaskConfig())


def _bitmask_decode(case: Case, bits: np.ndarray) -> Peer:
    from endor.packed import bits_of

    compressor = _bitmask_compressor()
    weight = tensor_of(bits, codecs.dtype(case.dtype))
    try:
        packed = compressor.compress({"w.weight": weight})
        next(iter(compressor.decompress_from_state_dict(dict(packed))))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise _Unavailable(f"compressed-tensors: {error}") from error

    def run(_: int) -> "torch.Tensor":
        found: dict[str, torch.Tensor] = dict(compressor.decompress_from_state_dict(dict(packed)))
        return found["w.weight"]

    return Peer(
        Subject("compressed-tensors bitmask", run),
        sum(tensor.nbytes for tensor in packed.values()),
        lambda: bits_of(run(0)),
    )


def _bitmask_encode(case: Case, bits: np.ndarray) -> Peer:
    compressor = _bitmask_compressor()
    weight = tensor_of(bits, codecs.dtype(case.dtype))
    try:
        packed = compressor.compress({"w.weight": weight})
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise _Unavailable(f"compressed-tensors: {error}") from error
    return Peer(
        Subject("compressed-tensors bitmask", lambda _: compressor.compress({"w.weight": weight})),
        sum(tensor.nbytes for tensor in packed.values()),
    )


def _zipnn(case: Case) -> Any:
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    if case.dtype not in names:
        raise _Unavailable(f"zipnn: takes {', '.join(names)}, not {case.dtype}")
    zipnn = _import("zipnn", "zipnn")
    return zipnn.ZipNN(
        input_format="byte", bytearray_dtype=names[case.dtype], threads=case.thread_count
    )


def _zipnn_decode(case: Case, bits: np.ndarray) -> Peer:
    coder = _zipnn(case)
    packed = coder.compress(bytearray(bits.tobytes()))
    return Peer(
        Subject("zipnn", lambda _: coder.decompress(packed)),
        len(packed),
        lambda: np.frombuffer(coder.decompress(packed), bits.dtype).reshape(bits.shape),
        note="dense coder: does not know zeros",
    )


def _zipnn_encode(case: Case, bits: np.ndarray) -> Peer:
    coder = _zipnn(case)
    source = bits.tobytes()
    size = len(coder.compress(bytearray(source)))
    # zipnn shuffles the bytes of its input in place, so every turn needs a fresh copy.
    fresh: list[bytearray] = [bytearray()]

    def prepare(_: int) -> None:
        fresh[0] = bytearray(source)

    return Peer(
        Subject("zipnn", lambda _: coder.compress(fresh[0]), prepare),
        size,
        note="dense coder: does not know zeros",
    )
