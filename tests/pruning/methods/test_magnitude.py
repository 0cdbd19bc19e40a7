"""Magnitude pruning on bits, against the masks that the torch methods use."""

import numpy as np
import pytest
import torch

from endor.codecs import dtype
from endor.errors import DTypeError, PruningError
from endor.pruning.contract import METHODS, Pattern, PruneOptions
from endor.pruning.methods.magnitude import Magnitude, magnitudes, prune_smallest, zero_count
from endor.pruning.methods.nm import nm_mask
from endor.pruning.select import keep_mask, keep_mask_rows, row_zero_counts

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
TYPES += [torch.int8]
SHAPES = [(1, 1), (64, 96), (33, 70), (3, 20, 40), (5, 1), (1, 7), (0, 4)]


def weight(shape, kind):
    """Return weights with many ties and a -0.0."""
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    if kind == torch.int8:
        return (out * 300).to(kind)
    out = out.to(kind)
    out.view(-1)[:1] = -0.0
    return out


def raw(tensor):
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.view(*tensor.shape, tensor.element_size())


def assert_keeps(pruned, original, keep):
    """Fail unless `pruned` has the bits of `original` where `keep`, and +0.0 elsewhere."""
    expected = original.clone()
    raw(expected)[~keep] = 0
    assert torch.equal(raw(pruned), raw(expected))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.61, 0.97])
def test_unstructured(kind, shape, sparsity):
    options = PruneOptions(method="magnitude", sparsity=sparsity)
    original = weight(shape, kind)
    whole = Magnitude(options).prune("x", original)
    rows = Magnitude(options, per_row=True).prune("x", original)
    assert torch.equal(raw(original), raw(weight(shape, kind)))
    for place in np.ndindex(shape[:-2]):
        score = original[place].float().abs()
        if score.numel():
            keep = keep_mask(score, zero_count(score.numel(), sparsity))
            assert_keeps(whole[place], original[place], keep)
            keep = keep_mask_rows(score, row_zero_counts(*score.shape, sparsity))
            assert_keeps(rows[place], original[place], keep)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:7"])
def test_patterns(kind, shape, pattern):
    original = weight(shape, kind)
    pruned = Magnitude(PruneOptions(method="magnitude", pattern=pattern)).prune("x", original)
    parsed = Pattern.parse(pattern)
    keep = nm_mask(original.float().abs(), parsed.kept, parsed.group)
    assert_keeps(pruned, original, keep)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I8"])
def test_exact_counts_on_any_bits(rng, code):
    """NaN, infinities and subnormals order by their bits; ties go by index."""
    kind = dtype(code)
    bits = rng.integers(0, 1 << 8 * kind.itemsize, 200_001, dtype=np.uint64).astype(kind.uint)
    order = np.argsort(magnitudes(bits, kind), kind="stable")
    for zeros in (0, 1, 777, 100_000, 200_000, 200_001):
        pruned = bits.copy()
        prune_smallest(pruned, kind, zeros)
        expected = bits.copy()
        expected[order[:zeros]] = 0
        assert np.array_equal(pruned, expected)


def test_names_are_skipped_as_the_options_say():
    pruner = Magnitude(PruneOptions(method="magnitude", skip="down"))
    original = weight((8, 8), torch.bfloat16)
    assert torch.equal(raw(pruner.prune("a.down_proj", original)), raw(original))
    assert not torch.equal(raw(pruner.prune("a.up_proj", original)), raw(original))


def test_what_cannot_be_pruned():
    pruner = Magnitude(PruneOptions(method="magnitude"))
    with pytest.raises(DTypeError, match=r"x: cannot prune torch\.int64"):
        pruner.prune("x", torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(DTypeError, match="x: cannot prune U8"):
        pruner.prune_bits("x", np.ones((4, 4), np.uint8), dtype("U8"))
    with pytest.raises(PruningError, match="x: only matrices"):
        pruner.prune("x", torch.ones(4))


@pytest.mark.parametrize(("name", "group"), [("magnitude", "matrix"), ("magnitude-row", "row")])
def test_the_table_has_it(name, group):
    method = METHODS[name]
    assert not method.calibrated
    pruner = method.create(PruneOptions(method=name, sparsity=0.25))
    assert isinstance(pruner, Magnitude)
    assert pruner.describe() == {
        "method": "magnitude",
        "sparsity": 0.25,
        "pattern": "unstructured",
        "group": group,
    }
