"""Layers of vLLM with packed matrices beside the same ones with dense, on every rank, one process.

The number of ranks and the own one are given to vLLM's layers; nothing communicates.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import endor
from endor.errors import CheckpointError, ConfigError, ShapeError
from endor.packed import bits_of

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of vLLM and what it imports
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; plugins/vllm/setup_environment.sh makes an environment",
    ),
]

COLS, HEAD, HEADS, KV_HEADS = 128, 16, 8, 2
CODECS = ("dense", "raw", "exp", "int")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.load_config.load_format = "endor"
    with set_current_vllm_config(config), rank(0, 1):
        yield


@contextmanager
def rank(number: int, ranks: int) -> Iterator[None]:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, parameter):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: number)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
        yield


def column(quantised: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    return ColumnParallelLinear(
        COLS, 256, bias=False, quant_config=quantised, prefix="model.layers.0.up"
    )


def row(quantised: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(
        COLS, 256, bias=False, quant_config=quantised, prefix="model.layers.0.down"
    )


def merged(quantised: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        COLS, [192, 192], bias=False, quant_config=quantised, prefix="model.layers.0.gate_up"
    )


def qkv(quantised: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return QKVParallelLinear(
        COLS, HEAD, HEADS, KV_HEADS, bias=False, quant_config=quantised, prefix="model.layers.0.qkv"
    )


def replicated(quantised: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    return ReplicatedLinear(
        COLS, 96, bias=False, quant_config=quantised, prefix="model.layers.0.same"
    )


Q, KV = HEAD * HEADS, HEAD * KV_HEADS
LAYERS: dict[str, tuple[Callable[[Any], torch.nn.Module], list[tuple[Any, int]]]] = {
    "column": (column, [(None, 256)]),
    "row": (row, [(None, 256)]),
    "gate_up": (merged, [(0, 192), (1, 192)]),
    "gate_up fused": (merged, [(None, 384)]),
    "qkv": (qkv, [("q", Q), ("k", KV), ("v", KV)]),
    "qkv fused": (qkv, [(None, Q + 2 * KV)]),
    "replicated": (replicated, [(None, 96)]),
}
"""A layer, and the stored matrices that it is given: which one, and its rows."""


def stored(codec: str, rows: int, seed: int) -> endor.PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, COLS, generator=generator)
    values[values.abs() < 0.5] = 0
    if codec == "int":
        steps = torch.rand(rows, 1, generator=generator) + 0.1
        return endor.pack_codes((values * 5).int(), steps, torch.bfloat16)
    return endor.compress(values.to(torch.bfloat16), codec=codec)


def handed_out(packed: endor.PackedTensor) -> torch.Tensor:
    from endor_vllm.shares import mark

    dense = endor.decompress(packed)
    mark(dense, "w", packed.data)
    return dense


def give(layer: torch.nn.Module, tensor: torch.Tensor, shard: Any) -> None:
    arguments = () if shard is None else (shard,)
    layer.weight.weight_loader(layer.weight, tensor, *arguments)


def packed_layer(name: str, codecs: list[str], dtype: torch.dtype) -> torch.nn.Module:
    from endor_vllm.config import EndorVllmConfig

    make, shares = LAYERS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = make(EndorVllmConfig())
    finally:
        torch.set_default_dtype(before)
    for number, ((shard, rows), codec) in enumerate(zip(shares, codecs, strict=True)):
        give(layer, handed_out(stored(codec, rows, number)), shard)
    return layer


def ready(layer: torch.nn.Module) -> torch.nn.Module:
    layer.quant_method.settle(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def dense_weight(name: str, codecs: list[str], dtype: torch.dtype) -> torch.Tensor:
    make, shares = LAYERS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = make(None)
    finally:
        torch.set_default_dtype(before)
    for number, ((shard, rows), codec) in enumerate(zip(shares, codecs, strict=True)):
        give(layer, endor.decompress(stored(codec, rows, number)), shard)
    return layer.weight.data


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((bits_of(found) == bits_of(wanted)).all())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_rank_has_the_rows_and_columns_of_a_dense_layer(name, codec):
    codecs = [codec] * len(LAYERS[name][1])
    for ranks in (1, 2, 4):
        for number in range(ranks):
            with rank(number, ranks):
                wanted = dense_weight(name, codecs, torch.bfloat16)
                layer = ready(packed_layer(name, codecs, torch.bfloat16))
                found = layer.endor.dense(layer.weight)
                assert same_bits(found, wanted), (ranks, number)
                kinds = {part.spec.codec for part in layer.endor.placement.parts}
                assert kinds == {codec} or (codec in ("raw", "exp") and kinds <= {"raw", "exp"})
                x = torch.randn(2, 3, wanted.shape[1], dtype=torch.bfloat16)
                got, reference = layer.quant_method.apply(layer, x), x @ wanted.T
                assert got.shape == reference.shape
                assert torch.equal(got, torch.nn.functional.linear(x, wanted))


def test_parts_in_different_codecs_and_another_type():
    codecs = ["exp", "dense", "int"]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        wanted = dense_weight("qkv", codecs, dtype)
        layer = ready(packed_layer("qkv", codecs, dtype))
        assert same_bits(layer.endor.dense(layer.weight), wanted)


@pytest.mark.parametrize("codecs", [["exp"] * 3, ["int"] * 3, ["exp", "dense", "raw"]])
def test_a_product_as_it_lies_is_within_rounding(codecs):
    layer = packed_layer("qkv", codecs, torch.bfloat16)
    layer.quant_method.exact = False
    ready(layer)
    wanted = dense_weight("qkv", codecs, torch.bfloat16).double()
    bias = torch.randn(len(wanted), dtype=torch.bfloat16)
    for rows in (1, 8, 9):
        x = torch.randn(rows, COLS, dtype=torch.bfloat16)
        found = layer.quant_method.apply(layer, x, bias).double()
        exact = x.double() @ wanted.T + bias.double()
        scale = x.double().abs() @ wanted.T.abs() + bias.double().abs()
        assert ((found - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * scale).all()
    assert (layer.endor.products, layer.endor.expansions) == (2, 1)


def test_the_bytes_may_be_elsewhere_at_each_use():
    """What a prefetcher does: layers of one role take turns in one buffer."""
    layers = [packed_layer("gate_up", ["exp", codec], torch.bfloat16) for codec in ("raw", "int")]
    for layer in layers:
        layer.quant_method.settle(layer)
    size = max(layer.quant_method.nbytes for layer in layers)
    assert len({layer.quant_method.nbytes for layer in layers}) == 2
    for layer in layers:
        layer.quant_method.nbytes = size
        layer.quant_method.process_weights_after_loading(layer)
    wanted = [layer.endor.dense(layer.weight).clone() for layer in layers]
    assert not torch.equal(*wanted)
    kept = [layer.weight.data.clone() for layer in layers]
    buffer = torch.zeros(size, dtype=torch.uint8)
    for layer in layers:
        layer.weight.data = buffer
    for number in (0, 1, 1, 0):
        buffer.copy_(kept[number])
        assert same_bits(layers[number].endor.dense(layers[number].weight), wanted[number])


def test_what_a_device_is_told_to_expand(monkeypatch):
    """Without a device: what its kernels are given is expanded on the CPU instead."""
    from endor import kernels
    from endor.kernels import gpu

    prepared = []

    class Launches:
        def __init__(self, items: list[tuple[gpu.DeviceEncoded, torch.Tensor]]) -> None:
            prepared.append(items)
            self.items = items

        def run(self) -> None:
            for packed, out in self.items:
                kernels.decode(gpu.download(packed), bits_of(out).reshape(-1))

    monkeypatch.setattr(gpu, "prepare", Launches)
    for codecs, dtype in (
        (["exp", "dense", "int"], torch.bfloat16),
        (["raw", "exp", "exp"], torch.float16),
    ):
        prepared.clear()
        layer = ready(packed_layer("qkv", codecs, dtype))
        matrix, wanted = layer.endor, dense_weight("qkv", codecs, dtype)
        out = torch.empty(wanted.shape, dtype=dtype)
        for data in (layer.weight.data, layer.weight.data, layer.weight.data.clone()):
            out.zero_()
            matrix._expand_on_device(data, out)
            assert same_bits(out, wanted)
        assert len(prepared) == 2  # once for each place of the bytes
        assert all(packed.storage.is_contiguous() for packed, _ in prepared[0])
        ends = [
            max(packed.offsets[array.suffix] + array.nbytes for array in packed.spec.arrays)
            for packed, _ in prepared[0]
        ]
        assert max(ends) + 128 <= layer.weight.numel()


def test_the_operator_is_what_torch_compile_takes_it_for():
    from endor_vllm import op

    layer = ready(packed_layer("row", ["exp"], torch.bfloat16))
    x = torch.randn(2, 3, COLS, dtype=torch.bfloat16)
    bias = torch.randn(256, dtype=torch.bfloat16)
    for each in (bias, None):
        arguments = (x, layer.weight.data, each, layer.endor_handle, 256)
        torch.library.opcheck(op.linear, arguments)


def test_what_is_missing_or_does_not_fit_is_said():
    layer = packed_layer("gate_up", ["exp", "exp"], torch.bfloat16)
    give(layer, handed_out(stored("exp", 192, 0)), 0)
    with pytest.raises(CheckpointError, match="rows once"):
        layer.quant_method.settle(layer)
    with pytest.raises(ConfigError, match="loaded once"):
        give(layer, handed_out(stored("exp", 192, 0)), 0)
    for name, rows in (("column", 200), ("row", 200), ("replicated", 95)):
        fresh = packed_layer(name, [LAYERS[name][1] and "exp"], torch.bfloat16)
        with pytest.raises(ShapeError, match=r"model\.layers\.0"):
            give(fresh, handed_out(stored("exp", rows, 0)), None)


def test_a_layer_that_loads_in_its_own_way_is_refused():
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from endor_vllm.config import EndorVllmConfig

    class Own(ReplicatedLinear):
        def weight_loader(self, param: Any, loaded_weight: torch.Tensor) -> None:
            param.data.copy_(loaded_weight.flip(0))

    with pytest.raises(ConfigError, match="endor unpack"):
        Own(COLS, 96, bias=False, quant_config=EndorVllmConfig(), prefix="model.layers.0.own")


def test_a_vllm_that_changed_is_named(monkeypatch):
    from endor.errors import DependencyError
    from endor_vllm import versions

    versions.check_vllm()
    monkeypatch.setitem(versions.NAMES, "vllm.model_executor.parameter", ("NoSuchParameter",))
    with pytest.raises(DependencyError, match="NoSuchParameter"):
        versions.check_vllm()
