"""sentence-transformers opens a packed folder: its modules beside the weights are carried whole."""

import warnings

import pytest
import torch
import transformers

import endor

from .conftest import least

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["w4 w5 w6 w7", "w9", "w100 w3 w3"]
OPTIONS = {"device": "cpu", "model_kwargs": {"dtype": "auto"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT with pooling and a dense layer; packed, and unpacked again."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    root = tmp_path_factory.mktemp("sentences")
    words = Tokenizer(kinds.WordLevel({f"w{at}": at for at in range(211)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=211,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    transformers.BertModel(config).to(torch.bfloat16).save_pretrained(root / "bert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", cls_token="w1", sep_token="w2"
    ).save_pretrained(root / "bert")
    first = models.Transformer(str(root / "bert"), model_kwargs={"dtype": "auto"})
    SentenceTransformer(modules=[first, models.Pooling(64), models.Dense(64, 32)]).save(
        str(root / "dense")
    )
    endor.pack_checkpoint(root / "dense", root / "packed", threads=1)
    endor.unpack_checkpoint(root / "packed", root / "back")
    return root


def names(path):
    return {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}


def test_the_folder_is_whole(folders):
    assert names(folders / "back") == names(folders / "dense")
    beside = {name for name in names(folders / "dense") if name != "model.safetensors"}
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"} <= beside
    for name in beside - {"config.json"}:
        assert (folders / "packed" / name).read_bytes() == (folders / "dense" / name).read_bytes()


def test_embeddings_are_the_dense_ones(folders):
    dense = SentenceTransformer(str(folders / "dense"), **OPTIONS)
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()  # products depend on alignment below 16 bytes
    wanted = dense.encode(TEXTS, convert_to_tensor=True)
    packed = SentenceTransformer(str(folders / "packed"), **OPTIONS)
    model = packed[0].auto_model
    assert len(model.endor.weights) == 12
    found = packed.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    budget = endor.hf.EndorConfig(ram=least(model))
    streamed = SentenceTransformer(
        str(folders / "packed"),
        device="cpu",
        model_kwargs={"dtype": "auto", "quantization_config": budget},
    )
    assert streamed[0].auto_model.endor_plan.count("disk")
    found = streamed.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
