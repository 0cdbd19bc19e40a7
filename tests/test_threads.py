"""A pool that cannot begin says so."""

import _thread
import threading

import pytest

from endor import threads


def test_a_pool_works():
    with threads.thread_pool(2, "endor-test") as pool:
        names = {pool.submit(lambda: threading.current_thread().name).result() for _ in range(4)}
    assert all(name.startswith("endor-test") for name in names)


def test_a_thread_that_dies_before_it_begins(monkeypatch):
    """As CPython's do when memory runs out on the way to the sign of life."""
    monkeypatch.setattr(threads, "START_S", 0.2)
    start = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda _function, args: start(int, args))
    with pytest.raises(MemoryError, match="thread"):
        threads.thread_pool(1, "endor-test")


def test_a_system_that_refuses(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    with pytest.raises(MemoryError, match="can't start"):
        threads.thread_pool(1, "endor-test")
