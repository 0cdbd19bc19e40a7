"""Which kernel runs, and what happens where none was compiled."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from endor import kernels
from endor.codecs import DTYPES
from endor.errors import BackendError, ConfigError, SlowWarning
from endor.kernels import dispatch, native

from ..conftest import need


def test_describe_names_what_runs(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDOR_KERNEL", compiled)
    monkeypatch.setenv("ENDOR_THREADS", "3")
    found = kernels.describe()
    assert found["compiled"] is True
    assert found["kernel"] == compiled
    assert found["threads"] == 3
    assert (found["slow"] is None) == (compiled != "scalar")
    assert Path(str(found["library"])).is_file()
    assert compiled in str(found["reason"])


def test_auto_takes_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENDOR_KERNEL", raising=False)
    monkeypatch.setattr(native, "available", lambda: ("scalar", "avx2"))
    assert kernels.select() == native.KERNELS.index("avx2")


def test_forced_and_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: ("scalar",))
    monkeypatch.setenv("ENDOR_KERNEL", "avx512")
    with pytest.raises(BackendError, match="avx512"):
        kernels.encode(np.ones(8, dtype=np.uint16), DTYPES["BF16"])
    monkeypatch.setenv("ENDOR_KERNEL", "sse")
    with pytest.raises(ConfigError, match="sse"):
        kernels.select()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.delenv("ENDOR_KERNEL", raising=False)
    monkeypatch.setattr(native, "load", lambda: (None, "no compiled library"))
    monkeypatch.setattr(native, "available", lambda: ())
    found = kernels.describe()
    assert found["compiled"] is False
    assert found["kernel"] == "numpy"
    assert found["reason"] == "no compiled library"
    assert "slower" in str(found["slow"])
    bits = (rng.integers(0, 3, 3000) * 0x3F00).astype(np.uint16)
    dispatch._warn_once.cache_clear()
    with pytest.warns(SlowWarning, match="no compiled library.*slower") as caught:
        encoded = kernels.encode(bits, DTYPES["BF16"])
    assert Path(caught[0].filename).name in (Path(__file__).name, "dispatch.py")
    kernels.encode(bits, DTYPES["BF16"])  # not again
    out = np.empty_like(bits)
    assert np.array_equal(kernels.decode(encoded, out), bits)
    with pytest.raises(BackendError, match="no compiled library"):
        kernels.select("scalar")
    with pytest.raises(BackendError, match="no compiled library"):
        native.library()


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENDOR_THREADS", raising=False)
    assert 1 <= kernels.thread_count() <= dispatch.MAX_THREADS
    assert kernels.thread_count(1000) == dispatch.MAX_THREADS
    monkeypatch.setenv("ENDOR_THREADS", "5")
    assert kernels.thread_count() == 5
    assert kernels.thread_count(2) == 2
    for text in ("0", "-1", "many"):
        monkeypatch.setenv("ENDOR_THREADS", text)
        with pytest.raises(ConfigError):
            kernels.thread_count()


def test_a_cpu_without_vectors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    need("scalar")
    monkeypatch.delenv("ENDOR_KERNEL", raising=False)
    monkeypatch.setattr(native, "available", lambda: ("scalar",))
    found = kernels.describe()
    assert found["kernel"] == "scalar"
    assert "no faster one is for this CPU" in str(found["reason"])
    assert "slower" in str(found["slow"])


def test_numpy_on_request_is_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: ())
    dispatch._warn_once.cache_clear()
    assert kernels.select("numpy") is None
    monkeypatch.setenv("ENDOR_KERNEL", "numpy")
    assert kernels.select() is None


def test_unknown_status() -> None:
    with pytest.raises(MemoryError):
        native.check(2)
    with pytest.raises(BackendError):
        native.check(3)
    with pytest.raises(BackendError, match="99"):
        native.check(99)


def test_a_kernel_that_no_test_ran_fails_the_run() -> None:
    if len(native.available()) < 2:
        pytest.skip("one kernel here")
    best = native.available()[-1]
    tests = Path(__file__).parent / "test_threshold.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests), "-k", f"wide and {best}"],
        env={**os.environ, "ENDOR_REQUIRE_NATIVE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout
    assert f"endor kernels that ran: {best} (1 tests)" in done.stdout
    assert "endor kernels of this CPU that did not: " in done.stdout
