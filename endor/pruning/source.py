"""A checkpoint whose selected tensors come out pruned by a calibrated method."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.wrapped import WrappedSource
from endor.codecs.codes import Codes
from endor.errors import EndorError, PruningError
from endor.packed import bits_of
from endor.pruning.calibration import shipped_texts
from endor.pruning.coding import codes_of, steps_of
from endor.pruning.contract import METHODS, NOTHING, LayerQuantizer, Progress, PruneOptions
from endor.pruning.scratch import ScratchFolder
from endor.pruning.stream import LayerStream


class PrunedSource(WrappedSource):
    """Wraps a dense source; prunes layer after layer as their tensors are asked for.

    The layer that was pruned last is in memory; earlier ones are read back from the scratch folder,
    where they also wait for a run that goes on after an interruption.

    Args:
        source: The dense checkpoint; stays open, and is not closed here.
        options: What to do.
        selected: Checkpoint names of the tensors to prune.
        progress: Called with layers done, layers in all, and what goes on.
        quantizer: What turns the weights, pruned or not, into codes.

    Raises:
        PruningError, ConfigError, BackendError: See `LayerStream`.
    """

    def __init__(
        self,
        source: CheckpointSource,
        options: PruneOptions,
        selected: frozenset[str],
        *,
        progress: Progress | None = None,
        quantizer: LayerQuantizer | None = None,
    ) -> None:
        super().__init__(source, "pruned")
        self.ordered = True
        self._options = options
        self._quantizer = quantizer
        self._scratch: ScratchFolder | None
        if options.scratch is None:
            self._scratch = ScratchFolder()
            folder = self._scratch.path
        else:
            self._scratch = None
            folder = options.scratch
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with explained(source.path):
                self._stream = LayerStream(source, options, selected, folder, progress, quantizer)
        except BaseException:
            self._drop_scratch()
            raise
        self._layer: dict[str, torch.Tensor] = {}

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill `out` with a tensor's bytes, pruning up to its layer first if need be."""
        index = self._stream.layer_of(name)
        if index is None:
            self._source.read_into(name, out)
            return
        out[:] = bits_of(self._tensor(index, name)).reshape(-1).view(np.uint8)

    def coded(self, name: str) -> Codes | None:
        """Return codes and steps of a quantised tensor; None of another."""
        index = self._stream.layer_of(name)
        if index is None or self._quantizer is None:
            return None
        codes = self._tensor(index, codes_of(name))
        return Codes(codes.numpy(), self._tensor(index, steps_of(name)).numpy())

    def _tensor(self, index: int, name: str) -> torch.Tensor:
        """Return what the stream made for a layer."""
        while self._stream.done <= index:
            with explained(self._source.path):
                self._layer = self._stream.next_layer()
        tensor = self._layer.get(name)
        if tensor is None:
            tensor = self._stream.stored(index, name)
        return tensor

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}:{self._stream.fingerprint}"

    def describe(self) -> dict[str, Any]:
        """Return what config.json says about the pruning."""
        options = self._options
        return {
            "method": options.method,
            "sparsity": options.target_sparsity,
            "pattern": options.pattern,
            "windows": self._stream.windows,
            "seq_len": options.seq_len,
            "seed": options.seed,
            "calibration": [path.name for path in options.calibration or shipped_texts()],
            "paper": METHODS.get(options.method, NOTHING).paper,
        }

    def close(self) -> None:
        """Give up the hidden states, and the scratch folder unless the caller named it."""
        self._stream.close()
        self._drop_scratch()

    def _drop_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.remove()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a model's own code raises when it is run layer by layer into a `PruningError`."""
    try:
        yield
    except (EndorError, OSError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise PruningError(
            f"{path}: the model must run layer by layer for a calibration, and does not: "
            f"{type(error).__name__}: {text}; prune with magnitude, or without calibration"
        ) from error
