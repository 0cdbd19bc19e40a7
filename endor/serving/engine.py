"""transformers' serving handlers, given one model that is loaded already.

They would load any model that a request names; here a request for another one is refused.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from endor.dependencies import internals, require
from endor.serving.limits import Limits, RequestError
from endor.serving.lockstep import Draws, Lockstep

SEED: ContextVar[int | None] = ContextVar("seed", default=None)
"""The seed of the request that is being handled. Its handler does not get it: it would set that of
the process, in the middle of other answers."""

ModelManager, TimedModel = internals(
    "transformers.cli.serving.model_manager", "ModelManager", "TimedModel"
)
GenerateManager, GenerationState = internals(
    "transformers.cli.serving.utils", "GenerateManager", "GenerationState"
)
(ChatCompletionHandler,) = internals(
    "transformers.cli.serving.chat_completion", "ChatCompletionHandler"
)
(CompletionHandler,) = internals("transformers.cli.serving.completion", "CompletionHandler")
(ResponseHandler,) = internals("transformers.cli.serving.response", "ResponseHandler")
require(
    "transformers", ModelManager, ("load_model_and_processor", "process_model_name", "list_models")
)
require(
    "transformers",
    GenerateManager,
    ("generate_non_streaming", "generate_streaming", "submit", "async_submit"),
)
require("transformers", GenerationState, ("get_manager",))
for _handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler):
    require("transformers", _handler, ("handle_request", "_resolve_model"))


class OneModel(ModelManager):  # type: ignore[misc,valid-type]
    """The only model of a server.

    Args:
        name: What clients call it.
        model: It.
        tokenizer: Its tokenizer, a fast one.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.pair = model, tokenizer
        super().__init__(device="cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        return self.pair

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "endor"}]


class _Left(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation whose client went away."""

    def __init__(self) -> None:
        self.left = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


class Generations(GenerateManager):  # type: ignore[misc,valid-type]
    """Generates in threads, each of which makes one answer after the other.

    An answer ends where nobody waits for it any more.

    Args:
        model: The model.
        limits: How long prompt and answer may be together.
        batch: Answers at once, which take their steps together.
    """

    def __init__(self, model: Any, limits: Limits, batch: int) -> None:
        self._limits = limits
        self._device = getattr(model, "device", torch.device("cpu"))
        self._lockstep = Lockstep(model, batch)
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for at in range(batch):
            threading.Thread(target=self._run, name=f"endor-answer-{at}", daemon=True).start()

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Return what `fn` will have returned in one of the threads."""
        future: Future[Any] = Future()
        seed = SEED.get()
        draws = None if seed is None else Draws(seed, self._device)

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                with self._lockstep.member(draws):
                    result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._asked.put(work)
        return future

    def async_submit(
        self, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> "asyncio.Future[Any]":
        """Return the same for coroutines."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def _run(self) -> None:
        while True:
            self._asked.get()()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **named: Any
    ) -> Any:
        self._check(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *others, **named)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **named: Any
    ) -> Any:
        self._check(inputs, gen_config)
        end = _Left()
        made = self.async_submit(
            model.generate,
            **inputs,
            generation_config=gen_config,
            tokenizer=processor,
            stopping_criteria=StoppingCriteriaList([end]),
        )
        try:
            sequences = await made
        except asyncio.CancelledError:
            end.left.set()  # where it runs; where it only waits, it will not begin
            raise
        prompt = inputs["input_ids"].shape[-1]
        tokens = sequences[0, prompt:]
        return processor.decode(tokens, skip_special_tokens=True), prompt, tokens

    def _check(self, inputs: Any, gen_config: Any) -> None:
        prompt, answer = inputs["input_ids"].shape[-1], gen_config.max_new_tokens
        if prompt + answer > self._limits.context:
            raise RequestError(
                f"a prompt of {prompt} tokens and {answer} new ones are beyond the context of "
                f"{self._limits.context} that this server was started with",
                kind="context_length_exceeded",
            )


class Turns(GenerationState):  # type: ignore[misc,valid-type]
    """Hands out the one manager of generations."""

    def __init__(self, model: Any, limits: Limits, batch: int) -> None:
        super().__init__()
        self._manager = Generations(model, limits, batch)

    def get_manager(self, *arguments: Any, **options: Any) -> Generations:
        return self._manager


def handlers(
    name: str, model: Any, tokenizer: Any, limits: Limits, batch: int = 1
) -> dict[str, Any]:
    """Return the handler of each route."""
    manager, state = OneModel(name, model, tokenizer), Turns(model, limits, batch)
    return {
        "/v1/completions": CompletionHandler(manager, state),
        "/v1/chat/completions": ChatCompletionHandler(manager, state),
        "/v1/responses": ResponseHandler(manager, state),
    }
