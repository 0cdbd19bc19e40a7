"""Damaged and hostile files: every changed byte is found, and nothing crashes or lies."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from endor.codecs import DTYPES, Encoded, exp
from endor.errors import ChecksumError, FormatError, TruncatedError
from endor.packed import bits_of
from endor.storage import (
    ALIGN,
    FileLayout,
    check_record,
    load_file,
    safe_open,
    verify_file,
)

Doc = dict[str, Any]
Tamper = Callable[[Path, Callable[[Doc, Doc], object]], None]
Write = Callable[..., Path]


def load_bits(path: Path) -> dict[str, bytes]:
    """Return the bits of every tensor as the public interface gives them."""
    return {name: bits_of(tensor).tobytes() for name, tensor in load_file(path).items()}


def test_every_flipped_byte_of_the_header_is_found(small: Path) -> None:
    good = small.read_bytes()
    start = FileLayout.read(small).data_start
    rng = np.random.default_rng(0)
    masks = 1 << rng.integers(0, 8, start)
    with small.open("r+b", buffering=0) as file:
        for at, mask in enumerate(masks.tolist()):
            file.seek(at)
            file.write(bytes([good[at] ^ mask]))
            with pytest.raises(FormatError):
                FileLayout.read(small)
            file.seek(at)
            file.write(good[at : at + 1])
    assert small.read_bytes() == good
    verify_file(small)


def test_every_flipped_byte_of_the_data_is_found(small: Path) -> None:
    layout = FileLayout.read(small)
    rng = np.random.default_rng(1)
    for name, record in layout.records.items():
        data = np.fromfile(small, np.uint8, record.nbytes, offset=record.offset)
        check_record(layout, name, data)
        masks = (1 << rng.integers(0, 8, record.nbytes)).astype(np.uint8)
        for at, mask in enumerate(masks):
            data[at] ^= mask
            with pytest.raises(ChecksumError):
                check_record(layout, name, data)
            data[at] ^= mask
        check_record(layout, name, data)


def test_flips_are_found_by_everything_that_reads(small: Path) -> None:
    good = small.read_bytes()
    layout = FileLayout.read(small)
    places = [0, 1, 7, 8, layout.data_start - 1, layout.data_start, len(good) - 1]
    places += np.random.default_rng(2).integers(0, len(good), 60).tolist()
    for at in places:
        small.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(FormatError) as caught:
            verify_file(small)
        assert str(small) in str(caught.value)
        with pytest.raises(FormatError):
            load_file(small)


def test_one_damaged_record_leaves_the_others_readable(small: Path) -> None:
    layout = FileLayout.read(small)
    at = layout.records["a"].offset + 100
    good = small.read_bytes()
    small.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with safe_open(small) as file:
        for name in ("a.weight", "a.norm"):
            with pytest.raises(ChecksumError, match="record 'a' at offset"):
                file.get_tensor(name)
            with pytest.raises(ChecksumError, match="copy or convert the file again"):
                file.get_packed(name)
        assert file.get_tensor("b.x").shape == (100,)
        assert file.get_packed("b.y").spec.codec == "exp"


def test_every_truncation_is_found(small: Path) -> None:
    good = small.read_bytes()
    sizes = {0, 1, 7, 8, 9, ALIGN - 1, ALIGN, ALIGN + 1, len(good) - 1}
    sizes |= set(range(0, len(good), 31))
    for size in sorted(sizes):
        small.write_bytes(good[:size])
        with pytest.raises(TruncatedError, match=f"has {size} bytes, needs"):
            FileLayout.read(small)
    for size in sorted(sizes)[::20]:
        small.write_bytes(good[:size])
        for read in (load_file, verify_file, safe_open):
            with pytest.raises(TruncatedError):
                read(small)


def test_other_growth_and_swaps_are_found(small: Path) -> None:
    good = small.read_bytes()
    layout = FileLayout.read(small)
    one, two = layout.records.values()
    assert one.nbytes == two.nbytes
    first, second = good[one.offset : two.offset], good[two.offset :]
    variants = {
        "grown": good + b"\0",
        "page": good + bytes(ALIGN),
        "swapped": good[: one.offset] + second + first,
        "zeroed": good[: two.offset] + bytes(two.nbytes),
        "shifted": good[: one.offset] + b"\0" + good[one.offset : -1],
        "lost a page": good[: one.offset] + second,
        "twice": good + good,
    }
    for what, content in variants.items():
        small.write_bytes(content)
        with pytest.raises(FormatError):
            pytest.fail(f"{what}: {sorted(load_file(small))}")


def rewrite_record(path: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Change a record and give it, and the header, the checksums that an attacker would."""
    layout = FileLayout.read(path)
    record = layout.records[name]
    raw = np.fromfile(path, np.uint8)
    data = raw[record.offset : record.offset + record.nbytes]
    edit(data)
    new = xxhash.xxh3_64_hexdigest(data.tobytes()).encode()
    head = raw[: layout.data_start].tobytes().replace(record.checksum.encode(), new)
    mark = head.index(b'"endor.checksum":"') + 18
    blank = head[:mark] + b"0" * 16 + head[mark + 16 :]
    sealed = head[:mark] + xxhash.xxh3_64_hexdigest(blank).encode() + head[mark + 16 :]
    path.write_bytes(sealed + raw[layout.data_start :].tobytes())


def sparse_file(write: Write) -> tuple[Path, Encoded]:
    """A tensor of two groups, one bf16 window, patches in both groups."""
    bits = np.zeros(8192 + 1500, np.uint16)
    bits[::3] = 0x3F80
    bits[::300] = 0x0101
    encoded = exp.encode(bits, DTYPES["BF16"], bitmap=True, k=2, base=126)
    assert encoded.spec.patches > 4
    return write({"r": {"x": encoded}}), encoded


def change(suffix: str, dtype: str, at: int, value: int) -> Callable[[FileLayout], Any]:
    def make(layout: FileLayout) -> Callable[[np.ndarray], None]:
        entry = next(a for a in layout.tensor("x").arrays if a.suffix == suffix)

        def edit(data: np.ndarray) -> None:
            array = data[entry.start : entry.stop].view(dtype)
            assert array[at] != value
            array[at] = value

        return edit

    return make


HOSTILE = {
    "bitmap-more": (change("bitmap", "u1", 0, 0xFF), "bitmap must have nnz"),
    "bitmap-end": (change("bitmap", "u1", -1, 0x80), "past element 9692 must be 0"),
    "offset-first": (change("tile_offsets", "<u4", 0, 1), r"tile_offsets\[0\] must be 0"),
    "offset-middle": (change("tile_offsets", "<u4", 3, 2**32 - 1), r"tile_offsets\[3\] must be"),
    "offset-last": (change("tile_offsets", "<u4", -1, 9), r"tile_offsets\[10\] must be"),
    "plane-end": (change("planes", "u1", -1, 0x80), "of a plane past stored element"),
    "patch-first": (change("patch_offsets", "<u4", 0, 1), "patch_offsets must rise from 0"),
    "patch-fall": (change("patch_offsets", "<u4", 1, 2**32 - 1), "patch_offsets must rise"),
    "patch-last": (change("patch_offsets", "<u4", -1, 2**31), "patch_offsets must rise"),
    "rank-far": (change("patch_ranks", "<u2", 0, 65535), "must lie inside its group"),
    "rank-order": (change("patch_ranks", "<u2", 1, 0), "must be strictly increasing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_arrays_that_contradict_each_other(write: Write, case: str) -> None:
    make, message = HOSTILE[case]
    path, _ = sparse_file(write)
    rewrite_record(path, "r", make(FileLayout.read(path)))
    for read in (load_file, verify_file):
        with pytest.raises(FormatError, match=message) as caught:
            read(path)
        assert not isinstance(caught.value, ChecksumError)
        assert f"{path}: x: " in str(caught.value)


def test_a_patch_exponent_too_wide_for_its_dtype(write: Write) -> None:
    f16 = DTYPES["F16"]
    bits = np.full(100, 0x3C00, np.uint16)
    bits[5] = 0x7BFF
    encoded = exp.encode(bits, f16, bitmap=False, k=1, base=15)
    path = write({"r": {"x": encoded}})
    rewrite_record(path, "r", change("patch_exponents", "u1", 0, 32)(FileLayout.read(path)))
    with pytest.raises(FormatError, match="a patch exponent must be below 32"):
        load_file(path)


def test_pads_must_be_zero(small: Path) -> None:
    start, stop = FileLayout.read(small).records["b"].pads[-1]

    def edit(data: np.ndarray) -> None:
        data[(start + stop) // 2] = 1

    rewrite_record(small, "b", edit)
    for read in (verify_file, load_file):
        with pytest.raises(FormatError, match=f"bytes {start}:{stop} are a pad and must be 0"):
            read(small)


def test_hostile_data_never_gets_past_its_buffers(write: Write) -> None:
    """With right checksums a changed array is refused or decodes to a tensor of its shape."""
    path, encoded = sparse_file(write)
    good = path.read_bytes()
    nbytes = FileLayout.read(path).records["r"].nbytes
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(250):
        path.write_bytes(good)
        places = rng.integers(0, nbytes, rng.integers(1, 4))
        values = rng.integers(0, 256, places.size).astype(np.uint8)

        def edit(
            data: np.ndarray, places: np.ndarray = places, values: np.ndarray = values
        ) -> None:
            data[places] = values

        rewrite_record(path, "r", edit)
        try:
            tensor = load_file(path)["x"]
        except FormatError:
            refused += 1
        else:
            assert tensor.shape == encoded.spec.shape
            assert tensor.dtype == torch.bfloat16
    assert 0 < refused < 250


def mutate(value: Any, rng: np.random.Generator) -> Any:
    """Return another JSON value where `value` stood."""
    others: list[Any] = [None, True, -1, 0, 1, 7, 4096, 1 << 40, 1 << 70, 0.5, "", "x", [], {}]
    if isinstance(value, int):
        others += [value + 1, value - 1, value * 2, value ^ 256, value + 4096]
    if isinstance(value, str):
        others += ["BF16", "F32", "dense", "raw", "exp", "a", "b", value[1:], value + "\u0000"]
    if isinstance(value, list):
        others += [value[:-1], value + value[:1], value[::-1]]
    return copy.deepcopy(others[rng.integers(len(others))])


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    out = []
    for key, inner in list(items):
        out.append((value, key))
        if isinstance(inner, dict | list):
            out += spots(inner)
    return out


def test_hostile_headers_are_refused_or_change_nothing(small: Path, tamper: Tamper) -> None:
    """One member changed anywhere, with a right checksum: an error of ours, or the same weights."""
    good, wanted = small.read_bytes(), load_bits(small)
    rng = np.random.default_rng(4)
    messages = []
    for _ in range(250):
        small.write_bytes(good)

        def edit(document: Doc, directory: Doc) -> None:
            metadata = document["__metadata__"]
            del metadata["endor"]
            places = spots(directory) + spots(document)
            container, key = places[rng.integers(len(places))]
            if rng.random() < 0.2:
                container.pop(key)
            else:
                container[key] = mutate(container[key], rng)
            document.setdefault("__metadata__", {})

        try:
            tamper(small, edit)
        except (TypeError, AttributeError):
            continue  # the edit took away what carries the seal
        try:
            found = load_bits(small)
        except FormatError as error:
            messages.append(str(error))
        else:
            assert_plausible(small, found, wanted)
    assert len(messages) > 120
    assert max(map(len, messages)) < 1000


def assert_plausible(path: Path, found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Without an author's key only a spec that fits the same bytes can lie: k's base, say."""
    layout = FileLayout.read(path)
    assert found.keys() == layout.tensors.keys()
    for name, data in found.items():
        assert len(data) == layout.tensor(name).spec.dense_nbytes
    same = sum(found[name] == wanted.get(name) for name in found)
    assert same >= len(found) - 1


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" * 30])
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (load_file, verify_file, safe_open):
        with pytest.raises(FormatError, match=r"x\.safetensors"):
            read(path)


def test_a_header_that_says_half_of_what_it_must(small: Path) -> None:
    """A packed file whose directory was lost is not taken for a plain one."""
    raw = small.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(raw[8 : 8 + length])
    for gone in (["endor"], ["endor.checksum"], ["endor", "endor.checksum"]):
        less = copy.deepcopy(document)
        for key in gone:
            del less["__metadata__"][key]
        head = json.dumps(less, separators=(",", ":")).encode().ljust(length)
        small.write_bytes(raw[:8] + head + raw[8 + length :])
        with pytest.raises(FormatError, match=r"metadata must hold|header checksum must be"):
            load_file(small)
