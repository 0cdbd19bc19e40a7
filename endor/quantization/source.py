"""Checkpoints whose selected tensors come out quantised: in codes, or as what these stand for."""

import math
from typing import Any

import numpy as np

from endor.checkpoint.reading import WeightPruner, prune_in_place
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.wrapped import WrappedSource
from endor.codecs import integer
from endor.codecs.codes import Codes
from endor.codecs.rounding import floats_of, round_to_bits
from endor.errors import ConfigError, DTypeError, QuantizationError
from endor.pruning.contract import Progress, PruneOptions
from endor.pruning.source import PrunedSource
from endor.quantization.contract import QuantizeOptions
from endor.quantization.quantizer import EcqQuantizer, array_bits

FLOATS = ("BF16", "F16", "F32")
"""Element types that codes stand for."""


class QuantizedSource(PrunedSource):
    """Wraps a dense source; prunes and quantises layer after layer as tensors are asked for.

    Args:
        source: The dense checkpoint; stays open, and is not closed here.
        prune: How to prune first (method "none": not at all), and how to calibrate both.
        options: How to quantise.
        selected: Checkpoint names of the tensors to quantise.
        progress: Called with layers done, layers in all, and what goes on.

    Raises:
        DTypeError: A selected tensor is not of floats that codes can stand for.
        PruningError, ConfigError, BackendError: See `LayerStream`.
    """

    def __init__(
        self,
        source: CheckpointSource,
        prune: PruneOptions,
        options: QuantizeOptions,
        selected: frozenset[str],
        *,
        progress: Progress | None = None,
    ) -> None:
        check_quantizable(source, selected)
        self._ecq = EcqQuantizer(options)
        super().__init__(source, prune, selected, progress=progress, quantizer=self._ecq)

    def outcome(self) -> dict[str, Any]:
        """Return the relative output error of the tensors quantised so far: geometric mean."""
        errors = [error for error in self._stream.errors.values() if error > 0]
        if not errors:
            return {}
        return {"output_error": math.exp(sum(map(math.log, errors)) / len(errors))}

    def describe_quantization(self) -> dict[str, Any]:
        """Return what config.json says about the quantisation."""
        calibrated = self.describe()
        keys = ("windows", "seq_len", "seed", "calibration")
        return self._ecq.describe() | {key: calibrated[key] for key in keys}


class RoundedSource(WrappedSource):
    """Wraps a dense source; rounds each selected tensor by itself, without calibration.

    Args:
        source: The dense checkpoint; stays open, and is not closed here.
        options: How to quantise; every tensor takes the same bits.
        selected: Names of the tensors to quantise.

    Raises:
        DTypeError: A selected tensor is not of floats that codes can stand for.
    """

    def __init__(
        self,
        source: CheckpointSource,
        options: QuantizeOptions,
        selected: frozenset[str],
    ) -> None:
        check_quantizable(source, selected)
        super().__init__(source, repr(options))
        self._options = options
        self._selected = selected

    def read_into(self, name: str, out: np.ndarray) -> None:
        found = self.coded(name)
        if found is None:
            self._source.read_into(name, out)
            return
        dtype = self._source.tensors[name].dtype
        bits = integer.dense_of(found.codes, found.steps, dtype)
        out[:] = bits.reshape(-1).view(np.uint8)

    def coded(self, name: str) -> Codes | None:
        """Return codes and steps of a selected tensor; None of another."""
        if name not in self._selected:
            return None
        tensor = self._source.tensors[name]
        raw = np.empty(tensor.nbytes, dtype=np.uint8)
        self._source.read_into(name, raw)
        values = floats_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype)
        try:
            return Codes(*round_to_bits(values, array_bits(self._options.bits, tensor.numel)))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}; leave it out: --exclude '{name}'") from None

    def outcome(self) -> dict[str, Any]:
        """Nothing is known of outputs without calibration."""
        return {}

    def describe_quantization(self) -> dict[str, Any]:
        """Return what config.json says about the quantisation."""
        return {"method": "round", "bits": self._options.bits, "calibration": None}


class WeightPrunedSource(WrappedSource):
    """Wraps a dense source; prunes each selected tensor by itself as it is read.

    Args:
        source: The dense checkpoint; stays open, and is not closed here.
        pruner: Applied to the selected tensors.
        selected: Their names.
        identity: Changes when what the pruner does changes.
    """

    def __init__(
        self,
        source: CheckpointSource,
        pruner: WeightPruner,
        selected: frozenset[str],
        identity: str,
    ) -> None:
        super().__init__(source, identity)
        self._pruner = pruner
        self._selected = selected

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._source.read_into(name, out)
        if name in self._selected:
            tensor = self._source.tensors[name]
            prune_in_place(self._pruner, tensor, out.view(tensor.dtype.uint).reshape(tensor.shape))


def check_quantizable(source: CheckpointSource, selected: frozenset[str]) -> None:
    """Raise unless `selected` can be quantised: there are some, and all are floats.

    Raises:
        ConfigError: Nothing is selected.
        DTypeError: A tensor is of another type.
        QuantizationError: The checkpoint's weights are codes of another quantisation.
    """
    if not selected:
        raise ConfigError(
            f"{source.path}: nothing to quantise: none of {len(source.tensors)} tensors is a "
            "matrix of a layer; name some with --include"
        )
    if (source.config() or {}).get("quantization_config"):
        raise QuantizationError(
            f"{source.path}: config.json says that its weights are quantized, so they mean nothing "
            "without their scales; quantise the checkpoint it was made from"
        )
    for name in sorted(selected):
        kind = source.tensors[name].dtype.name
        if kind not in FLOATS:
            raise DTypeError(
                f"{name}: must be {', '.join(FLOATS)} to be quantised, is {kind}; leave it out: "
                f"--exclude '{name}'"
            )
