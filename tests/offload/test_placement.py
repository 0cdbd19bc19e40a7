"""Residents fill the budget and are spread evenly; sizes are read as people write them."""

import pytest

from endor.errors import BudgetError, ConfigError
from endor.offload import available_bytes, parse_bytes, spread

from .conftest import make_packed


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty units of one size and a head of four times that."""
    path = tmp_path_factory.mktemp("many") / "a.safetensors"
    return make_packed(path, [(64, 64)] * 40 + [(256, 64)])


def used(placement, units):
    return placement.bytes_in("resident", units) + placement.staging_bytes


def test_everything_fits(many):
    placement = spread(many.units, many.nbytes)
    assert set(placement.tiers.values()) == {"resident"}
    assert placement.staging_bytes == 0


def test_the_budget_is_filled_but_never_exceeded(many):
    for percent in range(35, 100, 5):
        budget = many.nbytes * percent // 100
        placement = spread(many.units, budget)
        placement.check(many.units)
        assert used(placement, many.units) <= budget
        smallest = min(unit.nbytes for unit in many.units)
        assert placement.bytes_in("disk", many.units) == 0 or (
            budget - used(placement, many.units) < smallest + 4096
        )


def test_tiers_are_interleaved(many):
    placement = spread(many.units, many.nbytes * 2 // 3)
    tiers = [placement.tiers[unit.name] for unit in many.units[:40]]
    halves = [tiers[:20].count("disk"), tiers[20:].count("disk")]
    assert min(halves) >= 5
    assert abs(halves[0] - halves[1]) <= 3


def test_too_small_a_budget_names_the_least_that_works(many):
    with pytest.raises(BudgetError, match=f"at least {many.largest} bytes"):
        spread(many.units, many.largest - 1)
    placement = spread(many.units, many.largest)
    assert set(placement.tiers.values()) == {"disk"}
    with pytest.raises(BudgetError):
        spread(many.units, -5)


def test_wishes_are_kept(many):
    wishes = {"w0": "disk", "w1": "resident", "w40": "disk"}
    placement = spread(many.units, many.nbytes * 3 // 4, wishes)
    assert {name: placement.tiers[name] for name in wishes} == wishes
    assert used(placement, many.units) <= many.nbytes * 3 // 4
    with pytest.raises(BudgetError):
        spread(many.units, many.largest, {"w0": "resident", "w1": "resident"})


def test_nothing_to_place():
    placement = spread([], 0)
    assert (dict(placement.tiers), placement.staging_bytes) == ({}, 0)


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
