"""`safe_open(...).get_slice(name)`: part of a tensor, as safetensors gives it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from endor.errors import ShapeError

if TYPE_CHECKING:
    import torch


class TensorSlice:
    """A tensor of a file that is read when it is indexed.

    The whole tensor is read, checked and expanded, for its checksum covers all of it; only the part
    is kept.

    Args:
        name: The tensor.
        shape: In elements, as the file says it.
        dtype: Its safetensors code, such as `"BF16"`.
        load: Returns it dense.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        load: "Callable[[], torch.Tensor]",
    ) -> None:
        self._name, self._shape, self._dtype, self._load = name, shape, dtype, load

    def __repr__(self) -> str:
        return f"TensorSlice({self._name!r}, {list(self._shape)}, {self._dtype})"

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return the element type's safetensors code."""
        return self._dtype

    def __getitem__(self, index: Any) -> "torch.Tensor":
        """Return the part that `index` selects, in memory of its own.

        Raises:
            ShapeError: The index does not fit the shape.
        """
        try:
            return self._load()[index].clone()
        except (IndexError, TypeError, ValueError) as error:
            raise ShapeError(
                f"{self._name}: cannot take [{index}] of shape {list(self._shape)}: {error}"
            ) from error
