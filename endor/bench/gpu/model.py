"""A whole model under a VRAM cap: Endor beside Accelerate's CPU and disk offload.

The model has Llama's shape, random weights and half of them pruned, so that no download is needed;
its text means nothing, but every system must write the same tokens. Each system runs in a child
process of its own with the same cap, set in the allocator.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endor.errors import ConfigError, EndorError

SYSTEMS = (
    "dense, no cap",
    "endor",
    "endor, half on disk",
    "endor --fast, stream",
    "endor --fast, host",
    "endor --fast, both",
    "accelerate cpu",
    "accelerate disk",
)
FAST = "endor --fast, "
"""Before a way to multiply what lies outside VRAM. Their sums have another order: tokens differ."""
_FRAMEWORK_BYTES = 1 << 30
"""What the allocator may take above the weights: cache, activations, cuBLAS workspaces."""


@dataclass(frozen=True, slots=True)
class ModelCase:
    """The model and the workload.

    Attributes:
        layers, hidden, wide, heads, kv_heads, vocab: Its shape.
        density: Share of weights that are stored, in every linear layer.
        vram_bytes: The cap on weights in device memory.
        prompt: Tokens of the prompt.
        tokens: Tokens to generate, of which the first two are not timed.
        seconds: Time limit of each system.
    """

    layers: int = 12
    hidden: int = 4096
    wide: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    density: float = 0.5
    vram_bytes: int = 1280 << 20
    prompt: int = 32
    tokens: int = 12
    seconds: float = 60.0


def make(case: ModelCase, folder: Path) -> dict[str, float]:
    """Write the dense checkpoint to `folder/dense` and the packed one to `folder/packed`.

    Returns:
        Seconds of each step, and bytes of each checkpoint.
    """
    import torch
    import transformers

    import endor

    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    config = transformers.LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.wide,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight
                sample = weight.abs().flatten()[:: max(1, weight.numel() // 1_000_000)].float()
                weight[weight.abs() < sample.quantile(1 - case.density)] = 0
    model.cpu().save_pretrained(folder / "dense")
    del model
    saved = time.perf_counter()
    endor.pack_checkpoint(folder / "dense", folder / "packed")
    packed = time.perf_counter()
    return {
        "make_s": saved - started,
        "pack_s": packed - saved,
        "dense_bytes": float(_size(folder / "dense")),
        "packed_bytes": float(_size(folder / "packed")),
    }


def run(
    case: ModelCase, folder: Path, systems: Sequence[str] = SYSTEMS
) -> Iterator[dict[str, Any]]:
    """Yield what each system reached; a system that fails yields its error.

    Raises:
        EndorError: A system wrote other tokens than the dense model.
    """
    expected: list[int] | None = None
    for system in systems:
        job = {"system": system, "folder": str(folder), "case": asdict(case)}
        answer = _child(job, case.seconds)
        answer["system"] = system
        yield answer
        tokens = answer.get("tokens")
        if tokens is None:
            continue
        expected = expected or tokens
        exact = system.startswith("endor") and not system.startswith(FAST)
        if exact and tokens != expected:
            raise EndorError(f"{system}: wrote {tokens}, the dense model {expected}")


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one job in this process."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    case = ModelCase(**job["case"])
    folder, system = Path(job["folder"]), str(job["system"])
    total = torch.cuda.get_device_properties(0).total_memory
    if "no cap" not in system:
        cap = case.vram_bytes + _FRAMEWORK_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    started = time.perf_counter()
    model = _load(system, case, folder)
    load_s = time.perf_counter() - started
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, case.vocab, (1, case.prompt), generator=generator).cuda()
    steps: list[float] = []

    def tick(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        steps.append(time.perf_counter())
        return input_ids.new_zeros(input_ids.shape[0]).bool()

    torch.cuda.reset_peak_memory_stats()
    copied = _copied(model)
    steps.append(time.perf_counter())
    with torch.no_grad():  # inference mode counts no writes, which the host would have to know of
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.tokens,
            min_new_tokens=case.tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([tick]),
        )
    seconds = [after - before for before, after in itertools.pairwise(steps)]
    timed = sorted(seconds[2:])
    result = {
        "load_s": load_s,
        "prefill_s": seconds[0],
        "token_s": timed[len(timed) // 2],
        "tokens_per_s": 1 / timed[len(timed) // 2],
        "peak_vram_bytes": torch.cuda.max_memory_allocated(),
        "tokens": out[0, case.prompt :].tolist(),
    }
    if copied is not None:
        moved = (_copied(model) or 0) - copied
        result["link_bytes_per_token"] = moved / case.tokens
        result["report"] = model.endor.report()
    return result


def _load(system: str, case: ModelCase, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import endor

    if system.startswith(FAST):
        return _fast(system.removeprefix(FAST), case, folder / "packed")
    if system.startswith("endor"):
        ram = "64GiB"
        if "disk" in system:
            ram = str(max(1 << 28, _size(folder / "packed") // 4))
        return endor.load_model(
            folder / "packed", device="cuda", vram=case.vram_bytes, ram=ram, verify=False
        )
    dense, options = folder / "dense", {"dtype": torch.bfloat16}
    if "no cap" in system:
        return AutoModelForCausalLM.from_pretrained(dense, device_map="cuda", **options)
    host = "64GiB" if system.endswith("cpu") else "64MiB"
    return AutoModelForCausalLM.from_pretrained(
        dense,
        device_map="auto",
        max_memory={0: case.vram_bytes, "cpu": host},
        offload_folder=str(folder / "offload"),
        **options,
    )


def _fast(way: str, case: ModelCase, packed: Path) -> Any:
    """Load the model as the best plan of one way to multiply has it."""
    import endor
    from endor.hf.planned import plan_checkpoint

    options: dict[str, Any] = {"vram": case.vram_bytes, "exact": False}
    planned = plan_checkpoint(packed, ram="64GiB", **options).plan
    found = [each.placement for each in planned.alternatives if each.way == way]
    if not found:
        ways = ", ".join(each.way for each in planned.alternatives)
        raise ConfigError(f"the plan has no way {way!r} here, it has {ways}")
    return endor.load_model(
        packed, device="cuda", placement=found[0], ram="64GiB", verify=False, **options
    )


def _copied(model: Any) -> int | None:
    store = getattr(model, "endor", None)
    if store is None:
        return None
    return int(store.report().get("copier", {}).get("copy_bytes", 0))


def _child(job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "endor.bench.gpu.model"]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    try:
        found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
        return found
    except (ValueError, IndexError):
        return {"error": child.stderr.strip()[-2000:] or f"ended with code {child.returncode}"}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
