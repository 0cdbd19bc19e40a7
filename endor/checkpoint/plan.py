"""Records of a packed checkpoint, in the order in which a model runs.

One record is one unit of loading: a linear layer; an expert with its two or three matrices; the
small tensors of one layer together; each other tensor by itself.
"""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import ArraySpec, TensorSpec
from endor.errors import CheckpointError
from endor.storage.safetensors import METADATA_KEY
from endor.storage.seal import PAD_PREFIX

SMALL_NBYTES = 1 << 20
"""Unpacked tensors of a layer up to this size share the layer's record."""

RESERVED = (PAD_PREFIX, METADATA_KEY)

_FIELDS_SUFFIXES = ("frequencies", "chunk_offsets", "states", "words", "rest")

_EXPERT = re.compile(
    r"(?P<expert>.*\bexperts\.\d+)\."
    r"(?:w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj|wi_0|wi_1|wo)\.weight"
)
_FIRST = ("vision", "visual", "image", "audio", "speech", "encoder")
_HEADS = ("norm", "head", "score", "classifier", "ln_f", "output")
_STAGES: tuple[tuple[str, ...], ...] = (
    ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm", "pre_attention"),
    ("q_proj", "wq", "query", "q_a_proj", "q_lin", ".q."),
    ("q_b_proj",),
    ("qkv", "c_attn", "query_key_value", "Wqkv", "in_proj"),
    ("k_proj", "wk", "key", "kv_a_proj", "k_lin", ".k."),
    ("kv_b_proj",),
    ("v_proj", "wv", "value", "v_lin", ".v."),
    ("q_norm", "k_norm"),
    ("o_proj", "wo.", "out_proj", "attn.c_proj", "attention.dense", "out_lin", ".o."),
    ("post_attention", "ln_2", "pre_feedforward", "ffn_norm", "final_layer_norm"),
    ("mlp.gate.", "router", "block_sparse_moe.gate."),
    ("experts",),
    ("shared_expert",),
    ("gate_up_proj", "gate_proj", "w1", "wi_0", "wi."),
    ("up_proj", "w3", "wi_1", "fc1", "c_fc", "dense_h_to_4h", "lin1", "fc_in"),
    ("down_proj", "w2", "wo", "fc2", "c_proj", "dense_4h_to_h", "lin2", "fc_out"),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One record to be written.

    Attributes:
        name: Unique in the checkpoint.
        tensors: What it holds, in order.
    """

    name: str
    tensors: tuple[SourceTensor, ...]

    @property
    def nbytes(self) -> int:
        """Dense bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_units(
    tensors: Iterable[SourceTensor],
    selected: frozenset[str],
    recoded: Container[str] = frozenset(),
) -> tuple[Unit, ...]:
    """Return every tensor in one unit each, in execution order.

    Raises:
        CheckpointError: a name collides with what the packed file needs.
    """
    tensors = sorted(tensors, key=lambda tensor: execution_key(tensor.name))
    _check_names(tensors, selected, recoded)
    groups: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        groups.setdefault(_unit_name(tensor, tensor.name in selected), []).append(tensor)
    return tuple(Unit(name, tuple(members)) for name, members in groups.items())


def execution_key(name: str) -> tuple[object, ...]:
    """Return a sort key: embeddings, encoder layers, decoder layers, final norm, head.

    Inside a layer q, k, v, o, gate, up, down; experts by number; unknown names by their text.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        late = "embed" not in name and any(word in name.lower() for word in _HEADS)
        head = "head" in name or "score" in name or parts[0] == "output"
        return (2 + head if late else 0, _natural(name))
    stack = ".".join(parts[:at])
    first = not any(word in stack for word in _FIRST)
    inside = "." + ".".join(parts[at + 1 :])
    return (1, first, _natural(stack), int(parts[at]), *_stage(inside))


def _stage(inside: str) -> tuple[object, ...]:
    """Return the place of a tensor in its layer."""
    expert = re.search(r"\bexperts\.(\d+)\.", inside)
    if expert:
        rest = inside[expert.end() - 1 :]
        return (*_rank("experts"), int(expert[1]), *_rank(rest), rest)
    return (*_rank(inside), -1, _natural(inside))


def _rank(text: str) -> tuple[int]:
    for rank, words in enumerate(_STAGES):
        if any(word in text for word in words):
            return (rank,)
    return (len(_STAGES) if "mlp" in text or "feed_forward" in text else 0,)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that orders numbers in `text` by value."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    )


def _unit_name(tensor: SourceTensor, packed: bool) -> str:
    expert = _EXPERT.fullmatch(tensor.name)
    if expert:
        return expert["expert"]
    if not packed and tensor.nbytes <= SMALL_NBYTES:
        layer = re.match(r"(?:.*?\.)?\d+(?=\.)", tensor.name)
        if layer:
            return f"{layer[0]}.small"
    return tensor.name


def stored_arrays(tensor: SourceTensor, packed: bool) -> tuple[ArraySpec, ...]:
    """Return the arrays that `tensor` may be stored as, one of each suffix, with largest sizes."""
    shape, kind = tensor.shape, tensor.dtype
    arrays = list(TensorSpec(shape, kind, "dense", False, tensor.numel).arrays)
    if packed and kind.packable:
        raw = TensorSpec(shape, kind, "raw", True, tensor.numel)
        patches = max(tensor.numel, 1)
        exp = TensorSpec(shape, kind, "exp", True, tensor.numel, kind.exponent_bits, 0, patches)
        arrays += raw.arrays
        arrays += exp.arrays[2:]
    return tuple(arrays)


def _check_names(
    tensors: list[SourceTensor], selected: frozenset[str], recoded: Container[str]
) -> None:
    names = {tensor.name for tensor in tensors}
    for tensor in tensors:
        if tensor.name.startswith(RESERVED):
            raise CheckpointError(
                f"{tensor.name}: names starting with {' or '.join(RESERVED)} are reserved for "
                "packed files; rename the tensor"
            )
        suffixes = set(_FIELDS_SUFFIXES if tensor.name in recoded else ())
        if tensor.name in selected:
            suffixes |= {array.suffix for array in stored_arrays(tensor, packed=True)}
        for suffix in sorted(suffixes - {""}):
            key = f"{tensor.name}_{suffix}"
            if key in names:
                raise CheckpointError(
                    f"{key}: collides with an array of the packed {tensor.name}; "
                    f"leave one out: --exclude '{tensor.name}'"
                )
