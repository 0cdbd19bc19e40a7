"""From texts to windows: exact ids, the first or some, rows of each kind."""

import pytest
import torch
from transformers import AutoTokenizer

from endor.errors import CheckpointError, ConfigError
from endor.pruning import PruneOptions
from endor.pruning.calibration import calibration_windows, read_documents, shipped_text


@pytest.fixture(scope="module")
def model(tmp_path_factory, save):
    directory = tmp_path_factory.mktemp("model")
    save(directory, "llama")
    return directory


def windows(model, path, **fields):
    return calibration_windows(model, PruneOptions(calibration=path, **fields))


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


def test_the_shipped_text_and_its_origin_come_with_the_package():
    assert len(shipped_text().read_text()) > 200_000
    folder = shipped_text().parent
    assert "CC BY-SA" in (folder / "ORIGIN.md").read_text()
    assert (folder / "wiki_calib.sources.tsv").read_text().count("wikipedia.org") >= 60
