"""The machine constants as a table of records, measured or remembered."""

from dataclasses import dataclass
from pathlib import Path

from endor.planning import machine as hardware
from endor.planning.constants import Disk, Machine


@dataclass(frozen=True, slots=True)
class Constant:
    """One measured constant.

    Attributes:
        name: What it is.
        value: Its value.
        unit: Its unit; GB are 10^9 bytes.
    """

    name: str
    value: float
    unit: str


def hw(
    dtype: str = "BF16", path: Path | None = None, *, refresh: bool = False
) -> tuple[Machine, Disk | None]:
    """Return the constants of this machine, and of the disk that holds `path` if one is given.

    Args:
        dtype: Element type.
        path: A file or directory on the disk to measure.
        refresh: Measure even what is remembered.

    Raises:
        ConfigError: An unknown dtype, or no file to read.
    """
    machine = hardware.machine(dtype, refresh=refresh)
    return machine, hardware.disk(path, refresh=refresh) if path else None


def constants(machine: Machine, disk: Disk | None = None) -> list[Constant]:
    """Return the constants one by one."""
    out = [
        Constant("memory read", machine.read_gbps, "GB/s"),
        Constant("memory copy", machine.copy_gbps, "GB/s"),
        Constant("dense product at batch 1, weight bytes", machine.linear_gbps, "GB/s"),
        Constant("dense product of 256 rows", machine.gemm_gflops, "Gflop/s"),
        Constant("dense product of 64 rows in float32", machine.float32_gflops, "Gflop/s"),
        Constant("widening to float32, narrow bytes", machine.widen_gbps, "GB/s"),
        Constant("dense product by Endor at batch 1, weight bytes", machine.plain_gbps, "GB/s"),
        Constant("small dense product at batch 1", machine.small_linear_gbps, "GB/s"),
        Constant("checksums, one thread", machine.checksum_gbps, "GB/s"),
        Constant("one small operation", machine.op_us, "us"),
    ]
    for kind, rate in machine.expand_gbps.items():
        out.append(Constant(f"expand {kind}, dense bytes", rate, "GB/s"))
    for kind, rate in machine.product_gbps.items():
        out.append(Constant(f"product {kind}, packed bytes", rate, "GB/s"))
    for kind, rate in machine.small_expand_gbps.items():
        out.append(Constant(f"small expand {kind}", rate, "GB/s"))
    for kind, rate in machine.small_product_gbps.items():
        out.append(Constant(f"small product {kind}", rate, "GB/s"))
    for kind, share in machine.product_row_cost.items():
        out.append(Constant(f"product {kind}, each further row", 100 * share, "%"))
    if disk is not None:
        how = "past the page cache" if disk.direct else "through the page cache"
        out += [
            Constant(f"disk, cold reads {how}", disk.read_gbps, "GB/s"),
            Constant("disk, slowest pass", disk.slowest_gbps, "GB/s"),
            Constant("disk, fastest pass", disk.fastest_gbps, "GB/s"),
            Constant("processor time of reading", disk.cpu_s_per_gb, "s/GB"),
            Constant("a request besides its bytes", disk.request_us, "us"),
            Constant("disk, bytes of small requests", disk.scattered_gbps, "GB/s"),
        ]
    if machine.link is not None:
        out += [
            Constant(f"link to {machine.link.name}, pinned", machine.link.h2d_gbps, "GB/s"),
            Constant("one tiny copy over the link", machine.link.copy_us, "us"),
            Constant("device memory, read and write", machine.link.hbm_gbps, "GB/s"),
            Constant("one kernel launch", machine.link.launch_us, "us"),
            Constant("device dense product", machine.link.gemm_gflops, "Gflop/s"),
        ]
    return out
