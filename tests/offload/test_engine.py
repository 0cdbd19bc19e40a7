"""No order of takes, no budget and no disk makes the engine hang or give wrong bytes."""

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
from endor.offload import Phase
from endor.planning import Placement

from ..support.packed_files import finishes, loaders, make_packed, wait_until

STEPS = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same matrices twice: all in a fixed order, and with a few that are routed."""
    shapes = [(64, 96), (96, 64), (128, 128), (64, 64), (96, 96), (64, 160), (32, 64), (200, 64)]
    folder = tmp_path_factory.mktemp("engine")
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
    engine = packed.engine(packed.placement(staging, resident), threads=reads)
    failed = []

    def take_some(order: random.Random) -> None:
        cycle = list(packed.units)
        for step in range(STEPS):
            # Mostly the order of a model, with departures: another graph, a router, a repetition.
            unit = cycle[step % len(cycle)] if order.random() < 0.7 else order.choice(cycle)
            if hints and order.random() < 0.3:
                engine.hint((engine.states[u.name] for u in order.sample(cycle, 3)), group=step % 2)
            if hints and order.random() < 0.3:
                engine.warm(engine.states[u.name] for u in order.sample(cycle, 3))
            try:
                packed.check(unit.name, engine.take(engine.states[unit.name]))
            except ReadError as error:
                failed.append(error)
                continue
            if order.random() < 0.7:
                engine.drop()
        engine.drop()

    works = [lambda at=at: take_some(random.Random(seed + at)) for at in range(takers)]
    try:
        finishes(*works)
    finally:
        packed.disk.failures, packed.disk.delay_s, packed.disk.short = 0, None, False
        engine.close()
    assert len(failed) <= failures * takers
    assert engine.ledger.counters.failures <= failures


def test_the_second_pass_is_read_ahead(packed):
    engine = packed.engine(packed.placement(packed.largest * 3))
    for _ in range(4):
        for unit in packed.units:
            packed.check(unit.name, engine.take(engine.states[unit.name]))
            engine.drop()
    counters = engine.ledger.counters
    assert counters.misses == 0
    assert counters.hits + counters.late == 4 * len(packed.units)
    assert counters.checks == counters.reads > len(packed.units), "checked whenever it is read"
    assert counters.reads >= 4 * len(packed.units)
    engine.close()


def test_reads_cross_the_end_of_the_order(packed):
    """After the last unit the first ones are fetched again, before anyone asks."""
    engine = packed.engine(packed.placement(packed.largest * 2))
    for unit in packed.units:
        engine.take(engine.states[unit.name])
        engine.drop()
    first = engine.states[packed.units[0].name]
    wait_until(lambda: first.phase is Phase.READY)
    engine.close()


def test_a_demand_revokes_speculation(packed):
    """The area is full of guesses, none of them read yet; a demand goes first all the same."""
    packed.disk.gate = threading.Event()
    engine = packed.engine(packed.placement(packed.largest), threads=1)
    wait_until(lambda: packed.disk.calls > 0)  # one guess is being read, the others are queued
    last = packed.units[-1]
    taker = threading.Thread(
        target=lambda: packed.check(last.name, engine.take(engine.states[last.name])), daemon=True
    )
    taker.start()
    wait_until(lambda: engine.states[last.name].waiters > 0)
    packed.disk.gate.set()
    taker.join(60)
    assert not taker.is_alive()
    assert engine.ledger.counters.revoked > 0
    packed.disk.gate = None
    engine.close()


def test_kept_units_are_not_read_twice(tmp_path):
    packed = make_packed(tmp_path / "a.safetensors", [(64, 64)] * 6, routed=range(6))
    engine = packed.engine(packed.placement(packed.nbytes))
    for _ in range(3):
        for unit in packed.units:
            engine.take(engine.states[unit.name])
            engine.drop()
    assert engine.ledger.counters.reads == 6
    assert engine.ledger.counters.hits == 12
    engine.close()


def test_hints_bring_routed_units(tmp_path):
    packed = make_packed(tmp_path / "a.safetensors", [(64, 64)] * 6, routed=range(6))
    engine = packed.engine(packed.placement(packed.nbytes // 2))
    chosen = [engine.states[name] for name in ("w1", "w4")]
    engine.hint(chosen)
    wait_until(lambda: all(state.phase is Phase.READY for state in chosen))
    assert engine.states["w0"].phase is Phase.ABSENT
    engine.close()


def test_an_error_is_raised_once_and_read_again(packed):
    packed.disk.failures = 1
    engine = packed.engine(threads=1)
    state = engine.states["w0"]
    with pytest.raises(ReadError, match="endor-00001-of-00001"):
        engine.take(state)
    packed.check("w0", engine.take(state))
    engine.close()


def test_damage_is_found_at_every_first_read(packed):
    record = packed.units[3].record
    with packed.path.open("r+b") as file:
        file.seek(record.offset + 300)
        byte = file.read(1)[0]
        file.seek(record.offset + 300)
        file.write(bytes([byte ^ 0x10]))
    engine = packed.engine()
    for _ in range(2):
        with pytest.raises(ChecksumError, match="w3"):
            engine.take(engine.states["w3"])
    packed.check("w2", engine.take(engine.states["w2"]))
    engine.close()


def test_verification_can_be_switched_off(packed):
    engine = packed.engine(verify=False)
    packed.check("w0", engine.take(engine.states["w0"]))
    assert engine.ledger.counters.checks == 0
    engine.close()


def test_a_file_that_shrinks_while_it_runs(packed):
    engine = packed.engine()
    for unit in packed.units:
        engine.take(engine.states[unit.name])
    os.truncate(packed.path, packed.units[4].record.offset)

    def run() -> None:
        for unit in packed.units:
            packed.check(unit.name, engine.take(engine.states[unit.name]))

    with pytest.raises(TruncatedError):
        run()
    engine.close()


def test_residents_are_read_once(packed):
    engine = packed.engine(packed.placement(0, resident=range(8)))
    engine.preload()
    for _ in range(2):
        for unit in packed.units:
            state = engine.states[unit.name]
            assert state.fixed is not None
            packed.check(unit.name, engine.take(state))
    counters = engine.ledger.counters
    assert (counters.reads, counters.read_bytes) == (8, packed.nbytes)
    assert not engine.streams
    engine.close()


def test_closing_ends_threads_and_waits(packed):
    others = loaders()
    packed.disk.gate = threading.Event()
    engine = packed.engine(threads=2)
    raised = []

    def take() -> None:
        try:
            engine.take(engine.states["w7"])
        except BackendError as error:
            raised.append(error)

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    wait_until(lambda: engine.states["w7"].waiters > 0)
    threading.Timer(0.05, packed.disk.gate.set).start()
    engine.close()
    engine.close()
    taker.join(60)
    assert len(raised) == 1
    assert loaders() <= others
    with pytest.raises(BackendError, match="closed"):
        engine.take(engine.states["w0"])
    engine.drop()
    engine.hint([engine.states["w0"]])


def test_an_interrupt_while_waiting_leaves_the_engine_usable(packed):
    engine = packed.engine()
    wait, calls = engine._done.wait, []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    packed.disk.gate = threading.Event()
    engine._done.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.take(engine.states["w5"])
    packed.disk.gate.set()
    for unit in packed.units:
        packed.check(unit.name, engine.take(engine.states[unit.name]))
    assert all(state.waiters == 0 for state in engine.states.values())
    engine.close()


def test_a_forked_child_gets_an_error(packed):
    engine = packed.engine(packed.placement(resident=[0]))
    engine.preload()
    child = os.fork()
    if not child:
        code = 1
        try:
            packed.check("w0", engine.take(engine.states["w0"]))  # residents are inherited
            engine.take(engine.states["w1"])
        except BackendError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.close()


def test_placements_are_checked(packed):
    with pytest.raises(BudgetError, match="staging"):
        packed.engine(packed.placement(packed.largest - 4096))
    with pytest.raises(ConfigError, match="w0"):
        packed.engine(Placement({}, packed.largest))
