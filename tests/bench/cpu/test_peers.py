"""The adapters of peers that need not be installed, over stand-ins with the peers' interface."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from endor.bench.cpu.cases import weight
from endor.bench.cpu.decode import decode
from endor.bench.cpu.pack import pack
from endor.bench.cpu.peers import decoders, encoders, products


class BitmaskCompressor:
    """Interface of compressed-tensors 0.14."""

    def __init__(self, config):
        self.config = config

    def compress(self, state):
        packed = {}
        for name, tensor in state.items():
            base = name.removesuffix(".weight")
            packed[base + ".compressed"] = tensor[tensor != 0]
            packed[base + ".bitmask"] = tensor != 0
        return packed

    def decompress_from_state_dict(self, state):
        mask = state["w.bitmask"]
        dense = torch.zeros(mask.shape, dtype=state["w.compressed"].dtype)
        dense[mask] = state["w.compressed"]
        yield "w.weight", dense


class ZipNN:
    """Interface of zipnn 0.5, its habit of overwriting its input included."""

    def __init__(self, *, input_format, bytearray_dtype, threads):
        assert input_format == "byte"
        assert bytearray_dtype == "bfloat16"
        assert threads == 1

    def compress(self, data):
        packed = bytes(data)
        data[:] = bytes(len(data))
        return packed

    def decompress(self, packed):
        return bytearray(packed)


@pytest.fixture
def installed(monkeypatch):
    modules = {
        "compressed_tensors.compressors": {"BitmaskCompressor": BitmaskCompressor},
        "compressed_tensors.config": {"BitmaskConfig": object},
        "zipnn": {"ZipNN": ZipNN},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def absent(monkeypatch):
    for name in ("compressed_tensors.compressors", "compressed_tensors.config", "zipnn"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("installed")
def test_installed_peers_are_measured(toy):
    toy = replace(toy, repeats=3)
    bits = weight(toy)
    for run in (decode(toy), pack(toy)):
        by_name = {record.subject: record for record in run.records}
        bitmask, zipnn = by_name["compressed-tensors bitmask"], by_name["zipnn"]
        assert bitmask.peer
        assert zipnn.peer
        assert zipnn.packed_bytes == bits.nbytes
        assert zipnn.note == "dense coder: does not know zeros"
        assert bitmask.packed_bytes == bits.nbytes // 2 + bits.size
        assert run.missing == {}


@pytest.mark.usefixtures("absent")
def test_absent_peers_are_named_with_the_reason(toy):
    for make in (decoders, encoders):
        peers, missing = make(toy, weight(toy))
        assert missing["zipnn"] == "not installed"
        assert "0.14.0.1 is the last release" in missing["compressed-tensors"]
        assert peers[0].subject.name == "numpy reference, raw"


@pytest.mark.usefixtures("installed")
def test_a_release_without_the_compressor_is_named(toy, monkeypatch):
    monkeypatch.delattr(sys.modules["compressed_tensors.compressors"], "BitmaskCompressor")
    assert "dropped BitmaskCompressor" in decoders(toy, weight(toy))[1]["compressed-tensors"]


@pytest.mark.usefixtures("installed")
def test_zipnn_does_not_take_every_dtype(toy):
    case = replace(toy, dtype="I8")
    assert decoders(case, weight(case))[1]["zipnn"] == "takes BF16, F16, F32, not I8"


@pytest.mark.usefixtures("installed")
def test_every_decoder_arrives_at_the_weight(toy):
    bits = weight(toy)
    for peer in decoders(toy, bits)[0]:
        assert (peer.dense() == bits).all(), peer.subject.name


def test_products_agree_with_each_other(toy):
    x = torch.randn(2, toy.cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear, single = products(toy, weight(toy), x)[0]
    torch.testing.assert_close(
        linear.subject.run(0).float(), torch.from_numpy(single.subject.run(0)), atol=0.02, rtol=0.02
    )
