"""Page-locked memory: whole pages, once, and copies that stay inside one registration."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.offload import pinned
from endor.offload.device import allocate_for_copies
from endor.offload.page_locks import PAGE_BYTES
from endor.offload.pinned import PinnedArena
from endor.storage import HostBuffer

from ..support.fake_device import FakeDevice

PAGES = 11


def copied(device: FakeDevice, source: np.ndarray) -> None:
    """Copy to the device and back, and see that both arrive."""
    there = allocate_for_copies(device, source.nbytes)
    back = np.zeros_like(source)
    with device.current():
        device.copy(there, source)
        device.drain()
        device.copy_back(back, there)
        device.drain()
    assert np.array_equal(back, source)


@settings(max_examples=40, deadline=None)
@given(
    chunk=st.integers(1, PAGES + 1),
    limit=st.integers(0, PAGES),
    start=st.integers(0, PAGES * PAGE_BYTES - 1),
    length=st.integers(1, PAGES * PAGE_BYTES),
)
def test_copies_from_anywhere_in_an_arena(chunk: int, limit: int, start: int, length: int) -> None:
    buffer = HostBuffer(PAGES * PAGE_BYTES - 100)
    buffer.array[:] = np.arange(buffer.nbytes) % 251
    device = FakeDevice(pinnable_bytes=limit * PAGE_BYTES)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what could not be locked
        patch.setattr(pinned, "CHUNK_BYTES", chunk * PAGE_BYTES)
        arena = PinnedArena(device, [buffer])
    start = min(start, buffer.nbytes - 1)
    copied(device, buffer.array[start : start + length])
    arena.close()
    assert device.errors == []
    assert device.pinned_bytes == 0


def test_the_simulated_device_refuses_what_cuda_may() -> None:
    device = FakeDevice()
    buffer = HostBuffer(4 * PAGE_BYTES)
    first, rest = buffer.array[:PAGE_BYTES], buffer.array[PAGE_BYTES:]
    assert device.pin(first) is None
    assert "712" in (device.pin(buffer.array) or "")
    assert "does not begin at a page" in (device.pin(buffer.array[100:200]) or "")
    there = device.allocate(buffer.nbytes)
    with device.current():
        device._copy_piece(there, buffer.array)
    assert device.errors == ["a copy crosses the border of a registration"]
    device.errors.clear()
    device._unregister(int(rest.ctypes.data))
    assert "713" in device.errors.pop()
    with pytest.raises(AssertionError, match="never locked"):
        device.unpin(rest)


def test_each_copy_needs_its_device() -> None:
    one, two = FakeDevice(index=0), FakeDevice(index=1)
    source = np.ones(10, np.uint8)
    with one.current(), two.current():
        two.copy(two.allocate(10), source)
        one.copy(one.allocate(10), source)
    assert (len(one.errors), len(two.errors)) == (1, 0)


def test_memory_handed_on_is_not_filled_before_its_last_use() -> None:
    source = np.ones(10, np.uint8)
    for ordered in (False, True):
        device = FakeDevice()
        device.compute(1.0, lambda: None, lambda: None)
        there = allocate_for_copies(device, 10) if ordered else device.allocate(10)
        with device.current():
            device.copy(there, source)
        device.drain()
        assert (device.errors == []) == ordered
        assert device.now >= 1.0
