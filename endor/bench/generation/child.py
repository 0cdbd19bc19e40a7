"""One system generating once, in a process of its own: load, prompt, decode, one line of JSON.

    python -m endor.bench.generation.child < job.json

The parent starts one child per system and round, so that no system inherits another's memory, page
cache, threads or allocator. Only standard output's last line is read.
"""

import ctypes
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from endor.bench.cpu.io import drop_cache, resident_share
from endor.errors import ConfigError

Job = Mapping[str, Any]

SPLIT_DIR = "airllm-split"


@dataclass(slots=True)
class Clock:
    """A stopping criterion that never stops: it times the steps of a generation.

    Between two steps, outside the time, it drops the files from the page cache when the run is to
    be cold.

    Attributes:
        files: What the system reads.
        cold: Whether to drop them before each step.
        steps: Seconds per step; the first is the prompt.
        shares: Part of the files in the page cache when each step began.
    """

    files: Sequence[Path]
    cold: bool
    steps: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    started: float = 0.0

    def start(self) -> None:
        """Begin the first step."""
        if self.cold:
            for path in self.files:
                drop_cache(path)
        self.shares.append(_share(self.files))
        self.started = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.steps.append(time.perf_counter() - self.started)
        self.start()
        return input_ids.new_zeros(input_ids.shape[0]).bool()


class Anonymous:
    """Samples the process's anonymous memory, whose peak the kernel does not keep."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self.peak


def status_bytes(name: str) -> int:
    """Return one of /proc/self/status's sizes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def run(job: Job) -> dict[str, Any]:
    """Do one job and return its measurements.

    Args:
        job: `system`, `path`, `files`, `prompt` (token ids), `tokens`, `threads`, `cold`,
            `ram_bytes`, and what the system needs besides: see the loaders below.
    """
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    files = [Path(name) for name in job["files"]]
    if job["system"] == "raw":
        return _raw(job, files)
    for path in files:
        drop_cache(path) if job["cold"] else _warm(path)
    anonymous = Anonymous()
    started = time.perf_counter()
    model, finish = LOADERS[job["system"]](job)
    load_s = time.perf_counter() - started
    if job["system"] == "airllm":
        files = sorted(Path(job["work"], SPLIT_DIR).rglob("*.safetensors"))
    clock = Clock(files, job["cold"])
    ids = torch.tensor([job["prompt"]] * job["batch"])
    read = _read_bytes()
    with torch.inference_mode():
        clock.start()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["tokens"],
            min_new_tokens=job["tokens"],
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    digest = hashlib.sha256()
    for logits in out.logits:
        digest.update(logits.float().cpu().numpy().tobytes())
    result = {
        "load_s": load_s,
        "steps_s": clock.steps,
        "cached_share": clock.shares[:-1],
        "tokens": out.sequences[:, ids.shape[1] :].tolist(),
        "logits": digest.hexdigest()[:16],
        "device_read_bytes": _read_bytes() - read,
        "anonymous_peak_bytes": anonymous.stop(),
    }
    return result | finish()


def _trusts(job: Job) -> bool:
    """Whether the checkpoint's own code may run; told to transformers either way: it would ask."""
    return bool(job.get("trust_remote_code"))


def _endor(job: Job) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Load a packed checkpoint with the placement `tiers` and `staging_bytes`."""
    import endor
    from endor.bench.timeline_page import write_report
    from endor.planning import Placement

    model = endor.load_model(
        job["path"],
        exact=job["exact"],
        placement=Placement(job["tiers"], job["staging_bytes"]),
        verify=job["verify"],
        trust_remote_code=_trusts(job),
    )
    model.endor.preload()
    model.endor.ledger.clear()
    begun = time.perf_counter()

    def finish() -> dict[str, Any]:
        if job.get("report"):
            write_report(
                Path(job["report"]),
                model.endor,
                seconds=(begun, time.perf_counter()),
                predicted=job.get("predicted"),
                title=f"{job['name']}: {Path(job['path']).name}",
            )
        return {"counters": model.endor.report()["counters"]}

    return model, finish


def _dense(job: Job) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Load the dense checkpoint into memory."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["path"], dtype="auto", trust_remote_code=_trusts(job)
    )
    # Weights may be views of mapped files: a resident model has its weights in its own memory.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model, dict


def _accelerate_cpu(job: Job) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Hold the dense checkpoint in memory, behind accelerate's offload hooks."""
    import accelerate
    import torch

    model, finish = _dense(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerate.cpu_offload(model, execution_device=device)
    return model, finish


def _accelerate_disk(job: Job) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Load with a device map: what fits `ram_bytes` in memory, the rest on disk."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["path"],
        dtype="auto",
        device_map=job["device_map"],
        offload_folder=str(Path(job["work"], "accelerate-offload")),
        trust_remote_code=_trusts(job),
    )
    # Without a disk entry transformers attaches no map.
    tiers = [str(device) for device in getattr(model, "hf_device_map", {}).values()]
    note = f"{tiers.count('disk')} of {len(tiers)} modules on disk"
    return model, lambda: {"note": note}


def _airllm(job: Job) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Load with AirLLM, which splits the checkpoint into one file a layer first."""
    airllm = import_module("airllm")
    model = airllm.AutoModel.from_pretrained(
        job["path"],
        device="cpu",
        layer_shards_saving_path=str(Path(job["work"], SPLIT_DIR)),
        prefetching=True,
    )
    return model, lambda: {"note": f"airllm {_version('airllm')}"}


LOADERS: dict[str, Callable[[Job], tuple[Any, Callable[[], dict[str, Any]]]]] = {
    "endor": _endor,
    "dense": _dense,
    "accelerate-cpu": _accelerate_cpu,
    "accelerate-disk": _accelerate_disk,
    "airllm": _airllm,
}


def _raw(job: Job, files: Sequence[Path]) -> dict[str, Any]:
    """Read `nbytes` of the files as often as the others take steps, past the page cache."""
    from endor.planning.probes import read_files

    clock = Clock(files, job["cold"])
    clock.start()
    for _ in range(job["tokens"]):
        read_files(files, job["nbytes"])
        clock.steps.append(time.perf_counter() - clock.started)
        clock.start()
    return {"load_s": 0.0, "steps_s": clock.steps, "cached_share": clock.shares[:-1]}


def _share(files: Sequence[Path]) -> float:
    """Return the part of the files' bytes that is in the page cache."""
    sizes = [path.stat().st_size for path in files]
    cached = sum(
        size * resident_share(path) for path, size in zip(files, sizes, strict=True) if size
    )
    return cached / max(1, sum(sizes))


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        block = bytearray(16 << 20)
        while file.readinto(block):
            pass


def _read_bytes() -> int:
    """Return the bytes that the process made the disk deliver; 0 where that is not counted."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def answer(job: Job) -> dict[str, Any]:
    """Return a job's measurements, or its failure under `error`."""
    try:
        if job["system"] not in (*LOADERS, "raw"):
            raise ConfigError(f"unknown system {job['system']!r}")
        return run(job)
    except Exception as error:  # whatever a peer raises, the comparison goes on without it
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Read a job from standard input, write its answer to standard output."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: die with the parent
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    out.write(json.dumps(answer(job)) + "\n")
    out.flush()
    os._exit(0)  # a peer's threads must not keep the child alive


if __name__ == "__main__":
    main()
