"""The header and directory of a packed file: one hand-made bad file per rule."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file as save_plain

from endor import codecs
from endor.codecs import DTYPES, Encoded, integer
from endor.errors import (
    CheckpointError,
    ChecksumError,
    EndorError,
    FormatError,
    ShapeError,
    TruncatedError,
)
from endor.storage import ALIGN, FileLayout, HostBuffer, align_up, open_reader
from endor.storage.directory import ARRAY_ALIGN, TAIL_BYTES
from endor.storage.writer import largest_int_spec

from .conftest import sample_bundles, sample_codes, sample_turned

Doc = dict[str, Any]
Edit = Callable[[Doc, Doc], object]
Tamper = Callable[[Path, Edit], None]
Write = Callable[..., Path]


def test_layout_says_where_everything_lies(small: Path) -> None:
    layout = FileLayout.read(small)
    assert list(layout.records) == ["a", "b"]
    assert list(layout.tensors) == ["a.weight", "a.norm", "b.x", "b.y"]
    assert layout.metadata == {"note": "small"}
    assert layout.file_bytes == small.stat().st_size
    at = layout.data_start
    for record in layout.records.values():
        assert (record.offset, record.offset % ALIGN, record.nbytes % ALIGN) == (at, 0, 0)
        at += record.nbytes
        covered = list(record.pads)
        for name in record.tensors:
            for array in layout.tensor(name).arrays:
                assert array.start % ARRAY_ALIGN == 0
                assert array.stop + TAIL_BYTES <= record.nbytes
                covered.append((array.start, array.stop))
        covered.sort()
        assert covered[0][0] == 0
        assert covered[-1][1] == record.nbytes
        assert all(one[1] == two[0] for one, two in itertools.pairwise(covered))
    assert at == layout.file_bytes


def test_bind_gives_views_of_the_record(small: Path) -> None:
    layout = FileLayout.read(small)
    record = layout.record_of("a.weight")
    buffer = HostBuffer(record.nbytes + ALIGN)
    with open_reader() as reader:
        reader.read(record, buffer)
    encoded = layout.bind("a.weight", buffer.array)
    assert encoded.spec == layout.tensor("a.weight").spec
    assert all(np.shares_memory(array, buffer.array) for array in encoded.arrays.values())
    codecs.validate(encoded)


def test_bind_refuses_other_arrays(small: Path) -> None:
    layout = FileLayout.read(small)
    nbytes = layout.record_of("b.x").nbytes
    for wrong in (
        np.zeros(nbytes - 1, np.uint8),
        np.zeros(nbytes, np.uint16),
        np.zeros((1, nbytes), np.uint8),
        np.zeros(2 * nbytes, np.uint8)[::2],
    ):
        with pytest.raises(ShapeError, match="must be flat u8"):
            layout.bind("b.x", wrong)


def test_unknown_tensor_suggests_a_name(small: Path) -> None:
    layout = FileLayout.read(small)
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.weigth'.*did you mean a\.weight"):
        layout.tensor("a.weigth")


def test_plain_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_plain({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(FormatError, match=r"plain safetensors file.*endor\.load_file"):
        FileLayout.read(path)


def test_unknown_members_are_ignored(small: Path, tamper: Tamper) -> None:
    before = FileLayout.read(small)

    def edit(document: Doc, directory: Doc) -> None:
        directory["later"] = {"x": [1]}
        directory["tensors"]["a.weight"]["later"] = 2
        directory["tensors"]["a.norm"].update(nnz=-1, k="x")

    tamper(small, edit)
    assert FileLayout.read(small) == before


def set_entry(key: str, **fields: object) -> Edit:
    return lambda document, directory: document[key].update(fields)


def set_tensor(name: str, **fields: object) -> Edit:
    return lambda document, directory: directory["tensors"][name].update(fields)


def set_directory(**fields: object) -> Edit:
    return lambda document, directory: directory.update(fields)


def set_record(name: str, at: int, value: object) -> Edit:
    def edit(document: Doc, directory: Doc) -> None:
        directory["records"][name][at] = value

    return edit


def move(key: str, start: int, stop: int) -> Edit:
    def edit(document: Doc, directory: Doc) -> None:
        offsets = document[key]["data_offsets"]
        document[key]["data_offsets"] = [offsets[0] + start, offsets[1] + stop]

    return edit


def drop(key: str) -> Edit:
    return lambda document, directory: document.pop(key)


def rename_tensor(old: str, new: str) -> Edit:
    def edit(document: Doc, directory: Doc) -> None:
        directory["tensors"][new] = directory["tensors"].pop(old)

    return edit


def slide_array(document: Doc, directory: Doc) -> None:
    """Start a.norm 8 bytes late, with the pads around it to match."""
    entry = document["a.norm"]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = [start + 8, stop + 8]
    for key in directory["pads"]:
        pad = document[key]
        if pad["data_offsets"][1] == start:
            pad["data_offsets"][1] += 8
        elif pad["data_offsets"][0] == stop:
            pad["data_offsets"][0] += 8
        pad["shape"] = [pad["data_offsets"][1] - pad["data_offsets"][0]]


def shrink_tail(document: Doc, directory: Doc) -> None:
    """Let an array that claims more elements end right before the end of its record."""
    entry = document["a.norm"]
    start = entry["data_offsets"][0]
    for key in directory["pads"]:
        pad = document[key]
        if pad["data_offsets"][0] == entry["data_offsets"][1]:
            stop = pad["data_offsets"][1] - 64
            pad["data_offsets"][0] = stop
            pad["shape"] = [64]
            entry["data_offsets"][1] = stop
            entry["shape"] = directory["tensors"]["a.norm"]["shape"] = [(stop - start) // 4]
            return
    raise AssertionError("a.norm must be followed by the tail of its record")


def swap_records(document: Doc, directory: Doc) -> None:
    directory["tensors"]["a.norm"]["record"] = "b"


def wipe_record(document: Doc, directory: Doc, *, start: int | None = None) -> None:
    """Replace all of record b, or of the file from `start` on, by one pad."""
    border = directory["records"]["a"][1]
    start = border if start is None else start
    for name in ("b.x", "b.y"):
        del directory["tensors"][name]
    gone = [
        key
        for key, entry in document.items()
        if key != "__metadata__" and entry["data_offsets"][0] >= start
    ]
    stop = max(document.pop(key)["data_offsets"][1] for key in gone)
    directory["pads"] = [key for key in directory["pads"] if key not in gone] + ["__pad__.x"]
    document["__pad__.x"] = {
        "dtype": "U8",
        "shape": [stop - start],
        "data_offsets": [start, stop],
    }


def wipe_tail_and_record(document: Doc, directory: Doc) -> None:
    border = directory["records"]["a"][1]
    tails = [document[key]["data_offsets"] for key in directory["pads"]]
    wipe_record(document, directory, start=next(a for a, b in tails if b == border))


def two_owners(document: Doc, directory: Doc) -> None:
    """A dense tensor under the key of another one's bitmap."""
    shape = document["b.x_bitmap"]["shape"]
    directory["tensors"]["b.x_bitmap"] = {
        "shape": shape,
        "dtype": "U8",
        "codec": "dense",
        "record": "b",
    }


BAD: dict[str, tuple[Edit, str]] = {
    # header entries
    "entry-not-object": (lambda d, _: d.update({"a.norm": 3}), "must hold dtype, shape"),
    "entry-more": (set_entry("a.norm", more=1), "must hold dtype, shape and data_offsets"),
    "entry-less": (lambda d, _: d["a.norm"].pop("dtype"), "must hold dtype, shape"),
    "dtype-number": (set_entry("a.norm", dtype=3), "dtype must be a string, got 3"),
    "dtype-unknown": (set_entry("a.norm", dtype="F3"), "unknown dtype 'F3'"),
    "shape-number": (set_entry("a.norm", shape=3), "shape must be a list of sizes"),
    "shape-negative": (set_entry("a.norm", shape=[-16]), "shape must be a list of sizes"),
    "shape-bool": (set_entry("a.norm", shape=[True]), "shape must be a list of sizes"),
    "shape-float": (set_entry("a.norm", shape=[16.0]), "shape must be a list of sizes"),
    "shape-dims": (set_entry("a.norm", shape=[1] * 33), "shape must be a list of sizes"),
    "shape-huge": (set_entry("a.norm", shape=[2**62] * 32), "that an array can have"),
    "shape-empty": (set_entry("a.norm", shape=[0, 2**62]), "that an array can have"),
    "shape-other": (set_entry("a.norm", shape=[4, 4]), r"must be F32 \[16\] by its tensor"),
    "dtype-other": (set_entry("a.norm", dtype="I32"), r"must be F32 .*, got I32"),
    "offsets-number": (set_entry("a.norm", data_offsets=3), r"must be \[start, stop\]"),
    "offsets-one": (set_entry("a.norm", data_offsets=[3]), r"must be \[start, stop\]"),
    "offsets-back": (set_entry("a.norm", data_offsets=[9, 3]), r"must be \[start, stop\]"),
    "offsets-negative": (set_entry("a.norm", data_offsets=[-9, 3]), r"must be \[start, stop\]"),
    "offsets-2**63": (set_entry("a.norm", data_offsets=[0, 2**63]), r"must be \[start, stop\]"),
    "size": (move("a.norm", 0, 4), r"F32 \[16\] must take 64 bytes, data_offsets give 68"),
    "overlap": (move("a.norm", -4, -4), "an overlap"),
    "hole": (move("a.norm", 4, 4), "a hole"),
    "metadata-numbers": (lambda d, _: d["__metadata__"].update(x=1), "strings to strings"),
    # directory
    "version-missing": (lambda _, d: d.pop("version"), "version must be a positive integer"),
    "version-text": (set_directory(version="1"), "version must be a positive integer"),
    "version-0": (set_directory(version=0), "version must be a positive integer"),
    "version-true": (set_directory(version=True), "version must be a positive integer"),
    "version-7": (set_directory(version=7), "must be 1 to 6, got 7; upgrade endor"),
    "align": (set_directory(align=512), "align must be 4096, got 512"),
    "records-missing": (lambda _, d: d.pop("records"), "'records' must be an object"),
    "records-list": (set_directory(records=[]), "'records' must be an object"),
    "tensors-missing": (lambda _, d: d.pop("tensors"), "'tensors' must be an object"),
    "record-short": (lambda _, d: d["records"]["a"].pop(), r"must be \[offset, length, checksum"),
    "record-text": (set_record("a", 0, "0"), "bad offset or length"),
    "record-empty": (set_record("a", 1, 0), "bad offset or length"),
    "record-moved": (set_record("a", 0, 0), "must start at"),
    "record-length": (set_record("a", 1, 5000), "be a multiple of 4096 long"),
    "record-gap": (set_record("b", 0, 1 << 20), "'b' must start at"),
    "record-long": (set_record("b", 1, 1 << 20), "records must end at"),
    "digits-short": (set_record("a", 2, "0" * 15), "checksum must be 16 hexadecimal"),
    "digits-upper": (set_record("a", 2, "A" * 16), "checksum must be 16 hexadecimal"),
    "digits-number": (set_record("a", 2, 7), "checksum must be 16 hexadecimal"),
    "record-bare": (wipe_record, "record 'b' must hold a tensor"),
    "tensor-list": (lambda _, d: d["tensors"].update(x=[]), "record must name one"),
    "tensor-record": (set_tensor("a.norm", record="z"), "record must name one of the file's"),
    "tensor-shape": (set_tensor("a.norm", shape=None), "shape must be a list of sizes"),
    "tensor-dims": (set_tensor("b.y", shape=[1] * 32 + [200]), "b.y: shape must be a list"),
    "tensor-dtype": (set_tensor("a.norm", dtype="F3"), "unknown dtype 'F3'"),
    "tensor-codec": (set_tensor("a.norm", codec="zip"), "unknown codec 'zip'"),
    "tensor-huge": (set_tensor("a.norm", shape=[0, 1 << 40, 2]), "at most 1099511627776"),
    "tensor-bitmap": (set_tensor("b.x", bitmap=1), "bitmap must be true or false"),
    "tensor-nnz": (set_tensor("b.x", nnz=101), "nnz 101 does not fit 100 elements"),
    "tensor-no-nnz": (lambda _, d: d["tensors"]["b.x"].pop("nnz"), "nnz must be a non-neg"),
    "tensor-raw-full": (set_tensor("b.x", bitmap=False, nnz=100), "codec raw needs a bitmap"),
    "tensor-raw-k": (set_tensor("b.x", k=1), "codec raw takes no exponent window"),
    "tensor-k": (set_tensor("b.y", k=9), r"k must be 1\.\.8, got 9"),
    "tensor-base": (set_tensor("b.y", base=255), r"base must be 0\.\."),
    "tensor-patches": (set_tensor("b.y", patches=201), "201 patches exceed nnz 200"),
    "tensor-no-exp": (set_tensor("a.norm", dtype="I64", codec="exp", bitmap=True, nnz=1, k=1),
                      "takes only the dense codec"),
    "tensor-reserved": (rename_tensor("a.norm", "__pad__.x"), "must not name a tensor"),
    "tensor-metadata": (rename_tensor("a.norm", "__metadata__"), "must not name a tensor"),
    "array-missing": (rename_tensor("a.norm", "other"), "array 'other' is missing"),
    "array-elsewhere": (swap_records, "a.norm: must lie inside record 'b'"),
    "array-slid": (slide_array, "a.norm: must start at a multiple of 256"),
    "array-tail": (shrink_tail, "a.norm: must end 128 bytes before its record does"),
    "array-two-owners": (two_owners, "'b.x_bitmap' belongs to both b.x"),
    "array-nobody": (lambda _, d: d["tensors"].pop("a.norm"), "belongs to no tensor and is no pad"),
    "pads-missing": (lambda _, d: d.pop("pads"), "'pads' must be a list"),
    "pad-number": (set_directory(pads=[3]), "pad 3 must name an array"),
    "pad-unknown": (set_directory(pads=["__pad__.99"]), "must name an array"),
    "pad-tensor": (lambda _, d: d["pads"].append("a.norm"), "must name an array __pad__"),
    "pad-twice": (lambda _, d: d["pads"].append("__pad__.0"), "belongs to both a pad and a pad"),
    "pad-unlisted": (lambda _, d: d["pads"].pop(), "belongs to no tensor and is no pad"),
    "pad-type": (lambda d, _: d["__pad__.0"].update(dtype="I8"), "a pad must be U8"),
    "pad-across": (wipe_tail_and_record, r"__pad__\.x: must lie inside record 'a'"),
    "pad-dims": (lambda d, _: d["__pad__.0"]["shape"].append(1), "of one dimension"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_broken_rule_is_named(small: Path, tamper: Tamper, case: str) -> None:
    edit, message = BAD[case]
    tamper(small, edit)
    with pytest.raises(FormatError, match=message) as caught:
        FileLayout.read(small)
    assert str(small) in str(caught.value)


def test_pad_of_no_bytes(small: Path, tamper: Tamper) -> None:
    def edit(document: Doc, directory: Doc) -> None:
        directory["pads"].append("__pad__.x")
        document["__pad__.x"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}

    tamper(small, edit)
    with pytest.raises(FormatError, match=r"__pad__\.x: a pad must be U8.* not empty"):
        FileLayout.read(small)


def raw_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


NOT_A_HEADER = {
    "empty": (b"", TruncatedError, "has 0 bytes, needs 8"),
    "7-bytes": (b"\x10" + bytes(6), TruncatedError, "has 7 bytes, needs 8"),
    "too-long": (bytes([255] * 8), FormatError, "at most 100000000"),
    "ends-early": (raw_header(b"{}")[:-1], TruncatedError, "for the header alone"),
    "no-header": (raw_header(b""), FormatError, "must begin with b'{'"),
    "list": (raw_header(b"[]"), FormatError, "must begin with b'{'"),
    "space": (raw_header(b" {}"), FormatError, "must begin with b'{'"),
    "not-utf8": (raw_header(b'{"\xff":1}'), FormatError, "must be JSON"),
    "not-json": (raw_header(b'{"a":'), FormatError, "must be JSON"),
    "trailing": (raw_header(b"{} x"), FormatError, "must be JSON"),
    "nan": (raw_header(b'{"a":NaN}'), FormatError, "NaN is not JSON"),
    "infinity": (raw_header(b'{"a":-Infinity}'), FormatError, "-Infinity is not JSON"),
    "twice": (raw_header(b'{"a":1,"a":2}'), FormatError, "key 'a' occurs twice"),
    "twice-below": (raw_header(b'{"a":{"b":1,"b":2}}'), FormatError, "key 'b' occurs twice"),
    "surrogate": (raw_header(rb'{"\ud800":1}'), FormatError, "surrogate pair"),
    "surrogate-below": (raw_header(rb'{"a":{"\ud800":1}}'), FormatError, "surrogate pair"),
    "deep": (raw_header(b'{"a":' + b"[" * 100_000), FormatError, "must be JSON"),
    "digits": (raw_header(b'{"a":' + b"9" * 5000 + b"}"), FormatError, "must be JSON"),
    "metadata-list": (raw_header(b'{"__metadata__":[]}'), FormatError, "strings to strings"),
    "plain": (raw_header(b"{}"), FormatError, "plain safetensors file"),
}


@pytest.mark.parametrize("case", NOT_A_HEADER)
def test_no_safetensors_header(tmp_path: Path, case: str) -> None:
    content, kind, message = NOT_A_HEADER[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        FileLayout.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"endor": "{}"}, "must hold endor.checksum"),
        ({"endor": "{}", "endor.checksum": "12"}, "must hold endor.checksum"),
        ({"endor": "{}", "endor.checksum": "\ud800" * 16}, "surrogate pair"),
        ({"endor.checksum": None}, "metadata must hold 'endor'"),
        ({"endor": "[]", "endor.checksum": None}, "'endor' must be a JSON object, got list"),
        ({"endor": '{"a":1,"a":2}', "endor.checksum": None}, "key 'a' occurs twice"),
        ({"endor": "", "endor.checksum": None}, "must be JSON"),
    ],
)
def test_seal(tmp_path: Path, metadata: dict[str, str | None], message: str) -> None:
    path = tmp_path / "bad.safetensors"
    filled = {key: "0" * 16 if value is None else value for key, value in metadata.items()}
    raw = raw_header(json.dumps({"__metadata__": filled}, separators=(",", ":")).encode())
    digits = xxhash.xxh3_64_hexdigest(raw).encode()
    path.write_bytes(raw.replace(b"0" * 16, digits))
    with pytest.raises(FormatError, match=message):
        FileLayout.read(path)


def test_spaces_around_the_checksum_and_a_second_one_are_refused(small: Path) -> None:
    raw = small.read_bytes()
    mark = raw.index(b'"endor.checksum":"')
    spaced = raw[:mark] + b'"endor.checksum": "' + raw[mark + 18 :]
    end = spaced.index(b"  ", mark)
    small.write_bytes(spaced[:end] + spaced[end + 1 :])
    with pytest.raises(FormatError, match="written once and without spaces"):
        FileLayout.read(small)


def test_wrong_checksum_is_told_from_other_damage(small: Path) -> None:
    raw = small.read_bytes()
    small.write_bytes(raw.replace(b'"note":"small"', b'"note":"smell"'))
    with pytest.raises(ChecksumError, match="the header is damaged"):
        FileLayout.read(small)


def test_data_start_must_be_aligned(small: Path) -> None:
    raw = small.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length - 1]
    assert raw[8 + length - 1 : 8 + length] == b" "
    mark = header.index(b'"endor.checksum":"') + 18
    digits = header[mark : mark + 16]
    blank = raw_header(header).replace(digits, b"0" * 16)
    sealed = blank.replace(b'm":"' + b"0" * 16, b'm":"' + xxhash.xxh3_64_hexdigest(blank).encode())
    small.write_bytes(sealed + raw[8 + length :])
    with pytest.raises(FormatError, match="data must start at a multiple of 4096"):
        FileLayout.read(small)


def test_bytes_behind_the_last_array_are_refused(small: Path) -> None:
    with small.open("ab") as file:
        file.write(bytes(ALIGN))
    with pytest.raises(FormatError, match="file must end at"):
        FileLayout.read(small)


def test_reading_costs_what_the_header_costs(write: Write, tmp_path: Path) -> None:
    """A sparse file of 4 TiB opens at once, and nothing of its size is allocated."""
    spec = codecs.TensorSpec((1 << 39,), DTYPES["F64"], "dense", bitmap=False, nnz=1 << 39)
    nbytes = align_up(spec.nbytes + TAIL_BYTES, ALIGN)
    u8 = np.zeros(1, np.uint8)
    path = write({"r": {"x": Encoded(codecs.encode(u8, DTYPES["U8"], codec="dense").spec,
                                     {"": u8})}})  # fmt: skip
    raw = path.read_bytes()
    document = json.loads(raw[8:4096])
    directory = json.loads(document["__metadata__"]["endor"])
    directory["tensors"]["x"] = spec.to_dict() | {"record": "r"}
    directory["records"]["r"][1] = nbytes
    document["x"] = {"dtype": "F64", "shape": [1 << 39], "data_offsets": [0, spec.nbytes]}
    tail = nbytes - spec.nbytes
    document["__pad__.0"] = {
        "dtype": "U8",
        "shape": [tail],
        "data_offsets": [spec.nbytes, nbytes],
    }
    document["__metadata__"]["endor"] = json.dumps(directory)
    document["__metadata__"]["endor.checksum"] = "0" * 16
    head = raw_header(json.dumps(document, separators=(",", ":")).encode().ljust(4088))
    digits = xxhash.xxh3_64_hexdigest(head).encode()
    path.write_bytes(head.replace(b'm":"' + b"0" * 16, b'm":"' + digits))
    with pytest.raises(TruncatedError, match="has 4096 bytes, needs"):
        FileLayout.read(path)
    try:
        with path.open("r+b") as file:
            file.truncate(4096 + nbytes)
    except OSError:
        return  # this file system has no files of that size: the claim above was checked
    assert FileLayout.read(path).tensor("x").spec.numel == 1 << 39


def test_errors_of_hostile_headers_stay_short(small: Path, tamper: Tamper) -> None:
    tamper(small, set_entry("a.norm", shape=["x" * 400]))
    with pytest.raises(EndorError) as caught:
        FileLayout.read(small)
    assert len(str(caught.value)) < 300 + len(str(small))


def test_levels_need_the_fourth_version(write: Write, tamper: Tamper) -> None:
    levels = np.array([0.5, -1.0], np.float32)
    codes = np.arange(40).reshape(4, 10) & 1
    path = write({"r": {"x": integer.encode(codes, 1.0, DTYPES["BF16"], levels=levels)}})
    assert FileLayout.read(path).version == 4
    tamper(path, set_directory(version=3))
    with pytest.raises(FormatError, match="x: codec int with levels needs format version 4, not 3"):
        FileLayout.read(path)


def test_codec_int_needs_the_second_version(write: Write, tamper: Tamper) -> None:
    path = write({"x": {"x": sample_codes(DTYPES["BF16"], (3, 700), 3.0)}})
    assert FileLayout.read(path).version == 2
    tamper(path, set_directory(version=1))
    with pytest.raises(FormatError, match="x: codec int needs format version 2, not 1"):
        FileLayout.read(path)


def test_a_transposed_matrix_needs_the_fifth_version(write: Write, tamper: Tamper) -> None:
    path = write({"x": {"x": sample_turned(DTYPES["BF16"], (30, 70), "raw")}})
    assert FileLayout.read(path).version == 5
    tamper(path, set_directory(version=4))
    with pytest.raises(FormatError, match="x: a transposed matrix needs format version 5, not 4"):
        FileLayout.read(path)


def test_bundles_need_the_sixth_version(write: Write, tamper: Tamper) -> None:
    path = write({"x": {"x": sample_bundles(DTYPES["BF16"], (30, 70), "raw")}})
    assert FileLayout.read(path).version == 6
    tamper(path, set_directory(version=5))
    said = "x: a transposed matrix in bundles needs format version 6, not 5"
    with pytest.raises(FormatError, match=said):
        FileLayout.read(path)


@pytest.mark.parametrize("suffix", ["bundles", "bundle_offsets"])
def test_arrays_of_bundles_are_those_of_its_spec(write: Write, tamper: Tamper, suffix: str) -> None:
    path = write({"x": {"x": sample_bundles(DTYPES["BF16"], (30, 70), "exp")}})
    tamper(path, lambda document, _: document[f"x_{suffix}"].update(shape=[1]))
    with pytest.raises(FormatError, match=f"x_{suffix}"):
        FileLayout.read(path)


@pytest.mark.parametrize("suffix", ["frequencies", "states", "words", "steps"])
def test_arrays_of_codec_int_are_those_of_its_spec(
    write: Write, tamper: Tamper, suffix: str
) -> None:
    path = write({"x": {"x": sample_codes(DTYPES["BF16"], (3, 700), 3.0)}})
    tamper(path, lambda document, _: document[f"x_{suffix}"].update(shape=[1]))
    with pytest.raises(FormatError, match=f"x_{suffix}"):
        FileLayout.read(path)


def test_room_for_the_largest_form_of_int() -> None:
    real = sample_codes(DTYPES["BF16"], (3, 700), 3.0)
    largest = largest_int_spec((3, 700), DTYPES["BF16"])
    assert len(json.dumps(largest.to_dict())) >= len(json.dumps(real.spec.to_dict()))
    assert {a.suffix for a in largest.arrays} >= {a.suffix for a in real.spec.arrays}
    for shape in ((0, 5), (), (2, 3, 100)):
        assert len(largest_int_spec(shape, DTYPES["F32"]).arrays) == (6 if 0 in shape else 9)
