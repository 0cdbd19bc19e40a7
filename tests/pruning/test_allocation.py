"""Sparsities of layers keep their mean, and bad rules are refused."""

import json

import pytest
import torch

from endor.errors import ConfigError
from endor.pruning import PruneOptions
from endor.pruning.allocation import layer_sparsities, outlier_share, owl


def shares(rule, layers=5, sparsity=0.6, outliers=(1.0, 2.0, 3.0, 4.0, 10.0), **fields):
    options = PruneOptions(sparsity=sparsity, layer_sparsity=rule, **fields)
    return layer_sparsities(options, layers, lambda: outliers)


def test_uniform_is_the_sparsity():
    assert shares("uniform") == [0.6] * 5


def test_linear_rises_with_depth_and_keeps_the_mean():
    found = shares("linear:0.2")
    assert found == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert shares("linear", layers=1) == [0.6]


def test_owl_spares_layers_with_outliers_and_keeps_the_mean():
    found = shares("owl:0.08")
    assert found == sorted(found, reverse=True)
    assert sum(found) / 5 == pytest.approx(0.6)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert owl([3.0, 3.0], 0.5, 0.1) == [0.5, 0.5]


def test_outliers_are_counted_against_the_mean_of_each_matrix():
    scores = [torch.tensor([[1.0] * 9 + [91.0]]), torch.ones(1, 10)]
    assert outlier_share(scores) == 1 / 20


def test_a_file_sets_the_layers_it_names(tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"0": 0.1, "4": 0.9}))
    assert shares(str(path)) == [0.1, 0.6, 0.6, 0.6, 0.9]


@pytest.mark.parametrize("rule", ["linear:x", "linear:-0.1", "owl:2", "nothing", "uniform:1"])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ConfigError, match="layer_sparsity"):
        shares(rule)


def test_a_spread_beyond_the_sparsity_is_refused():
    with pytest.raises(ConfigError, match="layer 0 would get"):
        shares("linear:0.9", sparsity=0.1)


def test_patterns_fix_the_sparsity():
    with pytest.raises(ConfigError, match="needs an unstructured pattern"):
        shares("owl", pattern="2:4")


@pytest.mark.parametrize(("text", "message"), [("[1]", "must be JSON"), ('{"9": 0.5}', "layer 9")])
def test_a_bad_file_is_refused(text, message, tmp_path):
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        shares(str(tmp_path / "layers.json"))
