"""What is launched on a CUDA device: a kernel, its grid and the bytes of its argument."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from endor.codecs import TensorSpec
from endor.errors import ShapeError

MAX_TENSORS = 8
"""Tensors of one launch. The arguments travel by value, 4 KiB at most."""

_ALIGNED = {"values": 16, "bytes": 8, "planes": 8, "bitmap": 4, "tile_offsets": 4}
_ALIGNED |= {"patch_offsets": 4, "patch_ranks": 2, "patch_exponents": 1, "patch_codes": 4}
_ALIGNED |= {"steps": 4, "frequencies": 2, "chunk_offsets": 4, "states": 4, "words": 16}
_ALIGNED |= {"low_bits": 4, "levels": 4}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled function: a source of `cuda/` and the constants it is compiled with."""

    name: Literal["expand_raw", "expand_exp", "expand_int", "product", "product_exp"]
    defines: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a record and where its arrays and its dense form lie.

    Attributes:
        spec: What is stored.
        addresses: Device address per array suffix.
        out: Device address of the dense destination, a multiple of 16.
    """

    spec: TensorSpec
    addresses: Mapping[str, int]
    out: int

    def check_alignment(self) -> None:
        """Raise `ShapeError` unless every address is aligned as the kernels need it."""
        if self.out % 16:
            raise ShapeError(f"out must start at a multiple of 16, got address {self.out:#x}")
        for suffix, address in self.addresses.items():
            if address % _ALIGNED[suffix]:
                raise ShapeError(
                    f"{suffix} must start at a multiple of {_ALIGNED[suffix]}, got address "
                    f"{address:#x}"
                )


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: What to run.
        args: Its only argument, a structure passed by value: array of one element.
        grid: Blocks.
        block: Threads per block.
        shared_bytes: Dynamic shared memory per block.
    """

    kernel: Kernel
    args: np.ndarray
    grid: int
    block: int
    shared_bytes: int
