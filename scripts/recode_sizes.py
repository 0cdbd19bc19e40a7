"""What entropy coding would take off codes that other formats store in whole bits.

    python scripts/recode_sizes.py MODEL [--matrices 24]

The matrices of a checkpoint's layers are quantised by plain rounding; their codes, not their
scales, are packed into bytes, coded by codec `fields` as `endor pack` does it, read back and
compared. One line a format: bits a code as stored and as coded. Take a model off its own grid
first (scripts/rescale.py).
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from endor import kernels
from endor.codecs import DTYPES, fields

NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928,
    -0.5250731,
    -0.3949175,
    -0.2844414,
    -0.1847734,
    -0.0910500,
    0.0,
)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
"""Levels of NF4 (QLoRA, arXiv 2305.14314, appendix E)."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1 (OCP Microscaling Formats 1.0, table 5)."""


def groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return `weight` as `(groups, size)`; a row's rest that fills no group is left out."""
    columns = weight.shape[1] // size * size
    return weight[:, :columns].reshape(-1, size)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of the rising `levels`."""
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)


def integers(weight: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """Return symmetric codes of `bits` bits with one scale for `size` weights of a row."""
    part, top = groups(weight, size), 2 ** (bits - 1) - 1
    scale = part.abs().amax(1, keepdim=True).clamp_min(1e-12) / (top + 0.5)
    codes: torch.Tensor = (part / scale).round().clamp(-top - 1, top).int()
    return codes


def fp8(weight: torch.Tensor) -> torch.Tensor:
    """Return the bytes of e4m3 with one scale a row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8).int()


def squares(weight: torch.Tensor) -> torch.Tensor:
    """Return a row of each whole block of 128 x 128."""
    rows, columns = (size // 128 * 128 for size in weight.shape)
    blocks = weight[:rows, :columns].reshape(rows // 128, 128, columns // 128, 128)
    return blocks.transpose(1, 2).reshape(-1, 128 * 128)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return the codes of NF4 with one scale for 64 weights."""
    part = groups(weight, 64)
    scale = part.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return nearest(part / scale, torch.tensor(NF4)).int()


def mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """Return the codes of e2m1, sign above magnitude, with a power of two for 32 weights."""
    part = groups(weight, 32)
    scale = torch.exp2(part.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().floor() - 2)
    codes = nearest((part / scale).abs(), torch.tensor(FP4))
    return (codes + 8 * torch.signbit(part)).int()


FORMATS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "int4, group 128": (4, lambda weight: integers(weight, 128, 4)),
    "int4, group 32": (4, lambda weight: integers(weight, 32, 4)),
    "int4, row": (4, lambda weight: integers(weight, weight.shape[1], 4)),
    "int8, row": (8, lambda weight: integers(weight, weight.shape[1], 8)),
    "fp8 e4m3, row": (8, fp8),
    "fp8 e4m3, 128 x 128": (8, lambda weight: fp8(squares(weight))),
    "NF4, group 64": (4, nf4),
    "mxfp4, group 32": (4, mxfp4),
}


def coded_bits(codes: torch.Tensor, bits: int) -> float:
    """Return the bits a code that `endor pack` stores, tables counted, of codes of `bits` bits."""
    raw = (codes.reshape(-1) & (1 << bits) - 1).to(torch.uint8).numpy()
    if bits == 4:
        raw = raw[0::2] | raw[1::2] << 4
    layout = fields.choose(raw, fields.layouts(DTYPES["U8"]))
    if layout is None:
        return float(bits)
    coded = kernels.fields.encode(raw, DTYPES["U8"], layout)
    if coded is None or not np.array_equal(kernels.decode(coded, np.empty_like(raw)), raw):
        raise SystemExit("the codes did not come back as they were")
    return coded.nbytes * 8 / codes.numel()


def matrices(model: Path, count: int) -> Iterator[torch.Tensor]:
    """Yield `count` matrices of the layers of `model`, evenly chosen, as float32."""
    found = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found += [
                (path, name)
                for name in sorted(file.keys())
                if ".layers." in name and len(file.get_slice(name).get_shape()) == 2
            ]
    if not found:
        raise SystemExit(f"{model}: no safetensors file with matrices of layers")
    for at in range(min(count, len(found))):
        path, name = found[at * len(found) // min(count, len(found))]
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor(name).float()


def main() -> None:
    """Print one line a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--matrices", type=int, default=24)
    options = parser.parse_args()
    weights = list(matrices(options.model, options.matrices))
    print("| format | stored | coded |\n|---|---|---|")
    for name, (bits, quantise) in FORMATS.items():
        sizes = [(coded_bits(codes, bits), codes.numel()) for codes in map(quantise, weights)]
        mean = sum(size * count for size, count in sizes) / sum(count for _, count in sizes)
        print(f"| {name} | {bits} | {mean:.2f} |")


if __name__ == "__main__":
    main()
