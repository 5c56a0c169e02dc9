"""Miras and its instances as layers, and Titans' memory among them."""

import pytest
import torch

from regard.mixers import (
    Design,
    DotProduct,
    Huber,
    LongTermMemory,
    Memora,
    Memory,
    Miras,
    Mixer,
    Moneta,
    Yaad,
)
from regard.mixers.memory.network import recall
from tests.mixers.contract import check_mixer
from tests.mixers.learning import recall_losses

KINDS = [LongTermMemory, Moneta, Yaad, Memora]
MATRIX = Memory(depth=1)


@pytest.mark.parametrize("kind", KINDS)
def test_layer(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    check_mixer(kind(24, heads=3))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_with_a_matrix(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    check_mixer(kind(16, heads=2, memory=MATRIX, chunk=5))


def test_layer_of_other_choices() -> None:
    torch.manual_seed(0)
    check_mixer(Miras(16, 2, Design(Memory(3, 2), Huber(), momentum=True), chunk=7))


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    before, after = recall_losses(kind(16, heads=2, chunk=8))
    assert after < before - 0.5


@pytest.mark.parametrize("earlier", [0, 512])
@pytest.mark.parametrize("kind", [LongTermMemory, Moneta, Yaad])
def test_a_fresh_memory_gives_for_keys_what_resembles_their_values(kind: type[Miras], earlier: int) -> None:
    """And not −k, which is what a network that adds its input learns of values much shorter than keys."""
    torch.manual_seed(0)
    mixer, x = kind(64, heads=4), torch.randn(4, earlier + 16, 64)
    projected = mixer.project(x)
    _, state = mixer.combine(projected)
    weights = [mixer.design.retention.weights(state[f"held{layer}"], state[f"start{layer}"]) for layer in range(2)]
    assert mixer.gain is not None
    given = recall(projected["key"][:, :, -16:], weights, mixer.gain[:, None])
    likeness = torch.cosine_similarity(given, projected.value[:, :, -16:], dim=-1).mean()
    assert likeness > (0.26 if earlier else 0.4)


@pytest.mark.parametrize("kind", [LongTermMemory, Yaad])
def test_a_network_is_not_linear_after_many_tokens(kind: type[Miras]) -> None:
    """What GELU adds to a linear map is even: its share stays, as the first matrix does not decay to where it is linear."""
    torch.manual_seed(0)
    mixer = kind(64, heads=4)
    projected = mixer.project(torch.randn(1, 2048, 64))
    _, state = mixer.combine(projected)
    given, opposite = (
        torch.nn.functional.gelu(sign * projected["query"] @ state["held0"].mT) @ state["held1"].mT for sign in (1, -1)
    )
    assert (given + opposite).norm() > 0.4 * (given - opposite).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_repeated_for_long_does_not_explode(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    mixer = kind(16, heads=2)
    y, _ = mixer(3 * torch.randn(1, 1, 16).expand(1, 600, 16))
    y.square().mean().backward()
    assert torch.isfinite(y).all()
    assert max(float(parameter.grad.abs().max()) for parameter in mixer.parameters()) < 1e4


@pytest.mark.parametrize("design", [Design(MATRIX, momentum=True), Design(MATRIX, DotProduct())])
def test_hidden_map(design: Design) -> None:
    torch.manual_seed(0)
    mixer = Miras(16, 2, design)
    x, more = torch.randn(2, 13, 16), torch.randn(2, 21, 16)
    hidden = mixer.map(x)
    projected = mixer.project(x)
    torch.testing.assert_close(mixer.out(hidden @ projected.value, projected), mixer(x)[0], atol=1e-5, rtol=1e-4)
    assert not hidden.dense().triu(1).any()
    _, state = mixer(x)  # in the middle of a chunk
    both = mixer.map(torch.cat([x, more], 1)).dense()[:, :, 13:, 13:]
    if isinstance(design.bias, DotProduct):  # what was held does not change what is written
        torch.testing.assert_close(mixer.map(more, state).dense(), both, atol=1e-5, rtol=1e-4)


def test_no_map_where_the_output_is_not_linear_in_values() -> None:
    for kind in KINDS:
        with pytest.raises(NotImplementedError, match=rf"{kind.__name__} mixes values by a matrix only where"):
            kind(8, heads=2).map(torch.randn(1, 5, 8))


def test_moneta_keeps_as_its_facts_say() -> None:
    assert "W_t = A_t / (mean |A|^q + 1)^{(q−2)/q}" in Moneta.facts.formula
    mixer, held = Moneta(8, heads=2, q=5.0), 3 * torch.randn(2, 4, 6, dtype=torch.float64)
    scale = (held.abs().pow(5).mean((1, 2), keepdim=True) + 1) ** (3 / 5)
    torch.testing.assert_close(mixer.design.retention.weights(held, held), held / scale)


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"Yaad: dim must be a multiple of heads, got dim=10 and heads=4"):
        Yaad(10, heads=4)
    with pytest.raises(ValueError, match=r"Moneta: chunk must be at least 1 .* got chunk=0 and largest_step=None"):
        Moneta(8, heads=2, chunk=0)
    mixer, x = Yaad(8, heads=2), torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match=r"Yaad goes on from a state of its own, got a state of Moneta"):
        mixer(x, Moneta(8, heads=2)(x)[1])
