import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from endor.checkpoint import inspect_checkpoint, open_source, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.verify import check_file
from endor.errors import CheckpointError, EndorError
from endor.packing import pack_checkpoint
from endor.quantization import QuantizeOptions, RoundedSource

from .conftest import write_checkpoint

INDEX = "endor.safetensors.index.json"
MIB = 1 << 20


@pytest.fixture
def packed(tmp_path, model):
    pack_checkpoint(model, tmp_path / "packed", prune="magnitude")
    return tmp_path / "packed"


def test_whole(packed, state):
    calls = []
    report = verify_checkpoint(packed, progress=lambda *call: calls.append(call))
    assert report.ok
    assert report.problems == ()
    assert (report.files, report.tensors, report.compared) == (1, len(state), 0)
    assert calls[-1][0] == calls[-1][1] > 0


def places(nbytes, count, rng):
    """Return places to damage: the edges, and others anywhere."""
    edges = [0, 7, 8, 100, nbytes - 1, nbytes - 4096]
    return sorted({*edges, *map(int, rng.integers(0, nbytes, count))})


def test_every_flipped_byte_of_a_shard_is_found(packed, rng):
    path = packed / "endor-00001-of-00001.safetensors"
    whole = path.read_bytes()
    for place in places(len(whole), 200, rng):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert not verify_checkpoint(packed, threads=1).ok, place
    path.write_bytes(whole)
    assert verify_checkpoint(packed).ok


def test_every_flipped_byte_of_the_index_is_found(packed, rng):
    path = packed / INDEX
    whole = path.read_bytes()
    for place in places(len(whole), 200, rng):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert not verify_checkpoint(packed, threads=1).ok, place
        finally:
            path.write_bytes(whole)


def test_every_truncation_is_found(packed, rng):
    for name in ("endor-00001-of-00001.safetensors", INDEX):
        whole = (packed / name).read_bytes()
        for length in places(len(whole), 60, rng):
            (packed / name).write_bytes(whole[:length])
            assert not verify_checkpoint(packed, threads=1).ok, (name, length)
        (packed / name).write_bytes(whole)
    assert verify_checkpoint(packed).ok


def test_a_line_for_each_problem(tmp_path, large_model):
    packed = tmp_path / "packed"
    pack_checkpoint(large_model, packed, max_shard_bytes=MIB)
    shards = sorted(packed.glob("*.safetensors"))
    for path in shards[:3]:
        content = bytearray(path.read_bytes())
        content[-5000] ^= 1
        path.write_bytes(content)
    shutil.copy(shards[4], packed / "endor-stray.safetensors")
    problems = verify_checkpoint(packed).problems
    assert len(problems) == 4
    for path in shards[:3]:
        assert sum(str(path) in problem for problem in problems) == 1
    assert sum("is not in the index" in problem for problem in problems) == 1
    assert all("\n" not in problem for problem in problems)


def test_exchanged_shards(tmp_path, large_model):
    packed = tmp_path / "packed"
    pack_checkpoint(large_model, packed, max_shard_bytes=MIB)
    first, second, *_ = sorted(packed.glob("*.safetensors"))
    first.rename(packed / "x")
    second.rename(first)
    (packed / "x").rename(second)
    (problem,) = verify_checkpoint(packed).problems
    assert "does not describe the shards" in problem


def test_missing_shard(packed):
    (packed / "endor-00001-of-00001.safetensors").unlink()
    (problem,) = verify_checkpoint(packed).problems
    assert "1 of 1 shards are missing" in problem
    with pytest.raises(CheckpointError, match="shards are missing"):
        inspect_checkpoint(packed)


def test_not_a_packed_checkpoint(tmp_path, model):
    for path in (model, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no packed checkpoint here"):
            verify_checkpoint(path)


def test_an_edited_index(packed):
    """Same content in another layout opens, but is not what was written."""
    text = (packed / INDEX).read_text()
    (packed / INDEX).write_text(json.dumps(json.loads(text)))
    assert inspect_checkpoint(packed).rows
    (problem,) = verify_checkpoint(packed).problems
    assert "does not describe the shards" in problem


def test_another_version(packed):
    document = json.loads((packed / INDEX).read_text())
    document["metadata"]["endor"]["format_version"] = 7
    (packed / INDEX).write_text(json.dumps(document))
    (problem,) = verify_checkpoint(packed).problems
    assert "format version must be 1 to 6, got 7; upgrade endor" in problem


def test_against(tmp_path, state, rng):
    model = write_checkpoint(tmp_path / "m", state)
    pack_checkpoint(model, tmp_path / "packed")
    report = verify_checkpoint(tmp_path / "packed", against=model)
    assert report.ok
    assert report.compared == len(state)
    assert verify_checkpoint(tmp_path / "packed", against=tmp_path / "packed").ok

    changed = dict(state)
    name = "model.layers.2.mlp.up_proj.weight"
    changed[name] = state[name].clone()
    changed[name].view(torch.int16)[5, 7] ^= 1
    changed["model.norm.weight"] = state["model.norm.weight"][:32].clone()
    changed["counter"] = torch.tensor(7, dtype=torch.int32)
    changed["new"] = torch.ones(1)
    del changed["lm_head.weight"]
    save_file(changed, tmp_path / "other.safetensors")
    problems = verify_checkpoint(
        tmp_path / "packed", against=tmp_path / "other.safetensors"
    ).problems
    by_name = {problem.split(":")[0]: problem for problem in problems}
    assert by_name.keys() == {name, "model.norm.weight", "counter", "new", "lm_head.weight"}
    assert "1 of 6144 elements differ" in by_name[name]
    assert "the first at (5, 7) is 0x" in by_name[name]
    assert "is BF16 [64]" in by_name["model.norm.weight"]
    assert "is I64 []" in by_name["counter"]
    assert "not in the packed checkpoint" in by_name["new"]


def test_minus_zero_is_not_zero(tmp_path):
    zeros = torch.zeros(64, 64, dtype=torch.bfloat16)
    negative = zeros.clone()
    negative[3, 4] = -0.0
    save_file({"layers.0.fc.weight": zeros}, tmp_path / "zeros.safetensors")
    save_file({"layers.0.fc.weight": negative}, tmp_path / "negative.safetensors")
    pack_checkpoint(tmp_path / "zeros.safetensors", tmp_path / "packed")
    (problem,) = verify_checkpoint(
        tmp_path / "packed", against=tmp_path / "negative.safetensors"
    ).problems
    assert "(3, 4) is 0x0000, there 0x8000" in problem


def test_check_file(tmp_path, packed):
    path = packed / "endor-00001-of-00001.safetensors"
    assert check_file(path) == []
    assert len(check_file(tmp_path / "absent")) == 1
    path.write_bytes(path.read_bytes()[:-4096])
    (problem,) = check_file(path)
    assert "truncated" in problem


def test_inspection(packed, state):
    found = inspect_checkpoint(packed)
    assert {row.name for row in found.rows} == state.keys()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["totals"]["tensors"] == len(plain["tensors"]) == len(state)
    row = next(row for row in plain["tensors"] if row["name"].endswith("0.mlp.up_proj.weight"))
    assert row["shape"] == [96, 64]
    assert row["density"] == pytest.approx(0.5, abs=1e-3)
    assert row["nbytes"] < row["dense_nbytes"] == 2 * 96 * 64
    assert row["file"] == "endor-00001-of-00001.safetensors"


def test_a_damaged_file_never_reads_as_something_else(packed, rng):
    """Reading, too, either gives the right bits or raises."""
    from contextlib import closing

    from endor.checkpoint import open_source

    name = "model.layers.0.mlp.up_proj.weight"
    out = np.empty(2 * 96 * 64, dtype=np.uint8)
    with closing(open_source(packed)) as source:
        source.read_into(name, out)
    path = packed / "endor-00001-of-00001.safetensors"
    whole = path.read_bytes()
    caught = 0
    for place in places(len(whole), 200, rng):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = np.empty_like(out)
        try:
            with closing(open_source(packed)) as source:
                source.read_into(name, found)
            assert np.array_equal(found, out)
        except EndorError:
            caught += 1
    assert caught > 20


def test_a_quantised_tensor_is_said_to_be_lossy_and_another_model_to_differ(tmp_path):
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: torch.randn(96, 128).bfloat16(), "model.norm.weight": torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with closing(open_source(tmp_path / "model.safetensors")) as source:
        rounded = RoundedSource(source, QuantizeOptions(bits=5), frozenset([name]))
        pack_checkpoint(rounded, tmp_path / "packed", quantized=rounded.describe_quantization())
    report = verify_checkpoint(tmp_path / "packed", against=tmp_path / "model.safetensors")
    assert report.ok
    assert (report.compared, report.lossy, report.output_error) == (2, 1, None)
    assert 1e-4 < report.weight_error < 1e-2
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    report = verify_checkpoint(tmp_path / "packed", against=tmp_path / "dense")
    assert (report.ok, report.lossy, report.weight_error) == (True, 0, None)
    tensors[name] = torch.randn(96, 128).bfloat16()
    save_file(tensors, tmp_path / "other.safetensors")
    report = verify_checkpoint(tmp_path / "packed", against=tmp_path / "other.safetensors")
    assert "elements differ from" in report.problems[0]
    tensors = load_file(tmp_path / "model.safetensors") | {"model.norm.weight": torch.zeros(8)}
    save_file(tensors, tmp_path / "other.safetensors")
    report = verify_checkpoint(tmp_path / "packed", against=tmp_path / "other.safetensors")
    assert len(report.problems) == 1
    assert "model.norm.weight: 8 of 8 elements differ" in report.problems[0]
