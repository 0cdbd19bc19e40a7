"""Checks of whole files, and reading record after record."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES, Encoded, coding, integer
from endor.errors import ChecksumError, FormatError
from endor.storage import (
    FileLayout,
    FileWriter,
    HostBuffer,
    bind_checked,
    check_bytes,
    check_record,
    header_capacity,
    open_reader,
    read_records,
    verify_file,
)

Write = Callable[..., Path]


def test_verify_reports_every_record(small: Path) -> None:
    steps: list[int] = []
    layout = verify_file(small, progress=steps.append)
    assert layout == FileLayout.read(small)
    assert steps == [record.nbytes for record in layout.records.values()]


def test_verify_leaves_a_given_reader_open(small: Path) -> None:
    with open_reader("buffered") as reader:
        verify_file(small, reader=reader)
        layout = verify_file(small, reader=reader)
        assert reader.describe()["bytes"] == 2 * (layout.file_bytes - layout.data_start)


def test_verify_stops_at_the_first_damaged_record(small: Path) -> None:
    layout = FileLayout.read(small)
    with small.open("r+b") as file:
        file.seek(layout.records["b"].offset)
        file.write(b"\xff")
    steps: list[int] = []
    with pytest.raises(ChecksumError, match="record 'b'"):
        verify_file(small, progress=steps.append)
    assert steps == [layout.records["a"].nbytes]


def test_records_come_in_file_order_with_their_bytes(write: Write) -> None:
    u8 = DTYPES["U8"]
    data = [np.full(size, size % 251, np.uint8) for size in (1, 9000, 0, 4096, 70_000)]
    path = write(
        {f"r{i}": {f"x{i}": codecs.encode(bits, u8, codec="dense")} for i, bits in enumerate(data)}
    )
    layout = FileLayout.read(path)
    raw = np.fromfile(path, np.uint8)
    seen = []
    with open_reader(threads=2, block_bytes=4096) as reader:
        for record, record_bytes in read_records(layout, reader):
            wanted = raw[record.offset : record.offset + record.nbytes]
            np.testing.assert_array_equal(record_bytes, wanted)
            check_record(layout, record.name, record_bytes)
            seen.append(record.name)
    assert seen == [f"r{i}" for i in range(len(data))]


def test_leaving_early_waits_for_the_read_ahead(small: Path) -> None:
    """Once the generator is closed no thread may write into its buffers."""
    layout = FileLayout.read(small)
    with open_reader() as reader:
        records = read_records(layout, reader)
        next(records)
        records.close()
        assert reader.describe()["records"] == len(layout.records)


def test_no_records(write: Write) -> None:
    path = write({})
    with open_reader() as reader:
        assert list(read_records(FileLayout.read(path), reader)) == []
    assert not verify_file(path).records


def test_bytes_past_the_record_are_ignored(small: Path) -> None:
    layout = FileLayout.read(small)
    record = layout.records["a"]
    buffer = HostBuffer(record.nbytes + 4096)
    buffer.array[:] = 0xEE
    with open_reader() as reader:
        reader.read(record, buffer)
    check_bytes(record, buffer.array)
    check_record(layout, "a", buffer.array)


def test_bind_checked_names_file_and_tensor(small: Path) -> None:
    layout = FileLayout.read(small)
    record = layout.record_of("b.x")
    data = np.fromfile(small, np.uint8, record.nbytes, offset=record.offset)
    assert bind_checked(layout, "b.x", data).spec.codec == "raw"
    bitmap = next(array for array in layout.tensor("b.x").arrays if array.suffix == "bitmap")
    data[bitmap.start] ^= 1
    with pytest.raises(FormatError, match=r"weights\.safetensors: b\.x: bitmap must have nnz"):
        bind_checked(layout, "b.x", data)


def test_arrays_may_come_in_any_order(tmp_path: Path) -> None:
    """The format gives keys, not an order: a writer that sorts its arrays otherwise is read too."""
    bf16 = DTYPES["BF16"]
    bits = np.zeros((30, 100), np.uint16)
    bits[::2, ::3] = 0x3F81
    encoded = codecs.encode(bits, bf16, codec="raw")

    class Backwards(codecs.TensorSpec):
        @property
        def arrays(self) -> tuple[codecs.ArraySpec, ...]:
            return super().arrays[::-1]

    spec = encoded.spec
    turned = Backwards(spec.shape, spec.dtype, spec.codec, spec.bitmap, spec.nnz)
    path = tmp_path / "x.safetensors"
    with (
        FileWriter(path, header_capacity=header_capacity({"r": {"x": turned}})) as writer,
        writer.record("r") as record,
    ):
        record.add("x", Encoded(turned, encoded.arrays))
    layout = verify_file(path)
    starts = {array.suffix: array.start for array in layout.tensor("x").arrays}
    assert starts["values"] < starts["bitmap"] < starts["tile_offsets"]
    data = np.fromfile(path, np.uint8, offset=layout.data_start)
    np.testing.assert_array_equal(codecs.decode(bind_checked(layout, "x", data)), bits)


@pytest.mark.parametrize("kernel", ["numpy", None])
@pytest.mark.parametrize("place", [0, -1])
def test_verify_decodes_what_is_coded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str | None, place: int
) -> None:
    """Words that were damaged before their checksum was taken; the structure allows any words."""
    if kernel is not None:
        monkeypatch.setenv("ENDOR_KERNEL", kernel)
    monkeypatch.setattr("endor.storage.verify.STREAM_ELEMENTS", coding.CHUNK)
    codes = np.random.default_rng(0).normal(0, 3, (300, 256)).round().astype(np.int32)
    whole = integer.encode(codes, 0.5, DTYPES["BF16"])
    words = whole.arrays["words"].copy()
    words[place] ^= 0x0101
    damaged = Encoded(whole.spec, {**whole.arrays, "words": words})
    for name, encoded in {"whole": whole, "damaged": damaged}.items():
        with (
            FileWriter(
                tmp_path / name, header_capacity=header_capacity({"r": {"x": encoded.spec}})
            ) as writer,
            writer.record("r") as record,
        ):
            record.add("x", encoded)
    verify_file(tmp_path / "whole")
    with pytest.raises(FormatError, match=r"damaged: x: .*"):
        verify_file(tmp_path / "damaged")
