"""Focus directions: vectors which, added to queries and keys of contextual heads, have them look at what is relevant.

    q'_i = q_i + α d_q,   k'_j = k_j + α d_k,   α = 0.2

for each of the chosen heads, after rotary positions; nobody has to say which tokens are relevant. The directions of a layer
are learned on texts where that is known: they maximize

    mean over heads and response tokens i of  Σ_{j relevant} P'_ij     (at α = 1)

by AdamW from N(0, 0.01²), the model itself unchanged. Contextual heads are those that give the most to the relevant tokens
in the first place, by `context_share` and `best_heads`.

Y. Zhu, R. Li, D. Wang, D. Haehn, X. Liang (2025), Focus Directions Make Your Language Models Pay More Attention to Relevant
Contexts.

A key direction that is added to every key moves all logits of a query alike, which no softmax notices: (q_i + d_q)·(k_j +
d_k) differs from (q_i + d_q)·k_j by a term without j. In the authors' code it is added to every key, so that only d_q does
anything. So it is here by default, and d_k, which would cost a decoding step many times its price, is not added; ``keys=``
restricts it, to all but the sink say, and then it counts. Left out: the automatic choice of α of a later version of the
paper, whose code is not public. The authors' code trains for 3 epochs of its own texts; here 10 are the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import AttentionMap
from regard.runtime import AttentionCall
from regard.steer import steer
from regard.steer.add import AddToKey, AddToQuery
from regard.steer.custom import Custom
from regard.steer.language.example import Example, Progress, highlighted, next_logits
from regard.steer.language.heads import Head, only
from regard.tokens import Where, resolve


@dataclass(frozen=True)
class FocusDirections:
    """Directions by layer, (heads, head_dim) each, and the keys that they were learned to be added to.

    >>> directions = FocusDirections({0: torch.ones(2, 4)}, {0: torch.zeros(2, 4)})
    >>> [type(edit).__name__ for edit in directions.edits(by=0.5, heads=[(0, 1)])]
    ['AddToQuery']
    """

    query: dict[int, Tensor]
    key: dict[int, Tensor]
    keys: Where | None = field(default=None)

    def edits(self, by: float = 0.2, heads: Sequence[Head] | None = None) -> tuple[AddToQuery | AddToKey, ...]:
        """The edits that add α = ``by`` times the directions; of keys only where ``keys`` says which, for all feel none.

        Args:
            by: α; below 0 to have heads look away.
            heads: the contextual heads, pairs (layer, head); every head of the layers learned by default.

        Raises:
            ValueError: heads of a layer that has no directions.
        """
        everything = {layer: list(range(len(direction))) for layer, direction in self.query.items()}
        chosen = everything if heads is None else only(heads)["heads"]
        made: list[AddToQuery | AddToKey] = []
        for layer, numbers in chosen.items():
            if layer not in self.query:
                raise ValueError(f"directions are known for the layers {sorted(self.query)}, not for layer {layer}")
            made.append(AddToQuery(by * self.query[layer], layers=layer, heads=numbers))
            if self.keys is not None:
                made.append(AddToKey(by * self.key[layer], self.keys, layers=layer, heads=numbers))
        return tuple(made)


def learn_focus_directions(
    model: Module,
    examples: Sequence[Example],
    epochs: int = 10,
    learning_rate: float = 1e-3,
    keys: Where | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FocusDirections:
    """Learn the directions of all heads, layer by layer, on the model's own queries and keys.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with ``highlighted`` positions, the relevant ones, and the ``response`` that should look there.
        epochs: how often each example is used.
        learning_rate: of AdamW.
        keys: the keys that d_k is added to; all by default, which leaves it without effect.
        layers: numbers of the attention calls to learn for; all by default.
        seed: of the directions to start with.
        progress: called with the number of steps done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> directions = learn_focus_directions(model, [Example([3, 4, 5, 6], highlighted=[1])], epochs=1)
    >>> directions.query[1].shape
    torch.Size([2, 8])
    """
    if not examples:
        raise ValueError("no examples were given")
    learned = _Directions(learning_rate, keys, seed)
    total, done = epochs * len(examples), 0
    for _ in range(epochs):
        for example in examples:
            learned.step(_calls(model, example, layers), example)
            done += 1
            if progress is not None:
                progress(done, total)
    query, key = ({layer: pair[part].detach() for layer, pair in learned.pairs.items()} for part in (0, 1))
    return FocusDirections(query, key, keys)


class _Directions:
    """Directions on their way, a pair (query, key) for each layer, with an optimizer of their own."""

    def __init__(self, learning_rate: float, keys: Where | None, seed: int) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._optimizers: dict[int, torch.optim.AdamW] = {}
        self._learning_rate, self._keys = learning_rate, keys
        self._random = torch.Generator().manual_seed(seed)

    def step(self, calls: Sequence[AttentionCall], example: Example) -> None:
        """One step of every layer."""
        for call in calls:
            if call.place.layer not in self.pairs:
                self._begin(call)
            optimizer = self._optimizers[call.place.layer]
            optimizer.zero_grad()
            with torch.enable_grad():
                (-self._share(call, example)).backward()
            optimizer.step()

    def _begin(self, call: AttentionCall) -> None:
        shape = (call.query.shape[1], call.query.shape[3])
        query, key = (
            torch.normal(0.0, 0.01, shape, generator=self._random).to(call.query.device).requires_grad_()
            for _ in range(2)
        )
        self.pairs[call.place.layer] = query, key
        self._optimizers[call.place.layer] = torch.optim.AdamW([query, key], lr=self._learning_rate)

    def _share(self, call: AttentionCall, example: Example) -> Tensor:
        """What the heads give to the relevant tokens with the directions added, on the mean over response tokens."""
        every = torch.ones(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        query, key = self.pairs[call.place.layer]
        moved = AddToKey(key, self._keys).apply(AddToQuery(query).apply(call, every), every)
        attention = AttentionMap(
            moved.query, moved.key, moved.attn_mask, moved.is_causal, moved.scale, moved.enable_gqa
        )
        relevant = resolve(highlighted(example), 0, len(example))[0]
        response = resolve(example.response, 0, len(example))[0].nonzero().flatten()
        return attention.mass({"relevant": relevant})[:, :, response.to(call.query.device)].mean()


def _calls(model: Module, example: Example, layers: Sequence[int] | None) -> list[AttentionCall]:
    """The attention calls of one run of the model, as they are."""
    calls: list[AttentionCall] = []

    def keep(call: AttentionCall, heads: Tensor) -> AttentionCall:
        calls.append(call.to(torch.promote_types(call.query.dtype, torch.float32)))
        return call

    with torch.no_grad(), steer(model, Custom(keep, layers=layers)):
        next_logits(model, example.token_ids)
    return calls
