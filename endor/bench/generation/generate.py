"""Generation compared: Endor against other ways to run a model that does not fit.

Every system runs in child processes of its own, with the same prompt, threads and memory budget, in
rounds that alternate between the systems; the machine's drift then hits all alike. Systems that
promise the dense model's bits must produce the same logits, bit for bit, or the record says so.

Cold means that before every step the files are dropped from the page cache, outside the time, and
the kernel is asked what is left of them. That stands for a model much larger than memory, whose
pages are always evicted before they are needed again.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import endor
from endor.bench.generation.case import GenerateCase, GenerateRecord
from endor.bench.records import environment
from endor.errors import BackendError
from endor.kernels.dispatch import check_threads
from endor.models.outline import Outline, outline
from endor.planning import machine as hardware
from endor.planning.constants import Disk, Machine
from endor.planning.plan import Plan, Workload, plan
from endor.trust import read_model_config

CHILD_TIMEOUT_S = 3600

CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Of every system, unless the caller's environment says otherwise: torch's idle threads sleep.

Spinning, they take the cores from whatever else computes: here Endor's kernels, and on a machine
that is not otherwise idle every system's own other threads.
"""

Progress = Callable[[str], None]


@dataclass(slots=True)
class _System:
    """A system to run, and what its rounds returned."""

    name: str
    job: dict[str, Any]
    python: str = sys.executable
    predicted: Plan | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""


def generate(case: GenerateCase, progress: Progress | None = None) -> list[GenerateRecord]:
    """Run the comparison and return one record per system, Endor's first.

    Raises:
        ConfigError: A setting makes no sense.
        BudgetError: The budget cannot hold what Endor needs.
        BackendError: Endor itself failed.
    """
    case.check()
    say = progress or (lambda text: None)
    say("outline and machine")
    found = outline(case.packed, trust_remote_code=case.trust_remote_code)
    import torch

    threads = check_threads(case.threads) if case.threads else torch.get_num_threads()
    torch.set_num_threads(threads)
    machine = hardware.machine(found.dtype, refresh=case.remeasure)
    disk = hardware.disk(case.packed, refresh=case.remeasure)
    with tempfile.TemporaryDirectory(dir=case.work, prefix="endor-bench-") as work:
        systems = list(_systems(case, found, machine, disk, threads, work))
        for number in range(case.rounds):
            for system in systems:
                if not system.missing:
                    say(f"round {number + 1}/{case.rounds}: {system.name}")
                    _run(system, last=number == case.rounds - 1)
    return _records(case, systems, threads)


def _systems(
    case: GenerateCase,
    found: Outline,
    machine: Machine,
    disk: Disk,
    threads: int,
    work: str,
) -> list[_System]:
    packed = sorted(case.packed.glob("endor-*.safetensors"))
    vocab = found.shape.vocab
    base: dict[str, Any] = {
        "prompt": random.Random(0).choices(range(3, vocab), k=case.prompt_tokens),
        "tokens": case.tokens,
        "batch": case.batch,
        "threads": threads,
        "cold": case.cold,
        "ram_bytes": case.ram_bytes,
        "work": work,
        "trust_remote_code": case.trust_remote_code,
    }
    out = []
    for name, product in (("endor", "exact"), ("endor-direct", "direct")):
        if product == "direct" and not case.fast:
            continue
        workload = Workload(
            case.batch,
            case.prompt_tokens,
            case.prompt_tokens + case.tokens,
            product,  # type: ignore[arg-type]
        )
        chosen = plan(
            found.units, found.shape, machine, disk, ram_bytes=case.ram_bytes, workload=workload
        )
        job = base | {
            "system": "endor",
            "name": name,
            "path": str(case.packed),
            "files": [str(path) for path in packed],
            "exact": product == "exact",
            "tiers": dict(chosen.placement.tiers),
            "staging_bytes": chosen.placement.staging_bytes,
            "verify": case.verify,
            "predicted": {
                "decode_s": chosen.decode.seconds,
                "prefill_s": chosen.prefill.seconds,
            },
        }
        if case.report is not None:
            stem = case.report.with_name(f"{case.report.stem}-{name}{case.report.suffix}")
            job["report_at_end"] = str(case.report if name == "endor" else stem)
        out.append(_System(name, job, predicted=chosen))
    streamed = int(out[0].predicted.decode.disk_bytes) if out[0].predicted else 0
    if streamed and case.cold:
        job = base | {
            "system": "raw",
            "name": "raw",
            "files": [str(path) for path in packed],
            "nbytes": streamed,
        }
        out.append(_System("raw", job))
    for name in case.against:
        out.append(_peer(case, name, base))
    return out


def _peer(case: GenerateCase, name: str, base: Mapping[str, Any]) -> _System:
    assert case.dense is not None
    files = sorted(case.dense.glob("*.safetensors"))
    job = dict(base) | {
        "system": name,
        "name": name,
        "path": str(case.dense),
        "files": [str(path) for path in files],
    }
    size = sum(path.stat().st_size for path in files)
    system = _System(name, job)
    if name in ("dense", "accelerate-cpu"):
        if size > case.ram_bytes:
            system.missing = (
                f"{size / 1e9:.2f} GB of dense weights exceed the budget of "
                f"{case.ram_bytes / 1e9:.2f} GB"
            )
    elif name == "accelerate-disk":
        job["device_map"] = device_map(
            case.dense, case.ram_bytes, trust_remote_code=case.trust_remote_code
        )
    elif name == "airllm":
        system.python = case.airllm_python or sys.executable
    return system


def device_map(dense: Path, ram_bytes: int, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Return accelerate's own placement of a dense checkpoint: RAM up to the budget, then disk.

    Layers are given away in order, as `device_map="auto"` does with `max_memory`; half a gigabyte
    of the budget, at most half of it, stays free for the tensor that is being read.
    """
    import accelerate
    import torch
    import transformers

    config = read_model_config(dense, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    room = max(ram_bytes - (512 << 20), ram_bytes // 2)
    found = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": room},
        no_split_module_classes=model._no_split_modules,
        dtype=config.dtype or torch.bfloat16,
    )
    return {name: str(device) for name, device in found.items()}


def _run(system: _System, *, last: bool) -> None:
    """Run one child and keep its result, or why there is none."""
    job = dict(system.job)
    if last and "report_at_end" in job:
        job["report"] = job["report_at_end"]
    root = str(Path(endor.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [system.python, "-m", "endor.bench.generation.child"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        env={**CHILD_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    lines = ran.stdout.strip().splitlines()
    result = json.loads(lines[-1]) if lines else {"error": _tail(ran.stderr, ran.returncode)}
    if "error" in result:
        system.missing = result["error"]
    else:
        system.results.append(result)
    if system.missing and system.job["system"] in ("endor", "raw"):
        raise BackendError(f"{system.name} failed: {system.missing}")


def _tail(text: str, code: int) -> str:
    return f"exit {code}: {(text.strip().splitlines() or ['nothing said'])[-1][:500]}"


def _records(case: GenerateCase, systems: Sequence[_System], threads: int) -> list[GenerateRecord]:
    reference = next((s for s in systems if s.results and s.name == "dense"), systems[0])
    return [_record(case, system, reference, threads) for system in systems]


def _record(
    case: GenerateCase, system: _System, reference: _System, threads: int
) -> GenerateRecord:
    fixed: dict[str, Any] = {
        "system": system.name,
        "model": case.packed.name,
        "page_cache": "cold" if case.cold else "warm",
        "ram_bytes": case.ram_bytes,
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "tokens": case.tokens,
        "threads": threads,
        "rounds": len(system.results),
        "environment": environment(),
        "missing": system.missing,
    }
    if not system.results:
        return GenerateRecord(**fixed)
    results = system.results
    decode = sorted(step for result in results for step in result["steps_s"][1:])
    shares = [share for result in results for share in result["cached_share"][1:]]
    predicted = system.predicted
    record: dict[str, Any] = {
        "cached_share": max(shares, default=0.0),
        "load_s": median(result["load_s"] for result in results),
        "prefill_s": median(result["steps_s"][0] for result in results),
        "decode_s": median(decode),
        "decode_p20": decode[int(0.2 * (len(decode) - 1))],
        "decode_p80": decode[int(0.8 * (len(decode) - 1) + 0.5)],
        "predicted_decode_s": predicted.decode.seconds if predicted else 0.0,
        "predicted_prefill_s": predicted.prefill.seconds if predicted else 0.0,
        "anonymous_peak_bytes": max(r.get("anonymous_peak_bytes", 0) for r in results),
        "disk_bytes_per_step": median(
            result.get("device_read_bytes", 0) / case.tokens for result in results
        ),
        "note": results[-1].get("note", ""),
    }
    if system.name == "raw":
        record["disk_bytes_per_step"] = float(system.job["nbytes"])
    else:
        truth = reference.results[0]
        record["same_tokens"] = all(r["tokens"] == truth["tokens"] for r in results)
        record["equal"] = record["same_tokens"] and all(
            r["logits"] == truth["logits"] for r in results
        )
    return GenerateRecord(**fixed, **record)
