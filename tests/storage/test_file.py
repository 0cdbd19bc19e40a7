"""Files of torch tensors: bits come back, plain files too, and damage never passes for weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as stock_load
from safetensors.torch import save_file as stock_save

import endor
from endor import PackedTensor, compress, decompress, load_file, safe_open, save_file
from endor.codecs import CodecChoice
from endor.dtypes import _names
from endor.errors import (
    BackendError,
    CheckpointError,
    DTypeError,
    EndorError,
    FormatError,
    ReadError,
)

pytestmark = pytest.mark.usefixtures("each_kernel")

DTYPES = sorted(_names(), key=str)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert bits(found) == bits(wanted)


def sparse(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    tensor[torch.rand(shape, generator=generator) < 0.5] = 0
    return tensor.to(dtype)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor | PackedTensor]:
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    return {
        "z.last": special,
        "packed": compress(sparse(64, 100)),
        "raw": compress(sparse(64, 100), codec="raw"),
        "full": compress(torch.randn(50, 40).half(), codec="exp", bitmap=False),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "empty packed": compress(torch.zeros(0, 4), codec="raw"),
        "flags": torch.tensor([True, False, True]),
        "strided": torch.arange(12).reshape(3, 4).T,
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


def dense(value: torch.Tensor | PackedTensor) -> torch.Tensor:
    return decompress(value) if isinstance(value, PackedTensor) else value.detach()


def test_everything_comes_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor | PackedTensor]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"who": "me"})
    loaded = load_file(path)
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        assert_same(loaded[name], dense(value))
    with safe_open(path) as file:
        assert file.keys() == list(tensors)
        assert file.metadata() == {"who": "me"}
        for name, value in tensors.items():
            assert_same(file.get_tensor(name), dense(value))
            packed = file.get_packed(name)
            assert_same(decompress(packed), dense(value))
            if isinstance(value, PackedTensor):
                assert packed.spec == value.spec


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(256, dtype=torch.uint8).repeat(8)
    tensor = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(4, -1)
    path = tmp_path / "x.safetensors"
    save_file({"a": tensor, "b": compress(tensor)}, path)
    for found in load_file(path).values():
        assert_same(found, tensor)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 20), max_size=4).map(tuple),
    codec=st.sampled_from(["auto", "dense", "raw", "exp"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8]),
    data=st.data(),
)
def test_random_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    codec: CodecChoice,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = bytearray(data.draw(st.binary(min_size=min(size, 64), max_size=min(size, 64))))
    raw = (raw * (size // 64 + 1))[:size]
    tensor = torch.frombuffer(raw, dtype=dtype).reshape(shape) if size else torch.zeros(shape)
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    save_file({"a": compress(tensor, codec=codec), "b": tensor}, path)
    for found in load_file(path).values():
        assert_same(found, tensor)


def test_results_outlive_the_file_and_belong_to_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = sparse(40, 40)
    save_file({"w": compress(weight), "d": weight}, path)
    with safe_open(path) as file:
        packed, tensor = file.get_packed("w"), file.get_tensor("d")
        tensor.zero_()
        assert_same(file.get_tensor("d"), weight)
    path.unlink()
    assert_same(decompress(packed), weight)


def test_tensors_that_share_a_record(tmp_path: Path) -> None:
    from endor.storage import FileWriter, header_capacity

    values = {name: compress(sparse(8, i + 1)) for i, name in enumerate("abc")}
    path = tmp_path / "x.safetensors"
    plan = {"r": {name: packed.spec for name, packed in values.items()}}
    with (
        FileWriter(path, header_capacity=header_capacity(plan)) as writer,
        writer.record("r") as record,
    ):
        for name, packed in values.items():
            record.add(name, packed.data)
    with safe_open(path) as file:
        for name in "abcab":
            assert_same(file.get_tensor(name), decompress(values[name]))
        reads = file._reader.describe()["records"]
        assert reads == 1
        stolen = file.get_packed("c")
        for array in stolen.data.arrays.values():
            array[...] = 0
        assert_same(file.get_tensor("c"), decompress(values["c"]))


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    wanted = {"b": sparse(4, 5), "a": torch.arange(3)}
    stock_save(wanted, path, metadata={"format": "pt"})
    loaded = load_file(path)
    assert list(loaded) == ["a", "b"]
    for name, tensor in wanted.items():
        assert_same(loaded[name], tensor)
    with safe_open(str(path)) as file:
        assert file.keys() == ["a", "b"]
        assert file.metadata() == {"format": "pt"}
        packed = file.get_packed("b")
        assert packed.spec.codec == "dense"
        assert_same(decompress(packed), wanted["b"])
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            file.get_tensor("c")
        loaded["b"].zero_()
        assert_same(file.get_tensor("b"), wanted["b"])


def test_stock_safetensors_loads_the_dense_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = sparse(30, 30)
    save_file({"dense": weight, "packed": compress(weight)}, path)
    loaded = stock_load(path)
    assert_same(loaded["dense"], weight)
    assert "packed" not in loaded
    assert "packed_bitmap" in loaded


def test_equal_tensors_give_equal_files(
    tmp_path: Path, tensors: dict[str, torch.Tensor | PackedTensor]
) -> None:
    for name in ("one", "two"):
        save_file(tensors, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    save_file({"b": torch.ones(3)}, path)
    assert list(load_file(path)) == ["b"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "x: must be a torch tensor or a PackedTensor, got list"),
        (torch.ones(2, device="meta"), "x: must be an ordinary tensor with data"),
        (torch.ones(2, 2).to_sparse(), "x: must be an ordinary tensor with data"),
        (torch.ones(2, dtype=torch.complex128), "x: torch.complex128 has no safetensors code"),
    ],
)
def test_values_that_cannot_be_stored(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DTypeError, match=message):
        save_file({"x": value}, tmp_path / "x.safetensors")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        load_file(path)
    with pytest.raises(FileNotFoundError):
        save_file({"a": torch.ones(3)}, tmp_path / "no" / "x")
    save_file({"model.norm.weight": torch.ones(3)}, path)
    with (
        safe_open(path) as file,
        pytest.raises(CheckpointError, match=r"did you mean model.norm.weight\?"),
    ):
        file.get_tensor("model.norm.wieght")
    for call in (file.get_tensor, file.get_packed):
        with pytest.raises(ReadError, match="the file is closed"):
            call("model.norm.weight")
    file.close()


def test_a_forced_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with safe_open(path, reader="buffered") as file:
        assert_same(file.get_tensor("a"), torch.ones(3))
    monkeypatch.setattr("endor.storage.source._O_DIRECT", 0)
    with safe_open(path, reader="direct") as file, pytest.raises(BackendError, match="'direct'"):
        file.get_tensor("a")


def test_a_changed_byte_never_passes_for_weights(tmp_path: Path) -> None:
    """Hundreds of places of a small file, through the interface that people use."""
    path, bad = tmp_path / "x.safetensors", tmp_path / "bad.safetensors"
    wanted = {"w": sparse(10, 30), "n": torch.ones(7)}
    save_file({"w": compress(wanted["w"]), "n": wanted["n"]}, path)
    good = path.read_bytes()
    for at in range(0, len(good), 29):
        raw = bytearray(good)
        raw[at] ^= 1 << (at % 8)
        bad.write_bytes(raw)
        with pytest.raises(FormatError):
            load_file(bad)


def test_a_plain_file_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stock_save({"a": torch.ones(300)}, path)
    good = path.read_bytes()
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(EndorError, match=str(path)):
            load_file(path)


def test_the_public_names() -> None:
    assert endor.safe_open is safe_open
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = endor.storage.nothing
