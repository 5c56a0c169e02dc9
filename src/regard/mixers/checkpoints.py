"""Layers and language models of other libraries as mixers: the same weights, by a table of names for each kind of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module
from transformers import PretrainedConfig, PreTrainedModel

from regard.mixers.language_model import MixerConfig, MixerLM
from regard.mixers.linear import DeltaRule, GatedDeltaRule, GatedLinearAttention, SelectiveSSM
from regard.mixers.mixer import Mixer, expanded


def load_layer(
    layer: Module | Mapping[str, Tensor],
    config: PretrainedConfig | Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Mixer:
    """The mixer that a linear layer of flash-linear-attention or transformers is, with copies of its weights.

    ================  ======================================  ======================
    ``model_type``    whose layer                             the mixer
    ================  ======================================  ======================
    gla               flash-linear-attention, GLA             `GatedLinearAttention`
    delta_net         flash-linear-attention, DeltaNet        `DeltaRule`
    gated_deltanet    flash-linear-attention, Gated DeltaNet  `GatedDeltaRule`
    mamba             transformers, Mamba                     `SelectiveSSM`
    qwen3_next        transformers, Qwen3-Next                `GatedDeltaRule`
    qwen3_5_text      transformers, Qwen3.5                   `GatedDeltaRule`
    qwen3_5_moe_text  transformers, Qwen3.5 with experts      `GatedDeltaRule`
    ================  ======================================  ======================

    Args:
        layer: the module, or its ``state_dict()``.
        config: of the model, as transformers has it or as ``config.json`` does: its ``model_type`` and options.
        dtype: of the mixer's parameters.

    Returns:
        The mixer, where the weights are.

    Raises:
        ValueError: a model that is not in the table; an option that the mixer does not have, or that is not known; weights
            that are missing, left over, or of other shapes than the options make them.

    >>> import torch
    >>> from transformers import MambaConfig
    >>> from transformers.models.mamba.modeling_mamba import MambaMixer
    >>> config = MambaConfig(hidden_size=32, state_size=8)
    >>> theirs, x = MambaMixer(config, layer_idx=0), torch.randn(1, 10, 32)
    >>> mixer = load_layer(theirs, config)
    >>> type(mixer).__name__, bool(torch.allclose(mixer(x)[0], theirs(x), atol=1e-5))
    ('SelectiveSSM', True)
    """
    options = _Options(config)
    layout = _layout(options)
    weights = dict(layer.state_dict() if isinstance(layer, Module) else layer)
    mixer = layout.mixer(options["hidden_size"], **layout.arguments(options))
    options.close(layout.beside)
    mixer = mixer.to(next((tensor.device for tensor in weights.values()), None), dtype)
    _fill(mixer, layout.sources(mixer), layout.renamed(weights), options.kind)
    return mixer


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> MixerLM:
    """The `MixerLM` that a checkpoint of flash-linear-attention or of transformers' Mamba is, with its weights.

    Of `load_layer`'s table these are the models of linear layers alone: gla, delta_net, gated_deltanet and mamba. Models
    that have attention beside them stay what they are, and `regard.mixers.replace_linear_layers` puts mixers into them.

    Args:
        folder: with ``config.json`` and ``*.safetensors``, as ``huggingface_hub.snapshot_download`` fetches them.
        dtype: of the model's parameters, and of the sums along its layers.

    Raises:
        FileNotFoundError: a folder without either of them.
        ValueError: as for `load_layer`; attention between the linear layers.

    >>> import tempfile, torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> theirs = MambaForCausalLM(MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=50)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     theirs.save_pretrained(folder)
    ...     model = load_model(folder)
    >>> ids = torch.tensor([[3, 1, 4]])
    >>> model.config.mixer, bool(torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-4))
    ('SelectiveSSM', True)
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, or no weights in *.safetensors; both are needed")
    options = _Options(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    layout = _layout(options)
    if layout.model is None:
        raise ValueError(
            f"a model of {options.kind} is not made of linear layers alone: load it with transformers, and put mixers in the "
            "place of these layers with regard.mixers.replace_linear_layers"
        )
    config = MixerConfig(
        layout.mixer.__name__, layout.arguments(options), **layout.model.arguments(options),
        **options.some("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings"),
        **options.some("bos_token_id", "eos_token_id", "pad_token_id"),
    )  # fmt: skip
    options.close(layout.beside)
    with torch.device("meta"):
        model = MixerLM(config)
    Module.to(model, dtype).to_empty(device="cpu")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    _fill(model, layout.model.sources(model, layout), layout.renamed(weights), options.kind)
    model.tie_weights()
    model.train(False)
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, Module]:
    """The linear layers of a model of transformers that `load_layer` knows, by path.

    Raises:
        ValueError: a model that has none.

    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> list(linear_layers(MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50))))
    ['backbone.layers.0.mixer', 'backbone.layers.1.mixer']
    """
    kind = model.config.get_text_config().model_type
    layout = _LAYOUTS.get(kind)
    found = {
        path: module
        for path, module in model.named_modules()
        if layout is not None and path.rpartition(".")[2] == layout.module and hasattr(module, "layer_idx")
    }
    if not found:
        known = ", ".join(sorted(name for name, layout in _LAYOUTS.items() if layout.module))
        raise ValueError(
            f"a {type(model).__name__} ({kind}) has no linear layers that are known as mixers; {known} have"
        )
    return found


class _Options:
    """What a configuration says, and which of it was read."""

    def __init__(self, config: PretrainedConfig | Mapping[str, Any]) -> None:
        self._given = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config)
        self._read: set[str] = set()
        self.kind = str(self["model_type"]) if "model_type" in self._given else "the model"

    def __getitem__(self, name: str) -> Any:
        if name not in self._given:
            raise ValueError(f"the configuration of {self.kind} does not say {name}")
        self._read.add(name)
        return self._given[name]

    def some(self, *names: str) -> dict[str, Any]:
        """Those of these options that it says."""
        return {name: self[name] for name in names if name in self._given}

    def only(self, **known: Any) -> None:
        """Refuse any other value of these options."""
        for name, value in self.some(*known).items():
            values = known[name] if isinstance(known[name], tuple) else (known[name],)
            if value not in values:
                raise ValueError(
                    f"{self.kind} is known with {name} = {' or '.join(map(repr, values))} alone, and has {name} = {value!r}"
                )

    def close(self, beside: frozenset[str] | None) -> None:
        """Refuse options that nobody read, except for those that say nothing of what is computed; None for any."""
        if beside is None:
            return
        known = self._read | beside | set(PretrainedConfig().to_dict())
        unknown = sorted(name for name in self._given.keys() - known if self._given[name] not in (None, False))
        if unknown:
            raise ValueError(f"{self.kind} has options that are not known here: {', '.join(unknown)}")


Take = Callable[[Any, list[Tensor]], Tensor]
"""One of a mixer's tensors, from the mixer and theirs."""


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: their names, and what becomes of these."""

    names: tuple[str, ...]
    take: Take = lambda _, parts: torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Model:
    """How the rest of a language model is named, and made."""

    arguments: Callable[[_Options], dict[str, Any]]
    """Of `MixerConfig`, beside those that all models call alike."""
    layer: str
    """Where a layer's weights are."""
    names: Mapping[str, str]
    """Theirs by ours, {} for the layer's number."""

    def sources(self, model: MixerLM, layout: _Layout) -> dict[str, _Source]:
        """Of each tensor of a model."""
        found: dict[str, _Source] = {}
        for own, theirs in self.names.items():
            numbers = range(len(model.layers)) if "{}" in own else range(1)
            found |= {own.format(number): _Source((theirs.format(number),)) for number in numbers}
        for number, block in enumerate(model.layers):
            before, mixer = self.layer.format(number), block.get_submodule("mixer")
            for own, source in layout.sources(mixer).items():
                take = partial(_of_layer, source.take, mixer)
                found[f"layers.{number}.mixer.{own}"] = _Source(tuple(before + name for name in source.names), take)
        if model.config.tie_word_embeddings:
            found["lm_head.weight"] = found["embed_tokens.weight"]
        return found


def _of_layer(take: Take, mixer: Module, _: MixerLM, parts: list[Tensor]) -> Tensor:
    return take(mixer, parts)


@dataclass(frozen=True)
class _Layout:
    """What a kind of layer is made with, and how its weights are named."""

    mixer: type[Mixer]
    arguments: Callable[[_Options], dict[str, Any]]
    table: Mapping[str, _Source]
    """By the mixer's names; a tensor that is not in it is called alike."""
    beside: frozenset[str] | None = None
    """Options that say nothing of what is computed; None where all others are of other layers."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Ends of names that a weight may have too."""
    model: _Model | None = None
    module: str | None = None
    """What a model of transformers calls the layer."""

    def sources(self, mixer: Module) -> dict[str, _Source]:
        """Of each tensor of a mixer."""
        return {own: self.table.get(own, _Source((own,))) for own in mixer.state_dict()}

    def renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With one name for each weight."""

        def name_of(name: str) -> str:
            end = next((end for end in self.other_names if name.endswith(end)), "")
            return name.removesuffix(end) + self.other_names.get(end, "")

        return {name_of(name): tensor for name, tensor in weights.items()}


def _layout(options: _Options) -> _Layout:
    if options.kind not in _LAYOUTS:
        raise ValueError(f"layers of {options.kind!r} are not known as mixers; known are {', '.join(sorted(_LAYOUTS))}")
    return _LAYOUTS[options.kind]


def _fill(module: Module, sources: Mapping[str, _Source], weights: Mapping[str, Tensor], kind: str) -> None:
    """Give a module its weights.

    Raises:
        ValueError: weights that are missing, left over or of other shapes.
    """
    wanted = {name for source in sources.values() for name in source.names}
    tied = {"lm_head.weight"} if getattr(getattr(module, "config", None), "tie_word_embeddings", False) else set()
    for what, names in (("lack", wanted - weights.keys()), ("have beside theirs", weights.keys() - wanted - tied)):
        if names:
            raise ValueError(f"the weights, as the configuration of {kind} has them, {what} {', '.join(sorted(names))}")
    own = module.state_dict()
    filled = {}
    for name, source in sources.items():
        parts = [weights[one] for one in source.names]
        try:
            filled[name] = source.take(module, parts)
        except RuntimeError:
            filled[name] = parts[0].new_empty(0)
        if filled[name].shape != own[name].shape:
            shapes = ", ".join(f"{one} {tuple(part.shape)}" for one, part in zip(source.names, parts, strict=True))
            raise ValueError(
                f"{shapes}: the configuration of {kind} makes {name} of shape {tuple(own[name].shape)} of it, which does not "
                "fit"
            )
    module.load_state_dict(filled)


# --- flash-linear-attention ---------------------------------------------------------------------------------------------


def _gla(options: _Options) -> dict[str, Any]:
    options.only(feature_map=None, clamp_min=None, hidden_act="swish", elementwise_affine=True)
    return {
        "heads": options["num_heads"],
        "norm_eps": options["norm_eps"],
        **options.some("num_kv_heads", "expand_k", "expand_v", "use_short_conv", "conv_size", "conv_bias"),
        **options.some("use_output_gate", "gate_logit_normalizer", "gate_low_rank_dim"),
    }


def _delta_net(options: _Options) -> dict[str, Any]:
    options.only(hidden_act="swish", use_output_norm=True)
    heads, expand_k = options["num_heads"], options["expand_k"]
    return {
        "heads": heads,
        "head_dim": expanded(options.kind, options["hidden_size"], expand_k, heads) // heads,
        "expand_v": options["expand_v"] / expand_k,
        "norm_eps": options["norm_eps"],
        **options.some("use_gate", "use_beta", "use_short_conv", "conv_size", "conv_bias"),
        **options.some("allow_neg_eigval", "qk_norm", "qk_activation"),
    }


def _gated_deltanet(options: _Options) -> dict[str, Any]:
    options.only(hidden_act="swish", output_gate_activation=("swish", "silu"))
    return {
        "heads": options["num_heads"],
        "head_dim": options["head_dim"],
        "expand_v": options["expand_v"],
        "norm_eps": options["norm_eps"],
        **options.some("num_v_heads", "use_gate", "use_short_conv", "conv_size", "conv_bias", "allow_neg_eigval"),
    }


def _fla_model(options: _Options) -> dict[str, Any]:
    options.only(attn=None, attnres_block_size=None)
    width, ratio = options["hidden_size"], options.some("hidden_ratio").get("hidden_ratio") or 4
    inner = options.some("intermediate_size").get("intermediate_size")
    return {
        "intermediate_size": inner or 256 * math.ceil(int(width * ratio * 2 / 3) / 256),
        "rms_norm_eps": options["norm_eps"],
    }


_OF_ANY_MODEL = frozenset({
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "initializer_range", "intermediate_size",
    "num_hidden_layers", "pad_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
    "vocab_size",
})  # fmt: skip
_CONVOLUTIONS = {
    f"conv1d.{what}": _Source(tuple(f"{one}_conv1d.{what}" for one in "qkv")) for what in ("weight", "bias")
}
_FLA_BESIDE = _OF_ANY_MODEL | {
    "attn", "attn_mode", "attnres_block_size", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm",
    "fuse_swiglu", "hidden_ratio", "max_position_embeddings", "use_gk", "use_gv", "use_l2warp",
}  # fmt: skip
_FLA_MODEL = _Model(
    _fla_model,
    layer="model.layers.{}.attn.",
    names={
        "embed_tokens.weight": "model.embeddings.weight",
        "layers.{}.mixer_norm.weight": "model.layers.{}.attn_norm.weight",
        "layers.{}.mlp_norm.weight": "model.layers.{}.mlp_norm.weight",
        "layers.{}.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
        "layers.{}.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
)


# --- transformers -------------------------------------------------------------------------------------------------------


def _mamba(options: _Options) -> dict[str, Any]:
    options.only(hidden_act=("silu", "swish"), rms_norm=True)
    rank = options["time_step_rank"]
    return {
        "time_step_rank": None if rank == "auto" else rank,
        **{name: options[name] for name in ("state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias")},
    }


def _mamba_model(options: _Options) -> dict[str, Any]:
    return {"intermediate_size": 0, "rms_norm_eps": options["layer_norm_epsilon"]}


_MAMBA_BESIDE = _OF_ANY_MODEL | {
    "d_inner", "d_model", "fused_add_norm", "layer_norm_epsilon", "n_layer", "pad_vocab_size_multiple",
    "rescale_prenorm_residual", "residual_in_fp32", "ssm_cfg", "time_step_floor", "time_step_init_scheme",
    "time_step_max", "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy",
}  # fmt: skip
_MAMBA_MODEL = _Model(
    _mamba_model,
    layer="backbone.layers.{}.mixer.",
    names={
        "embed_tokens.weight": "backbone.embeddings.weight",
        "layers.{}.mixer_norm.weight": "backbone.layers.{}.norm.weight",
        "norm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    },
)


def _qwen(options: _Options) -> dict[str, Any]:
    options.only(hidden_act="silu")
    head_dim = options["linear_key_head_dim"]
    return {
        "heads": options["linear_num_key_heads"],
        "num_v_heads": options["linear_num_value_heads"],
        "head_dim": head_dim,
        "expand_v": options["linear_value_head_dim"] / head_dim,
        "conv_size": options["linear_conv_kernel_dim"],
        "norm_eps": options["rms_norm_eps"],
    }


def _by_key_head(number: int, mixer: GatedDeltaRule, parts: list[Tensor]) -> Tensor:
    """Of what is told key head by key head: its query, its key, the values and the gates of its heads of values."""
    key, values = mixer.q_proj.out_features // mixer.heads, mixer.v_proj.out_features // mixer.heads
    of_heads: tuple[Tensor, ...] = (
        parts[0].view(mixer.heads, 2 * (key + values), -1).split([key, key, values, values], dim=1)
    )
    return of_heads[number].flatten(0, 1)


def _half_by_key_head(number: int, mixer: GatedDeltaRule, parts: list[Tensor]) -> Tensor:
    of_heads: Tensor = parts[0].view(mixer.heads, 2, mixer.num_v_heads // mixer.heads, -1)
    return of_heads[:, number].flatten(0, 1)


def _one_of_three(number: int, mixer: GatedDeltaRule, parts: list[Tensor]) -> Tensor:
    key, values = mixer.q_proj.out_features, mixer.v_proj.out_features
    split: tuple[Tensor, ...] = parts[0].split([key, key, values])
    return split[number]


_QWEN_OUTPUT = {"o_proj.weight": _Source(("out_proj.weight",))}
_QWEN3_NEXT = _Layout(
    GatedDeltaRule,
    _qwen,
    _QWEN_OUTPUT
    | {
        f"{one}_proj.weight": _Source(("in_proj_qkvz.weight",), partial(_by_key_head, number))
        for number, one in enumerate("qkvg")
    }
    | {
        f"{one}_proj.weight": _Source(("in_proj_ba.weight",), partial(_half_by_key_head, number))
        for number, one in enumerate("ba")
    },
    module="linear_attn",
)
_QWEN3_5 = _Layout(
    GatedDeltaRule,
    _qwen,
    _QWEN_OUTPUT
    | {
        f"{one}_proj.weight": _Source(("in_proj_qkv.weight",), partial(_one_of_three, number))
        for number, one in enumerate("qkv")
    }
    | {f"{own}_proj.weight": _Source((f"in_proj_{one}.weight",)) for own, one in zip("gba", "zba", strict=True)},
    module="linear_attn",
)

_NORM = {"norm.weight": _Source(("o_norm.weight",))}
_LAYOUTS = {
    "gla": _Layout(
        GatedLinearAttention, _gla, _CONVOLUTIONS | {"norm.weight": _Source(("g_norm.weight",))}, _FLA_BESIDE,
        {"g_norm_swish_gate.weight": "g_norm.weight"}, _FLA_MODEL,
    ),
    "delta_net": _Layout(DeltaRule, _delta_net, _CONVOLUTIONS | _NORM, _FLA_BESIDE, model=_FLA_MODEL),
    "gated_deltanet": _Layout(GatedDeltaRule, _gated_deltanet, _CONVOLUTIONS | _NORM, _FLA_BESIDE, model=_FLA_MODEL),
    "mamba": _Layout(SelectiveSSM, _mamba, {}, _MAMBA_BESIDE, model=_MAMBA_MODEL, module="mixer"),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
}  # fmt: skip
