"""The torch façade: bits survive, buffers are checked."""

from pathlib import Path

import pytest
import torch

import endor
from endor.dtypes import endor_dtype, torch_dtype
from endor.errors import DTypeError, ShapeError
from endor.packed import bits_of, tensor_of

pytestmark = pytest.mark.usefixtures("each_kernel")

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    view = SIGNED[left.element_size()]
    assert torch.equal(left.reshape(-1).view(view), right.reshape(-1).view(view))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (64, 65), (3, 16, 33), (2, 2, 2, 2)], ids=str)
def test_round_trip(dtype, shape):
    torch.manual_seed(0)
    dense = (torch.randn(shape) * 4 * (torch.rand(shape) < 0.5)).to(dtype)
    for codec in ("auto", "raw", "exp", "dense"):
        packed = endor.compress(dense, codec=codec)
        assert packed.shape == dense.shape
        assert packed.dtype == dense.dtype
        assert packed.device == dense.device
        assert_same_bits(endor.decompress(packed), dense)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64], ids=str)
def test_other_types_are_stored_dense(dtype):
    dense = torch.arange(10).to(dtype)
    packed = endor.compress(dense)
    assert packed.spec.codec == "dense"
    assert_same_bits(endor.decompress(packed), dense)


def test_special_values_keep_their_bits():
    bits = torch.tensor([-32768, 32705, -127, 32640, -128, 1, 0, 16256], dtype=torch.int16)
    dense = bits.view(torch.bfloat16)
    packed = endor.compress(dense, codec="exp", bitmap=True)
    assert packed.nnz == 7
    assert_same_bits(endor.decompress(packed), dense)


def test_sizes():
    dense = torch.randn(256, 1024).to(torch.bfloat16)
    dense[torch.rand_like(dense, dtype=torch.float32) < 0.5] = 0
    packed = endor.compress(dense, codec="raw")
    assert packed.nnz == int((dense.view(torch.int16) != 0).sum())
    assert packed.nbytes == 2 * packed.nnz + 256 * 128 + 4 * 257
    assert packed.bits_per_weight == 8 * packed.nbytes / dense.numel()


def test_a_packed_tensor_owns_its_memory():
    dense = torch.ones(8, dtype=torch.int64)
    packed = endor.compress(dense)
    dense.zero_()
    assert endor.decompress(packed).sum() == 8


def test_a_strided_tensor_is_packed_by_its_elements():
    dense = torch.randn(33, 65).to(torch.bfloat16).t()
    assert_same_bits(endor.decompress(endor.compress(dense)), dense.contiguous())


def test_out_is_filled_and_returned():
    dense = torch.randn(33, 65).to(torch.bfloat16)
    out = torch.full_like(dense, float("nan"))
    assert endor.decompress(endor.compress(dense), out=out) is out
    assert_same_bits(out, dense)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(65, 33, dtype=torch.bfloat16),
        torch.empty(33, 65, dtype=torch.float16),
        torch.empty(65, 33, dtype=torch.bfloat16).t(),
    ],
    ids=["shape", "dtype", "layout"],
)
def test_out_is_checked(out):
    packed = endor.compress(torch.randn(33, 65).to(torch.bfloat16))
    with pytest.raises(ShapeError, match="contiguous"):
        endor.decompress(packed, out=out)


def test_dtypes_map_both_ways():
    for dtype in (*FLOATS, torch.int8, torch.int64, torch.bool):
        assert torch_dtype(endor_dtype(dtype)) == dtype
    with pytest.raises(DTypeError, match="complex128"):
        endor_dtype(torch.complex128)


def test_bits_and_tensors_share_memory():
    dense = torch.zeros(4, 4, dtype=torch.bfloat16)
    bits_of(dense)[1, 2] = 0x3F80
    assert dense[1, 2] == 1
    assert_same_bits(tensor_of(bits_of(dense), endor_dtype(dense.dtype)), dense)


def test_codes_are_packed_and_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(40, 96, generator=generator) * 3).round().int()
    steps = (torch.rand(96, generator=generator) + 0.1).half().float()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        packed = endor.pack_codes(codes, steps, dtype)
        assert torch.equal(packed.codes(), codes)
        assert torch.equal(packed.steps(), steps[None])
        assert torch.equal(endor.decompress(packed), (codes.float() * steps).to(dtype))
        endor.save_file({"w": packed}, tmp_path / "w.safetensors")
        assert torch.equal(
            endor.load_file(tmp_path / "w.safetensors")["w"], endor.decompress(packed)
        )
        with endor.safe_open(tmp_path / "w.safetensors") as file:
            assert torch.equal(file.get_packed("w").codes(), codes)
    assert endor.pack_codes(codes, 0.5).dtype == torch.bfloat16
    with pytest.raises(endor.EndorError, match="has no codes"):
        endor.compress(codes.float()).codes()
