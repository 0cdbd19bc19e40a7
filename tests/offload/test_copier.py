"""The copier on a simulated device: any order of takes ends, and no byte is ever the wrong one."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.errors import BackendError, ConfigError, ReadError
from endor.offload.copier import Copier
from endor.offload.pinned import PinnedArena
from endor.offload.schedule import Schedule
from endor.offload.slots import SlotPhase
from endor.storage import HostBuffer

from ..support.fake_device import FakeDevice

SLOT_BYTES = 64
LIMIT_S = 30.0


class Bytes:
    """A source of recognisable bytes. Disk units share one buffer, as a staging area does."""

    def __init__(self, device: FakeDevice, units: int, on_disk=frozenset(), fail=(), direct=()):
        self.device = device
        self.resident = {at: self.expected(at) for at in range(units)}
        self.on_disk = on_disk
        self.direct = frozenset(direct)
        self.fail = set(fail)
        self.gate = threading.Event()
        self.gate.set()
        self.acquired: list[int] = []
        self._local = threading.local()

    @staticmethod
    def expected(unit: int) -> np.ndarray:
        return np.full(SLOT_BYTES - unit % 7, unit + 1, dtype=np.uint8)

    def acquire(self, unit: int) -> list[tuple[int, np.ndarray]]:
        """Return a unit in two pieces, the second one first."""
        data = self.read(unit)
        half = data.size // 2
        return [(half, data[half:]), (0, data[:half])]

    def read(self, unit: int) -> np.ndarray:
        self.gate.wait()
        self.acquired.append(unit)
        if unit in self.fail:
            raise ReadError(f"unit {unit}: the disk failed")
        if unit not in self.on_disk:
            return self.resident[unit]
        local = self._local
        if not hasattr(local, "buffer"):
            local.buffer, local.event = np.zeros(SLOT_BYTES, dtype=np.uint8), None
        if local.event is not None:
            self.device.synchronize(local.event)
        wanted = self.expected(unit)
        local.buffer[: wanted.size] = wanted
        return local.buffer[: wanted.size]

    def reads_directly(self, unit: int) -> bool:
        return unit in self.direct

    def read_into(self, unit: int, buffer) -> int:
        data, target = self.read(unit), buffer.numpy()
        if self.device.is_written(target):
            self.device.errors.append("a direct read into a slot that is being copied to")
        target[: data.size] = data
        return data.size

    def issued(self, unit: int, event) -> None:
        if unit in self.on_disk:
            self._local.event = event


class Bench:
    """A device, a copier and what uses them."""

    def __init__(
        self, units: int, slots: int, *, on_disk=(), fail=(), direct=(), workers=1, gate=True
    ):
        self.device = FakeDevice(bytes_per_s=64.0)
        self.source = Bytes(self.device, units, frozenset(on_disk), fail, direct)
        if not gate:
            self.source.gate.clear()
        buffers = [self.device.allocate(SLOT_BYTES) for _ in range(slots)]
        self.copier = Copier(
            self.device, self.source, buffers, Schedule(range(units)), workers=workers
        )
        self.wrong: list[str] = []

    def use(self, unit: int, seconds: float) -> None:
        """Take a unit, compute with it for so long, give it back."""
        slot = self.copier.take(unit)
        expected = Bytes.expected(unit)
        memory = slot.buffer.numpy()[: expected.size]

        def look(when: str) -> None:
            if self.device.is_written(memory):
                self.wrong.append(f"unit {unit}: a copy into the slot at the {when} of its use")
            if not np.array_equal(memory, expected):
                self.wrong.append(f"unit {unit}: found {memory[:2]} at the {when} of its use")

        self.device.compute(seconds, lambda: look("begin"), lambda: look("end"))
        self.copier.release(slot)

    def idle(self) -> bool:
        """Whether every slot holds what it should, so that the copier's thread sleeps."""
        phases = {slot.phase for slot in self.copier._slots}
        return phases == {SlotPhase.READY} and self.copier.counters.copies >= len(
            self.copier._slots
        )

    def finish(self) -> None:
        self.copier.close()
        self.device.drain()
        assert self.wrong == []
        assert self.device.errors == []


def until(condition) -> None:
    stop = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < stop, "did not happen"
        time.sleep(0.001)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_order_of_takes_ends_with_the_right_bytes(data):
    units = data.draw(st.integers(1, 9), label="units")
    bench = Bench(
        units,
        data.draw(st.integers(1, 5), label="slots"),
        on_disk=data.draw(st.frozensets(st.integers(0, units - 1)), label="on disk"),
        fail=data.draw(st.frozensets(st.integers(0, units - 1), max_size=2), label="fail"),
        direct=data.draw(st.frozensets(st.integers(0, units - 1)), label="direct"),
        workers=data.draw(st.integers(1, 2), label="workers"),
    )
    take = st.tuples(
        st.integers(0, units - 1),
        st.sampled_from([0.0, 0.5, 3.0]),
        st.sampled_from([0.0, 0.0, 0.7, 5.0]),
        st.booleans(),
    )
    walks = data.draw(st.lists(st.lists(take, max_size=25), min_size=1, max_size=3), label="takes")
    failures: list[BaseException] = []

    def walk(takes) -> None:
        try:
            for unit, seconds, pause, hint in takes:
                if hint:
                    bench.copier.hint([unit, (unit + 3) % units])
                try:
                    bench.use(unit, seconds)
                    assert unit not in bench.source.fail
                except ReadError:
                    assert unit in bench.source.fail
                if pause:
                    bench.device.advance(pause)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=walk, args=(takes,), daemon=True) for takes in walks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a take never ended"
    assert failures == []
    bench.finish()


def test_a_cycle_is_copied_ahead_across_the_token_boundary():
    bench = Bench(6, 3)
    for _ in range(4):
        for unit in range(6):
            until(lambda unit=unit: bench.copier._ready(unit) is not None)
            bench.use(unit, 0.1)
    counters = bench.copier.counters
    assert counters.misses + counters.late == 0
    assert counters.hits == 24
    assert counters.revoked == 0
    bench.finish()


def test_the_link_never_idles_when_compute_is_shorter():
    """Three slots and a unit every second: the copy stream works all the time."""
    bench = Bench(8, 3)
    for _ in range(5):
        for unit in range(8):
            bench.use(unit, 0.2)
            until(lambda: bench.idle())
    bench.copier.close()
    bench.device.drain()
    assert bench.device.busy_s("copy") / bench.device.now > 0.95
    bench.finish()


def test_fewer_units_than_slots_are_copied_once():
    bench = Bench(3, 4)
    for _ in range(10):
        for unit in range(3):
            bench.use(unit, 0.1)
    assert bench.copier.counters.copies == 3
    bench.finish()


def test_an_unforeseen_take_revokes_speculation():
    bench = Bench(10, 2)
    bench.use(0, 0.0)
    until(lambda: {slot.unit for slot in bench.copier._slots} == {1, 2})
    bench.use(7, 0.0)
    counters = bench.copier.counters  # the first take may come before, during or after its copy
    assert counters.misses == 2 - counters.hits - counters.late
    assert counters.misses >= 1
    assert counters.revoked >= 1
    until(lambda: {slot.unit for slot in bench.copier._slots} == {8, 9})
    bench.finish()


def test_a_demand_goes_before_speculation():
    bench = Bench(20, 4, gate=False)
    until(lambda: any(slot.unit == 0 for slot in bench.copier._slots))
    taker = threading.Thread(target=bench.use, args=(15, 0.0), daemon=True)
    taker.start()
    until(lambda: bench.copier._awaited)
    bench.source.gate.set()
    taker.join(LIMIT_S)
    assert not taker.is_alive()
    assert bench.source.acquired[:2] == [0, 15]
    bench.finish()


def test_a_hint_is_loaded_before_the_schedule():
    bench = Bench(20, 3)
    bench.use(0, 0.0)
    bench.copier.hint([17, 11])
    until(lambda: {17, 11} <= {slot.unit for slot in bench.copier._slots})
    bench.use(17, 0.0)
    bench.use(11, 0.0)
    assert bench.copier.counters.hits >= 2
    bench.finish()


def test_a_failure_reaches_the_taker_and_passes():
    bench = Bench(4, 2, fail={1})
    bench.use(0, 0.0)
    for _ in range(2):
        with pytest.raises(ReadError, match="unit 1: the disk failed"):
            bench.use(1, 0.0)
    bench.use(2, 0.0)
    bench.source.fail = set()
    bench.use(1, 0.0)
    assert bench.copier.counters.failures >= 2
    bench.finish()


def test_any_exception_in_the_thread_becomes_an_error_of_the_taker(monkeypatch):
    bench = Bench(2, 1)
    bench.use(0, 0.0)
    until(lambda: bench.copier.counters.copies == 2)  # unit 1, ahead
    monkeypatch.setattr(bench.device, "copy", lambda *_: 1 / 0)
    with pytest.raises(BackendError, match=r"unit 0 could not be copied.*ZeroDivisionError"):
        bench.use(0, 0.0)
    monkeypatch.undo()
    bench.use(1, 0.0)
    bench.finish()


def test_holding_every_slot_and_asking_for_one_more_is_an_error():
    bench = Bench(5, 2)
    held = [bench.copier.take(0), bench.copier.take(1)]
    with pytest.raises(BackendError, match="holds all 2 device slots"):
        bench.copier.take(2)
    for slot in held:
        bench.copier.release(slot)
    bench.use(2, 0.0)
    bench.finish()


def test_a_closed_copier_refuses_and_frees_waiters():
    bench = Bench(3, 1, gate=False)
    found: list[BaseException] = []

    def take() -> None:
        try:
            bench.copier.take(2)
        except BackendError as error:
            found.append(error)

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    until(lambda: bench.copier._awaited)
    closer = threading.Thread(target=bench.copier.close, daemon=True)
    closer.start()
    taker.join(LIMIT_S)
    bench.source.gate.set()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert len(found) == 1
    with pytest.raises(BackendError, match="were closed; load it again"):
        bench.copier.take(0)
    bench.finish()


def test_no_slots_is_an_error():
    device = FakeDevice()
    with pytest.raises(ConfigError, match="at least one slot"):
        Copier(device, Bytes(device, 1), [], Schedule([0]))


@pytest.mark.parametrize("forgotten", ["await_in_copy", "await_in_compute", "synchronize"])
def test_the_simulation_notices_a_missing_wait(monkeypatch, forgotten):
    """Every wait matters, and the fake device would show a slip."""
    monkeypatch.setattr(FakeDevice, forgotten, lambda self, event: None)
    bench = Bench(6, 2, on_disk=frozenset({1, 2, 4}))
    for _ in range(6):
        for unit in range(6):
            bench.use(unit, 2.0)
            bench.device.advance(0.3)
    bench.copier.close()
    bench.device.drain()
    assert bench.wrong or bench.device.errors


def test_memory_is_locked_as_far_as_the_system_lets_it():
    buffers = [HostBuffer(3 * 4096), HostBuffer(8 * 4096)]
    device = FakeDevice(pinnable_bytes=4 * 4096)
    with pytest.warns(RuntimeWarning, match=r"32768 bytes .* could not be page-locked .*ulimit"):
        arena = PinnedArena(device, buffers)
    assert (arena.pinned_bytes, arena.pageable_bytes) == (3 * 4096, 8 * 4096)
    assert "limit" in str(arena.reason)
    arena.close()
    arena.close()
    assert device.pinned_bytes == 0
    whole = PinnedArena(FakeDevice(), buffers)
    assert (whole.pageable_bytes, whole.reason) == (0, None)
