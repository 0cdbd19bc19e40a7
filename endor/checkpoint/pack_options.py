"""What the bytes of a packed checkpoint depend on besides its source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from endor.checkpoint.neurons import Neurons
from endor.checkpoint.plan import Unit
from endor.codecs import CodecChoice, Encoded

Made = Callable[[Path], bytes]
"""Makes the content of a file, given the directory with all that a packed checkpoint holds."""


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What the packed bytes depend on besides the source.

    Attributes:
        codec: For the selected tensors.
        max_shard_bytes: Size that a shard does not exceed, unless one record does.
        prune: How the weights were pruned, for config.json; empty when they were not.
        quantize: How they were quantised; empty when they were not.
        dequantized: Format that they were quantised in before, where the source reads them out of
            it; else empty.
        neurons: What is stored by neuron.
        made: Files that are made last, by name.
    """

    codec: CodecChoice
    max_shard_bytes: int
    prune: Mapping[str, Any]
    quantize: Mapping[str, Any] = field(default_factory=dict)
    dequantized: str = ""
    neurons: Neurons = field(default_factory=Neurons)
    made: Mapping[str, Made] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        said: dict[str, Any] = {
            "prune": dict(self.prune),
            "quantize": dict(self.quantize),
            "dequantized": self.dequantized,
            "neurons": self.neurons.activation,
            "neuron_bundles": self.neurons.bundled,
        }
        return {"codec": self.codec} | {key: about for key, about in said.items() if about}


class Part(Protocol):
    """A part in a run of several processes: one share of the records, or the assembly of all."""

    def units(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Return those of a run's records that this part writes."""
        ...

    def identify(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return what this part's output depends on.

        Args:
            identity: What the whole run's does.

        Raises:
            CheckpointError: The parts are of different runs.
        """
        ...

    def files(self) -> Mapping[str, bytes]:
        """Return what is published besides."""
        ...

    def encoded(self, name: str) -> Encoded | None:
        """Return a tensor that another part has encoded; None where it is to be done."""
        ...
