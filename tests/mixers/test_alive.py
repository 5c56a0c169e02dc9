"""What was read a moment ago has an effect, however long the text, and what was read long ago none that grows."""

from functools import cache

import pytest
import torch
from torch import Tensor

from regard.mixers import Design, Huber, Memory, Miras, Mixer, catalogue

DIM = 64
REACH = [1, 5, 8, 15]
CASES = [
    (name, before)
    for name, kind in sorted(catalogue.mixers().items())
    for before in ((1000, 4096) if "N²" in kind.facts.time else (1000, 4096, 16384))
]
MEMORIES = ["LongTermMemory", "Memora", "MemoryAsContext", "MemoryAsGate", "MemoryAsLayer", "Miras", "Moneta", "Yaad"]


def made(name: str) -> Mixer:
    torch.manual_seed(0)
    return catalogue.mixers()[name](DIM).eval()


def slopes(mixer: Mixer, before: int, tokens: int) -> Tensor:
    """Of the last token's output by each of the last tokens, ``|∂y / ∂x_j|`` (tokens,), after others: exact, from a state."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, before + tokens, DIM, generator=generator)
    with torch.no_grad():
        state = mixer(x[:, :before])[1] if before else None
    last = x[:, before:].requires_grad_()
    y = mixer(last, state)[0][0, -1]
    seen = [torch.autograd.grad(y @ direction, last, retain_graph=True)[0] for direction in directions(generator)]
    return torch.stack(seen).square().sum((0, 1, 3)).sqrt()


def directions(generator: torch.Generator) -> Tensor:
    return torch.randn(4, DIM, generator=generator) / 2


@cache
def influence(name: str, before: int) -> Tensor:
    """Of the tokens that are so far back."""
    return slopes(made(name), before, max(REACH) + 1).flip(0)[REACH]


@pytest.mark.parametrize(("name", "before"), CASES)
def test_recent_tokens_have_an_effect(name: str, before: int) -> None:
    """No less than a fair share of it among all tokens, as in softmax attention, where each has 1 / N of the first's."""
    share = influence(name, before) / influence(name, 0)
    assert (share > 4 / before).all(), share


@pytest.mark.parametrize("before", [1000, 4096, 16384])
@pytest.mark.parametrize("name", MEMORIES)
def test_memories_are_as_alive_as_the_delta_rule(name: str, before: int) -> None:
    share = influence(name, before).mean() / influence("DeltaRule", before).mean()
    assert share > 0.02


@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_through_many_tokens_do_not_explode(name: str) -> None:
    assert slopes(made(name), 0, 2048).max() < 20


def test_every_design_is_alive() -> None:
    for design in (Design(Memory(3, 2), momentum=True), Design(Memory(2, 1), Huber())):
        torch.manual_seed(0)
        mixer = Miras(DIM, 4, design)
        assert (slopes(mixer, 4096, 16).flip(0)[REACH] > 1e-3).all()
