"""The decoder printed in docs/format.md decodes what Endor writes."""

import json
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES, DType, Encoded
from endor.storage import FileLayout, FileWriter, header_capacity
from endor.storage.directory import ALIGN, ARRAY_ALIGN, TAIL_BYTES
from endor.storage.safetensors import MAX_DIMS, MAX_HEADER_BYTES

DOC = Path(__file__).parents[2] / "docs" / "format.md"
Decode = Callable[[bytes, str], np.ndarray]
Write = Callable[..., Path]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def decode() -> Decode:
    (source,) = blocks("python")
    imports = set(re.findall(r"^(?:import|from) (.+)$", source, re.MULTILINE))
    assert imports == {"json, math, re, struct", "numpy as np"}
    namespace: dict[str, Decode] = {}
    exec(compile(source, str(DOC), "exec"), namespace)
    return namespace["decode"]


def test_decodes_every_codec_and_dtype(
    decode: Decode, write: Write, samples: dict[str, Encoded]
) -> None:
    file = write({"all": samples}).read_bytes()
    for name, encoded in samples.items():
        if encoded.spec.codec == "dense":
            continue
        found, wanted = decode(file, name), codecs.decode(encoded)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)
        coding = encoded.spec.coding
        levels = coding is not None and coding.levels
        assert encoded.spec.patches or levels or encoded.spec.codec in ("raw", "fields")


@pytest.mark.parametrize("bitmap", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1024,), (1025,), (8192,), (3, 2, 4097)])
def test_decodes_every_shape(
    decode: Decode, write: Write, rng: np.random.Generator, shape: tuple[int, ...], bitmap: bool
) -> None:
    bf16 = DTYPES["BF16"]
    bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    bits[rng.random(shape) < 0.5] = 0
    encoded = codecs.encode(bits, bf16, codec="exp", bitmap=bitmap)
    file = write({"x": {"x": encoded}}).read_bytes()
    np.testing.assert_array_equal(decode(file, "x"), bits)


def test_decodes_zeros_and_groups_without_elements(
    decode: Decode, write: Write, packable: DType
) -> None:
    bits = np.zeros(4 * 8192, dtype=packable.uint)
    bits[8191] = bits[3 * 8192 :: 1000] = np.array(-1).astype(packable.uint)
    bits[3 * 8192 + 7 :: 500] = 5
    tensors = {
        "some": codecs.encode(bits, packable, codec="exp", bitmap=True),
        "raw": codecs.encode(bits, packable, codec="raw"),
        "none": codecs.encode(np.zeros_like(bits), packable, codec="exp", bitmap=True),
    }
    file = write({"x": tensors}).read_bytes()
    for name in ("some", "raw"):
        np.testing.assert_array_equal(decode(file, name), bits)
    assert not decode(file, "none").any()


def test_table_of_dtypes() -> None:
    text = DOC.read_text()
    for item in DTYPES.values():
        if item.signed and item.packable:
            row = (item.itemsize, item.exponent_bits, item.mantissa_bits, item.rest_bits)
            assert f"| `{item.name}` | {' | '.join(map(str, row))} |" in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if "codec `dense` only" in line]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    sizes = [Fraction(size.strip()) for row in rows for size in row[1].split(",")]
    dense = [item for item in DTYPES.values() if not item.packable]
    assert names == [item.name for item in dense]
    assert sizes == [Fraction(item.bits or 8 * item.itemsize, 8) for item in dense]


def test_table_of_arrays(samples: dict[str, Encoded]) -> None:
    text = DOC.read_text()
    suffixes = {array.suffix for encoded in samples.values() for array in encoded.spec.arrays}
    assert suffixes - {""} == set(re.findall(r"^\|[^|]*\| `X_(\w+)` \|", text, re.MULTILINE))


def test_numbers_are_those_of_the_code() -> None:
    text = " ".join(DOC.read_text().split())
    assert f"multiples of {ALIGN}" in text
    assert f"multiple of {ARRAY_ALIGN}" in text
    assert f"at least {TAIL_BYTES} bytes before" in text
    assert f"{codecs.TILE} consecutive elements" in text
    assert f"8 tiles ({codecs.GROUP})" in text
    assert f"at most {MAX_HEADER_BYTES:,}" in text
    assert f"at most {MAX_DIMS} dimensions" in text


def test_directory_example_has_the_members_of_a_real_file(tmp_path: Path) -> None:
    (source,) = blocks("json")
    example = json.loads(source)
    bf16, f32 = DTYPES["BF16"], DTYPES["F32"]
    bits = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    tensors = {
        "a.weight": codecs.encode(bits, bf16, codec="exp", bitmap=True),
        "a.bias": codecs.encode(np.ones(64, np.uint32), f32, codec="dense"),
    }
    plan = {"a": {name: encoded.spec for name, encoded in tensors.items()}}
    path = tmp_path / "example.safetensors"
    with (
        FileWriter(path, header_capacity=header_capacity(plan)) as writer,
        writer.record("a") as record,
    ):
        for name, encoded in tensors.items():
            record.add(name, encoded)
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    real = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["endor"])
    assert example.keys() == real.keys()
    for name, fields in example["tensors"].items():
        assert fields.keys() == real["tensors"][name].keys()
        assert fields["shape"] == real["tensors"][name]["shape"]
    assert FileLayout.read(path).tensors.keys() == example["tensors"].keys()
