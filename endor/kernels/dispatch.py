"""Which kernel runs and on how many threads."""

import os

from endor.errors import BackendError, ConfigError
from endor.kernels import native

CHOICES = ("auto", "avx512", "avx2", "neon", "scalar", "numpy")

MAX_THREADS = 64


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
        return native.KERNELS.index(runnable[-1]) if runnable else None
    if name not in runnable:
        loaded, why = native.load()
        if loaded is not None:
            why = f"this CPU or build offers {', '.join(runnable)}"
        raise BackendError(f"kernel {name!r} cannot run here: {why}; use ENDOR_KERNEL=auto")
    return native.KERNELS.index(name)


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
    """Return what runs here: whether the kernels are compiled, which is selected, and why."""
    loaded, where = native.load()
    number = select()
    selected = "numpy" if number is None else native.KERNELS[number]
    requested = os.environ.get("ENDOR_KERNEL") or "auto"
    if requested != "auto":
        reason = f"ENDOR_KERNEL={requested}"
    elif loaded is None:
        reason = where
    else:
        reason = "the best this CPU runs"
    features = loaded.endor_cpu_features().decode() if loaded is not None else ""
    return {
        "compiled": loaded is not None,
        "library": where if loaded is not None else None,
        "kernel": selected,
        "reason": reason,
        "available": [*reversed(native.available()), "numpy"],
        "cpu_features": features.split(),
        "bf16_products": bool(number is not None and native.library().endor_has_bf16_pairs(number)),
        "threads": thread_count(),
    }
