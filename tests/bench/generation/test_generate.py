"""The comparison runs every system on the same prompt, and says when one cannot run."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner

import endor
from endor.bench.generation import child
from endor.bench.generation import generate as bench
from endor.bench.generation.case import GenerateCase
from endor.bench.generation.generate import device_map, generate
from endor.bench.generation.plot import comparison
from endor.cli.bench_generate import generate_command, summary
from endor.cli.bench_hw import hw_command
from endor.errors import BackendError, ConfigError

MB = 10**6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny pruned model, packed and unpacked again."""
    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "source")
    endor.pack_checkpoint(root / "source", root / "packed", prune="magnitude")
    endor.unpack_checkpoint(root / "packed", root / "dense")
    return root / "packed", root / "dense"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    """Measure once per session, away from the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def case_of(pair, **changes):
    settings = {"ram_bytes": 60 * MB, "prompt_tokens": 4, "tokens": 3, "rounds": 1, "threads": 1}
    return GenerateCase(packed=pair[0], dense=pair[1], **(settings | changes))


@pytest.mark.slow
def test_every_system_gives_the_same_bits(pair, tmp_path):
    report = tmp_path / "report.html"
    case = case_of(pair, against=("dense", "accelerate-disk"), report=report, work=tmp_path)
    records = generate(case)
    by_name = {record.system: record for record in records}
    assert list(by_name)[:2] == ["endor", "endor-direct"]
    for name in ("endor", "dense", "accelerate-disk"):
        assert by_name[name].missing == ""
        assert by_name[name].decode_s > 0
        assert by_name[name].equal is True
    assert by_name["endor"].predicted_decode_s > 0
    assert "<svg" in report.read_text()
    text = summary(records)
    assert "bits equal" in text
    comparison(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(json.dumps(records[0].to_dict()))["page_cache"] == "cold"


def fake_child(monkeypatch, results):
    """Answer jobs from `results` by system name instead of starting processes."""
    jobs = []

    def run(system, *, last):
        jobs.append(system.job)
        result = results[system.name]
        if "error" in result:
            system.missing = result["error"]
        else:
            system.results.append(result)

    monkeypatch.setattr(bench, "_run", run)
    return jobs


def result(steps, tokens, logits="a"):
    return {
        "load_s": 1.0,
        "steps_s": steps,
        "cached_share": [0.0] * len(steps),
        "tokens": [tokens],
        "logits": logits,
        "device_read_bytes": 3000,
        "anonymous_peak_bytes": 5,
    }


def test_medians_ratios_and_equality(pair, monkeypatch):
    jobs = fake_child(
        monkeypatch,
        {
            "endor": result([9.0, 2.0, 4.0], [1, 2, 3]),
            "endor-direct": result([9.0, 1.0, 1.0], [1, 2, 3], "b"),
            "dense": result([9.0, 6.0, 6.0], [1, 2, 3]),
            "airllm": {"error": "no CPU"},
        },
    )
    records = generate(case_of(pair, against=("dense", "airllm"), rounds=2))
    ours, direct, dense, airllm = records
    assert (ours.decode_s, ours.prefill_s, ours.decode_p20) == (3.0, 9.0, 2.0)
    assert ours.rounds == 2
    assert ours.disk_bytes_per_step == 1000
    assert ours.equal is True
    assert dense.equal is True
    assert direct.equal is False
    assert direct.same_tokens is True
    assert airllm.missing == "no CPU"
    assert airllm.tokens_per_s == 0
    assert "airllm: not measured: no CPU" in summary(records)
    prompts = {tuple(job["prompt"]) for job in jobs}
    assert len(prompts) == 1
    assert jobs[0]["exact"]
    assert not jobs[1]["exact"]


def test_systems_take_turns(pair, monkeypatch):
    same = result([1.0, 1.0, 1.0], [1])
    jobs = fake_child(monkeypatch, {"endor": same, "dense": same})
    generate(case_of(pair, against=("dense",), fast=False, rounds=2))
    assert [job["name"] for job in jobs] == ["endor", "dense", "endor", "dense"]


def test_a_dense_model_beyond_the_budget_is_not_run(pair, monkeypatch):
    fake_child(monkeypatch, {"endor": result([1.0, 1.0, 1.0], [1])})
    size = sum(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    plan = bench.plan
    monkeypatch.setattr(bench, "plan", lambda *a, **k: plan(*a, **(k | {"ram_bytes": 60 * MB})))
    records = generate(case_of(pair, against=("dense",), fast=False, ram_bytes=size - 1))
    assert "exceed the budget" in records[1].missing


def test_a_failure_of_our_own_is_an_error():
    system = bench._System("endor", {"system": "endor"}, python="/bin/false")
    with pytest.raises(BackendError, match="endor failed: exit 1"):
        bench._run(system, last=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": ("vllm",)}, "unknown vllm"),
        ({"tokens": 1}, "tokens at least 2"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_bad_settings_are_refused(pair, changes, message):
    with pytest.raises(ConfigError, match=message):
        generate(case_of(pair, **changes))


def test_peers_need_a_dense_checkpoint(pair):
    with pytest.raises(ConfigError, match="needs --dense"):
        generate(GenerateCase(pair[0], None, 60 * MB, against=("dense",)))


def test_a_small_budget_sends_layers_to_disk(pair):
    assert set(device_map(pair[1], 100 * MB).values()) == {"cpu"}
    assert "disk" in device_map(pair[1], 100_000).values()


def test_the_clock_times_steps_and_leaves_a_cold_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        child.os.fsync(file.fileno())
    clock = child.Clock([path], cold=True)
    clock.start()
    for _ in range(2):
        path.read_bytes()
        assert not clock(torch.zeros(1, 3), None).any()
    assert len(clock.steps) == 2
    assert min(clock.steps) > 0
    assert max(clock.shares) == 0.0


def test_a_child_answers_with_its_error():
    found = child.answer({"system": "nothing"})
    assert found == {"error": "ConfigError: unknown system 'nothing'"}


def test_commands_explain_themselves(pair, tmp_path):
    ran = CliRunner().invoke(generate_command, [str(pair[0]), "--ram", "1KiB"])
    assert isinstance(ran.exception, endor.EndorError)
    ran = CliRunner().invoke(hw_command, ["--path", str(pair[0]), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["machine"]["linear_gbps"] > 0
    assert found["disk"]["read_gbps"] > 0
    table = CliRunner().invoke(hw_command, ["--path", str(pair[0])]).stdout
    assert "dense product at batch 1" in table
