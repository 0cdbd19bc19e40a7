import pytest

from endor.checkpoint import SourceTensor
from endor.checkpoint.select import is_linear, matcher, select
from endor.codecs import dtype
from endor.errors import ConfigError


def tensor(name, shape=(128, 64), kind="BF16"):
    return SourceTensor(name, dtype(kind), shape, "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "transformer.h.3.attn.c_attn.weight",
        "gpt_neox.layers.1.attention.query_key_value.weight",
        "model.layers.1.block_sparse_moe.experts.7.w2.weight",
        "model.layers.1.mlp.shared_expert.down_proj.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    ],
)
def test_matrices_of_layers_are_packed(name):
    assert is_linear(tensor(name))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "model.layers.0.embed_positions.weight",
        "vision.proj.weight",
    ],
)
def test_the_rest_is_not(name):
    assert not is_linear(tensor(name))


def test_shapes_and_types():
    name = "model.layers.0.self_attn.q_proj.weight"
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert not is_linear(tensor(name, (63, 128)))
    assert not is_linear(tensor(name, (128,)))
    assert is_linear(tensor(name, (4, 128, 128)))
    assert not is_linear(tensor(name, (128, 128, 4)))
    assert not is_linear(tensor(name, kind="I64"))
    assert is_linear(tensor(name, kind="F8_E4M3"))
    assert is_linear(tensor(experts, (4, 128, 128)))
    assert not is_linear(tensor("model.layers.0.conv.weight", (128, 64, 64)))


def test_include_and_exclude():
    tensors = [
        tensor("lm_head.weight"),
        tensor("model.layers.0.mlp.up_proj.weight"),
        tensor("model.layers.1.mlp.up_proj.weight"),
        tensor("model.layers.1.mlp.down_proj.weight"),
        tensor("steps", (), "I64"),
    ]

    def chosen(**patterns):
        return {name.removesuffix(".weight") for name in select(tensors, **patterns)}

    layers = {f"model.layers.{name}_proj" for name in ("0.mlp.up", "1.mlp.up", "1.mlp.down")}
    assert chosen() == layers
    assert chosen(include=["lm_head"]) == layers | {"lm_head"}
    assert chosen(exclude=["*.down_proj"]) == layers - {"model.layers.1.mlp.down_proj"}
    assert chosen(exclude=[r"re:layers\.1\."]) == {"model.layers.0.mlp.up_proj"}
    assert chosen(include=["lm_head.weight"], exclude=["*"]) == set()
    with pytest.raises(ConfigError, match=r"exclude 'down_proj'.*matches none of 5.*up_proj"):
        chosen(exclude=["down_proj"])
    with pytest.raises(ConfigError, match="steps is I64, which is stored dense only"):
        chosen(include=["steps"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        chosen(include=["re:("])


def test_a_glob_matches_the_whole_name():
    assert matcher("*.q_proj")("a.q_proj.weight")
    assert not matcher("q_proj")("a.q_proj.weight")
    assert matcher("re:q_proj")("a.q_proj.weight")
