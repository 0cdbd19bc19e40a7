import threading
import time
from contextlib import closing

import numpy as np
import pytest

from endor.checkpoint.pipeline import BufferPool, OrderedWork, ScratchPool, budget_for


def work_of(function, *, cost=lambda task: 1, budget=10, threads=3, prepare=None):
    return OrderedWork(function, cost, threads=threads, budget_bytes=budget, prepare=prepare)


def test_results_come_in_order():
    def slow(task):
        time.sleep(0.002 * (task % 3))
        return task * task

    assert list(work_of(slow).run(range(40))) == [(task, task * task) for task in range(40)]
    assert list(work_of(slow).run([])) == []


def test_budget_is_kept():
    lock = threading.Lock()
    held = most = 0

    def start(task):
        nonlocal held, most
        with lock:
            held += task
            most = max(most, held)
        return task

    for task, _ in work_of(start, cost=lambda task: task, budget=10, threads=8).run(
        [3, 4, 4, 9, 1, 25, 2, 2, 2, 10] * 3
    ):
        with lock:
            held -= task
    assert most <= 25  # a task that exceeds the budget runs alone


def test_an_error_ends_it():
    seen = []

    def fail(task):
        seen.append(task)
        if task == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        list(work_of(fail).run(range(1000)))
    assert len(seen) < 1000


def test_leaving_early_stops_the_workers():
    seen = []
    with closing(work_of(seen.append).run(range(1000))) as results:
        next(results)
    count = len(seen)
    time.sleep(0.01)
    assert count == len(seen) < 1000
    assert not [t for t in threading.enumerate() if t.name.startswith("endor-checkpoint")]


def test_prepare_runs_in_order_on_the_consumers_thread():
    prepared = []

    def prepare(task):
        prepared.append((task, threading.current_thread()))

    list(work_of(lambda task: None, prepare=prepare).run(range(20)))
    assert prepared == [(task, threading.main_thread()) for task in range(20)]


def test_buffers_are_used_again():
    pool = BufferPool(8 << 20)
    first = pool.take(1000)
    assert first.nbytes >= 1000
    pool.give(first)
    assert pool.take(500) is first
    second = pool.take(1)
    assert second is not first
    assert not np.shares_memory(first.array, second.array)


def test_free_buffers_do_not_exceed_the_limit():
    pool = BufferPool(4 << 20)
    buffers = [pool.take(1 << 20) for _ in range(4)]
    for buffer in buffers:
        pool.give(buffer)
    large = pool.take(4 << 20)
    pool.give(large)
    assert pool.take(1) is large


def test_scratch_is_used_again_within_the_limit():
    pool = ScratchPool(1000)
    scratch = pool.take()
    scratch.take("values", (500,), np.dtype("u1"))
    pool.give(scratch)
    assert pool.take() is scratch
    scratch.take("values", (2000,), np.dtype("u1"))
    pool.give(scratch)
    assert pool.take() is not scratch


def test_budget_for():
    assert budget_for(1) == 96 << 20
    assert budget_for(1 << 30) == 1 << 30
