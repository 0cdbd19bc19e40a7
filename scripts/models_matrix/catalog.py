"""What there is to try: every class in transformers' mappings, under the first task that has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classify": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
"""The mapping of each task, the most telling first."""

GENERATES = ("causal", "image-text", "seq2seq", "speech")


QUICK = (
    *(
        "causal/" + name
        for name in (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "MixtralForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Phi3ForCausalLM",
            "GPT2LMHeadModel",
            "GPTNeoXForCausalLM",
            "OPTForCausalLM",
            "FalconForCausalLM",
            "BloomForCausalLM",
            "DeepseekV3ForCausalLM",
            "GptOssForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "Mamba2ForCausalLM",
            "JambaForCausalLM",
            "Qwen3NextForCausalLM",
            "SmolLM3ForCausalLM",
            "StableLmForCausalLM",
            "Olmo2ForCausalLM",
        )
    ),
    *(
        "image-text/" + name
        for name in (
            "LlavaForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
            "Idefics3ForConditionalGeneration",
        )
    ),
    "causal/Gemma3ForConditionalGeneration",
    # Kinds of weights that reach their parameters by more than a new name.
    "causal/Zamba2ForCausalLM",
    "causal/LongcatFlashForCausalLM",
    "causal/Gemma3nForCausalLM",
    "masked/NomicBertForMaskedLM",
    "image-text/Qwen3VLMoeForConditionalGeneration",
    "seq2seq/T5ForConditionalGeneration",
    "seq2seq/BartForConditionalGeneration",
    "speech/WhisperForConditionalGeneration",
    "masked/BertForMaskedLM",
    "masked/ModernBertForMaskedLM",
    "masked/XLMRobertaForMaskedLM",
    "classify/LlamaForSequenceClassification",
    "base/BertModel",
    "base/ViTModel",
    "base/CLIPModel",
)
"""Popular ones, tried by `make test`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the matrix.

    Attributes:
        task: A key of `TASKS`.
        model_type: As in config.json.
        class_name: Of transformers.
    """

    task: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.class_name}"


def entries() -> list[Entry]:
    """Return every row, in a fixed order; each class once."""
    import transformers.models.auto.modeling_auto as auto

    out: dict[str, Entry] = {}
    for task, table in TASKS.items():
        names: Mapping[str, Any] = getattr(auto, table, {})
        for model_type, found in sorted(names.items()):
            for class_name in found if isinstance(found, tuple | list) else (found,):
                out.setdefault(class_name, Entry(task, model_type, class_name))
    return list(out.values())
