"""No order of takes, no budget and no disk makes the mover hang or give wrong bytes."""

import os
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endor.errors import (
    BackendError,
    BudgetError,
    ChecksumError,
    ConfigError,
    ReadError,
    TruncatedError,
)
from endor.offload.state import Phase
from endor.planning import Placement

from ..support.packed_files import finishes, loaders, make_packed, wait_until

STEPS = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same matrices twice: all in a fixed order, and with a few that are routed."""
    shapes = [(64, 96), (96, 64), (128, 128), (64, 64), (96, 96), (64, 160), (32, 64), (200, 64)]
    folder = tmp_path_factory.mktemp("mover")
    return {
        routed: make_packed(folder / f"{len(routed)}.safetensors", shapes, routed=routed)
        for routed in ((), (2, 3, 4))
    }


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1 << 30),
    routed=st.sampled_from([(), (2, 3, 4)]),
    extra=st.integers(0, 60_000),
    resident=st.sets(st.integers(0, 7), max_size=6),
    takers=st.integers(1, 3),
    reads=st.integers(1, 3),
    failures=st.integers(0, 4),
    slow=st.booleans(),
    short=st.booleans(),
    hints=st.booleans(),
)
def test_any_order_gives_right_bytes(
    files, seed, routed, extra, resident, takers, reads, failures, slow, short, hints
):
    packed = files[routed]
    packed.disk.failures, packed.disk.short = failures, short
    packed.disk.delay_s = (lambda: random.random() * 2e-3) if slow else None
    # The area always holds the largest unit; the rest is luck, down to a single 4096-byte page.
    staging = (packed.largest + extra) // 4096 * 4096
    mover = packed.mover(packed.placement(staging, resident), threads=reads)
    failed = []

    def take_some(order: random.Random) -> None:
        cycle = list(packed.units)
        for step in range(STEPS):
            # Mostly the order of a model, with departures: another graph, a router, a repetition.
            unit = cycle[step % len(cycle)] if order.random() < 0.7 else order.choice(cycle)
            if hints and order.random() < 0.3:
                mover.hint((mover.states[u.name] for u in order.sample(cycle, 3)), group=step % 2)
            if hints and order.random() < 0.3:
                mover.warm(mover.states[u.name] for u in order.sample(cycle, 3))
            try:
                packed.check(unit.name, mover.take(mover.states[unit.name]))
            except ReadError as error:
                failed.append(error)
                continue
            if order.random() < 0.7:
                mover.drop()
        mover.drop()

    works = [lambda at=at: take_some(random.Random(seed + at)) for at in range(takers)]
    try:
        finishes(*works)
    finally:
        packed.disk.failures, packed.disk.delay_s, packed.disk.short = 0, None, False
        mover.close()
    assert len(failed) <= failures * takers
    assert mover.ledger.counters.failures <= failures


def test_the_second_pass_is_read_ahead(packed):
    mover = packed.mover(packed.placement(packed.largest * 3))
    for _ in range(4):
        for unit in packed.units:
            packed.check(unit.name, mover.take(mover.states[unit.name]))
            mover.drop()
    counters = mover.ledger.counters
    assert counters.misses == 0
    assert counters.hits + counters.late == 4 * len(packed.units)
    assert counters.checks == counters.reads > len(packed.units), "checked whenever it is read"
    assert counters.reads >= 4 * len(packed.units)
    mover.close()


def test_reads_cross_the_end_of_the_order(packed):
    """After the last unit the first ones are fetched again, before anyone asks."""
    mover = packed.mover(packed.placement(packed.largest * 2))
    for unit in packed.units:
        mover.take(mover.states[unit.name])
        mover.drop()
    first = mover.states[packed.units[0].name]
    wait_until(lambda: first.phase is Phase.READY)
    mover.close()


def test_a_demand_revokes_speculation(packed):
    """The area is full of guesses, none of them read yet; a demand goes first all the same."""
    packed.disk.gate = threading.Event()
    mover = packed.mover(packed.placement(packed.largest), threads=1)
    wait_until(lambda: packed.disk.calls > 0)  # one guess is being read, the others are queued
    last = packed.units[-1]
    taker = threading.Thread(
        target=lambda: packed.check(last.name, mover.take(mover.states[last.name])), daemon=True
    )
    taker.start()
    wait_until(lambda: mover.states[last.name].waiters > 0)
    packed.disk.gate.set()
    taker.join(60)
    assert not taker.is_alive()
    assert mover.ledger.counters.revoked > 0
    packed.disk.gate = None
    mover.close()


def test_kept_units_are_not_read_twice(tmp_path):
    packed = make_packed(tmp_path / "a.safetensors", [(64, 64)] * 6, routed=range(6))
    mover = packed.mover(packed.placement(packed.nbytes))
    for _ in range(3):
        for unit in packed.units:
            mover.take(mover.states[unit.name])
            mover.drop()
    assert mover.ledger.counters.reads == 6
    assert mover.ledger.counters.hits == 12
    mover.close()


def test_hints_bring_routed_units(tmp_path):
    packed = make_packed(tmp_path / "a.safetensors", [(64, 64)] * 6, routed=range(6))
    mover = packed.mover(packed.placement(packed.nbytes // 2))
    chosen = [mover.states[name] for name in ("w1", "w4")]
    mover.hint(chosen)
    wait_until(lambda: all(state.phase is Phase.READY for state in chosen))
    assert mover.states["w0"].phase is Phase.ABSENT
    mover.close()


def test_an_error_is_raised_once_and_read_again(packed):
    packed.disk.failures = 1
    mover = packed.mover(threads=1)
    state = mover.states["w0"]
    with pytest.raises(ReadError, match="endor-00001-of-00001"):
        mover.take(state)
    packed.check("w0", mover.take(state))
    mover.close()


def test_damage_is_found_at_every_first_read(packed):
    record = packed.units[3].record
    with packed.path.open("r+b") as file:
        file.seek(record.offset + 300)
        byte = file.read(1)[0]
        file.seek(record.offset + 300)
        file.write(bytes([byte ^ 0x10]))
    mover = packed.mover()
    for _ in range(2):
        with pytest.raises(ChecksumError, match="w3"):
            mover.take(mover.states["w3"])
    packed.check("w2", mover.take(mover.states["w2"]))
    mover.close()


def test_verification_can_be_switched_off(packed):
    mover = packed.mover(verify=False)
    packed.check("w0", mover.take(mover.states["w0"]))
    assert mover.ledger.counters.checks == 0
    mover.close()


def test_a_file_that_shrinks_while_it_runs(packed):
    mover = packed.mover()
    for unit in packed.units:
        mover.take(mover.states[unit.name])
    os.truncate(packed.path, packed.units[4].record.offset)

    def run() -> None:
        for unit in packed.units:
            packed.check(unit.name, mover.take(mover.states[unit.name]))

    with pytest.raises(TruncatedError):
        run()
    mover.close()


def test_residents_are_read_once(packed):
    mover = packed.mover(packed.placement(0, resident=range(8)))
    mover.preload()
    for _ in range(2):
        for unit in packed.units:
            state = mover.states[unit.name]
            assert state.fixed is not None
            packed.check(unit.name, mover.take(state))
    counters = mover.ledger.counters
    assert (counters.reads, counters.read_bytes) == (8, packed.nbytes)
    assert not mover.streams
    mover.close()


def test_closing_ends_threads_and_waits(packed):
    others = loaders()
    packed.disk.gate = threading.Event()
    mover = packed.mover(threads=2)
    raised = []

    def take() -> None:
        try:
            mover.take(mover.states["w7"])
        except BackendError as error:
            raised.append(error)

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    wait_until(lambda: mover.states["w7"].waiters > 0)
    threading.Timer(0.05, packed.disk.gate.set).start()
    mover.close()
    mover.close()
    taker.join(60)
    assert len(raised) == 1
    assert loaders() <= others
    with pytest.raises(BackendError, match="closed"):
        mover.take(mover.states["w0"])
    mover.drop()
    mover.hint([mover.states["w0"]])


def test_an_interrupt_while_waiting_leaves_the_engine_usable(packed):
    mover = packed.mover()
    wait, calls = mover._done.wait, []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    packed.disk.gate = threading.Event()
    mover._done.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        mover.take(mover.states["w5"])
    packed.disk.gate.set()
    for unit in packed.units:
        packed.check(unit.name, mover.take(mover.states[unit.name]))
    assert all(state.waiters == 0 for state in mover.states.values())
    mover.close()


def test_a_forked_child_gets_an_error(packed):
    mover = packed.mover(packed.placement(resident=[0]))
    mover.preload()
    child = os.fork()
    if not child:
        code = 1
        try:
            packed.check("w0", mover.take(mover.states["w0"]))  # residents are inherited
            mover.take(mover.states["w1"])
        except BackendError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mover.close()


def test_placements_are_checked(packed):
    with pytest.raises(BudgetError, match="staging"):
        packed.mover(packed.placement(packed.largest - 4096))
    with pytest.raises(ConfigError, match="w0"):
        packed.mover(Placement({}, packed.largest))
