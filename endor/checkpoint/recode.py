"""What is quantised already: its packed codes, entropy-coded without being changed.

Codes of GPTQ, AWQ, compressed-tensors, bitsandbytes, fp8 and mxfp4 lie in tensors of integers or
bytes. Every one of these is tried in the layouts that its type may have (`endor.codecs.fields`),
whatever the format calls it; one that gains nothing stays as it is. So formats that nobody here has
heard of are served as well, and nothing rests on a name.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from endor import kernels
from endor.checkpoint.companions import QUANTIZATION_KEY
from endor.checkpoint.select import matcher
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.codecs import Encoded, TensorSpec, fields
from endor.codecs.codes import Codes
from endor.codecs.coding import MAX_WORDS
from endor.codecs.layout import Fields, Layout

Layouts = Mapping[str, tuple[Layout, ...]]
"""By tensor name, where its symbols may be."""


@runtime_checkable
class FieldedSource(CheckpointSource, Protocol):
    """A source that knows where the symbols of its tensors are."""

    def symbol_layouts(self, name: str) -> tuple[Layout, ...]:
        """Return the layouts to try; none where the tensor holds no packed codes."""
        ...


def recodable(source: CheckpointSource, exclude: Sequence[str] = ()) -> Layouts:
    """Return the tensors that may hold packed codes of another format, and where.

    Tensors of a checkpoint whose config says that it is quantised, and of lone files. Buffers of
    other models are integers too, and stay as modules expect them.

    Args:
        source: The checkpoint.
        exclude: Patterns of tensors to leave as they are.
    """
    config = source.config()
    own = source.symbol_layouts if isinstance(source, FieldedSource) else None
    if own is None and config and not config.get(QUANTIZATION_KEY):
        return {}
    left = [matcher(pattern) for pattern in exclude]
    out: dict[str, tuple[Layout, ...]] = {}
    for name, tensor in source.tensors.items():
        if tensor.nbytes < fields.MIN_NBYTES or any(matches(name) for matches in left):
            continue
        found = own(name) if own else fields.layouts(tensor.dtype)
        if found:
            out[name] = found
    return out


def recode(
    bits: np.ndarray, tensor: SourceTensor, layouts: Sequence[Layout], *, threads: int
) -> Encoded | None:
    """Return a tensor in codec `fields`; None where that is no smaller than the tensor.

    Args:
        bits: Its elements, unsigned, C-contiguous.
        tensor: What they are.
        layouts: To try.
        threads: For coding.
    """
    layout = fields.choose(bits.reshape(-1).view(np.uint8), layouts)
    if layout is None:
        return None
    encoded = kernels.fields.encode(bits, tensor.dtype, layout, shape=tensor.shape, threads=threads)
    return encoded if encoded is not None and encoded.nbytes < tensor.nbytes else None


def encode_codes(found: Codes, tensor: SourceTensor) -> Encoded:
    """Return a tensor of codes and steps in codec `int`."""
    return kernels.integer.encode(
        found.codes,
        found.steps,
        tensor.dtype,
        shape=tensor.shape,
        block=found.block,
        levels=found.levels,
        threads=1,
    )


def largest_fields_spec(tensor: SourceTensor, layouts: Sequence[Layout]) -> TensorSpec:
    """Return a spec whose header is at least as long as that of the tensor in codec `fields`."""
    words = min(tensor.nbytes * 8, MAX_WORDS)
    specs = [
        TensorSpec(
            tensor.shape, tensor.dtype, "fields", False, tensor.numel, fields=Fields(layout, words)
        )
        for layout in layouts
    ]
    return max(specs, key=lambda spec: (len(spec.arrays), len(str(spec.to_dict()))))
