"""What members of a config are made small, by the words of their names."""

import re
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCAB, IMAGE, PATCH = 64, 4, 2, 16, 128, 320, 32, 8
MOST_LAYERS = 4
POSITIONS = 512

LAYERS = re.compile(
    r"(num|n)_(\w+_)?(layers?|blocks|hidden_layers)|(\w+_)?layers_num|depth|\w+_depth|n_layer"
    r"|(encoder|decoder|text|vision|\w+)_layers|layers|num_hidden_layers"
)
NOT_LAYERS = re.compile(
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
RULES = [(re.compile(pattern), value) for pattern, value in _RULES]
TOKEN = re.compile(
    r"(\w+_)?(token_id|token_index|tok_id|token_ids)|\w+_token|"
    r"(pad|bos|eos|im_patch|image_patch|im_start|im_end|image_start|image_end|audio)_id"
)
FIXED_IDS = {
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
KEEP = {
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

STAGES = {"out_features", "out_indices", "stage_names"}
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


PARTS = {"qk_rope_head_dim", "qk_nope_head_dim"}
OPEN = {
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
