"""The simulated machine, or a visible skip where a tool is missing."""

import os

import pytest

from .simulator import Simulator, missing


@pytest.fixture(scope="session")
def simulator() -> Simulator:
    reason = missing()
    if reason:
        if os.environ.get("ENDOR_REQUIRE_NVRTC") == "1":
            pytest.fail(f"ENDOR_REQUIRE_NVRTC=1, but {reason}")
        pytest.skip(reason)
    return Simulator()
