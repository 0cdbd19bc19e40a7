"""Machines that are not at hand: published constants, from which a plan can be made for them.

Nothing here was measured. Bandwidths and peak rates are those of the makers' data sheets, brought
down by assumed shares.
"""

from dataclasses import dataclass

from endor.errors import ConfigError
from endor.planning.constants import KINDS, Disk, Link, Machine

MEMORY_SHARE = 0.75
"""What all cores read of a memory's nominal bandwidth."""
VRAM_SHARE = 0.85
"""The same of a device's memory."""
GEMM_SHARE = 0.5
"""What torch's products reach of a device's dense bf16 peak."""
CORE_EXPAND_GBPS, CORE_PRODUCT_GBPS, CORE_GFLOPS, CORE_CHECKSUM_GBPS = 12.0, 6.0, 40.0, 12.0
"""Assumed of one core with AVX2: dense bytes expanded, packed bytes multiplied, float32 product,
bytes checked."""


@dataclass(frozen=True, slots=True)
class Described:
    """A machine as its data sheets have it.

    Attributes:
        name: What it is called here.
        device: The CUDA device, or devices.
        vram_gib: Memory of all its devices.
        vram_gbps: Bandwidth of one device's memory.
        tflops: Dense bf16 products with float32 sums, one device.
        h2d_gbps: What the links of all devices deliver together, page-locked.
        ram_gib: Host memory that such a machine usually has.
        ram_gbps: Nominal bandwidth of it.
        cores: Cores of such a machine's processor.
        disk_gbps: Sequential reads of its disk.
        source: Where the device's figures are from.
    """

    name: str
    device: str
    vram_gib: float
    vram_gbps: float
    tflops: float
    h2d_gbps: float
    ram_gib: float
    ram_gbps: float
    cores: int
    disk_gbps: float
    source: str

    @property
    def ram_bytes(self) -> int:
        """Nine tenths of the host memory: the rest is the system's."""
        return int(self.ram_gib * 0.9 * 2**30)

    @property
    def vram_bytes(self) -> int:
        """Nine tenths of the device memory."""
        return int(self.vram_gib * 0.9 * 2**30)

    @property
    def disk(self) -> Disk:
        rate = self.disk_gbps
        return Disk(rate, 0.8 * rate, rate, cpu_s_per_gb=0.1, direct=True)

    def machine(self, dtype: str = "BF16") -> Machine:
        """Return its constants, for weights of `dtype`."""
        read = self.ram_gbps * MEMORY_SHARE
        product = min(read, self.cores * CORE_PRODUCT_GBPS)
        link = Link(
            name=self.device,
            vram_bytes=int(self.vram_gib * 2**30),
            h2d_gbps=self.h2d_gbps,
            copy_us=10.0,
            hbm_gbps=self.vram_gbps * VRAM_SHARE,
            launch_us=5.0,
            gemm_gflops=self.tflops * 1e3 * GEMM_SHARE,
        )
        return Machine(
            dtype=dtype,
            threads=self.cores,
            copy_gbps=read / 2,
            read_gbps=read,
            expand_gbps=dict.fromkeys(KINDS, min(read / 1.4, self.cores * CORE_EXPAND_GBPS)),
            product_gbps=dict.fromkeys(KINDS, product),
            linear_gbps=read,
            gemm_gflops=self.cores * CORE_GFLOPS,
            op_us=2.0,
            link=link,
            float32_gflops=self.cores * CORE_GFLOPS,
            widen_gbps=10.0 * self.cores,
            plain_gbps=read,
            checksum_gbps=CORE_CHECKSUM_GBPS,
        )


AMPERE = "NVIDIA Ampere GA102 architecture white paper"
ADA = "NVIDIA Ada GPU architecture white paper; laptop: NVIDIA's GeForce RTX 40 laptop page"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper"
HOPPER = "NVIDIA H100 data sheet"

_ALL = (
    Described("rtx4060-laptop", "RTX 4060 Laptop GPU", 8, 256, 30, 12, 32, 76.8, 8, 5.0, ADA),
    Described("rtx3060-12g", "RTX 3060", 12, 360, 25, 24, 32, 51.2, 6, 3.5, AMPERE),
    Described("rtx4070ti-super", "RTX 4070 Ti SUPER", 16, 672, 88, 24, 64, 83.2, 8, 7.0, ADA),
    Described("rtx3090", "RTX 3090", 24, 936, 71, 24, 64, 51.2, 8, 7.0, AMPERE),
    Described("2x3090", "2 x RTX 3090", 48, 936, 71, 48, 128, 51.2, 16, 7.0, AMPERE),
    Described("rtx4090", "RTX 4090", 24, 1008, 165, 24, 64, 83.2, 16, 7.0, ADA),
    Described("rtx5090", "RTX 5090", 32, 1792, 209, 52, 96, 96.0, 16, 12.0, BLACKWELL),
    Described("h100", "H100 PCIe", 80, 2039, 756, 52, 512, 307.2, 32, 12.0, HOPPER),
)

MACHINES = {each.name: each for each in _ALL}
"""By name. Several devices pass a step on from one to the next: memory and links add up, arithmetic
does not."""


def described(name: str) -> Described:
    """Return a machine of the table.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in MACHINES:
        raise ConfigError(f"{name}: is no machine of the table; there are {', '.join(MACHINES)}")
    return MACHINES[name]
