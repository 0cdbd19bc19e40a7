"""One contract, over what moves into host memory and what moves onto a device."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from endor.errors import BackendError, ChecksumError, ReadError
from endor.offload.device_mover import DeviceMover
from endor.offload.host_mover import HostMover
from endor.offload.mover import Mover
from endor.offload.state import State
from endor.planning import Placement
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice
from ..support.packed_files import Packed, finishes, loaders, make_packed, wait_until

KINDS = ["host", "device", "device, half in vram"]


class Opened:
    """A mover, and how to see what it holds."""

    def __init__(self, kind: str, packed: Packed, *, staging: int = 2, **options: Any) -> None:
        reader = open_reader("buffered", preadv=packed.disk)
        tiers: dict[str, Any] = dict.fromkeys((unit.name for unit in packed.units), "disk")
        tiers[packed.units[0].name] = "resident"
        placement = Placement(tiers, staging * packed.largest, slots=2)
        self.packed = packed
        self.device: FakeDevice | None = None
        self.mover: Mover[Any]
        if kind == "host":
            self.mover = HostMover(packed.units, placement, reader, **options)
            return
        if "vram" in kind:
            tiers |= dict.fromkeys((unit.name for unit in packed.units[4:]), "vram")
        self.device = FakeDevice(bytes_per_s=1e9)
        self.mover = DeviceMover(self.device, packed.units, placement, reader, **options)

    @property
    def states(self) -> list[State]:
        return list(self.mover.states.values())

    def use(self, state: State, *, hold: bool = False) -> None:
        """Take a unit, look at its bytes, give it back."""
        held = self.mover.take(state)
        try:
            name = state.unit.name
            if self.device is None:
                self.packed.check(name, held)
            else:
                found: list[np.ndarray] = []
                storage = held.storage[: state.unit.nbytes]
                self.device.compute(0.0, lambda: None, lambda: found.append(storage.numpy().copy()))
                self.device.drain()
                record = state.unit.record
                expected = np.fromfile(record.path, np.uint8, record.nbytes, offset=record.offset)
                np.testing.assert_array_equal(found[0], expected)
        finally:
            self.mover.release(held, hold=hold)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def opened(kind: str, packed: Packed) -> Any:
    found = Opened(kind, packed)
    yield found
    found.mover.close()


def test_every_order_gives_every_unit_its_bytes(opened: Opened) -> None:
    states = opened.states
    for order in (states, states[::-1], states[::2] + states[1::2], states):
        for state in order:
            opened.use(state)
    if opened.device is not None:
        assert opened.device.errors == []


def test_states_are_named_and_numbered_as_the_units(opened: Opened) -> None:
    assert [state.unit for state in opened.states] == list(opened.packed.units)
    assert opened.mover.streams
    assert 0 < opened.mover.staging_bytes <= 2 * opened.packed.largest
    assert opened.mover.held_nbytes >= opened.mover.staging_bytes


def test_a_kept_unit_is_given_back_by_the_next_take_or_drop(opened: Opened) -> None:
    first, second = opened.states[1], opened.states[2]
    for _ in range(3):
        opened.use(first, hold=True)
    opened.use(second)
    opened.use(first, hold=True)
    opened.mover.drop()
    opened.mover.drop()
    for state in opened.states:
        opened.use(state)


def test_hints_and_guesses_change_no_bytes(opened: Opened) -> None:
    states = opened.states
    opened.mover.preload()
    for at, state in enumerate(states):
        opened.mover.hint(states[at : at + 3], group=at)
        opened.mover.warm(states[::-2])
        opened.use(state)
    opened.mover.forget(states[3:5])
    for state in states:
        opened.use(state)


def test_threads_share_a_mover(opened: Opened) -> None:
    def walk(order: list[State]) -> Callable[[], None]:
        def run() -> None:
            for state in order:
                opened.mover.release(opened.mover.take(state))

        return run

    states = opened.states
    finishes(walk(states), walk(states[::-1]), walk(states[::3] * 3))


def use_all(opened: Opened, states: list[State]) -> None:
    for state in states:
        opened.use(state)


def test_a_failed_read_is_raised_once_and_tried_again(kind: str, packed: Packed) -> None:
    opened = Opened(kind, packed)
    state = opened.states[3]
    try:
        opened.mover.preload()
        wait_until(lambda: packed.disk.calls > 0)
        packed.disk.failures = 1000
        with pytest.raises(ReadError):
            use_all(opened, [*opened.states[1:4], *opened.states[1:4]])
        packed.disk.failures = 0
        for _ in range(2):
            for other in opened.states[1:4]:
                try:
                    opened.use(other)
                except ReadError:  # of a read ahead that had failed before
                    opened.use(other)
        opened.use(state)
    finally:
        opened.mover.close()


def test_damage_is_raised(kind: str, tmp_path: Any) -> None:
    packed = make_packed(tmp_path / "weights.safetensors", [(64, 64)] * 3)
    data = bytearray(packed.path.read_bytes())
    record = packed.units[1].record
    data[record.offset + 5] ^= 4
    packed.path.write_bytes(data)
    opened = Opened(kind, replace(packed, layout=FileLayout.read(packed.path)))
    try:
        with pytest.raises(ChecksumError, match=packed.units[1].name):
            opened.use(opened.states[1])
        opened.use(opened.states[2])
    finally:
        opened.mover.close()


def test_tasks_run_on_its_threads(opened: Opened) -> None:
    done = threading.Event()
    opened.mover.post(0, done.set)
    assert done.wait(60)


def test_closing_ends_every_use_and_every_thread(kind: str, packed: Packed) -> None:
    others = loaders()
    opened = Opened(kind, packed)
    opened.use(opened.states[1])
    opened.mover.close()
    opened.mover.close()
    assert loaders() <= others
    for state in opened.states:
        with pytest.raises(BackendError, match="closed"):
            opened.mover.take(state)
    opened.mover.post(0, lambda: pytest.fail("a closed mover runs nothing"))
    if opened.device is not None:
        assert opened.device.pinned_bytes == 0
