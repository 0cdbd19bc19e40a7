"""Whether the GPU kernels can run on a device, and why not."""

import functools
import os
from typing import Any

import torch

from endor.errors import BackendError
from endor.kernels import gpu_build


def refusal(device: torch.device | str = "cuda") -> str | None:
    """Return why the kernels cannot run on `device`, with the next step; None when they can."""
    target = torch.device(device)
    if target.type != "cuda":
        return f"the kernels run on CUDA devices, not on {target}"
    if _forked_after_start:
        return (
            "this process was forked after CUDA had started, and CUDA does not live through that: "
            "start it with multiprocessing's 'spawn', or fork before the first use of the GPU"
        )
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"torch {torch.__version__} ({built}) sees no CUDA device; check the driver"
    index, count = index_of(target), torch.cuda.device_count()
    if index >= count:
        seen = ", ".join(f"cuda:{at}" for at in range(count))
        return (
            f"there is no cuda:{index}: torch sees {count} CUDA device{'s' if count > 1 else ''} "
            f"({seen}); CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
        )
    return _refusal(index)


def require(device: torch.device | str) -> None:
    """Raise `BackendError` unless the kernels can run on `device`."""
    found = refusal(device)
    if found:
        raise BackendError(found)


def describe() -> dict[str, Any]:
    """Return what the kernels run on, or why they do not, for `endor info`."""
    found = refusal()
    if found:
        return {"available": False, "reason": found}
    cupy = cupy_module()
    properties = torch.cuda.get_device_properties(0)
    return {
        "available": True,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "cupy": cupy.__version__,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion()),
        "oldest_capability": ".".join(str(part) for part in gpu_build.OLDEST_CAPABILITY),
    }


_forked_after_start = False


def _note_fork() -> None:
    global _forked_after_start
    _forked_after_start = _forked_after_start or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _refusal(index: int) -> str | None:
    extra = "cuda12" if (torch.version.cuda or "").startswith("12") else "cuda13"
    try:
        cupy = cupy_module()
    except ImportError as error:
        return f"the kernels need CuPy ({error}): pip install 'endor-sparse[{extra}]'"
    try:
        driver = int(cupy.cuda.runtime.driverGetVersion())
        runtime = int(cupy.cuda.runtime.runtimeGetVersion())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy cannot reach the driver ({error}); check that it fits the CUDA of CuPy"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver speaks CUDA {driver // 1000}.{driver % 1000 // 10}, too old for CuPy's "
            f"CUDA {runtime // 1000}: update it or pip install 'endor-sparse[cuda{driver // 1000}]'"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < gpu_build.OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}; the kernels need 7.5 (Turing) or newer"
        )
    return None


def cupy_module() -> Any:
    """Return CuPy, imported now."""
    import cupy

    return cupy


def index_of(device: torch.device) -> int:
    """Return the number of a CUDA device; that of the current one where none is given."""
    return torch.cuda.current_device() if device.index is None else device.index


def checked_device(device: torch.device | str) -> torch.device:
    """Return `device` with its number; `BackendError` when the kernels do not run there."""
    require(device)
    return torch.device("cuda", index_of(torch.device(device)))
