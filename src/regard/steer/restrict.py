"""Hide pairs of tokens by a rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from regard.masks import Mask, Tiles, Tiling
from regard.masks.tiles import known
from regard.runtime import AttentionCall
from regard.steer.edit import Edit


@dataclass(frozen=True, repr=False)
class Restrict(Edit):
    """``s'_ij = −∞`` for the pairs that a rule does not show: a window, documents, blocks, or any mask of `regard.masks`.

    Only tiles with a visible pair are visited: with a window of w the attention of a text of N tokens costs N·w. What
    the model hides stays hidden. A query that is left with no key gets zeros.

    Args:
        mask: the rule, on positions in the text.

    Raises:
        TypeError: ``mask`` is no rule.
        ValueError: a rule that is not defined for as many tokens, as documents of other lengths; a model that computes its
            softmax itself, whose logits are stored anyway: use `Block` there.

    A window with the first tokens in sight is that of G. Xiao et al. (2024), Efficient Streaming Language Models with
    Attention Sinks.

    >>> import torch, regard
    >>> from regard import masks
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 5, 4)
    >>> with regard.steer(None, regard.Restrict(masks.window(left=1, right=0) | masks.keys([0]))):
    ...     attention(q, k, torch.eye(5)[None, None], is_causal=True)[0, 0, 2:]
    tensor([[0.3333, 0.3333, 0.3333, 0.0000, 0.0000],
            [0.3333, 0.0000, 0.3333, 0.3333, 0.0000],
            [0.3333, 0.0000, 0.0000, 0.3333, 0.3333]])
    """

    mask: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise TypeError(
                f"Restrict takes a rule of regard.masks, such as masks.window(left=255, right=0), got "
                f"{type(self.mask).__name__}; a function goes through masks.from_mask_mod, positions into Block"
            )

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """The rule beside the call's own, for the chosen heads."""
        call.require_queries("Restrict")
        key = ("rule", id(self), id(heads), call.place.query_start, call.place.key_start)
        rule, *_ = call.place.remember(key, lambda: (self._rule(call, heads), self, heads))
        return replace(call, rule=rule if call.rule is None else call.rule & rule)

    def _rule(self, call: AttentionCall, heads: Tensor) -> Mask:
        rule = self.mask.to(call.query.device).offset(call.place.query_start, call.place.key_start)
        return rule if len(heads) == 1 else rule | ~_OfHeads(heads)


@dataclass(frozen=True, eq=False)
class _OfHeads(Mask):
    """Everything, in the chosen heads."""

    chosen: Tensor

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the head was chosen."""
        return self.chosen[head]

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """Full or empty."""
        chosen = self.chosen[tiling.head]
        return known(chosen, chosen, certain=True)
