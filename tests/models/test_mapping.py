"""Pieces say of every row what transformers' own conversion, run on values, makes of it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

from endor.errors import CheckpointError, DependencyError, ShapeError
from endor.models import mapping
from endor.models.mapping import map_parameters
from endor.models.pieces import TENSOR, is_whole, runs

Interleave = getattr(core_model_loading, "Interleave", None)
Split = getattr(core_model_loading, "Split", None)
Rope = getattr(core_model_loading, "PermuteForRope", None)
Ernie = getattr(core_model_loading, "ErnieFuseAndSplitTextVisionExperts", None)


class Config:
    num_attention_heads = 3


class Model(nn.Module):
    """Parameters of given shapes, on the meta device."""

    base_model_prefix = "model"
    config = Config()

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            at = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))


if Rope is not None:
    try:
        names = ["q.weight"]
        Rope().convert({"q.weight": [torch.zeros(12, 5)]}, names, names, config=Config)
    except TypeError:
        Rope = None  # older ones need the layers' names: what they make is expanded at load


def operation(kind, **options):
    return None if kind is None else kind(**options)


EXPERTS = {f"experts.{at}.{leaf}.weight": (6, 5) for at in range(3) for leaf in ("gate", "up")}
CASES = {
    "concatenated": (
        {"q.weight": (6, 5), "k.weight": (3, 5)},
        {"qkv.weight": (9, 5)},
        [operation(Concatenate, dim=0)],
    ),
    "biases": ({"q.bias": (6,), "k.bias": (3,)}, {"qkv.bias": (9,)}, [Concatenate(dim=0)]),
    "chunked": ({"qk.weight": (12, 5)}, {"q.weight": (6, 5), "k.weight": (6, 5)}, [Chunk(dim=0)]),
    "split": (
        {"qk.weight": (9, 5)},
        {"q.weight": (6, 5), "k.weight": (3, 5)},
        [operation(Split, dim=0)],
    ),
    "experts": (
        EXPERTS,
        {"experts.both": (3, 12, 5)},
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    "stacks": (
        {"gate.weight": (3, 4, 5), "up.weight": (3, 4, 5)},
        {"both.weight": (3, 8, 5)},
        [Concatenate(dim=1)],
    ),
    "turned": ({"w.weight": (3, 5, 4)}, {"v.weight": (3, 4, 5)}, [Transpose(1, 2)]),
    "turned matrix": ({"w.weight": (5, 4)}, {"v.weight": (4, 5)}, [Transpose(0, 1)]),
    "turned from behind": ({"w.weight": (3, 5, 4)}, {"v.weight": (3, 4, 5)}, [Transpose(-1, -2)]),
    "not turned": (
        {"w.weight": (3, 4, 5)},
        {"v.weight": (3, 4, 5)},
        [Transpose(1, 2, check_dims=True)],
    ),
    "interleaved": (
        {"w13.weight": (3, 8, 5)},
        {"both.weight": (3, 8, 5)},
        [operation(Interleave, dim=1)],
    ),
    "interleaved and chunked": (
        {"w13.weight": (8, 5)},
        {"gate.weight": (4, 5), "up.weight": (4, 5)},
        [operation(Interleave, dim=0), Chunk(dim=0)],
    ),
    "rope": ({"wq.weight": (12, 5)}, {"q.weight": (12, 5)}, [operation(Rope)]),
    "rope bias": ({"wq.bias": (12,)}, {"q.bias": (12,)}, [operation(Rope)]),
    "ernie": (
        {f"experts.{at}.{leaf}.weight": (6, 5) for at in range(4) for leaf in ("gate", "up")},
        {"text.both": (2, 12, 5), "vision.both": (2, 12, 5)},
        [operation(Ernie)],
    ),
}


def patterns(names):
    out = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    return list(out)


def converter(stored, targets, operations):
    if None in operations:
        pytest.skip("this transformers has no such operation")
    return core_model_loading.WeightConverter(
        patterns(stored), list(targets), operations=list(operations)
    )


def converted(model, entry, values):
    """Return what transformers itself makes of stored values."""
    entry = copy.deepcopy(entry)
    for name in sorted(values, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(name, [], [entry])
        entry.add_tensor(target, name, pattern, values[name])
    found = entry.convert(target, model=model, config=model.config)
    return {name: item[0] if isinstance(item, list) else item for name, item in found.items()}


@pytest.fixture
def convert(monkeypatch):
    def use(*entries):
        monkeypatch.setattr(
            conversion_mapping, "get_model_conversion_mapping", lambda *_: list(entries)
        )

    return use


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_where_transformers_puts_it(convert, name):
    stored, targets, operations = CASES[name]
    entry = converter(stored, targets, operations)
    convert(entry)
    model = Model(targets)
    values = {
        key: torch.arange(np.prod(shape)).view(shape) + 1000 * at
        for at, (key, shape) in enumerate(stored.items())
    }
    wanted = converted(model, entry, values)
    found = map_parameters(model, stored)
    assert found.pieces.keys() == targets.keys()
    assert not found.otherwise
    back = {key: torch.full(shape, -1) for key, shape in stored.items()}
    for target, shape in targets.items():
        made = torch.full(shape, -1)
        for piece in found.pieces[target]:
            piece.view(made).copy_(piece.stored(values[piece.name]))
            piece.stored(back[piece.name]).copy_(piece.view(made))
        assert torch.equal(made, wanted[target])
    for key, value in values.items():
        assert torch.equal(back[key], value)


def test_matrices_of_a_stack_are_pieces_of_their_own(convert):
    convert()
    (pieces,) = map_parameters(Model({"a.b": (3, 4, 5)}), {"a.b": (3, 4, 5)}).pieces.values()
    assert [(piece.start, piece.at, piece.rows) for piece in pieces] == [
        (0, 0, 4),
        (4, 4, 4),
        (8, 8, 4),
    ]
    assert is_whole(pieces, (3, 4, 5), {"a.b": (3, 4, 5)})
    assert not is_whole(pieces[:2], (3, 4, 5), {"a.b": (3, 4, 5)})


@pytest.mark.parametrize("shape", [(), (7,), (0, 5), (2, 3, 4, 5)])
def test_a_tensor_of_any_shape_is_itself(convert, shape):
    convert()
    (pieces,) = map_parameters(Model({"a.b": shape}), {"a.b": shape}).pieces.values()
    value, made = torch.randn(shape), torch.zeros(shape)
    for piece in pieces:
        piece.view(made).copy_(piece.stored(value))
    assert torch.equal(made, value)


def test_what_computes_is_told(convert):
    class Negate(core_model_loading.ConversionOps):
        def convert(self, input_dict, **_):
            return input_dict

    entry = core_model_loading.WeightConverter("w.weight", "v.weight", operations=[Negate()])
    convert(entry)
    found = map_parameters(Model({"v.weight": (4, 5)}), {"w.weight": (4, 5)})
    assert found.otherwise == {"v.weight": "is made from w.weight by Negate"}
    assert not found.pieces


def test_columns_side_by_side_are_told(convert):
    convert(converter({"q.weight": (4, 5), "k.weight": (4, 5)}, ["v.weight"], [Concatenate(dim=1)]))
    shapes = {"q.weight": (4, 5), "k.weight": (4, 5)}
    assert "v.weight" in map_parameters(Model({"v.weight": (4, 10)}), shapes).otherwise


def test_missing_experts(convert):
    stored = {name: shape for name, shape in EXPERTS.items() if ".2.up" not in name}
    _, targets, operations = CASES["experts"]
    convert(converter(EXPERTS, targets, operations))
    with pytest.raises(CheckpointError, match=r"needs 3 tensors experts\.\*\.up\.weight, got 2"):
        map_parameters(Model(targets), stored)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("concatenated", {"q.weight": (6, 5), "k.weight": (4, 5)}),
        ("concatenated", {"q.weight": (6, 4), "k.weight": (3, 4)}),
        ("chunked", {"qk.weight": (14, 5)}),
        ("split", {"qk.weight": (11, 5)}),
        ("experts", EXPERTS | {"experts.1.up.weight": (7, 5)}),
        ("turned", {"w.weight": (3, 4, 5)}),
        ("interleaved", {"w13.weight": (3, 7, 5)}),
    ],
)
def test_shapes_must_fit(convert, name, stored):
    _, targets, operations = CASES[name]
    convert(converter(stored, targets, operations))
    with pytest.raises(ShapeError, match="does not fit"):
        map_parameters(Model(targets), stored)


def test_an_operation_that_takes_other_arguments(convert, monkeypatch):
    stored, targets, operations = CASES["chunked"]
    convert(converter(stored, targets, operations))
    monkeypatch.setattr(Chunk, "convert", lambda self, tensors: tensors)
    with pytest.raises(DependencyError, match=r"Chunk\.convert"):
        map_parameters(Model(targets), stored)


def test_names_that_are_gone(monkeypatch):
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    with pytest.raises(DependencyError, match="rename_source_key"):
        mapping.sources(Model({}), [])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), min_size=1), st.integers(1, 5))
def test_runs_are_the_rows(rows, each):
    numbers = np.array([tensor * TENSOR + row for tensor, row in rows], dtype=np.int64)
    pieces = runs(numbers, ["a", "b", "c"], 1, each)
    again = [
        ("abc".index(piece.name), piece.start + at * piece.step)
        for piece in pieces
        for at in range(piece.rows)
    ]
    assert again == rows
    assert [piece.at for piece in pieces] == [0, *np.cumsum([p.rows for p in pieces])[:-1]]
    assert all(piece.at // each == (piece.at + piece.rows - 1) // each for piece in pieces)
