"""A tiny config of any architecture: its default one, shrunk by what the members are called.

A config is read as plain data, sub-configs and all. Widths, counts and token ids get small values
by rules over the words of their names, so that what must agree (heads times head size, a vision
tower's output and the text's width) still does. `PATCHES` holds what no rule finds.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCAB, IMAGE, PATCH = 64, 4, 2, 16, 128, 320, 32, 8
MOST_LAYERS = 4
POSITIONS = 512

_LAYERS = re.compile(
    r"(num|n)_(\w+_)?(layers?|blocks|hidden_layers)|(\w+_)?layers_num|depth|\w+_depth|n_layer"
    r"|(encoder|decoder|text|vision|\w+)_layers|layers|num_hidden_layers"
)
_NOT_LAYERS = re.compile(
    r"num_feature_levels|.*(predict|conv|dense|mlp|shared|kv|hash|mtp|nextn|hc_)\w*_layers?|"
    r"num_(kv_shared|conv_pos|feat_extract|mem|adapter)\w*"
)
_RULES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size|vocab_size_\w+", VOCAB),
    (
        r"num_key_value_heads|(\w+_)?num_kv_heads|n_kv_heads|num_key_value_groups|multi_query_group_num"
        r"|num_global_key_value_heads|num_query_groups",
        KV_HEADS,
    ),
    (r"linear_num_value_heads|linear_num_key_heads", HEADS),
    (
        r"(mamba|ssm|lightning|linear)_(n|num)_heads|mamba_num_heads|mamba_n_heads",
        2 * WIDTH // HEAD,
    ),
    (r"(\w+_)?(num|n)_(\w+_)?heads?|n_head|(\w+_)?attention_heads|num_attn_heads", HEADS),
    (r"rotary_dim|qk_pos_emb_head_dim", HEAD // 2),
    (r"qk_head_dim|index_head_dim|indexer_head_dim", 2 * HEAD),
    (
        r"(\w+_)?head_dim|d_kv|mamba_d_head|(\w+_)?(head_size|key_dim|value_dim|kv_channels)|d_head|"
        r"attention_(key|value)_(size|length)|key_length|v_channels",
        HEAD,
    ),
    (r"(\w+_)?lora_rank|(\w+_)?rank|dt_rank|mamba_dt_rank|time_step_rank|lora_dim|o_lora_rank", 16),
    (
        r"(\w*_)?(moe|expert|shared_expert)\w*_(intermediate_size|ffn_hidden_size|dim)|moe_\w+_size|"
        r"expert_ffn_hidden_size",
        WIDTH,
    ),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|inner_dim|feed_forward_size|"
        r"intermediate_dim|ff_dim|intermediate_ff|feedforward_dim|feed_forward_dim|ffn_size|"
        r"dim_feedforward|d_inner_ff|pffn)|d_ff|n_inner|d_inner|inner_size|feed_forward_proj_dim",
        INNER,
    ),
    (
        r"(num|n)_(\w*)experts_per_(tok|token)|(\w+_)?top_?k(_experts)?|moe_k|num_selected_experts|"
        r"moe_topk|num_experts_per_topk|expert_top_k|k_experts|num_experts_per_token",
        2,
    ),
    (r"(num|n|moe_num)_shared_experts", 1),
    (
        r"(num|n)_(\w+_)?experts|moe_num_experts|num_local_experts|n_routed_experts|zero_expert_num",
        4,
    ),
    (r"n_group|topk_group|num_expert_group|num_limited_groups", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|first_dense_layers", 1),
    (r"(num|n)_(nextn_predict|mtp|kv_shared)\w*layers?|num_mtp_modules|mtp_num_layers", 0),
    (r"(state_size|ssm_state_size|(mamba_)?d_state|mamba_state_dim|ssm_d_state)", 16),
    (r"(mamba_)?(n_groups|num_groups|ngroups|ssm_num_groups)", 1),
    (r"(\w+_)?chunk_size|\w*chunk_length|attention_chunk_size|block_size", 8),
    (r"(\w+_)?(sliding_window|window|window_size|local_attention|attention_window_size)", 8),
    (r"(image|img)_size|input_size|crop_size|size", IMAGE),
    (r"(\w+_)?patch_size", PATCH),
    (
        r"(\w+_)?(max_position_embeddings|n_positions|max_sequence_length|max_seq_len|n_ctx|"
        r"max_source_positions|max_target_positions|context_length|max_length|seq_length|"
        r"position_embedding_size|max_seq_length|max_bin_positions)",
        POSITIONS,
    ),
    (
        r"(\w+_)?num_(image_tokens|queries|query_tokens|latents)|num_image_tokens|(image|mm)_seq_length|"
        r"num_img_patches|image_seq_len|resampler_n_latents|mm_tokens_per_image",
        4,
    ),
    (r"num_mel_bins|feature_size|input_feat_per_channel|n_mels", 16),
    (r"conv_depthwise_kernel_size|(\w+_)?conv_bias_kernel", 7),
    (r"num_conv_pos_embeddings", 16),
    (r"num_codevectors_per_group|codebook_size|num_embeddings", 32),
    (
        r"(\w+_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim|"
        r"projection_dim|proj_dim|embed_proj_dim|output_dim|out_hidden_size|model_dim|width|dim|"
        r"hidden_channels|encoder_dim|decoder_dim|proj_size|output_size|channels_dim|"
        r"hidden_size_per_layer_input|bottleneck_dim|project_dim|hidden_sizes_out|lru_width|n_embed|"
        r"encoder_hidden|latent_dim|d_latents|d_embed|embd_pdim|attention_hidden_size|embed_size|"
        r"rnn_hidden_size|num_hidden|hidden|hidden_units|features|in_dim|out_dim|in_features|"
        r"out_features|q_dim|kv_dim)",
        WIDTH,
    ),
)
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_TOKEN = re.compile(
    r"(\w+_)?(token_id|token_index|tok_id|token_ids)|\w+_token|"
    r"(pad|bos|eos|im_patch|image_patch|im_start|im_end|image_start|image_end|audio)_id"
)
_FIXED_IDS = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "decoder_start": 1,
    "sep": 3,
    "cls": 4,
    "mask": 5,
    "unk": 6,
    "forced_bos": None,
    "forced_eos": None,
}
_KEEP = {
    "num_labels",
    "num_channels",
    "in_channels",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_codebooks",
    "type_vocab_size",
    "original_max_position_embeddings",
    "num_experts_group",
    "projector_hidden_act",
    "scale_factor",
    "spatial_patch_size",
    "max_window_layers_",
    "hop_size",
}

_STAGES = {"out_features", "out_indices", "stage_names"}
"""What of a backbone's stages is handed on; counted anew by the config."""

PATCHES: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
    },
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
    },
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "chameleon": {"vocabulary_map": {"<image>": 240, "IMGIMGA": 100}},
    "emu3": {"vocabulary_map": {"<image>": 240}},
}
"""Members of architectures, by model type and dotted path, that no rule finds."""


ATTEMPTS = 3


def tiny(config_class: Any, *, attempt: int = 0) -> Any:
    """Return a small config of a class.

    Args:
        config_class: Of transformers.
        attempt: 1 also replaces what says how positions are rotated by the plainest that there is;
            2 also fills members that a real config has and the default one leaves open, and scales
            large numbers that no rule knows.
    """
    values = config_class().to_dict()
    small = _shrink(values, _Ids(), attempt)
    for path, value in PATCHES.get(values.get("model_type", ""), {}).items():
        _set(small, path.split("."), value)
    for key in (
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
    ):
        small.pop(key, None)
    return config_class(**small)


class _Ids:
    """Token ids below the vocabulary, the same for the same name wherever it stands."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def of(self, key: str) -> int | None:
        stem = re.sub(r"_?(token)?_?(id|ids|index|idx)$", "", key)
        if stem in _FIXED_IDS:
            return _FIXED_IDS[stem]
        return self._taken.setdefault(stem, VOCAB - 16 - len(self._taken))


def _shrink(values: Mapping[str, Any], ids: _Ids, attempt: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    counts = {
        key: value
        for key, value in values.items()
        if _is_count(value) and _LAYERS.fullmatch(key) and not _NOT_LAYERS.fullmatch(key)
    }
    kept = {count: _kept_layers(values, count) for count in set(counts.values())}
    main = counts.get("num_hidden_layers", max(counts.values(), default=2))
    for key, value in values.items():
        if key in _STAGES:
            continue
        if _is_by_layer(value):
            out[key] = {
                new: _shrink(value.get(old, value.get(str(old))), ids, attempt)
                for new, old in enumerate(kept.get(main, ()))
                if old in value or str(old) in value
            }
        elif key in counts:
            out[key] = len(kept[value])
        elif _is_per_layer(key, value, kept):
            out[key] = [value[at] for at in kept[len(value)]]
            if all(_is_count(item) for item in value):
                out[key] = [_value(key.removesuffix("s"), item, attempt) for item in out[key]]
        else:
            out[key] = _member(key, value, ids, attempt, len(kept.get(main, "12")))
    if attempt == 2:
        out |= {key: small for key, small in _OPEN.items() if key in out and out[key] is None}
    heads = values.get("num_attention_heads")
    if heads is not None and values.get("num_key_value_heads") == heads:
        out["num_key_value_heads"] = out["num_attention_heads"]
    parts: tuple[Any, Any] = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if all(_is_count(part) for part in parts):
        out |= {
            key: 2 * HEAD
            for key, value in values.items()
            if key.endswith("head_dim") and value == sum(parts) and key not in _PARTS
        }
    if (
        values.get("patch_size")
        and _is_count(values.get("window_size"))
        and values["window_size"] > 32
    ):
        out["window_size"] = 4 * PATCH
    if isinstance(out.get("rope_parameters"), dict):
        out["rope_parameters"] = _rope(out["rope_parameters"], attempt, out)
    return out


_PARTS = {"qk_rope_head_dim", "qk_nope_head_dim"}
_OPEN = {
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "intermediate_size": INNER,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "sliding_window": 8,
    "moe_topk": 2,
    "num_shared_expert": 1,
    "prediction_length": 4,
}
"""Members that default configs leave open."""


def _is_per_layer(key: str, value: Any, kept: Mapping[int, Any]) -> bool:
    """Whether a list has a member for each layer: long, or by its name."""
    if not isinstance(value, list) or len(value) not in kept or len(value) < 3:
        return False
    return len(value) > 4 or re.search("layer|types|pattern|block", key) is not None


def _kept_layers(values: Mapping[str, Any], count: int) -> list[int]:
    """Return which of `count` layers stay: one of each kind, two at least."""
    kinds = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    by_layer = [value for value in values.values() if _is_by_layer(value)]
    kinds += [[at in each or str(at) in each for at in range(count)] for each in by_layer]
    seen: dict[Any, int] = {}
    for at in range(count):
        seen.setdefault(tuple(str(kind[at]) for kind in kinds), at)
    kept = sorted(seen.values())[:MOST_LAYERS]
    return sorted({*kept, *[at for at in range(count) if at not in kept][: max(0, 2 - len(kept))]})


def _member(key: str, value: Any, ids: _Ids, attempt: int, layers: int) -> Any:
    if isinstance(value, Mapping):
        return _shrink(value, ids, attempt)
    if key in _KEEP or value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, list | tuple):
        if _TOKEN.fullmatch(key) and all(_is_count(item) for item in value):
            return (
                [
                    ids.of(key.removesuffix("s") + (str(at) if at else "")) or 2
                    for at in range(len(value))
                ]
                if value
                else value
            )
        if key.endswith(("indexes", "indices", "layers", "layer_ids", "feature_layer")) and all(
            isinstance(item, int) for item in value
        ):
            return sorted({max(min(item, layers - 1), -layers) for item in value})
        if key == "image_grid_pinpoints":
            return [[IMAGE, IMAGE]]
        return [
            _shrink(item, ids, attempt)
            if isinstance(item, Mapping)
            else _value(key.removesuffix("s"), item, attempt)
            for item in value
        ]
    if not isinstance(value, int):
        return value
    if _TOKEN.fullmatch(key):
        return ids.of(key) if value >= 0 else value
    return _value(key, value, attempt)


def _value(key: str, value: Any, attempt: int) -> Any:
    """Return the small value of a count."""
    if not _is_count(value) or key in _KEEP:
        return value
    for pattern, small in _COMPILED:
        if pattern.fullmatch(key):
            if small == HEADS and "head" in key:
                return small if value > 2 else value
            return min(value, small)
    if _LAYERS.fullmatch(key) and not _NOT_LAYERS.fullmatch(key):
        return min(value, 2)
    if attempt == 2 and value > 256:
        return WIDTH
    return value


def _is_by_layer(value: Any) -> bool:
    """Whether it is a table of members by number of layer."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(str(key).isdigit() and isinstance(item, Mapping) for key, item in value.items())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rope(rope: dict[str, Any], attempt: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters for small heads."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {
            key: _rope(value, attempt, config) if isinstance(value, dict) else value
            for key, value in rope.items()
        }
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    half = int(HEAD * factor) // 2
    section = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    if attempt:
        kept: dict[str, Any] = {
            key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
        }
        return {"rope_theta": 10000.0, **kept, "rope_type": "default", "mrope_section": section}
    if isinstance(rope.get("mrope_section"), list) and len(rope["mrope_section"]) == 3:
        rope["mrope_section"] = section
    for name in ("long_factor", "short_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = [1.0] * half
    return rope


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def sub_configs(config: Any) -> Iterator[Any]:
    """Yield a config and those in it."""
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from sub_configs(inner)
