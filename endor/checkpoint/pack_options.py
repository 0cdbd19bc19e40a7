"""What the bytes of a packed checkpoint depend on besides its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from endor.checkpoint.neurons import Neurons
from endor.codecs import CodecChoice


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
    """

    codec: CodecChoice
    max_shard_bytes: int
    prune: Mapping[str, Any]
    quantize: Mapping[str, Any] = field(default_factory=dict)
    dequantized: str = ""
    neurons: Neurons = field(default_factory=Neurons)

    def describe(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        said: dict[str, Any] = {
            "prune": dict(self.prune),
            "quantize": dict(self.quantize),
            "dequantized": self.dequantized,
            "neurons": self.neurons.activation,
        }
        return {"codec": self.codec} | {key: about for key, about in said.items() if about}
