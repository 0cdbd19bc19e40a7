"""Which kernel runs and on how many threads."""

import functools
import os
import platform
import sys
import warnings
from pathlib import Path

from endor.errors import BackendError, ConfigError, SlowWarning
from endor.kernels import native

CHOICES = ("auto", "avx512", "avx2", "neon", "scalar", "numpy")

MAX_THREADS = 64

NUMPY_SLOWDOWN = "100 to 250 times slower"
"""Than `avx2`: packing, expanding, products of a 1024 x 2048 bf16 weight (docs/kernels.md)."""

SCALAR_SLOWDOWN = "6 to 50 times slower than avx2"
"""Of the same."""


def select(kernel: str | None = None) -> int | None:
    """Return the number of the kernel to run, None for the numpy reference.

    Args:
        kernel: One of `CHOICES`; None takes the environment's `ENDOR_KERNEL`, or `"auto"`.

    Raises:
        ConfigError: No such kernel.
        BackendError: It cannot run here.
    """
    name = kernel or os.environ.get("ENDOR_KERNEL") or "auto"
    if name not in CHOICES:
        raise ConfigError(f"ENDOR_KERNEL must be one of {', '.join(CHOICES)}; got {name!r}")
    if name == "numpy":
        return None
    runnable = native.available()
    if name == "auto":
        if not runnable:
            _warn_once(native.load()[1])
            return None
        return native.KERNELS.index(runnable[-1])
    if name not in runnable:
        loaded, why = native.load()
        if loaded is not None:
            why = f"this CPU or build offers {', '.join(runnable)}"
        raise BackendError(f"kernel {name!r} cannot run here: {why}; use ENDOR_KERNEL=auto")
    return native.KERNELS.index(name)


@functools.cache
def _warn_once(why: str) -> None:
    """Say, at the first use, that numpy does the work of the compiled kernels."""
    message = (
        f"the compiled CPU kernels are not in use: {why}. numpy does their work, {NUMPY_SLOWDOWN}; "
        "ENDOR_KERNEL=numpy asks for it without this warning"
    )
    if sys.version_info >= (3, 12):  # show the caller's line, not ours
        package = str(Path(__file__).parent.parent)
        warnings.warn(message, SlowWarning, skip_file_prefixes=(package,))
    else:
        warnings.warn(message, SlowWarning, stacklevel=4)


def thread_count(threads: int | None = None) -> int:
    """Return `threads`, else `ENDOR_THREADS`, else the CPUs this process may use.

    Raises:
        ConfigError: The number is not a positive integer.
    """
    if threads is None:
        text = os.environ.get("ENDOR_THREADS")
        if not text:
            affinity = getattr(os, "sched_getaffinity", None)
            cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
            return min(cpus, MAX_THREADS)
        if not text.isdecimal():
            raise ConfigError(f"ENDOR_THREADS must be a positive integer, got {text!r}")
        threads = int(text)
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return min(threads, MAX_THREADS)


def describe() -> dict[str, object]:
    """Return what runs here: whether the kernels are compiled, which is selected, and why.

    `slow` says what the selected kernel costs, None where it is one for this CPU. Never warns.
    """
    loaded, where = native.load()
    requested = os.environ.get("ENDOR_KERNEL") or "auto"
    number = select("numpy" if requested == "auto" and not native.available() else None)
    selected = "numpy" if number is None else native.KERNELS[number]
    features = loaded.endor_cpu_features().decode().split() if loaded is not None else []
    if requested != "auto":
        reason = f"ENDOR_KERNEL={requested}"
    elif loaded is None:
        reason = where
    elif selected == "scalar":
        lacking = [name for name in ("avx2", "bmi2", "fma") if name not in features]
        reason = "no faster one is for this CPU: " + (
            f"it lacks {', '.join(lacking) or 'F16C'}"
            if platform.machine() in ("x86_64", "AMD64")
            else f"{platform.machine()}"
        )
    else:
        reason = "the best this CPU runs"
    return {
        "compiled": loaded is not None,
        "library": where if loaded is not None else None,
        "kernel": selected,
        "reason": reason,
        "slow": {"numpy": NUMPY_SLOWDOWN, "scalar": SCALAR_SLOWDOWN}.get(selected),
        "available": [*reversed(native.available()), "numpy"],
        "cpu_features": features,
        "bf16_products": bool(number is not None and native.library().endor_has_bf16_pairs(number)),
        "threads": thread_count(),
    }
