"""What a packed checkpoint holds, from its headers alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.checkpoint.companions import QUANTIZATION_KEY
from endor.checkpoint.directory import read_config
from endor.checkpoint.index import check_shards, read_packed_index
from endor.checkpoint.neuron_counts import NeuronCounts, read_neuron_counts
from endor.checkpoint.predictors import Predictors, read_predictors
from endor.checkpoint.report import Sizes
from endor.codecs import TensorSpec
from endor.hub.origin import Origin
from endor.storage import FileLayout


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a packed checkpoint.

    Attributes:
        name: Its name.
        spec: How it is stored.
        record: The record it lies in.
        file: The shard.
    """

    name: str
    spec: TensorSpec
    record: str
    file: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        spec = self.spec
        return {
            "name": self.name,
            **spec.to_dict(),
            "nnz": spec.nnz,
            "density": spec.density,
            "bits_per_weight": spec.bits_per_weight,
            "nbytes": spec.nbytes,
            "dense_nbytes": spec.dense_nbytes,
            "record": self.record,
            "file": self.file,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a packed checkpoint, in file order.

    Attributes:
        path: The directory.
        rows: Its tensors.
        sizes: Totals.
        source: The model on the Hub that was packed, where it was one.
        neurons: How often neurons were active in calibration text, where they were counted.
        predictors: What guesses active neurons, where there are any; nothing uses them unasked.
    """

    path: Path
    rows: tuple[TensorRow, ...]
    sizes: Sizes
    source: Origin | None = None
    neurons: NeuronCounts | None = None
    predictors: Predictors | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "path": str(self.path),
            "source": None if self.source is None else self.source.to_dict(),
            "tensors": [row.to_dict() for row in self.rows],
            "totals": self.sizes.to_dict(),
            "neurons": None if self.neurons is None else self.neurons.to_dict(),
            "predictors": None if self.predictors is None else self.predictors.to_dict(),
        }


def inspect_checkpoint(packed_dir: Path | str) -> Inspection:
    """Return what a packed checkpoint, or a packed file, holds; reads headers only.

    Raises:
        CheckpointError: `packed_dir` is no packed checkpoint, or lacks a shard.
        FormatError: the index, a header or the counts or predictors of neurons are damaged.
    """
    path = Path(packed_dir)
    if path.is_file():
        layouts, neurons, predictors = [FileLayout.read(path)], None, None
    else:
        index = read_packed_index(path)
        layouts = [FileLayout.read(path / file) for file in index.files]
        check_shards(path, index, layouts)
        neurons, predictors = read_neuron_counts(path, layouts), read_predictors(path, layouts)
    rows = tuple(
        TensorRow(entry.name, entry.spec, entry.record, layout.path.name)
        for layout in layouts
        for entry in layout.tensors.values()
    )
    section = None if path.is_file() else (read_config(path) or {}).get(QUANTIZATION_KEY)
    source = Origin.of_config(section) if isinstance(section, dict) else None
    return Inspection(path, rows, Sizes.of(layouts), source, neurons, predictors)
