"""How far predicted neurons are from the model itself, and how fast: one token at a time, in turns.

    endor pack MODEL PACKED --neurons --predict
    python scripts/predict_bench.py PACKED --text FILE --tokens 512

Both models are PACKED, `exact=False`, all in RAM; one multiplies what its predictors name (lossy).
Both are given the tokens of the text. Prints the divergence of the next-token distributions (nats),
how often the likeliest token is the same, the losses, what was multiplied, and tokens/s (a fifth,
a half, four fifths of the turns are slower).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import endor
from endor.planning import Placement

TURN = 16
"""Tokens of a turn."""


def load(path: Path, *, predict: bool) -> Any:
    """Return the model, every unit packed in RAM."""
    model = endor.load_model(path, exact=False)
    units = model.endor.units
    model.endor.close()
    placement = Placement(dict.fromkeys((unit.name for unit in units), "resident"), 0)
    model = endor.load_model(path, exact=False, predict=predict, placement=placement)
    model.endor.preload()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to leave out")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[args.skip :]
    ids = AutoTokenizer.from_pretrained(args.packed)(text, return_tensors="pt").input_ids
    turns = min(args.tokens, ids.numel() - 1) // TURN
    models = [load(args.packed, predict=predict) for predict in (False, True)]
    caches: list[Any] = [None, None]
    seconds: list[list[float]] = [[], []]
    said: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for turn in range(turns):
            for at, model in enumerate(models):
                start = time.perf_counter()
                for token in ids[0, turn * TURN : (turn + 1) * TURN]:
                    out = model(token.view(1, 1), past_key_values=caches[at], use_cache=True)
                    caches[at] = out.past_key_values
                    said[at].append(out.logits[0, -1].float())
                seconds[at].append((time.perf_counter() - start) / TURN)
    exact, lossy = (torch.stack(each).log_softmax(-1) for each in said)
    following = ids[0, 1 : turns * TURN + 1, None]
    apart = (exact.exp() * (exact - lossy)).sum(-1)
    same = (exact.argmax(-1) == lossy.argmax(-1)).float().mean()
    loss = [float(-each.gather(1, following).mean()) for each in (exact, lossy)]
    counters = models[1].endor.ledger.counters
    print(
        f"{turns * TURN} tokens: KL {apart.mean():.5f} nats a token (median {apart.median():.5f}), "
        f"likeliest token the same {same:.2%}, nats a token of the text {loss[0]:.4f} exact and "
        f"{loss[1]:.4f} predicted; {counters.lossy_rows_named / max(1, counters.lossy_rows):.1%} "
        f"of the rows of {models[1].endor.predicted} matrices multiplied"
    )
    for name, each, model in zip(("exact", "predicted"), seconds, models, strict=True):
        rates = sorted(1 / one for one in each[1:] or each)
        low, middle, high = (rates[int(share * len(rates))] for share in (0.2, 0.5, 0.8))
        spent = model.endor.ledger.counters.product_s / (turns * TURN)
        print(
            f"{name}: {low:.2f} {middle:.2f} {high:.2f} tokens/s, {spent * 1e3:.2f} ms of a token "
            "in products"
        )


if __name__ == "__main__":
    main()
