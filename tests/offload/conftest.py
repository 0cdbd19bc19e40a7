"""A packed file of small matrices, opened as units and weights."""

import pytest

from ..support.packed_files import Packed, make_packed


@pytest.fixture
def packed(tmp_path) -> Packed:
    """Eight matrices of several sizes."""
    shapes = [(64, 96), (96, 64), (128, 128), (64, 64), (96, 96), (64, 160), (32, 64), (200, 64)]
    return make_packed(tmp_path / "endor-00001-of-00001.safetensors", shapes)
