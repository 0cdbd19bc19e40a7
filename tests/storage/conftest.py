"""Small packed files for the tests of storage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from endor import codecs
from endor.codecs import DTYPES, CodecChoice, DType, Encoded, exp, fields, integer
from endor.codecs.layout import Layout, Part
from endor.storage import FileWriter, header_capacity

Write = Callable[..., Path]


def sample_bits(dtype: DType, shape: tuple[int, ...], *, density: float = 0.4) -> np.ndarray:
    """Return elements with few exponents, some outliers among them, as unsigned integers."""
    rng = np.random.default_rng([dtype.itemsize, dtype.exponent_bits, *shape])
    numel = int(np.prod(shape, dtype=np.int64))
    if not dtype.packable:
        return rng.integers(0, 2, numel).astype(dtype.uint).reshape(shape)
    exponents = rng.integers(0, 4, numel) + (1 << (dtype.exponent_bits - 1)) - 3
    outliers = rng.random(numel) < 0.02
    exponents[outliers] = rng.integers(0, 1 << dtype.exponent_bits, int(outliers.sum()))
    bits = dtype.join(exponents, rng.integers(0, 1 << dtype.rest_bits, numel))
    bits[rng.random(numel) >= density] = 0
    special = np.array([0, 1, -1, 1 << (8 * dtype.itemsize - 1)]).astype(dtype.uint)
    bits[: special.size] = special[:numel]  # zero, subnormal, NaN, -0.0
    return bits.reshape(shape)


def sample_tensors(shape: tuple[int, ...] = (3, 700)) -> dict[str, Encoded]:
    """Return a tensor of every dtype in every codec that takes it, `exp` with patches."""
    out = {}
    for dtype in DTYPES.values():
        if dtype.bits:
            held = sample_bits(DTYPES["U8"], (dtype.nbytes(int(np.prod(shape))),))
            out[f"{dtype.name}.dense"] = codecs.dense.encode_as(held, dtype, shape)
            continue
        bits = sample_bits(dtype, shape)
        out[f"{dtype.name}.dense"] = codecs.encode(bits, dtype, codec="dense")
        if dtype.packable:
            out[f"{dtype.name}.raw"] = codecs.encode(bits, dtype, codec="raw")
            base = (1 << (dtype.exponent_bits - 1)) - 3
            for bitmap, suffix in ((False, "exp"), (True, "exp_bitmap")):
                encoded = exp.encode(bits, dtype, bitmap=bitmap, k=2, base=base)
                out[f"{dtype.name}.{suffix}"] = encoded
    for name, spread in (("BF16", 3.0), ("F16", 3.0), ("F32", 500.0)):
        out[f"{name}.int"] = sample_codes(DTYPES[name], shape, spread)
        out[f"{name}.levels"] = sample_levels(DTYPES[name], shape)
    for dtype in DTYPES.values():
        out[f"{dtype.name}.fields"] = sample_fields(dtype, shape)
    if len(shape) == 2:
        out["BF16.turned"] = sample_turned(DTYPES["BF16"], shape, "raw")
        out["F32.turned"] = sample_turned(DTYPES["F32"], shape, "exp")
        for name, codec in (("BF16", "raw"), ("F16", "exp")):
            out[f"{name}.bundles"] = sample_bundles(DTYPES[name], shape, codec)
    return out


def sample_turned(dtype: DType, shape: tuple[int, ...], codec: CodecChoice) -> Encoded:
    """Return a matrix that is stored transposed."""
    stored = codecs.encode(sample_bits(dtype, shape[::-1]), dtype, codec=codec)
    return Encoded(stored.spec.turned(), stored.arrays)


def sample_bundles(dtype: DType, shape: tuple[int, ...], codec: CodecChoice) -> Encoded:
    """Return a matrix in bundles of two rows of the transposed one."""
    stored = sample_bits(dtype, shape[::-1])
    form = codecs.encode(stored, dtype, codec=codec).spec
    return codecs.bundled.encode(stored, form, min(2, max(len(stored), 1)))


def sample_fields(dtype: DType, shape: tuple[int, ...]) -> Encoded:
    """Return bytes of `dtype` as 3-byte blocks of a scale and 10-bit codes, cut into symbols."""
    rng = np.random.default_rng(dtype.itemsize)
    raw = rng.integers(0, 90, dtype.nbytes(int(np.prod(shape)))).astype(np.uint8)
    parts = ((Part(0, 1, 4), Part(1, 1, 4)), (Part(2, 1, 8),))
    layout = Layout(3, parts[:1]) if raw.size % 3 == 0 else Layout(1, ((Part(0, 1, 4),),))
    bits = raw.view(dtype.uint).reshape(dtype.unit_shape(shape))
    encoded = fields.encode(bits, dtype, layout, shape=shape)
    assert encoded is not None
    return encoded


def sample_levels(dtype: DType, shape: tuple[int, ...]) -> Encoded:
    """Return a tensor in codec `int` with 40 levels and a step a row."""
    rng = np.random.default_rng(40)
    levels = rng.standard_normal(40).astype(np.float32)
    codes = np.minimum(rng.geometric(0.1, shape) - 1, 39)
    steps = integer.round_steps(0.001 + rng.random((int(np.prod(shape[:-1])), 1)))
    return integer.encode(codes, steps, dtype, levels=levels)


def sample_codes(dtype: DType, shape: tuple[int, ...], spread: float) -> Encoded:
    """Return a tensor in codec `int` with a step a column and with patches."""
    rng = np.random.default_rng(int(spread))
    codes = np.rint(rng.standard_normal(shape) * spread).astype(np.int32)
    codes.reshape(-1)[::300] = 70_000
    steps = integer.round_steps(0.001 + rng.random(shape[-1]))
    return integer.encode(codes, steps, dtype)


def write_file(
    path: Path,
    records: dict[str, dict[str, Encoded]],
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a packed file with these tensors per record."""
    plan = {
        record: {name: encoded.spec for name, encoded in tensors.items()}
        for record, tensors in records.items()
    }
    capacity = header_capacity(plan, metadata)
    with FileWriter(path, header_capacity=capacity, metadata=metadata) as writer:
        for record, tensors in records.items():
            with writer.record(record) as out:
                for name, encoded in tensors.items():
                    out.add(name, encoded)
    return path


@pytest.fixture
def samples() -> dict[str, Encoded]:
    return sample_tensors()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file into the test's own directory and return its path."""

    def write(
        records: dict[str, dict[str, Encoded]],
        metadata: dict[str, str] | None = None,
        *,
        name: str = "weights.safetensors",
    ) -> Path:
        return write_file(tmp_path / name, records, metadata)

    return write


@pytest.fixture
def small(write: Write) -> Path:
    """A file of two records, four tensors and every kind of array: 8 KiB of data."""
    bf16, f32 = DTYPES["BF16"], DTYPES["F32"]
    weights = codecs.encode(sample_bits(bf16, (40, 30)), bf16, codec="exp", bitmap=True)
    sparse = codecs.encode(sample_bits(f32, (100,), density=0.1), f32, codec="raw")
    norm = codecs.encode(sample_bits(f32, (16,)), f32, codec="dense")
    full = codecs.encode(sample_bits(bf16, (200,)), bf16, codec="exp", bitmap=False)
    records = {"a": {"a.weight": weights, "a.norm": norm}, "b": {"b.x": sparse, "b.y": full}}
    return write(records, {"note": "small"})


Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def reseal(path: Path, document: dict[str, Any], directory: object) -> None:
    """Put a changed header into a file, with a right checksum and the data where they were."""
    raw = path.read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    metadata = document["__metadata__"]
    if directory is not None:
        metadata["endor"] = json.dumps(directory)
    metadata["endor.checksum"] = "0" * 16
    text = json.dumps(document, separators=(",", ":")).encode()
    assert len(text) + 8 <= data_start
    head = raw[:8] + text.ljust(data_start - 8)
    digits = xxhash.xxh3_64_hexdigest(head).encode()
    head = head.replace(b'"endor.checksum":"' + b"0" * 16, b'"endor.checksum":"' + digits)
    path.write_bytes(head + raw[data_start:])


@pytest.fixture
def tamper() -> Callable[[Path, Edit], None]:
    """Let a function change the header document and the directory of a file, and reseal it."""

    def tamper(path: Path, edit: Edit) -> None:
        raw = path.read_bytes()
        document = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        directory = json.loads(document["__metadata__"]["endor"])
        edit(document, directory)
        reseal(path, document, directory)

    return tamper
