"""A tiny packed model that has words and a chat template."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import endor


def pack_talker(root: Path) -> Path:
    """Write a model of the words w0 to w99 to `root/source`; return its packed twin."""
    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w8{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    endor.pack_checkpoint(root / "source", root / "packed", prune="magnitude", threads=1)
    return root / "packed"
