"""Modules that multiply by their weights in ways of their own keep them packed, with equal bits."""

import pytest
import torch
import transformers as t

import endor
from endor.errors import ConfigError
from endor.hf.experts import ExpertStack
from endor.hf.packed_module import EndorModule
from endor.planning import Placement

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}


def falcon():
    return t.FalconForCausalLM(t.FalconConfig(**SIZES))


def gpt2():
    config = t.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return t.GPT2LMHeadModel(config)


def granite_moe():
    return t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2)
    )


def jetmoe():
    return t.JetMoeForCausalLM(
        t.JetMoeConfig(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=2,
            num_key_value_heads=4,
            kv_channels=64,
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def llama4():
    config = t.Llama4TextConfig(
        **WIDE, intermediate_size_mlp=96, head_dim=16, num_local_experts=4, num_experts_per_tok=1
    )
    return t.Llama4ForCausalLM(config)


def zamba2():
    """Two layers that share one transformer block."""
    config = t.Zamba2Config(
        **SIZES,
        intermediate_size=96,
        num_key_value_heads=4,
        mamba_d_state=16,
        n_mamba_heads=8,
        mamba_headdim=16,
        mamba_ngroups=1,
        num_mem_blocks=1,
        layers_block_type=["hybrid", "hybrid"],
        use_mem_eff_path=False,
    )
    return t.Zamba2ForCausalLM(config)


def nomic_bert():
    """q, k and v are rows of one stored matrix."""
    return t.NomicBertModel(t.NomicBertConfig(**WIDE))


MODELS = [falcon, gpt2, granite_moe, jetmoe, llama4, zamba2, nomic_bert]


def both(tmp_path, make):
    """Return the packed checkpoint of a tiny random model, and its dense twin."""
    torch.manual_seed(0)
    try:
        model = make().to(torch.bfloat16)
    except AttributeError as error:
        pytest.skip(f"this transformers lacks it: {error}")
    model.save_pretrained(tmp_path / "dense")
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed", threads=1)
    options = (
        {"experts_implementation": "eager"} if hasattr(model, "set_experts_implementation") else {}
    )
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16, **options).eval()
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()  # products depend on alignment below 16 bytes
    return tmp_path / "packed", dense


def outputs(model):
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_packed_and_of_equal_bits(tmp_path, make, streamed):
    packed, dense = both(tmp_path, make)
    model = endor.load_model(packed)
    assert not model.endor.report()["unpacked_at_load"]
    if streamed:
        names = [unit.name for unit in model.endor.units]
        placement = Placement(dict.fromkeys(names, "disk"), 1 << 20)
        model = endor.load_model(packed, placement=placement)
    large = [
        name
        for name, value in model.named_parameters()
        if "layers" in name and min(value.shape[-2:], default=0) >= 64 and value.dim() > 1
    ]
    assert not large, "they are in memory, expanded"
    assert torch.equal(outputs(model), outputs(dense))


@pytest.mark.parametrize("make", [falcon, gpt2], ids=lambda make: make.__name__)
def test_inputs_may_be_given_by_name(tmp_path, make):
    packed, dense = both(tmp_path, make)
    model, x = endor.load_model(packed), torch.randn(3, 64).bfloat16()
    name = next(n for n, module in model.named_modules() if isinstance(module, EndorModule))
    layer, plain = model.get_submodule(name), dense.get_submodule(name)
    key = "x" if make is gpt2 else "input"
    with torch.no_grad():
        assert torch.equal(layer(**{key: x}), plain(x))


def test_a_write_is_refused(tmp_path):
    packed, _ = both(tmp_path, falcon)
    model = endor.load_model(packed)
    layer = next(module for module in model.modules() if isinstance(module, EndorModule))
    with pytest.raises(ConfigError, match="unpack"):
        layer.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="unpack"):
        layer.weight.data.zero_()
    with pytest.raises(ConfigError, match="dtype"):
        model.to(torch.float32)
    name = next(name for name, module in model.named_modules() if module is layer)
    with pytest.raises(ConfigError, match="state dict"):
        model.load_state_dict({f"{name}.weight": layer.weight}, strict=False)


@pytest.mark.parametrize(
    "make", [falcon, gpt2, granite_moe, jetmoe, llama4], ids=lambda make: make.__name__
)
def test_gradients_flow_through_layers_of_their_own_making(tmp_path, make):
    packed, dense = both(tmp_path, make)
    model = endor.load_model(packed)
    grads = []
    for each in (model, dense):
        embedded = each.get_input_embeddings()(torch.tensor([[3, 4, 5]])).detach()
        embedded.requires_grad_()
        each(inputs_embeds=embedded).logits.float().sum().backward()
        grads.append(embedded.grad)
    assert torch.equal(*grads)


class Matrix:
    """What a store gives: one matrix."""

    engine = None
    product_rows, wide_rows = 0, 1 << 30
    scratch = torch.empty(0)

    def __init__(self, values):
        self.values, self.shape = values, values.shape
        self.dtype, self.device = values.dtype, values.device

    def dense(self, *, hold=False):
        """In scratch memory, as a store's: the next one's values take its place."""
        if Matrix.scratch.shape != self.shape:
            Matrix.scratch = torch.empty(self.shape)
        Matrix.scratch.numpy()[:] = self.values.numpy()  # unseen by autograd, as a kernel's write
        return Matrix.scratch

    def fresh(self, *, hold=False):
        return self.values.clone()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_the_parameter_to_whoever_asks_for_all_of_it(transposed):
    values = torch.randn(3, 4, 5)
    stack = ExpertStack(
        [Matrix(each) for each in values], exact=True, transposed=transposed, own_memory=True
    )
    want = values.transpose(1, 2) if transposed else values
    assert stack.shape == want.shape
    assert torch.equal(stack[1], want[1])
    assert torch.equal(stack[1:], want[1:])
    assert torch.equal(stack.mean(0), want.mean(0))
    x = torch.randn(3, 2, want.shape[1])
    assert torch.equal(torch.bmm(x, stack), torch.bmm(x, want))
    for given in ((x, stack), ([x, stack],)):
        found = torch.einsum("ebi,eio->ebo", *given)
        assert torch.equal(found, torch.einsum("ebi,eio->ebo", x, want))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_of_each_experts_own_matrix(transposed):
    values = torch.randn(3, 4, 4)
    stack = ExpertStack(
        [Matrix(each) for each in values], exact=True, transposed=transposed, own_memory=True
    )
    want = values.transpose(1, 2) if transposed else values
    grads = []
    for weights in (stack, want):
        x = torch.ones(3, 2, 4, requires_grad=True)
        (
            torch.bmm(x, weights).sum() + sum((x[at] @ weights[at]).sum() for at in range(3))
        ).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
