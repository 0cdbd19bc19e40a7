"""Children that are forked, because importing takes longer than the work that is tried."""

import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODES = ("none", "EIO", "ENOSPC", "EINTR", "short", "kill before", "kill after")
SHIM = "TORTURE_SHIM"
REFUSED = 10
"""Exit status of a child whose work ended with an error of the documented kind."""

BROKEN = 11
"""Exit status of a child whose work ended with any other exception."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status, the signal that killed it, what it wrote to stderr."""

    status: int
    signal: int
    text: str

    @property
    def refused(self) -> bool:
        return self.status == REFUSED

    @property
    def well(self) -> bool:
        """Whether it ended in one of the ways that are promised."""
        return not self.signal and self.status in (0, REFUSED)


def preload() -> None:
    """Start this program again with the shim, unless it has it already."""
    if SHIM in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="endor-torture-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    environment = {SHIM: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


def drop_shim() -> None:
    """Remove the library's file; it stays loaded."""
    library = Path(os.environ[SHIM])
    library.unlink(missing_ok=True)
    library.parent.rmdir()


def run(
    work: Callable[[], object],
    *,
    below: Path | None = None,
    call: int = 0,
    mode: str = "none",
    address_bytes: int | None = None,
    kill_after_s: float | None = None,
    seconds: float = 120.0,
) -> Ended:
    """Fork, do `work` in the child, and return how it ended.

    Args:
        work: What to do.
        below: Directory whose calls are counted.
        call: Number of the call that suffers.
        mode: What it suffers, one of `MODES`.
        address_bytes: More address space that the child may take.
        kill_after_s: When to kill it.
        seconds: When to give up; counts as broken.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    child = os.fork()
    if child == 0:
        os.dup2(errors.fileno(), 2)
        status = BROKEN
        try:
            status = _work(work, below, call, mode, address_bytes)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    began = time.monotonic()
    ended = 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        spent = time.monotonic() - began
        if not ended and kill_after_s is not None and spent >= kill_after_s:
            os.kill(child, signal.SIGKILL)
        if not ended and spent > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(BROKEN, 0, f"not done after {seconds:.0f} s")
        if not ended:
            time.sleep(0.001)
    errors.seek(0)
    text = errors.read().decode(errors="replace")
    errors.close()
    if os.WIFSIGNALED(status):
        return Ended(-1, os.WTERMSIG(status), text)
    return Ended(os.WEXITSTATUS(status), 0, text)


def calls(work: Callable[[], object], below: Path) -> int:
    """Return how many calls below a directory `work` makes, in a child."""
    reader, writer = os.pipe()

    def counted() -> None:
        work()
        os.write(writer, str(_shim().torture_count()).encode())

    ended = run(counted, below=below)
    assert ended.status == 0, ended.text
    count = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    return count


def _shim() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.torture_count.restype = ctypes.c_long
    return library


def _work(
    work: Callable[[], object],
    below: Path | None,
    call: int,
    mode: str,
    address_bytes: int | None,
) -> int:
    from endor.errors import EndorError

    random.seed(0)
    if address_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + address_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if below is not None:
        root = os.fsencode(f"{below}/")
        _shim().torture_arm(root, ctypes.c_long(call), MODES.index(mode))
    try:
        work()
    except (EndorError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED
    return 0
