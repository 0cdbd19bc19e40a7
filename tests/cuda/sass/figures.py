"""What each kernel costs per 1024 weights: the cases that budget.json records."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from endor import codecs
from endor.codecs import Encoded, integer
from endor.kernels import gpu_build

from .memory import Costs
from .simulator import BF16, Simulator, weights

BUDGET = Path(__file__).with_name("budget.json")
COLUMNS = ("instructions", "sectors read", "sectors written", "wavefronts", "transfers", "bytes")
"""Warp instructions; 32-byte sectors of global memory; cycles of shared memory; those, the lines of
global memory and the shuffles, which share one unit; bytes that device memory must move."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table.

    Attributes:
        name: What is counted.
        run: Runs it for an architecture; returns its costs, its weights, and the bytes that are
            read or written at least once.
    """

    name: str
    run: Callable[[Simulator, str], tuple[Costs, int, int]]


def _rng() -> np.random.Generator:
    return np.random.default_rng(2406)


def _expansion(name: str, make: Callable[[], Encoded]) -> Figure:
    def run(simulator: Simulator, architecture: str) -> tuple[Costs, int, int]:
        encoded = make()
        spec = encoded.spec
        costs = simulator.expand([encoded], architecture)
        return costs, spec.numel, spec.nbytes + spec.dense_nbytes

    return Figure(name, run)


def _product(codec: Literal["raw", "exp"], cols: int, batch: int) -> Figure:
    def run(simulator: Simulator, architecture: str) -> tuple[Costs, int, int]:
        rng = _rng()
        packed = codecs.encode(weights(rng, (32, cols), 0.5), BF16, codec=codec)
        x = weights(rng, (batch, cols))
        # x and y are small beside the weights of a whole matrix
        return simulator.multiply(packed, x, architecture)[1], packed.spec.numel, packed.spec.nbytes

    columns = f"{batch} column{'s' if batch > 1 else ''}"
    return Figure(f"product `{codec}`, density 0.5, {columns}, {cols} wide", run)


def _tiles(density: float) -> np.ndarray:
    return weights(_rng(), (64, 1024), density)


def _raw(density: float) -> Encoded:
    return codecs.encode(_tiles(density), BF16, codec="raw")


def _exp(density: float, *, bitmap: bool) -> Encoded:
    return codecs.encode(_tiles(density), BF16, codec="exp", bitmap=bitmap)


def _int(spread: float) -> Encoded:
    """Eight chunks, one step a column; a normal distribution as wide as 2.7 has 3.5 bits."""
    rng = _rng()
    codes = np.rint(rng.normal(0, spread, (256, 1024))).astype(np.int32)
    return integer.encode(codes, integer.round_steps(0.01 + rng.random(1024)), BF16)


FIGURES = (
    _expansion("expand `raw`, bf16, density 0.5", lambda: _raw(0.5)),
    _expansion("expand `raw`, bf16, density 0.3", lambda: _raw(0.3)),
    _expansion("expand `exp`, bf16, density 0.5", lambda: _exp(0.5, bitmap=True)),
    _expansion("expand `exp`, bf16, no bitmap", lambda: _exp(1.0, bitmap=False)),
    _expansion("expand `int`, bf16, 3.5 bits a weight", lambda: _int(2.7)),
    *(
        _product(codec, cols, batch)
        for codec in ("raw", "exp")
        for cols, batch in ((4096, 1), (11008, 1), (4096, 2), (4096, 4), (4096, 8))
    ),
)


def count(figure: Figure, simulator: Simulator, architecture: str) -> dict[str, float]:
    """Return each of `COLUMNS` per 1024 weights."""
    costs, numel, moved = figure.run(simulator, architecture)
    found = {"instructions": costs.instructions, "transfers": costs.transfers, "bytes": moved}
    return {name: round(found.get(name, costs[name]) * 1024 / numel, 1) for name in COLUMNS}


def compiler() -> str:
    """Version of NVRTC: another one may need more or fewer instructions."""
    return ".".join(map(str, gpu_build.nvrtc_version() or ()))


def recorded() -> dict:
    return json.loads(BUDGET.read_text())
