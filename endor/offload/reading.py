"""One read of one unit: its bytes into their place, checked, counted and bound to tensors."""

import time
from threading import Lock

from endor.offload.ledger import Ledger
from endor.offload.state import Bound, State
from endor.storage import RecordReader, check_again, check_record


def read_unit(
    state: State, reader: RecordReader, ledger: Ledger, lock: Lock, *, verify: bool
) -> Bound:
    """Return the tensors of a unit, read into its place.

    Args:
        state: Of a unit that has a place, and is READING.
        reader: Reads records.
        ledger: Where to count, under `lock`.
        lock: The mover's; not held.
        verify: Check the checksum, and the structure when the unit is read for the first time.

    Raises:
        ReadError: The bytes did not come.
        FormatError: They are damaged.
    """
    unit, place = state.unit, state.place
    assert place is not None
    start = time.perf_counter()
    stat = reader.read(unit.record, place.array)
    stop = time.perf_counter()
    ledger.note("read", unit.name, start, stop, unit.nbytes)
    check_s = 0.0
    if verify:
        if state.checked:
            check_again(unit.record, place.array)
        else:
            check_record(unit.layout, unit.record.name, place.array)
        state.checked = True
        check_s = time.perf_counter() - stop
        ledger.note("check", unit.name, stop, stop + check_s, unit.nbytes)
    with lock:
        counters = ledger.counters
        counters.reads += 1
        counters.read_bytes += stat.nbytes
        counters.read_s += stop - start
        counters.warm_reads += state.warm
        counters.retries += stat.retries
        counters.checks += check_s > 0
        counters.check_s += check_s
    return {name: unit.layout.bind(name, place.array) for name in unit.tensors}
