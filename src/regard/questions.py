"""What a report asks of attention, by what the tokens are that it goes between."""

from __future__ import annotations

import torch

from regard.inputs import Part, Picture, Tokens
from regard.watch import At, Entropy, GridDistance, Mass, MeanDistance, Pooled, Received, Statistic

NEAR = 8
"""Attention to each token at most so far away is asked for on its own."""
BLOCKS = 64
"""The picture of a map has about so many blocks on a side."""
NEIGHBOURS = {
    "upper left": (-1, -1), "above": (-1, 0), "upper right": (-1, 1), "left": (0, -1), "right": (0, 1),
    "lower left": (1, -1), "below": (1, 0), "lower right": (1, 1),
}  # fmt: skip
"""The patches around one, by how many rows below and columns to the right of it they are."""


def questions(part: Part) -> list[Statistic]:
    """The statistics that make sense of a part, all answered in one pass.

    Where words look at words there is an order, and there are repetitions; where patches look at patches there is a
    grid; from one sequence to another there is neither.
    """
    blocks = (-(-len(tokens) // BLOCKS) for tokens in (part.queries, part.keys))
    asked: list[Statistic] = [Entropy(), Received(), Pooled(*blocks)]
    if segments := _segments(part.keys):
        asked.append(Mass(segments))
    if part.queries is not part.keys:
        return asked
    if part.keys.ordered:
        asked += _in_order(part.keys)
    elif part.keys.picture is not None:
        asked += _on_the_grid(part.keys.picture, len(part.keys))
    return asked


def _segments(keys: Tokens) -> dict[str, list[int]]:
    """The tokens that stand for nothing, as the sink, and the named stretches."""
    sink = keys.special.clone()
    sink[0] |= keys.words  # models of texts without special tokens make their first token the sink
    own = {"sink": sink.nonzero()[:, 0].tolist()} if sink.any() else {}
    return own | {name: list(positions) for name, positions in keys.segments.items()}


def _in_order(tokens: Tokens) -> list[Statistic]:
    offsets: dict[str, int | str] = {f"{offset:+d}": offset for offset in range(-NEAR, NEAR + 1) if abs(offset) > 1}
    repeated: dict[str, int | str] = {"induction": "repeated", "retrieval": "retrieval"} if tokens.words else {}
    # By name: the tokens of an image have one id in common, and are no repetition.
    numbers = {name: number for number, name in enumerate(tokens.names)}
    ids = torch.tensor([[numbers[name] for name in tokens.names]])
    return [At("previous", "own", "next", targets=dict(repeated | offsets), token_ids=ids), MeanDistance()]


def _on_the_grid(picture: Picture, tokens: int) -> list[Statistic]:
    around = {name: picture.shifted(down, across, tokens) for name, (down, across) in NEIGHBOURS.items()}
    own = picture.shifted(0, 0, tokens)
    return [At(targets={"own patch": own, **around}), GridDistance(picture.coordinates(tokens))]
