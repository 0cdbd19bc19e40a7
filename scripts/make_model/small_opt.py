"""Train a small OPT for some minutes on the calibration texts that Endor ships; ReLU, real zeros.

What it writes is poor, and its zeros are those that training made: for measurements that random
weights cannot stand in for, such as what predictors of neurons do to predictions. Its tokenizer is
made from the same texts. The seed fixes data and weights, but training stops by the clock.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from endor.pruning.calibration import shipped_texts

WINDOW, BATCH = 128, 8
RATE, WARMUP = 1e-3, 50


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this kind's options."""
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=4.0)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint."""
    torch.manual_seed(0)
    texts = [path.read_text(encoding="utf-8") for path in shipped_texts()]
    tokenizer = make_tokenizer(texts, args.vocab)
    ids = torch.tensor([each for text in texts for each in tokenizer.encode(text).ids])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    config = transformers.OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        ffn_dim=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=2048,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = transformers.OPTForCausalLM(config).train()
    steps, loss = train(model, windows, args.minutes)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(about))
    print(f"{steps} steps of {BATCH * WINDOW} tokens, {loss:.3f} nats a token at the end")


def train(
    model: transformers.OPTForCausalLM, windows: torch.Tensor, minutes: float
) -> tuple[int, float]:
    """Take steps of AdamW until the time is over; return how many, and the last losses' mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    began, steps, losses = time.perf_counter(), 0, [0.0]
    while (spent := (time.perf_counter() - began) / 60 / max(minutes, 1e-9)) < 1 or not steps:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / WARMUP) * max(0.05, 1 - spent)
        ids = windows[torch.randint(len(windows), (BATCH,))]
        found = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses, steps = [*losses[-19:], found.item()], steps + 1
    return steps, sum(losses) / len(losses)


def make_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
