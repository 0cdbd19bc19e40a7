import pytest

from endor.checkpoint import SourceTensor
from endor.checkpoint.plan import execution_key, plan_units
from endor.checkpoint.select import select
from endor.codecs import dtype
from endor.errors import CheckpointError


def tensor(name, shape=(128, 64), kind="BF16"):
    return SourceTensor(name, dtype(kind), shape, "model.safetensors")


def plan(tensors, **patterns):
    return plan_units(tensors, select(tensors, **patterns))


LAYER = [
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def test_execution_order():
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{part}.weight" for layer in (0, 2, 10) for part in LAYER]
    names += ["model.norm.weight", "lm_head.weight"]
    assert sorted(sorted(names), key=execution_key) == names


@pytest.mark.parametrize(
    "names",
    [
        ["transformer.wte.weight", "transformer.h.0.ln_1.weight"]
        + [f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj")]
        + [f"transformer.h.0.{part}" for part in ("ln_2.weight", "mlp.c_fc", "mlp.c_proj")]
        + ["transformer.h.1.attn.c_attn", "transformer.ln_f.weight"],
        [f"layers.0.attention.w{part}.weight" for part in "qkvo"]
        + [f"layers.0.feed_forward.w{part}.weight" for part in "132"],
        ["model.layers.0.mlp.gate.weight"]
        + [f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in (0, 2, 10)]
        + ["model.layers.0.mlp.shared_expert.up_proj.weight"],
        [f"{part}.weight" for part in ("encoder.layers.0.fc1", "encoder.layers.1.fc1")]
        + [f"decoder.layers.0.{part}.weight" for part in ("fc1", "fc2")],
    ],
)
def test_execution_order_of_other_architectures(names):
    assert sorted(sorted(names), key=execution_key) == names


def test_records():
    tensors = [tensor("model.embed_tokens.weight"), tensor("model.norm.weight", (64,))]
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        tensors += [tensor(f"{prefix}.{part}.weight") for part in LAYER if "proj" in part]
        tensors += [tensor(f"{prefix}.input_layernorm.weight", (64,))]
        tensors += [tensor(f"{prefix}.self_attn.q_proj.bias", (64,))]
        tensors += [
            tensor(f"{prefix}.mlp.experts.{expert}.{part}.weight")
            for expert in (0, 1)
            for part in ("w1", "w2", "w3")
        ]
    units = plan(tensors)
    assert sum(len(unit.tensors) for unit in units) == len(tensors)
    found = {unit.name: [tensor.name for tensor in unit.tensors] for unit in units}
    assert len(found) == len(units)
    assert found["model.layers.1.small"] == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.bias",
    ]
    assert found["model.layers.0.mlp.experts.1"] == [
        f"model.layers.0.mlp.experts.1.{part}.weight" for part in ("w1", "w3", "w2")
    ]
    assert found["model.layers.0.mlp.up_proj.weight"] == ["model.layers.0.mlp.up_proj.weight"]
    assert found["model.embed_tokens.weight"] == ["model.embed_tokens.weight"]


def test_a_large_unpacked_tensor_has_its_own_record():
    large = tensor("model.layers.0.table.weight", (1024, 1024))
    assert [unit.name for unit in plan([large], exclude=["*"])] == [large.name]


@pytest.mark.parametrize("suffix", ["bitmap", "values", "tile_offsets", "planes", "patch_ranks"])
def test_colliding_names(suffix):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = [tensor(name), tensor(f"{name}_{suffix}", (3,))]
    with pytest.raises(CheckpointError, match=f"{suffix}: collides with an array of the packed"):
        plan(tensors)
    assert plan(tensors, exclude=[name])


@pytest.mark.parametrize("name", ["__pad__.0", "__metadata__"])
def test_reserved_names(name):
    with pytest.raises(CheckpointError, match="are reserved"):
        plan([tensor(name)])
