"""Fixtures and rules that all tests share."""

import os

import numpy as np
import pytest

from endor.codecs import DTYPES, DType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PACKABLE = [item for item in DTYPES.values() if item.packable]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=PACKABLE, ids=lambda item: item.name)
def packable(request: pytest.FixtureRequest) -> DType:
    """Each element type that the sparse and exponent codecs take."""
    item: DType = request.param
    return item


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """Skip tests marked `gpu` without a device; fail them under ENDOR_REQUIRE_GPU=1."""
    if request.node.get_closest_marker("gpu"):
        reason = _missing_gpu()
        if reason and os.environ.get("ENDOR_REQUIRE_GPU") == "1":
            pytest.fail(f"ENDOR_REQUIRE_GPU=1, but {reason}")
        if reason:
            pytest.skip(reason)


def _missing_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"cupy does not import: {error}"
    return None
