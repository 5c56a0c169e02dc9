"""A small configuration of any model type of transformers: two layers, narrow, few words, small images."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig, TimmBackboneConfig

WIDTH, HEADS, HEAD_WIDTH, LAYERS, WORDS, PATCHES = 64, 4, 16, 2, 128, 4
_TOKENS = {"image": 100, "video": 101, "audio": 102}  # what stands for an image, a video, a sound in a text
_IMAGE = 64

_RULES: list[tuple[str, int]] = [
    (r"num_kv_shared_layers", 0),
    (r"num_queries|two_stage_num_proposals", 8),
    (r"mm_tokens_per_image", 4),
    (r"mamba_d_head", 2 * HEAD_WIDTH),
    (r"upsample_groups", WIDTH),
    (r"coordinate_size", 12),
    (r"shape_size", 8),
    (r"vocab_size|vocab_size_\w+|codebook_size|num_embeddings|num_hash_buckets|encoder_hash_byte_group_vocab", WORDS),
    (r"(num_|n_)?(\w+_)?(layers?|blocks|depth)|n_layers?_\w+|num_(hidden_)?layers_\w+", LAYERS),
    (r"(num_|n_)(\w+_)?(experts|expert_groups?)|(num|n)_\w+_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|num_selected_experts|moe_topk|top_k|top_k_experts|moe_k|num_activated_experts", 2),
    (r"n_group|topk_group|num_expert_group|topk_groups", 1),
    (r"rotary_dim|(\w+_)?head_dim|d_kv|kv_channels|d_head|(\w+_)?head_size|cross_head_dim|dim_head", HEAD_WIDTH),
    (r"\w*lora_rank", 32),
    (r"max_source_positions|max_speech_positions", 32),
    (r"max_(\w+_)?position_embeddings|max_\w*positions|n_positions|n_ctx|context_length|max_seq_len|mem_len", 512),
]
_WIDTHS = re.compile(
    r"\w*(hidden_size|intermediate_size|_dim|_dims|d_model|d_ff|n_embd|embed_dim|embedding_size|dff|dim_ff|d_inner|"
    r"units|_ffn_dim|hidden_dim|dim|inner_dim|proj_size|\w_size|channels|dim_feedforward|hidden_channels|conv_dim)"
)
_NOT_WIDTHS = re.compile(
    r"\w*(image_size|patch_size|window_size|kernel_size|crop_size|chunk_size|block_size|state_size|d_state|spec_size|"
    r"group_size|merge_size|pool_size|context_size|cache_size|box_size|img_size|resolution|bin_size|memory_size|"
    r"prompt_size|mel_bins|in_channels|num_channels|input_channels|image_channels|mask_size)"
)

_NEEDED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts": 4,
    "prediction_length": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "vocab_size": WORDS,
    "head_dim": HEAD_WIDTH,
    "image_token_id": _TOKENS["image"],
    "image_token_index": _TOKENS["image"],
    "moe_intermediate_size": WIDTH,
}
_FIXED: dict[str, Any] = {"attention_types": [[["global", "local"], 1]]}
# What follows from no name: kinds of layers where the default has none of attention, sizes that have to fit together.
_OWN: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"context_length": 8, "label_length": 4},
    "BambaConfig": {"attn_layer_indices": [1]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 100, "IMGIMGAZ": 5}},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"top_k_experts": 2},
    "Dots3NoteTextConfig": {"per_layer_config": {}},
    "Dots3NoteVisionConfig": {"per_layer_config": {}},
    "Emu3Config": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000000|>": 5}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "EsmConfig": {"pad_token_id": 1, "mask_token_id": 2},
    "FalconH1Config": {"mamba_d_ssm": 2 * WIDTH, "mamba_d_head": 2 * HEAD_WIDTH},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NemotronHConfig": {"n_groups": 2},
    "Pix2StructVisionConfig": {"patch_embed_hidden_size": 768},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 105},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 105},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": WIDTH},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_WIDTH, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "num_experts_per_tok": 2,
    },
    "Step3p7TextConfig": {"sliding_window": 8},
}  # fmt: skip


def tiny(config: PreTrainedConfig, narrow: bool = True, shallow: bool = True) -> PreTrainedConfig:
    """The small form of a configuration; with ``narrow=False`` it keeps its widths and heads."""
    plain = _default(type(config))
    narrow = narrow and not _pyramid(config)
    changed: dict[str, Any] = {}
    for name in _names(config):
        value = _value(config, name)
        own = inspect.getattr_static(type(config), name, None)
        if isinstance(own, property) and own.fset is None:
            continue
        if name in _FIXED:
            changed[name] = _FIXED[name]
            continue
        if value is None and name in _NEEDED:
            changed[name] = _NEEDED[name]
            continue
        if value is None:
            continue
        nested = isinstance(value, PreTrainedConfig)
        if plain is not None and not nested and _derived(type(config), name) and _same(value, _value(plain, name)):
            continue
        small = _small(name, value, config, narrow, shallow)
        if nested or not _same(small, value) or not _same(value, _value(plain, name)):
            changed[name] = small
    kinds = changed.get("layer_types") or _value(config, "layer_types")
    if shallow and isinstance(kinds, list) and "layer_types" in _names(config):
        changed |= _one_layer_of_each(config, list(dict.fromkeys(kinds)))
    rope = _value(config, "rope_parameters")
    if rope != {} and (
        "mrope_section" in getattr(type(config), "ignore_keys_at_rope_validation", ())
        or type(config).__name__.startswith("Qwen2VLText")
    ):
        changed["rope_parameters"] = _small_rope(
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
            | _partial(config)
            | dict(rope or {}),
            narrow,
        )
    changed |= dict(_special_tokens(config).items())
    changed |= _OWN.get(type(config).__name__, {}) if narrow and shallow else {}
    return _with_stages(type(config), changed, _value(config, "out_features"))


def _with_stages(kind: type[PreTrainedConfig], changed: dict[str, Any], stages: Any) -> PreTrainedConfig:
    """A backbone gives the features that it gave, if it has so many layers; others give the last."""
    if isinstance(stages, list) and len(stages) > 1:
        try:
            return kind(**changed | {"out_features": stages})
        except ValueError:
            pass
    return kind(**changed)


def _partial(config: PreTrainedConfig) -> dict[str, Any]:
    factor = _value(config, "partial_rotary_factor")
    return {} if factor is None else {"partial_rotary_factor": factor}


def _pyramid(config: PreTrainedConfig) -> bool:
    """Whether its stages have widths or heads of their own, which have to fit together."""
    return any(
        isinstance(value, (list, tuple))
        and len(value) > 1
        and re.search(r"heads|hidden_sizes|embed_dims?$|^dims?$|widths|channels$", name)
        for name, value in vars(config).items()
    )  # fmt: skip


def _value(config: PreTrainedConfig | None, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # what varies from layer to layer has no one value
        return vars(config).get(name)


def _default(kind: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return kind()
    except Exception:  # composites that cannot be made of nothing
        return None


def _names(config: PreTrainedConfig) -> list[str]:
    own = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    nested = [name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [name for name in dict.fromkeys(own + nested) if name not in base]


def _derived(kind: type[PreTrainedConfig], name: str) -> bool:
    field = next((field for field in dataclasses.fields(kind) if field.name == name), None)
    return field is not None and field.default is None and not name.endswith("config")


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) and type(a) is type(b)
    except Exception:
        return False


def _small(name: str, value: Any, config: PreTrainedConfig, narrow: bool, shallow: bool) -> Any:
    if isinstance(value, TimmBackboneConfig):
        return _backbone()
    if isinstance(value, PreTrainedConfig):
        return tiny(value, narrow, shallow)
    if isinstance(value, dict):
        return _small_rope(value, narrow)
    if isinstance(value, (list, tuple)):
        return _small_list(name, value, narrow, shallow)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return _small_number(name, value, config, narrow, shallow)


def _backbone() -> PreTrainedConfig:
    """A small convolutional network in the place of timm's, so that timm is not needed."""
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _small_number(name: str, value: int, config: PreTrainedConfig, narrow: bool, shallow: bool) -> int:
    if name in ("image_size", "img_size", "input_size", "pretrain_image_size", "spec_size") and value >= 64:
        if _pyramid(config) and hasattr(config, "window_size"):  # its windows have to fit at every stage
            return value
        patch = getattr(config, "patch_size", None)
        return min(value, patch * PATCHES) if isinstance(patch, int) and patch >= 8 else _IMAGE
    if re.fullmatch(
        r"(num_|n_)?(\w+_)?heads?|num_(\w+_)?(key_value|kv)_(heads|groups)|n_head_kv", name
    ) and not re.search("dim|d_head", name):
        if not narrow:
            return value
        queries = max(
            _value(config, other) or 0
            for other in ("num_attention_heads", "num_heads", "n_heads", "n_head")
            if not isinstance(_value(config, other), (list, tuple))
        )
        return min(value, 2 if value < queries else HEADS)
    for pattern, most in _RULES:
        if re.fullmatch(pattern, name):
            if most == LAYERS and not shallow:
                return min(value, 12)
            return value if not narrow and most in (HEAD_WIDTH, 32) and "position" not in name else min(value, most)
    if narrow and re.fullmatch(_WIDTHS, name) and not re.fullmatch(_NOT_WIDTHS, name):
        return min(value, WIDTH)
    return value


def _small_list(name: str, value: Any, narrow: bool, shallow: bool) -> Any:
    whole = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    if not whole:
        return value
    if (
        re.fullmatch(r"(\w+_)?(depths|num_layers|num_blocks|layers_per_stage|blocks_per_stage)|layers", name)
        and shallow
    ):
        return type(value)(min(entry, LAYERS) for entry in value)
    if name in ("image_size", "img_size", "spec_size"):
        return type(value)(min(entry, _IMAGE) for entry in value)
    if narrow and name in ("conv_dim", "tdnn_dim"):
        return type(value)(min(entry, 32) for entry in value)
    return value


def _small_rope(value: dict[str, Any], narrow: bool) -> dict[str, Any]:
    section = value.get("mrope_section")
    if narrow and isinstance(section, (list, tuple)):
        half = int(HEAD_WIDTH * (value.get("partial_rotary_factor") or 1)) // 2
        parts = [max(1, entry * half // sum(section)) for entry in section]
        parts[0] += half - sum(parts)
        return value | {"mrope_section": parts}
    return value


def _one_layer_of_each(config: PreTrainedConfig, kinds: list[str]) -> dict[str, Any]:
    kinds = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    number = next((n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if hasattr(config, n)), None)
    return {"layer_types": kinds} | ({number: len(kinds)} if number else {})


def _special_tokens(config: PreTrainedConfig) -> dict[str, int]:
    """Ids within the small vocabulary, those of images, videos and sounds apart from all others."""
    changed, free = {}, 103
    for name in _names(config):
        value = _value(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not re.search(r"token_(id|index)$|_token$", name):
            continue
        kind = re.fullmatch(r"(image|video|audio)_token_(id|index)|(image|video|audio)_token", name)
        if kind:
            changed[name] = _TOKENS[kind[1] or kind[3]]
        elif value >= 100 or value < 0:
            changed[name], free = free, free + 1
    return changed
