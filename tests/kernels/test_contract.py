"""One contract for every kernel: the reference's bytes, and its elements back, wherever they go."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, DType, Encoded
from endor.errors import ConfigError, DTypeError, FormatError, ShapeError
from endor.kernels import native, packing

from ..conftest import KERNELS, need
from .conftest import STYLES, elements

CANARY = 0xA5
SIZES = [0, 1, 63, 64, 65, 1023, 1024, 1025, 2047, 8191, 8192, 8193, 66000]
PACKABLE = [item for item in DTYPES.values() if item.packable]
CODECS = [("auto", None), ("raw", None), ("exp", True), ("exp", False), ("dense", None)]


def assert_same(got: Encoded, want: Encoded) -> None:
    assert got.spec == want.spec
    assert list(got.arrays) == list(want.arrays)
    for suffix, array in want.arrays.items():
        other = got.arrays[suffix]
        assert other.dtype == array.dtype, suffix
        assert other.shape == array.shape, suffix
        wrong = np.flatnonzero(other.reshape(-1) != array.reshape(-1))
        assert not wrong.size, f"{suffix}[{wrong[0]}] of {got.spec}"


def assert_decodes(
    encoded: Encoded, bits: np.ndarray, kernel: str, start: int, stop: int, pad: int, **how: object
) -> None:
    """Decode a range into the middle of a buffer and look at it and at what surrounds it."""
    buffer = np.full(stop - start + 2 * pad, CANARY, dtype=bits.dtype)
    out = buffer[pad : pad + stop - start]
    assert kernels.decode(encoded, out, start=start, stop=stop, kernel=kernel, **how) is out  # type: ignore[arg-type]
    wrong = np.flatnonzero(out != bits[start:stop])
    assert not wrong.size, f"element {start + wrong[0]} of {encoded.spec}"
    assert (buffer[:pad] == CANARY).all()
    assert (buffer[pad + stop - start :] == CANARY).all()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    item=st.sampled_from(PACKABLE),
    n=st.one_of(st.sampled_from(SIZES), st.integers(0, 70000)),
    density=st.one_of(st.sampled_from([0.0, 0.001, 0.5, 1.0]), st.floats(0, 1)),
    style=st.sampled_from(STYLES),
    how=st.sampled_from(CODECS),
    threads=st.integers(1, 4),
    pad=st.integers(0, 70),
    streaming=st.booleans(),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_round_trip(
    kernel: str,
    seed: int,
    item: DType,
    n: int,
    density: float,
    style: str,
    how: tuple[codecs.CodecChoice, bool | None],
    threads: int,
    pad: int,
    streaming: bool,
    cut: tuple[float, float],
) -> None:
    need(kernel)
    bits = elements(np.random.default_rng(seed), item, n, density, style)
    codec, bitmap = how
    encoded = kernels.encode(bits, item, codec=codec, bitmap=bitmap, threads=threads, kernel=kernel)
    assert_same(encoded, codecs.encode(bits, item, codec=codec, bitmap=bitmap))
    codecs.validate(encoded)
    start, stop = sorted(round(share * n) for share in cut)
    for low, high in ((0, n), (start, stop)):
        assert_decodes(encoded, bits, kernel, low, high, pad, threads=threads, streaming=streaming)


@pytest.mark.parametrize(
    ("packable", "code_bits"),
    [(item, k) for item in PACKABLE for k in range(1, item.exponent_bits + 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_code_width(compiled: str, packable: DType, code_bits: int) -> None:
    rng = np.random.default_rng(code_bits)
    span = 1 << packable.exponent_bits
    width = 1 << code_bits
    base = 3 if span - width > 3 else 0
    exponents = base + rng.integers(0, width, 9000)
    exponents[::1000] = rng.integers(0, span, 9)
    rests = rng.integers(0, 1 << packable.rest_bits, 9000, dtype=np.uint64)
    bits = packable.join(exponents % span, rests)
    want = codecs.exp.encode(bits, packable, bitmap=True, k=code_bits, base=base)
    assert_decodes(want, bits, compiled, 0, bits.size, 3)
    chosen = codecs.encode(bits, packable, codec="exp")
    assert_same(kernels.encode(bits, packable, codec="exp", kernel=compiled), chosen)


def test_integer_window_wraps(compiled: str, rng: np.random.Generator) -> None:
    bits = (rng.integers(-6, 7, 20000) % 256).astype(np.uint8)
    encoded = kernels.encode(bits, DTYPES["I8"], codec="exp", kernel=compiled)
    assert encoded.spec.base > 128
    assert_same(encoded, codecs.encode(bits, DTYPES["I8"], codec="exp"))
    assert_decodes(encoded, bits, compiled, 0, bits.size, 1)


@pytest.mark.parametrize("name", ["BF16", "F32", "U8"])
def test_many_threads_over_many_chunks(compiled: str, name: str, rng: np.random.Generator) -> None:
    bits = elements(rng, DTYPES[name], 700_001, 0.4, "outliers")
    for codec in ("raw", "exp"):
        want = codecs.encode(bits, DTYPES[name], codec=codec)  # type: ignore[arg-type]
        for threads in (1, 2, 3, 4):
            got = kernels.encode(bits, DTYPES[name], codec=codec, threads=threads, kernel=compiled)  # type: ignore[arg-type]
            assert_same(got, want)
            for streaming in (False, True):
                assert_decodes(
                    want, bits, compiled, 5, 700_000, 9, threads=threads, streaming=streaming
                )


def test_beyond_the_streaming_size(compiled: str, rng: np.random.Generator) -> None:
    n = (17 << 20) // 2
    bits = elements(rng, DTYPES["BF16"], n, 0.5, "window")
    encoded = kernels.encode(bits, DTYPES["BF16"], codec="raw", kernel=compiled)
    assert_same(encoded, codecs.encode(bits, DTYPES["BF16"], codec="raw"))
    for pad in (0, 24, 1):
        assert_decodes(encoded, bits, compiled, 0, n, pad)


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E4M3", "I8"])
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("surprise", ["none", "exponents", "zeros", "few"])
def test_guessed_windows(
    compiled: str, name: str, density: float, surprise: str, rng: np.random.Generator
) -> None:
    """A tensor large enough to be packed by the window of a sample, which may mislead."""
    item, n = DTYPES[name], 1_500_007
    assert n * item.itemsize >= packing.GUESSED_NBYTES
    bits = elements(rng, item, n, density, "window")
    tiles = bits[: n // 1024 * 1024].reshape(-1, 1024)
    unsampled = np.arange(len(tiles)) % -(-len(tiles) // packing.SAMPLED_TILES) != 0
    if surprise == "exponents":
        tiles[unsampled] = elements(
            rng, item, int(unsampled.sum()) * 1024, density, "noise"
        ).reshape(-1, 1024)
    elif surprise == "zeros":
        tiles[unsampled] = 0
    elif surprise == "few":
        bits[4096 + rng.integers(0, 900, 50)] = 1
    scratch = kernels.Scratch()
    for codec, bitmap in CODECS[:4]:
        want = codecs.encode(bits, item, codec=codec, bitmap=bitmap)  # type: ignore[arg-type]
        for how in ({"threads": 1}, {"threads": 3, "scratch": scratch}):
            got = kernels.encode(bits, item, codec=codec, bitmap=bitmap, kernel=compiled, **how)  # type: ignore[arg-type]
            assert_same(got, want)


def test_a_good_guess_reads_once(
    compiled: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    exp = packing.Packer.exp

    def counted(self: packing.Packer, *args: object, **how: object) -> object:
        begun.append(bool(how))
        return exp(self, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(packing.Packer, "exp", counted)
    for density in (0.5, 1.0):
        values = rng.standard_normal(1 << 20, dtype=np.float32)
        values[rng.random(values.size) >= density] = 0
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        assert kernels.encode(bits, DTYPES["BF16"], kernel=compiled).spec.codec == "exp"
    assert begun == [True, True]


def test_clustered_elements(compiled: str) -> None:
    """Empty tiles and groups beside full ones: chunks that own no word, patches after a gap."""
    bits = np.zeros(300_000, dtype=np.uint16)
    bits[70_000:70_010] = 0x7F81
    bits[150_000:160_000] = np.arange(10_000) | 1
    bits[299_999] = 0x8000
    for how in (("raw", None), ("exp", True), ("exp", False)):
        codec, bitmap = how
        want = codecs.encode(bits, DTYPES["BF16"], codec=codec, bitmap=bitmap)  # type: ignore[arg-type]
        got = kernels.encode(
            bits,
            DTYPES["BF16"],
            codec=codec,  # type: ignore[arg-type]
            bitmap=bitmap,
            threads=3,
            kernel=compiled,
        )
        assert_same(got, want)
        assert_decodes(want, bits, compiled, 0, bits.size, 2, threads=3)


def test_scratch_is_reused(compiled: str, rng: np.random.Generator) -> None:
    scratch = kernels.Scratch()
    for n in (50_000, 70_000, 3, 0, 60_000):
        for codec, bitmap in CODECS:
            bits = elements(rng, DTYPES["BF16"], n, 0.5, "outliers")
            got = kernels.encode(
                bits,
                DTYPES["BF16"],
                codec=codec,  # type: ignore[arg-type]
                bitmap=bitmap,
                scratch=scratch,
                kernel=compiled,
            )
            assert_same(got, codecs.encode(bits, DTYPES["BF16"], codec=codec, bitmap=bitmap))  # type: ignore[arg-type]
    held = scratch.nbytes
    first = kernels.encode(bits, DTYPES["BF16"], codec="raw", scratch=scratch, kernel=compiled)
    second = kernels.encode(bits, DTYPES["BF16"], codec="raw", scratch=scratch, kernel=compiled)
    assert np.shares_memory(first.arrays["values"], second.arrays["values"])
    assert scratch.nbytes == held


def test_concurrent_callers(compiled: str, rng: np.random.Generator) -> None:
    bits = elements(rng, DTYPES["BF16"], 550_000, 0.5, "outliers")
    encoded = codecs.encode(bits, DTYPES["BF16"], codec="exp")

    def one(_: int) -> bool:
        out = np.empty_like(bits)
        kernels.decode(encoded, out, threads=3, kernel=compiled)
        again = kernels.encode(bits, DTYPES["BF16"], codec="exp", threads=2, kernel=compiled)
        same = np.array_equal(again.arrays["planes"], encoded.arrays["planes"])
        return same and np.array_equal(out, bits)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(60)))


def test_shapes_survive(kernel: str) -> None:
    for shape in ((), (0, 5), (3, 4, 5), (2, 1, 2, 2)):
        bits = np.ones(shape, dtype=np.uint16)
        encoded = kernels.encode(bits, DTYPES["F16"], codec="raw", kernel=kernel)
        assert encoded.spec.shape == shape


def test_dense_only_types(kernel: str) -> None:
    bits = np.arange(10, dtype=np.uint64)
    encoded = kernels.encode(bits, DTYPES["I64"], kernel=kernel)
    assert encoded.spec.codec == "dense"
    assert_decodes(encoded, bits, kernel, 2, 9, 1)
    with pytest.raises(ConfigError):
        kernels.encode(bits, DTYPES["I64"], codec="raw", kernel=kernel)


def test_wrong_arguments(kernel: str) -> None:
    bits = np.ones(100, dtype=np.uint16)
    encoded = kernels.encode(bits, DTYPES["BF16"], codec="raw", kernel=kernel)
    frozen = np.empty(100, dtype=np.uint16)
    frozen.flags.writeable = False
    with pytest.raises(DTypeError):
        kernels.encode(bits.view(np.int16), DTYPES["BF16"], kernel=kernel)
    with pytest.raises(DTypeError):
        kernels.decode(encoded, np.empty(100, dtype=np.uint32), kernel=kernel)
    for out in (
        np.empty(99, dtype=np.uint16),
        np.empty((10, 10), dtype=np.uint16),
        np.empty(200, dtype=np.uint16)[::2],
        frozen,
    ):
        with pytest.raises(ShapeError):
            kernels.decode(encoded, out, kernel=kernel)
    for start, stop in ((-1, 5), (6, 5), (0, 101)):
        with pytest.raises(ShapeError):
            kernels.decode(
                encoded, np.empty(200, dtype=np.uint16), start=start, stop=stop, kernel=kernel
            )


def test_arrays_that_miss_their_spec(compiled: str) -> None:
    bits = np.ones(100, dtype=np.uint16)
    encoded = codecs.encode(bits, DTYPES["BF16"], codec="raw")
    for suffix in encoded.arrays:
        short = dict(encoded.arrays)
        short[suffix] = short[suffix][:-1]
        with pytest.raises(ShapeError, match=suffix):
            kernels.decode(Encoded(encoded.spec, short), bits.copy(), kernel=compiled)
        del short[suffix]
        with pytest.raises(ShapeError, match=suffix):
            kernels.decode(Encoded(encoded.spec, short), bits.copy(), kernel=compiled)


def test_views_follow_the_arrays(compiled: str, rng: np.random.Generator) -> None:
    """What is kept between calls must not outlive the tensor, nor hide that its arrays changed."""
    item = DTYPES["BF16"]
    first, second = (elements(rng, item, 5000, 1.0, "window") for _ in range(2))
    arrays = dict(codecs.encode(first, item, codec="raw").arrays)
    encoded = Encoded(codecs.encode(first, item, codec="raw").spec, arrays)
    assert_decodes(encoded, first, compiled, 0, 5000, 0)
    assert native.view(encoded) is native.view(encoded)
    arrays["values"] = codecs.encode(second, item, codec="raw").arrays["values"]
    assert_decodes(encoded, second, compiled, 0, 5000, 0)
    del arrays["values"]
    with pytest.raises(ShapeError, match="values"):
        native.view(encoded)
    held = len(native._views)
    del encoded
    assert len(native._views) == held - 1


def test_contradictions_are_noticed(compiled: str, rng: np.random.Generator) -> None:
    bits = elements(rng, DTYPES["BF16"], 5000, 0.5, "window")
    for codec in ("raw", "exp"):
        encoded = codecs.encode(bits, DTYPES["BF16"], codec=codec)  # type: ignore[arg-type]
        bitmap = encoded.arrays["bitmap"].copy()
        bitmap[300] ^= 4
        broken = Encoded(encoded.spec, {**encoded.arrays, "bitmap": bitmap})
        with pytest.raises(FormatError):
            kernels.decode(broken, np.empty_like(bits), kernel=compiled)


def test_probes(kernel: str, rng: np.random.Generator) -> None:
    src = rng.integers(0, 256, 1_000_003, dtype=np.uint8)
    buffer = np.zeros(src.size + 100, dtype=np.uint8)
    kernels.probe_copy(buffer[37 : 37 + src.size], src, threads=2, kernel=kernel)
    assert np.array_equal(buffer[37 : 37 + src.size], src)
    assert not buffer[:37].any()
    assert not buffer[37 + src.size :].any()
    words = src[: 1 << 18].view(np.uint64)
    assert kernels.probe_read(words, threads=2, kernel=kernel) == np.bitwise_xor.reduce(words)
    with pytest.raises(ShapeError):
        kernels.probe_copy(buffer, src, kernel=kernel)


def test_unknown_kernel_and_threads() -> None:
    bits = np.ones(4, dtype=np.uint16)
    with pytest.raises(ConfigError):
        kernels.encode(bits, DTYPES["BF16"], kernel="mmx")
    with pytest.raises(ConfigError):
        kernels.encode(bits, DTYPES["BF16"], threads=0)
