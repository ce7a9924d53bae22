"""The settings of every model in the zoo, as plain data: config class names and their arguments."""

from __future__ import annotations

from typing import Any

VOCAB, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 128, 32, 48, 4, 2, 12
PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT, LAST_TEXT = 3, 110  # ids a text input may hold; the special ids below stay free
AUDIO_START, AUDIO, AUDIO_END = 120, 121, 122
VISION_START, IMAGE, VISION_END, VIDEO = 123, 124, 125, 126

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_FREE_HEADS: dict[str, Any] = {**_TEXT, "head_dim": HEAD_DIM}  # head_dim differs from hidden_size / heads
_GEMMA: dict[str, Any] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": HEAD_DIM,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": WIDTH,
}
_QWEN25_VISION: dict[str, Any] = {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
_QWEN3_VISION: dict[str, Any] = {
    **_QWEN_VISION,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_AUDIO: dict[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 20,
}


def _mrope(*sections: int) -> dict[str, Any]:
    """Multimodal rotary settings: how many frequencies go to time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


TEXT_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _FREE_HEADS),
    "qwen2": ("Qwen2Config", _TEXT),
    "qwen3": ("Qwen3Config", _FREE_HEADS),
    "gemma2": ("Gemma2Config", {**_FREE_HEADS, **_GEMMA}),
    "gemma3_text": ("Gemma3TextConfig", {**_FREE_HEADS, **_GEMMA}),
    "mistral": ("MistralConfig", {**_FREE_HEADS, "sliding_window": 5}),
    "phi3": ("Phi3Config", _TEXT),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_inner": INNER,
            "n_layer": 4,
            "n_head": HEADS,
            "n_positions": 256,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_TEXT, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_TEXT, "use_parallel_residual": False}),
    "olmo": ("OlmoConfig", _TEXT),
    "olmo2": ("Olmo2Config", _TEXT),
    "mixtral": ("MixtralConfig", {**_FREE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_FREE_HEADS, **_EXPERTS}),
}

_IDS_BY_INDEX = {"audio_token_index": AUDIO, "image_token_index": IMAGE, "video_token_index": VIDEO}
_IDS_BY_NAME = {"audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": VIDEO}
_MARKS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_AUDIO_MARKS = {"audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END}

MULTIMODAL_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_5_omni": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerConfig",
        {
            "text_config": {**_TEXT, **_mrope(2, 1, 1), "tie_word_embeddings": False},
            "vision_config": _QWEN25_VISION,
            "audio_config": {**_AUDIO, "n_window": 20, "output_dim": WIDTH},
            **_IDS_BY_INDEX,
            **_MARKS,
            **_AUDIO_MARKS,
        },
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerConfig",
        {
            "text_config": {**_FREE_HEADS, **_EXPERTS, **_mrope(2, 2, 2)},
            "vision_config": _QWEN3_VISION,
            "audio_config": {**_AUDIO, "output_dim": WIDTH, "downsample_hidden_size": 8},
            **_IDS_BY_NAME,
            **_MARKS,
            **_AUDIO_MARKS,
        },
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_config": {**_AUDIO, "model_type": "qwen2_audio_encoder"},
            "audio_token_index": AUDIO,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_TEXT, **_mrope(2, 1, 1)},
            "vision_config": _QWEN25_VISION,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            **_MARKS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {**_FREE_HEADS, **_mrope(2, 2, 2)},
            "vision_config": _QWEN3_VISION,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            **_MARKS,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_FREE_HEADS, "model_type": "llama"},
            "vision_config": {**_VISION, "projection_dim": 16, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "vision_config": {**_VISION, "vision_use_head": False, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8]],
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_FREE_HEADS, **_GEMMA},
            "vision_config": {**_VISION, "image_size": 16, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "text_config": {**_FREE_HEADS, "model_type": "llama"},
            "vision_config": {**_VISION, "image_size": 16},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {
            "text_config": {**_FREE_HEADS, "model_type": "llama"},
            "vision_config": {**_VISION, "image_size": 16},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
    ),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        "Phi4MultimodalConfig",
        {
            **_TEXT,
            "vision_config": {**_VISION, "image_size": 16, "crop_size": 16, "image_token_id": IMAGE},
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "input_size": 8,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 8,
                "bias_max_distance": 16,
                "audio_token_id": AUDIO,
            },
        },
    ),
    "voxtral": (
        "VoxtralForConditionalGeneration",
        "VoxtralConfig",
        {
            "text_config": {**_FREE_HEADS, "model_type": "llama"},
            "audio_config": {
                "model_type": "voxtral_encoder",
                "num_mel_bins": 8,
                "hidden_size": 16,
                "intermediate_size": 64,  # the projector joins 4 frames, so this must be 4 * hidden_size
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_source_positions": 20,
            },
            "audio_token_id": AUDIO,
        },
    ),
    "minicpmv4_6": (
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_6Config",
        {
            "text_config": {
                **_FREE_HEADS,
                **_mrope(1, 1, 1),
                "model_type": "qwen3_5_text",
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            "vision_config": {**_VISION, "image_size": 32},
            "insert_layer_id": 0,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
    ),
    "audioflamingo3": (
        "AudioFlamingo3ForConditionalGeneration",
        "AudioFlamingo3Config",
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_config": {
                "model_type": "audioflamingo3_encoder",
                "num_mel_bins": 8,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "max_source_positions": 20,
            },
            "audio_token_id": AUDIO,
        },
    ),
    "gemma3n": (
        "Gemma3nForConditionalGeneration",
        "Gemma3nConfig",
        {
            "text_config": {
                **_FREE_HEADS,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 8,
                "altup_num_inputs": 3,
                "num_kv_shared_layers": 1,
                "laurel_rank": 4,
                "activation_sparsity_pattern": [0.0] * 4,
            },
            "vision_config": {"hidden_size": 16, "vocab_size": 4, "vocab_offset": 120},
            "audio_config": {
                "vocab_size": 4,
                "vocab_offset": VOCAB - 4,  # the last ids, as in the real model: the very last pads short clips
                "input_feat_size": 8,
                "hidden_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 2,
                "sscp_conv_channel_size": [4, 4],
            },
            "audio_soft_tokens_per_image": 4,
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "boa_token_id": AUDIO_START,
            "eoa_token_id": AUDIO_END,
            "boi_token_id": VISION_START,
            "eoi_token_id": VISION_END,
        },
    ),
}
