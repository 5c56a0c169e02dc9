"""What each edit means, on the stored matrix in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import regard
from regard.steer import Captured, Edit


@dataclass
class Dense:
    """One call's logits, and what is done after the softmax."""

    logits: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        self.factor = torch.ones_like(self.logits)
        self.own = torch.zeros_like(self.logits[..., :1], dtype=torch.bool)
        self.gate = torch.ones_like(self.logits[..., :1])
        self.added = torch.zeros((), dtype=self.values.dtype)
        self.hidden = self.logits.isneginf()

    def probabilities(self) -> Tensor:
        blind = self.logits.isneginf().all(-1, keepdim=True)
        return torch.softmax(self.logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)

    def output(self) -> Tensor:
        identity = torch.eye(*self.logits.shape[-2:], dtype=torch.float64)
        matrix = torch.where(self.own, identity, self.probabilities() * self.factor)
        return matrix @ self.values * self.gate + self.added

    def apply(self, edit: Edit) -> None:
        heads = torch.zeros(self.logits.shape[1], dtype=torch.bool)
        heads[slice(None) if edit.heads is None else edit.heads] = True
        queries = picked(getattr(edit, "queries", None), self.logits.shape[2])
        rows = heads[:, None, None] & queries[:, None]
        both = rows
        if hasattr(edit, "keys"):
            both = rows & picked(edit.keys, self.logits.shape[3])
        if isinstance(edit, regard.Reweight) and not edit.renormalize:
            self.factor = torch.where(both, self.factor * strength(edit.by), self.factor)
        elif isinstance(edit, regard.Reweight):
            self.logits = torch.where(both, self.logits + strength(edit.by).log(), self.logits)
        elif isinstance(edit, regard.Block):
            self.logits = self.logits.masked_fill(both, -math.inf)
        elif isinstance(edit, regard.Restrict):
            visible = edit.mask.dense(1, 1, *self.logits.shape[2:])
            self.logits = self.logits.masked_fill(heads[:, None, None] & ~visible, -math.inf)
        elif isinstance(edit, regard.Bias):
            self.logits = torch.where(both, self.logits + strength(edit.by), self.logits)
        elif isinstance(edit, regard.Temperature):
            self.logits = torch.where(rows, self.logits / strength(edit.by), self.logits)
        elif isinstance(edit, regard.Gate):
            self.gate = torch.where(rows, self.gate * strength(edit.by), self.gate)
            self.added = torch.where(rows, self.added * strength(edit.by), self.added)
        elif isinstance(edit, regard.AddToOutput):
            self.added = torch.where(rows, self.added + direction(edit), self.added)
        elif isinstance(edit, regard.AddToValue):
            chosen = heads[:, None, None] & picked(edit.keys, self.values.shape[2])[:, None]
            self.values = torch.where(chosen, self.values + direction(edit), self.values)
        elif isinstance(edit, regard.PatchOutput):
            self.gate = torch.where(rows, 0.0, self.gate)
            self.added = torch.where(rows, only(edit.source).output.double(), self.added)
        elif isinstance(edit, regard.PatchMap):
            call = only(edit.source).call
            theirs = dense(call.query, call.key, call.value, call.attn_mask, call.is_causal, [])[0]
            self.own = self.own & ~rows
            self.logits = torch.where(rows, theirs.log(), self.logits)
            self.hidden = torch.where(rows, theirs == 0, self.hidden)
        elif isinstance(edit, regard.ReplaceMap) and edit.kind == "identity":
            self.own = self.own | rows
        elif isinstance(edit, regard.ReplaceMap):
            self.own = self.own & ~rows
            self.logits = torch.where(
                rows, torch.zeros_like(self.logits).masked_fill(self.hidden, -math.inf), self.logits
            )
        elif isinstance(edit, regard.Redistribute):
            self._redistribute(edit, rows)
        else:
            raise TypeError(edit)

    def _redistribute(self, edit: regard.Redistribute, rows: Tensor) -> None:
        matrix, share = self.probabilities(), strength(edit.share)
        source, target = (picked(where, matrix.shape[3]) for where in (edit.source, edit.target))
        taken = matrix[..., source].sum(-1, keepdim=True) * share
        there = matrix[..., target].sum(-1, keepdim=True)
        moved = torch.where(source, matrix * (1 - share), torch.where(target, matrix * (1 + taken / there), matrix))
        self.logits = torch.where(rows & (there > 0), moved, matrix).log()


def strength(by: object) -> Tensor:
    """(1 or heads, 1, 1)."""
    return torch.as_tensor(by, dtype=torch.float64).reshape(-1, 1, 1)


def direction(edit: regard.AddToValue | regard.AddToOutput) -> Tensor:
    """(1 or heads, 1, width)."""
    given = torch.as_tensor(edit.direction).double()
    return given.reshape(-1, 1, given.shape[-1])


def only(source: regard.capture) -> Captured:
    return source.at(source.paths[0])


def picked(where: object, length: int) -> Tensor:
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[list(range(length)[where]) if isinstance(where, slice) else slice(None) if where is None else where] = True
    return chosen


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, edits: Sequence[Edit]
) -> tuple[Tensor, Tensor]:
    """(P, output) after the edits."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(t.double().repeat_interleave(groups, 1) for t in (key, value))
    logits = query.shape[-1] ** -0.5 * query @ key.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    edited = Dense(logits, value)
    for edit in edits:
        edited.apply(edit)
    return edited.probabilities(), edited.output()
