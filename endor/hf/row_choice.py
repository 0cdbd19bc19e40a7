"""Products with a layer's rows that matter alone; the others give 0."""

from typing import Protocol

import numpy as np
import torch

from endor.offload.weight import Weight

WORTH = 0.7
"""Share of the rows from which the whole product is faster: rows that lie apart cost more
than what lies together (`docs/neurons.md`)."""


class RowChoice(Protocol):
    """Says which outputs of a linear layer are worth computing.

    Attributes:
        lossy: Whether those that it leaves out would not all have been 0 in the end.
    """

    lossy: bool

    def rows(self, input: torch.Tensor) -> np.ndarray | None:
        """Return rows of the weight, rising, u32; None for all of them.

        Args:
            input: What the layer was given; few rows, without gradient.
        """
        ...


def chosen_product(
    choice: RowChoice, input: torch.Tensor, source: Weight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a layer's output with some rows alone, float32 `(batch, out_features)`.

    None where all of them are to be multiplied, or another way is to be taken.

    Args:
        choice: Which rows.
        input: What the layer was given.
        source: Its weight.
        bias: Its bias: added where a row was multiplied, all else is 0.
    """
    count, cols = source.shape
    if not source.takes_rows or not 0 < input.numel() // cols <= source.product_rows:
        return None
    rows = choice.rows(input)
    if rows is None or rows.size > WORTH * count:
        return None
    if choice.lossy:
        counters = source.mover.ledger.counters
        counters.lossy_rows += count
        counters.lossy_rows_named += rows.size
    out = source.product_of(input.reshape(-1, cols).contiguous(), rows)
    if bias is not None:
        at = torch.from_numpy(rows.astype(np.int64))
        out[:, at] += bias[at]
    return out
