"""What moves (a unit: one record) and what is multiplied by (a weight: ranges of tensors)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from endor.codecs import DType
from endor.errors import CheckpointError
from endor.storage import FileLayout, Record
from endor.storage.layout import ALIGN, align_up

CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Part:
    """A flat range of one stored tensor, and where it lands in a dense weight.

    Attributes:
        tensor: Name of the stored tensor.
        start: First element taken from it.
        stop: One past the last.
        offset: Element of the weight where the range begins.
    """

    tensor: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A dense matrix that a module multiplies by.

    Attributes:
        name: Unique name, such as `model.layers.0.mlp.up_proj.weight`.
        shape: Dense shape, row-major.
        parts: Ranges that tile the matrix, in offset order.
        target: The model's parameter that it is, or is a slice of.
        routed: Whether only some inputs need it (an expert), so that it is in no fixed order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    target: str
    routed: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """One record of a packed file: read, placed and dropped as a whole.

    Attributes:
        index: Position in execution order.
        name: The record's name.
        record: Where its bytes are.
        layout: The file that binds those bytes to tensors.
        tensors: Stored tensors that weights use, in file order.
        dense_nbytes: Their bytes when expanded.
        scheduled: Whether it takes part in the cyclic order (experts do not).
        shared: Whether several weights use it, so that it is worth keeping after one use.
    """

    index: int
    name: str
    record: Record
    layout: FileLayout
    tensors: tuple[str, ...]
    dense_nbytes: int
    scheduled: bool
    shared: bool

    @property
    def nbytes(self) -> int:
        """Bytes that one read moves."""
        return self.record.nbytes

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of memory with the entropy codes undone: whole pages, each array from a cache line
        on."""
        specs = (self.layout.tensors[name].spec.decoded for name in self.tensors)
        arrays = (array.nbytes for spec in specs for array in spec.arrays)
        return align_up(sum(align_up(nbytes, CACHE_LINE) for nbytes in arrays), ALIGN)


def collect_units(layouts: Sequence[FileLayout], weights: Iterable[WeightSpec]) -> tuple[Unit, ...]:
    """Return the records that hold the tensors of `weights`, in file order.

    Raises:
        CheckpointError: A weight names a tensor that no file holds.
    """
    where = {name: layout for layout in layouts for name in layout.tensors}
    users: dict[tuple[int, str], list[WeightSpec]] = {}
    names: dict[tuple[int, str], list[str]] = {}
    position = {id(layout): at for at, layout in enumerate(layouts)}
    for weight in weights:
        for part in weight.parts:
            layout = where.get(part.tensor)
            if layout is None:
                raise CheckpointError(
                    f"{weight.name}: stored tensor {part.tensor} is in none of the files; "
                    "the checkpoint is incomplete: convert it again"
                )
            key = (position[id(layout)], layout.tensors[part.tensor].record)
            if weight not in users.setdefault(key, []):
                users[key].append(weight)
            if part.tensor not in names.setdefault(key, []):
                names[key].append(part.tensor)
    order = sorted(users, key=lambda key: (key[0], layouts[key[0]].records[key[1]].offset))
    units = []
    for index, key in enumerate(order):
        layout = layouts[key[0]]
        routed = any(weight.routed for weight in users[key])
        units.append(
            Unit(
                index=index,
                name=key[1],
                record=layout.records[key[1]],
                layout=layout,
                tensors=tuple(names[key]),
                dense_nbytes=sum(layout.tensors[name].spec.dense_nbytes for name in names[key]),
                scheduled=not routed,
                shared=routed or len(users[key]) > 1,
            )
        )
    return tuple(units)


def stored_dtype(layouts: Sequence[FileLayout], spec: WeightSpec) -> DType:
    """Return the element type of a weight's parts.

    Raises:
        CheckpointError: They differ.
    """
    found = {
        layout.tensors[part.tensor].spec.dtype
        for part in spec.parts
        for layout in layouts
        if part.tensor in layout.tensors
    }
    if len(found) != 1:
        raise CheckpointError(
            f"{spec.name}: its stored tensors must share one dtype, got "
            f"{sorted(item.name for item in found)}; convert the checkpoint again"
        )
    return found.pop()
