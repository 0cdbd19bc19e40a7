"""EndorLinear is nn.Linear to whoever calls it, and says no where it cannot be."""

import pytest
import torch
from torch import nn

from endor.errors import BackendError, ConfigError, EndorError
from endor.hf import EndorLinear, linear, load_model, placing
from endor.hf.linear import FastHead
from endor.offload import weight
from endor.planning import Placement
from endor.planning import plan as planner
from endor.planning.products import Products


@pytest.fixture
def layers(make_pair):
    """A packed layer with a bias, its dense twin, and the model that keeps them alive."""
    pair = make_pair("opt")
    model = load_model(pair.packed)
    name = "model.decoder.layers.1.fc1"
    return model.get_submodule(name), pair.dense.get_submodule(name), model


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (30, 64)])
def test_forward_has_the_bits(layers, shape):
    packed, dense, _ = layers
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        assert torch.equal(packed(x), dense(x))
        assert torch.equal(packed(input=x), dense(x))


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_fast_products_keep_shape_dtype_and_bias(make_pair, rows):
    pair = make_pair("opt")
    model = load_model(pair.packed, exact=False)
    name = "model.decoder.layers.1.fc1"
    packed, dense = model.get_submodule(name), pair.dense.get_submodule(name)
    x = torch.randn(rows, 1, 64).bfloat16()
    before = model.endor.ledger.snapshot()
    with torch.no_grad():
        found, expected = packed(x), dense(x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert model.endor.ledger.since(before)["products"] == (rows <= 8)
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [2, 3, 64])
@pytest.mark.parametrize("tier", ["resident", "disk", "dense"])
@pytest.mark.parametrize("panel", [1, 200, 1 << 20])
def test_many_rows_are_multiplied_in_float32_where_the_plan_says_so(
    make_pair, monkeypatch, rows, tier, panel
):
    pair = make_pair("opt")
    monkeypatch.setattr(weight, "PANEL", panel)
    chosen = lambda costs, machine: Products({cost.name: 2 for cost in costs}, 3)  # noqa: E731
    monkeypatch.setattr(placing, "choose", chosen)
    units = load_model(pair.packed).endor.units
    room = 4 * max(unit.nbytes for unit in units)
    placement = Placement(dict.fromkeys((unit.name for unit in units), tier), room)
    model = load_model(pair.packed, exact=False, placement=placement)
    name = "model.decoder.layers.1.fc1"
    packed, dense = model.get_submodule(name), pair.dense.get_submodule(name)
    x = torch.randn(1, rows, 64).bfloat16()
    with torch.no_grad():
        before = model.endor.ledger.snapshot()
        found = packed(x)
        products = model.endor.ledger.since(before)["products"]
        exact = torch.nn.functional.linear(x.float(), dense.weight.float(), dense.bias.float())
    assert products == (rows == 2 and tier != "dense")
    assert found.dtype == torch.bfloat16
    # The products are exact, and only their sum is rounded to bfloat16.
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-5)


def test_gradients_reach_input_and_bias(layers):
    packed, dense, _ = layers
    grads = []
    for layer in (packed, dense):
        x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        x.requires_grad_()
        layer.bias.grad = None
        out = layer(x)
        # The scratch is written again before the gradient needs the weight.
        layer.weight.sum()
        layer(torch.zeros(1, 64, dtype=torch.bfloat16))
        out.float().square().sum().backward()
        grads.append((out.detach(), x.grad, layer.bias.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(grads[0][0], grads[1][0])


def test_a_model_can_be_differentiated_and_trained_around(pair):
    model = load_model(pair.packed)
    model.train()
    ids = torch.arange(1, 9)[None]
    grads = []
    for each in (model, pair.dense):
        each.zero_grad()
        each(ids, labels=ids).loss.backward()
        grads.append(each.model.embed_tokens.weight.grad.float())
    pair.dense.zero_grad()
    scale = grads[1].abs().max()
    assert (grads[0] - grads[1]).abs().max() <= 0.02 * scale
    assert not any("up_proj" in name for name, _ in model.named_parameters())
    assert model.hf_quantizer.is_trainable is True  # with adapters; see test_adapters.py


def test_weight_is_a_copy_that_cannot_be_set(layers):
    packed, dense, _ = layers
    assert torch.equal(packed.weight, dense.weight)
    for value in (nn.Parameter(torch.zeros(1)), torch.zeros(1), None):
        with pytest.raises(ConfigError, match="cannot be replaced, tied"):
            packed.weight = value
    with pytest.raises(ConfigError, match="cannot be replaced, tied"):
        packed.reset_parameters()


@pytest.mark.parametrize(
    "write",
    [
        lambda w, one: w.zero_(),
        lambda w, one: w.data.copy_(one),
        lambda w, one: w.detach().add_(one),
        lambda w, one: w.data.reshape(-1).fill_(0),
        lambda w, one: w.T.mul_(2),
        lambda w, one: w.data.__iadd__(one),
        lambda w, one: w.__setitem__(0, 1),
        lambda w, one: setattr(w, "data", one),
        lambda w, one: torch.add(one, one, out=w),
        lambda w, one: torch.Tensor.add_(w, one),
        lambda w, one: nn.init.zeros_(w),
    ],
)
def test_a_write_that_would_be_lost_is_refused(layers, write):
    packed, dense, _ = layers
    with pytest.raises(ConfigError, match="merged into: unpack the checkpoint"):
        write(packed.weight, torch.ones_like(dense.weight))
    assert torch.equal(packed.weight, dense.weight)


def test_what_is_computed_from_a_weight_is_an_ordinary_tensor(layers):
    packed, dense, _ = layers
    for compute in (torch.clone, lambda w: w + 1, lambda w: w.float(), lambda w: w.data @ w.T):
        found = compute(packed.weight)
        assert type(found) is torch.Tensor
        assert torch.equal(found, compute(dense.weight))


def test_a_state_dict_cannot_set_packed_weights(make_pair):
    for kind, name in (("llama", "up_proj.weight"), ("mixtral", "experts.gate_up_proj")):
        pair = make_pair(kind)
        model = load_model(pair.packed)
        for strict in (True, False):
            with pytest.raises(ConfigError, match="state dict cannot set a packed weight"):
                model.load_state_dict(pair.dense.state_dict(), strict=strict)
        only = {key: value for key, value in pair.dense.state_dict().items() if name in key}
        with pytest.raises(ConfigError, match=name):
            model.load_state_dict(only, strict=False)
        own = model.state_dict()
        assert not any(model.load_state_dict(own))
        pair.check(model)


def test_only_the_bias_is_a_parameter(layers):
    packed, _, _ = layers
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert list(packed.state_dict()) == ["bias"]
    assert "packed" in repr(packed)


def test_conversions_of_one_layer(layers):
    packed, _, _ = layers
    assert packed.to("cpu") is packed
    assert packed.to(torch.bfloat16) is packed
    for convert in (packed.half, packed.float, packed.double):
        with pytest.raises(ConfigError, match="keep their dtype"):
            convert()
    with pytest.raises(BackendError, match="loaded for the CPU"):
        packed.to("meta")
    assert packed.bias.dtype == torch.bfloat16


def test_a_layer_without_a_checkpoint():
    layer = EndorLinear(4, 4, None, torch.float32)
    with pytest.raises(EndorError, match="has no weights"):
        layer(torch.zeros(1, 4))


def test_a_prompt_in_float32_gives_the_logits_within_rounding(make_pair, monkeypatch):
    pair = make_pair("llama")
    monkeypatch.setattr(planner, "choose", lambda costs, machine: Products({}, 2))
    model = load_model(pair.packed, exact=False)
    ids = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits.float()
    expected = pair.logits(pair.dense, ids).float()
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.fixture
def fast_head(make_pair, monkeypatch):
    """A model whose head, tied and not packed, takes Endor's product for up to four rows."""
    pair = make_pair("llama", tie_word_embeddings=True)
    chosen = lambda costs, machine: Products({}, head_rows=4)  # noqa: E731
    monkeypatch.setattr(planner, "choose", chosen)
    model = load_model(pair.packed, exact=False)
    assert type(model.lm_head) is FastHead
    return model, pair


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(7, 64), (300, 100), (65, 1), (1, 576)])
def test_a_head_keeps_shape_dtype_and_bias(dtype, bias, rows, cols):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(cols, rows, bias=bias, dtype=dtype).requires_grad_(False)
    FastHead.adopt(head, 4)
    assert type(head) is FastHead
    for shape in [(cols,), (1, 1, cols), (2, 2, cols), (0, cols), (5, cols)]:
        x = torch.randn(shape, generator=generator).to(dtype)
        exact = nn.functional.linear(
            x.double(), head.weight.double(), head.bias.double() if bias else None
        )
        found = head(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2e-3)


def test_a_head_takes_its_own_product_for_few_rows_only(fast_head, monkeypatch):
    model, _ = fast_head
    head, seen = model.lm_head, []
    real = linear.kernels.matvec
    monkeypatch.setattr(
        linear.kernels, "matvec", lambda w, x, out: seen.append(len(x)) or real(w, x, out)
    )
    with torch.no_grad():
        for rows in (0, 1, 4, 5):
            head(torch.randn(rows, head.in_features).bfloat16())
    assert seen == [1, 4]
    head(torch.randn(1, head.in_features).bfloat16()).sum().backward()  # its weight is trained
    assert head.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(1, head.in_features).bfloat16())
    with torch.no_grad(), pytest.raises(RuntimeError):
        head(torch.randn(1, head.in_features + 1).bfloat16())
    with torch.no_grad(), pytest.raises(RuntimeError):
        head(torch.randn(1, head.in_features))
    assert seen == [1, 4]


def test_a_head_follows_its_weight(fast_head):
    model, _ = fast_head
    head = model.lm_head
    x = torch.randn(1, head.in_features).bfloat16()
    with torch.no_grad():
        assert head.weight is model.model.embed_tokens.weight
        head.weight.mul_(2)
        torch.testing.assert_close(
            head(x), nn.functional.linear(x, head.weight), rtol=2e-2, atol=1e-2
        )
        head.weight = nn.Parameter(torch.zeros_like(head.weight))
        assert not head(x).any()


def test_only_a_head_that_need_not_be_exact_is_changed(fast_head, make_pair):
    _, pair = fast_head
    assert type(load_model(pair.packed).lm_head) is nn.Linear
    for other in (nn.Identity(), EndorLinear(1, 1, None, torch.bfloat16), None):
        kind = type(other)
        FastHead.adopt(other, 4)
        assert type(other) is kind
