"""Compare policies for a cache of experts on a routing trace, and check the engine against them.

    python scripts/make_model moe DENSE MOE
    endor pack MOE PACKED --include "*experts*"
    python scripts/expert_cache.py PACKED [--text FILE] [--tokens 1024] [--json FILE]
    python scripts/expert_cache.py PACKED --places rtx4060-laptop rtx4090
    python scripts/expert_cache.py PACKED --lossy [--engine-tokens 128]

Records how PACKED routes a text, runs each policy over the trace at several cache sizes, and prints
a Markdown table: hit rate, and in brackets experts read per token. Then PACKED itself generates
with a cache of a quarter of its experts, and its counters are printed beside.

With --places, what experts of the size of Qwen3-30B-A3B's would cost a token on machines that are
not at hand, by where they lie: simulated, from the same trace and published constants.

With --lossy, how far a model with experts="lossy" is from PACKED itself, one token at a time.
"""

import argparse
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import endor
from endor.bench.generation.expert_places import WAYS, compare_places, places_table
from endor.bench.generation.experts import (
    POLICIES,
    RoutingTrace,
    compare,
    record_routing,
    simulate,
    table,
)
from endor.hf.generation_cache import CACHE_ARGUMENT
from endor.planning import Placement, Tier
from endor.planning.catalogue import described
from endor.planning.sketch import Matrix, method, sketch_costs

SHARES = (0.125, 0.25, 0.5, 0.75)
HALF_LIVES = (4.0, 16.0, 64.0, 256.0)
EXPERT_WEIGHTS = 3 * 2048 * 768
"""Of one expert of Qwen3-30B-A3B: three matrices of 2048 by 768."""
SPARSITY = 0.5
SKIP = 2000
"""Tokens of the text that are left out: a book's front matter."""


def with_cache(packed: Path, share: float, **options: Any) -> tuple[Any, int]:
    """Return the model with memory for everything but experts, and for a share of those."""
    store = endor.load_model(packed).endor
    routed = [unit for unit in store.units if not unit.scheduled]
    capacity = round(share * len(routed))
    slot = max(unit.nbytes for unit in routed)
    tiers: dict[str, Tier] = dict.fromkeys((unit.name for unit in store.units), "resident")
    tiers |= dict.fromkeys((unit.name for unit in routed), "disk")
    store.close()
    placement = Placement(tiers, capacity * slot)
    return endor.load_model(packed, placement=placement, **options), capacity


def run_engine(packed: Path, ids: torch.Tensor, share: float) -> dict[str, float]:
    """Return the engine's figures over the second half of a text, one token at a time."""
    model, capacity = with_cache(packed, share)
    ledger, cache = model.endor.ledger, None
    half = len(ids) // 2
    with torch.no_grad():
        for at, token in enumerate(ids):
            if at == half:
                before = ledger.snapshot()
            cache = model(token.view(1, 1), **{CACHE_ARGUMENT: cache})[CACHE_ARGUMENT]
    moved = ledger.since(before)
    model.endor.close()
    uses = moved["expert_uses"]
    return {
        "capacity": capacity,
        "tokens": len(ids) - half,
        "ready": moved["expert_hits"] / uses,
        "on_their_way": moved["expert_late"] / uses,
        "accuracy": moved["right_guesses"] / max(1, moved["guessed_uses"]),
        "reads_per_token": moved["reads"] / (len(ids) - half),
        "guessed_reads_per_token": moved["warm_reads"] / (len(ids) - half),
        "wasted_per_token": moved["warm_wasted"] / (len(ids) - half),
        "revoked_per_token": moved["warm_revoked"] / (len(ids) - half),
    }


def token_by_token(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of each token's successor, `(tokens, vocab)`, float32."""
    cache, out = None, []
    with torch.no_grad():
        for token in ids:
            found = model(token.view(1, 1), **{CACHE_ARGUMENT: cache})
            cache = found[CACHE_ARGUMENT]
            out.append(found.logits[0, -1].float().log_softmax(-1))
    return torch.stack(out)


def print_lossy(packed: Path, ids: torch.Tensor) -> None:
    """Print how far lossy experts are from the model, by the share of experts in memory."""
    whole = endor.load_model(packed)
    expected = token_by_token(whole, ids)
    whole.endor.close()
    following = ids[1:, None]

    def loss(found: torch.Tensor) -> float:
        return float(-found[:-1].gather(1, following).mean())

    print(f"{len(ids)} tokens, one at a time; loss of the model itself {loss(expected):.3f}\n")
    print("| in memory | replaced | KL, mean | KL, 99 % below | same first token | loss |")
    print("|---|---|---|---|---|---|")
    for share in SHARES[1:]:
        model, capacity = with_cache(packed, share, experts="lossy")
        model.endor.preload()
        found = token_by_token(model, ids)
        counters = model.endor.ledger.counters
        replaced = counters.lossy_replaced / counters.lossy_choices
        model.endor.close()
        kl = (expected.exp() * (expected - found)).sum(1)
        same = (expected.argmax(1) == found.argmax(1)).float().mean()
        print(
            f"| {capacity} experts | {replaced:.1%} | {kl.mean():.4f} | {kl.quantile(0.99):.3f} | "
            f"{same:.1%} | {loss(found):.3f} |",
            flush=True,
        )


def print_places(trace: RoutingTrace, names: list[str], rate: float | None) -> None:
    """Print what experts cost a token on machines of the catalogue, a table each."""
    for name in names:
        machine = described(name).machine()
        matrix = Matrix("expert", EXPERT_WEIGHTS, routed=True)
        (expert,) = sketch_costs([matrix], method(sparsity=SPARSITY), machine, expert_use=1.0)
        print(f"simulated {name}, experts of {expert.packed_bytes / 1e6:.2f} MB packed\n")
        costs = compare_places(trace, SHARES[:3], expert, machine, device_rate=rate)
        print(places_table(trace, list(costs)), "\n")
    for way, meaning in WAYS.items():
        print(f"- `{way}`: {meaning}")


def main() -> None:
    """Record, simulate, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--text", type=Path, help="Default: the shipped evaluation text.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--engine-tokens", type=int, default=128)
    parser.add_argument("--places", nargs="+", metavar="MACHINE", help="See above.")
    parser.add_argument(
        "--device-rate",
        type=float,
        help="With --places: the device's product from the packed form, in times of a dense one's "
        "speed; it expands first where this is not given.",
    )
    parser.add_argument("--lossy", action="store_true", help="See above.")
    parser.add_argument("--json", type=Path, help="Write one line per outcome.")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = options.text or Path(str(files("endor").joinpath("data/austen_persuasion.txt")))
    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    ids = ids[SKIP : SKIP + options.tokens]
    if options.lossy:
        print_lossy(options.packed, ids[: options.engine_tokens])
        return
    model = endor.load_model(options.packed)
    trace = record_routing(model, ids)
    model.endor.close()
    tokens, layers, top_k = trace.chosen.shape
    print(
        f"{tokens} tokens, {layers} layers of {trace.experts} experts, {top_k} chosen; the most "
        f"used quarter of each layer gets {trace.skew():.0%} of the uses; {trace.accuracy:.1%} of "
        "the chosen experts were guessed from the layer before\n"
    )
    if options.places:
        print_places(trace, options.places, options.device_rate)
        return
    outcomes = list(compare(trace, SHARES))
    print(table(trace, outcomes), "\n")
    for name, meaning in POLICIES.items():
        print(f"- `{name}`: {meaning}")
    print("\nhalf-life of `endor`, hit rate without prefetch at a quarter of the experts:")
    for half_life in HALF_LIVES:
        found = simulate(trace, "endor", trace.total // 4, half_life=half_life)
        print(f"{half_life:6g} {found.hit_rate:.2%}")
    engine = run_engine(options.packed, ids[: options.engine_tokens], 0.25)
    print("\nthe engine:")
    for key, value in engine.items():
        print(f"{key:24} {value:.3f}")
    if options.json:
        lines = [json.dumps(asdict(outcome)) for outcome in outcomes]
        lines.append(json.dumps({"engine": engine}))
        options.json.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
