"""Architectures whose code looks at weights, or asks whether they are quantized, while it loads."""

import pytest
import torch
import transformers

import endor
from endor.hf import EndorLinear

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}


def gemma3():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=TEXT | {"sliding_window": 8},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        )
    )


def make(kind):
    """Return a tiny random model."""
    t = transformers
    match kind:
        case "gemma3":
            return gemma3()
        case "t5":
            sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
            return t.T5ForConditionalGeneration(t.T5Config(vocab_size=96, **sizes))
        case "modernbert":
            sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "pad_token_id")}
            return t.ModernBertForMaskedLM(
                t.ModernBertConfig(
                    **sizes,
                    intermediate_size=96,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    bos_token_id=1,
                    eos_token_id=2,
                    cls_token_id=3,
                    sep_token_id=4,
                )
            )
        case "gpt_bigcode":
            return t.GPTBigCodeForCausalLM(
                t.GPTBigCodeConfig(
                    vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
                )
            )
        case "mamba":
            return t.MambaForCausalLM(t.MambaConfig(**MAMBA, state_size=8, time_step_rank=8))
        case "falcon_mamba":
            return t.FalconMambaForCausalLM(
                t.FalconMambaConfig(**MAMBA, state_size=8, time_step_rank=8)
            )
        case "jamba":
            sizes = {name: value for name, value in TEXT.items() if name != "head_dim"}
            return t.JambaForCausalLM(
                t.JambaConfig(
                    **sizes,
                    num_experts=2,
                    num_experts_per_tok=1,
                    attn_layer_period=2,
                    attn_layer_offset=1,
                    mamba_d_state=8,
                    mamba_dt_rank=8,
                    use_mamba_kernels=False,
                )
            )
        case "gpt_neo":
            return t.GPTNeoForCausalLM(
                t.GPTNeoConfig(
                    vocab_size=96,
                    hidden_size=64,
                    num_layers=2,
                    num_heads=4,
                    attention_types=[[["global", "local"], 1]],
                    max_position_embeddings=64,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
        case "falcon":
            return t.FalconForCausalLM(
                t.FalconConfig(
                    vocab_size=96,
                    hidden_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
    raise ValueError(kind)


INITIALISED = ["gemma3", "t5", "modernbert", "gpt_bigcode", "mamba"]
"""Their `_init_weights` reads the weights of children."""
MARKED = ["falcon_mamba", "jamba", "gpt_neo", "falcon"]
"""Their code asks for `config._is_quantized`."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [*INITIALISED, *MARKED])
def test_the_dense_models_bits(tmp_path, kind, dtype):
    torch.manual_seed(0)
    model = make(kind).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # biases that round
    model.save_pretrained(tmp_path / "dense")
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed", threads=1)
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()  # products depend on alignment below 16 bytes
    packed = endor.load_model(tmp_path / "packed")
    assert packed.endor.weights
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        assert torch.equal(packed(**inputs).logits, dense(**inputs).logits)
    assert packed.config._is_quantized


def test_every_place_that_asks_for_the_mark_is_known():
    """A model of a newer transformers that branches on it belongs into the test above."""
    root = transformers.__path__[0]
    from pathlib import Path

    found = {
        path.parent.name
        for path in Path(root, "models").glob("*/modeling_*.py")
        if "_is_quantized" in path.read_text(encoding="utf-8")
    }
    assert found <= {*MARKED, "gptj"}  # in 5.18, for a dtype as in gpt_neo


def test_an_unbound_layer_computes_nothing():
    layer = EndorLinear(4, 3, None, torch.float32)
    assert layer.weight.is_meta
    assert layer.weight.shape == (3, 4)
    with pytest.raises(endor.errors.ConfigError, match="no weights"):
        layer(torch.zeros(1, 4))
