"""Sizes are read as people write them, and memory is looked up."""

from types import SimpleNamespace

import pytest

from endor.errors import ConfigError
from endor.planning import Placement, available_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5G", 1_500_000_000),
        ("1.5Ki", 1536),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1", -1, "1XB", "1 G i B", None, True, 1.5])
def test_not_sizes(text):
    with pytest.raises(ConfigError, match="--ram must be bytes"):
        parse_bytes(text, "--ram")


def test_available_memory_is_plausible():
    assert 1 << 20 < available_bytes() < 1 << 50


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_host_lies_between_none_and_all(share):
    units = [SimpleNamespace(name="a", nbytes=1)]
    Placement({"a": "host"}, 0, 1, {"a": 0.5}).check(units, on_device=True)
    with pytest.raises(ConfigError, match=r"share of unit a must lie in 0\.\.1"):
        Placement({"a": "host"}, 0, 1, {"a": share}).check(units, on_device=True)
    with pytest.raises(ConfigError, match="without a device"):
        Placement({"a": "host"}, 0).check(units)
