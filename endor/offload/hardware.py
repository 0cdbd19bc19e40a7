"""What this machine can do, measured once and remembered.

The cache is `$XDG_CACHE_HOME/endor/hw.json` (`~/.cache/endor/hw.json`), keyed by a fingerprint of
the processor, its memory, the threads in use, the kernels and the GPUs: another machine, another
thread count or another build measures again. Disks are keyed by device, since a model and the home
directory rarely share one.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from endor import __version__, kernels
from endor.errors import ConfigError, EndorError
from endor.jsontext import read_object
from endor.offload import probes

CACHE_VERSION = 3
Facts = Mapping[str, Any]


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

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Facts) -> "Machine":
        """Return the machine that `to_dict` wrote; `KeyError` or `TypeError` when it is not one."""
        link = values["link"]
        rest = {field.name: values[field.name] for field in fields(cls) if field.name != "link"}
        return cls(**rest, link=None if link is None else Link(**link))


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
    kinds = ("raw+bitmap", "exp+bitmap", "exp", "int")
    return Machine(
        dtype=dtype,
        threads=torch.get_num_threads(),
        copy_gbps=10.0,
        read_gbps=20.0,
        expand_gbps=dict.fromkeys(kinds, 10.0),
        product_gbps=dict.fromkeys(kinds, 15.0),
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
    return Machine(dtype=dtype, threads=threads, link=link, **constants)


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
    _store("machines", key, {"facts": facts, "constants": found.to_dict()})
    return found


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
        _store("disks", key, asdict(found))
    return found


def fingerprint_facts() -> dict[str, Any]:
    """Return what, when it changes, makes old measurements worthless."""
    described = kernels.describe()
    gpus = [
        torch.cuda.get_device_properties(index).name
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "endor": __version__,
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernels": str(described["kernel"]),
        "gpus": gpus,
    }


def cache_path() -> Path:
    """Return where the measurements are remembered."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "endor" / "hw.json"


def _machine_key(facts: Facts, dtype: str) -> str:
    return f"{_digest(facts)}/{dtype}"


def _remembered_machine(key: str) -> Machine | None:
    """Return a cached machine; None when there is none, or another version wrote it."""
    cached = _load()["machines"].get(key)
    try:
        return None if cached is None else Machine.from_dict(cached["constants"])
    except (KeyError, TypeError):
        return None


def _remembered_disk(key: str) -> Disk | None:
    """Return a cached disk; None when there is none, or another version wrote it."""
    cached = _load()["disks"].get(key)
    try:
        return None if cached is None else Disk(**cached)
    except TypeError:
        return None


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _disk_key(path: Path) -> str:
    device = path.stat().st_dev
    return f"{_digest({'node': platform.node()})}/{os.major(device)}:{os.minor(device)}"


def _load() -> dict[str, dict[str, Any]]:
    """Return the cache's content; an unreadable or foreign file counts as empty."""
    empty: dict[str, dict[str, Any]] = {"machines": {}, "disks": {}}
    try:
        content = read_object(cache_path())
    except (OSError, EndorError):
        return empty
    if content.get("version") != CACHE_VERSION:
        return empty
    parts = {name: content.get(name) for name in empty}
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def _store(part: str, key: str, value: Facts) -> None:
    """Add one entry; a cache that cannot be written is no reason to fail."""
    content = _load()
    content[part][key] = dict(value)
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"version": CACHE_VERSION, **content}, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return
