"""The ARM kernels on the contract of every kernel, cross-compiled and run by qemu; natively, the
other files run them as well."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from endor.kernels import native

from .aarch64 import remote
from .test_contract import (  # noqa: F401
    test_a_good_guess_reads_once,
    test_clustered_elements,
    test_contradictions_are_noticed,
    test_dense_only_types,
    test_every_code_width,
    test_integer_window_wraps,
    test_many_threads_over_many_chunks,
    test_probes,
    test_round_trip,
    test_shapes_survive,
)
from .test_matvec import (  # noqa: F401
    test_against_float64,
    test_every_exp_stream,
    test_infinities_stay_in_their_row,
    test_threads_do_not_change_the_sum,
)

CPUS = ("cortex-a57", "max")
"""The base of ARMv8-A, and all that qemu knows: bf16 products by BFMLAL."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run everything on the base; products, which have newer instructions, on both."""
    products = metafunc.function.__module__.endswith("test_matvec")
    own = metafunc.function.__module__ == __name__
    metafunc.parametrize("cpu", CPUS if products or own else CPUS[:1], scope="module")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cross-compiled server; a skip, with a reason, where it cannot be made or run."""
    why = remote.missing()
    if why is not None:
        if os.environ.get("ENDOR_REQUIRE_AARCH64") == "1":
            pytest.fail(f"ENDOR_REQUIRE_AARCH64=1, but {why}")
        pytest.skip(why)
    return remote.build(tmp_path_factory.mktemp("aarch64"))


@pytest.fixture(scope="module")
def library(program: Path, cpu: str) -> Iterator[remote.Remote]:
    """The cross-compiled library in its own process."""
    served = remote.Remote(program, cpu)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def arm(library: remote.Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every call of the compiled kernels to the other process."""
    mask = library.endor_kernels()
    names = tuple(name for i, name in enumerate(native.KERNELS) if mask >> i & 1)
    monkeypatch.delenv("ENDOR_REQUIRE_NATIVE", raising=False)  # it is about this CPU's kernels
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(native, "available", lambda: names)


@pytest.fixture(params=["neon"])
def compiled(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["neon"])
def kernel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_what_runs(library: remote.Remote, cpu: str) -> None:
    assert native.available() == ("scalar", "neon")
    assert bool(library.endor_has_bf16_pairs(native.KERNELS.index("neon"))) == (cpu == "max")


def test_access_outside_an_array_is_noticed(program: Path) -> None:
    """The proof rests on this: the server's arrays end where memory does."""
    served = remote.Remote(program, CPUS[0])
    array = np.zeros(100, np.uint8)
    with pytest.raises(AssertionError, match="outside of its arrays"):
        served.probe_beyond(array)
    served.close()
