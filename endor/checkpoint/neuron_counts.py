"""How often each neuron was active in calibration text: a small file of a packed checkpoint.

A stock safetensors file beside the shards, one array a matrix. What it says of a matrix holds for
the record that the matrix lies in: it names that record's checksum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.beside import Beside
from endor.checkpoint.companions import COUNTS_NAME
from endor.errors import FormatError
from endor.storage import FileLayout
from endor.storage.safetensors import brief, is_count

ASSUMED_ACTIVE = 0.1
"""Share of tokens in which a neuron is active, where none were counted."""

COUNTS = Beside(COUNTS_NAME, "endor.neurons", frozenset({"tokens", "calibration"}))


@dataclass(frozen=True, slots=True)
class NeuronCounts:
    """In how many tokens each neuron was not zero.

    Attributes:
        tokens: Tokens of the calibration text.
        active: Per matrix that is stored by neuron, u32 `(neurons,)`, each at most `tokens`.
        calibration: How they were counted: windows, seq_len, seed, and the names of the texts.
    """

    tokens: int
    active: Mapping[str, np.ndarray]
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def zeros(self) -> float:
        """Share of all activations that were zero."""
        total = self.tokens * sum(len(counts) for counts in self.active.values())
        return 1.0 - sum(int(c.sum()) for c in self.active.values()) / max(1, total)

    def makers(self, share: float) -> float:
        """Return the least share of neurons that make so great a share of all activations."""
        counts = np.sort(np.concatenate([*self.active.values(), np.zeros(0, np.uint32)]))[::-1]
        sums = np.cumsum(counts, dtype=np.int64)
        if not len(sums) or not sums[-1]:
            return 0.0
        return (int(np.searchsorted(sums, math.ceil(share * int(sums[-1])))) + 1) / len(sums)

    def to_dict(self) -> dict[str, Any]:
        """Return what they come to, for JSON."""
        return {
            "tokens": self.tokens,
            "matrices": len(self.active),
            "zeros": self.zeros,
            "neurons_of_80_percent": self.makers(0.8),
            "calibration": dict(self.calibration),
        }

    def to_bytes(self, layouts: Sequence[FileLayout]) -> bytes:
        """Return the file, for the checkpoint of these shards."""
        about = {"tokens": self.tokens, "calibration": dict(self.calibration)}
        names = sorted(self.active)
        return COUNTS.to_bytes(about, names, {n: ("U32", self.active[n]) for n in names}, layouts)


def read_neuron_counts(packed: Path, layouts: Sequence[FileLayout]) -> NeuronCounts | None:
    """Return the counts of a packed checkpoint; None where it has none.

    Args:
        packed: The directory.
        layouts: Its shards.

    Raises:
        CheckpointError: The index names them and they are missing, or they are another packing's.
        FormatError: They are damaged, or of a version that is not known.
    """
    path = COUNTS.find(packed)
    return None if path is None else parse_neuron_counts(path, layouts)


def counted(layouts: Sequence[FileLayout]) -> NeuronCounts | None:
    """Return the counts of the packed checkpoint of these shards; as `read_neuron_counts`."""
    return read_neuron_counts(layouts[0].path.parent, layouts) if layouts else None


def active_shares(counts: NeuronCounts | None, name: str, neurons: int) -> np.ndarray:
    """Return how often the neurons of a matrix are active; as if alike where it is not known."""
    if counts is None or name not in counts.active:
        return np.full(neurons, ASSUMED_ACTIVE)
    return np.asarray(counts.active[name] / counts.tokens)


def parse_neuron_counts(path: Path, layouts: Sequence[FileLayout]) -> NeuronCounts:
    """Return the counts in a file, checked; errors as for `read_neuron_counts`."""
    about, arrays = COUNTS.read(path, layouts)
    tokens, records = about["tokens"], about["records"]
    if not is_count(tokens) or not tokens or not isinstance(about["calibration"], dict):
        raise FormatError(
            f"{path}: tokens must be a number of at least 1 and calibration an object, got "
            f"{brief(tokens)} and {brief(about['calibration'])}; pack the model again"
        )
    if records.keys() != arrays.keys():
        raise FormatError(
            f"{path}: records must name the matrices that are counted, got {brief(records)}; pack "
            "the model again"
        )
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    active = {}
    for name, (entry, counts) in arrays.items():
        spec = specs[name]
        if not spec.transposed:
            raise FormatError(
                f"{path}: {name}: must be a matrix that is stored by neuron, and is none of this "
                "checkpoint; pack the model again"
            )
        if (entry.dtype, entry.shape) != ("U32", spec.shape[1:]):
            raise FormatError(
                f"{path}: {name}: must be U32 [{spec.shape[1]}], a count for each neuron, got "
                f"{entry.dtype} {list(entry.shape)}; pack the model again"
            )
        if counts.size and int(counts.max()) > tokens:
            raise FormatError(
                f"{path}: {name}: counts must be at most {tokens}, the tokens, got "
                f"{int(counts.max())}; pack the model again"
            )
        active[name] = counts
    return NeuronCounts(tokens, active, about["calibration"])
