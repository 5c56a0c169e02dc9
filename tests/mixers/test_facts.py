"""What the facts of a mixer claim, its layer can do."""

import inspect

import pytest
import torch
from torch import Tensor

from regard.mixers import LightNet, Mixer, SoftmaxAttention, catalogue
from regard.mixers.mixer import join_heads

KINDS = catalogue.mixers()
BOTH_WAYS = [name for name, kind in sorted(KINDS.items()) if kind.facts.bidirectional]
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
    asked = "causal" in inspect.signature(KINDS[name]).parameters or hasattr(KINDS[name], "scan")
    assert KINDS[name].facts.bidirectional == asked


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional(name: str) -> None:
    x = torch.randn(2, 30, 16, requires_grad=True)
    if name == "LightNet":
        mixer = made(name)
        assert isinstance(mixer, LightNet)
        assert (influence(mixer.scan(x)[:, 3], x) > 0).all()
        return
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


@pytest.mark.parametrize("name", [name for name in BOTH_WAYS if name != "LightNet"])
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


@pytest.mark.parametrize("name", sorted(KINDS))
def test_cross(name: str) -> None:
    assert KINDS[name].facts.cross == ("context" in inspect.signature(KINDS[name].forward).parameters)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("causal", [True, False])
def test_exact(name: str, causal: bool) -> None:
    """The output is that of a softmax of its queries and keys, stored."""
    mixer, x = made(name, causal=causal), torch.randn(2, 20, 16)
    assert isinstance(mixer, SoftmaxAttention)
    seen = mixer.see(x, None, None)
    logits = seen.query @ seen.key.mT / 2  # heads of 4
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
