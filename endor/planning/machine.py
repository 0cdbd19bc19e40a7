"""What this machine can do, measured once and remembered.

Where, and until what changes, is said in `endor.machine`. Disks are keyed by device, since a model
and the home directory rarely share one.
"""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from endor import kernels
from endor.errors import ConfigError
from endor.machine import Facts, digest, fingerprint_facts, forget, load, store
from endor.planning import probes
from endor.planning.constants import TYPICAL_DISK, Disk, Link, Machine, check_rates, typical
from endor.planning.others import DISTURBED, Others

__all__ = [
    "TYPICAL_DISK",
    "Disk",
    "Machine",
    "disk",
    "disturbance",
    "doubt",
    "known_disk",
    "machine",
    "measure",
    "remembered",
    "typical",
]

DOUBT = 0.25
"""A step further from its prediction than this share of it puts the constants in doubt."""
DOUBT_AGE_S = 600.0


def measure(dtype: str = "BF16") -> Machine:
    """Measure this machine now, with torch's thread count. Takes about ten seconds."""
    threads = torch.get_num_threads()
    # Without the native kernels a decode is a hundred times slower: a small sample will do.
    rows = probes.ROWS if kernels.describe()["compiled"] else 256
    constants: dict[str, Any] = {}
    disturbed = 0.0
    groups: tuple[Callable[[], Mapping[str, Any]], ...] = (
        lambda: probes.memory(threads),
        lambda: probes.codecs(dtype, threads, rows=rows),
        lambda: probes.linear(dtype),
    )
    for probe in groups:  # one that was disturbed is enough to mislead
        others = Others(threads)
        constants |= probe()
        disturbed = max(disturbed, others.share())
    link = Link(**probes.cuda()) if torch.cuda.is_available() else None
    return Machine(
        dtype=dtype,
        threads=threads,
        link=link,
        disturbed=round(disturbed, 3),
        measured=_now(),
        kernel=str(kernels.describe()["kernel"]),
        **constants,
    )


def machine(dtype: str = "BF16", *, refresh: bool = False) -> Machine:
    """Return the constants of this machine, measuring them when the cache has none.

    Constants that were measured while others used the processor are good for `DOUBT_AGE_S`; then
    they are measured again, and the less disturbed ones stay.

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
    if cached is not None and (cached.disturbed <= DISTURBED or _recent(cached)):
        return cached
    found = measure(dtype)
    if cached is not None and cached.disturbed < found.disturbed:
        found = replace(cached, measured=found.measured)
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
    if _recent(found):
        return f"{text}, which are recent: is the machine busy?"
    forget("machines", key)
    return f"{text}: they will be measured again for the next plan"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _recent(found: Machine | Disk) -> bool:
    """Whether constants were measured within the last `DOUBT_AGE_S`."""
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(found.measured)
    except (ValueError, TypeError):  # no time, or one without a zone
        return False
    return age.total_seconds() < DOUBT_AGE_S


def disturbance(found: Machine, disk: Disk | None = None) -> str:
    """Return what to say of constants that others disturbed, a line each; empty if nothing."""
    lines = []
    if found.disturbed > DISTURBED:
        lines.append(f"{found.disturbed:.0%} of the processor while the constants")
    if disk is not None and disk.disturbed > DISTURBED:
        lines.append(f"{disk.disturbed:.0%} of processor or disk while the rates of the disk")
    return "\n".join(
        f"other processes had {what} were measured, which may mislead: they are measured again "
        "when ten minutes old"
        for what in lines
    )


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
    return found or typical(dtype), known_disk(path)


def known_disk(path: Path | str) -> Disk:
    """Return what was measured of the disk that holds `path`, or a typical one; at no cost."""
    return _remembered_disk(_disk_key(Path(path))) or TYPICAL_DISK


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
    if cached is not None and (cached.disturbed <= DISTURBED or _recent(cached)):
        return cached
    found = Disk(**probes.disk(target), measured=_now())
    if cached is not None and cached.disturbed < found.disturbed:
        found = replace(cached, measured=found.measured)
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
        if cached is None or "scattered_gbps" not in cached:  # one that was measured otherwise
            return None
        # Reading may cost no processor time that the clock shows.
        check_rates({**cached, "cpu_s_per_gb": cached["cpu_s_per_gb"] or 1e-9}, Disk)
        return Disk(**cached)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _disk_key(path: Path) -> str:
    device = path.stat().st_dev
    return f"{digest({'node': platform.node()})}/{os.major(device)}:{os.minor(device)}"
