"""Counting active neurons: what the model's own forward shows, stored, read back, refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from endor.checkpoint import inspect_checkpoint, open_source, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.companions import COUNTS_NAME
from endor.checkpoint.neuron_counts import NeuronCounts, read_neuron_counts
from endor.checkpoint.neurons import first_matrices
from endor.cli.main import cli
from endor.errors import CheckpointError, ChecksumError, ConfigError, EndorError, PruningError
from endor.packing import pack_checkpoint
from endor.pruning.calibration import calibration_windows
from endor.pruning.contract import PruneOptions
from endor.pruning.feed_forward import FeedForwardPasses
from endor.storage import FileLayout
from endor.storage.safetensors import Header, file_head

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 24}
SECONDS = [f"model.decoder.layers.{layer}.fc2.weight" for layer in range(3)]


@pytest.fixture
def opt(tmp_path: Path, save: Any) -> Any:
    """A random OPT whose neurons are active by their bias, and its directory."""
    model = save(tmp_path / "opt", "opt", torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.copy_(torch.linspace(0.5, -3.0, len(layer.fc1.bias)))
    model.save_pretrained(tmp_path / "opt")
    return model.float(), tmp_path / "opt"


def expected_counts(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count by hooks on the whole model."""
    found: dict[str, torch.Tensor] = {}
    for layer, name in zip(model.model.decoder.layers, SECONDS, strict=True):
        layer.fc2.register_forward_pre_hook(
            lambda _module, args, name=name: found.update(
                {name: (args[0].reshape(-1, args[0].shape[-1]) != 0).sum(0)}
            )
        )
    with torch.no_grad():
        model(ids)
    return found


def layouts_of(packed: Path) -> list[FileLayout]:
    return [FileLayout.read(path) for path in sorted(packed.glob("endor-*.safetensors"))]


def packed_with_counts(opt: Any, text: Path, out: Path, **options: Any) -> Path:
    how = PruneOptions(method="none", calibration=(text,), **OPTIONS)
    pack_checkpoint(opt[1], out, neurons=True, count=True, prune=how, **options)
    return out


def test_passes_show_what_the_model_sees(opt: Any, text: Path, tmp_path: Path) -> None:
    model, path = opt
    options = PruneOptions(method="none", calibration=(text,), **OPTIONS)
    inputs: list[torch.Tensor] = []
    model.model.decoder.layers[1].fc1.register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with closing(open_source(path)) as source:
        ids = calibration_windows(path, options)
        passes = FeedForwardPasses(
            source, options, {name: first_matrices(name) for name in SECONDS}
        )
        assert [block.matrix for block in passes.blocks] == SECONDS
        seen = list(passes.run(ids, tmp_path))
    with torch.no_grad():
        model(ids)
    (expected,) = inputs
    found = torch.cat([each.inputs for each in seen if each.block.layer == 1])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert {each.activation.shape[1] for each in seen} == {96}


def test_counts_are_those_of_the_whole_model(opt: Any, text: Path, tmp_path: Path) -> None:
    model, path = opt
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    options = PruneOptions(method="none", calibration=(text,), **OPTIONS)
    expected = expected_counts(model, calibration_windows(path, options))
    found = read_neuron_counts(packed, layouts_of(packed))
    assert found is not None
    assert found.tokens == 6 * 24
    assert sorted(found.active) == SECONDS
    for name in SECONDS:  # a sum next to 0 may fall on either side
        apart = np.abs(found.active[name].astype(int) - expected[name].numpy())
        assert apart.max() <= 1
        assert apart.sum() <= 3
    zeros = 1 - sum(int(each.sum()) for each in expected.values()) / (3 * 96 * 144)
    assert abs(found.zeros - zeros) < 1e-3
    shown = inspect_checkpoint(packed).to_dict()["neurons"]
    assert shown["calibration"]["texts"] == ["text.txt"]
    assert shown["neurons_of_80_percent"] < 0.5
    assert verify_checkpoint(packed, against=path).problems == ()


def test_by_the_command(opt: Any, text: Path, tmp_path: Path) -> None:
    packed, how = tmp_path / "packed", ("--samples", "6", "--seq-len", "24")
    given = ("pack", str(opt[1]), str(packed), "--neurons", *how)
    result = CliRunner().invoke(cli, list(given))
    assert result.exit_code == 2
    assert "does nothing without" in result.output
    result = CliRunner().invoke(cli, [*given, "--calibration", str(text), "--passes", "3"])
    assert result.exit_code == 2
    result = CliRunner().invoke(cli, [*given, "--calibration", str(text)])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(cli, ["inspect", str(packed)]).output
    assert "of the activations are zero over 144 tokens of text.txt" in shown


def test_all_else_is_as_without_counts(opt: Any, text: Path, tmp_path: Path) -> None:
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    pack_checkpoint(opt[1], tmp_path / "plain", neurons=True)
    assert not (tmp_path / "plain" / COUNTS_NAME).exists()
    for path in (tmp_path / "plain").glob("endor-*.safetensors"):
        assert path.read_bytes() == (packed / path.name).read_bytes()
    report = unpack_checkpoint(packed, tmp_path / "back")
    assert not (tmp_path / "back" / COUNTS_NAME).exists()
    assert report.left_out == ()
    pack_checkpoint(opt[1], packed, neurons=True, overwrite=True)  # what Endor wrote it replaces
    assert not (packed / COUNTS_NAME).exists()


def test_of_a_pruned_model_the_pruned_one_is_counted(opt: Any, text: Path, tmp_path: Path) -> None:
    how = PruneOptions(method="magnitude", sparsity=0.7, calibration=(text,), **OPTIONS)
    out = tmp_path / "packed"
    pack_checkpoint(opt[1], out, neurons=True, count=True, prune=how)
    unpack_checkpoint(out, tmp_path / "back")
    with closing(open_source(tmp_path / "back")) as source:
        passes = FeedForwardPasses(source, how, {name: first_matrices(name) for name in SECONDS})
        ids = calibration_windows(opt[1], how)
        seen = list(passes.run(ids, tmp_path))
    found = read_neuron_counts(out, layouts_of(out))
    assert found is not None
    for name in SECONDS:
        each = [torch.count_nonzero(s.activation, 0) for s in seen if s.block.matrix == name]
        assert torch.equal(torch.from_numpy(found.active[name].astype(np.int64)), sum(each))


@pytest.mark.parametrize("spoil", ["byte", "version", "tokens", "name", "shape", "swap", "cut"])
def test_damaged_counts_are_refused(opt: Any, text: Path, tmp_path: Path, spoil: str) -> None:
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    path, layouts = packed / COUNTS_NAME, layouts_of(packed)
    whole, header = path.read_bytes(), Header.read(path)
    entries, data = dict(header.entries), whole[header.data_start :]
    about = json.loads(header.metadata["endor.neurons"])
    if spoil == "byte":
        data = data[:-1] + bytes([data[-1] ^ 1])
    elif spoil == "version":
        about["version"] = 2
    elif spoil == "tokens":
        about["tokens"] = 0
    elif spoil == "name":
        entries["model.decoder.layers.0.fc1.weight"] = entries.pop(SECONDS[0])
    elif spoil == "swap":
        entries[SECONDS[0]], entries[SECONDS[1]] = entries[SECONDS[1]], entries[SECONDS[0]]
    head = file_head(entries.items(), {"endor.neurons": json.dumps(about)})
    if spoil == "shape":
        head = head.replace(b'"shape":[96]', b'"shape":[95]', 1)
    path.write_bytes((head + data)[: -4 if spoil == "cut" else None])
    with pytest.raises(EndorError, match=r"endor\.neurons\.safetensors"):
        read_neuron_counts(packed, layouts)
    with pytest.raises(EndorError):
        inspect_checkpoint(packed)
    assert any(COUNTS_NAME in line for line in verify_checkpoint(packed).problems)


def test_every_changed_byte_of_the_data_is_seen(opt: Any, text: Path, tmp_path: Path) -> None:
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    path, layouts = packed / COUNTS_NAME, layouts_of(packed)
    whole, start = path.read_bytes(), Header.read(packed / COUNTS_NAME).data_start
    for at in range(start, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(ChecksumError):
            read_neuron_counts(packed, layouts)


def test_counts_beyond_the_tokens_are_refused(opt: Any, text: Path, tmp_path: Path) -> None:
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    layouts = layouts_of(packed)
    counts = NeuronCounts(3, {SECONDS[0]: np.full(96, 4, np.uint32)}, {})
    (packed / COUNTS_NAME).write_bytes(counts.to_bytes(layouts))
    with pytest.raises(EndorError, match=r"layers\.0\.fc2\.weight: counts must be at most 3"):
        read_neuron_counts(packed, layouts)


def test_counts_of_another_packing_are_refused(opt: Any, text: Path, tmp_path: Path) -> None:
    packed = packed_with_counts(opt, text, tmp_path / "packed")
    model, path = opt
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight.mul_(1.5)
    model.bfloat16().save_pretrained(path)
    other = packed_with_counts(opt, text, tmp_path / "other")
    shutil.copy(packed / COUNTS_NAME, other / COUNTS_NAME)
    with pytest.raises(CheckpointError, match="another packing"):
        read_neuron_counts(other, layouts_of(other))
    (other / COUNTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="is missing, and the index names it"):
        read_neuron_counts(other, layouts_of(other))
    pack_checkpoint(path, tmp_path / "plain", neurons=True)
    shutil.copy(packed / COUNTS_NAME, tmp_path / "plain" / COUNTS_NAME)
    with pytest.raises(CheckpointError, match="is not in the index"):
        read_neuron_counts(tmp_path / "plain", layouts_of(tmp_path / "plain"))


def test_what_stands_in_the_way_is_said_before_packing(
    opt: Any, text: Path, tmp_path: Path, save: Any
) -> None:
    out = tmp_path / "packed"
    short = PruneOptions(method="none", calibration=(text,), seq_len=100_000)
    with pytest.raises(ConfigError, match="do not fill one window"):
        pack_checkpoint(opt[1], out, neurons=True, count=True, prune=short)
    with pytest.raises(ConfigError, match="goes with neurons"):
        pack_checkpoint(opt[1], out, count=True)
    with closing(open_source(opt[1])) as source, pytest.raises(PruningError, match="no feed-for"):
        FeedForwardPasses(source, PruneOptions(method="none"), {"lm_head.weight": ()})
    assert [path.name for path in tmp_path.iterdir() if "packed" in path.name] == []
    save(tmp_path / "llama", "llama")
    how = PruneOptions(method="none", calibration=(text,), **OPTIONS)
    report = pack_checkpoint(tmp_path / "llama", out, neurons=True, count=True, prune=how)
    assert "not exactly zero" in report.neurons_unused
    assert not (out / COUNTS_NAME).exists()


def test_counting_that_was_interrupted_goes_on(
    opt: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"

    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("endor.packing.neurons.count_active", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed_with_counts(opt, text, out)
    assert not out.exists()
    packed_with_counts(opt, text, out, resume=True)
    once = packed_with_counts(opt, text, tmp_path / "once")
    assert (out / COUNTS_NAME).read_bytes() == (once / COUNTS_NAME).read_bytes()
    assert verify_checkpoint(out, against=opt[1]).problems == ()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    with monkeypatch.context() as patch:  # what was counted may also be left out after all
        patch.setattr("endor.packing.neurons.count_active", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed_with_counts(opt, text, tmp_path / "other")
    pack_checkpoint(opt[1], tmp_path / "other", neurons=True, resume=True)
    assert not (tmp_path / "other" / COUNTS_NAME).exists()
