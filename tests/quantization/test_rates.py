"""Bits shared out over the matrices of a layer: the same slope, the same mean, within bounds."""

import math
from contextlib import closing

import pytest
import torch

from endor.checkpoint import open_source
from endor.checkpoint.select import select
from endor.pruning import PruneOptions
from endor.pruning.sensitivity import probe
from endor.pruning.stream import LayerStream
from endor.quantization.contract import QuantizeOptions
from endor.quantization.ecq import Ecq
from endor.quantization.quantizer import EcqQuantizer
from endor.quantization.rates import MOST_OFFSET_BITS, Curve, share_out


def curve(worth, numel=100, height=0.0):
    """Return a curve on which a bit halves the scale."""
    scales = tuple(step / 4 for step in range(-12, 13))
    return Curve(numel, worth, scales, tuple(4.0 + height - scale for scale in scales))


def test_a_bit_buys_the_same_everywhere():
    curves = {"a": [curve(1.0)], "b": [curve(2.0, 300)], "c": [curve(4.0, height=0.3)]}
    offsets = share_out(curves)
    slopes = []
    for name, (one,) in curves.items():
        scale = -offsets[name]  # of all three the middle is at scale 1
        assert one.at(scale) == pytest.approx(one.bits[12] + offsets[name])
        slopes.append(one.worth * 2 ** (2 * scale))
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-3)
    mean = sum(offsets[name] * parts[0].numel for name, parts in curves.items())
    assert mean == pytest.approx(0, abs=1e-6)


def test_offsets_are_bounded_and_cancel():
    curves = {"a": [curve(1e-9)], "b": [curve(1e9)], "c": [curve(1.0), curve(0.0)]}
    offsets = share_out(curves)
    assert max(map(abs, offsets.values())) <= MOST_OFFSET_BITS + 1e-6
    assert offsets["a"] < offsets["c"] < offsets["b"]
    total = offsets["a"] * 100 + offsets["b"] * 100 + offsets["c"] * 200
    assert total == pytest.approx(0, abs=1e-6)


def test_where_nothing_is_known_all_get_the_same():
    assert share_out({"a": [curve(0.0)], "b": [curve(0.0, 7)]}) == {"a": 0.0, "b": 0.0}
    assert share_out({"a": [curve(3.0)]}) == pytest.approx({"a": 0.0}, abs=1e-6)


def test_worth_is_what_errors_of_codes_change_of_a_loss():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    weight = torch.randn(64, 48, generator=generator)
    problem = Ecq(weight, inputs.T @ inputs / 500, dtype=torch.float32)
    gradient = torch.randn(64, 500, generator=generator) @ inputs
    scale = 0.05
    coded = problem.code(scale)
    # Gradients of other probes, of the same distribution: the mean over them is the expectation.
    changes = []
    for _ in range(300):
        other = torch.randn(64, 500, generator=generator) @ inputs
        changes.append(float(((coded.values - weight) * other).sum()) ** 2)
    found = sum(changes) / len(changes)
    assert found == pytest.approx(problem.worth(gradient) * scale**2 / 12 * weight.numel(), rel=0.3)


def stream_of(source, text, folder, bits):
    folder.mkdir()
    options = PruneOptions(method="none", calibration=(text,), samples=20, seq_len=32)
    selected = select(source.tensors.values())
    quantizer = EcqQuantizer(QuantizeOptions(bits=bits))
    return LayerStream(source, options, selected, folder, quantizer=quantizer), quantizer


def test_probes_leave_the_layer_as_it_was(tmp_path, save, text):
    save(tmp_path / "model", "mixtral", torch.bfloat16)
    with closing(open_source(tmp_path / "model")) as source:
        stream, _ = stream_of(source, text, tmp_path / "scratch", 3)
        with closing(stream):
            layer = stream._skeleton.load_layer(0)
            matrices = stream._matrices(0)
            before = {name: value.clone() for name, value in layer.named_parameters()}
            given = layer, stream._calls[0], stream._hidden, stream.windows, matrices.all
            found = probe(*given, 0, torch.float32)
            again = probe(*given, 0, torch.float32)
            for name, value in layer.named_parameters():
                assert torch.equal(value, before[name])
                assert value.grad is None
                assert not value.requires_grad
            wanted = {id(matrix.parameter): matrix.parameter for matrix in matrices.all}
            assert found.keys() == wanted.keys()
            for key, parameter in wanted.items():
                assert found[key].shape == parameter.shape
                assert torch.equal(found[key], again[key])
                assert float(found[key].abs().sum()) > 0


def test_matrices_of_a_layer_get_different_bits_and_the_mean_is_kept(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    with closing(open_source(tmp_path / "model")) as source:
        stream, quantizer = stream_of(source, text, tmp_path / "scratch", 4)
        with closing(stream):
            stream.next_layer()
        offsets = quantizer._offsets
        assert len(offsets) >= 5  # keys and values are too small to be selected
        assert max(offsets.values()) - min(offsets.values()) > 0.1
        total = sum(offset * source.tensors[name].numel for name, offset in offsets.items())
        assert math.isclose(total, 0.0, abs_tol=1.0)
