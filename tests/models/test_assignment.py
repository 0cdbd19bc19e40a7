"""Stored tensors reach the right rows of the right weight, or the reason why not is said."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from endor.codecs import TensorSpec, dtype
from endor.errors import ShapeError
from endor.models.assignment import assign


class Model(nn.Module):
    """The least that the rules of transformers look at."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.model = nn.ModuleDict({"qkv": nn.Linear(8, 12), "norm": nn.LayerNorm(8)})


def layout(**shapes):
    """Return what looks like a file of packed tensors."""
    return SimpleNamespace(
        tensors={
            name.replace("__", "."): SimpleNamespace(
                spec=TensorSpec(shape, dtype("BF16"), "raw", bitmap=True, nnz=1)
            )
            for name, shape in shapes.items()
        }
    )


@pytest.fixture
def convert(monkeypatch):
    """Set the conversions of the model."""

    def use(*converters):
        monkeypatch.setattr(
            conversion_mapping, "get_model_conversion_mapping", lambda *_: list(converters)
        )

    use()
    return use


def stacked(*operations):
    return WeightConverter(
        ["model.q.weight", "model.k.weight"], "model.qkv.weight", operations=list(operations)
    )


def test_plain_names(convert):
    found = assign(Model(), [layout(model__qkv__weight=(12, 8))])
    (part,) = found.linears["model.qkv"].parts
    assert (part.tensor, part.start, part.stop, part.offset) == ("model.qkv.weight", 0, 96, 0)
    assert found.claimed == {"model.qkv.weight"}


def test_the_base_models_names(convert):
    assert "model.qkv" in assign(Model(), [layout(qkv__weight=(12, 8))]).linears


def test_rows_are_put_below_each_other(convert):
    convert(stacked(Concatenate(dim=0)))
    found = assign(Model(), [layout(model__k__weight=(4, 8), model__q__weight=(8, 8))])
    parts = [(p.tensor, p.stop, p.offset) for p in found.linears["model.qkv"].parts]
    assert parts == [("model.q.weight", 64, 0), ("model.k.weight", 32, 64)]


@pytest.mark.parametrize("operations", [[Concatenate(dim=1)], [Transpose(0, 1)], [Chunk(dim=1)]])
def test_what_comes_about_otherwise_is_expanded(convert, operations):
    convert(stacked(*operations))
    found = assign(Model(), [layout(model__q__weight=(8, 8), model__k__weight=(4, 8))])
    assert sorted(found.dense) == ["model.k.weight", "model.q.weight"]
    assert (found.weights, found.claimed) == ([], set())


def test_a_tied_layer_shares_the_weight(convert):
    model = Model()
    with torch.device("meta"):
        model.model["again"] = nn.Linear(8, 12)
    model.all_tied_weights_keys = {"model.again.weight": "model.qkv.weight"}
    found = assign(model, [layout(model__qkv__weight=(12, 8))])
    assert found.linears["model.again"] is found.linears["model.qkv"]
    assert len(found.weights) == 1
    assert found.claimed == {"model.again.weight", "model.qkv.weight"}


class Split(nn.Module):
    """Two linear layers that are stored as one matrix."""

    base_model_prefix = "model"

    def __init__(self, q=8, k=4):
        super().__init__()
        with torch.device("meta"):
            self.model = nn.ModuleDict({"q": nn.Linear(8, q), "k": nn.Linear(8, k)})


@pytest.mark.parametrize(("operation", "rows"), [("Chunk", (6, 6)), ("Split", (8, 4))])
def test_rows_of_one_stored_matrix(convert, operation, rows):
    if not hasattr(core_model_loading, operation):
        pytest.skip(f"this transformers has no {operation}")
    operation = getattr(core_model_loading, operation)(dim=0)
    targets = ["model.q.weight", "model.k.weight"]
    convert(WeightConverter("model.qk.weight", targets, operations=[operation]))
    found = assign(Split(*rows), [layout(model__qk__weight=(12, 8))])
    ranges = [found.linears[name].parts[0] for name in ("model.q", "model.k")]
    edge = rows[0] * 8
    assert [(part.start, part.stop, part.offset) for part in ranges] == [
        (0, edge, 0),
        (edge, 96, 0),
    ]
    assert found.claimed == set(targets)


def test_rows_must_add_up(convert):
    targets = ["model.q.weight", "model.k.weight"]
    convert(WeightConverter("model.qk.weight", targets, operations=[Chunk(dim=0)]))
    with pytest.raises(ShapeError, match="does not fit"):
        assign(Split(), [layout(model__qk__weight=(11, 8))])


@pytest.mark.parametrize("shape", [(8, 12), (11, 8), (96,), (12, 8, 1)])
def test_shapes_must_agree(convert, shape):
    with pytest.raises(ShapeError, match="does not fit"):
        assign(Model(), [layout(model__qkv__weight=shape)])


def test_packed_tensors_of_other_modules_are_expanded(convert):
    found = assign(Model(), [layout(model__norm__weight=(8,))])
    assert (found.dense, found.weights) == (["model.norm.weight"], [])
