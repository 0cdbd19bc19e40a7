"""Fixtures and rules that all tests share; which CPU kernels they ran.

Tests that take the fixture `kernel` or `compiled`, or a parameter so called, run once for each
kernel. With ENDOR_REQUIRE_NATIVE=1 (`make test`) a run in which a kernel that this CPU has passed
none of them, though another did, fails.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from endor.codecs import DTYPES, DType
from endor.dependencies import installed
from endor.kernels import native

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "xxhash", "click")
PACKABLE = [item for item in DTYPES.values() if item.packable]


KERNELS = (*reversed(native.KERNELS), "numpy")

CPU_FLAGS = {
    "avx2": {"avx2", "bmi2", "fma", "f16c"},
    "avx512": {
        *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vbmi2"),
        "avx512_vpopcntdq",
    },
}
"""What Linux calls what a kernel needs: a second opinion beside the library's."""

KERNEL = "endor kernel"
"""What a report calls the kernel that its test ran."""

passed: Counter[str] = Counter()
"""Tests passed, by the kernel that they ran."""


def of_this_cpu() -> tuple[str, ...]:
    """Return the kernels that this CPU runs, by the library's word or by the system's."""
    flags: set[str] = set()
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                flags.update(line.split())
    found = {name for name, needed in CPU_FLAGS.items() if needed <= flags}
    found.update(native.available(), {"scalar", "numpy"})
    return tuple(name for name in KERNELS if name in found)


def need(name: str) -> None:
    """Skip, with a reason, unless kernel `name` runs here; fail where it is required to."""
    if name == "numpy" or name in native.available():
        return
    required = os.environ.get("ENDOR_REQUIRE_NATIVE") == "1"
    if not native.available():
        _, why = native.load()
        if required:
            pytest.fail(f"ENDOR_REQUIRE_NATIVE=1, but {why}")
        pytest.skip(why)
    if required and name in of_this_cpu():
        pytest.fail(
            f"ENDOR_REQUIRE_NATIVE=1, but this build does not run {name}, which this CPU has"
        )
    pytest.skip(f"this CPU does not run {name}")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each kernel, the reference included."""
    name: str = request.param
    need(name)
    return name


@pytest.fixture(params=KERNELS[:-1])
def compiled(request: pytest.FixtureRequest) -> str:
    """Each compiled kernel."""
    name: str = request.param
    need(name)
    return name


@pytest.fixture
def each_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn, chosen for all that the test calls; for layers above the kernels."""
    monkeypatch.setenv("ENDOR_KERNEL", kernel)
    return kernel


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed:
        params = getattr(item, "callspec", None)
        for argument in ("kernel", "compiled"):
            if params is not None and argument in params.params:
                report.user_properties.append((KERNEL, params.params[argument]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the kernels of tests that passed, those of other processes too."""
    for key, name in report.user_properties:
        if key == KERNEL:
            passed[str(name)] += 1


def missed() -> list[str]:
    """Return the compiled kernels of this CPU that passed no test while another did."""
    compiled = [name for name in of_this_cpu() if name != "numpy"]
    return [name for name in compiled if any(passed[n] for n in compiled) and not passed[name]]


def pytest_report_header() -> list[str]:
    return [
        "with: " + ", ".join(f"{name} {installed(name)}" for name in LIBRARIES),
        f"endor kernels of this CPU: {', '.join(of_this_cpu())}; library: {native.load()[1]}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not passed:
        return
    ran = [f"{name} ({passed[name]} tests)" for name in KERNELS if passed[name]]
    terminalreporter.write_line(f"endor kernels that ran: {', '.join(ran)}")
    if missed():
        terminalreporter.write_line(
            f"endor kernels of this CPU that did not: {', '.join(missed())}"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several processes, with a part of the tests
        return
    if missed() and os.environ.get("ENDOR_REQUIRE_NATIVE") == "1" and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=PACKABLE, ids=lambda item: item.name)
def packable(request: pytest.FixtureRequest) -> DType:
    """Each element type that the sparse and exponent codecs take."""
    item: DType = request.param
    return item


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remember what is measured of this machine for the session, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
