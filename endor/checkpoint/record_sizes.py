"""How large records and their header may become, before anything is encoded."""

from collections.abc import Sequence
from dataclasses import replace

from endor.checkpoint.neurons import Neurons
from endor.checkpoint.plan import Unit
from endor.checkpoint.recode import Layouts, largest_fields_spec
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import CodecChoice, TensorSpec
from endor.codecs.bundles import MAX_NBYTES, Bundles
from endor.storage import header_capacity, largest_spec
from endor.storage.layout import ALIGN
from endor.storage.writer import largest_int_spec

MAX_HEADER_ROOM = 32 << 20
"""A shard ends before its header would need more than this."""

ENTRY_ROOM = 2048
"""More than a tensor's part of a header takes besides its name, which is there once per array."""


BUNDLE_ROOM = 64
"""More than a bundle takes besides what its rows take in whole arrays."""


class RecordSizes:
    """Bounds on what a conversion writes.

    Args:
        selected: Names of the tensors that are packed.
        recoded: Layouts of packed codes, of tensors that have some.
        codec: What is asked for.
        max_shard_bytes: A shard ends before it would be larger.
        coded: Whether the source has integer codes for the selected ones.
        turned: Matrices that are stored transposed.
    """

    def __init__(
        self,
        selected: frozenset[str],
        recoded: Layouts,
        codec: CodecChoice,
        max_shard_bytes: int,
        *,
        coded: bool,
        turned: Neurons | None = None,
    ) -> None:
        self.selected = selected
        self.recoded = recoded
        self.codec = codec
        self.max_shard_bytes = max_shard_bytes
        self.coded = coded
        self.turned = turned or Neurons()

    def header_room(self, units: Sequence[Unit]) -> tuple[int, int]:
        """Return bytes to reserve for the next header, and how many units its shard takes at most.

        Args:
            units: Those that are still to be written.
        """
        plan: dict[str, dict[str, TensorSpec]] = {}
        room = least = 0
        count = 0
        for unit in units:
            specs = {tensor.name: self.largest(tensor) for tensor in unit.tensors}
            room += sum(ENTRY_ROOM + 24 * len(tensor.name) for tensor in unit.tensors)
            least += sum(self.least(tensor) for tensor in unit.tensors)
            if plan and (room > MAX_HEADER_ROOM or least > self.max_shard_bytes):
                break
            plan[unit.name] = specs
            count += 1
        return header_capacity(plan), count

    def largest(self, tensor: SourceTensor) -> TensorSpec:
        """Return a spec whose header entry is at least as long as the real one."""
        if self.coded and tensor.name in self.selected:
            return largest_int_spec(tensor.shape, tensor.dtype, (1, 1))
        if tensor.name in self.recoded and tensor.name not in self.selected:
            return largest_fields_spec(tensor, self.recoded[tensor.name])
        if tensor.name not in self.selected or self.codec == "dense":
            return TensorSpec(tensor.shape, tensor.dtype, "dense", False, tensor.numel)
        found = largest_spec(tensor.shape, tensor.dtype)
        if self.codec == "raw":
            found = TensorSpec(tensor.shape, tensor.dtype, "raw", True, tensor.numel)
        turned = self.turned
        if tensor.name not in turned.matrices:
            return found
        bundles = Bundles(tensor.shape[1], MAX_NBYTES) if turned.bundled else None
        return replace(found, transposed=True, bundles=bundles)

    def least(self, tensor: SourceTensor) -> int:
        """Return bytes that the stored tensor needs at least: its bitmap, or all of it."""
        if tensor.name in self.recoded:
            return tensor.nbytes // 64
        return tensor.numel // 8 if tensor.name in self.selected else tensor.nbytes

    def most(self, unit: Unit) -> int:
        """Return bytes that the record needs at most; a forced codec may exceed the dense size."""
        size = unit.nbytes + 2 * ALIGN * len(unit.tensors)
        if self.turned.bundled:  # heads, and gaps between the arrays of each bundle
            turned = [one for one in unit.tensors if one.name in self.turned.matrices]
            size += sum(BUNDLE_ROOM * tensor.shape[1] for tensor in turned)
        return size if self.codec == "auto" else size + unit.nbytes // 2
