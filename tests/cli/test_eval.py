import json
import math

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import endor
from endor.bench.quality.evaluate import bits_per_weight, evaluate, load, read_text, shipped_text
from endor.cli.eval import eval_command
from endor.errors import CheckpointError, ConfigError

TEXT = "It is a truth — universally acknowledged. " * 6
WINDOWS = ["--window", "32", "--max-windows", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny dense checkpoint with a byte-level tokenizer, and two packings of it."""
    root = tmp_path_factory.mktemp("eval")
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: place for place, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    endor.pack_checkpoint(root / "dense", root / "lossless")
    endor.pack_checkpoint(root / "dense", root / "half", prune="magnitude")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def run(models, *arguments):
    options = ["--text", str(models / "text.txt"), *WINDOWS]
    result = CliRunner().invoke(
        eval_command, [*options, *map(str, arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_lossless_packing_changes_no_bit_of_the_scores(models):
    lines = run(
        models, models / "lossless", models / "half", "--against", models / "dense", "--json"
    ).splitlines()
    lossless, half = (json.loads(line) for line in lines)

    assert (lossless["kl"], lossless["top1"], lossless["nll_difference"]) == (0.0, 1.0, 0.0)
    assert lossless["perplexity"] == lossless["reference_perplexity"]
    assert half["kl"] > 0
    assert half["reference_perplexity"] == lossless["perplexity"]


def test_json_is_one_object_with_the_conventions_in_it(models):
    found = json.loads(run(models, models / "dense", "--json"))

    assert found["model"] == str(models / "dense")
    assert (found["window"], found["stride"], found["windows"]) == (32, 32, 2)
    assert (found["tokens"], found["bos"], found["dtype"]) == (62, False, "bfloat16")
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    # One byte is one token here, and each window's first is not scored.
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2))
    assert "kl" not in found


def test_json_has_null_where_a_figure_is_undefined(models):
    text = run(models, models / "dense", "--json", "--window", "400")
    assert json.loads(text)["nll_stderr"] is None


def test_the_table_has_a_row_for_each_model(models):
    out = run(models, models / "dense", models / "half", "--against", models / "dense")
    lines = out.splitlines()

    assert lines[0] == "text.txt: 62 tokens scored in 2 windows of 32, no overlap"
    assert lines[2].split()[:3] == ["bits/weight", "perplexity", "nats/token"]
    dense, half = lines[4].split(), lines[5].split()
    assert (dense[0], dense[1], half[0]) == ("dense", "16.00", "half")
    assert "100.0%" in dense
    assert "100.0%" not in half
    assert "against dense, perplexity" in out


def test_stride_and_bos_are_stated(models):
    first = run(models, models / "dense", "--stride", "16", "--bos").splitlines()[0]
    assert first.endswith("stride 16, each after the beginning-of-sequence token")


def test_dtype_chooses_the_precision_of_both_kinds(models):
    for name in ("dense", "lossless"):
        found = json.loads(run(models, models / name, "--json", "--dtype", "float32"))
        assert found["dtype"] == "float32"


def test_the_plot_is_a_png(models, tmp_path):
    path = tmp_path / "plot.png"
    run(models, models / "dense", models / "half", "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bits_per_weight_count_the_packed_matrices(models):
    half = endor.inspect_checkpoint(models / "half").sizes.bits_per_weight
    assert bits_per_weight(models / "dense") == 16.0
    assert bits_per_weight(models / "half") == half


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "nothing")


def test_a_missing_tokenizer_is_named(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "dense")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="tokenizer must lie beside the weights"):
        evaluate(tmp_path / "bare", TEXT)


def test_ram_needs_a_packed_checkpoint(models):
    with pytest.raises(ConfigError, match="need a packed one"):
        load(models / "dense", ram="1GiB")


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("né".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.txt: the text must be UTF-8; byte 0x"):
        read_text(path)


def test_the_shipped_text_is_the_novel():
    text = read_text(shipped_text())
    assert text.startswith("Persuasion\n\nby\n\nJane Austen")
    assert len(text) > 250_000
