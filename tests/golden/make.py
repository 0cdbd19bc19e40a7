"""Make the golden files of each format version: python tests/golden/make.py

They are decoded for ever, so this refuses to overwrite them. A later version of the format gets
files of its own.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from endor import codecs
from endor.codecs import DTYPES, DType, Encoded, bundled, exp, fields, integer
from endor.codecs.layout import Layout, Part
from endor.storage import FileWriter, header_capacity

SHAPE = (4, 300)
LATER = {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Element types, dense only, that came after the golden files of version 1."""
METADATA = {"made by": "tests/golden/make.py", "Ω": '{"endor.checksum":"0"}'}


def elements(dtype: DType) -> np.ndarray:
    """Return elements by arithmetic alone: about half zeros, few exponents, some outliers."""
    at = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint64)
    noise = (at * np.uint64(2654435761) + np.uint64(12345)) >> np.uint64(7)
    if not dtype.packable:
        return (noise & np.uint64(1)).astype(dtype.uint).reshape(SHAPE)
    middle = np.uint64((1 << (dtype.exponent_bits - 1)) - 3)
    exponents = middle + (noise & np.uint64(3))
    exponents[::97] = at[::97] & np.uint64((1 << dtype.exponent_bits) - 1)
    bits = dtype.join(exponents, (noise >> np.uint64(3)) & np.uint64((1 << dtype.rest_bits) - 1))
    bits[noise % np.uint64(5) < 2] = 0
    bits[1], bits[2] = dtype.uint.type(1 << (8 * dtype.itemsize - 1)), ~dtype.uint.type(0)
    return bits.reshape(SHAPE)


def records() -> dict[str, dict[str, Encoded]]:
    """Return every dtype dense, and in `exp` with a bitmap; some also in the other forms."""
    out: dict[str, dict[str, Encoded]] = {"dense": {}, "raw": {}, "exp": {}, "edge": {}}
    for dtype in DTYPES.values():
        if dtype.name in LATER:
            continue
        bits = elements(dtype)
        out["dense"][f"dense.{dtype.name}"] = codecs.encode(bits[:1, :20], dtype, codec="dense")
        if not dtype.packable:
            continue
        out["raw"][f"raw.{dtype.name}"] = codecs.encode(bits, dtype, codec="raw")
        base = (1 << (dtype.exponent_bits - 1)) - 3
        packed = exp.encode(bits, dtype, bitmap=True, k=2, base=base)
        out["exp"][f"exp.{dtype.name}"] = packed
    bf16, i8 = DTYPES["BF16"], DTYPES["I8"]
    out["edge"] = {
        "full.BF16": exp.encode(elements(bf16)[:1], bf16, bitmap=False, k=2, base=125),
        "full.I8": exp.encode(elements(i8)[:1], i8, bitmap=False, k=8, base=200),
        "zeros": codecs.encode(np.zeros(9, np.uint16), bf16, codec="exp", bitmap=True),
        "empty": codecs.encode(np.zeros((0, 3), np.uint16), bf16, codec="raw"),
        "scalar": codecs.encode(np.array(0x3F80, np.uint16), bf16, codec="raw"),
    }
    return out


def codes(shape: tuple[int, int], spread: int) -> np.ndarray:
    """Return integer codes by arithmetic alone: near 0 mostly, a few far away."""
    at = np.arange(shape[0] * shape[1], dtype=np.int64)
    noise = at * 2654435761 + 12345 >> 7
    near = (noise & 255) * spread // 256 - (noise >> 8 & 255) * spread // 256
    near[::997] = 20_000 - 3 * at[::997]
    return near.reshape(shape)


def steps(count: int) -> np.ndarray:
    """Return steps of 9 significant bits by arithmetic alone."""
    at = np.arange(count)
    return (np.ldexp(257.0 + at * 7 % 255, -16 - at % 9)).astype(np.float32)


def records_v2() -> dict[str, dict[str, Encoded]]:
    """Return codec `int` in every element type, layout of steps and kind of code."""
    shape = (110, 300)
    near, wide = codes(shape, 5), codes(shape, 700)
    bf16, f16, f32 = DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"]
    return {
        "int": {
            "columns.BF16": integer.encode(near, steps(300), bf16),
            "rows.F16": integer.encode(near, steps(110)[:, None], f16),
            "groups.F32": integer.encode(near, steps(660).reshape(110, 6), f32),
            "blocks.BF16": integer.encode(wide, steps(6).reshape(2, 3), bf16, block=(64, 128)),
            "one.BF16": integer.encode(near[:1, :33], -0.3, bf16),
            "brain.BF16": integer.encode(near[:2], np.ldexp(1.0, [-100, 100] * 150), bf16),
            "shift.F32": integer.encode(wide, steps(300), f32),
        },
        "edge": {
            "zeros": integer.encode(np.zeros((2, 40), np.int32), 1.0, bf16),
            "empty": integer.encode(np.zeros((0, 3), np.int32), steps(3), bf16),
            "scalar": integer.encode(np.array(-7), 0.5, bf16),
            "experts": integer.encode(near.reshape(2, 55, 300), steps(600).reshape(2, 300), bf16),
            "dense": codecs.encode(elements(bf16)[:1, :20], bf16, codec="dense"),
        },
    }


def records_v3() -> dict[str, dict[str, Encoded]]:
    """Return codec `fields` in plain words, in blocks with a rest, and in symbols of two parts."""
    noise = (codes((110, 252), 9) & 255).astype(np.uint8)
    planes = ((Part(0, 128, 4, 64), Part(128, 64, 2, 32)), (Part(192, 16, 8),))
    plain = {bits: Layout(1, ((Part(0, 1, bits),),)) for bits in (1, 2, 4, 8)}
    blocks = Layout(18, ((Part(2, 16, 4, 16),),))
    forms: dict[str, tuple[DType, Layout, np.ndarray]] = {
        "words.I32": (DTYPES["I32"], plain[4], noise),
        "pairs.U8": (DTYPES["U8"], plain[2], noise),
        "bits.BOOL": (DTYPES["BOOL"], plain[1], noise & 1),
        "bytes.F8_E4M3": (DTYPES["F8_E4M3"], plain[8], noise),
        "half.F4": (DTYPES["F4"], plain[4], noise),
        "blocks.U8": (DTYPES["U8"], blocks, noise),
        "planes.U8": (DTYPES["U8"], Layout(210, planes), noise),
        "one.U8": (DTYPES["U8"], plain[8], noise[:1, :1]),
        "zeros.U8": (DTYPES["U8"], plain[8], noise * 0),
    }
    out: dict[str, Encoded] = {}
    for name, (dtype, layout, raw) in forms.items():
        bits = raw.reshape(-1).view(dtype.uint)
        shape = (2 * bits.size,) if dtype.bits else (bits.size // 3, 3) if bits.size > 1 else (1,)
        made = fields.encode(bits.reshape(dtype.unit_shape(shape)), dtype, layout, shape=shape)
        assert made is not None
        out[name] = made
    return {"fields": out}


def records_v4() -> dict[str, dict[str, Encoded]]:
    """Return codec `int` with levels: 16 and 256 of them, in every element type."""
    shape = (110, 300)
    at = np.arange(256)
    levels = ((at - 127.0) * (1 + at % 3) / 128).astype(np.float32)
    levels[128] = -0.0
    near, wide = codes(shape, 5) & 15, codes(shape, 700) & 255
    return {
        "levels": {
            "columns.BF16": integer.encode(
                near, steps(300), DTYPES["BF16"], levels=levels[120:136]
            ),
            "groups.F16": integer.encode(
                wide, steps(660).reshape(110, 6), DTYPES["F16"], levels=levels
            ),
            "rows.F32": integer.encode(wide, steps(110)[:, None], DTYPES["F32"], levels=levels),
            "two.BF16": integer.encode(near[:1, :9] & 1, 0.5, DTYPES["BF16"], levels=levels[:2]),
        }
    }


def records_v5() -> dict[str, dict[str, Encoded]]:
    """Return matrices that are stored transposed, in codecs `raw` and `exp`."""
    out: dict[str, Encoded] = {}
    for dtype in (DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"], DTYPES["F8_E4M3"]):
        base = (1 << (dtype.exponent_bits - 1)) - 3
        stored = np.ascontiguousarray(elements(dtype).T)
        forms = {
            "raw": codecs.encode(stored, dtype, codec="raw"),
            "exp": exp.encode(stored, dtype, bitmap=True, k=2, base=base),
            "full": exp.encode(stored, dtype, bitmap=False, k=2, base=base),
        }
        for form, made in forms.items():
            out[f"{form}.{dtype.name}"] = Encoded(made.spec.turned(), made.arrays)
    return {"turned": out}


def records_v6() -> dict[str, dict[str, Encoded]]:
    """Return matrices of four neurons, in bundles of 1 and 3, in codecs `raw` and `exp`."""
    out: dict[str, Encoded] = {}
    for dtype in (DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"], DTYPES["F8_E4M3"]):
        base = (1 << (dtype.exponent_bits - 1)) - 3
        stored = elements(dtype)
        forms = {
            "raw": codecs.encode(stored, dtype, codec="raw").spec,
            "exp": exp.encode(stored, dtype, bitmap=True, k=2, base=base).spec,
            "full": exp.encode(stored, dtype, bitmap=False, k=2, base=base).spec,
        }
        for form, spec in forms.items():
            for rows in (1, 3):
                out[f"{form}.{rows}.{dtype.name}"] = bundled.encode(stored, spec, rows)
    return {"bundles": out}


RECORDS = {
    "v1": records,
    "v2": records_v2,
    "v3": records_v3,
    "v4": records_v4,
    "v5": records_v5,
    "v6": records_v6,
}


def write(path: Path, version: str = "v1") -> dict[str, str]:
    """Write the packed file to `path`; return per tensor the sha256 of its dense elements."""
    content = RECORDS[version]()
    plan = {
        record: {name: encoded.spec for name, encoded in tensors.items()}
        for record, tensors in content.items()
    }
    capacity = header_capacity(plan, METADATA)
    with FileWriter(path, header_capacity=capacity, metadata=METADATA) as writer:
        for record, tensors in content.items():
            with writer.record(record) as out:
                for name, encoded in tensors.items():
                    out.add(name, encoded)
    return {
        name: hashlib.sha256(codecs.decode(encoded).tobytes()).hexdigest()
        for tensors in content.values()
        for name, encoded in tensors.items()
    }


def main() -> None:
    """Write the golden files of each version next to this one, unless they exist."""
    here = Path(__file__).parent
    missing = [name for name in RECORDS if not list(here.glob(f"{name}.*"))]
    if not missing:
        raise SystemExit(f"{here}: all files exist; golden files are never overwritten")
    for name in missing:
        digests = write(here / f"{name}.safetensors", name)
        (here / f"{name}.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
