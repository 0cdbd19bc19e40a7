"""Generating text and measuring it: what `endor generate` runs, packed or dense."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from endor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: At most so many.
        temperature: 0 takes the likeliest token each time.
        top_p: Share of the probability that sampling keeps.
        seed: Of the random numbers; None leaves them as they are.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """Raise `ConfigError` unless the values make sense."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        out: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature:
            return out | {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": 0,
            }
        # The checkpoint's own sampling settings would only draw warnings.
        return out | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True, slots=True)
class Generation:
    """A text, and what it took.

    Attributes:
        text: The new text, without the prompt.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        prefill_s: From the call to the first token.
        decode_s: From the first token to the last.
        began_s: When it began, on the clock of `time.perf_counter`.
        ended_s: When it ended.
        disk_bytes: Bytes read from disk meanwhile, by the store of a packed model.
        packed_bytes: Packed bytes expanded or multiplied by.
        stall_s: Time that layers waited for the disk.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    began_s: float
    ended_s: float
    disk_bytes: int
    packed_bytes: int
    stall_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, per second; 0 when there was only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> Any:
    """Return the tokens of a prompt as the inputs of a model, on the CPU.

    Args:
        tokenizer: From `endor.trust.read_tokenizer`.
        prompt: Plain text.
        chat: Take it as the first message of a conversation, by the tokenizer's template.

    Raises:
        ConfigError: There is no template, or the prompt has no token.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the checkpoint has no chat template; leave --chat away")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[-1]:
        raise ConfigError("the prompt must have at least one token, got none")
    return inputs


def generate_text(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    sampling: Sampling | None = None,
    *,
    show: Callable[[str], None] | None = None,
) -> Generation:
    """Generate from `inputs` and return the text with its timings.

    Args:
        model: Any transformers model that generates, packed or not.
        tokenizer: Its tokenizer.
        inputs: From `encode_prompt`: one sequence.
        sampling: How tokens are chosen; greedy, 64 tokens, when omitted.
        show: Called with each new piece of text.

    Raises:
        ConfigError: The sampling makes no sense.
        EndorError: Packed weights could not be read.
    """
    import torch
    from transformers import TextStreamer

    sampling = sampling or Sampling()
    sampling.check()
    marks: list[float] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                marks.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if show is not None:
                show(text)

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    store = getattr(model, "endor", None)
    before = store.ledger.snapshot() if store is not None else None
    prompt_tokens = inputs["input_ids"].shape[-1]
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    # Inference mode counts no writes, by which the host knows an input that it has already got.
    beside = store is not None and "host" in store.count_tiers()
    with torch.no_grad() if beside else torch.inference_mode():
        ids = model.generate(**inputs.to(model.device), **sampling.arguments(), streamer=streamer)
    ended = time.perf_counter()
    moved = store.ledger.since(before) if store is not None else {}
    return Generation(
        text=tokenizer.decode(ids[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(marks),
        prefill_s=marks[0] - began if marks else ended - began,
        decode_s=marks[-1] - marks[0] if marks else 0.0,
        began_s=began,
        ended_s=ended,
        disk_bytes=moved.get("read_bytes", 0),
        packed_bytes=moved.get("packed_bytes", 0),
        stall_s=moved.get("stall_s", 0.0),
    )
