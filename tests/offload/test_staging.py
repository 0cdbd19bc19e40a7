"""Staging never hands out a byte twice; scratch is per thread."""

import itertools
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from endor.offload.host_weight import Scratch
from endor.offload.staging import Staging

PAGE = 4096


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 99)), max_size=60))
def test_ranges_are_disjoint_and_all_come_back(steps):
    staging = Staging(16 * PAGE)
    live = []
    for pages, give, which in steps:
        if give and live:
            staging.give(live.pop(which % len(live)))
        elif (place := staging.take(pages * PAGE)) is not None:
            assert place.array.nbytes == pages * PAGE
            assert place.array.ctypes.data % PAGE == 0
            live.append(place)
        spans = sorted((place.start, place.stop) for place in live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert staging.free_bytes == 16 * PAGE - sum(stop - start for start, stop in spans)
    for place in live:
        staging.give(place)
    whole = staging.take(16 * PAGE)
    assert whole is not None
    assert (whole.start, whole.stop) == (0, 16 * PAGE)


def test_an_empty_area_has_no_memory():
    staging = Staging(0)
    assert staging.take(PAGE) is None
    assert staging.buffer is None


def test_scratch_views_are_made_once_per_thread():
    scratch = Scratch(64)
    made = []

    def make(buffer):
        made.append(buffer)
        return buffer.numpy()

    first = scratch.view(0, make)
    assert scratch.view(0, make) is first
    other = []
    thread = threading.Thread(target=lambda: other.append(scratch.view(0, make)))
    thread.start()
    thread.join()
    assert not np.shares_memory(first, other[0])
    assert len(made) == 2
    assert np.shares_memory(scratch.view(1, lambda buffer: buffer[8:].numpy()), first)
