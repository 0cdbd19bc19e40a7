"""Run as a child: reads a first block into device memory, compares it, and prints how it came.

`python -m endor.storage.cufile_probe cufile FILE` prints one line of JSON.
"""

import json
import sys
from pathlib import Path

from endor.errors import EndorError
from endor.storage.device_backends import Backend, CuFile, Kvikio, observed_path

_BYTES = 1 << 20


def try_read(kind: str, path: Path) -> str:
    """Return the way that the first block of `path` took into device memory.

    Raises:
        EndorError: It did not come.
        RuntimeError: Something else than the file's bytes came, or there is no device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    with path.open("rb") as file:
        expected = file.read(_BYTES)
    buffer = torch.zeros(_BYTES, dtype=torch.uint8, device="cuda")
    backend: Backend = CuFile() if kind == "cufile" else Kvikio()
    before = dict(backend.counts())
    wanted = len(expected) // 4096 * 4096
    count = backend.read(path, buffer.data_ptr(), wanted, 0, 0)
    if bytes(buffer[:count].cpu().numpy()) != expected[:count] or not count:
        raise RuntimeError(f"{path}: other bytes came than the file holds")
    counts = {name: found - before.get(name, 0) for name, found in backend.counts().items()}
    return observed_path(counts, 1)


def main() -> None:
    """Print `{"observed": ...}` or `{"error": ...}`."""
    kind, path = sys.argv[1:]
    try:
        answer = {"observed": try_read(kind, Path(path))}
    except (EndorError, RuntimeError, OSError) as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
