"""What is remembered of this machine, and the arithmetic it is fast in.

The cache is `$XDG_CACHE_HOME/endor/hw.json` (`~/.cache/endor/hw.json`). Its entries are keyed by a
fingerprint of the processor, its memory, the threads in use, the kernels and the GPUs: another
machine, another thread count or another build measures again.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from endor import kernels
from endor.errors import EndorError
from endor.jsontext import read_object
from endor.version import __version__

CACHE_VERSION = 4
PARTS = ("machines", "disks", "arithmetic", "products")
Facts = Mapping[str, Any]

PROBE_ROWS, PROBE_SIZE = 64, 768
"""A product of 75 Mflop: a millisecond where it is fast, and above what a call costs."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What torch's matrix product does here in two element types, in 10^9 operations a second.

    Attributes:
        bf16_gflops: bfloat16: emulated, and several times slower, on CPUs without instructions
            for it.
        float32_gflops: float32.
    """

    bf16_gflops: float
    float32_gflops: float

    @property
    def dtype(self) -> torch.dtype:
        """The faster of the two."""
        return torch.bfloat16 if self.bf16_gflops >= self.float32_gflops else torch.float32

    @property
    def gflops(self) -> float:
        """Its rate."""
        return max(self.bf16_gflops, self.float32_gflops)


def arithmetic(*, refresh: bool = False) -> Arithmetic:
    """Return what this processor's matrix products do, measuring it when that is not remembered.

    Args:
        refresh: Measure even then.
    """
    key = digest(fingerprint_facts())
    found = None if refresh else load()["arithmetic"].get(key)
    if isinstance(found, Mapping):
        bf16, float32 = found.get("bf16_gflops"), found.get("float32_gflops")
        if positive(bf16) and positive(float32):
            return Arithmetic(bf16, float32)
    measured = measure_arithmetic()
    store("arithmetic", key, asdict(measured))
    return measured


def measure_arithmetic(rows: int = PROBE_ROWS, size: int = PROBE_SIZE) -> Arithmetic:
    """Measure the two products now: some milliseconds, several times that where one is emulated.

    They take turns, so that what else runs on the machine meets both.
    """
    x, weight = torch.randn(rows, size), torch.randn(size, size)
    pairs = {kind: (x.to(kind), weight.to(kind)) for kind in (torch.bfloat16, torch.float32)}
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in pairs}
    with torch.inference_mode():
        for turn in range(4):
            for kind, (left, right) in pairs.items():
                start = time.perf_counter()
                torch.nn.functional.linear(left, right)
                if turn:  # the first prepares
                    times[kind].append(time.perf_counter() - start)
    flops = 2 * rows * size * size
    rates = {kind: flops / max(min(spent), 1e-9) / 1e9 for kind, spent in times.items()}
    return Arithmetic(rates[torch.bfloat16], rates[torch.float32])


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the type that Endor computes in on `device` where the choice is its own.

    bfloat16, unless the device only emulates it: then float32.
    """
    if device.type == "cpu":
        return arithmetic().dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float32
    return torch.bfloat16


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
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernels": str(described["kernel"]),
        "gpus": gpus,
    }


def cpu_name() -> str:
    """Return what the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def positive(value: object) -> TypeGuard[float]:
    """Whether `value` is a rate that a measurement can have given."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < math.inf


def digest(facts: Facts) -> str:
    """Return a short key for `facts`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cache_path() -> Path:
    """Return where the measurements are remembered."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "endor" / "hw.json"


def load() -> dict[str, dict[str, Any]]:
    """Return the cache's content by part; an unreadable or foreign file counts as empty."""
    try:
        content = read_object(cache_path())
    except (OSError, EndorError):
        content = {}
    if content.get("version") != CACHE_VERSION:
        content = {}
    parts = {name: content.get(name) for name in PARTS}
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def store(part: str, key: str, value: Facts) -> None:
    """Add one entry; a cache that cannot be written is no reason to fail."""
    content = load()
    content[part][key] = dict(value)
    _write(content)


def forget(part: str, key: str) -> None:
    """Remove one entry, if it is there."""
    content = load()
    if content[part].pop(key, None) is not None:
        _write(content)


def _write(content: Facts) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"version": CACHE_VERSION, **content}, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return
