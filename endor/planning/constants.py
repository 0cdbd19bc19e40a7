"""The constants of a machine that plans are made of, as records, and an ordinary machine's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from endor.machine import Facts, positive


@dataclass(frozen=True, slots=True)
class Link:
    """One CUDA device and the link to it.

    Attributes:
        name: The device's name.
        vram_bytes: Its memory.
        h2d_gbps: Pinned host to device, large copies.
        copy_us: Time of a tiny copy.
        hbm_gbps: Device memory traffic, read and write counted.
        launch_us: Time of one small kernel.
        gemm_gflops: Dense matrix product in bf16.
    """

    name: str
    vram_bytes: int
    h2d_gbps: float
    copy_us: float
    hbm_gbps: float
    launch_us: float
    gemm_gflops: float


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk that holds the packed files.

    Attributes:
        read_gbps: Sequential cold reads of a few threads.
        slowest_gbps: The slowest pass; shared and virtual disks wander.
        fastest_gbps: The fastest pass.
        cpu_s_per_gb: Processor seconds that 10^9 bytes read cost.
        direct: Whether the filesystem takes O_DIRECT.
        request_us: What a request costs besides its bytes, when many are made at once.
        scattered_gbps: Rate of the bytes of such requests, which are small and anywhere.
        disturbed: Share of the processor, or of what the disk moved, that others had meanwhile.
        measured: When, in UTC; empty means never.
    """

    read_gbps: float
    slowest_gbps: float
    fastest_gbps: float
    cpu_s_per_gb: float
    direct: bool
    request_us: float = 25.0
    scattered_gbps: float = 1.5
    disturbed: float = 0.0
    measured: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured constants of the processor, its memory and, if any, its first CUDA device.

    Attributes:
        dtype: Element type that the constants are of.
        threads: Threads that every parallel constant was measured with.
        copy_gbps: Memory copy, bytes counted once.
        read_gbps: Memory read.
        expand_gbps: Dense bytes written by a decode, per kind of stored tensor.
        product_gbps: Packed bytes read by a product at batch 1, per kind.
        linear_gbps: Weight bytes read by torch's dense product at batch 1.
        gemm_gflops: Torch's dense product with 256 rows.
        op_us: One small elementwise operation of torch.
        link: The first CUDA device, or `None`.
        small_expand_gbps, small_product_gbps, small_linear_gbps: The same of a matrix of less than
            a million weights; without them the others stand in.
        product_row_cost: What each further row adds to a packed product, as a share of the first.
        float32_gflops: Torch's product of 64 rows in float32; 0 means unknown.
        widen_gbps: Bytes of a 16-bit type that are widened to float32 in the caches.
        plain_gbps: Weight bytes read by Endor's own product with a dense matrix at batch 1; 0 means
            unknown, and that torch's is taken.
        plain_row_cost: What each further row adds to that, as a share of the first.
        checksum_gbps: Bytes that one thread checks after reading them; 0 means unknown.
        disturbed: Share of the processors that others had in the worst part of the measurement.
        measured: When, in UTC; empty means never.
        kernel: Which CPU kernels ran.
    """

    dtype: str
    threads: int
    copy_gbps: float
    read_gbps: float
    expand_gbps: Mapping[str, float]
    product_gbps: Mapping[str, float]
    linear_gbps: float
    gemm_gflops: float
    op_us: float
    link: Link | None = None
    small_expand_gbps: Mapping[str, float] = field(default_factory=dict)
    small_product_gbps: Mapping[str, float] = field(default_factory=dict)
    small_linear_gbps: float = 0.0
    product_row_cost: Mapping[str, float] = field(default_factory=dict)
    float32_gflops: float = 0.0
    widen_gbps: float = 0.0
    plain_gbps: float = 0.0
    plain_row_cost: float = 0.0
    checksum_gbps: float = 0.0
    disturbed: float = 0.0
    measured: str = ""
    kernel: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Facts) -> "Machine":
        """Return the machine that `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: It is not one that a measurement gives.
        """
        link = values["link"]
        rest = {item.name: values[item.name] for item in fields(cls) if item.name != "link"}
        check_rates(rest, cls)
        if link is not None:
            check_rates(link, Link)
        return cls(**rest, link=None if link is None else Link(**link))


KINDS = ("raw+bitmap", "exp+bitmap", "exp", "int")
"""Kinds of stored tensor that rates are measured of."""


def check_rates(values: Facts, of: type) -> None:
    """Raise unless every number among the fields of `of` is positive, where it must be."""
    for item in fields(of):
        if item.name == "link":  # has rates of its own
            continue
        value = values[item.name]
        if item.name == "disturbed":  # 0 at best
            value += 1
        if item.type in (str, bool):
            right = isinstance(value, item.type)
        elif isinstance(value, Mapping):
            right = all(positive(value[kind]) for kind in KINDS)
        else:
            right = positive(value)
        if not right:
            raise ValueError(f"{item.name}: no measurement gives {value!r}")


TYPICAL_LINK = Link(
    name="typical",
    vram_bytes=0,
    h2d_gbps=20.0,
    copy_us=10.0,
    hbm_gbps=800.0,
    launch_us=5.0,
    gemm_gflops=1e5,
)
TYPICAL_DISK = Disk(
    read_gbps=2.5, slowest_gbps=2.0, fastest_gbps=3.0, cpu_s_per_gb=0.1, direct=True
)
"""Stand in for a machine that was never measured: placing needs ratios, predicting needs truth."""


def typical(dtype: str) -> Machine:
    """Return the constants of an ordinary desktop with a CUDA device."""
    return Machine(
        dtype=dtype,
        threads=torch.get_num_threads(),
        copy_gbps=10.0,
        read_gbps=20.0,
        expand_gbps=dict.fromkeys(KINDS, 10.0),
        product_gbps=dict.fromkeys(KINDS, 15.0),
        linear_gbps=10.0,
        gemm_gflops=200.0,
        op_us=2.0,
        link=TYPICAL_LINK,
    )
