"""What a measurement leaves behind: a line of JSON that names all the figure depends on."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import endor
from endor import kernels
from endor.errors import FormatError
from endor.jsontext import parse_object

PACKAGES = (
    "numpy",
    "torch",
    "safetensors",
    "transformers",
    "compressed-tensors",
    "zipnn",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


BELIEVED_RATIO = 1.1
"""A rate further above its ceiling shows that the machine was busy while the ceiling was timed."""

BOUND_BENCHES = ("decode", "pack")
"""Those whose ceiling moves as many bytes as the subject, through memory: nothing is faster."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a measurement was made.

    Attributes:
        git_rev: Commit of the running source tree, `+dirty` with changes; empty outside one.
        device: Name of the processor that did the work.
        driver: GPU driver, or the operating system's kernel for a CPU.
        cores: Cores this process may use.
        kernel: Which CPU kernel ran and why, from `endor.kernels.describe()`.
        versions: Version per installed package of `PACKAGES`, and of Endor and Python.
    """

    git_rev: str
    device: str
    driver: str
    cores: int
    kernel: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class BenchRecord:
    """One subject of one benchmark.

    Attributes:
        bench: `"decode"`, `"pack"`, `"matvec"`, `"io"`, ...
        subject: What was measured, such as `"endor raw"` or `"torch F.linear"`.
        shape, dtype, density: The weight; `shape` is the file's size in bytes for `io`.
        threads: CPU threads the subject may use.
        unit: Unit of the percentiles.
        p20, p50, p80: Percentiles over `repeats` runs.
        traffic_bytes: Bytes that the task must read and write, whatever the subject really moves.
        dense_bytes: Bytes of the dense weight; 0 where that means nothing.
        packed_bytes: Bytes of the subject's packed form; 0 where that means nothing.
        ceiling: What `ceiling_gbps` is, measured in the same run.
        ceiling_gbps: That bandwidth, 10^9 bytes/s.
        peer: Whether the subject is somebody else's code.
        note: A condition that the reader must know.
        environment: Where it was measured.
    """

    bench: str
    subject: str
    shape: tuple[int, ...]
    dtype: str
    density: float
    threads: int
    p20: float
    p50: float
    p80: float
    repeats: int
    traffic_bytes: int
    environment: Environment
    dense_bytes: int = 0
    packed_bytes: int = 0
    ceiling: str = ""
    ceiling_gbps: float = 0.0
    peer: bool = False
    note: str = ""
    unit: str = field(default="s")

    @property
    def gbps(self) -> float:
        """Traffic at the median time, 10^9 bytes/s."""
        return self.traffic_bytes / self.p50 / 1e9

    @property
    def dense_gbps(self) -> float:
        """Dense bytes at the median time, 10^9 bytes/s."""
        return self.dense_bytes / self.p50 / 1e9

    @property
    def ceiling_ratio(self) -> float:
        """Share of the ceiling that was reached; 0 without a ceiling."""
        return self.gbps / self.ceiling_gbps if self.ceiling_gbps else 0.0

    @property
    def believable(self) -> bool:
        """Whether the rate is not above what the ceiling, measured beside it, allows."""
        bound = self.bench in BOUND_BENCHES
        return not bound or self.ceiling_ratio <= BELIEVED_RATIO

    def to_dict(self) -> dict[str, Any]:
        """Return every field and the derived rates, ready for JSON."""
        derived = {
            "gbps": self.gbps,
            "dense_gbps": self.dense_gbps,
            "ceiling_ratio": self.ceiling_ratio,
            "believable": self.believable,
        }
        return asdict(self) | derived


def write_json_lines(records: Iterable[BenchRecord], path: Path) -> None:
    """Append one JSON object per record to `path`."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_dict()) + "\n")


def read_json_lines(path: Path) -> Iterator[BenchRecord]:
    """Yield the records that `write_json_lines` wrote.

    Raises:
        FormatError: A line is not such a record.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = parse_object(line, f"{path}:{number}:", lenient=True)
                for derived in ("gbps", "dense_gbps", "ceiling_ratio"):
                    del fields[derived]
                fields.pop("believable", None)  # records of version 0.1 lack it
                fields["shape"] = tuple(fields["shape"])
                fields["environment"] = Environment(**fields["environment"])
                record = BenchRecord(**fields)
            except (FormatError, ValueError, TypeError, KeyError) as error:
                raise FormatError(
                    f"{path}:{number}: not a benchmark record of this version: {error}"
                ) from error
            yield record


@cache
def environment(device: str | None = None) -> Environment:
    """Describe this machine; `device` names an accelerator when that did the work."""
    found = {"endor": endor.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    kernel = kernels.describe()
    return Environment(
        git_rev=_git_rev(),
        device=device or _cpu_name(),
        driver=f"{platform.system()} {platform.release()}",
        cores=len(os.sched_getaffinity(0)),
        kernel={key: str(kernel[key]) for key in ("kernel", "reason", "bf16_products")},
        versions=found,
    )


def last_level_cache_bytes() -> int:
    """Return the size of the largest CPU cache; 32 MiB where the system does not say."""
    sizes = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes) or 32 << 20


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_rev() -> str:
    root = Path(endor.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(
            [*command, "--dirty=+dirty"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
