"""What a packed checkpoint weighs: totals over its shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from endor.storage import FileLayout

Progress = Callable[[int, int], None]
"""Called with dense bytes done and in total; on the calling thread."""


_NO_WEIGHTS = ("dense", "fields")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes and weights of a packed checkpoint.

    Attributes:
        tensors: All tensors.
        packed_tensors: Those of weights not stored dense.
        weights: Elements of the packed tensors.
        nnz: Non-zeros among them; all of them where no bitmap is stored.
        dense_bytes: What all tensors take dense.
        packed_bytes: The shards on disk, headers and padding included.
        packed_weights_bytes: The records of packed tensors and all headers.
        shards: Files.
        recoded_tensors: Those in codec `fields`: packed codes of another format.
        recoded_from_bytes: What these take dense.
        recoded_bytes: What they take here, without alignment.
        neuron_tensors: Matrices stored by neuron, that is, transposed.
    """

    tensors: int
    packed_tensors: int
    weights: int
    nnz: int
    dense_bytes: int
    packed_bytes: int
    packed_weights_bytes: int
    shards: int
    recoded_tensors: int = 0
    recoded_from_bytes: int = 0
    recoded_bytes: int = 0
    neuron_tensors: int = 0

    @property
    def ratio(self) -> float:
        """Dense size over packed size."""
        return self.dense_bytes / self.packed_bytes if self.packed_bytes else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight of the packed tensors takes, all metadata and padding included."""
        return 8 * self.packed_weights_bytes / self.weights if self.weights else 0.0

    @property
    def density(self) -> float:
        """Share of stored elements over the packed tensors."""
        return self.nnz / self.weights if self.weights else 1.0

    @classmethod
    def of(cls, layouts: Sequence[FileLayout]) -> "Sizes":
        """Return the totals of shards with these layouts."""
        specs = [entry.spec for layout in layouts for entry in layout.tensors.values()]
        packed = [spec for spec in specs if spec.codec not in _NO_WEIGHTS]
        recoded = [spec for spec in specs if spec.codec == "fields"]
        return cls(
            tensors=len(specs),
            packed_tensors=len(packed),
            weights=sum(spec.numel for spec in packed),
            nnz=sum(spec.nnz for spec in packed),
            dense_bytes=sum(spec.dense_nbytes for spec in specs),
            packed_bytes=sum(layout.file_bytes for layout in layouts),
            packed_weights_bytes=sum(
                layout.data_start + _packed_records(layout) for layout in layouts
            ),
            shards=len(layouts),
            recoded_tensors=len(recoded),
            recoded_from_bytes=sum(spec.dense_nbytes for spec in recoded),
            recoded_bytes=sum(spec.nbytes for spec in recoded),
            neuron_tensors=sum(spec.transposed for spec in specs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return fields and ratios for JSON."""
        return asdict(self) | {
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "density": self.density,
        }


def _packed_records(layout: FileLayout) -> int:
    names = {
        entry.record for entry in layout.tensors.values() if entry.spec.codec not in _NO_WEIGHTS
    }
    return sum(layout.records[name].nbytes for name in names)


@dataclass(frozen=True, slots=True)
class PackReport:
    """How a conversion to the packed format went.

    Attributes:
        path: The packed checkpoint.
        sizes: Its totals.
        resumed_shards: Shards that an earlier run had finished.
        seconds: Wall time of this run.
        converted_bytes: Dense bytes that this run read.
        left_out: Other weights and folders beside the source's, which were not carried over.
        code: Files of Python code that were carried over.
        recodable_tensors: Those that were looked at for packed codes of another format.
        neurons_unused: Why nothing is stored by neuron though it was asked for; else empty.
        stored_quantization: The quantisation that the weights had before, in words; empty for none.
        streamed_shards: Of a model that was fetched while it was packed, the most files of it that
            were on disk at once.
    """

    path: Path
    sizes: Sizes
    resumed_shards: int
    seconds: float
    converted_bytes: int
    left_out: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    stored_quantization: str = ""
    recodable_tensors: int = 0
    neurons_unused: str = ""
    streamed_shards: int = 0

    @property
    def gbps(self) -> float:
        """Dense bytes read a second, in 10^9."""
        return self.converted_bytes / self.seconds / 1e9 if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "path": str(self.path),
            **self.sizes.to_dict(),
            "resumed_shards": self.resumed_shards,
            "seconds": self.seconds,
            "converted_bytes": self.converted_bytes,
            "gbps": self.gbps,
            "left_out": list(self.left_out),
            "code": list(self.code),
            "recodable_tensors": self.recodable_tensors,
            "neurons_unused": self.neurons_unused,
            "streamed_shards": self.streamed_shards,
        }


@dataclass(frozen=True, slots=True)
class DenseReport:
    """How the writing of a dense checkpoint went.

    Attributes:
        path: The dense checkpoint.
        tensors: Tensors written.
        pruned_tensors: Those that a pruner has seen.
        weights: Elements of the pruned tensors.
        zeros: Elements among them whose bits are all zero.
        dense_bytes: Bytes of all tensors.
        files: Weight files written.
        resumed_files: Files that an earlier run had finished.
        seconds: Wall time of this run.
        left_out: Other weights and folders beside the source's, which were not carried over.
        code: Files of Python code that were carried over.
        quantize: How the weights were quantised; empty where they were not.
    """

    path: Path
    tensors: int
    pruned_tensors: int
    weights: int
    zeros: int
    dense_bytes: int
    files: int
    resumed_files: int
    seconds: float
    left_out: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    quantize: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gbps(self) -> float:
        """Dense bytes written a second, in 10^9."""
        return self.dense_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def sparsity(self) -> float:
        """Share of zeros over the pruned tensors."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        fields = asdict(self) | {"path": str(self.path)}
        if not self.quantize:
            del fields["quantize"]
        return fields | {"gbps": self.gbps, "sparsity": self.sparsity}


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """Ignore progress."""
