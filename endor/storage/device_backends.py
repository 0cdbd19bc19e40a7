"""What reads a part of a file into CUDA device memory: NVIDIA's cuFile, or kvikio."""

import contextlib
import ctypes
import importlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from endor.errors import BackendError, ReadError

_COUNTS = ("n_p2p_reads", "n_nvfs_reads", "n_posix_reads", "n_unaligned_reads")


class Backend(Protocol):
    """What reads a part of a file into device memory. Methods may be called from any thread."""

    def read(self, path: Path, address: int, nbytes: int, offset: int, at: int) -> int:
        """Read `nbytes` from `offset` to `address + at`; return how many came."""

    def counts(self) -> Mapping[str, int]:
        """Return reads per way that was taken, since the backend was opened; may be empty."""

    def close(self) -> None:
        """Let go of files and driver."""


class CuFile:
    """cuFile through `cuda.bindings.cufile`.

    Args:
        api: The module, replaceable for tests.

    Raises:
        BackendError: It does not import or its driver does not open.
    """

    def __init__(self, api: Any = None) -> None:
        if api is None:
            try:
                api = importlib.import_module("cuda.bindings.cufile")
            except ImportError as error:
                raise BackendError(
                    f"reader 'cufile' needs cuda-bindings and cuFile ({error}): "
                    "pip install 'endor-sparse[gds]'"
                ) from None
        self._api = api
        self._lock = threading.Lock()
        self._handles: dict[Path, tuple[int, int]] = {}
        try:
            api.driver_open()
        except Exception as error:
            raise BackendError(f"reader 'cufile': its driver does not open: {error}") from None
        self._counting = False
        with contextlib.suppress(Exception):  # statistics only
            api.set_stats_level(3)
            api.stats_start()
            self._counting = True

    def read(self, path: Path, address: int, nbytes: int, offset: int, at: int) -> int:
        count = self._api.read(self._handle(path), address, nbytes, offset, at)
        if count is None:
            raise BackendError(
                "reader 'cufile': this cuda-bindings does not say how much it read; "
                "pip install 'cuda-bindings>=13.2'"
            )
        if count < 0:
            reason = os.strerror(ctypes.get_errno()) if count == -1 else f"cuFile error {-count}"
            raise ReadError(f"{path}: cuFile failed at offset {offset}: {reason}")
        return int(count)

    def counts(self) -> Mapping[str, int]:
        if not self._counting:
            return {}
        stats = self._api.StatsLevel3()
        self._api.get_stats_l3(stats.ptr)
        per_gpu = stats.per_gpu_stats
        cards = range(int(np.ravel(stats.num_gpus)[0]))
        return {
            name: sum(int(np.ravel(getattr(per_gpu[card], name))[0]) for card in cards)
            for name in _COUNTS
        }

    def close(self) -> None:
        with self._lock:
            for handle, fd in self._handles.values():
                self._api.handle_deregister(handle)
                os.close(fd)
            self._handles.clear()
        self._api.driver_close()

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
                try:
                    descriptor = self._api.Descr()
                    descriptor.type = self._api.FileHandleType.OPAQUE_FD
                    descriptor.handle.fd = fd
                    descriptor.fs_ops = 0
                    handle = int(self._api.handle_register(descriptor.ptr))
                except BaseException as error:
                    os.close(fd)
                    raise BackendError(f"{path}: cuFile does not take the file: {error}") from error
                self._handles[path] = (handle, fd)
            return self._handles[path][0]


class Kvikio:
    """kvikio, which has a pool of threads of its own."""

    def __init__(self, api: Any = None) -> None:
        if api is None:
            try:
                api = importlib.import_module("kvikio")
            except ImportError as error:
                raise BackendError(
                    f"reader 'kvikio' needs kvikio ({error}): pip install 'endor-sparse[kvikio]'"
                ) from None
        self._api = api
        self._lock = threading.Lock()
        self._files: dict[Path, Any] = {}

    def read(self, path: Path, address: int, nbytes: int, offset: int, at: int) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._api.CuFile(path, "r")
        target = _Pointer(address + at, nbytes)
        return int(self._files[path].pread(target, size=nbytes, file_offset=offset).get())

    def counts(self) -> Mapping[str, int]:
        return {}  # it does not tell

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class _Pointer:
    """Device memory as kvikio wants to be shown it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def observed_path(counts: Mapping[str, int], reads: int) -> str:
    """Return the way that reads took: `gds-p2pdma`, `gds-nvfs`, `cufile-compat`, `mixed`, ..."""
    if not reads:
        return "none"
    names = {
        "gds-p2pdma": counts.get("n_p2p_reads", 0),
        "gds-nvfs": counts.get("n_nvfs_reads", 0),
        "cufile-compat": counts.get("n_posix_reads", 0),
    }
    found = [name for name, count in names.items() if count]
    return "mixed" if len(found) > 1 else (found or ["unknown"])[0]
