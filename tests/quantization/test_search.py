"""The bits that a wanted nearness of predictions takes."""

from contextlib import closing

import pytest
import torch

from endor.checkpoint import open_source
from endor.checkpoint.select import select
from endor.errors import ConfigError
from endor.pruning import PruneOptions
from endor.pruning.stream import LayerStream
from endor.quantization import search
from endor.quantization.contract import QuantizeOptions
from endor.quantization.quantizer import EcqQuantizer
from endor.quantization.search import found_quality


@pytest.fixture
def opened(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    prune = PruneOptions(method="none", calibration=(text,), samples=20, seq_len=32)
    with closing(open_source(tmp_path / "model")) as source:
        yield source, prune, select(source.tensors.values())


def divergence(source, prune, options, selected, scratch):
    scratch.mkdir()
    quantizer = EcqQuantizer(options)
    stream = LayerStream(source, prune, selected, scratch, quantizer=quantizer, held_out=16)
    while stream.done < stream.layers:
        stream.next_layer()
    found = stream.divergence()
    stream.close()
    return found


def test_more_bits_diverge_less(opened, tmp_path):
    source, prune, selected = opened
    found = [
        divergence(source, prune, QuantizeOptions(bits=bits), selected, tmp_path / str(bits))
        for bits in (3.0, 5.0, 7.0)
    ]
    assert found[0] > 3 * found[1] > 9 * found[2] > 0


def test_the_wanted_divergence_is_reached_and_not_by_far(opened, tmp_path):
    source, prune, selected = opened
    wanted = divergence(source, prune, QuantizeOptions(bits=4.7), selected, tmp_path / "one")
    with found_quality(source, prune, QuantizeOptions(), selected, wanted) as (chosen, options):
        assert options.bits == pytest.approx(4.7, abs=0.3)
        assert divergence(source, chosen, options, selected, tmp_path / "two") <= wanted * 1.5
        layers = sorted(path.name for path in chosen.scratch.iterdir())
        assert layers == [f"layer-{layer:05d}.safetensors" for layer in range(3)]
    assert not chosen.scratch.exists()


def test_what_cannot_be_reached_is_an_error_that_says_what_was(opened, monkeypatch):
    source, prune, selected = opened
    monkeypatch.setattr(search, "MOST_RUNS", 2)
    with (
        pytest.raises(ConfigError, match="was not reached; 8"),
        found_quality(source, prune, QuantizeOptions(), selected, 1e-11),
    ):
        pass


def test_a_text_of_one_window_is_too_short(opened, tmp_path):
    source, _, selected = opened
    short = tmp_path / "short.txt"
    short.write_text("a" * 40)
    prune = PruneOptions(method="none", calibration=(short,), samples=20, seq_len=32)
    with (
        pytest.raises(ConfigError, match="leaves none to measure quality on"),
        found_quality(source, prune, QuantizeOptions(), selected, 0.1),
    ):
        pass
