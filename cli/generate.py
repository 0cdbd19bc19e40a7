"""`endor generate`: text from a packed checkpoint, and what it cost."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.common import MODEL, expanded_line, loading_options
from endor.cli.hub import at_hand, revision_option
from endor.cli.terminal import emit, show, stream
from endor.cli.types import Text

if TYPE_CHECKING:
    from endor.hf.generation import Generation
    from endor.planning.beside import HostCompute
    from endor.planning.kv import KVSetting
    from endor.planning.plan import Plan
    from endor.planning.workload import Experts

LEAST_STEPS = 5
"""Fewer tokens say little about the constants: the first steps warm up."""


@click.command("generate")
@click.argument("packed", type=MODEL)
@click.option("--prompt", type=Text(), required=True, help="Text to continue.")
@click.option("--chat", is_flag=True, help="Take the prompt as a message, by the chat template.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Stop after so many tokens.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where the model runs, such as cpu or cuda."
)
@loading_options("vram", "ram", "exact", "host_compute", "experts", "predict", "kv")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, help="Probability that sampling keeps.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.html",
    help="Write a page with a timeline of reads, stalls and computing.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.json",
    help="Write that timeline for Perfetto or chrome://tracing.",
)
@revision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all is done.")
def generate_command(
    packed: Path,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    device: str,
    vram: str | None,
    ram: str | None,
    exact: bool,
    host_compute: "HostCompute",
    experts: "Experts",
    predict: bool,
    kv: "KVSetting",
    trust_remote_code: bool,
    temperature: float,
    top_p: float,
    seed: int | None,
    report: Path | None,
    trace: Path | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Generate text from the checkpoint PACKED.

    The text comes on the standard output as it is made, its cost on the standard error. PACKED may
    also be an ordinary checkpoint, for comparison; memory options then do not apply.
    """
    from endor.hf.generation import Sampling, encode_prompt, generate_text
    from endor.hf.load import open_model
    from endor.trust import read_tokenizer

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    packed = at_hand(packed, revision)
    tokenizer = read_tokenizer(packed, trust_remote_code=trust_remote_code)
    inputs = encode_prompt(tokenizer, prompt, chat=chat)
    prompt_tokens = inputs["input_ids"].shape[-1]
    start = time.perf_counter()
    model = open_model(
        packed,
        device=device,
        vram=vram,
        ram=ram,
        exact=exact,
        host_compute=host_compute,
        experts=experts,
        predict=predict,
        context=prompt_tokens + max_new_tokens,
        prompt=prompt_tokens,
        measure=True,
        kv=kv,
        trust_remote_code=trust_remote_code,
    )
    plan = getattr(model, "endor_plan", None)
    store = getattr(model, "endor", None)
    if store is None and (report or trace):
        raise click.UsageError("--report and --trace need a packed checkpoint")
    load_s = time.perf_counter() - start
    if store is not None and not as_json:
        stored = [entry for layout in store.layouts for entry in layout.tensors.values()]
        sizes = [entry.spec.dense_nbytes for entry in stored if entry.name in store.unpacked]
        expanded_line(store.unpacked, sum(sizes))
    write = None if as_json else stream
    result = generate_text(model, tokenizer, inputs, sampling, show=write)
    whole = store is None or (experts == "exact" and not predict)
    facts = figures(result, load_s) | {"exact": store is None or (exact and whole)}
    if store is not None:
        facts |= {"experts": store.experts, "replaced": replaced_share(store)}
        facts |= {"predicted": store.predicted, "rows_multiplied": multiplied_share(store)}
    if plan is not None:
        facts |= {
            "predicted_prefill_tokens_per_s": plan.prefill_tokens_per_s,
            "predicted_decode_tokens_per_s": plan.decode_tokens_per_s,
            "bound": plan.decode.bound,
            "doubt": doubt(plan, store, result),
        }
    if report is not None and store is not None:
        from endor.bench.timeline_page import write_report

        write_report(
            report,
            store,
            seconds=(result.began_s, result.ended_s),
            predicted={
                "decode_s": plan.decode.seconds,
                "prefill_s": plan.prefill.seconds,
                "doubt": facts["doubt"],
            }
            if plan
            else None,
            budget={"vram": vram, "ram": ram} if device != "cpu" else {"ram": ram},
            title=f"{packed.name}: {result.new_tokens} tokens",
        )
    if trace is not None and store is not None:
        from endor.bench.trace import write_trace

        write_trace(trace, store, seconds=(result.began_s, result.ended_s))
    if as_json:
        engine = store.report() if store is not None else None
        emit({"text": result.text, **facts, "engine": engine}, indent=2)
        return
    show()
    show(summary(facts), err=True)


def figures(result: "Generation", load_s: float) -> dict[str, Any]:
    """Return what a generation took, as plain data."""
    out = asdict(result)
    for key in ("text", "began_s", "ended_s"):
        del out[key]
    steps = max(1, result.new_tokens)
    return out | {
        "load_s": load_s,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "disk_bytes_per_token": result.disk_bytes / steps,
        "packed_bytes_per_token": result.packed_bytes / steps,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def replaced_share(store: Any) -> float:
    """Return the share of the routers' choices for few tokens that other experts took."""
    counters = store.ledger.counters
    return float(counters.lossy_replaced / max(1, counters.lossy_choices))


def multiplied_share(store: Any) -> float:
    """Return the share of rows that predictors named, where any were left out; 1 if none."""
    counters = store.ledger.counters
    return float(counters.lossy_rows_named / counters.lossy_rows) if counters.lossy_rows else 1.0


def doubt(plan: "Plan", store: Any, result: "Generation") -> str:
    """Return what to say when the steps show the plan's constants wrong; see `hardware.doubt`."""
    from endor.models.outline import most_common
    from endor.planning import machine as hardware

    if result.new_tokens < LEAST_STEPS or plan.vram_bytes or not result.decode_tokens_per_s:
        return ""
    predicted_s, found_s = 1 / plan.decode_tokens_per_s, 1 / result.decode_tokens_per_s
    return hardware.doubt(most_common(store.units), predicted_s, found_s)


def summary(facts: dict[str, Any]) -> str:
    """Return the figures for a reader."""
    lines = [
        f"load     {facts['load_s']:.2f} s",
        f"prefill  {facts['prefill_tokens_per_s']:.1f} tokens/s ({facts['prompt_tokens']} tokens)",
        f"decode   {facts['decode_tokens_per_s']:.2f} tokens/s ({facts['new_tokens']} tokens)",
    ]
    if "bound" in facts:
        lines.append(
            f"plan     {facts['predicted_prefill_tokens_per_s']:.1f} and "
            f"{facts['predicted_decode_tokens_per_s']:.2f} tokens/s were predicted, bound by the "
            f"{facts['bound']}"
        )
    if facts.get("experts") == "lossy":
        lines.append(
            f"experts  lossy: {facts['replaced']:.1%} of the choices were replaced; the text is "
            "not the model's own"
        )
    if facts.get("predicted"):
        lines.append(
            f"predict  lossy: of {facts['predicted']} matrices only the rows of predicted neurons "
            f"were multiplied, {facts['rows_multiplied']:.1%} where any were left out; the text is "
            "not the model's own"
        )
    if facts.get("doubt"):
        lines.append(f"         {facts['doubt']}")
    if facts["packed_bytes"]:
        lines.append(
            f"moved    {facts['disk_bytes_per_token'] / 1e6:.2f} MB from disk and "
            f"{facts['packed_bytes_per_token'] / 1e6:.2f} MB of packed weights per token; "
            f"waited {facts['stall_s']:.2f} s for the disk"
        )
    lines.append(f"memory   {facts['peak_memory_bytes'] / 1e6:.0f} MB at its peak")
    return "\n".join(lines)


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
