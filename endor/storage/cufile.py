"""Records read into CUDA device memory by NVIDIA's cuFile, or by kvikio; opt-in.

cuFile copies from an NVMe drive straight into the device where drive, file system, driver and card
allow it, and silently goes through host memory where they do not. So what happened is read from its
own statistics, never inferred from an import. Opening its driver hangs for ever on some kernels
(no `/proc/modules`) and may close descriptor 0 in containers; a child process tries it first.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from endor.errors import BackendError, ConfigError, IntegrityError, ReadError, TruncatedError
from endor.kernels.dispatch import check_threads
from endor.storage.buffers import HostBuffer
from endor.storage.device_backends import Backend, CuFile, Kvikio, observed_path
from endor.storage.layout import Record
from endor.storage.readers import RecordReader, open_reader
from endor.storage.source import ReadStat, Ticket
from endor.threads import thread_pool

if TYPE_CHECKING:
    import torch

DeviceReaderKind = Literal["cufile", "kvikio"]

PROBE_SECONDS = 10.0
BLOCK_BYTES = 16 << 20
_MODULES = Path("/proc/modules")
_VERSION = Path("/proc/version")


class DeviceReader:
    """Reads records into host memory like a `RecordReader`, and into device memory besides.

    Args:
        kind: For `describe`.
        backend: Reads into device memory; closed with the reader.
        host: Reads into host memory; closed with the reader.
        threads: Parts of a record in flight.
        probed: What the probe found.
    """

    reads_device = True

    def __init__(
        self,
        kind: DeviceReaderKind,
        backend: Backend,
        host: RecordReader,
        *,
        threads: int = 4,
        probed: str = "",
    ) -> None:
        self._kind = kind
        self._backend = backend
        self._host = host
        self._probed = probed
        self._threads = check_threads(threads, "reader threads")
        self._pool = thread_pool(threads, "endor-cufile")
        self._lock = threading.Lock()
        self._before = dict(backend.counts())
        self._bytes = self._records = self._reads = 0
        self._seconds = 0.0
        self._closed = False
        self._tokens: dict[Path, tuple[int, ...]] = {}

    def submit(
        self, record: Record, buffer: HostBuffer | np.ndarray, **bounds: int | None
    ) -> Ticket:
        """Start a read into host memory; see `RecordReader.submit`."""
        return self._host.submit(record, buffer, **bounds)  # type: ignore[arg-type]

    def wait(self, ticket: Ticket) -> ReadStat:
        """Wait for a read into host memory; see `RecordReader.wait`."""
        return self._host.wait(ticket)

    def read(self, record: Record, buffer: "HostBuffer | np.ndarray | torch.Tensor") -> ReadStat:
        """Read a whole record and return when it is there.

        Args:
            record: From a `FileLayout`.
            buffer: Host memory as for `RecordReader.read`, or a flat u8 tensor on a CUDA device.

        Raises:
            TruncatedError: The file ends early.
            IntegrityError: The file changed since it was first read from.
            ReadError: The read failed, or the reader is closed.
        """
        if isinstance(buffer, HostBuffer | np.ndarray):
            return self._host.read(record, buffer)
        if self._closed:
            raise ReadError(f"{record.path}: the reader is closed; open a new one")
        assert buffer.numel() >= record.nbytes
        self._check_unchanged(record)
        start = time.perf_counter()
        address = buffer.data_ptr()
        parts = [
            self._pool.submit(self._part, record, address, at)
            for at in range(0, record.nbytes, BLOCK_BYTES)
        ]
        error: BaseException | None = None
        calls = 0
        for part in parts:  # all of them, so that nothing writes into the buffer afterwards
            try:
                calls += part.result()
            except BaseException as found:
                error = error or found
        if error is not None:
            raise error
        seconds = time.perf_counter() - start
        with self._lock:
            self._bytes += record.nbytes
            self._records += 1
            self._reads += calls
            self._seconds += seconds
        return ReadStat(record.nbytes, seconds, calls - len(parts))

    def _check_unchanged(self, record: Record) -> None:
        """Raise when the file changed since it was first read from.

        Bytes that go straight to a device pass no checksum, so that any sign of a change counts:
        even one of the inode alone, which a link to the file makes, too.
        """
        stat = record.path.stat()
        found = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if self._tokens.setdefault(record.path, found) != found:
            raise IntegrityError(
                f"{record.path}: record {record.name!r}: the file was changed while it was in use; "
                "load it again"
            )

    def close(self) -> None:
        """End all reads and close all files. May be called twice."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True)
            self._host.close()
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Return what was asked for, what the probe found, what really happened, and its cost."""
        counts = {
            name: count - self._before.get(name, 0)
            for name, count in (() if self._closed else self._backend.counts().items())
        }
        return {
            "requested": self._kind,
            "probed": self._probed,
            "observed": observed_path(counts, self._reads),
            "reason": f"counted by {self._kind}" if counts else f"{self._kind} does not tell",
            "threads": self._threads,
            "block_bytes": BLOCK_BYTES,
            "records": self._records,
            "bytes": self._bytes,
            "seconds": self._seconds,
            "gbps": self._bytes / self._seconds / 1e9 if self._seconds else 0.0,
            "reads": self._reads,
            "counts": counts,
            "host": self._host.describe(),
        }

    def _part(self, record: Record, address: int, start: int) -> int:
        """Fill one part of a record; return how many calls it took."""
        stop, at, calls = min(start + BLOCK_BYTES, record.nbytes), start, 0
        while at < stop:
            count = self._backend.read(record.path, address, stop - at, record.offset + at, at)
            calls += 1
            if count == 0:
                raise TruncatedError(
                    f"{record.path}: record {record.name!r}: the file ends at offset "
                    f"{record.offset + at}, needs {record.offset + record.nbytes}; copy or convert "
                    "the file again"
                )
            at += count
        return calls


def open_device_reader(
    kind: DeviceReaderKind, sample: Path | str, *, threads: int = 4
) -> DeviceReader:
    """Return a reader into device memory, after a child process has tried it on `sample`.

    Args:
        kind: `"cufile"` or `"kvikio"`.
        sample: A file of at least 4096 bytes on the file system that will be read.
        threads: Reads in flight.

    Raises:
        ConfigError: Another kind.
        BackendError: It cannot run here; the message says why.
    """
    if kind not in ("cufile", "kvikio"):
        raise ConfigError(f"device reader must be 'cufile' or 'kvikio', got {kind!r}")
    found = probe(kind, Path(sample))
    backend: Backend = CuFile() if kind == "cufile" else Kvikio()
    return DeviceReader(kind, backend, open_reader(threads=threads), threads=threads, probed=found)


def probe(
    kind: DeviceReaderKind,
    sample: Path,
    *,
    seconds: float = PROBE_SECONDS,
    command: tuple[str, ...] | None = None,
) -> str:
    """Return the way that reads of `sample` take, tried in a child process.

    Raises:
        BackendError: The reader cannot run here, or the child did not end in time.
    """
    if not _MODULES.exists():
        raise BackendError(
            f"reader {kind!r}: {_MODULES} does not exist, where cuFile's driver waits for ever; "
            "use reader='direct'"
        )
    if "microsoft" in _VERSION.read_text().lower():
        raise BackendError(f"reader {kind!r}: not on WSL; use reader='direct'")
    argv = command or (sys.executable, "-m", "endor.storage.cufile_probe")
    try:
        child = subprocess.run(
            [*argv, kind, str(sample)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"reader {kind!r}: a first read did not end within {seconds:g} s; use reader='direct'"
        ) from None
    try:
        answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(
            f"reader {kind!r}: a first read ended with code {child.returncode}: {last}; "
            "use reader='direct'"
        ) from None
    if "error" in answer:
        raise BackendError(f"reader {kind!r}: {answer['error']}; use reader='direct'")
    return str(answer["observed"])
