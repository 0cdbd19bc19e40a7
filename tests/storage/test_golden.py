"""Files that earlier versions of Endor wrote are read for ever, and still written the same."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest

from endor import codecs
from endor.codecs import DTYPES
from endor.storage import FileLayout, HostBuffer, bind_checked, open_reader, verify_file

pytestmark = pytest.mark.usefixtures("each_kernel")

GOLDEN = Path(__file__).parents[1] / "golden"
PACKED = GOLDEN / "v1.safetensors"
DIGESTS = GOLDEN / "v1.json"


def digests() -> dict[str, str]:
    loaded: dict[str, str] = json.loads(DIGESTS.read_text())
    return loaded


def test_every_tensor_decodes_to_the_recorded_elements() -> None:
    layout = FileLayout.read(PACKED)
    found = {}
    with open_reader() as reader:
        for name in layout.tensors:
            record = layout.record_of(name)
            buffer = HostBuffer(record.nbytes)
            reader.read(record, buffer)
            bits = codecs.decode(bind_checked(layout, name, buffer.array))
            found[name] = hashlib.sha256(bits.tobytes()).hexdigest()
    assert found == digests()


def test_file_is_whole_and_holds_every_codec_and_dtype() -> None:
    layout = verify_file(PACKED)
    forms = {(tensor.spec.codec, tensor.spec.dtype.name) for tensor in layout.tensors.values()}
    packable = [item.name for item in DTYPES.values() if item.packable]
    make = runpy.run_path(str(GOLDEN / "make.py"))
    assert forms == {
        *(("dense", name) for name in DTYPES if name not in make["LATER"]),
        *(("raw", name) for name in packable),
        *(("exp", name) for name in packable),
    }
    assert any(tensor.spec.patches and not tensor.spec.bitmap for tensor in layout.tensors.values())
    assert layout.metadata["made by"] == "tests/golden/make.py"


def test_writer_still_gives_the_same_bytes(tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    make = runpy.run_path(str(GOLDEN / "make.py"))
    assert make["write"](again) == digests()
    assert again.read_bytes() == PACKED.read_bytes()


def test_make_refuses_to_overwrite() -> None:
    before = PACKED.read_bytes()
    with pytest.raises(SystemExit, match="never overwritten"):
        runpy.run_path(str(GOLDEN / "make.py"), run_name="__main__")
    assert PACKED.read_bytes() == before
