"""Records come back as they went, whatever the order, the disk and the memory."""

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.errors import BackendError, EndorError, ReadError, ShapeError
from endor.offload.kv.media import BLOCK_BYTES, FileAccess, FileMedium, RamMedium
from endor.offload.kv.store import KVStore
from endor.offload.kv.tasks import Task
from endor.planning.kv import SLOTS, choose_kv, kv_bytes

from ...support.fake_device import FakeDevice
from ...support.packed_files import finishes, wait_until

LAYERS, RECORD = 5, 48


class Disk:
    """Vectored reads and writes that are short, or fail, as they are told."""

    def __init__(self, directory):
        self.failures = 0
        self.short = False
        self.gate: threading.Event | None = None
        self.access = FileAccess(directory, self.read, self.write)

    def read(self, fd, buffers, offset):
        return self._do(os.preadv, fd, buffers, offset)

    def write(self, fd, buffers, offset):
        return self._do(os.pwritev, fd, buffers, offset)

    def _do(self, call, fd, buffers, offset):
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(fd, [buffers[0][:17]] if self.short else buffers, offset)


class Clock(FakeDevice):
    """A simulated device on which computing waits for the clock when it waits for an event."""

    def await_in_compute(self, event):
        super().await_in_compute(event)
        self.synchronize(event)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(3, thread_name_prefix="kv-test") as threads:
        yield threads


def records(count, seed=0, size=RECORD):
    return torch.randint(0, 256, (count, size), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def content(store, index):
    pieces = store.take(index)
    whole = torch.cat(pieces).clone() if pieces else torch.zeros((0, RECORD), dtype=torch.uint8)
    store.release(index)
    return whole


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    limit=st.sampled_from([None, 0, 2 * BLOCK_BYTES]),
    threads=st.booleans(),
    simulated=st.booleans(),
    failures=st.integers(0, 3),
    short=st.booleans(),
)
def test_any_order_gives_back_what_was_stored(
    tmp_path_factory, pool, seed, limit, threads, simulated, failures, short
):
    disk = Disk(tmp_path_factory.getbasetemp())
    disk.failures, disk.short = failures, short
    device = Clock() if simulated else None
    post = (lambda _, run: pool.submit(run)) if threads else None
    store = KVStore(LAYERS, device=device, ram_bytes=limit, post=post, access=disk.access)
    order = random.Random(seed)
    expected = [torch.zeros((0, RECORD), dtype=torch.uint8) for _ in range(LAYERS)]
    failed = 0

    def run():
        nonlocal failed
        for step in range(50):
            # Mostly a model's order, with departures.
            index = step % LAYERS if order.random() < 0.7 else order.randrange(LAYERS)
            action = order.random()
            try:
                if action < 0.55:
                    assert torch.equal(content(store, index), expected[index])
                    new = records(order.randrange(1, 5), step)
                    expected[index] = torch.cat([expected[index], new])
                    store.append(index, new)
                    store.prefetch((index + 1) % LAYERS)
                elif action < 0.7:
                    store.prefetch(index)
                elif action < 0.8:
                    left = order.randrange(len(expected[index]) + 1)
                    store.crop(index, left)
                    expected[index] = expected[index][:left]
                elif action < 0.83:
                    store.clear(index)
                    expected[index] = expected[index][:0]
                else:
                    assert torch.equal(content(store, index), expected[index])
            except EndorError:
                failed += 1
            assert store.tokens(index) == len(expected[index])
        for index in range(LAYERS):
            for _ in range(4):  # what failed before is saved in the end: nothing is lost
                try:
                    assert torch.equal(content(store, index), expected[index])
                    break
                except EndorError:
                    failed += 1
            else:
                raise AssertionError("it never came back")

    finishes(run)
    assert failed <= 2 * failures + 1
    if device is not None:
        assert device.errors == []
    store.close()
    if device is not None:
        device.drain()
        assert device.pinned_bytes == 0


def test_the_next_layer_is_there_before_it_is_taken(tmp_path, pool):
    store = KVStore(
        3, ram_bytes=0, post=lambda _, run: pool.submit(run), access=FileAccess(tmp_path)
    )
    for index in range(3):
        store.append(index, records(4, index))
    for _ in range(4):
        for index in range(3):
            store.prefetch((index + 1) % 3)
            wait_until(lambda index=index: store._layers[(index + 1) % 3].slot.task.done)
            assert torch.equal(content(store, index), records(4, index))
    counters = store.ledger.counters
    assert (counters.kv_hits, counters.kv_misses) == (11, 1)
    assert counters.kv_saves == 3
    assert counters.kv_save_bytes == 3 * 4 * RECORD
    assert {event.kind for event in store.ledger.events} >= {"kv load", "kv save"}
    store.close()


def test_what_nobody_began_runs_where_it_is_needed(tmp_path):
    store = KVStore(2, ram_bytes=0, access=FileAccess(tmp_path))
    store.append(0, records(3))
    store.prefetch(0)
    assert torch.equal(content(store, 0), records(3))
    store.close()


def test_records_stay_in_ram_without_a_move():
    store = KVStore(2)
    store.append(0, records(3))
    assert torch.equal(content(store, 0), records(3))
    assert (store.ledger.counters.kv_loads, store.file_layers) == (0, 0)
    assert store.ram_bytes > 0
    store.close()
    assert store.ram_bytes == 0


def test_layers_beyond_the_limit_go_to_files_spread_through_depth(tmp_path):
    store = KVStore(8, ram_bytes=4 * BLOCK_BYTES, access=FileAccess(tmp_path))
    for index in range(8):
        store.append(index, records(2, index))
        assert store.ram_bytes <= 4 * BLOCK_BYTES
    assert store.file_layers == 4
    store.append(0, records(2, 9))
    assert store.file_layers == 4
    spilled = [at for at, layer in enumerate(store._layers) if isinstance(layer.medium, FileMedium)]
    assert spilled == [0, 2, 4, 6]
    for index in range(1, 8):
        assert torch.equal(content(store, index), records(2, index))
    assert torch.equal(content(store, 0), torch.cat([records(2, 0), records(2, 9)]))
    store.close()


def test_too_many_waiting_records_are_saved_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("endor.offload.kv.store.PENDING_BYTES", 3 * RECORD)
    store = KVStore(3, ram_bytes=0, access=FileAccess(tmp_path))
    store.append(0, records(2))
    assert store.ledger.counters.kv_saves == 0
    store.append(1, records(2))
    assert store.ledger.counters.kv_saves == 1
    store.close()


def test_errors_name_what_to_do(tmp_path):
    disk = Disk(tmp_path)
    store = KVStore(1, ram_bytes=0, access=disk.access)
    store.append(0, records(2))
    disk.failures = 1
    with pytest.raises(BackendError, match="could not be saved"):
        store.take(0)
    content(store, 0)
    disk.failures = 1
    with pytest.raises(ReadError, match="could not be read back"):
        store.take(0)
    os.ftruncate(store._layers[0].medium._file, 5)
    with pytest.raises(ReadError, match="cut off"):
        store.take(0)
    with pytest.raises(ShapeError, match="48 bytes as before, got 16"):
        store.append(0, records(1, size=16))
    store.close()
    with pytest.raises(BackendError, match="name a directory"):
        KVStore(1, ram_bytes=0, access=FileAccess(tmp_path / "none")).append(0, records(1))


def test_files_vanish(tmp_path):
    before = open_files()
    store = KVStore(4, ram_bytes=0, access=FileAccess(tmp_path))
    for index in range(4):
        store.append(index, records(2))
    assert list(tmp_path.iterdir()) == []
    del store
    assert open_files() == before


def test_a_task_is_done_once():
    done = []
    task = Task(lambda: done.append(1))
    finishes(*[task.run] * 4)
    task.finish()
    assert done == [1]
    cancelled = Task(lambda: done.append(2))
    assert not cancelled.settle()
    cancelled.run()
    assert done == [1]

    def fail():
        raise ValueError("odd")

    broken = Task(fail)
    with pytest.raises(BackendError, match="odd"):
        broken.finish()
    assert not broken.settle()


def test_ram_in_blocks():
    medium = RamMedium(RECORD)
    per_block = BLOCK_BYTES // RECORD
    data = np.arange(3 * per_block * RECORD, dtype=np.uint32).astype(np.uint8)
    medium.write(0, data)
    views = medium.views(per_block - 1, 2 * per_block + 1)
    assert [view.nbytes for view in views] == [RECORD, per_block * RECORD, RECORD]
    assert np.array_equal(
        np.concatenate(views),
        data[(per_block - 1) * RECORD :][: sum(view.nbytes for view in views)],
    )
    medium.truncate(1)
    assert medium.ram_bytes == per_block * RECORD


def test_memory_of_a_setting():
    total, layers = 1000, 10
    assert kv_bytes("device", total, layers).compute == total
    assert kv_bytes("ram", total, layers, beside_device=True).ram == total
    assert kv_bytes("ram", total, layers, beside_device=True).compute == 100 * (1 + SLOTS)
    assert kv_bytes("disk", total, layers).compute == 100 * (1 + SLOTS)
    assert kv_bytes("disk", total, layers).disk == total
    with pytest.raises(EndorError, match="got 'auto'"):
        kv_bytes("auto", total, layers)


@pytest.mark.parametrize(
    ("compute", "ram", "expected"),
    [
        (1000, None, "device"),
        (999, None, "disk"),
        (1000, 5000, "device"),
        (300, 1000, "ram"),
        (300, 999, "disk"),
        (0, 0, "disk"),
    ],
)
def test_the_setting_that_fits(compute, ram, expected):
    assert choose_kv(1000, 10, compute_bytes=compute, ram_bytes=ram) == expected


def test_a_file_home_reads_any_part(tmp_path):
    medium = FileMedium(4, FileAccess(tmp_path))
    medium.write(0, np.arange(40, dtype=np.uint8))
    out = np.empty(8, dtype=np.uint8)
    medium.read(3, out)
    assert out.tolist() == list(range(12, 20))
    medium.close()
    medium.close()
