"""Which experts lie in VRAM while a model runs: those used often and lately, exchanged in between.

Every expert of the pool has its bytes in host memory, where it is multiplied or copied
from; homes in VRAM hold copies of some. An exchange overwrites the copy of one that is hardly used:

    exchanger's thread:   choose . [ wait(uses) . copy a piece . wait for it ]* . publish
    model's thread:       take what is published . multiply . record(use)

An expert is forgotten before its home is written, and known again when all of it has arrived:
meanwhile it is used from host memory. At most one piece is in the copy stream at a time, so that a
copy that somebody waits for passes in between.
"""

import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np

from endor.offload.device import Device, allocate_for_copies
from endor.offload.experts import Popularity, best_exchange, expected_uses
from endor.offload.ledger import Ledger
from endor.offload.on_device import Home, OnDevice, segments_of
from endor.offload.residency import SLOT_SHARE
from endor.offload.source import cut_up
from endor.offload.state import State
from endor.planning.tiers import COPY_PIECE_BYTES, Exchanges
from endor.planning.units import Unit
from endor.threads import join_all, start_all


class HotExperts:
    """Homes in VRAM for some of the experts that lie in host memory.

    Args:
        device: Where the homes are.
        states: All experts that change places; residents of the host.
        first: Those of them that lie in VRAM at first: their bytes are what the homes may take.
        exchanges: When an exchange pays.
        ledger: Where to count.

    Attributes:
        nbytes: Device memory of all homes.
    """

    def __init__(
        self,
        device: Device,
        states: Sequence[State],
        first: Sequence[Unit],
        exchanges: Exchanges,
        ledger: Ledger,
    ) -> None:
        self._device, self._exchanges, self._ledger = device, exchanges, ledger
        self._states = tuple(states)
        self._position: Mapping[int, int] = {s.unit.index: at for at, s in enumerate(states)}
        sizes = kinds([state.unit.nbytes for state in states])
        self._kinds = np.array([kind for kind, _ in sizes], dtype=np.int64)
        self._homes = self._allocate(first, sizes)
        self.nbytes = sum(home.buffer.numel() for home in self._homes)
        self._at: dict[int, Home] = {}
        self._popularity = Popularity()
        # Of each expert: the value, the number of its layer, whether it is in VRAM.
        self._values = np.full(len(states), -np.inf)
        self._layers = np.zeros(len(states), dtype=np.int64)
        self._there = np.zeros(len(states), dtype=bool)
        self._groups: dict[int, int] = {}
        self._last_group = -1
        self._allowance = 0
        self._busy = self._asked = self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._issue = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name="endor-exchanger", daemon=True)]
        start_all(self._threads, self.close)

    def _allocate(self, first: Sequence[Unit], sizes: Sequence[tuple[int, int]]) -> list[Home]:
        """Return homes that take no more memory than the experts `first`; they come first."""
        homes, room = [], dict[int, int]()
        for unit in first:
            kind, nbytes = sizes[self._position[unit.index]]
            room[kind] = room.get(kind, 0) + unit.nbytes
            if room[kind] >= nbytes:
                room[kind] -= nbytes
                buffer = allocate_for_copies(self._device, nbytes)
                homes.append(Home(buffer, kind, self._device.event(), unit.index))
        return homes

    def __contains__(self, unit: int) -> bool:
        return unit in self._at

    def take(self, unit: int) -> OnDevice | None:
        """Return an expert that is in VRAM now, until `release`; None where it is not."""
        with self._lock:
            home = self._at.get(unit)
            if home is None or self._closed:
                return None
            home.holders += 1
            return home.held

    def release(self, home: Home) -> None:
        """Give an expert back: work enqueued on the caller's current stream still uses it."""
        stream = self._device.compute_stream()
        with self._lock:
            event = home.uses.get(stream)
            if event is None:
                event = home.uses[stream] = self._device.event()
            self._device.record_compute(event)
            home.holders -= 1

    def route(self, group: int, units: Sequence[int]) -> None:
        """Note that a layer's router chose experts; a layer no later than the last begins a step.

        Args:
            group: The layer's number: grows through a step.
            units: Indices of the chosen ones, in the pool or not.
        """
        with self._lock:
            chosen = [unit for unit in dict.fromkeys(units) if unit in self._position]
            counters = self._ledger.counters
            counters.hot_uses += len(chosen)
            counters.hot_hits += sum(unit in self._at for unit in chosen)
            self._popularity.observe(group, chosen)
            layer = self._groups.setdefault(group, len(self._groups))
            for unit in chosen:
                at = self._position[unit]
                self._values[at] = self._popularity.value(unit)
                self._layers[at] = layer
            if group <= self._last_group:
                limit = self._exchanges.step_bytes
                largest = max((home.buffer.numel() for home in self._homes), default=0)
                self._allowance = min(self._allowance + limit, max(limit, largest))
                self._ask()
            self._last_group = group

    def settle(self) -> None:
        """Wait until the exchanges that pay now are over, and homes that can be filled are."""
        with self._lock:
            self._ask()
            while (self._asked or self._busy) and not self._closed:
                self._idle.wait()

    def report(self) -> dict[str, int]:
        """Return how many homes there are, how many are in use, and their bytes; plain data."""
        with self._lock:
            homes = self._homes
            return {"homes": len(homes), "used": len(self._at), "home_bytes": self.nbytes}

    def close(self) -> None:
        """Exchange no more; may be called twice.

        What was issued still runs: synchronise before the homes' or the host's memory goes.
        """
        with self._issue, self._lock:
            self._closed = True
            self._work.notify_all()
            self._idle.notify_all()
        join_all(self._threads)
        with self._lock:
            self._at.clear()
            for home in self._homes:
                home.held = None  # it refers back to its home, whose memory shall go now
            self._homes.clear()

    # ---- under the lock ------------------------------------------------------------------------

    def _ask(self) -> None:
        self._asked = True
        self._work.notify_all()

    def _next(self) -> tuple[State, Home] | None:
        """Return what to bring where, the home empty; None when nothing pays now."""
        for home in self._homes:
            if home.held is None and home.first is not None:
                state = self._states[self._position[home.first]]
                if state.fixed is None:  # not read yet: the next step asks again
                    continue
                home.first = None
                if state.unit.index not in self._at:
                    return state, home
        chosen = self._choose()
        if chosen is not None:
            state, home = chosen
            self._allowance -= state.unit.nbytes
            if home.held is not None:
                gone = home.held.unit.index
                home.held = None
                self._there[self._position[gone]] = False
                del self._at[gone]
        return chosen

    def _choose(self) -> tuple[State, Home] | None:
        """Return the exchange that saves most, where one pays for its copy."""
        visits = np.array([self._popularity.visits(group) for group in self._groups] or [0])
        uses = expected_uses(self._values, visits[self._layers], self._popularity.half_life)
        free: dict[int, dict[int, Home]] = {}
        for home in self._homes:
            if not home.holders:
                at = -1 if home.held is None else self._position[home.held.unit.index]
                free.setdefault(home.kind, {})[at] = home
        best, most = None, 0.0
        for kind, homes in free.items():
            outside = np.flatnonzero((self._kinds == kind) & ~self._there)
            inside = np.array([at for at in homes if at >= 0], dtype=np.int64)
            found = best_exchange(uses, outside, inside, self._exchanges.gain, empty=-1 in homes)
            if found is None or found[2] <= most:
                continue
            state = self._states[found[0]]
            if state.fixed is not None and state.unit.nbytes <= self._allowance:
                best, most = (state, homes[found[1]]), found[2]
        return best

    # ---- the exchanger's thread ----------------------------------------------------------------

    def _run(self) -> None:
        with self._device.current():
            while (chosen := self._wait()) is not None:
                state, home = chosen
                try:
                    held = self._bring(state, home)
                except Exception:  # the expert stays in host memory, where all of them are
                    held = None
                with self._lock:
                    self._busy = False
                    if held is not None:
                        home.held = held
                        self._at[state.unit.index] = home
                        self._there[self._position[state.unit.index]] = True
                        self._ledger.counters.exchanges += 1
                        self._ledger.counters.exchange_bytes += state.unit.nbytes
                    elif not self._closed:
                        self._ledger.counters.failures += 1
                        self._asked = False  # until the next step
                    self._idle.notify_all()

    def _wait(self) -> tuple[State, Home] | None:
        """Return the next exchange; None when the device is closed."""
        with self._lock:
            while not self._closed:
                if self._asked:
                    chosen = self._next()
                    if chosen is not None:
                        self._busy = True
                        return chosen
                    self._asked = False
                    self._idle.notify_all()
                self._work.wait()
            return None

    def _bring(self, state: State, home: Home) -> OnDevice | None:
        """Copy an expert to a home, piece by piece, and return it; None when closed meanwhile."""
        unit, place, start = state.unit, state.place, time.perf_counter()
        assert place is not None
        segments = segments_of(unit, place.array)
        for at, piece in cut_up([(0, place.array)], COPY_PIECE_BYTES):
            with self._issue:
                if self._closed:
                    return None
                for event in home.uses.values():
                    self._device.await_in_copy(event)
                home.uses.clear()
                self._device.copy(home.buffer[at:], piece)
                self._device.record_copy(home.ready)
            self._device.synchronize(home.ready)
        self._ledger.note("copy", unit.name, start, time.perf_counter(), unit.nbytes)
        return OnDevice(unit, home.buffer, None, segments, home=home)


def kinds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each size the number of its kind, and the largest size of that kind.

    Sizes of one kind differ by an eighth at most: a home of the largest takes any of them.
    """
    out: dict[int, tuple[int, int]] = {}
    kind, largest = -1, 0
    for size in sorted(set(sizes), reverse=True):
        if size < SLOT_SHARE * largest or kind < 0:
            kind, largest = kind + 1, size
        out[size] = kind, largest
    return [out[size] for size in sizes]
