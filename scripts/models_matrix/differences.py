"""Where two sets of tensors differ."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def tensors(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested containers, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(f"{path}.{key}", item)
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from tensors(f"{path}.{at}", item)


def equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return not difference(found, wanted)


def difference(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Return the first difference of two sets of tensors, bit for bit; nothing if there is none."""
    for name in sorted(set(found) | set(wanted)):
        if name not in found or name not in wanted:
            return f"{name} is missing on one side"
        ours, theirs = found[name], wanted[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{name}: {ours.dtype}{list(ours.shape)} for {theirs.dtype}{list(theirs.shape)}"
        if not torch.equal(_bits(ours), _bits(theirs)):
            off = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0
            return f"{name} is off by up to {off:.3g}"
    return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.flatten().view(torch.uint8) if tensor.numel() else tensor


def files_difference(source: Path, back: Path) -> str:
    """Return where the tensors of two folders of safetensors files differ; nothing if nowhere."""

    def contents(folder: Path) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return out

    return difference(contents(back), contents(source))
