"""Which matrices are stored by neuron: what multiplies an activation that is zero for most.

`relu` and its square are exactly 0 for every neuron below its threshold, so that the second matrix
of a feed-forward block need not be read where they are (PowerInfer, arXiv 2312.12456). Stored
transposed, what belongs to one neuron lies together: in each of a few arrays, or, in bundles, in
one run of bytes, which a disk reads at once.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from endor import kernels
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.codecs import CodecChoice, DType, Encoded
from endor.codecs.bundled import rows_together
from endor.errors import CheckpointError, ConfigError
from endor.kernels import Scratch

ZERO_ACTIVATIONS = frozenset({"relu", "relu2", "relu6", "relu_squared", "squared_relu"})
"""Names, in transformers' configs, of functions that are exactly 0 for every negative input."""

ACTIVATION_KEYS = (
    *("hidden_act", "activation_function", "hidden_activation", "activation", "mlp_hidden_act"),
    *("dense_act_fn", "feed_forward_proj", "ffn_activation"),
)
"""Members of transformers' configs that name the activation of feed-forward blocks."""

_FIRST_OF = {
    "fc2": ("fc1",),
    "down_proj": ("up_proj", "gate_proj"),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "lin2": ("lin1",),
    "fc_out": ("fc_in",),
    "wo": ("wi", "wi_0", "wi_1"),
    "w2": ("w1",),
    "c_proj": ("c_fc",),
    "linear2": ("linear1",),
    "output_dense": ("intermediate_dense",),
}
"""Second matrices of a feed-forward block, and the first ones that stand beside them."""

_GATES = ("gate_proj", "wi_0", "w1")
"""First matrices whose outputs the activation is taken of, where there are two."""

_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim")


@dataclass(frozen=True, slots=True)
class Neurons:
    """What is stored by neuron.

    Attributes:
        matrices: Names of the second matrices of feed-forward blocks.
        activation: What the config calls the function before them.
        bundled: Whether they are stored in bundles.
        unused: Why there are none, in one sentence; empty where there are, or none were asked for.
    """

    matrices: frozenset[str] = frozenset()
    activation: str = ""
    unused: str = ""
    bundled: bool = False

    def identity(self) -> dict[str, Any]:
        """Return what the bytes of a packed checkpoint depend on."""
        found: dict[str, Any] = {"neurons": sorted(self.matrices)} if self.matrices else {}
        return found | ({"neuron_bundles": True} if self.matrices and self.bundled else {})


def find_neurons(
    source: CheckpointSource, selected: frozenset[str], *, bundled: bool = False
) -> Neurons:
    """Return which of the `selected` tensors are to be stored by neuron, maybe in bundles.

    Raises:
        ConfigError: No config says what the activation is.
    """
    config = source.config()
    if config is None:
        raise ConfigError(
            f"{source.path}: --neurons needs a config.json that names the activation; give the "
            "model's directory, or leave it out"
        )
    names = sorted(set(_activations(config)))
    zero = [name for name in names if name.lower() in ZERO_ACTIVATIONS]
    if not zero:
        said = " and ".join(names) or "no activation that is known"
        return Neurons(
            unused=f"config.json names {said}, which is not exactly zero for any share of neurons: "
            "nothing can be skipped, and --neurons changes nothing"
        )
    sizes = {part[key] for part in _parts(config) for key in _HIDDEN_KEYS if key in part}
    tensors = source.tensors
    matrices = frozenset(name for name in selected if _is_second(tensors[name], tensors, sizes))
    if not matrices:
        return Neurons(
            unused=f"the activation is {zero[0]}, but no second matrix of a feed-forward block is "
            "among the packed tensors: --neurons changes nothing"
        )
    return Neurons(matrices, zero[0], bundled=bundled)


def first_matrices(name: str) -> tuple[str, ...]:
    """Return what the first matrices of a block may be called whose second one is `name`."""
    module = name.removesuffix(".weight")
    block, dot, own = module.rpartition(".")
    return tuple(f"{block}{dot}{first}.weight" for first in _FIRST_OF.get(own, ()))


def predicted_matrix(name: str, there: Container[str]) -> str | None:
    """Return the first matrix that decides which neurons of a block are active, if it is there.

    Args:
        name: Of the block's second matrix.
        there: Names of the tensors.
    """
    found = [first for first in first_matrices(name) if first in there]
    gates = [first for first in found if first.split(".")[-2] in _GATES]
    return next(iter(gates or found), None)


def encode_turned(
    name: str,
    bits: np.ndarray,
    dtype: DType,
    *,
    codec: CodecChoice,
    threads: int,
    scratch: Scratch,
    bundled: bool = False,
) -> Encoded:
    """Return a matrix stored by neuron: transposed; as it is where it is stored dense.

    Args:
        name: Of the tensor, for messages.
        bits: Its elements, unsigned `(rows, cols)`.
        dtype: Element type.
        codec: As for `kernels.encode`, as the rest.
        threads: As there.
        scratch: As there.
        bundled: In bundles of about 4 KiB.

    Raises:
        CheckpointError: It holds NaN or infinities: skipping a zero would change the product.
    """
    if not _finite(bits, dtype):
        raise CheckpointError(
            f"{name}: holds NaN or infinities, whose product with a zero is no zero: leave it out "
            f"(--exclude '{name}'), or pack without --neurons"
        )
    stored = np.empty(bits.shape[::-1], dtype=bits.dtype)
    kernels.neurons.turn(bits, stored, 0, bits.shape[1], threads, kernels.select())
    found = kernels.encode(stored, dtype, codec=codec, threads=threads, scratch=scratch)
    if found.spec.codec == "dense":
        return kernels.encode(bits, dtype, codec="dense", threads=threads)
    if bundled:
        rows = rows_together(found.spec)
        return kernels.bundles.encode(stored, found.spec, rows, threads, kernels.select())
    return Encoded(found.spec.turned(), found.arrays)


def _finite(bits: np.ndarray, dtype: DType) -> bool:
    one = dtype.uint.type(1)
    infinite = ((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits + 1
    return not bits.size or int((bits << one).max()) < infinite


def _is_second(tensor: SourceTensor, tensors: Mapping[str, SourceTensor], sizes: set[Any]) -> bool:
    """Whether a tensor is `(hidden, neurons)`, behind a `(neurons, hidden)` one of its block."""
    module, _, leaf = tensor.name.rpartition(".")
    block, _, own = module.rpartition(".")
    if leaf != "weight" or len(tensor.shape) != 2 or re.search(r"\bexperts\.\d+$", block):
        return False
    hidden, neurons = tensor.shape
    if tensor.dtype.name not in ("BF16", "F16", "F32") or (sizes and hidden not in sizes):
        return False
    shapes = [tensors[first].shape for first in first_matrices(tensor.name) if first in tensors]
    # GPT-2 stores its matrices the other way round, which looks the same where both are square
    square = hidden == neurons and own == "c_proj"
    return not square and any(shape == (neurons, hidden) for shape in shapes)


def _activations(config: Mapping[str, Any]) -> Iterator[str]:
    for part in _parts(config):
        found = (part.get(key) for key in ACTIVATION_KEYS)
        yield from (name.removeprefix("gated-") for name in found if isinstance(name, str))


def _parts(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Yield a config and those inside of it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
