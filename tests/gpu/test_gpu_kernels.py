"""The kernels on a real device, against the numpy reference, bit for bit."""

import numpy as np
import pytest
import torch

import endor
from endor import codecs, kernels
from endor.codecs import DTYPES, DType
from endor.dtypes import torch_dtype
from endor.errors import DTypeError, ShapeError
from endor.kernels import gpu, gpu_multiply, gpu_product, gpu_run

from ..support.int_cases import cases

pytestmark = pytest.mark.gpu

SIZES = [1, 7, 1000, 1024, 1025, 8193, 70001, (1 << 20) + 13]
DENSITIES = [0.0, 0.02, 0.5, 0.97, 1.0]
POISON = 0x5A


def sparse(rng: np.random.Generator, dtype: DType, n: int, density: float) -> np.ndarray:
    bits = rng.integers(0, 1 << (8 * dtype.itemsize), n, dtype=np.uint64).astype(dtype.uint)
    bits[bits == 0] = 1
    bits[rng.random(n) >= density] = 0
    return bits


def weights(rng: np.random.Generator, n: int, density: float) -> np.ndarray:
    """bf16 bits of a normal distribution, with NaN, -0.0 and infinity among them."""
    bits = (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits[rng.random(n) >= density] = 0
    for at, odd in enumerate((0x7FC1, 0x8000, 0xFF80, 0x0001)):
        bits[at::4001] = odd
    return bits


def guarded(packed: gpu.DeviceEncoded) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned destination, and the memory around it."""
    around = torch.full((packed.spec.dense_nbytes + 512,), POISON, dtype=torch.uint8, device="cuda")
    inside = around[256 : 256 + packed.spec.dense_nbytes]
    return inside.view(torch_dtype(packed.spec.dtype)).view(packed.spec.shape), around


def bits(tensor: torch.Tensor) -> np.ndarray:
    raw = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return raw.view(f"<u{tensor.element_size()}")


def check(encoded: codecs.Encoded) -> None:
    packed = gpu.upload(encoded, "cuda")
    out, around = guarded(packed)
    gpu.decode(packed, out)
    assert np.array_equal(bits(out), codecs.decode(encoded).reshape(-1)), encoded.spec
    edge = torch.cat([around[:256], around[-256:]])
    assert bool((edge == POISON).all()), f"{encoded.spec}: wrote outside the output"


@pytest.mark.parametrize("n", SIZES)
def test_raw(packable, rng, n):
    for density in DENSITIES:
        check(codecs.encode(sparse(rng, packable, n, density), packable, codec="raw"))


@pytest.mark.parametrize("bitmap", [True, False])
@pytest.mark.parametrize("n", SIZES)
def test_exp(packable, rng, n, bitmap):
    for density in DENSITIES if bitmap else [1.0]:
        values = sparse(rng, packable, n, density)
        check(codecs.encode(values, packable, codec="exp", bitmap=bitmap))


def test_int(rng):
    """Steps by column, row, group and block; low bits, patches; chunks that end anywhere."""
    for _, encoded in cases(rng):
        check(encoded)


@pytest.mark.parametrize("bitmap", [True, False])
@pytest.mark.parametrize("k", range(1, 9))
def test_exp_for_every_window(rng, k, bitmap):
    from endor.codecs import exp

    values = weights(rng, 50_001, 0.5)
    check(exp.encode(values, DTYPES["BF16"], bitmap=bitmap, k=k, base=min(112, 256 - (1 << k))))


def test_a_record_of_several_tensors(rng):
    dtype = DTYPES["BF16"]
    encoded = [
        codecs.encode(weights(rng, n, 0.5), dtype, codec=codec)
        for n in (5, 4096, 70_001, 1025)
        for codec in ("raw", "exp", "dense")
    ]
    packed = [gpu.upload(item, "cuda") for item in encoded]
    outs = [guarded(item)[0] for item in packed]
    gpu.prepare(list(zip(packed, outs, strict=True))).run()
    for item, out in zip(encoded, outs, strict=True):
        assert np.array_equal(bits(out), codecs.decode(item).reshape(-1))


def test_more_than_2_31_elements():
    n = (1 << 31) + 70_001
    values = np.zeros(n, dtype=np.uint8)
    values[:: 1 << 20] = 7
    values[-70_001:] = 9
    encoded = kernels.encode(values, DTYPES["I8"], codec="raw")
    out = gpu.decode(gpu.upload(encoded, "cuda"))
    assert bool((out[-70_001:] == 9).all())
    assert int((out != 0).sum()) == int(np.count_nonzero(values))
    assert bool((out[:: 1 << 20][:2048] == 7).all())


def test_the_facade_and_safe_open(tmp_path, rng):
    weight = torch.from_numpy(weights(rng, 96 * 512, 0.5).view(np.int16)).view(torch.bfloat16)
    weight = weight.view(96, 512)
    packed = endor.compress(weight)
    on_device = packed.to("cuda")
    assert np.array_equal(bits(endor.decompress(on_device)), bits(weight))
    back = on_device.to("cpu")
    for suffix, array in packed.data.arrays.items():
        assert np.array_equal(array, back.data.arrays[suffix])
    path = tmp_path / "one.safetensors"
    endor.save_file({"w": packed, "plain": torch.arange(5)}, path)
    with endor.safe_open(path, device="cuda") as file:
        assert np.array_equal(bits(file.get_tensor("w")), bits(weight))
        assert file.get_tensor("plain").device.type == "cuda"


def test_launches_follow_the_current_stream(rng):
    """A long kernel first on a side stream: an expansion on another stream would run before it."""
    encoded = codecs.encode(weights(rng, 1 << 16, 0.5), DTYPES["BF16"], codec="exp")
    packed = gpu.upload(encoded, "cuda")
    out = torch.empty(packed.spec.shape, dtype=torch.bfloat16, device="cuda")
    gpu.decode(packed, out)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        out.fill_(1.0)
        gpu.decode(packed, out)
        copy = out.clone()
    torch.cuda.synchronize()
    assert np.array_equal(bits(copy), codecs.decode(encoded).reshape(-1))


def test_expansions_can_be_captured(rng):
    encoded = [
        codecs.encode(weights(rng, 1 << 18, 0.5), DTYPES["BF16"], codec=codec)
        for codec in ("raw", "exp")
    ]
    packed = [gpu.upload(item, "cuda") for item in encoded]
    outs = [torch.empty(item.spec.shape, dtype=torch.bfloat16, device="cuda") for item in packed]
    expansion = gpu.prepare(list(zip(packed, outs, strict=True)))
    expansion.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expansion.run()
    for _ in range(2):
        for out in outs:
            out.fill_(1.0)
        graph.replay()
        for item, out in zip(encoded, outs, strict=True):
            assert np.array_equal(bits(out), codecs.decode(item).reshape(-1))


def test_products_can_be_captured(rng):
    """A replay reads what x holds then; the launch is the one that was kept."""
    values = weights(rng, 64 * 1024, 0.5).reshape(64, 1024)
    values[values & 0x7F80 == 0x7F80] = 0x3F80
    packed = gpu.upload(codecs.encode(values, DTYPES["BF16"], codec="exp"), "cuda")
    x = torch.zeros(2, 1024, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(2, 64, device="cuda")
    work = gpu_multiply.Multiplication(packed)
    work.run(x, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.run(x, out)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(out, gpu_multiply.product(packed, x, torch.empty_like(out)))


@pytest.mark.parametrize("name", ["BF16", "F16"])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_product(rng, name, batch):
    dtype = DTYPES[name]
    kind = torch.bfloat16 if name == "BF16" else torch.float16
    generator = torch.Generator(device="cuda").manual_seed(batch)
    for rows, cols, density in (
        (5, 4096, 0.5),
        (128, 11008, 0.5),
        (7, 576, 0.3),
        (6, 96, 0.5),
        (64, 2048, 1.0),
        (4, 1536, 0.0),
        (33, 14336, 0.3),
    ):
        weight = torch.randn(rows, cols, generator=generator, device="cuda").to(kind)
        weight[torch.rand(rows, cols, generator=generator, device="cuda") >= density] = 0
        x = torch.randn(batch, cols, generator=generator, device="cuda").to(kind)
        expected = x.double() @ weight.double().T
        for codec in ("raw", "exp"):
            encoded = codecs.encode(bits(weight).reshape(rows, cols), dtype, codec=codec)
            packed = gpu.upload(encoded, "cuda")
            wide = torch.full((batch, rows), float("nan"), dtype=torch.float32, device="cuda")
            gpu_multiply.product(packed, x, wide)
            scale = expected.abs().max().clamp_min(1.0)
            assert float((wide.double() - expected).abs().max() / scale) < 1e-5
            if codec == "raw":  # compiling takes a second
                assert torch.equal(gpu_multiply.product(packed, x), wide.to(kind))
            again = gpu_multiply.product(packed, x, torch.empty_like(wide))
            assert torch.equal(again, wide)


@pytest.mark.parametrize("batch", [1, 8])
def test_products_from_exp_have_the_bits_of_raw(rng, batch):
    """Patches among them; for the same rows of a warp and the same warps."""
    values = weights(rng, 48 * 2080, 0.5).reshape(48, 2080)
    values[values & 0x7F80 == 0x7F80] = 0x3F80  # a NaN would hide the rest of its row
    x = torch.randn(batch, 2080, device="cuda").to(torch.bfloat16)
    found = []
    for codec in ("raw", "exp"):
        packed = gpu.upload(codecs.encode(values, DTYPES["BF16"], codec=codec), "cuda")
        out = torch.full((batch, 48), float("nan"), device="cuda")
        launch = gpu_product.plan_product(
            packed.spec,
            packed.addresses,
            x=x.data_ptr(),
            y=out.data_ptr(),
            batch=batch,
            float_out=True,
            segment_nnz=packed.segment_nnz,
            rows=16,
            warps=2,
            shared_limit=gpu_run.shared_limit(0),
        )
        gpu.Expansion([launch], []).run()
        found.append(out)
        assert packed.spec.patches or codec == "raw"
    assert torch.equal(found[0].view(torch.int32), found[1].view(torch.int32))


def test_what_does_not_fit_is_refused(rng):
    packed = gpu.upload(codecs.encode(weights(rng, 64 * 96, 0.5).reshape(64, 96), DTYPES["BF16"],
                                      codec="raw"), "cuda")  # fmt: skip
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    with pytest.raises(DTypeError, match=r"out must be torch.bfloat16, got torch.float16"):
        gpu.decode(packed, torch.empty(64, 96, dtype=torch.float16, device="cuda"))
    with pytest.raises(ShapeError, match="contiguous of shape"):
        gpu.decode(packed, torch.empty(96, 64, **like).T)
    with pytest.raises(ShapeError, match="multiple of 16"):
        gpu.decode(packed, torch.empty(64 * 96 + 1, **like)[1:].view(64, 96))
    with pytest.raises(ShapeError, match="must be on cuda:0"):
        gpu.decode(packed, torch.empty(64, 96, dtype=torch.bfloat16))
    with pytest.raises(DTypeError, match=r"x must be torch\.bfloat16"):
        gpu_multiply.product(packed, torch.zeros(1, 96, device="cuda"))
    with pytest.raises(ShapeError, match=r"x must be contiguous \(batch, 96\)"):
        gpu_multiply.product(packed, torch.zeros(1, 64, **like))
    with pytest.raises(ShapeError, match=r"1\.\.8, got 9"):
        gpu_multiply.product(packed, torch.zeros(9, 96, **like))
