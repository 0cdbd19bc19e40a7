"""What a quantisation run is told. Importable without torch."""

from dataclasses import dataclass

from endor.codecs.rounding import check_rate
from endor.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How weights become codes. Checked on creation.

    Attributes:
        bits: What a weight of the packed matrices takes on average, all metadata counted.
        dampening: Ridge added to the Gram matrix, as a share of its mean diagonal.
        keep_zeros: Whether weights that are zero stay so; None keeps those of matrices in which
            at least `SPARSE` of them are zero.
    """

    bits: float = 3.5
    dampening: float = 0.01
    keep_zeros: bool | None = None

    def __post_init__(self) -> None:
        check_rate(self.bits)
        if not self.dampening >= 0.0:
            raise ConfigError(f"dampening: must not be negative, got {self.dampening}")


SPARSE = 0.1
"""Share of zeros from which a matrix counts as sparse: dense ones have fewer than one in a
thousand."""
