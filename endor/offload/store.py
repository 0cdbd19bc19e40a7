"""The weights of one model, ready to multiply by: expanded on demand, or used packed."""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from endor import kernels
from endor.codecs import DType
from endor.errors import ConfigError, DTypeError
from endor.offload.engine import Engine
from endor.offload.ledger import Ledger
from endor.offload.memory import Scratch
from endor.offload.state import State
from endor.packed import bits_of, tensor_of, torch_dtype
from endor.planning.products import NEVER, PANEL, PRODUCT_ROWS, Products
from endor.planning.tiers import Placement
from endor.planning.units import Part, Unit, WeightSpec, stored_dtype
from endor.storage import FileLayout, RecordReader

PRODUCT_DTYPES = {"BF16", "F16", "F32"}


class Owner:
    """What a store and its weights share: when the last of them is gone, the engine is closed.

    Weights do not refer to their store, for that would be a cycle: `del model` would then leave
    the packed weights in memory until the garbage collector comes by.
    """

    def __init__(self, engine: Engine) -> None:
        weakref.finalize(self, _retire, engine).atexit = False


class Store:
    """Owns the engine of one model and hands out its weights.

    Copying a model shares the store: the weights never change. Pickling is refused. When the last
    model that uses it is gone, reading stops and the memory is released.

    Args:
        layouts: The checkpoint's files.
        units: What moves; from `collect_units`.
        specs: What is multiplied by, and in which torch dtype.
        placement: Tier per unit.
        reader: Reads records; the store closes it.
        verify: Check each record whenever it is read into host memory.
        threads: Reads in flight.
        unpacked: Packed tensors that no layer can use packed: expanded when the model was loaded.
        products: How weights are multiplied by layers that need not be exact.
    """

    owner: Owner | None = None

    def __init__(
        self,
        layouts: Sequence[FileLayout],
        units: Sequence[Unit],
        specs: Iterable[tuple[WeightSpec, torch.dtype]],
        placement: Placement,
        reader: RecordReader,
        *,
        verify: bool = True,
        threads: int = 2,
        unpacked: Sequence[str] = (),
        products: Products | None = None,
    ) -> None:
        self.unpacked = tuple(unpacked)
        self.products = products or Products()
        self.layouts = tuple(layouts)
        self.units = tuple(units)
        self.placement: Placement = placement
        specs = list(specs)
        self.scratch = Scratch(scratch_bytes(layouts, specs))
        self.engine = Engine(units, placement, reader, verify=verify, threads=threads)
        self.owner = Owner(self.engine)
        self.reader = reader
        home = {tensor: self.engine.states[unit.name] for unit in units for tensor in unit.tensors}
        self.weights = {
            spec.name: Weight(
                self,
                at,
                spec,
                [home[part.tensor] for part in spec.parts],
                stored_dtype(layouts, spec),
                dtype,
            )
            for at, (spec, dtype) in enumerate(specs)
        }

    @property
    def ledger(self) -> Ledger:
        return self.engine.ledger

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all packed records."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that the weights take: packed, expanded for good, and staging."""
        tiers = self.placement.tiers
        kept = sum(unit.dense_nbytes for unit in self.units if tiers[unit.name] == "dense")
        packed = sum(unit.nbytes for unit in self.units if tiers[unit.name] == "resident")
        return packed + kept + self.engine.staging_bytes

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel for weight in self.weights.values())

    def preload(self) -> None:
        """Wait until every resident unit is in memory, and expand what is kept expanded.

        Errors as for `Engine.take`.
        """
        self.engine.preload()
        for weight in self.weights.values():
            if weight.keeps_dense:
                weight.dense()

    def close(self) -> None:
        """Stop reading and release the memory; using a weight afterwards is a BackendError."""
        self.engine.close()
        for weight in self.weights.values():
            weight.close()

    def count_tiers(self) -> dict[str, dict[str, int]]:
        """Return `units` and packed `nbytes` of every tier that holds any."""
        tiers: dict[str, dict[str, int]] = {}
        for unit in self.units:
            entry = tiers.setdefault(self.placement.tiers[unit.name], {"units": 0, "nbytes": 0})
            entry["units"] += 1
            entry["nbytes"] += unit.nbytes
        return tiers

    def report(self) -> dict[str, Any]:
        """Return where the units live, what the reader is, and the counters; all plain data."""
        return {
            "tiers": self.count_tiers(),
            "staging_bytes": self.engine.staging_bytes,
            "scratch_bytes": self.scratch.nbytes,
            "unpacked_at_load": list(self.unpacked),
            "reader": self.reader.describe(),
            "counters": self.ledger.since(type(self.ledger.counters)()),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_pickle()


class Weight:
    """A dense matrix that exists in packed form.

    Attributes:
        name: Its name in the model.
        engine: Brings its units.
        shape: Dense shape.
        dtype: Element type that callers see; the stored one is converted when it differs.
        kept: The dense matrix itself, in the tier `dense`, once it was expanded.
        product_rows: Input rows up to which `product` is to be used; 0 where it cannot be.
        wide_rows: Input rows from which `wide` is to be used.
    """

    __slots__ = (
        "_call",
        "_convert",
        "_item",
        "_keep",
        "_key",
        "_owner",
        "_packed_nbytes",
        "_parts",
        "_scratch",
        "_whole",
        "dtype",
        "engine",
        "kept",
        "name",
        "numel",
        "product_rows",
        "shape",
        "states",
        "wide_rows",
    )

    def __init__(
        self,
        store: Store,
        key: int,
        spec: WeightSpec,
        states: Sequence[State],
        item: DType,
        dtype: torch.dtype,
    ) -> None:
        self.engine = store.engine
        self.name = spec.name
        self.shape = torch.Size(spec.shape)
        self.numel = self.shape.numel()
        self._owner = store.owner
        self._scratch = store.scratch
        self.dtype = dtype
        self.kept: torch.Tensor | None = None
        self.states = tuple(dict.fromkeys(states))
        self._key = key
        self._item = item
        self._convert = torch_dtype(item) != dtype
        self._parts = tuple(zip(spec.parts, states, strict=True))
        self._keep = all(store.placement.tiers[state.unit.name] == "dense" for state in self.states)
        self._whole = all(self._covers_rows(part, state) for part, state in self._parts)
        self._packed_nbytes = sum(_share(part, state) for part, state in self._parts)
        self._call: Callable[[int, int, int], None] | None = None
        chosen = store.products
        self.product_rows = 0
        if self.multiplies_packed:
            self.product_rows = min(
                chosen.packed_rows.get(state.unit.name, PRODUCT_ROWS) for state in self.states
            )
        self.wide_rows = chosen.wide_rows if dtype.itemsize == 2 else NEVER

    def close(self) -> None:
        """Let go of what refers to the store's memory."""
        self.kept = self._call = None

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in this thread's scratch: valid until its next weight is expanded.

        Args:
            hold: Keep its unit for the thread's next weight, which is in the same one; the caller
                sees to `Engine.drop`.
        """
        if self.kept is not None:
            return self.kept
        if self._keep:
            self.kept = self.fresh(hold=hold)
            return self.kept
        flat, matrix, converted = self._scratch.view(self._key, self._views)
        self._expand(flat, hold)
        return matrix if converted is None else converted.copy_(matrix)

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in memory of its own; `hold` as for `dense`."""
        if self.kept is not None:
            return self.kept.clone()
        matrix = torch.empty(self.shape, dtype=torch_dtype(self._item))
        self._expand(bits_of(matrix).reshape(-1), hold)
        return matrix.to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the dense matrix is."""
        return torch.device("cpu")

    @property
    def keeps_dense(self) -> bool:
        """Whether the matrix stays expanded once it was."""
        return self._keep

    @property
    def multiplies_packed(self) -> bool:
        """Whether `product` applies: rows of whole stored matrices, in a type the kernels take."""
        return self._whole and not self._convert and self.kept is None and not self._keep

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` from the packed form, in float32.

        Sums in float32 in an order of its own, so it differs from a product with the dense matrix
        by rounding.

        Args:
            inputs: `(batch, cols)` of the weight's dtype, contiguous, without gradient.
            hold: As for `dense`.

        Returns:
            `(batch, rows)`, float32, new.
        """
        out = torch.empty((inputs.shape[0], self.shape[0]), dtype=torch.float32)
        start = time.perf_counter()
        part, state = self._parts[0]
        fixed = state.fixed
        if len(self._parts) > 1:
            self._multiply_parts(inputs, out, hold)
        elif fixed is None:
            self._multiply(part, state, bits_of(inputs), out.numpy(), hold)
        else:
            if self._call is None:
                self._call = kernels.prepared_matvec(fixed[part.tensor])
            if self._call is None:
                kernels.matvec(fixed[part.tensor], bits_of(inputs), out.numpy())
            else:
                self._call(inputs.data_ptr(), inputs.shape[0], out.data_ptr())
        stop = time.perf_counter()
        ledger = self.engine.ledger
        counters = ledger.counters
        counters.products += 1
        counters.packed_bytes += self._packed_nbytes
        counters.product_s += stop - start
        ledger.note("product", self.name, start, stop, self._packed_nbytes)
        return out

    def wide(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` computed in float32, for CPUs that emulate the weight's type.

        Panels of rows are expanded, widened and multiplied in turn.

        Args:
            inputs: `(batch, cols)` of the weight's dtype.
            hold: As for `dense`.

        Returns:
            `(batch, rows)`, float32, new.
        """
        rows, cols = self.shape
        x = inputs.float()
        out = torch.empty((inputs.shape[0], rows), dtype=torch.float32)
        step = max(1, PANEL // cols)
        panel = torch.empty(min(step, rows), cols, dtype=torch.float32)
        if not self._whole or self._convert or self.kept is not None or self._keep:
            matrix = self.dense(hold=hold)
            for at in range(0, rows, step):
                wide = panel[: min(step, rows - at)].copy_(matrix[at : at + step])
                torch.mm(x, wide.T, out=out[:, at : at + len(wide)])
            return out
        narrow = torch.empty(panel.shape, dtype=self.dtype)
        flat = bits_of(narrow).reshape(-1)
        began, spent = time.perf_counter(), 0.0
        for part, state in self._parts:
            fixed, engine = state.fixed, self.engine
            try:
                encoded = (engine.take(state) if fixed is None else fixed)[part.tensor]
                for first in range(part.start, part.stop, step * cols):
                    start = time.perf_counter()
                    last = min(first + step * cols, part.stop)
                    kernels.decode(encoded, flat, start=first, stop=last)
                    spent += time.perf_counter() - start
                    count = (last - first) // cols
                    at = (part.offset + first - part.start) // cols
                    wide = panel[:count].copy_(narrow[:count])
                    torch.mm(x, wide.T, out=out[:, at : at + count])
            finally:
                if fixed is None and not hold:
                    engine.drop()
        self._count_expansion(began, began + spent, self.numel * self._item.itemsize)
        return out

    def _multiply_parts(self, inputs: torch.Tensor, out: torch.Tensor, hold: bool) -> None:
        x, cols = bits_of(inputs), self.shape[1]
        for part, state in self._parts:
            rows = (part.stop - part.start) // cols
            piece = np.empty((inputs.shape[0], rows), dtype=np.float32)
            self._multiply(part, state, x, piece, hold)
            at = part.offset // cols
            out[:, at : at + rows] = torch.from_numpy(piece)

    def _multiply(
        self, part: Part, state: State, x: np.ndarray, out: np.ndarray, hold: bool
    ) -> None:
        fixed = state.fixed
        if fixed is not None:
            kernels.matvec(fixed[part.tensor], x, out)
            return
        engine = self.engine
        try:
            kernels.matvec(engine.take(state)[part.tensor], x, out)
        finally:
            if not hold:
                engine.drop()

    def _expand(self, flat: np.ndarray, hold: bool) -> None:
        start = time.perf_counter()
        for part, state in self._parts:
            out = flat[part.offset : part.offset + part.stop - part.start]
            fixed = state.fixed
            if fixed is not None:
                kernels.decode(fixed[part.tensor], out, start=part.start, stop=part.stop)
                continue
            engine = self.engine
            try:
                encoded = engine.take(state)[part.tensor]
                kernels.decode(encoded, out, start=part.start, stop=part.stop)
            finally:
                if not hold:
                    engine.drop()
        self._count_expansion(start, time.perf_counter(), flat.nbytes)

    def _count_expansion(self, start: float, stop: float, dense_nbytes: int) -> None:
        ledger = self.engine.ledger
        counters = ledger.counters
        counters.expands += 1
        counters.packed_bytes += self._packed_nbytes
        counters.dense_bytes += dense_nbytes
        counters.expand_s += stop - start
        ledger.note("expand", self.name, start, stop, self._packed_nbytes)

    def _views(self, buffer: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor | None]:
        nbytes = self.numel * self._item.itemsize
        flat = buffer[:nbytes].numpy().view(self._item.uint)
        matrix = tensor_of(flat, self._item).reshape(self.shape)
        if not self._convert:
            return flat, matrix, None
        start = _aligned(nbytes)
        stop = start + self.numel * self.dtype.itemsize
        return flat, matrix, buffer[start:stop].view(self.dtype).reshape(self.shape)

    def _covers_rows(self, part: Part, state: State) -> bool:
        spec = state.unit.layout.tensors[part.tensor].spec
        return (
            spec.codec != "dense"
            and spec.dtype.name in PRODUCT_DTYPES
            and len(self.shape) == 2
            and spec.shape[-1:] == self.shape[1:]
            and len(spec.shape) == 2
            and part.stop - part.start == spec.numel
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weight":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_pickle()


def _share(part: Part, state: State) -> int:
    """Packed bytes that a part stands for."""
    spec = state.unit.layout.tensors[part.tensor].spec
    return spec.nbytes * (part.stop - part.start) // max(1, spec.numel)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def scratch_bytes(
    layouts: Sequence[FileLayout], specs: Iterable[tuple[WeightSpec, torch.dtype]]
) -> int:
    """Return the scratch that the largest weight needs; see `Weight._views`.

    Raises:
        DTypeError: Stored elements are integers, which no linear layer multiplies by.
    """
    largest = 0
    for spec, dtype in specs:
        item = stored_dtype(layouts, spec)
        if not item.signed or item.exponent_bits == 0:
            raise DTypeError(
                f"{spec.name}: stored as {item.name}; weights must be floating point to be run"
            )
        numel = torch.Size(spec.shape).numel()
        needed = numel * item.itemsize
        if torch_dtype(item) != dtype:
            needed = _aligned(needed) + numel * dtype.itemsize
        largest = max(largest, needed)
    return largest


def _retire(engine: Engine) -> None:
    """Close an engine whose store is gone.

    The garbage collector may call this on a thread that the engine waits for; only the main thread
    is surely none of those, so from any other the closing is left to a thread of its own.
    """
    if threading.current_thread() is threading.main_thread():
        engine.close()
    else:
        threading.Thread(target=engine.close, name="endor-retire", daemon=True).start()


def _refuse_pickle() -> NoReturn:
    raise ConfigError(
        "packed weights are not pickled: save the model with save_pretrained and load that, or "
        "load the packed checkpoint in each process"
    )
