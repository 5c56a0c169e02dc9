"""Which attention calls of a vision–language model are its language model's."""

from __future__ import annotations

from typing import Any

from torch.nn import Module, ModuleList


def decoder_layers(model: Module) -> list[str]:
    """For each layer of the language model in order, what ``layers=`` calls it; the vision tower's are not among them.

    Raises:
        ValueError: the model has no stack of layers.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    >>> decoder_layers(model)
    ['model.layers.0.*', 'model.layers.1.*']
    """
    decoder = decoder_of(model)
    stacks = {name: child for name, child in decoder.named_children() if isinstance(child, ModuleList)}
    if not stacks:
        names = ", ".join(name for name, _ in decoder.named_children())
        raise ValueError(
            f"{type(decoder).__name__} has no ModuleList of layers, only {names}; name the layers yourself with layers="
        )
    stack = max(stacks, key=lambda name: len(stacks[name]))
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    start = f"{prefix}.{stack}" if prefix else stack
    return [f"{start}.{number}.*" for number in range(len(stacks[stack]))]


def decoder_of(model: Module) -> Module:
    """The language model inside a vision–language model."""
    find: Any = getattr(model, "get_decoder", None)
    decoder: Module = model if find is None else find()
    return decoder
