"""A language model of transformers around any mixer: configured, saved, loaded and run by `generate` as theirs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList, RMSNorm, functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from regard.mixers.catalogue import mixer_named
from regard.mixers.mixer import Mixer
from regard.mixers.state_cache import StateLayer, layer_of


class MixerConfig(PretrainedConfig):
    """Of a `MixerLM`.

    Args:
        mixer: the name of a mixer of `regard.mixers`, or one for each layer.
        mixer_arguments: what it is made with beside its width, or a mapping for each layer.
        intermediate_size: of what follows each mixer; 0 for layers of mixers alone, as Mamba's are.
        vocab_size, hidden_size, num_hidden_layers, rms_norm_eps, initializer_range, tie_word_embeddings: as for a Llama.

    Raises:
        ValueError: a name that no mixer has; as many mixers as there are no layers; a mixer that is not causal.

    >>> MixerConfig(mixer="gated-delta-rule", num_hidden_layers=2).mixers
    ['GatedDeltaRule', 'GatedDeltaRule']
    """

    model_type: ClassVar[str] = "regard_mixer"

    def __init__(
        self,
        mixer: str | Sequence[str] = "GatedDeltaRule",
        mixer_arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_hidden_layers: int = 4,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.mixer = mixer if isinstance(mixer, str) else list(mixer)
        self.mixer_arguments = mixer_arguments
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        _ = self.mixers, self._arguments
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def mixers(self) -> list[str]:
        """The name of each layer's mixer."""
        names = [self.mixer] * self.num_hidden_layers if isinstance(self.mixer, str) else self.mixer
        if len(names) != self.num_hidden_layers:
            raise ValueError(f"MixerConfig: {len(names)} mixers for {self.num_hidden_layers} layers; give one for each")
        kinds = [mixer_named(name) for name in names]
        for kind in kinds:
            if not kind.facts.causal:
                raise ValueError(f"MixerConfig: {kind.__name__} is not causal, as a language model's mixer must be")
        return [kind.__name__ for kind in kinds]

    @property
    def _arguments(self) -> list[dict[str, Any]]:
        given = self.mixer_arguments
        if given is None or isinstance(given, Mapping):
            return [dict(given or {}) for _ in range(self.num_hidden_layers)]
        if len(given) != self.num_hidden_layers:
            raise ValueError(
                f"MixerConfig: {len(given)} mixer_arguments for {self.num_hidden_layers} layers; give one for each"
            )
        return [dict(arguments) for arguments in given]

    def make(self, layer: int) -> Mixer:
        """A fresh mixer for a layer."""
        kind, arguments = mixer_named(self.mixers[layer]), self._arguments[layer]
        try:
            return kind(self.hidden_size, **arguments)
        except TypeError as error:
            raise ValueError(f"MixerConfig: {kind.__name__} cannot be made with {arguments}: {error}") from error


class MixerBlock(Module):
    """One layer: ``x + mixer(norm(x))``, and then ``x + W_down(silu(W_gate x) ⊙ W_up x)`` of a norm, where it is wanted."""

    def __init__(self, config: MixerConfig, layer: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.mixer_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.mixer = config.make(layer)
        for module in self.mixer.modules():  # begins as its paper has it, not as the rest of the model
            module._is_hf_initialized = True  # type: ignore[assignment]
        if not inner:
            self.mlp_norm = None
            return
        self.mlp_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor, held: StateLayer, mask: Tensor | None) -> Tensor:
        """The layer's output, (batch, tokens, width)."""
        x = x + held.mix(self.mixer, self.mixer_norm(x), mask)
        if self.mlp_norm is None:
            return x
        y = self.mlp_norm(x)
        mixed: Tensor = x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return mixed


class MixerLM(PreTrainedModel, GenerationMixin):
    """A decoder of a mixer's layers, with everything that transformers does for its own models.

    ``generate`` (greedy, sampled, beams, padded batches), ``save_pretrained`` and ``from_pretrained``, `Trainer`, labels and
    their loss; `regard.watch` sees its mixers. Its cache holds a state of each layer, which does not grow.

    >>> import torch
    >>> model = MixerLM(MixerConfig("DeltaRule", vocab_size=50, hidden_size=16, num_hidden_layers=2))
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """

    config_class = MixerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _no_split_modules = ["MixerBlock"]  # noqa: RUF012 - as its base has it
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = ModuleList(MixerBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Its cache is its own; the first pass makes it."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: Module) -> None:
        if isinstance(module, Linear | Embedding):
            torch.nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens.

        Args:
            input_ids: (batch, tokens); or ``inputs_embeds`` (batch, tokens, hidden_size) instead.
            attention_mask: (batch, tokens so far): 1 for tokens, 0 for padding, on either side.
            past_key_values: the cache that an earlier pass returned, from which this one goes on.
            labels: (batch, tokens), −100 where there is none: the loss of predicting each from those before it.
            use_cache: return the cache; the configuration's by default, never while training.
            logits_to_keep: of only so many last tokens, or of these positions; 0 for all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MixerLM takes input_ids or inputs_embeds, one of the two")
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = Cache(layers=[StateLayer() for _ in self.layers]) if past_key_values is None else past_key_values
        mask = _mask_of(attention_mask, hidden)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, layer_of(cache, number), mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.norm(hidden[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)


def _mask_of(attention_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """(batch, tokens), boolean: which of the new tokens are real; None where all are."""
    if attention_mask is None:
        return None
    batch, tokens, _ = hidden.shape
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"MixerLM takes an attention_mask of shape (batch, tokens so far), for {batch} texts of {tokens} new tokens; got "
            f"{tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, -tokens:].bool()
    return None if bool(real.all()) else real


AutoConfig.register(MixerConfig.model_type, MixerConfig)
AutoModelForCausalLM.register(MixerConfig, MixerLM)
