"""Packed texts are as each is by itself."""

import pytest
import torch

import regard
from regard.mixers import DeltaRule, Mixer, catalogue

NAMES = sorted(catalogue.mixers())
LENGTHS, MORE = [7, 1, 23], [4, 9, 1]


def made(name: str) -> Mixer:
    torch.manual_seed(0)
    return catalogue.mixers()[name](16).eval()


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("name", NAMES)
def test_as_text_by_text(name: str) -> None:
    mixer, x, more = made(name), torch.randn(1, sum(LENGTHS), 16), torch.randn(1, sum(MORE), 16)
    y, state = mixer(x, cu_seqlens=borders(LENGTHS))
    rest, _ = mixer(more, state, cu_seqlens=borders(MORE))
    assert state.texts == 3
    parts = [tensor.split(lengths, 1) for tensor, lengths in ((x, LENGTHS), (y, LENGTHS), (more, MORE), (rest, MORE))]
    for text, output, following, outcome in zip(*parts, strict=True):
        alone, own = mixer(text)
        torch.testing.assert_close(output, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outcome, mixer(following, own)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_crosses_a_border(name: str) -> None:
    x = torch.randn(1, sum(LENGTHS), 16, requires_grad=True)
    y, _ = made(name)(x, cu_seqlens=borders(LENGTHS))
    slope = torch.autograd.grad(y[:, 8:].square().sum(), x)[0]
    assert not slope[:, :8].any()
    assert slope[:, 8:].any()


def test_watched() -> None:
    mixer, x = DeltaRule(16, heads=2), torch.randn(1, sum(LENGTHS), 16)
    with torch.no_grad(), regard.watch(mixer, regard.Received()) as seen:
        mixer(x, cu_seqlens=borders(LENGTHS))
    received = torch.as_tensor(seen.dataset().received.values[0])
    torch.testing.assert_close(received[2], mixer.map(x[:, 8:]).dense().sum(2)[0], atol=1e-5, rtol=1e-4)
    assert not received[0, :, 7:].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([0, 3, 6]), r"rise from 0 to their number, got x of \(1, 5, 16\) and borders \[0, 3, 6\]"),
        (torch.tensor([0, 3, 3, 5]), r"borders \[0, 3, 3, 5\]"),
        (torch.tensor([1, 5]), r"borders \[1, 5\]"),
        (torch.tensor([0.0, 5.0]), r"must be a vector of whole numbers, got torch.float32 \(2,\)"),
    ],
)
def test_borders_that_do_not_fit(given: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("DeltaRule")(torch.randn(1, 5, 16), cu_seqlens=given)


def test_packed_texts_have_no_padding() -> None:
    mixer, x = made("DeltaRule"), torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match="DeltaRule takes a mask or cu_seqlens, got both"):
        mixer(x, mask=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"was given 2 texts, and a state of 1"):
        mixer(x, mixer(x)[1], cu_seqlens=torch.tensor([0, 2, 5]))
