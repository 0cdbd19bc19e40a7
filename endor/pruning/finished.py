"""The finished layers of a calibrated run, in a folder from which an interrupted one goes on."""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from endor.pruning.contract import PruneOptions

_NO_MATTER = frozenset(
    [
        "device",
        "memory_bytes",
        "scratch",
        "calibration",
        "chat_template",
        "samples",
        "trust_remote_code",
    ]
)
"""Options that do not decide the result; which windows there are is hashed by their tokens."""


def fingerprint(
    options: PruneOptions,
    source: str,
    ids: torch.Tensor,
    names: Iterable[str],
    quantizer: str = "",
) -> str:
    """Return a hash of everything that decides the result of a run.

    Args:
        options: Of the run.
        source: Fingerprint of the dense checkpoint.
        ids: Tokens of the calibration windows.
        names: Tensors that are renewed.
        quantizer: Identity of what turns them into codes; empty for nothing.
    """
    fields = {key: value for key, value in asdict(options).items() if key not in _NO_MATTER}
    digest = hashlib.sha256(repr(sorted(fields.items())).encode())
    digest.update(source.encode())
    digest.update(ids.numpy().tobytes())
    digest.update("\0".join(sorted(names)).encode())
    digest.update(quantizer.encode())
    return digest.hexdigest()


class FinishedLayers:
    """A file a layer, each marked with the run that made it.

    Args:
        folder: An existing folder; others may write to it.
        run: Fingerprint of the run; a layer of another one is as good as none.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._run = run

    def _path(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"

    def write(
        self, index: int, tensors: dict[str, torch.Tensor], errors: Mapping[str, float]
    ) -> None:
        """Keep a layer, and the output error of each of its matrices."""
        from safetensors.torch import save_file

        said = {"run": self._run, "errors": json.dumps(dict(errors))}
        # A new name: a folder that others may write to could hold a link of any expected one.
        handle, partial = tempfile.mkstemp(dir=self._folder)
        os.close(handle)
        save_file(tensors, partial, metadata=said)
        Path(partial).replace(self._path(index))

    def load(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """Return tensors and errors of a layer that was kept by the same run; None of another."""
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("run") != self._run:
                    return None
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return kept, json.loads(said.get("errors", "{}"))
        except SafetensorError:
            return None

    def read(self, index: int, name: str) -> torch.Tensor:
        """Return one tensor of a layer that this run has kept."""
        from safetensors import safe_open

        with safe_open(self._path(index), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor
