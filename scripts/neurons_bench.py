"""Decoding steps of one model packed without and with `--neurons`, in turns, in one process.

    python scripts/make_model relu DENSE --layers 2 --zeros 0.93
    endor pack DENSE PLAIN && endor pack DENSE TURNED --neurons
    python scripts/neurons_bench.py PLAIN TURNED --tier resident

Prints tokens/s (a fifth, a half, four fifths of the turns are slower), bytes read and the share of
active neurons, and how far the logits are apart.
"""

import argparse
import time
from typing import Any

import torch

import endor
from endor.planning import Placement

STAGING_UNITS = 4


def load(path: str, tier: Any) -> Any:
    """Return the model with every unit packed in `tier`."""
    model = endor.load_model(path, exact=False)
    units = model.endor.units
    model.endor.close()
    staging = STAGING_UNITS * max(unit.nbytes for unit in units)
    placement = Placement(dict.fromkeys((unit.name for unit in units), tier), staging)
    model = endor.load_model(path, exact=False, placement=placement)
    model.endor.preload()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", nargs=2)
    parser.add_argument("--tier", choices=["resident", "disk"], default="resident")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=12, help="of a turn")
    args = parser.parse_args()
    draws = torch.Generator().manual_seed(1)
    fed = torch.randint(3, 1000, ((args.turns + 1) * args.tokens + 1, 1, 1), generator=draws)
    models = [load(path, args.tier) for path in args.packed]
    with torch.no_grad():
        caches = [model(fed[0], use_cache=True).past_key_values for model in models]
        seconds: list[list[float]] = [[], []]
        logits: list[list[torch.Tensor]] = [[], []]
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
        print(
            f"{path}: {low:.2f} {middle:.2f} {high:.2f} tokens/s, "
            f"{counters.read_bytes / tokens / 1e6:.1f} MB read a token, "
            f"{counters.product_s / tokens * 1e3:.1f} ms in products, active "
            f"{counters.active_neurons / max(1, counters.neurons):.3f}"
        )
    plain, turned = (torch.cat(each) for each in logits)
    apart = (plain - turned).abs().max() / plain.abs().max()
    print(f"largest difference of logits {apart:.4f} of the largest")


if __name__ == "__main__":
    main()
