"""An outline says, without loading a weight, what the loaded model then has."""

import pytest

import endor
from endor.errors import ConfigError
from endor.models.outline import outline, parameter_bytes


@pytest.mark.parametrize("kind", ["llama", "mixtral", "opt", "gemma2"])
def test_an_outline_agrees_with_the_model(make_pair, kind):
    pair = make_pair(kind)
    found = outline(pair.packed)
    model = endor.load_model(pair.packed)
    assert [unit.name for unit in found.units] == [unit.name for unit in model.endor.units]
    assert found.dtype == "BF16"
    assert found.name == type(pair.dense).__name__
    # Buffers (rotary tables and the like) are small and not weights.
    buffers = sum(item.numel() * item.element_size() for item in model.buffers())
    assert found.shape.other_bytes == parameter_bytes(model) - buffers


def test_expert_use(make_pair):
    assert outline(make_pair("mixtral").packed).shape.expert_use == pytest.approx(2 / 6)
    assert outline(make_pair("llama").packed).shape.expert_use == 1.0


def test_a_dense_checkpoint_is_refused(make_pair):
    with pytest.raises(ConfigError, match="endor pack"):
        outline(make_pair("llama").dense_dir)
