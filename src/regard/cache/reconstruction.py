"""The attention that the entries of a cache are given while the model repeats the text, chunk by chunk."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache._compress import compress
from regard.cache.controls import KeepAll
from regard.cache.module_call import ModuleCall
from regard.cache.policy import Entries
from regard.cache.when import Every, When
from regard.runtime import AttentionCall
from regard.tokens import image_tokens, max_positions

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer

_FIRST = "\n\nRepeat the previous context exactly."
_FURTHER = "\n\nRepeat the part of the previous context exactly, starting with"
_LAST_TOKENS = 8  # of the chunk before, by which the model is told where a further one starts
_CONTENT = "#content#"
_NUMBERS_AT_ONCE = 2**20  # of a strip of logits: some rows of the matrix


@dataclass(frozen=True)
class Reconstruction:
    """Has a model repeat a text, and tells of each entry of its cache the most attention that any token of this gives it.

    ``tokenizer`` encodes the request; its chat template tells what begins a user's turn, which is not repeated, and what
    begins an answer. ``chunk`` tokens are repeated at once. The softmax is over the first ``sinks`` tokens, or all that
    begin the turn, the chunk and the repetition. ``normalized``: attention is divided by the norm of what the layer was given
    at the query, and multiplied by that of what the value adds to the layer's output.
    """

    tokenizer: Any
    chunk: int
    sinks: int
    normalized: bool

    @torch.no_grad()
    def scores(self, model: Module, cache: Any) -> list[Tensor]:
        """(batch, key heads, tokens) of each layer whose entries can be dropped; infinite for the first tokens.

        The cache is left as it was.

        Raises:
            ValueError: a text of which not all token ids are known, of images, or too long to be repeated.
        """
        layers = kept_layers(cache)
        ids = _token_ids(model, layers[0].token_ids)
        prefix, suffix = _template(self.tokenizer)
        start = len(prefix) if ids[0, : len(prefix)].tolist() == prefix else 0
        sure = min(max(start, self.sinks), ids.shape[1])
        self._check_room(model, ids.shape[1], ids.shape[1] - start, len(suffix))
        parts: list[dict[int, Tensor]] = []
        for first in range(start, ids.shape[1], self.chunk):
            chunk = slice(first, min(first + self.chunk, ids.shape[1]))
            before = ids[:, max(first - _LAST_TOKENS, start) : first]
            asked = self._encoded(_FIRST if first == start else _FURTHER).to(ids.device).expand(len(ids), -1)
            answer = torch.tensor(suffix, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
            tokens = torch.cat([asked, before, answer, ids[:, chunk]], dim=1)
            parts.append(_repeat(model, cache, tokens, _Repetition(chunk, min(sure, first), self.normalized)))
        return [self._of_layer([part[layer.rank] for part in parts], start, sure) for layer in layers]

    def _of_layer(self, parts: list[Tensor], start: int, sure: int) -> Tensor:
        scores = torch.nn.functional.pad(torch.cat(parts, dim=2), (start, 0))
        scores[:, :, :sure] = torch.inf
        return scores

    def _encoded(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])

    def _check_room(self, model: Module, seen: int, repeated: int, suffix: int) -> None:
        """Refuse a text so long that the longest request and its answer go beyond the model's positions."""
        limit = max_positions(model, self.tokenizer)
        if repeated <= self.chunk:
            request = self._encoded(_FIRST).shape[1] + suffix
        else:
            request = self._encoded(_FURTHER).shape[1] + _LAST_TOKENS + suffix
        needed = request + min(self.chunk, repeated)
        if seen + needed > limit:
            most = limit - seen - self._encoded(_FURTHER).shape[1] - _LAST_TOKENS - suffix
            advice = f"a chunk of at most {most} tokens" if most > 0 else "a shorter text"
            raise ValueError(
                f"a text of {seen} tokens, and {needed} more to have {min(self.chunk, repeated)} of them repeated, are "
                f"beyond the model's {limit:,} positions: take {advice}"
            )


@dataclass(frozen=True, kw_only=True)
class _Repetition(KeepAll):
    """Drops nothing, and collects what the entries of a chunk are given at most by the tokens of a pass, by layer."""

    chunk: slice = field(kw_only=False)
    first: int = field(kw_only=False)
    normalized: bool = field(kw_only=False)
    found: dict[int, Tensor] = field(default_factory=dict)

    @property
    def when(self) -> When:
        """After the pass, whatever it is taken for."""
        return Every(1)

    def score(self, entries: Entries) -> Tensor:
        """All alike."""
        made_by = entries.module_call
        most = _highest(made_by, self.chunk, self.first, self._weights(made_by))
        if self.normalized:
            most = most * _output_norms(made_by, self.chunk)
        self.found[entries.layer] = most.unflatten(1, (entries.keys.shape[1], -1)).amax(dim=2)
        return super().score(entries)

    def _weights(self, made_by: ModuleCall) -> Tensor | None:
        """(batch, tokens of the pass) by which attention is multiplied."""
        return 1 / torch.linalg.vector_norm(made_by.hidden_states.float(), dim=-1) if self.normalized else None


def _highest(made_by: ModuleCall, chunk: slice, first: int, weights: Tensor | None) -> Tensor:
    """(batch, query heads, tokens of the chunk): ``max_i w_i P_ij`` over the tokens i of a pass, from strips of the matrix.

    P is the attention to the first tokens, the chunk and the pass itself, as if there were no others.
    """
    call, seen, new = made_by.call, made_by.seen, made_by.call.query.shape[2]
    keys = torch.cat([torch.arange(first), torch.arange(chunk.start, chunk.stop), torch.arange(seen - new, seen)])
    keys = keys.to(call.key.device)
    of_chunk = slice(first, first + chunk.stop - chunk.start)
    query = call.query.to(torch.promote_types(call.query.dtype, torch.float32))
    key = call.key[:, :, keys].to(query.dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT.contiguous()
    bias = _bias(call, seen)[..., keys]
    highest = query.new_zeros(*query.shape[:2], chunk.stop - chunk.start)
    for rows in torch.arange(new, device=key.device).split(max(1, _NUMBERS_AT_ONCE // key[:, :, 0].numel())):
        logits = query[:, :, rows] @ key * call.factor
        if call.softcap is not None:
            logits = call.softcap * (logits / call.softcap).tanh()
        logits = logits + bias[..., rows, :]
        if call.sinks is not None:
            logits = torch.cat([logits, _sinks(call, call.sinks, rows)], dim=3)
        shares = logits.softmax(dim=3)[..., of_chunk]
        if weights is not None:
            shares = shares * weights[:, None, rows, None]
        highest = highest.maximum(shares.amax(dim=2))
    return highest


def _bias(call: AttentionCall, seen: int) -> Tensor:
    """What is added to the logits of a pass, (B|1, Hq|1, new, seen): its mask, by default that none looks ahead."""
    mask, new = call.attn_mask, call.query.shape[2]
    if mask is None:
        mask = (torch.arange(seen) <= torch.arange(seen - new, seen)[:, None])[None, None].to(call.key.device)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def _sinks(call: AttentionCall, sinks: Tensor, rows: Tensor) -> Tensor:
    """One more logit of each of these rows, (B, Hq, rows, 1), from (Hq,), (B, Hq) or (B|1, Hq|1, N|1)."""
    sinks = sinks[None, :, None] if sinks.ndim == 1 else sinks.view(-1, *sinks.shape[1:], *[1] * (3 - sinks.ndim))
    return sinks.expand(call.query.shape[:3])[:, :, rows, None]


def _output_norms(made_by: ModuleCall, chunk: slice) -> Tensor:
    """(batch, query heads, tokens of the chunk): ``‖W_o^h v_j‖``."""
    weight, values = made_by.output_weight, made_by.call.value[:, :, chunk]
    shared = len(weight) // values.shape[1]
    norms = [
        torch.linalg.vector_norm((values[:, head // shared] @ part.to(values.dtype)).float(), dim=-1)
        for head, part in enumerate(weight)  # one head at a time, as what they add is as wide as the model
    ]
    return torch.stack(norms, dim=1)


def _repeat(model: Module, cache: Any, tokens: Tensor, repetition: _Repetition) -> dict[int, Tensor]:
    """What a pass over these tokens finds, after which the cache is as it was."""
    layers = kept_layers(cache)
    seen, ids = layers[0].seen, layers[0].token_ids
    windows = {number: copy.copy(layer) for number, layer in enumerate(cache.layers) if layer not in layers}
    decoder: Any = getattr(model, "base_model", model)  # without the head, whose logits nobody asks for
    try:
        with compress(decoder, repetition):
            decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
    finally:
        for number, window in windows.items():
            cache.layers[number] = window  # what a window has lost is not brought back by taking tokens back
        for layer in layers:
            layer.crop(seen - layer.seen)
        layers[0].token_ids = ids
    return repetition.found


def kept_layers(cache: Any) -> list[KeptLayer]:
    """The layers of a cache whose entries can be dropped."""
    from regard.cache.layer import KeptLayer

    return [layer for layer in cache.layers if isinstance(layer, KeptLayer)]


def _token_ids(model: Module, ids: Tensor | None) -> Tensor:
    """The ids of a text, (batch, tokens), if it can be repeated."""
    if ids is None:
        raise ValueError(
            "the text cannot be repeated, as not all of its token ids are known: give the model all of it as input_ids, in a "
            "new cache, inside the block"
        )
    try:
        images = int(image_tokens(model)(ids).sum())
    except ValueError:  # the model reads none
        return ids
    if images:
        raise ValueError(f"the text cannot be repeated: {images} of its tokens stand for images")
    return ids


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What begins a user's turn, and what ends it and begins the answer; without a chat template nothing and a new line."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [], list(tokenizer.encode("\n", add_special_tokens=False))
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": _CONTENT}], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    before, _, after = turn.partition(_CONTENT)
    prefix, suffix = (list(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))
    return prefix, suffix
