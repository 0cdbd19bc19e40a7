"""A placement that a search has tried."""

from dataclasses import dataclass

from endor.planning.beside import Way
from endor.planning.cost import Prediction
from endor.planning.tiers import Placement


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement that was tried."""

    way: Way
    decode: Prediction
    placement: Placement

    def beats(self, other: "Candidate") -> bool:
        """Whether it is faster: a hundredth is noise, on which no memory is spent."""
        return self.decode.seconds < 0.99 * other.decode.seconds
