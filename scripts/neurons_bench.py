"""Decoding steps of one model packed in several ways, in turns, in one process.

    python scripts/make_model relu DENSE --layers 2 --zeros 0.93
    endor pack DENSE PLAIN && endor pack DENSE TURNED --neurons
    endor pack DENSE BUNDLED --bundle-neurons
    python scripts/neurons_bench.py PLAIN TURNED BUNDLED --tier resident
    python scripts/neurons_bench.py PLAIN TURNED COUNTED --ram 1.2GiB --text FILE

With --ram the planner places the weights in so much memory. Prints tokens/s (a fifth, a half, four
fifths of the turns are slower), how often that is what the first packing gives (the median of turns
side by side), bytes read and the share of active neurons, and how far the logits are from those of
the first.

Blocks of neurons that were read stay in memory while there is room: of two layers all do. `--blocks
14` leaves room for those of one layer, as in a model of many layers.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import endor
from endor.planning import Placement

STAGING_UNITS = 4


def load(path: str, tier: Any, ram: str | None, blocks: int | None) -> Any:
    """Return the model with every unit packed in `tier`, or as planned for so much memory.

    `blocks`: MiB of memory for blocks of neurons that need not stay.
    """
    if ram is not None:
        model = endor.load_model(path, exact=False, ram=ram)
        model.endor.preload()
        return model
    model = endor.load_model(path, exact=False)
    units = model.endor.units
    model.endor.close()
    staging = STAGING_UNITS * max(unit.nbytes for unit in units)
    placement = Placement(dict.fromkeys((unit.name for unit in units), tier), staging)
    model = endor.load_model(path, exact=False, placement=placement)
    model.endor.preload()
    for share in model.endor.shares:
        if blocks is not None and share.reads is not None:
            share.reads.limit(blocks << 20)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--ram", help="plan for so much memory, such as 1.2GiB")
    parser.add_argument("--text", help="feed the tokens of a file, not random ones")
    parser.add_argument("--tier", choices=["resident", "disk"], default="resident")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=12, help="of a turn")
    parser.add_argument("--blocks", type=int, help="MiB of memory for blocks of neurons")
    args = parser.parse_args()
    count, draws = (args.turns + 1) * args.tokens + 1, torch.Generator().manual_seed(1)
    fed = torch.randint(3, 1000, (count, 1, 1), generator=draws)
    if args.text:
        text = Path(args.text).read_text()[: 8 * count]
        fed = torch.tensor(AutoTokenizer.from_pretrained(args.packed[0])(text).input_ids)
        fed = fed[:count].view(count, 1, 1)
    models = [load(path, args.tier, args.ram, args.blocks) for path in args.packed]
    with torch.no_grad():
        caches = [model(fed[0], use_cache=True).past_key_values for model in models]
        seconds: list[list[float]] = [[] for _ in models]
        logits: list[list[torch.Tensor]] = [[] for _ in models]
        for turn in range(args.turns + 1):
            for at, model in enumerate(models):
                start = time.perf_counter()
                for step in range(args.tokens):
                    ids = fed[1 + turn * args.tokens + step]
                    out = model(ids, past_key_values=caches[at], use_cache=True)
                    logits[at].append(out.logits.float())
                seconds[at].append((time.perf_counter() - start) / args.tokens)
                if not turn:
                    model.endor.ledger.clear()
    for path, model, each in zip(args.packed, models, seconds, strict=True):
        rates = sorted(1 / one for one in each[1:])
        low, middle, high = (rates[int(share * len(rates))] for share in (0.2, 0.5, 0.8))
        counters = model.endor.ledger.counters
        tokens = args.turns * args.tokens
        times = sorted(a / b for a, b in zip(seconds[0][1:], each[1:], strict=True))
        print(
            f"{path}: {low:.2f} {middle:.2f} {high:.2f} tokens/s, {times[len(times) // 2]:.2f}x, "
            f"{counters.read_bytes / tokens / 1e6:.1f} MB read a token, "
            f"{counters.product_s / tokens * 1e3:.1f} ms in products, active "
            f"{counters.active_neurons / max(1, counters.neurons):.3f}, "
            f"{sum(model.endor.placement.kept_bytes.values()) / 1e6:.0f} MB kept, of their blocks "
            f"{counters.neuron_hit_bytes / max(1, counters.neuron_bytes):.3f} in memory"
        )
    plain, *others = (torch.cat(each) for each in logits)
    for path, other in zip(args.packed[1:], others, strict=True):
        apart = (plain - other).abs().max() / plain.abs().max()
        print(f"{path}: largest difference of logits {apart:.4f} of the largest")


if __name__ == "__main__":
    main()
