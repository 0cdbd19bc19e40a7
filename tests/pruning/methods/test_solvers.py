"""Every calibrated method against plain float64 code, and what all of them promise."""

import pytest
import torch

from endor.errors import PruningError
from endor.pruning import METHODS, PruneOptions
from endor.pruning.layer import relative_error
from endor.pruning.linalg import damped_cholesky
from endor.pruning.methods.alps import fit_survivors

CALIBRATED = ["wanda", "sparsegpt", "admm", "alps"]
SPARSITIES = [0.0, 0.3, 0.5, 0.6, 0.9]


def problem(rows=24, cols=40, tokens=400, seed=0):
    """Return float32 weights and the Gram matrix of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator)
    inputs = torch.randn(tokens, cols, generator=generator) @ mix
    inputs *= torch.rand(cols, generator=generator) * 3 + 0.1
    weight = torch.randn(rows, cols, generator=generator)
    return weight, inputs.T @ inputs / tokens


def solve(method, weight, gram, sparsity=0.5, **fields):
    options = PruneOptions(method=method, sparsity=sparsity, **fields)
    statistic = gram.diagonal().clone() if METHODS[method].statistics == "diagonal" else gram
    before = weight.clone(), statistic.clone()
    found = METHODS[method].create(options).solve(weight, statistic, sparsity)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistic, before[1])
    return found


def plain_wanda(weight, gram, sparsity):
    """Row by row, a sort of (score, index); zeros spread over rows so that the sum is exact."""
    rows, cols = weight.shape
    total = int(rows * cols * sparsity + 0.5)
    out = weight.double().clone()
    for row in range(rows):
        zeros = (row + 1) * total // rows - row * total // rows
        scores = [
            (abs(float(weight[row, col])) * float(gram[col, col]) ** 0.5, col)
            for col in range(cols)
        ]
        for _, col in sorted(scores)[:zeros]:
            out[row, col] = 0
    return out


def plain_sparsegpt(weight, gram, sparsity, block, dampening, kept=0, group=0):
    """The paper's algorithm 1, with the inverse Hessian updated by Gaussian elimination.

    Nothing is factored: after each column the inverse over the remaining ones is recomputed.
    """
    weight, hessian = weight.double().clone(), gram.double().clone()
    rows, cols = weight.shape
    hessian += dampening * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[col:, col:]) for col in range(cols)]
    keep = torch.ones(rows, cols, dtype=torch.bool)
    done = 0
    for col in range(cols):
        if group and col % group == 0:
            stop = col + group
            score = torch.stack(
                [weight[:, at] ** 2 / inverses[at][0, 0] for at in range(col, stop)], 1
            )
            for row in range(rows):
                for _, at in sorted((float(score[row, i]), i) for i in range(group))[
                    : group - kept
                ]:
                    keep[row, col + at] = False
        if not group and col % block == 0:
            stop = min(col + block, cols)
            zeros = int(rows * stop * sparsity + 0.5) - done
            done += zeros
            score = torch.stack(
                [weight[:, at] ** 2 / inverses[at][0, 0] for at in range(col, stop)], 1
            )
            flat = sorted((float(value), at) for at, value in enumerate(score.flatten()))
            for _, at in flat[:zeros]:
                keep[at // (stop - col), col + at % (stop - col)] = False
        inverse = inverses[col]
        pruned = torch.where(keep[:, col], weight[:, col], 0.0)
        error = (weight[:, col] - pruned) / inverse[0, 0]
        weight[:, col] = pruned
        weight[:, col + 1 :] -= error[:, None] * inverse[0, 1:]
    return weight


def plain_scaled(weight, gram, dampening=0.01):
    """Return the weight, a Gram matrix of unit diagonal and the norms that made it so."""
    norm = gram.double().diagonal().sqrt()
    scaled = gram.double() / torch.outer(norm, norm)
    scaled += dampening * torch.eye(len(norm), dtype=torch.float64)
    return weight.double() * norm, scaled, norm


def plain_choice(values, zeros):
    """Drop the `zeros` smallest magnitudes, by a sort."""
    keep = torch.ones(values.numel(), dtype=torch.bool)
    keep[values.abs().flatten().argsort(stable=True)[:zeros]] = False
    return keep.view(values.shape)


def plain_admm(weight, gram, sparsity):
    """Twenty steps of the paper's algorithm 1, the mask growing as a cube over fifteen."""
    dense, scaled, norm = plain_scaled(weight, gram)
    fitted, dual = dense.clone(), torch.zeros_like(dense)
    for step in range(20):
        if step < 15:
            share = sparsity * (1 - (1 - (step + 1) / 15) ** 3)
            keep = plain_choice(fitted + dual, int(dense.numel() * share + 0.5))
        sparse = torch.where(keep, fitted + dual, 0.0)
        dual = fitted + dual - sparse
        right = (dense @ scaled + sparse - dual).T
        fitted = torch.linalg.solve(scaled + torch.eye(len(norm)), right).T
    return torch.where(keep, fitted + dual, 0.0) / norm


def plain_alps(weight, gram, sparsity):
    """The mask by a penalty that grows every three steps; survivors by least squares, row by row.

    The dual is kept as the paper has it, not divided by the penalty.
    """
    dense, scaled, norm = plain_scaled(weight, gram)
    zeros, eye = int(dense.numel() * sparsity + 0.5), torch.eye(len(norm))
    fitted, dual, penalty = dense.clone(), torch.zeros_like(dense), 0.1
    last = plain_choice(dense, zeros)
    for _ in range(20):
        for _ in range(3):
            keep = plain_choice(fitted + dual / penalty, zeros)
            sparse = torch.where(keep, fitted + dual / penalty, 0.0)
            dual = dual + penalty * (fitted - sparse)
            right = (dense @ scaled + penalty * sparse - dual).T
            fitted = torch.linalg.solve(scaled + penalty * eye, right).T
        changed = int((keep & ~last).sum()) / int(keep.sum())
        last = keep
        if not changed:
            break
        penalty *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    out = torch.zeros_like(dense)
    for row in range(len(dense)):
        at = keep[row]
        out[row, at] = torch.linalg.solve(scaled[at][:, at], (scaled @ dense[row])[at])
    return out / norm


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_wanda_is_the_plain_one(sparsity):
    weight, gram = problem()
    found = solve("wanda", weight, gram, sparsity)
    assert torch.equal(found.double(), plain_wanda(weight, gram, sparsity))


@pytest.mark.parametrize("block", [16, 40, 128])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_sparsegpt_is_the_plain_one(sparsity, block):
    weight, gram = problem()
    found = solve("sparsegpt", weight, gram, sparsity, block_size=block)
    wanted = plain_sparsegpt(weight, gram, sparsity, block, 0.01)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8)])
def test_sparsegpt_in_groups_is_the_plain_one(kept, group):
    weight, gram = problem()
    found = solve("sparsegpt", weight, gram, pattern=f"{kept}:{group}", block_size=16)
    wanted = plain_sparsegpt(weight, gram, 0, 16, 0.01, kept, group)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(("method", "plain"), [("admm", plain_admm), ("alps", plain_alps)])
def test_splitting_is_the_plain_one(method, plain, sparsity):
    weight, gram = problem()
    found = solve(method, weight, gram, sparsity)
    wanted = plain(weight, gram, sparsity)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", CALIBRATED)
def test_the_count_is_exact_and_nothing_is_negative_zero(method, sparsity):
    weight, gram = problem(rows=23, cols=37)
    found = solve(method, weight, gram, sparsity, block_size=16)
    assert int((found == 0).sum()) == int(weight.numel() * sparsity + 0.5)
    assert bool(torch.isfinite(found).all())
    assert not bool((torch.signbit(found) & (found == 0)).any())


@pytest.mark.parametrize("method", CALIBRATED)
def test_ties_and_equal_columns_keep_the_count(method):
    weight = torch.ones(8, 32)
    weight[:, ::3] = -1.0
    found = solve(method, weight, torch.eye(32), 0.5)
    assert int((found == 0).sum()) == 128
    assert torch.equal(found, solve(method, weight, torch.eye(32), 0.5))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("method", CALIBRATED)
def test_no_group_has_more_survivors_than_the_pattern(method, pattern):
    weight, gram = problem()
    kept, group = map(int, pattern.split(":"))
    found = solve(method, weight, gram, pattern=pattern)
    survivors = (found != 0).view(24, -1, group).sum(-1)
    assert bool((survivors == kept).all())


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_short_last_group_is_pruned_too(method):
    weight, gram = problem(cols=39)
    found = solve(method, weight, gram, pattern="2:4", block_size=16)
    assert bool(((found[:, :36] != 0).view(24, -1, 4).sum(-1) == 2).all())
    assert bool(((found[:, 36:] != 0).sum(-1) == 2).all())


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_that_never_fire_go_first(method):
    weight, gram = problem()
    dead = [3, 17, 39]
    gram[dead] = 0
    gram[:, dead] = 0
    found = solve(method, weight, gram, 0.5)
    assert bool((found[:, dead] == 0).all())
    assert int((found == 0).sum()) == weight.numel() // 2
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("method", CALIBRATED)
def test_only_dead_inputs_leave_finite_weights_and_the_count(method):
    weight, _ = problem()
    found = solve(method, weight, torch.zeros(40, 40), 0.5)
    assert int((found == 0).sum()) == weight.numel() // 2
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("method", CALIBRATED)
def test_fewer_tokens_than_inputs_are_survived(method):
    weight, gram = problem(tokens=5)
    found = solve(method, weight, gram, 0.5)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
def test_a_statistic_that_is_not_finite_is_refused(method):
    weight, gram = problem()
    gram[3, 4] = float("nan")
    with pytest.raises(PruningError, match="must be finite"):
        solve(method, weight, gram)


def test_better_methods_leave_smaller_errors():
    errors = {}
    for method in CALIBRATED:
        errors[method] = sum(
            relative_error(weight, solve(method, weight, gram, 0.6), gram)
            for weight, gram in (problem(64, 96, 2000, seed) for seed in range(3))
        )
    assert errors["admm"] < errors["sparsegpt"] < errors["wanda"]
    assert errors["alps"] < errors["admm"]


def test_survivors_are_fitted_to_least_squares():
    weight, gram = problem(6, 12, 400)
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    target = weight @ gram
    found = weight
    for _ in range(5):  # ten steps each: enough for twelve unknowns in float32
        found = fit_survivors(found, target, gram, keep)
    for row in range(6):
        at = keep[row].nonzero().squeeze(1)
        wanted = torch.linalg.solve(gram.double()[at][:, at], target.double()[row, at])
        torch.testing.assert_close(found[row, at].double(), wanted, rtol=1e-3, atol=1e-3)
        assert bool((found[row, ~keep[row]] == 0).all())


def test_a_singular_matrix_is_dampened_until_it_factors():
    ones = torch.ones(6, 6)
    factor = damped_cholesky(ones, 0.0)
    torch.testing.assert_close(factor @ factor.T, ones, rtol=0, atol=0.02)


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(PruningError, match="positive definite"):
        damped_cholesky(torch.diag(torch.tensor([1.0, -9.0, 1.0])), 0.01)
