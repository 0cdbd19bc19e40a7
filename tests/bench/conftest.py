import pytest

from endor.bench.cpu.cases import Case


@pytest.fixture
def toy() -> Case:
    """A weight with a ragged last tile, measured once."""
    return Case(rows=24, cols=120, repeats=1, threads=1)
