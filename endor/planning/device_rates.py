"""How fast devices multiply straight from packed weights: a model's rates, none of them measured.

Those of five cards are the rows of docs/benchmarks/gpu.md (`scripts/gpu_counts.py`: instructions
and memory sectors of the compiled kernels against the makers' limits), density 0.5, matrices 4096
wide. Those of other cards are the nearest one's times the smaller one of two ratios: memory
bandwidth, and multiprocessors x boost clock, by the makers' data sheets.
"""

from collections.abc import Mapping
from types import MappingProxyType

MOST_ROWS = 8
"""Input rows that the product kernels take at most."""

Rates = Mapping[str, tuple[float, float]]
"""10^9 weights a second of one input row, and of `MOST_ROWS`, by kind of stored tensor."""


def _rates(raw: tuple[float, float], exp: tuple[float, float], share: float = 1.0) -> Rates:
    kinds = {"raw+bitmap": raw, "exp+bitmap": exp}
    return MappingProxyType(
        {kind: (one * share, all_ * share) for kind, (one, all_) in kinds.items()}
    )


_RTX_3060 = (261.0, 230.0), (251.0, 187.0)
_RTX_4090 = (810.0, 803.0), (1057.0, 971.0)
_RTX_5090 = (1422.0, 1381.0), (1704.0, 1421.0)
_H100_SXM = (1650.0, 1333.0), (1334.0, 981.0)
_H200 = (1701.0, 1350.0), (1339.0, 982.0)

_BY_NAME: Mapping[str, Rates] = {
    "RTX 3060": _rates(*_RTX_3060),
    "RTX 3090": _rates(*_RTX_3060, share=min(936 / 360, 82 * 1.695 / (28 * 1.777))),
    "RTX 4090": _rates(*_RTX_4090),
    "RTX 4070 Ti SUPER": _rates(*_RTX_4090, share=min(672 / 1008, 66 * 2.61 / (128 * 2.52))),
    "RTX 4060 Laptop GPU": _rates(*_RTX_4090, share=min(256 / 1008, 24 * 2.37 / (128 * 2.52))),
    "RTX 5090": _rates(*_RTX_5090),
    "H100 80GB HBM3": _rates(*_H100_SXM),
    "H100 PCIe": _rates(*_H100_SXM, share=min(2039 / 3350, 114 * 1.755 / (132 * 1.98))),
    "H200": _rates(*_H200),
}

_NONE: Rates = MappingProxyType({})


def modelled(device: str) -> Rates:
    """Return the rates of a device by its name; empty where the model knows none.

    Args:
        device: As the driver gives it, or as a machine of the catalogue does: `2 x RTX 3090`
            computes like one, since a step passes from one to the next.
    """
    name = device.partition(" x ")[2] or device
    return _BY_NAME.get(name.removeprefix("NVIDIA ").removeprefix("GeForce "), _NONE)


def product_s(weights: float, rates: tuple[float, float], rows: int) -> float:
    """Return the seconds of a product of so many rows: linear between one and `MOST_ROWS`."""
    one, most = (weights / rate / 1e9 for rate in rates)
    return one + max(0.0, most - one) * (rows - 1) / (MOST_ROWS - 1)
