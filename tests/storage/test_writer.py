"""The writer: equal bytes for equal input, readable by safetensors; failures leave nothing."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open as stock_open

from endor import codecs
from endor.codecs import CODECS, DTYPES, CodecChoice, Encoded, TensorSpec
from endor.errors import FormatError, ShapeError
from endor.storage import (
    ALIGN,
    FileLayout,
    FileWriter,
    header_capacity,
    largest_spec,
    remove_stale_temporaries,
    verify_file,
)
from endor.storage.safetensors import PREFIX_BYTES
from endor.storage.sink import PIECE_BYTES

Write = Callable[..., Path]
U8, F32, BF16 = DTYPES["U8"], DTYPES["F32"], DTYPES["BF16"]


def dense(data: np.ndarray) -> Encoded:
    item = {1: U8, 4: F32}[data.dtype.itemsize]
    spec = TensorSpec(data.shape, item, "dense", bitmap=False, nnz=data.size)
    return Encoded(spec, {"": data.view(item.uint)})


ONES = dense(np.ones(10, np.uint8))


def write_all(path: Path, tensors: list[tuple[str, Encoded]], *, capacity: int = ALIGN) -> None:
    """Write one record per tensor."""
    with FileWriter(path, header_capacity=capacity) as writer:
        for at, (name, encoded) in enumerate(tensors):
            with writer.record(f"record number {at}") as record:
                record.add(name, encoded)


def read_back(path: Path) -> dict[str, Encoded]:
    layout = verify_file(path)
    raw = np.fromfile(path, np.uint8)
    out = {}
    for name in layout.tensors:
        record = layout.record_of(name)
        out[name] = layout.bind(name, raw[record.offset : record.offset + record.nbytes])
    return out


def assert_same(found: dict[str, Encoded], wanted: dict[str, Encoded]) -> None:
    assert list(found) == list(wanted)
    for name, encoded in wanted.items():
        assert found[name].spec == encoded.spec
        for suffix, array in encoded.arrays.items():
            np.testing.assert_array_equal(found[name].arrays[suffix], array, err_msg=name)


def test_every_codec_and_dtype_comes_back(write: Write, samples: dict[str, Encoded]) -> None:
    path = write({name: {name: encoded} for name, encoded in samples.items()}, name="single")
    assert_same(read_back(path), samples)
    path = write({"all": samples}, {"note": "ünï\u2028"}, name="together")
    assert_same(read_back(path), samples)
    assert FileLayout.read(path).metadata == {"note": "ünï\u2028"}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 127, 128, 255, 256, 3968, 3969, 4096, 9000]), max_size=4)
        .map(tuple)
        .filter(bool),
        max_size=5,
    ),
    codec=st.sampled_from(["dense", "raw", "exp", "auto"]),
)
def test_every_mixture_of_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, ...]], codec: CodecChoice
) -> None:
    rng = np.random.default_rng(7)
    records: dict[str, dict[str, Encoded]] = {}
    for at, shape in enumerate(sizes):
        bits = [rng.integers(0, 3, n).astype(np.uint16) for n in shape]
        records[f"r{at}"] = {
            f"r{at}.{i}": codecs.encode(b, BF16, codec=codec) for i, b in enumerate(bits)
        }
    path = tmp_path_factory.mktemp("mix") / "x.safetensors"
    plan = {
        record: {name: largest_spec(e.spec.shape, BF16) for name, e in tensors.items()}
        for record, tensors in records.items()
    }
    with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
        for record, tensors in records.items():
            with writer.record(record) as out:
                for name, encoded in tensors.items():
                    out.add(name, encoded)
            assert writer.nbytes % ALIGN == 0
        nbytes = writer.nbytes
    assert path.stat().st_size == nbytes
    wanted = {name: e for tensors in records.values() for name, e in tensors.items()}
    found = read_back(path)
    assert found.keys() == wanted.keys()
    assert_same({name: found[name] for name in wanted}, wanted)
    with stock_open(path, framework="np") as file:
        arrays = set(file.keys())
    keys = {f"{n}_{s}" if s else n for n, e in wanted.items() for s in e.arrays}
    assert {key for key in arrays if not key.startswith("__pad__.")} == keys


def test_stock_safetensors_reads_the_same_arrays(write: Write, samples: dict[str, Encoded]) -> None:
    import torch

    path = write({"all": samples})
    with stock_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        for name, encoded in samples.items():
            for array in encoded.spec.arrays:
                key = f"{name}_{array.suffix}" if array.suffix else name
                if array.dtype.bits:  # torch has not all of the narrow ones
                    continue
                found = file.get_tensor(key)
                assert tuple(found.shape) == array.shape
                raw = found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw == encoded.arrays[array.suffix].tobytes(), key


def test_equal_input_gives_equal_bytes(write: Write, samples: dict[str, Encoded]) -> None:
    one = write({"all": samples}, {"a": "b"}, name="one")
    two = write({"all": samples}, {"a": "b"}, name="two")
    assert one.read_bytes() == two.read_bytes()


def test_an_empty_file(write: Write) -> None:
    path = write({})
    assert verify_file(path).tensors == {}
    with stock_open(path, framework="np") as file:
        assert not list(file.keys())


def test_pieces_of_every_size_meet(write: Write) -> None:
    rng = np.random.default_rng(0)
    sizes = [PIECE_BYTES - 256, 256, PIECE_BYTES, 3 * PIECE_BYTES + 1, 5, 2 * PIECE_BYTES - 1]
    tensors = {f"t{i}": dense(rng.integers(0, 256, n, dtype=np.uint8)) for i, n in enumerate(sizes)}
    path = write({"a": dict(list(tensors.items())[:3]), "b": dict(list(tensors.items())[3:])})
    assert_same(read_back(path), tensors)


def test_strided_arrays_are_stored_in_row_major_order(write: Write) -> None:
    grid = np.arange(60, dtype=np.uint8).reshape(6, 10)
    path = write({"x": {"x": dense(grid.T)}})
    np.testing.assert_array_equal(read_back(path)["x"].arrays[""], grid.T)


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="_\0"),  # none reserved
            min_size=1,
            max_size=12,
        ),
        unique=True,
        max_size=6,
    ),
    shape=st.lists(st.integers(0, 40), max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_planned_header_room_always_suffices(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    shape: tuple[int, ...],
    density: float,
) -> None:
    path = tmp_path_factory.mktemp("room") / "x"
    rng = np.random.default_rng(1)
    plan = {f"r{n}": {n: largest_spec(shape, F32)} for n in names}
    with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
        for at, name in enumerate(names):
            bits = rng.integers(0, 1 << 32, shape).astype(np.uint32)
            bits[rng.random(shape) >= density] = 0
            codec = CODECS[at % 3]
            with writer.record(f"r{name}") as record:
                record.add(name, codecs.encode(bits, F32, codec=codec))
    assert set(FileLayout.read(path).tensors) == set(names)


def test_a_header_that_outgrows_its_room(tmp_path: Path) -> None:
    tensors = [(f"tensor number {i}", ONES) for i in range(40)]
    with pytest.raises(FormatError, match=r"header needs \d+ bytes and 4096 were reserved"):
        write_all(tmp_path / "x", tensors, capacity=100)
    assert not list(tmp_path.iterdir())


def test_a_header_above_the_limit(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="header must stay below"):
        FileWriter(tmp_path / "x", header_capacity=100_000_001)


def test_header_capacity_is_tight_enough() -> None:
    spec = largest_spec((4096, 4096), BF16)
    plan = {f"layer.{i}.q_proj": {f"layer.{i}.q_proj.weight": spec} for i in range(100)}
    assert header_capacity(plan) - PREFIX_BYTES < 100 * 2048


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "x"], "exists already"),
        (["__metadata__"], "reserved"),
        (["__pad__.7"], "reserved"),
        (["\ud800"], "valid Unicode"),
    ],
)
def test_bad_names(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_all(tmp_path / "f", [(name, ONES) for name in names])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["x", "x_bitmap"])
def test_keys_that_collide(tmp_path: Path, first: str) -> None:
    packed = codecs.encode(np.zeros(9, np.uint16), BF16, codec="raw")
    tensors = {"x": packed, "x_bitmap": ONES}
    order = [first, *(tensors.keys() - {first})]
    with pytest.raises(FormatError, match="'x_bitmap' exists already"):
        write_all(tmp_path / "f", [(name, tensors[name]) for name in order])
    assert not list(tmp_path.iterdir())


def test_bad_records(tmp_path: Path) -> None:
    with FileWriter(tmp_path / "f", header_capacity=ALIGN) as writer:
        with writer.record("r") as record:
            record.add("x", ONES)
            with pytest.raises(FormatError, match="record 'r' was not finished"):
                writer.record("s").__enter__()
        with pytest.raises(FormatError, match="record 'r' is written twice"):
            writer.record("r").__enter__()
    with pytest.raises(FormatError, match="is closed"):
        writer.record("t").__enter__()
    with (
        pytest.raises(FormatError, match="record 'r' must hold a tensor"),
        FileWriter(tmp_path / "g", header_capacity=ALIGN) as writer,
        writer.record("r"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_swallowed_failure_still_fails_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with (
            FileWriter(tmp_path / "f", header_capacity=ALIGN) as writer,
            suppress(ValueError),
            writer.record("r") as record,
        ):
            record.add("x", ONES)
            raise ValueError

    with pytest.raises(FormatError, match="record 'r' was not finished"):
        write()
    assert not list(tmp_path.iterdir())


def test_arrays_that_contradict_their_spec(tmp_path: Path) -> None:
    for bad in (np.ones(9, np.uint8), np.ones(10, np.uint16)):
        with (
            pytest.raises(ShapeError, match="by its spec"),
            FileWriter(tmp_path / "f", header_capacity=ALIGN) as writer,
            writer.record("r") as record,
        ):
            record.add("x", Encoded(ONES.spec, {"": bad}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["format", "endor", "endor.checksum"])
def test_reserved_metadata(tmp_path: Path, key: str) -> None:
    with pytest.raises(FormatError, match="reserved"):
        FileWriter(tmp_path / "x", header_capacity=ALIGN, metadata={key: "1"})


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def write() -> None:
        with FileWriter(path, header_capacity=ALIGN) as writer, writer.record("r") as record:
            record.add("x", dense(np.ones(PIECE_BYTES + 1, np.uint8)))
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fadvise"])
def test_a_full_or_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        FileWriter(tmp_path / "f", header_capacity=ALIGN) as writer,
        writer.record("r") as record,
    ):
        record.add("x", ONES)
    if call == "pwrite":
        assert caught.value.filename == str(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_short_writes_are_continued(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:70_001], at))
    data = dense(np.random.default_rng(0).integers(0, 256, PIECE_BYTES + 9, dtype=np.uint8))
    path = write({"x": {"x": data}})
    monkeypatch.undo()
    assert_same(read_back(path), {"x": data})


def test_a_real_size_limit_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as a full disk or a quota would."""
    path = tmp_path / "f"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, old[1]))
    try:
        with (
            pytest.raises(OSError, match=str(path)),
            FileWriter(path, header_capacity=ALIGN) as writer,
            writer.record("r") as record,
        ):
            record.add("x", dense(np.ones(3 * PIECE_BYTES, np.uint8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endor.storage import writer as module

    monkeypatch.setattr(module, "finish", lambda blank, start: bytes(start))
    with (
        pytest.raises(FormatError),
        FileWriter(tmp_path / "f", header_capacity=ALIGN) as writer,
        writer.record("r") as record,
    ):
        record.add("x", ONES)
    assert not list(tmp_path.iterdir())


CRASH = """
import os, sys
import numpy as np
from endor.codecs import DTYPES, Encoded, TensorSpec
from endor.storage import FileWriter, header_capacity

calls = int(sys.argv[2])
def counted(function):
    def call(*args):
        global calls
        if calls == 0:
            os.kill(os.getpid(), 9)
        calls -= 1
        return function(*args)
    return call
os.pwrite, os.fsync, os.replace = counted(os.pwrite), counted(os.fsync), counted(os.replace)
data = np.full(5 << 20, 7, np.uint8)
spec = TensorSpec(data.shape, DTYPES["U8"], "dense", bitmap=False, nnz=data.size)
plan = {name: {name: spec} for name in "abc"}
with FileWriter(sys.argv[1], header_capacity=header_capacity(plan)) as writer:
    for name in "abc":
        with writer.record(name) as record:
            record.add(name, Encoded(spec, {"": data}))
"""


def test_a_killed_writer_leaves_the_old_file_or_the_whole_new_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    seen = set()
    for calls in range(50):
        path.write_text("old")
        child = subprocess.run([sys.executable, "-c", CRASH, str(path), str(calls)], check=False)
        if child.returncode == 0:
            verify_file(path)
            break
        assert child.returncode == -signal.SIGKILL
        if path.stat().st_size == 3:
            seen.add("old")
        else:
            seen.add("new")
            assert verify_file(path).tensors.keys() == set("abc")
        left = remove_stale_temporaries(tmp_path)
        assert len(left) == (1 if path.stat().st_size == 3 else 0)
        assert list(tmp_path.iterdir()) == [path]
    else:
        pytest.fail("the writer never finished")
    assert seen == {"old", "new"}
