"""Plain safetensors files, with Endor's errors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from endor.errors import FormatError

if TYPE_CHECKING:
    import torch


class PlainFile:
    """A safetensors file that Endor did not write, read through the safetensors library.

    Raises:
        FormatError: The library rejects the file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._error = SafetensorError
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise self._wrong(error) from None
        self.names: list[str] = sorted(self._file.keys())
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Return a copy of the tensor `name`, which must exist, on the CPU."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except self._error as error:
            raise self._wrong(error) from None
        return tensor.clone()

    def _wrong(self, error: Exception) -> FormatError:
        return FormatError(f"{self.path}: safetensors cannot read it: {error}; copy the file again")
