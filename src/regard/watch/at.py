"""Attention to one chosen key per query: the previous token, the token itself, an induction target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.statistic import Statistic

Target = int | str | Tensor
_OFFSETS = {"previous": -1, "own": 0, "next": 1}


class At(Statistic):
    """``P[i, target(i)]``: ``at(layer, batch, head, query, target)``; NaN where a query has no target.

    Args:
        targets: names, or names with what they mean: an offset to the query's position, a tensor (tokens,) or
            (batch, tokens) of key positions by query position (−1 for none), or one of the known names: "previous" (−1),
            "own" (0), "next" (+1), and from the token ids that the model was given: "induction", the token after the last
            earlier occurrence of the query's own token; "repeated", the same where that token does come next again;
            "retrieval", the token that comes next, in the last earlier passage where the same three tokens come next, where
            induction would tell another token; "induction by chance" and "retrieval by chance", tokens at the distances of
            these targets, dealt anew among the queries that have one: what a head gives there, it gives to the distance.
        token_ids: (batch, tokens), for those in a model that is not given ``input_ids``.
        name: of the variable.

    Raises:
        ValueError: a target that needs token ids without them.

    The induction target is that of C. Olsson et al. (2022), In-context Learning and Induction Heads; heads that look at
    the token to be copied out of a long text are those of W. Wu et al. (2024), Retrieval Head Mechanistically Explains
    Long-Context Factuality.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.At("previous", "own", two_back=-2)) as seen:
    ...     _ = layer(x, x, x)
    >>> seen.dataset().target.values.tolist()
    ['previous', 'own', 'two_back']
    """

    dims = ("query", "target")

    def __init__(
        self,
        *names: str,
        targets: Mapping[str, Target] | None = None,
        token_ids: Tensor | None = None,
        name: str = "at",
        **more: Target,
    ) -> None:
        self.targets: dict[str, Target] = {known: known for known in names} | dict(targets or {}) | more
        self.token_ids = token_ids
        self.name = name
        known = (*_OFFSETS, *_BY_TOKENS)
        for target in self.targets.values():
            if isinstance(target, str) and target not in known:
                raise ValueError(f"At knows the targets {', '.join(known)}, got {target!r}; or pass an offset")
        if not self.targets:
            raise ValueError('At needs a target, such as At("previous") or At(two_back=-2)')

    def measure(self, attention: TokenMap, call: Call) -> Tensor:
        """(B, H, N, targets)."""
        *sizes, keys = attention.shape
        found = torch.full((*sizes, len(self.targets)), torch.nan, dtype=attention.dtype, device=attention.device)
        offsets = {
            n: offset for n, target in enumerate(self.targets.values()) if (offset := _offset(target)) is not None
        }
        if offsets:
            found[..., list(offsets)] = self._at_offsets(list(offsets.values()), attention, call)
        for number, target in enumerate(self.targets.values()):
            if isinstance(target, int) or number in offsets:
                continue
            place = self._keys(target, attention, call) - call.place.key_start
            place = place.masked_fill((place < 0) | (place >= keys), -1)
            nothing = (place < 0).reshape(-1, 1, place.shape[-1])
            found[..., number] = attention.at(place).masked_fill(nothing, torch.nan)
        return found

    def _at_offsets(self, offsets: list[int], attention: TokenMap, call: Call) -> Tensor:
        """(B, H, N, offsets); the query at i of the call stands at ``i + start`` among its keys."""
        start = call.place.query_start - call.place.key_start
        every = torch.arange(start, start + attention.shape[2], device=attention.device)
        keys = every[:, None] + torch.tensor(offsets, device=attention.device)
        shares = attention.diagonals([start + offset for offset in offsets])
        return shares.masked_fill((keys < 0) | (keys >= attention.shape[3]), torch.nan)

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """The targets' names."""
        return {"target": list(self.targets)}

    def _keys(self, target: str | Tensor, attention: TokenMap, call: Call) -> Tensor:
        """The key position that each query of the call has for its target, (N,) or (B, N); before the text for none."""
        start, queries = call.place.query_start, attention.shape[2]
        if isinstance(target, str):
            ids = self._ids(attention, call, target)
            target = torch.full((start + queries,), -1) if ids is None else _BY_TOKENS[target](ids)
        keys = target[..., start : start + queries].to(attention.device)
        keys = functional.pad(keys, (0, queries - keys.shape[-1]), value=-1)
        return keys.masked_fill(keys < 0, call.place.key_start - 1)

    def _ids(self, attention: TokenMap, call: Call, target: str) -> Tensor | None:
        """Ids of the tokens up to the call's last query; None where its queries are not the tokens (image patches, say)."""
        batch, end = attention.shape[0], call.place.query_start + attention.shape[2]
        if self.token_ids is not None:
            ids = self.token_ids.reshape(-1, self.token_ids.shape[-1])[:, :end]
        elif call.place.token_ids is not None:
            ids = call.place.token_ids
        else:
            raise ValueError(
                f'At("{target}") needs token ids, and the model was given no input_ids; pass At(..., token_ids=ids)'
            )
        return ids if ids.shape[1] == end and ids.shape[0] in (1, batch) else None


def _offset(target: Target) -> int | None:
    """How far from its query a target is, where that is the same for all."""
    return _OFFSETS.get(target) if isinstance(target, str) else None if isinstance(target, Tensor) else target


def induction_targets(ids: Tensor) -> Tensor:
    """For each token the position after its last earlier occurrence, −1 where it occurs for the first time.

    >>> import torch
    >>> induction_targets(torch.tensor([[5, 7, 5, 9, 7, 5]]))
    tensor([[-1, -1,  1, -1,  2,  3]])
    """
    # Sorted by token and, within it, by position, each occurrence stands right behind the one before it.
    order = torch.argsort(ids, dim=1, stable=True)
    in_order = ids.gather(1, order)
    targets = torch.full_like(order, -1)
    same = in_order[:, 1:] == in_order[:, :-1]
    targets[:, 1:] = torch.where(same, order[:, :-1] + 1, -1)
    return torch.empty_like(order).scatter_(1, order, targets)


def repeated_targets(ids: Tensor) -> Tensor:
    """The induction targets of the tokens whose next token is the one that induction tells, −1 for the others.

    >>> import torch
    >>> repeated_targets(torch.tensor([[5, 7, 5, 9, 5, 9]]))
    tensor([[-1, -1, -1, -1,  3, -1]])
    """
    targets = induction_targets(ids)
    return targets.masked_fill(~_tells(targets, ids), -1)


def retrieval_targets(ids: Tensor) -> Tensor:
    """For each token the earlier position of the one that comes next, −1 where nothing is copied or induction tells it.

    What comes next is a copy where the next three tokens were said before, in this order; the last such passage counts.

    >>> import torch
    >>> retrieval_targets(torch.tensor([[1, 5, 6, 7, 1, 8, 3, 1, 5, 6, 7]]))
    tensor([[-1, -1, -1, -1, -1, -1, -1,  1, -1, -1, -1]])
    """
    targets = torch.full_like(ids, -1)
    if ids.shape[1] > 3:
        kinds, numbers = torch.unique(ids, return_inverse=True)
        following = (numbers[:, 1:-2] * len(kinds) + numbers[:, 2:-1]) * len(kinds) + numbers[:, 3:]
        targets[:, :-3] = induction_targets(following)
    return targets.masked_fill(_tells(induction_targets(ids), ids), -1)


def by_chance(targets: Tensor) -> Tensor:
    """Other targets at the same distances: each query that has one takes the distance of another, −1 where that is too far.

    >>> import torch
    >>> by_chance(torch.tensor([[-1, -1, 1, -1, 2, 3]]))
    tensor([[-1, -1,  0, -1,  3,  3]])
    """
    dealt = torch.full_like(targets, -1)
    generator = torch.Generator().manual_seed(0)
    for row, own in zip(dealt, targets, strict=True):
        queries = (own >= 0).nonzero().squeeze(1)
        distances = (queries - own[queries])[torch.randperm(len(queries), generator=generator).to(own.device)]
        row[queries] = (queries - distances).clamp(min=-1)
    return dealt


def _tells(targets: Tensor, ids: Tensor) -> Tensor:
    """Whether the token at each target is the one that comes next."""
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1)
    return (targets >= 0) & (ids.gather(1, targets.clamp(min=0)) == following)


_BY_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "induction": induction_targets,
    "repeated": repeated_targets,
    "retrieval": retrieval_targets,
    "induction by chance": lambda ids: by_chance(induction_targets(ids)),
    "retrieval by chance": lambda ids: by_chance(retrieval_targets(ids)),
}
