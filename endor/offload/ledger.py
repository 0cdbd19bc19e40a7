"""What the engine did: counters, and the last events per unit."""

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

from endor.storage import ReadStat

EVENTS = 1 << 16
"""Events kept; older ones make room."""

EventKind = Literal[
    "read", "expand", "product", "host product", "copy", "stall", "check", "kv load", "kv save"
]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a unit or weight.

    Attributes:
        kind: `read` (disk to memory), `check` (checksum and structure), `expand` (packed to
            dense), `product` (straight from the packed form), `host product` (the same beside a
            device), `copy` (to a device, until it was issued), `stall` (a forward waited for it),
            `kv load` and `kv save` (keys and values of a layer; on a device until the copy was
            issued, or the saved bytes have come).
        name: Unit or weight.
        start_s: Beginning, on the clock of `time.perf_counter`.
        stop_s: End.
        nbytes: Packed bytes it touched.
        thread: Thread that did it.
    """

    kind: EventKind
    name: str
    start_s: float
    stop_s: float
    nbytes: int
    thread: int


@dataclass(slots=True)
class Counters:
    """Totals since the store was opened or the ledger was cleared.

    Attributes:
        reads: Records read from disk.
        read_bytes: Their bytes.
        read_s: Time spent in reads, added over the reading threads.
        retries: Reads that the operating system made us repeat.
        checks: Records whose checksum and structure were checked.
        check_s: Time that took.
        expands: Weights expanded to dense form.
        products: Products computed from the packed form.
        packed_bytes: Packed bytes that expansions and products read.
        dense_bytes: Dense bytes that expansions wrote.
        expand_s: Time spent in expansions.
        product_s: Time spent in products.
        host_products: Products of the host beside a device.
        host_bytes: Packed bytes that they read.
        host_product_s: Time spent in them.
        neurons: Inputs of products with matrices that are stored by neuron.
        active_neurons: Of these, those that were not zero for all rows.
        device_neurons: Of these, multiplied on a device.
        skipped_bytes: What was not read from disk for those that were.
        rows: Rows of first matrices of feed-forward blocks, where some were multiplied alone.
        chosen_rows: Of these, those that were.
        lossy_rows: Of `rows`, those where a predictor named the ones to be multiplied.
        lossy_rows_named: Of these, the named ones.
        neuron_bytes: Bytes of blocks that active neurons of matrices on disk needed.
        neuron_hit_bytes: Of these, in memory.
        hits: Streamed units that were in memory when they were needed.
        late: Streamed units that were on their way.
        misses: Streamed units that nobody had asked for.
        revoked: Reads ahead that were given up for a unit that was needed first.
        evicted: Kept units that made room.
        stalls: Times that a forward waited.
        stall_s: How long.
        failures: Reads or checks that failed.
        expert_uses: Experts that routers chose, layer by layer.
        expert_hits: Of these, in memory when the choice was known.
        expert_late: On their way then.
        hot_uses: Of experts that change places between host memory and VRAM, those chosen.
        hot_hits: Of these, in VRAM when the choice was known.
        exchanges: Experts copied into VRAM to stay there.
        exchange_bytes: Their bytes.
        lossy_choices: Choices of routers for few tokens, where experts may be replaced.
        lossy_replaced: Of these, by experts that were at hand.
        guesses: Experts that were guessed before their router ran.
        guessed_uses: Experts chosen where there was a guess.
        right_guesses: Of these, guessed.
        warm_reads: Experts read because of a guess.
        warm_used: Of these, used before they were given up.
        warm_wasted: Given up unused.
        warm_revoked: Guesses given up before their read began.
        kv_loads: Times that a layer's keys and values were loaded.
        kv_load_bytes: Their bytes.
        kv_load_s: Time that took.
        kv_saves: Times that keys and values were saved.
        kv_save_bytes: Their bytes.
        kv_save_s: Time that took.
        kv_hits: Layers that found theirs loaded.
        kv_misses: Layers for which nothing was to be loaded ahead.
        kv_stall_s: Time that layers waited for theirs.
    """

    reads: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    retries: int = 0
    checks: int = 0
    check_s: float = 0.0
    expands: int = 0
    products: int = 0
    packed_bytes: int = 0
    dense_bytes: int = 0
    expand_s: float = 0.0
    product_s: float = 0.0
    host_products: int = 0
    host_bytes: int = 0
    host_product_s: float = 0.0
    neurons: int = 0
    active_neurons: int = 0
    device_neurons: int = 0
    skipped_bytes: int = 0
    rows: int = 0
    chosen_rows: int = 0
    lossy_rows: int = 0
    lossy_rows_named: int = 0
    neuron_bytes: int = 0
    neuron_hit_bytes: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    revoked: int = 0
    evicted: int = 0
    stalls: int = 0
    stall_s: float = 0.0
    failures: int = 0
    expert_uses: int = 0
    expert_hits: int = 0
    expert_late: int = 0
    hot_uses: int = 0
    hot_hits: int = 0
    exchanges: int = 0
    exchange_bytes: int = 0
    lossy_choices: int = 0
    lossy_replaced: int = 0
    guesses: int = 0
    guessed_uses: int = 0
    right_guesses: int = 0
    warm_reads: int = 0
    warm_used: int = 0
    warm_wasted: int = 0
    warm_revoked: int = 0
    kv_loads: int = 0
    kv_load_bytes: int = 0
    kv_load_s: float = 0.0
    kv_saves: int = 0
    kv_save_bytes: int = 0
    kv_save_s: float = 0.0
    kv_hits: int = 0
    kv_misses: int = 0
    kv_stall_s: float = 0.0


class Ledger:
    """Counters and a ring of raw events.

    An event costs under a microsecond: a tuple in a bounded deque. Counters are written under the
    engine's lock, or, for expansions, by the thread that computes (two threads that run one model
    at once may lose a count, never an event).
    """

    __slots__ = ("_events", "counters")

    def __init__(self, events: int = EVENTS) -> None:
        self.counters = Counters()
        self._events: deque[tuple[EventKind, str, float, float, int, int]] = deque(maxlen=events)

    def note(self, kind: EventKind, name: str, start_s: float, stop_s: float, nbytes: int) -> None:
        """Add an event of this thread."""
        self._events.append((kind, name, start_s, stop_s, nbytes, threading.get_ident()))

    def note_read(
        self, name: str, start_s: float, stop_s: float, checked_s: float, stat: ReadStat
    ) -> None:
        """Add and count the read of a unit, and its check where that ended later."""
        counters = self.counters
        counters.reads += 1
        counters.read_bytes += stat.nbytes
        counters.read_s += stop_s - start_s
        counters.retries += stat.retries
        self.note("read", name, start_s, stop_s, stat.nbytes)
        if checked_s > stop_s:
            counters.checks += 1
            counters.check_s += checked_s - stop_s
            self.note("check", name, stop_s, checked_s, stat.nbytes)

    def note_product(self, name: str, start_s: float, nbytes: int) -> None:
        """Add and count a product from the packed form, which ends now, with `nbytes` of it."""
        stop_s = time.perf_counter()
        self.counters.products += 1
        self.counters.packed_bytes += nbytes
        self.counters.product_s += stop_s - start_s
        self.note("product", name, start_s, stop_s, nbytes)

    def note_stall(self, name: str, start_s: float, nbytes: int) -> None:
        """Add and count a wait for a unit, which ends now."""
        stop_s = time.perf_counter()
        self.counters.stalls += 1
        self.counters.stall_s += stop_s - start_s
        self.note("stall", name, start_s, stop_s, nbytes)

    @property
    def events(self) -> list[Event]:
        """The last events, oldest first."""
        return [Event(*fields) for fields in self._events.copy()]

    def snapshot(self) -> Counters:
        """Return a copy of the counters."""
        return Counters(**asdict(self.counters))

    def since(self, before: Counters) -> dict[str, Any]:
        """Return how much each counter grew since `before`."""
        old = asdict(before)
        return {key: value - old[key] for key, value in asdict(self.counters).items()}

    def clear(self) -> None:
        """Forget everything so far."""
        self._events.clear()
        for key, value in asdict(Counters()).items():
            setattr(self.counters, key, value)
