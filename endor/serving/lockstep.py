"""Generations that take their steps together, so that a weight is brought once for all of them.

Each is an ordinary `model.generate` in a thread of its own, with its own cache, sampling and end;
nothing of a model's attention or cache is replaced. What they share are the packed layers: who
comes to one waits there until all the others have come to it as well, and one expansion, or one
product, serves all. Whoever is new waits for the others' next step.

One thread runs at a time (`_turn`), so that models and stores, which know nothing of this, are used
as by one. A thread gives the turn away only where it waits, and then somebody else can go on: one
who has an answer, else the layer that somebody waits at, else, when all wait for the next step,
all. So no two ever wait for each other.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from endor.dependencies import changed
from endor.hf.together import Call, answer, packed_layers


class _Member:
    """One generation.

    Attributes:
        wake: Released when it may go on.
        layer: Where it waits; None where it waits for the next step.
        call: What it asks there.
        ready: It may go on, and waits for the turn.
        steps: Forward passes begun.
        draws: Its own random numbers; None for those of the process.
    """

    def __init__(self, draws: "Draws | None") -> None:
        self.wake = threading.Semaphore(0)
        self.layer: torch.nn.Module | None = None
        self.call: Call | None = None
        self.ready = False
        self.steps = 0
        self.draws = draws


class Lockstep:
    """Has the generations of one model step together.

    Args:
        model: A model with packed weights. Its forward pass, and its packed layers where there may
            be several members, are watched from now on; threads outside of `member` use them as
            before.
        size: How many members there may be at once.
    """

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        self._lock = threading.Lock()
        self._members: list[_Member] = []
        self._turn: _Member | threading.Thread | None = None
        self._mine = threading.local()
        self._asked = threading.Semaphore(0)
        self._forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for layer in packed_layers(model) if size > 1 else ():
            self._forwards[layer] = layer.forward
            layer.forward = partial(self._at_layer, layer)
        model.register_forward_pre_hook(self._before_step)
        model.register_forward_hook(self._after_step)
        # one thread for all products: scratch memory is a thread's own
        self._products = threading.Thread(target=self._answer, name="endor-products", daemon=True)
        self._products.start()

    @contextmanager
    def member(self, draws: "Draws | None" = None) -> Iterator[None]:
        """Make this thread one of the generations as long as the context is open.

        Args:
            draws: Random numbers of its own.

        Raises:
            DependencyError: The generation ended without a forward pass that was noticed.
        """
        member = self._mine.member = _Member(draws)
        try:
            yield
            if not member.steps:
                raise changed("transformers", "generate ran the model without calling it")
        finally:
            self._mine.member = None
            if draws is not None:
                draws.leave()
            with self._lock:
                if member in self._members:
                    self._members.remove(member)
                    self._pass()

    # ---- what a generation comes to ------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        member = getattr(self._mine, "member", None)
        if member is not None:
            if member.draws is not None:
                member.draws.leave()
            member.steps += 1
            self._wait(member, None, None)

    def _after_step(self, *_: Any) -> None:
        member = getattr(self._mine, "member", None)
        if member is not None and member.draws is not None:
            member.draws.enter()

    def _at_layer(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        member = getattr(self._mine, "member", None)
        if member is None:
            return self._forwards[layer](*args, **kwargs)
        call = Call(args, kwargs)
        self._wait(member, layer, call)
        if call.error is not None:
            raise call.error
        return call.result

    def _wait(self, member: _Member, layer: torch.nn.Module | None, call: Call | None) -> None:
        with self._lock:
            member.layer, member.call = layer, call
            if member not in self._members:
                self._members.append(member)
            if self._turn in (member, None):
                self._pass()
        member.wake.acquire()

    # ---- whose turn it is ----------------------------------------------------------------------

    def _pass(self) -> None:
        """Give the turn to somebody; with the lock."""
        if not any(one.ready for one in self._members):
            if any(one.layer is not None for one in self._members):
                self._turn = self._products
                self._asked.release()
                return
            for one in self._members:
                one.ready = True
        self._turn = next((one for one in self._members if one.ready), None)
        if self._turn is not None:
            self._turn.ready = False
            self._turn.wake.release()

    @torch.no_grad()
    def _answer(self) -> None:
        while True:
            self._asked.acquire()
            with self._lock:
                layer = next(one.layer for one in self._members if one.layer is not None)
                group = [one for one in self._members if one.layer is layer]
            answer(layer, self._forwards[layer], [one.call for one in group if one.call])
            with self._lock:
                for one in group:
                    one.layer, one.call, one.ready = None, None, True
                self._pass()


class Draws:
    """Random numbers of one generation: those of its seed, whoever else draws in between.

    Between `enter` and `leave` torch's generator of a device gives them.

    Args:
        seed: Of which they are.
        device: Where tokens are drawn.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._own = torch.Generator(device).manual_seed(seed).get_state()
        self._others: torch.Tensor | None = None
        self._device = device

    def enter(self) -> None:
        """Have torch draw these."""
        self._others, now = self._get(), self._own
        self._set(now)

    def leave(self) -> None:
        """Have torch draw what it would have drawn before `enter`; nothing where that was not."""
        if self._others is not None:
            self._own = self._get()
            self._set(self._others)
            self._others = None

    def _get(self) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _set(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
