"""`endor.safe_open` takes what `safetensors.safe_open` takes, and gives the same."""

import numpy as np
import pytest
import torch
from safetensors import safe_open as their_open
from safetensors.torch import save_file as their_save

import endor
from endor.errors import CheckpointError, ConfigError, DTypeError, ReadError, ShapeError

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(torch.bfloat16)
INDICES = [
    np.s_[:],
    np.s_[1:3],
    np.s_[:, 2:5],
    np.s_[1],
    np.s_[..., -1],
    np.s_[2:2],
    np.s_[1:3, 4],
]


@pytest.fixture(params=["packed", "plain"])
def path(request, tmp_path):
    found = tmp_path / "w.safetensors"
    if request.param == "plain":
        their_save({"w": WEIGHT}, found)
    else:
        endor.save_file({"w": endor.compress(WEIGHT)}, found)
    return found


@pytest.mark.parametrize("arguments", [(), ("pt",), ("pt", "cpu"), ("torch", torch.device("cpu"))])
def test_positional_arguments(path, arguments):
    with endor.safe_open(path, *arguments) as file:
        assert torch.equal(file.get_tensor("w"), WEIGHT)
    with endor.safe_open(str(path), framework="pt", device="cpu") as file:
        assert list(file.keys()) == ["w"]


@pytest.mark.parametrize("wrong", ["cuda", "np", "tf", "cpu"])
def test_another_framework_is_refused(path, wrong):
    with pytest.raises(ConfigError, match="third argument"):
        endor.safe_open(path, wrong)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_are_those_of_safetensors(path, tmp_path, index):
    plain = tmp_path / "theirs.safetensors"
    their_save({"w": WEIGHT}, plain)
    with endor.safe_open(path, "pt") as ours, their_open(plain, "pt") as theirs:
        found, expected = ours.get_slice("w"), theirs.get_slice("w")
        assert found.get_shape() == expected.get_shape() == [4, 6]
        assert found.get_dtype() == expected.get_dtype() == "BF16"
        part = found[index]
        assert torch.equal(part.view(torch.int16), WEIGHT[index].view(torch.int16))
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("index", [9, np.s_[0, 0, 0], "a"], ids=str)
def test_an_index_that_does_not_fit(path, index):
    with endor.safe_open(path) as file, pytest.raises(ShapeError, match=r"w: cannot take"):
        file.get_slice("w")[index]


def test_slices_of_nothing(path):
    with endor.safe_open(path) as file:
        with pytest.raises(CheckpointError):
            file.get_slice("v")
        late = file.get_slice("w")
    with pytest.raises(ReadError, match="closed"):
        late[0]


def test_reprs_are_one_short_line(path):
    packed = endor.compress(torch.zeros(64, 64))
    with endor.safe_open(path) as file:
        shown = [repr(file), repr(file.get_slice("w")), repr(file.get_packed("w")), repr(packed)]
    shown.append(repr(file))
    assert all("\n" not in text and len(text) < 250 for text in shown)
    assert "1 tensors" in shown[0]
    assert "[4, 6], BF16" in shown[1]
    assert shown[2].startswith("PackedTensor([4, 6] BF16")
    assert "bits a weight" in shown[3]
    assert "closed" in shown[4]


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint16", "int64", "bool", "complex64"]
)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
def test_numpy_arrays(dtype, shape, rng):
    array = rng.integers(0, 3, shape).astype(dtype)
    found = endor.decompress(endor.compress(array))
    assert found.numpy().tobytes() == array.tobytes()
    assert tuple(found.shape) == shape


def test_arrays_that_lie_otherwise():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    frozen = array.copy()
    frozen.setflags(write=False)
    for one in (array.T, array[:, ::2], array.astype(">f4"), frozen, np.asfortranarray(array)):
        assert np.array_equal(endor.decompress(endor.compress(one)).numpy(), one)
    assert endor.compress(array, bits=3.0).codes().shape == (3, 4)


def test_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[1, -0.0], [np.inf, 0]], dtype=ml_dtypes.bfloat16)
    found = endor.decompress(endor.compress(array))
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.view(torch.int16).numpy(), array.view(np.int16))


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(2, "c16")])
def test_arrays_of_no_code(array):
    with pytest.raises(DTypeError, match="no safetensors code"):
        endor.compress(array)
