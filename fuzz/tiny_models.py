"""A small random model of any type of transformers, and inputs that it accepts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from fuzz.tiny_configs import tiny

TEXT = 12
LARGEST = 120_000_000


def model_types() -> list[str]:
    """The types that this version of transformers knows."""
    return sorted(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """The classes of a type, the plain model first."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    names: list[str] = []
    for table in [modeling_auto.MODEL_MAPPING_NAMES] + [
        value for name, value in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES")
        and name.startswith("MODEL_")
    ]:  # fmt: skip
        found = table.get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    classes = [getattr(transformers, name, None) for name in dict.fromkeys(names)]
    module = _modeling_of(config_class)
    if module is not None:
        classes += [
            value for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
            and config_class in _configured_by(value) and "forward" in vars(value)
        ]  # fmt: skip
    return [kind for kind in dict.fromkeys(classes) if kind is not None]


def _configured_by(kind: type) -> tuple[Any, ...]:
    return getattr(kind, "config_class", None), vars(kind).get("__annotations__", {}).get("config")


def _modeling_of(config_class: type) -> Any:
    try:
        return importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None


def tiny_model(
    kind: type[PreTrainedModel], config_class: type[PreTrainedConfig], narrow: bool, shallow: bool
) -> PreTrainedModel:
    """A random instance on the CPU, in evaluation."""
    config = tiny(config_class(), narrow, shallow)
    with torch.device("meta"):
        numbers = (
            sum(parameter.numel() for parameter in kind(_copy(config)).parameters()) if not (narrow and shallow) else 0
        )
    if numbers > LARGEST:
        raise ValueError(f"{numbers / 1e6:.0f} million parameters, even with {config.__class__.__name__} made small")
    torch.manual_seed(0)
    return kind._from_config(config).float().eval()


def _copy(config: PreTrainedConfig) -> PreTrainedConfig:
    import copy

    return copy.deepcopy(config)


def inputs_of(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs that the model may accept, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    required_mask = "attention_mask" in required
    for variant in range(6):
        made: dict[str, Any] = {}
        wanted = list(dict.fromkeys(required + [n for n in _WANTED if n in parameters]))
        for name in wanted:
            maker = _MAKERS.get(name)
            value = maker(model, variant) if maker else None
            if value is not None:
                made[name] = value
        if "inputs_embeds" in made and "input_ids" in made and "inputs_embeds" not in required:
            del made["inputs_embeds"]
        if "input_ids" not in made and not required_mask:
            made.pop("attention_mask", None)
        yield from _with_placeholders(model, made)


def _with_placeholders(model: PreTrainedModel, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The text with as many image tokens as the model makes features of the image, and so on."""
    ids = made.get("input_ids")
    if ids is None:
        yield made
        return
    pieces = [ids]
    types = [torch.zeros_like(ids)]
    for number, (kind, sources) in enumerate(_SOURCES.items(), 1):
        source = next((name for name in sources if name in made), None)
        token = _token(model.config, kind)
        if source is None or token is None:
            continue
        count = _count(model, kind, made)
        if count:
            pieces.append(torch.full((1, count), token))
            types.append(torch.full((1, count), number))
    whole = torch.cat([pieces[0][:, :4], *pieces[1:], pieces[0][:, 4:]], 1)
    made = dict(made)
    made["input_ids"] = whole
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        made["mm_token_type_ids"] = torch.cat([types[0][:, :4], *types[1:], types[0][:, 4:]], 1)
    if "attention_mask" in made:
        made["attention_mask"] = torch.ones_like(whole)
    for name in ("token_type_ids",):
        if name in made:
            made[name] = torch.zeros_like(whole)
    yield made
    if any(name in made for sources in _SOURCES.values() for name in sources):  # the text alone
        media = ("image", "video", "pixel", "audio", "input_features", "mm_token")
        alone = {name: value for name, value in made.items() if not name.startswith(media)}
        alone["input_ids"] = ids
        if "attention_mask" in made:
            alone["attention_mask"] = torch.ones_like(ids)
        yield alone


_SOURCES = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "audio_values", "input_values", "audio_input_features"),
}


def _token(config: PreTrainedConfig, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _count(model: PreTrainedModel, kind: str, made: dict[str, Any]) -> int:
    """How many features the model makes of the image, video or sound."""
    owners = [m for m in (model, getattr(model, "model", None), getattr(model, "base_model", None)) if m is not None]
    function = next((getattr(o, f"get_{kind}_features") for o in owners if hasattr(o, f"get_{kind}_features")), None)
    if function is None:
        return 0
    accepted = inspect.signature(function).parameters
    try:
        with torch.no_grad():
            features = function(
                **{name: value for name, value in made.items() if name in accepted and name != "attention_mask"}
            )
    except Exception:
        return 0
    return _rows(features)


def _rows(features: Any) -> int:
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, (list, tuple)):
        return sum(_rows(part) for part in features)
    return features.numel() // features.shape[-1] if isinstance(features, Tensor) else 0


# -- makers of inputs: each takes the model and the number of the attempt -------------------------------------------


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _find(model: PreTrainedModel, names: tuple[str, ...], default: Any, part: str | None = None) -> Any:
    configs = list(_configs(model.config))
    if part:
        configs = [c for n, c in vars(model.config).items() if isinstance(c, PreTrainedConfig) and part in n] + configs
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not isinstance(value, dict):
                return value
    return default


def _ids(model: PreTrainedModel, variant: int, length: int = TEXT) -> Tensor:
    words = min(90, _find(model, ("vocab_size", "text_vocab_size"), 90))
    ids = torch.randint(min(10, words // 2), words, (1, length), generator=torch.Generator().manual_seed(1))
    eos = getattr(model.config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < words and variant % 2:
        ids[:, -1] = eos
    return ids


def _codes(model: PreTrainedModel, variant: int) -> Tensor:
    """Words, or for those that take several books of them at once, as many rows."""
    ids = _ids(model, variant)
    books = getattr(model.config, "num_codebooks", None)
    return ids.expand(books, -1) if isinstance(books, int) and type(model).__name__.startswith("Musicgen") else ids


def _first(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def _pixels(model: PreTrainedModel, variant: int) -> Tensor | None:
    size = _find(model, ("image_size", "img_size", "crop_size", "input_size"), 64, "vision")
    height, width = (size[-2], size[-1]) if isinstance(size, (list, tuple)) and len(size) > 1 else (_first(size),) * 2
    channels = _first(_find(model, ("num_channels", "in_channels", "in_chans", "n_channels"), 3, "vision"))
    channels = channels if channels in (1, 2, 3, 4) else 3
    if (
        "image_grid_thw" in inspect.signature(model.forward).parameters
        or "grid_thw" in inspect.signature(model.forward).parameters
    ):
        return _patches(model, channels, torch.prod(_grid(model, 0)).item(), min(variant, 1))
    if variant == 1:
        frames = _first(_find(model, ("num_frames", "frames_per_clip", "video_length"), 2))
        return torch.randn(1, frames, channels, height, width)
    if variant == 2:
        return torch.randn(1, channels, 64, 64)
    if variant == 3:
        return torch.randn(1, channels, 224, 224)
    if variant == 4:
        return torch.randn(1, 1, channels, height, width)
    if variant == 5:
        patch = _first(_find(model, ("patch_size",), 16, "vision"))
        return torch.randn(1, 16, channels * patch * patch)
    return torch.randn(1, channels, height, width)


def _patches(model: PreTrainedModel, channels: int, number: int, variant: int) -> Tensor:
    patch = _first(_find(model, ("patch_size", "spatial_patch_size"), 14, "vision"))
    frames = _find(model, ("temporal_patch_size",), 2 - variant, "vision")
    return torch.randn(int(number), channels * _first(frames) * patch * patch)


def _grid(model: PreTrainedModel, variant: int) -> Tensor:
    merge = _first(_find(model, ("spatial_merge_size", "merge_size"), 2, "vision"))
    return torch.tensor([[1, 2 * merge, 2 * merge]])


def _mels(model: PreTrainedModel) -> int:
    return _first(
        _find(
            model,
            (
                "num_mel_bins",
                "n_mels",
                "feature_size",
                "input_feat_per_channel",
                "input_dim",
                "n_mel_bins",
                "mel_dim",
                "num_mels",
                "input_feat_size",
                "feature_projection_input_dim",
                "input_size",
            ),
            80,
            "audio",
        )
    )


def _features(model: PreTrainedModel, variant: int) -> Tensor:
    mels = _mels(model)
    frames = 2 * _first(_find(model, ("max_source_positions",), 32, "audio"))
    return [
        torch.randn(1, mels, frames), torch.randn(1, frames, mels), torch.randn(1, mels, 3000),
        torch.randn(1, 1, 128, mels), torch.randn(mels, frames), torch.randn(1, 1, 1024, mels),
    ][variant]  # fmt: skip


def _sound(model: PreTrainedModel, variant: int) -> Tensor:
    mels = _mels(model)
    return [
        torch.randn(1, 4000), torch.randn(1, 1, 4000), torch.randn(1, 64, mels), torch.randn(1, 16000),
        torch.randn(1, 1, 16000), torch.randn(1, 1024, mels),
    ][variant]  # fmt: skip


def _width(model: PreTrainedModel) -> int:
    return _first(_find(model, ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim"), 64))


def _embeddings(model: PreTrainedModel, variant: int) -> Tensor:
    return torch.randn(1, TEXT, _width(model))


def _boxes(model: PreTrainedModel, variant: int) -> Tensor:
    boxes = torch.tensor([10, 20, 50, 60]).expand(1, TEXT, 4).contiguous()
    return boxes.float() / 100 if variant % 2 else boxes


def _history(model: PreTrainedModel) -> int:
    lags = _find(model, ("lags_sequence",), [0])
    return _first(_find(model, ("context_length", "prediction_length"), 16)) + max(lags)


_MAKERS: dict[str, Any] = {
    "input_ids": _codes,
    "decoder_input_ids": lambda model, variant: _ids(model, 0, 6),
    "attention_mask": lambda model, variant: torch.ones(1, TEXT, dtype=torch.long),
    "token_type_ids": lambda model, variant: torch.zeros(1, TEXT, dtype=torch.long),
    "pixel_values": _pixels,
    "pixel_values_images": _pixels,
    "pixel_values_videos": lambda model, variant: (
        _pixels(model, 1) if "grid" not in str(inspect.signature(model.forward)) else None
    ),
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_features": _features,
    "input_values": _sound,
    "audio_values": _sound,
    "inputs_embeds": _embeddings,
    "hidden_states": lambda model, variant: (
        _pixels(model, variant)
        if "grid_thw" in inspect.signature(model.forward).parameters
        else _embeddings(model, variant)
    ),
    "encoder_hidden_states": _embeddings,
    "bbox": _boxes,
    "input_features_mask": lambda model, variant: torch.ones(1, _features(model, variant).shape[-1], dtype=torch.long),
    "feature_attention_mask": lambda model, variant: torch.ones(
        1, _features(model, variant).shape[-1], dtype=torch.long
    ),
    "query_embeds": _embeddings,
    "image": _pixels,
    "past_values": lambda model, variant: torch.rand(
        (1, _history(model))
        + ((model.config.num_input_channels,) if hasattr(model.config, "num_input_channels") else ())
    ),
    "past_time_features": lambda model, variant: torch.rand(
        1, _history(model), _find(model, ("num_time_features",), 0)
    ),
    "past_observed_mask": lambda model, variant: torch.ones(1, _history(model)),
    "future_values": lambda model, variant: torch.rand(1, _find(model, ("prediction_length",), 4)),
    "future_time_features": lambda model, variant: torch.rand(
        1, _find(model, ("prediction_length",), 4), _find(model, ("num_time_features",), 0)
    ),
    "image_sizes": lambda model, variant: torch.tensor([list(_pixels(model, variant).shape[-2:])]),
    "qformer_input_ids": _ids,
    "visual_feats": lambda model, variant: torch.randn(1, 4, _find(model, ("visual_feat_dim",), 64)),
    "pixel_position_ids": lambda model, variant: torch.stack(
        torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1
    ).reshape(1, 16, 2),
    "visual_pos": lambda model, variant: torch.rand(1, 4, 4),
    "spectrogram": lambda model, variant: torch.randn(1, 16, _find(model, ("model_in_dim", "num_mel_bins"), 80)),
    "audio_mel": lambda model, variant: torch.randn(1, 64, _mels(model)),
    "audio_mel_mask": lambda model, variant: torch.zeros(1, 64, dtype=torch.bool),
    "context": _embeddings,
    "high_res_pixel_values": lambda model, variant: torch.randn(1, 3, 1024, 1024),
    "pixel_mask": lambda model, variant: None,
    "past_values_padding": lambda model, variant: torch.zeros(1, _history(model)),
    "freq": lambda model, variant: torch.zeros(1, 1, dtype=torch.long),
    "feature_lens": lambda model, variant: torch.tensor([_features(model, 4).shape[-1]]),
    "mask": lambda model, variant: torch.ones(1, _features(model, 1).shape[1], dtype=torch.bool),
    "merge_sizes": lambda model, variant: torch.tensor([2]),
    "pixel_attention_mask": lambda model, variant: torch.ones(1, 16, dtype=torch.long),
    "spatial_shapes": lambda model, variant: torch.tensor([[4, 4]]),
    "prompt_pixel_values": _pixels,
    "prompt_masks": _pixels,
    "flattened_patches": lambda model, variant: torch.randn(
        1, 16, 2 + 3 * _first(_find(model, ("patch_size",), 16, "vision")) ** 2
    ),
    "image_attention_mask": lambda model, variant: torch.ones(1, TEXT, 1, dtype=torch.long),
    "aspect_ratio_ids": lambda model, variant: torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda model, variant: torch.ones(1, 1, _find(model, ("max_num_tiles",), 1), dtype=torch.long),
}
_WANTED = (
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "pixel_values",
    "image_grid_thw",
    "input_features",
    "input_values",
    "audio_values",
    "bbox",
    "image_sizes",
    "visual_feats",
    "visual_pos",
    "high_res_pixel_values",
    "flattened_patches",
    "image_attention_mask",
    "feature_lens",
    "input_features_mask",
    "feature_attention_mask",
    "future_values",
    "future_time_features",
)
