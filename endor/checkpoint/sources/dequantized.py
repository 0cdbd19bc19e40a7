"""A checkpoint that is quantised in another format, seen as the dense one that it stands for.

A dense value is a code's value times a scale in float32, rounded to the model's type: what the
formats' own libraries compute. Codes and scales can be had as they are (`CodedSource`), so that
they are stored in codec `int`, and Endor's loader runs them.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.checkpoint.sources.wrapped import WrappedSource
from endor.codecs import integer
from endor.codecs.codes import Codes
from endor.codecs.rounding import floats_of
from endor.codecs.steps import SMALLEST
from endor.errors import CheckpointError, ConfigError, EndorError
from endor.formats.contract import QuantizedWeight, Stored, dense_dtype
from endor.formats.nibbles import nibble_weights
from endor.formats.scaled import scaled_weights
from endor.formats.words import word_weights

_LEFT = ("qzeros", "g_idx", "absmax", "SCB", "weight_scale", "weight_scale_inv", "weight_packed")
"""Last parts of names that no dense checkpoint has."""


class DequantizedSource(WrappedSource):
    """The dense tensors of a quantised checkpoint.

    Args:
        stored: The checkpoint as it is; closed with this one.

    Attributes:
        quantization: Name of its format, from config.json.

    Raises:
        ConfigError: It is not quantised, or in a format that is not known.
        CheckpointError: Parts of a weight are missing or do not fit.
    """

    def __init__(self, stored: CheckpointSource) -> None:
        config = stored.config() or {}
        section = config.get(QUANTIZATION_KEY)
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"{stored.path}: its weights are not quantised (config.json has no "
                f"{QUANTIZATION_KEY}); leave out --dequantize"
            )
        super().__init__(stored, "dequantized")
        self.quantization = quantization_name(section)
        about = Stored(
            str(stored.path),
            stored.tensors,
            section,
            dense_dtype(config, stored.tensors),
            self._read,
        )
        found = chain(scaled_weights(about), word_weights(about), nibble_weights(about))
        self._weights: dict[str, QuantizedWeight] = {weight.name: weight for weight in found}
        parts = {part for weight in self._weights.values() for part in weight.parts}
        self._tensors: Mapping[str, SourceTensor] = {
            name: tensor for name, tensor in stored.tensors.items() if name not in parts
        } | {
            weight.name: SourceTensor(
                weight.name, weight.dtype, weight.shape, stored.tensors[weight.parts[0]].file
            )
            for weight in self._weights.values()
        }
        left = next((n for n in self.tensors if n.rpartition(".")[2] in _LEFT), None)
        if not self._weights or left is not None:
            what = f"{left} is no part of a known one" if left else "it has no known parts"
            raise ConfigError(
                f"{self.path}: quantized weights ({self.quantization}) cannot be dequantized: "
                f"{what}; pack it without --dequantize, to store it smaller"
            )

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._tensors

    def coded(self, name: str) -> Codes | None:
        """Return codes and steps of a quantised weight; None of another tensor, and where each
        element would have a step of its own."""
        weight = self._weights.get(name)
        if weight is None:
            return None
        found = self._codes(weight)
        return None if found.block == (1, 1) else found

    def read_into(self, name: str, out: np.ndarray) -> None:
        weight = self._weights.get(name)
        if weight is None:
            self._source.read_into(name, out)
            return
        found = self._codes(weight)
        bits = integer.dense_of(
            found.codes, found.steps, weight.dtype, block=found.block, levels=found.levels
        )
        out[:] = bits.reshape(-1).view(np.uint8)

    def _codes(self, weight: QuantizedWeight) -> Codes:
        try:
            return _normal(weight.codes(self._read), f"{self.path}: {weight.name}")
        except EndorError:
            raise
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{self.path}: {weight.name}: its parts {', '.join(weight.parts)} do not fit "
                f"together ({error}); download the checkpoint again"
            ) from error

    def _read(self, name: str) -> np.ndarray:
        tensor = self._source.tensors[name]
        raw = np.empty(tensor.nbytes, dtype=np.uint8)
        self._source.read_into(name, raw)
        kind = tensor.dtype.name
        if kind in ("BF16", "F16", "F32"):
            return floats_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype)
        integers = {"I8": np.int8, "I32": np.int32, "I64": np.int64, "I16": np.int16}
        values = raw.view(integers.get(kind, tensor.dtype.uint))
        return values.reshape(tensor.shape)

    def outcome(self) -> dict[str, Any]:
        """Nothing is lost."""
        return {}

    def config(self) -> dict[str, Any] | None:
        """Return config.json of the dense model."""
        config = self._source.config()
        if config is not None:
            config.pop(QUANTIZATION_KEY, None)
            config.pop("compression_config", None)
        return config

    def close(self) -> None:
        self._source.close()


def _normal(found: Codes, where: str) -> Codes:
    """Return `found` without steps that no element needs and that codec `int` does not take.

    Raises:
        CheckpointError: A scale is so small that elements are subnormal, or it is not finite.
    """
    steps = np.ascontiguousarray(found.steps, dtype=np.float32)
    if not np.isfinite(steps).all():
        raise CheckpointError(f"{where}: scales must be finite; download the checkpoint again")
    levels = None if found.levels is None else np.ascontiguousarray(found.levels, np.float32)
    least = 1.0 if levels is None else float(np.abs(levels[levels != 0]).min(initial=1.0))
    tiny = (steps != 0) & (np.abs(steps) * min(least, 1.0) < SMALLEST)
    if tiny.any():
        cols = found.codes.shape[-1]
        codes = found.codes.reshape(-1, cols)
        block = found.block or (-(-len(codes) // steps.shape[0]), -(-cols // steps.shape[1]))
        used = (codes if levels is None else levels[codes]) != 0
        spread = np.repeat(np.repeat(tiny, block[0], axis=0), block[1], axis=1)
        if (used & spread[: len(codes), :cols]).any():
            raise CheckpointError(
                f"{where}: a scale is below 2^-126, with weights that are not 0; pack the "
                "checkpoint without --dequantize"
            )
        steps = np.where(tiny, np.float32(0), steps)
    return found._replace(steps=steps, levels=levels)
