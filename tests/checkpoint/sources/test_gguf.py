"""GGUF files: packed into a directory, unpacked to the same bytes; damage is refused."""

import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from endor.checkpoint import open_source, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.sources.gguf import BLOCKS, LAYOUTS, PLAIN
from endor.errors import CheckpointError, ConfigError, EndorError
from endor.packing import pack_checkpoint

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType
NAMES = {int(kind): kind.name for kind in Type if int(kind) in BLOCKS}
"""What this gguf package knows of the types that Endor knows: older ones lack the newest."""

QUANTISERS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def blocks(kind: Type, rows: int = 64) -> np.ndarray:
    """Return bytes of real codes where the gguf package quantises so, else of narrow symbols."""
    rng = np.random.default_rng(int(kind))
    values = rng.standard_normal((rows, 512)).astype(np.float32)
    if kind.name in [*QUANTISERS, "MXFP4", "BF16"]:
        return gguf.quants.quantize(values, kind)
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw: np.ndarray = rng.binomial(15, 0.5, (rows, 512 // elements * nbytes)).astype(np.uint8)
    return raw


def write(path: Path, kinds: list[Type], alignment: int = 32) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "word"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_float32("some.number", 0.5)
    writer.add_tensor("token_embd.weight", np.ones((70, 64), dtype=np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(33, dtype=np.float32))
    for at, kind in enumerate(kinds):
        writer.add_tensor(f"blk.{at}.ffn_up.weight", blocks(kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_blocks_are_those_of_the_gguf_package() -> None:
    known = {int(kind): tuple(sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: known[kind] for kind in NAMES} == {kind: BLOCKS[kind] for kind in NAMES}
    assert len(NAMES) > len(BLOCKS) - 3
    for kind, layout in LAYOUTS.items():
        layout.check()
        assert layout.block == BLOCKS[kind][1]
    assert all(NAMES.get(kind, name) == name for kind, name in PLAIN.items())


@pytest.mark.parametrize("name", list(NAMES.values()))
def test_the_same_file_comes_back(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.gguf", [Type[name]])
    report = pack_checkpoint(path, tmp_path / "packed")
    assert report.sizes.recoded_tensors == (1 if int(Type[name]) in LAYOUTS else 0)
    assert not verify_checkpoint(tmp_path / "packed", against=path).problems
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert [each.name for each in (tmp_path / "again").iterdir()] == ["model.gguf"]
    assert (tmp_path / "again/model.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("alignment", "tail"), [(32, b""), (256, b"after\1"), (32, b"\0" * 9)])
def test_alignment_and_tail(tmp_path: Path, alignment: int, tail: bytes) -> None:
    path = write(tmp_path / "a.gguf", [Type.Q4_0, Type.Q6_K, Type.Q8_0], alignment)
    path.write_bytes(path.read_bytes() + tail)
    pack_checkpoint(path, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again/a.gguf").read_bytes() == path.read_bytes()


def test_codes_take_less(tmp_path: Path) -> None:
    for name in QUANTISERS:
        path = write(tmp_path / f"{name}.gguf", [Type[name]] * 2)
        sizes = pack_checkpoint(path, tmp_path / name).sizes
        assert sizes.recoded_bytes < 0.98 * sizes.recoded_from_bytes, name


def test_a_file_is_packed_into_a_directory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [Type.Q4_0])
    with pytest.raises(ConfigError, match="into a directory"):
        pack_checkpoint(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [Type.Q4_0])
    good = path.read_bytes()
    cases = {
        "version": good[:4] + struct.pack("<I", 9) + good[8:],
        "ends too early": good[:100],
        "past the file's end": good[:-64],
        "alignment": good.replace(b"some.number\6\0\0\0", b"some.number\x63\0\0\0"),
    }
    for what, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or unknown GGUF"):
            pack_checkpoint(path, tmp_path / "packed")
        assert not list(tmp_path.glob("packed*")), what


def test_every_cut_is_refused_or_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [Type.Q4_0])
    good = path.read_bytes()
    for size in range(4, 700, 7):
        path.write_bytes(good[:size])
        with pytest.raises(EndorError), closing(open_source(path)):
            pass
