"""The device that a calibrated run computes on."""

import torch

from endor.errors import BackendError


def torch_device(name: str) -> torch.device:
    """Return the torch device that "auto" or a name means.

    Raises:
        BackendError: There is none.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
    except RuntimeError as error:
        raise BackendError(f"device {name!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {name!r}: torch sees no CUDA device; use --device cpu")
    return device
