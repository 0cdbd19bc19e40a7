"""What this machine can do, measured once and remembered.

Where, and until what changes, is said in `endor.machine`. Disks are keyed by device, since a model
and the home directory rarely share one.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from endor import kernels
from endor.errors import ConfigError
from endor.machine import Facts, digest, fingerprint_facts, forget, load, positive, store
from endor.planning import probes


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
    """

    read_gbps: float
    slowest_gbps: float
    fastest_gbps: float
    cpu_s_per_gb: float
    direct: bool


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
        _check_rates(rest, cls)
        if link is not None:
            _check_rates(link, Link)
        return cls(**rest, link=None if link is None else Link(**link))


DOUBT = 0.25
"""A step further from its prediction than this share of it puts the constants in doubt."""
DOUBT_AGE_S = 600.0

KINDS = ("raw+bitmap", "exp+bitmap", "exp", "int")
"""Kinds of stored tensor that rates are measured of."""


def _check_rates(values: Facts, of: type) -> None:
    """Raise unless every number among the fields of `of` is positive, where it must be."""
    for item in fields(of):
        if item.name == "link":  # has rates of its own
            continue
        value = values[item.name]
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


def measure(dtype: str = "BF16") -> Machine:
    """Measure this machine now, with torch's thread count. Takes about ten seconds."""
    threads = torch.get_num_threads()
    # Without the native kernels a decode is a hundred times slower: a small sample will do.
    rows = probes.ROWS if kernels.describe()["compiled"] else 256
    constants: dict[str, Any] = {
        **probes.memory(threads),
        **probes.codecs(dtype, threads, rows=rows),
        **probes.linear(dtype),
    }
    link = Link(**probes.cuda()) if torch.cuda.is_available() else None
    return Machine(
        dtype=dtype,
        threads=threads,
        link=link,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=str(kernels.describe()["kernel"]),
        **constants,
    )


def machine(dtype: str = "BF16", *, refresh: bool = False) -> Machine:
    """Return the constants of this machine, measuring them when the cache has none.

    Args:
        dtype: `"BF16"`, `"F16"` or `"F32"`.
        refresh: Measure even when the cache knows this machine.

    Raises:
        ConfigError: The constants of this dtype are not measured.
    """
    if dtype not in probes.TORCH_TYPES:
        raise ConfigError(
            f"hardware: dtype must be one of {', '.join(probes.TORCH_TYPES)}, got {dtype!r}"
        )
    facts = fingerprint_facts()
    key = _machine_key(facts, dtype)
    cached = None if refresh else _remembered_machine(key)
    if cached is not None:
        return cached
    found = measure(dtype)
    store("machines", key, {"facts": facts, "constants": found.to_dict()})
    return found


def doubt(dtype: str, predicted_s: float, found_s: float) -> str:
    """Return what to say about the constants that a step was predicted from; empty if nothing.

    Constants that are off by more than `DOUBT` are forgotten, and the next plan measures again.
    Those of the last `DOUBT_AGE_S` are kept: then it is the load of the machine that changes.

    Args:
        dtype: The element type of the weights.
        predicted_s: A step by the plan.
        found_s: What it took.
    """
    key = _machine_key(fingerprint_facts(), dtype)
    found = _remembered_machine(key)
    ratio = found_s / predicted_s
    if found is None or abs(ratio - 1) <= DOUBT:
        return ""
    text = f"steps took {ratio:.2f}x what was predicted from constants of {found.measured}"
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(found.measured)
        recent = age.total_seconds() < DOUBT_AGE_S
    except (ValueError, TypeError):  # no time, or one without a zone
        recent = False
    if recent:
        return f"{text}, which are recent: is the machine busy?"
    forget("machines", key)
    return f"{text}: they will be measured again for the next plan"


def remembered(dtype: str, path: Path | str) -> tuple[Machine, Disk]:
    """Return what was measured of this machine and of the disk that holds `path`, at no cost.

    What was not measured yet is replaced by typical constants; `machine` and `disk` measure.

    Args:
        dtype: A safetensors code; others than those of `machine` count as `"BF16"`.
        path: A packed checkpoint.
    """
    if dtype not in probes.TORCH_TYPES:
        dtype = "BF16"
    found = _remembered_machine(_machine_key(fingerprint_facts(), dtype))
    return found or typical(dtype), _remembered_disk(_disk_key(Path(path))) or TYPICAL_DISK


def disk(path: Path | str, *, refresh: bool = False) -> Disk:
    """Return the read rate of the disk that holds `path`, measuring it when the cache has none.

    Args:
        path: A file to read; of a directory, its largest file is taken.
        refresh: Measure even when the cache knows this disk.

    Raises:
        ConfigError: There is no file to read.
    """
    target = Path(path)
    if target.is_dir():
        inside = [item for item in target.iterdir() if item.is_file()]
        if not inside:
            raise ConfigError(f"{target}: needs a file to measure the disk by, found none")
        target = max(inside, key=lambda item: item.stat().st_size)
    key = _disk_key(target)
    cached = None if refresh else _remembered_disk(key)
    if cached is not None:
        return cached
    found = Disk(**probes.disk(target))
    if target.stat().st_size >= 64 << 20:  # a small file tells little about the next one
        store("disks", key, asdict(found))
    return found


def _machine_key(facts: Facts, dtype: str) -> str:
    return f"{digest(facts)}/{dtype}"


def _remembered_machine(key: str) -> Machine | None:
    """Return a cached machine; None when there is none, or another version wrote it."""
    cached = load()["machines"].get(key)
    try:
        return None if cached is None else Machine.from_dict(cached["constants"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _remembered_disk(key: str) -> Disk | None:
    """Return a cached disk; None when there is none, or another version wrote it."""
    cached = load()["disks"].get(key)
    try:
        if cached is None:
            return None
        # Reading may cost no processor time that the clock shows.
        _check_rates({**cached, "cpu_s_per_gb": cached["cpu_s_per_gb"] or 1e-9}, Disk)
        return Disk(**cached)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _disk_key(path: Path) -> str:
    device = path.stat().st_dev
    return f"{digest({'node': platform.node()})}/{os.major(device)}:{os.minor(device)}"
