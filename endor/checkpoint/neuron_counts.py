"""How often each neuron was active in calibration text: a small file of a packed checkpoint.

A stock safetensors file beside the shards, one array a matrix. What it says of a matrix holds for
the record that the matrix lies in: it names that record's checksum.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.index import published_files
from endor.errors import CheckpointError, ChecksumError, FormatError
from endor.jsontext import parse_object
from endor.storage import FileLayout
from endor.storage.checksum import checksum
from endor.storage.safetensors import Entry, Header, brief, check_plain, file_head, is_count

COUNTS_NAME = "endor.neurons.safetensors"
"""Beside the shards of a packed checkpoint."""

_KEY = "endor.neurons"
_VERSION = 1
_MEMBERS = {"version", "tokens", "calibration", "records", "checksum"}


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
        names = sorted(self.active)
        entries, start = [], 0
        for name in names:
            shape = self.active[name].shape
            entries.append((name, Entry("U32", shape, start, start + 4 * shape[0])))
            start += 4 * shape[0]
        data = b"".join(self.active[name].astype("<u4").tobytes() for name in names)
        records = _records(layouts)
        about = {
            "version": _VERSION,
            "tokens": self.tokens,
            "calibration": dict(self.calibration),
            "records": {name: records[name] for name in names},
        }
        about["checksum"] = _checksum(about, dict(entries), data)
        return file_head(entries, {_KEY: json.dumps(about, separators=(",", ":"))}) + data


def read_neuron_counts(packed: Path, layouts: Sequence[FileLayout]) -> NeuronCounts | None:
    """Return the counts of a packed checkpoint; None where it has none.

    Args:
        packed: The directory.
        layouts: Its shards.

    Raises:
        CheckpointError: The index names them and they are missing, or they are another packing's.
        FormatError: They are damaged, or of a version that is not known.
    """
    path = packed / COUNTS_NAME
    index = packed / PACKED_INDEX_NAME
    listed = published_files(index) if index.exists() else None
    if not path.is_file():
        if listed is not None and COUNTS_NAME in listed:
            raise CheckpointError(
                f"{path}: is missing, and the index names it; copy it again, or pack the model "
                "again"
            )
        return None
    if listed is not None and COUNTS_NAME not in listed:
        raise CheckpointError(
            f"{path}: is not in the index, so it belongs to another checkpoint; remove it"
        )
    return parse_neuron_counts(path, layouts)


def counted(layouts: Sequence[FileLayout]) -> NeuronCounts | None:
    """Return the counts of the packed checkpoint of these shards; as `read_neuron_counts`."""
    return read_neuron_counts(layouts[0].path.parent, layouts) if layouts else None


def parse_neuron_counts(path: Path, layouts: Sequence[FileLayout]) -> NeuronCounts:
    """Return the counts in a file, checked; errors as for `read_neuron_counts`."""
    header = Header.read(path)
    check_plain(header)
    about = parse_object(header.metadata.get(_KEY, "{}"), f"{path}: {_KEY}")
    if about.keys() != _MEMBERS or about["version"] != _VERSION:
        raise FormatError(
            f"{path}: {_KEY} must be of version {_VERSION} and hold "
            f"{', '.join(sorted(_MEMBERS))}, got {brief(sorted(about))} of version "
            f"{brief(about.get('version'))}; upgrade endor, or pack the model again"
        )
    data = path.read_bytes()[header.data_start :]
    recorded = about.pop("checksum")
    found = _checksum(about, header.entries, data)
    if recorded != found:
        raise ChecksumError(
            f"{path}: checksum must be {brief(recorded)}, got {found}; the file is damaged: copy "
            "it again, or pack the model again"
        )
    tokens, records = about["tokens"], about["records"]
    if not is_count(tokens) or not tokens or not isinstance(about["calibration"], dict):
        raise FormatError(
            f"{path}: tokens must be a number of at least 1 and calibration an object, got "
            f"{brief(tokens)} and {brief(about['calibration'])}; pack the model again"
        )
    if not isinstance(records, dict) or records.keys() != header.entries.keys():
        raise FormatError(
            f"{path}: records must name the matrices that are counted, got {brief(records)}; pack "
            "the model again"
        )
    known = _records(layouts)
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    active = {}
    for name, entry in header.entries.items():
        spec = specs.get(name)
        if spec is None or not spec.transposed:
            raise FormatError(
                f"{path}: {name}: must be a matrix that is stored by neuron, and is none of this "
                "checkpoint; pack the model again"
            )
        if (entry.dtype, entry.shape) != ("U32", spec.shape[1:]):
            raise FormatError(
                f"{path}: {name}: must be U32 [{spec.shape[1]}], a count for each neuron, got "
                f"{entry.dtype} {list(entry.shape)}; pack the model again"
            )
        if records[name] != known[name]:
            raise CheckpointError(
                f"{path}: {name}: was counted of a record with checksum {brief(records[name])}, "
                f"and that of the shards is {known[name]}: it is another packing's; copy it "
                "again, or pack the model again"
            )
        counts = np.frombuffer(data[entry.start : entry.stop], "<u4")
        if counts.size and int(counts.max()) > tokens:
            raise FormatError(
                f"{path}: {name}: counts must be at most {tokens}, the tokens, got "
                f"{int(counts.max())}; pack the model again"
            )
        active[name] = counts
    return NeuronCounts(tokens, active, about["calibration"])


def _records(layouts: Sequence[FileLayout]) -> dict[str, str]:
    """Return the checksum of the record of each tensor."""
    return {
        name: layout.records[entry.record].checksum
        for layout in layouts
        for name, entry in layout.tensors.items()
    }


def _checksum(about: Mapping[str, Any], entries: Mapping[str, Entry], data: bytes) -> str:
    """Return the checksum of all that the file says, blind to how its header is written."""
    places = {name: [entry.dtype, entry.shape, entry.start] for name, entry in entries.items()}
    text = json.dumps([about, places], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return checksum(text.encode() + data)
