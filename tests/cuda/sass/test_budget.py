"""No kernel costs more than budget.json says; `scripts/gpu_counts.py` records it anew."""

import pytest

from .figures import COLUMNS, FIGURES, Figure, compiler, count, recorded
from .simulator import ARCHITECTURES, Simulator

ROUNDING = 0.1
OTHER_COMPILER = 1.05
"""How much more another version of NVRTC may need."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_costs(simulator: Simulator, figure: Figure, architecture):
    budget = recorded()
    slack = 1.0 if budget["nvrtc"] == compiler() else OTHER_COMPILER
    allowed = budget["costs"][figure.name][architecture]
    found = count(figure, simulator, architecture)
    over = [
        f"{name}: {found[name]} per 1024 weights, {allowed[name]} recorded"
        for name in COLUMNS
        if found[name] > allowed[name] * slack + ROUNDING
    ]
    assert not over, f"{figure.name}, {architecture}: {'; '.join(over)}"


def test_every_figure_is_recorded():
    assert set(recorded()["costs"]) == {figure.name for figure in FIGURES}
