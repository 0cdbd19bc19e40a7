"""A weight on the processor that is stored by neuron: products skip the neurons that are zero."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from endor.codecs import Encoded
from endor.kernels import neurons, select, thread_count
from endor.offload.host_weight import HostWeight, Scratch
from endor.offload.mover import Mover
from endor.offload.neuron_reads import NeuronReads
from endor.offload.state import Bound, Phase, State
from endor.offload.weight import Matrix
from endor.packed import bits_of
from endor.planning.units import Part, WeightSpec


def is_by_neuron(spec: WeightSpec, states: Sequence[State]) -> bool:
    """Whether a weight is one matrix that is stored by neuron, in a unit of its own."""
    if len(spec.parts) != 1:
        return False
    (part,), unit = spec.parts, states[0].unit
    stored = unit.layout.tensors[part.tensor].spec
    whole = (part.start, part.stop) == (0, stored.numel)
    return stored.transposed and whole and not unit.shared and len(unit.record.tensors) == 1


class NeuronWeight(HostWeight):
    """One matrix that is stored by neuron.

    In memory, only what the active neurons have is touched. On disk, only the blocks in which that
    lies are read, where these are well below the whole; such a unit then is no longer read ahead,
    since nothing is known of it before its inputs. What was read ahead in vain gives way first.

    Args:
        reads: Shared by all such matrices of the mover.

    The others are those of `HostWeight`.
    """

    def __init__(
        self,
        mover: Mover[Bound],
        matrix: Matrix,
        *,
        scratch: Scratch,
        key: int,
        reads: NeuronReads,
    ) -> None:
        super().__init__(
            mover,
            matrix,
            scratch=scratch,
            key=key,
        )
        self._reads = reads

    def close(self) -> None:
        super().close()
        self._reads.forget(self.states[0])

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        out = torch.empty((inputs.shape[0], self.shape[0]), dtype=torch.float32)
        start = time.perf_counter()
        x = bits_of(inputs)
        active = neurons.active_neurons(x)

        def multiply(encoded: Encoded) -> None:
            neurons.product(encoded, x, active, out.numpy(), thread_count(), select())

        part, state = self.parts[0]
        if state.fixed is not None:
            multiply(state.fixed[part.tensor])
        else:
            self._multiply_streamed(part, state, active, multiply, hold=hold)
        ledger = self.mover.ledger
        ledger.note_product(
            self.name, start, self.packed_nbytes * active.size // max(1, self.shape[1])
        )
        ledger.counters.neurons += self.shape[1]
        ledger.counters.active_neurons += active.size
        return out

    def _multiply_streamed(
        self,
        part: Part,
        state: State,
        active: np.ndarray,
        multiply: Callable[[Encoded], None],
        *,
        hold: bool,
    ) -> None:
        """Multiply by the matrix with its active neurons read, or with all of it."""
        reads = self._reads
        parts = reads.known(state)
        if parts is not None:
            with reads.lock:
                encoded = reads.read(parts, active)
                if encoded is not None:
                    multiply(encoded)
            if encoded is not None:
                if state.phase is not Phase.ABSENT:
                    self.mover.forget(reads.states)
                return
        bound = self.mover.take(state)
        try:
            multiply(bound[part.tensor])
            if parts is None:
                reads.learn(state, part.tensor, bound[part.tensor])
        finally:
            self.mover.release(bound, hold=hold)
