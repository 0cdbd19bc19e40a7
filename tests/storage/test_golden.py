"""Files that earlier versions of Endor wrote are read for ever, and still written the same."""

import hashlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from endor import codecs, kernels
from endor.codecs import DTYPES
from endor.storage import FileLayout, HostBuffer, bind_checked, open_reader, verify_file

pytestmark = pytest.mark.usefixtures("each_kernel")

GOLDEN = Path(__file__).parents[1] / "golden"
PACKED = GOLDEN / "v1.safetensors"


def digests(version: str) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((GOLDEN / f"{version}.json").read_text())
    return loaded


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4", "v5", "v6"])
def test_every_tensor_decodes_to_the_recorded_elements(version: str) -> None:
    layout = FileLayout.read(GOLDEN / f"{version}.safetensors")
    found = {}
    with open_reader() as reader:
        for name in layout.tensors:
            record = layout.record_of(name)
            buffer = HostBuffer(record.nbytes)
            reader.read(record, buffer)
            encoded = bind_checked(layout, name, buffer.array)
            bits = codecs.decode(encoded)
            found[name] = hashlib.sha256(bits.tobytes()).hexdigest()
            fast = kernels.decode(encoded, np.empty(bits.size, bits.dtype))
            assert np.array_equal(fast, bits.reshape(-1)), name
    assert found == digests(version)
    assert layout.version == int(version[1:])


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


def test_the_second_version_holds_every_form_of_int() -> None:
    layout = verify_file(GOLDEN / "v2.safetensors")
    found = [entry.spec for entry in layout.tensors.values() if entry.spec.coding is not None]
    codings = [spec.coding for spec in found if spec.coding is not None]
    assert {spec.dtype.name for spec in found} == {"BF16", "F16", "F32"}
    assert {coding.step_dtype for coding in codings} == {"BF16", "F16", "F32"}
    assert {bool(coding.shift) for coding in codings} == {bool(s.patches) for s in found}
    assert {"dense", "int"} == {entry.spec.codec for entry in layout.tensors.values()}


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4", "v5", "v6"])
def test_writer_still_gives_the_same_bytes(tmp_path: Path, version: str) -> None:
    again = tmp_path / "again.safetensors"
    make = runpy.run_path(str(GOLDEN / "make.py"))
    assert make["write"](again, version) == digests(version)
    assert again.read_bytes() == (GOLDEN / f"{version}.safetensors").read_bytes()


def test_the_third_version_holds_every_form_of_fields() -> None:
    layout = verify_file(GOLDEN / "v3.safetensors")
    found = [entry.spec.fields for entry in layout.tensors.values()]
    layouts = [fields.layout for fields in found if fields is not None]
    assert len(layouts) == len(found)
    assert {part.bits for form in layouts for part in form.parts()} == {1, 2, 4, 8}
    assert {len(form.fields) for form in layouts} == {1, 2}
    assert any(form.rest_nbytes() for form in layouts)
    assert any(part.span > 1 for form in layouts for part in form.parts())


def test_the_fifth_version_holds_transposed_matrices() -> None:
    specs = [entry.spec for entry in verify_file(GOLDEN / "v5.safetensors").tensors.values()]
    assert all(spec.transposed and spec.shape == (4, 300) for spec in specs)
    assert {(spec.codec, spec.bitmap) for spec in specs} == {
        ("raw", True),
        ("exp", True),
        ("exp", False),
    }


def test_the_sixth_version_holds_bundles() -> None:
    specs = [entry.spec for entry in verify_file(GOLDEN / "v6.safetensors").tensors.values()]
    assert {spec.bundles.rows for spec in specs if spec.bundles} == {1, 3}
    assert {(spec.codec, spec.bitmap) for spec in specs if spec.bundles and spec.transposed} == {
        ("raw", True),
        ("exp", True),
        ("exp", False),
    }


def test_make_refuses_to_overwrite() -> None:
    before = PACKED.read_bytes()
    with pytest.raises(SystemExit, match="never overwritten"):
        runpy.run_path(str(GOLDEN / "make.py"), run_name="__main__")
    assert PACKED.read_bytes() == before
