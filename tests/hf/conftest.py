"""Small random models, packed, and what the dense model of the same weights says."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import endor
from endor.errors import BudgetError
from endor.planning import Placement

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA_LIKE = {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.2}


def config_of(kind: str, **changes: Any) -> Any:
    """Return the config of a tiny model of an architecture."""
    sizes = SIZES | changes
    match kind:
        case "llama":
            return transformers.LlamaConfig(**{**LLAMA_LIKE, **sizes})
        case "mixtral":
            return transformers.MixtralConfig(
                **{**LLAMA_LIKE, "num_local_experts": 6, "num_experts_per_tok": 2, **sizes}
            )
        case "qwen2_moe":
            return transformers.Qwen2MoeConfig(
                **{
                    **LLAMA_LIKE,
                    "moe_intermediate_size": 64,
                    "shared_expert_intermediate_size": 80,
                    "num_experts": 5,
                    "num_experts_per_tok": 2,
                    "decoder_sparse_step": 2,
                    **sizes,
                }
            )
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **{
                    **LLAMA_LIKE,
                    "moe_intermediate_size": 64,
                    "num_experts": 5,
                    "num_experts_per_tok": 2,
                    "head_dim": 16,
                    **sizes,
                }
            )
        case "opt":
            return transformers.OPTConfig(
                **{"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, **sizes}
            )
        case "gemma2":
            return transformers.Gemma2Config(**{**LLAMA_LIKE, "head_dim": 16, **sizes})
        case "mistral":
            return transformers.MistralConfig(**{**LLAMA_LIKE, "head_dim": 16, **sizes})
        case "gpt2":
            return transformers.GPT2Config(**{"initializer_range": 0.2, **sizes})
    raise ValueError(kind)


@dataclass(frozen=True)
class Pair:
    """A packed checkpoint and the dense model with the same weights."""

    packed: Path
    dense_dir: Path
    dense: Any

    def logits(self, model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(prompt() if ids is None else ids).logits
        return out

    def check(self, model: Any) -> None:
        """Assert that `model` gives the dense model's bits."""
        expected = self.logits(self.dense)
        assert torch.equal(self.logits(model), expected)
        assert torch.equal(self.logits(model), expected)  # the second pass runs prefetched


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 211, (batch, length), generator=generator)


def least(model: Any) -> int:
    """Return the smallest budget that loads a model again, as the refusal of less names it."""
    text = ""
    try:
        endor.load_model(model.endor.layouts[0].path.parent, ram=1)
    except BudgetError as error:  # kept any longer, its traceback would keep the model
        text = str(error)
    found = re.search(r"the ram budget must be at least .* \((\d+) bytes\)", text)
    assert found is not None, text
    return int(found[1])


def all_packed(model: Any) -> Placement:
    """Return the placement that keeps every unit of a model packed in memory."""
    return Placement(dict.fromkeys((unit.name for unit in model.endor.units), "resident"), 0)


@pytest.fixture(scope="session", autouse=True)
def _no_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Place weights by the typical constants, whatever was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


MakePair = Callable[..., Pair]


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Make (once per session and arguments) a pair by architecture, dtype and options."""
    made: dict[str, Pair] = {}

    def make(
        kind: str = "llama",
        dtype: torch.dtype = torch.bfloat16,
        *,
        prune: str | None = "magnitude",
        pack: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Pair:
        key = json.dumps([kind, str(dtype), prune, pack, changes], sort_keys=True, default=str)
        if key not in made:
            made[key] = build(kind, dtype, prune, pack or {}, changes)
        return made[key]

    def build(kind: str, dtype: torch.dtype, prune: Any, pack: Any, changes: Any) -> Pair:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config_of(kind, **changes), dtype=dtype, experts_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        source, packed, dense_dir = (folder / part for part in ("source", "packed", "dense"))
        model.save_pretrained(source)
        endor.pack_checkpoint(source, packed, prune=prune, threads=1, **pack)
        endor.unpack_checkpoint(packed, dense_dir)
        dense = AutoModelForCausalLM.from_pretrained(dense_dir, experts_implementation="eager")
        assert dense.dtype == dtype
        for parameter in dense.parameters():
            # torch's products depend on alignment below 16 bytes, which a mapped file may have.
            parameter.data = parameter.data.clone()
        return Pair(packed, dense_dir, dense)

    return make


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A tiny Llama in bfloat16, half of it pruned."""
    return make_pair()


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of the words `w0` to `w210`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(211)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1"
    )
