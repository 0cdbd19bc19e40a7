"""From texts to windows: exact ids, the first or some, rows of each kind."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from endor.errors import CheckpointError, ConfigError
from endor.pruning import PruneOptions
from endor.pruning.calibration import (
    SHIPPED,
    calibration_windows,
    read_documents,
    shipped_texts,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory, save):
    directory = tmp_path_factory.mktemp("model")
    save(directory, "llama")
    return directory


def windows(model, *paths, **fields):
    return calibration_windows(model, PruneOptions(calibration=paths, **fields))


@pytest.fixture
def second(tmp_path):
    """A text of some 23 windows of 16 tokens, shorter than `text`, without its letters."""
    path = tmp_path / "second.txt"
    path.write_text("0123456789" * 37)
    return path


def test_windows_are_consecutive_and_hold_nothing_but_the_text(model, text):
    found = windows(model, text, samples=5, seq_len=16)
    assert found.dtype == torch.int64
    assert tuple(found.shape) == (5, 16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(found.flatten()) == text.read_text()[:80]


def test_a_seed_chooses_windows_and_keeps_their_order(model, text):
    whole = windows(model, text, samples=1000, seq_len=16)
    first, again = (windows(model, text, samples=9, seq_len=16, seed=7) for _ in range(2))
    assert torch.equal(first, again)
    places = [next(i for i, row in enumerate(whole) if torch.equal(row, one)) for one in first]
    assert places == sorted(places)
    assert places != list(range(9))
    assert not torch.equal(first, windows(model, text, samples=9, seq_len=16, seed=8))


def test_each_window_begins_with_bos_iff_the_tokenizer_adds_it(model, text, tmp_path, save):
    from tokenizers.processors import TemplateProcessing

    save(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    found = windows(tmp_path, text, samples=3, seq_len=16)
    assert found[:, 0].tolist() == [0, 0, 0]
    assert 0 not in found[:, 1:]
    plain = windows(model, text, samples=3, seq_len=15)
    assert torch.equal(found[:, 1:], plain)


def test_every_kind_of_row_is_read(chats, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = read_documents(chats, tokenizer, chat_template=False)
    assert found == ["a plain string", "a text field", "a content field", "hi\nyo"]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rendered = read_documents(chats, tokenizer, chat_template=True)
    assert rendered[3] == "[user]hi[assistant]yo"


def test_rows_are_separated_by_the_end_token(model, chats):
    found = windows(model, chats, samples=1, seq_len=16)
    assert found[0, len("a plain string")] == 1


def test_a_chat_template_that_is_missing_is_refused(model, chats):
    with pytest.raises(ConfigError, match="chat template"):
        windows(model, chats, samples=1, seq_len=16, chat_template=True)


@pytest.mark.parametrize("line", ["{", "3", '{"other": "x"}'])
def test_a_bad_row_is_named(line, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'"good"\n{line}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: must be"):
        windows(model, tmp_path / "rows.jsonl")


def test_an_empty_text_is_refused(model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        windows(model, tmp_path / "empty.txt")


def test_a_model_without_tokenizer_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match="tokenizer"):
        windows(tmp_path, text)
    with pytest.raises(CheckpointError, match="tokenizer"):
        windows(None, text)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("samples", [1, 8, 9])
def test_texts_take_turns(model, text, second, samples, seed):
    alone = [windows(model, path, samples=1000, seq_len=16).tolist() for path in (text, second)]
    found = windows(model, text, second, samples=samples, seq_len=16, seed=seed).tolist()
    assert len(found) == samples
    for k, whole in enumerate(alone):
        mine = found[k::2]
        assert all(one in whole for one in mine)
        if seed == 0:
            assert mine == whole[: len(mine)]
    again = windows(model, text, second, samples=samples, seq_len=16, seed=seed).tolist()
    assert found == again


@pytest.mark.parametrize("seed", [0, 5])
def test_a_text_that_ends_leaves_its_turns_to_the_others(model, text, second, seed):
    alone = windows(model, second, samples=1000, seq_len=16).tolist()
    found = windows(model, text, second, samples=100, seq_len=16, seed=seed).tolist()
    assert len(found) == 100
    assert len(alone) == 23
    assert [one for one in found if one in alone] == alone
    assert found[1] == alone[0]


def test_a_text_too_short_among_others_is_named(model, text, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match=r"short\.txt: 5 tokens do not fill"):
        windows(model, text, tmp_path / "short.txt", seq_len=16)


def test_the_shipped_texts_are_the_default_in_equal_shares(model):
    names = list(SHIPPED)
    assert names == ["wiki", "austen", "python", "web"]
    mixed = calibration_windows(model, shipped("mix", 12))
    for turn, name in enumerate(names):
        assert torch.equal(mixed[turn::4], calibration_windows(model, shipped(name, 3)))
    assert torch.equal(mixed, calibration_windows(model, PruneOptions(samples=12, seq_len=64)))


def shipped(name, samples):
    return PruneOptions(calibration=shipped_texts(name), samples=samples, seq_len=64)


def test_a_name_that_is_no_shipped_text_is_refused():
    with pytest.raises(ConfigError, match="one of wiki, austen, python, web, mix, got 'latin'"):
        shipped_texts("latin")
    with pytest.raises(ConfigError, match="tuple of paths"):
        PruneOptions(calibration=shipped_texts("wiki")[0])


def test_the_shipped_texts_and_their_origin_come_with_the_package():
    texts = shipped_texts()
    assert all(len(path.read_text()) > 280_000 for path in texts)
    folder = texts[0].parent
    origin = (folder / "ORIGIN.md").read_text()
    assert "CC BY-SA" in origin
    assert all(path.name in origin for path in texts)
    assert (folder / "wiki_calib.sources.tsv").read_text().count("wikipedia.org") >= 60
    sources = (folder / "web_prose.sources.tsv").read_text().splitlines()
    prose = (folder / "web_prose.txt").read_text()
    assert len(sources) >= 80
    assert all(line.split("\t")[2] in prose for line in sources)
    licence = (folder / "python_manual.LICENSE.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licence


def test_calibration_and_evaluation_share_no_ten_words():
    from endor.bench.quality.evaluate import shipped_text

    def runs(path):
        words = re.findall(r"[a-z0-9']+", path.read_text().lower())
        return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}

    seen = runs(shipped_text())
    assert len(seen) > 40_000
    for path in shipped_texts():
        found = runs(path)
        assert seen.isdisjoint(found), path
        seen |= found
