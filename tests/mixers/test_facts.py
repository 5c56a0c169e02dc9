"""What the facts of a mixer claim, its layer can do."""

import inspect
import re
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import regard
from regard.mixers import Layout, Mixer, SoftmaxAttention, ValueMixer, catalogue
from regard.mixers.mixer import join_heads, split_heads

KINDS = catalogue.mixers()
BOTH_WAYS = [name for name, kind in sorted(KINDS.items()) if kind.facts.bidirectional]
CROSS = [name for name, kind in sorted(KINDS.items()) if kind.facts.cross]
EXACT = [name for name, kind in sorted(KINDS.items()) if kind.facts.exact]


def made(name: str, **arguments: object) -> Mixer:
    torch.manual_seed(0)
    return KINDS[name](16, **arguments).eval()


def influence(y: Tensor, x: Tensor) -> Tensor:
    """Of each token (tokens,) on this output."""
    return torch.autograd.grad(y.square().sum(), x)[0].abs().amax((0, 2))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_causal(name: str) -> None:
    assert KINDS[name].facts.causal
    x = torch.randn(1, 30, 16, requires_grad=True)
    found = influence(made(name)(x)[0][:, 19], x)
    assert not found[20:].any()
    assert found[19] > 0


@pytest.mark.parametrize("name", sorted(KINDS))
def test_bidirectional_is_claimed_where_it_can_be_asked_for(name: str) -> None:
    asked = "causal" in inspect.signature(KINDS[name]).parameters
    assert KINDS[name].facts.bidirectional == asked


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional(name: str) -> None:
    x = torch.randn(2, 30, 16, requires_grad=True)
    mixer = made(name, causal=False)
    y, state = mixer(x)
    assert (influence(y[:, 3], x) > 0).all()
    with torch.no_grad():
        longer = mixer(torch.cat([x] * 40, dim=1))[0]  # more than one piece
        assert not torch.allclose(longer[:, :30], y)
    with pytest.raises(ValueError, match=rf"{name}\(causal=False\) goes on from no state"):
        mixer(x, state)
    with pytest.raises(NotImplementedError, match=rf"{name}\(causal=False\) is no dynamical system"):
        mixer.system(x)


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("left", [True, False])
def test_bidirectional_beside_padding(name: str, left: bool) -> None:
    mixer, x = made(name, causal=False), torch.randn(2, 20, 16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, slice(None, 4) if left else slice(-4, None)] = False
    found, _ = mixer(x, mask=mask)
    alone, _ = mixer(x[1:, mask[1]])
    torch.testing.assert_close(found[1:, mask[1]], alone, atol=1e-5, rtol=1e-4)
    assert not found[1, ~mask[1]].any()
    torch.testing.assert_close(found[0], mixer(x[:1])[0][0], atol=1e-5, rtol=1e-4)


def numbers_of(formula: str, letters: dict[str, int]) -> float:
    """A formula of `Facts.state`, as far as its first comma or word."""
    text = re.match(r"[\dA-Z²³()/+− ]+", formula)
    assert text is not None
    plain = text[0].replace("−", "-").replace("²", "**2").replace("³", "**3").strip()
    plain = re.sub(r"(?<=[\dA-Z)])\s*(?=[(A-Z])", "*", plain)  # what stands side by side is multiplied
    return float(eval(plain, {}, letters))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_state_is_as_large_as_claimed(name: str) -> None:
    mixer, width, tokens = KINDS[name](512).eval(), 512, 130
    letters = {"N": tokens, "D": width, "H": 4, "K": 4, "W": 64, "C": 64, "F": 16, "S": 16, "M": 8, "E": 8}
    if name == "LongVQ":
        letters |= {"S": 64, "W": 32}
    if "F = D/H" in mixer.facts.state:
        letters["F"] = width // letters["H"]
    with torch.no_grad():
        _, state = mixer(torch.randn(1, tokens, width))
    counted = sum(tensor[0].numel() for name, tensor in state.tensors.items() if tensor.dtype != torch.bool)
    claimed = numbers_of(mixer.facts.state, letters)
    assert counted == pytest.approx(claimed, abs=4), (counted, claimed)  # positions are counted in a few numbers


@pytest.mark.parametrize("name", CROSS)
def test_cross(name: str) -> None:
    """Each query sees all of the context, nothing of its own text; decoding goes on with the first call's context."""
    mixer, x, context = made(name), torch.randn(2, 7, 16), torch.randn(2, 12, 16, requires_grad=True)
    y, state = mixer(x, context=context)
    assert (influence(y[:, 3], context) > 0).all()
    alone, _ = mixer(x[:, 3:4], context=context)
    torch.testing.assert_close(alone, y[:, 3:4], atol=1e-5, rtol=1e-4)
    step, after = mixer.decode(x[:, 3], state)
    torch.testing.assert_close(step, y[:, 3], atol=1e-5, rtol=1e-4)
    assert (after.seen, after.bytes) == (8, state.bytes)
    both_ways = made(name, causal=False)
    torch.testing.assert_close(both_ways(x, context=context)[0], y)


@pytest.mark.parametrize("name", CROSS)
def test_cross_by_its_map(name: str) -> None:
    mixer, x, context = made(name), torch.randn(2, 7, 16), torch.randn(2, 12, 16)
    assert isinstance(mixer, ValueMixer)
    found = mixer.map(x, context=context)
    assert found.shape == (2, 4, 7, 12)
    projected = mixer.project(x, None, Layout(context=context, causal=False, cross=True))
    y, _ = mixer(x, context=context)
    torch.testing.assert_close(mixer.out(found @ projected.value, projected), y, atol=1e-5, rtol=1e-4)
    mask = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    with torch.no_grad(), regard.watch(mixer, regard.Received()) as seen:
        mixer(x, mask=mask, context=context)
    expected = (found.dense() * mask[:, None, :, None]).sum(2)
    if name.endswith("SoftmaxAttention"):  # SDPA, which knows nothing of queries that are padding
        expected = mixer.map(x * mask[..., None], context=context).dense().sum(2)
    torch.testing.assert_close(
        torch.as_tensor(seen.dataset().received.values[0]), expected.detach(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("left", [True, False])
def test_cross_beside_padding(name: str, left: bool) -> None:
    mixer, x, context = made(name), torch.randn(2, 7, 16), torch.randn(2, 12, 16)
    mask, real = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    mask[1, slice(None, 2) if left else slice(-2, None)] = False
    real[1, slice(None, 4) if left else slice(-4, None)] = False
    found, state = mixer(x, mask=mask, context=context, context_mask=real)
    alone, _ = mixer(x[1:, mask[1]], context=context[1:, real[1]])
    torch.testing.assert_close(found[1:, mask[1]], alone, atol=1e-5, rtol=1e-4)
    assert not found[1, ~mask[1]].any()
    step, _ = mixer.decode(x[:, -1], state.reorder(torch.tensor([1, 1])))
    expected, _ = mixer(x[:, -1:], context=context[[1, 1]][:, real[1]])
    torch.testing.assert_close(step, expected[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CROSS)
def test_cross_in_pieces(name: str) -> None:
    mixer, x, context = made(name), torch.randn(2, 40, 16), torch.randn(2, 12, 16, requires_grad=True)
    whole = mixer(x, context=context)[0]
    (wanted,) = torch.autograd.grad(whole.square().sum(), context)
    with patch.multiple("regard.mixers.mixer", _PIECE=8, _TRAINED=8, _SMALLEST_PIECE=8):
        pieces = mixer(x, context=context)[0]
        with torch.no_grad():
            torch.testing.assert_close(mixer(x, context=context)[0], whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(pieces.square().sum(), context)[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["SoftmaxAttention", "ChunkedSoftmaxAttention"])
def test_exact_of_a_context(name: str) -> None:
    mixer, x, context = made(name), torch.randn(2, 7, 16), torch.randn(2, 12, 16)
    query, key, value = (split_heads(part, 4) for part in (
        mixer.q_proj(x), mixer.k_proj(context), mixer.v_proj(context)
    ))  # fmt: skip
    expected = mixer.o_proj(join_heads((query @ key.mT / 2).softmax(-1) @ value))
    torch.testing.assert_close(mixer(x, context=context)[0], expected, atol=1e-5, rtol=1e-4)


def test_contexts_that_do_not_fit() -> None:
    mixer, x, context = made("SoftmaxAttention"), torch.randn(2, 7, 16), torch.randn(2, 12, 16)
    _, state = mixer(x, context=context)
    _, own = mixer(x)
    for arguments, message in (
        ({"context": context[:1]}, r"a context of shape \(2, tokens, 16\).*got \(1, 12, 16\)"),
        ({"context_mask": torch.ones(2, 12).bool()}, "a context_mask and no context"),
        ({"context": context, "context_mask": torch.ones(2, 12)}, r"context_mask of shape \(2, 12\), got torch.float32"),
        ({"context": context, "context_mask": torch.arange(2)[:, None].expand(-1, 12) < 1}, r"real token, of texts \[1\]"),
        ({"context": context, "state": state}, "which has the context that it began with"),
        ({"context": context, "state": own}, "which began with none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mixer(x, **arguments)
    assert state.of_context
    assert not own.of_context


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_is_not_claimed_is_refused(name: str) -> None:
    mixer, x = made(name), torch.randn(1, 6, 16)
    if not mixer.facts.cross:
        with pytest.raises(ValueError, match=rf"{name} takes no context; `regard mixers` tells which mixers do"):
            mixer(x, context=x)
    if not mixer.facts.grids:
        with pytest.raises(ValueError, match=rf"{name} takes no grid"):
            mixer(x, grid=(2, 3))


@pytest.mark.parametrize("name", [name for name, kind in sorted(KINDS.items()) if kind.facts.grids])
def test_grids(name: str) -> None:
    """What a token makes of another depends on where both are on the grid, not on their numbers."""
    mixer, x = made(name, causal=False), torch.randn(1, 12, 16)
    found, _ = mixer(x, grid=(3, 4))
    turned = x.view(1, 3, 4, 16).transpose(1, 2).reshape(1, 12, 16)
    other, _ = mixer(turned, grid=(4, 3))
    assert not torch.allclose(found.view(3, 4, 16).transpose(0, 1).reshape(1, 12, 16), other)  # axes are not alike
    assert not torch.allclose(found, mixer(x, grid=(4, 3))[0])
    assert not torch.allclose(found, mixer(x, grid=(12,))[0])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("causal", [True, False])
def test_exact(name: str, causal: bool) -> None:
    """The output is that of a softmax of its queries and keys, stored."""
    mixer, x = made(name, causal=causal), torch.randn(2, 20, 16)
    assert isinstance(mixer, SoftmaxAttention)
    seen = mixer.project(x)
    logits = seen["query"] @ seen["key"].mT / 2  # heads of 4
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
    probabilities = (logits.masked_fill(hidden, -torch.inf) if causal else logits).softmax(-1)
    expected = mixer.o_proj(join_heads(probabilities @ seen.value))
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixer.map(x).dense(), probabilities, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_projections_are_named_as_the_field_names_them(name: str) -> None:
    names = {
        parameter.split(".")[-2] for parameter, _ in made(name).named_parameters() if parameter.endswith(".weight")
    }
    own = {"in_proj", "x_proj", "dt_proj", "out_proj"} if name == "SelectiveSSM" else {f"{one}_proj" for one in "qkvo"}
    assert own <= names
