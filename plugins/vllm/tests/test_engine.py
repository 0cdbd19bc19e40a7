"""vLLM on packed checkpoints: the tokens of its own dense run, or a sentence."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

import endor
from endor.quantization import QuantizeOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; plugins/vllm/setup_environment.sh makes an environment",
    ),
]

DRIVER = Path(__file__).with_name("driver.py")
PACKED = {"load_format": "endor"}
PROMPTS = [[5, 6, 7], [9], list(range(10, 70)), [300, 4, 300, 4, 300], [17] * 20]
"""More than run at once, of several lengths: some are read while others are answered."""

LOSSLESS = {
    "raw": {"codec": "raw"},
    "exp": {"codec": "exp"},
    "everything": {"include": ["*embed_tokens*", "re:lm_head"]},
}


def run(jobs: list[dict[str, Any]], timeout: int = 1200) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, str(DRIVER)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads(process.stdout.splitlines()[-1])
    for result in results:
        result["log"] = process.stderr
    return results


def job(model: Path, options: dict[str, Any], tokens: int = 12) -> dict[str, Any]:
    return {"model": str(model), "options": options, "prompts": PROMPTS, "tokens": tokens}


def same_tokens(folder: Path, jobs: list[dict[str, Any]], pairs: list[tuple[int, int]]) -> Any:
    results = run(jobs)
    for number, result in enumerate(results):
        assert "error" not in result, f"{jobs[number]['model']}: {result['error']}"
    for packed, dense in pairs:
        assert results[packed]["tokens"] == results[dense]["tokens"], jobs[packed]["model"]
        assert results[packed]["layers"] > 0 == results[dense]["layers"]
        assert results[packed]["expansions"] + results[packed]["products"] > 0
    assert folder.exists()
    return results


def test_lossless_pruned_and_quantised_llama(tmp_path):
    dense = make_model("llama", tmp_path)
    jobs, pairs = [job(dense, {})], []
    for name, options in LOSSLESS.items():
        more = {} if name != "everything" else {"include": ["*embed_tokens*", "lm_head"]}
        endor.pack_checkpoint(dense, tmp_path / name, **(options | more))
        pairs.append((len(jobs), 0))
        jobs.append(job(tmp_path / name, PACKED))
    changed = {
        "pruned": {"prune": "magnitude", "sparsity": 0.6},
        "int": {"quantize": QuantizeOptions(bits=4.0), "calibrate": False},
    }
    for name, options in changed.items():
        endor.pack_checkpoint(dense, tmp_path / name, **options)
        endor.unpack_checkpoint(tmp_path / name, tmp_path / f"{name}-dense")
        pairs.append((len(jobs), len(jobs) + 1))
        jobs += [job(tmp_path / name, PACKED), job(tmp_path / f"{name}-dense", {})]
    results = same_tokens(tmp_path, jobs, pairs)
    assert len({json.dumps(result["tokens"]) for result in results}) == 3
    # 3 layers of qkv, o, gate_up and down.
    assert all(results[packed]["layers"] == 12 for packed, _ in pairs)
    # What was read is gone: there are the 7 matrices of each layer, as they lie in its bytes.
    assert results[1]["kept_views"] == 3 * 7
    assert "packed tensors are expanded in memory" in results[3]["log"]
    assert "lm_head" in results[3]["log"]


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_biases_and_matrices_that_are_fused_in_the_checkpoint(tmp_path, family):
    dense = make_model(family, tmp_path)
    endor.pack_checkpoint(dense, tmp_path / "exp", codec="exp")
    options = QuantizeOptions(bits=5.0)
    endor.pack_checkpoint(dense, tmp_path / "int", quantize=options, calibrate=False)
    endor.unpack_checkpoint(tmp_path / "int", tmp_path / "int-dense")
    jobs = [
        job(dense, {}),
        job(tmp_path / "exp", PACKED),
        job(tmp_path / "int", PACKED),
        job(tmp_path / "int-dense", {}),
    ]
    same_tokens(tmp_path, jobs, [(1, 0), (2, 3)])


def test_two_ranks_that_communicate(tmp_path):
    dense = make_model("llama", tmp_path)
    endor.pack_checkpoint(dense, tmp_path / "exp", codec="exp")
    ranks = {"tensor_parallel_size": 2}
    results = run([job(dense, ranks), job(tmp_path / "exp", PACKED | ranks)])
    assert [result.get("error") for result in results] == [None, None]
    assert results[0]["tokens"] == results[1]["tokens"]
    for rank in range(2):
        said = rf"Worker_TP{rank} .*21 tensors stay packed, in 12 layers"
        assert re.search(said, results[1]["log"])


def test_compiled_and_in_other_types(tmp_path):
    dense = make_model("llama", tmp_path)
    endor.pack_checkpoint(dense, tmp_path / "exp", codec="exp")
    compiled, wide = {"enforce_eager": False}, {"dtype": "float32"}
    jobs = [
        job(dense, compiled),
        job(tmp_path / "exp", PACKED | compiled),
        job(dense, wide),
        job(tmp_path / "exp", PACKED | wide),
    ]
    same_tokens(tmp_path, jobs, [(1, 0), (3, 2)])


def test_few_rows_are_multiplied_as_they_lie(tmp_path):
    dense = make_model("llama", tmp_path)
    endor.pack_checkpoint(dense, tmp_path / "exp", codec="exp")
    extra = {"model_loader_extra_config": {"exact": False}}
    (result,) = run([job(tmp_path / "exp", PACKED | extra)])
    assert "error" not in result, result.get("error")
    assert result["products"] > result["expansions"] > 0
    assert all(len(tokens) == 12 for tokens in result["tokens"])


def test_prefetching_streams_packed_bytes_through_buffers_of_one_size(tmp_path):
    dense = make_model("llama", tmp_path)
    endor.pack_checkpoint(dense, tmp_path / "packed", prune="magnitude", sparsity=0.5)
    endor.unpack_checkpoint(tmp_path / "packed", tmp_path / "pruned")
    jobs = [
        job(tmp_path / "pruned", {}),
        job(tmp_path / "packed", PACKED) | {"prefetch": True},
    ]
    found = same_tokens(tmp_path, jobs, [(1, 0)])[1]["prefetch"]
    # A name has one kind of buffer only where its parameters are of one size in all layers.
    assert found["kinds_of_buffers"] == found["names"]
    assert len(set(found["layer_bytes"])) == 1
    dense_bytes = 2 * (128 * (256 + 128) + 3 * 128 * 192 + 2 * 128)
    assert found["layer_bytes"][0] < 0.6 * dense_bytes
    assert found["copied_bytes"] > 12 * sum(found["layer_bytes"])


def damaged(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    shard = next(folder.glob("endor-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    shard.write_bytes(data)
    return folder


def without_layers(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    return folder


def of_another_shape(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    return folder


def quantised_before(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["source_quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_index(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / "endor.safetensors.index.json").unlink()
    return folder


def test_what_does_not_work_says_so(tmp_path):
    dense = make_model("llama", tmp_path)
    packed = tmp_path / "packed"
    endor.pack_checkpoint(dense, packed)
    mixture = make_model("mixtral", tmp_path)
    endor.pack_checkpoint(mixture, tmp_path / "experts")
    makers = (damaged, without_layers, of_another_shape, quantised_before, without_index)
    cases = [
        (packed, {}, "--load-format endor"),
        (dense, PACKED, "names no packed checkpoint"),
        (tmp_path / "experts", PACKED, "experts of a mixture"),
        (packed, PACKED | {"model_loader_extra_config": {"exact": 1}}, "exact must be true"),
        (packed, PACKED | {"cpu_offload_gb": 1}, "--offload-group-size"),
    ]
    cases += [
        (maker(tmp_path / maker.__name__, packed), PACKED, sentence)
        for maker, sentence in zip(
            makers,
            (
                "checksum must be",
                "lacks tensors",
                "different models",
                "(gptq)",
                "no packed checkpoint",
            ),
            strict=True,
        )
    ]
    results = run([job(model, options) for model, options, _ in cases])
    for (model, options, sentence), result in zip(cases, results, strict=True):
        assert sentence in result.get("error", "it ran"), (model, options, result.get("error"))
