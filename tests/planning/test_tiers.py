"""Sizes are read as people write them, and memory is looked up."""

import pytest

from endor.errors import ConfigError
from endor.planning import available_bytes, parse_bytes


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
