"""Copies that begin because of a guess: last of all, a piece at a time, given up for sure ones."""

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.offload import copier
from endor.offload.copier import Copier
from endor.offload.schedule import Schedule
from endor.offload.slots import SlotPhase

from ..support.fake_device import FakeDevice
from ..support.packed_files import finishes
from .test_copier import LIMIT_S, SLOT_BYTES, Bench, Bytes, until

PIECE = 16
UNITS = 8


@pytest.fixture(scope="module", autouse=True)
def _pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "COPY_PIECE_BYTES", PIECE)
        yield


class Paused(FakeDevice):
    """A device on which the copier's thread stops after the first piece, until it may go on."""

    def __init__(self) -> None:
        super().__init__(bytes_per_s=64.0)
        self.reached, self.go = threading.Event(), threading.Event()

    def synchronize(self, event) -> None:
        if threading.current_thread().name.startswith("endor-copier"):
            self.reached.set()
            assert self.go.wait(LIMIT_S)
        super().synchronize(event)


class Guesses(Bench):
    """A bench whose units are in no order."""

    def __init__(self, slots: int, device: FakeDevice | None = None) -> None:
        self.device = device or FakeDevice(bytes_per_s=64.0)
        self.source = Bytes(self.device, UNITS)
        buffers = [self.device.allocate(SLOT_BYTES) for _ in range(slots)]
        self.copier = Copier(self.device, self.source, buffers, Schedule(()))
        self.wrong = []

    def holds(self, unit: int) -> bool:
        return any(
            slot.unit == unit and slot.phase is SlotPhase.READY for slot in self.copier._slots
        )


def test_a_right_guess_is_there():
    bench = Guesses(2)
    bench.copier.guess([5, 3, 1])  # no slot for the third
    until(lambda: bench.holds(5) and bench.holds(3))
    bench.copier.hint([3, 5])
    bench.use(3, 0.1)
    bench.use(5, 0.1)
    counters = bench.copier.counters
    assert (counters.hits, counters.misses, counters.copies) == (2, 0, 2)
    assert (counters.guesses, counters.given_up) == (2, 0)
    bench.finish()


@pytest.mark.parametrize("slots", [1, 3])
def test_a_guess_gives_way_after_one_piece(slots):
    device = Paused()
    bench = Guesses(slots, device)
    bench.copier.guess([5])
    assert device.reached.wait(LIMIT_S)
    used = threading.Thread(target=bench.use, args=(0, 0.1))
    used.start()
    until(lambda: bench.copier._awaited)
    bench.copier.hint([])  # the guess was wrong
    device.go.set()
    used.join(LIMIT_S)
    assert not used.is_alive()
    counters = bench.copier.counters
    assert (counters.guesses, counters.given_up, counters.copies) == (1, 1, 1)
    bench.copier.close()
    device.drain()
    # One piece of the guess, and all of what was waited for.
    expected = (PIECE + Bytes.expected(0).size) / 64.0
    assert device.busy_s() == pytest.approx(expected)
    bench.finish()


def test_a_guess_that_comes_true_is_finished():
    device = Paused()
    bench = Guesses(1, device)
    bench.copier.guess([5])
    assert device.reached.wait(LIMIT_S)
    bench.copier.hint([5, 6])
    device.go.set()
    bench.use(5, 0.1)
    counters = bench.copier.counters
    assert (counters.guesses, counters.given_up) == (1, 0)
    bench.finish()


def test_a_guess_waits_for_no_product():
    """Its copy would make the copy stream wait for what still uses the slot."""
    bench = Guesses(1)
    bench.use(0, 5.0)
    bench.copier.guess([1])
    time.sleep(0.1)  # its thread has seen it by then, as a rule
    assert bench.copier.counters.guesses == 0
    assert bench.holds(0)
    bench.device.advance(10.0)
    bench.copier.guess([1])
    until(lambda: bench.holds(1))
    bench.finish()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), slots=st.integers(1, 4), threads=st.integers(1, 3))
def test_guesses_harm_nothing(seed, slots, threads):
    """Whatever is guessed, hinted and taken: every order ends, with the right bytes."""
    bench = Guesses(slots)

    def walk(at: int):
        rng = random.Random(seed + at)

        def run() -> None:
            with bench.device.current():
                for _ in range(12):
                    units = [rng.randrange(UNITS) for _ in range(3)]
                    if rng.random() < 0.6:
                        bench.copier.guess(units)
                    if rng.random() < 0.5:
                        bench.copier.hint(rng.sample(range(UNITS), 2))
                    bench.use(rng.choice(units), rng.choice([0.0, 0.5, 3.0]))
                    if rng.random() < 0.3:
                        bench.device.advance(rng.choice([0.2, 5.0]))

        return run

    finishes(*(walk(at) for at in range(threads)))
    bench.finish()
