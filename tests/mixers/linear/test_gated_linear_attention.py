"""Gated linear attention: its layer against its recurrence, and all that layers promise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from regard.mixers import GatedLinearAttention
from tests.mixers.contract import check_mixer

CHOICES: list[dict[str, Any]] = [
    {},
    {"use_short_conv": True, "conv_bias": True, "use_output_gate": False},
    {"num_kv_heads": 1, "expand_k": 1.0, "expand_v": 2.0, "gate_low_rank_dim": 3},
]


def made(choices: dict[str, Any]) -> GatedLinearAttention:
    """With biases that are not those it begins with."""
    torch.manual_seed(0)
    mixer = GatedLinearAttention(12, 3, **choices) if "expand_k" in choices else GatedLinearAttention(24, 3, **choices)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("choices", CHOICES)
def test_layer(choices: dict[str, Any]) -> None:
    check_mixer(made(choices))


@pytest.mark.parametrize("choices", CHOICES)
def test_definition(choices: dict[str, Any]) -> None:
    """Token by token in float64, from the weights, as the paper's equations have it."""
    mixer = made(choices).double()
    x = torch.randn(2, 21, mixer.dim).double()
    query, key, value = (projection(x) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.conv1d is not None:
        joined = functional.pad(torch.cat([query, key, value], dim=-1), (0, 0, 3, 0))
        taps = mixer.conv1d.weight.squeeze(1)
        convolved = sum(joined[:, m : m + 21] * taps[:, m] for m in range(4)) + mixer.conv1d.bias
        query, key, value = functional.silu(convolved).split([part.shape[-1] for part in (query, key, value)], dim=-1)
    decay = mixer.gk_proj(x).sigmoid() ** (1 / 16)
    groups = 3 // mixer.num_kv_heads
    key, value, decay = (
        part.unflatten(-1, (mixer.num_kv_heads, -1)).repeat_interleave(groups, dim=2) for part in (key, value, decay)
    )
    query = query.unflatten(-1, (3, -1))
    state, outputs = torch.zeros(2, 3, key.shape[-1], value.shape[-1]).double(), []
    for i in range(21):
        state = decay[:, i, :, :, None] * state + key[:, i, :, :, None] * value[:, i, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, i]) / key.shape[-1] ** 0.5)
    mixed = torch.stack(outputs, dim=1)
    normed = (mixed * (mixed.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight).flatten(2)
    expected = mixer.o_proj(normed if mixer.g_proj is None else normed * functional.silu(mixer.g_proj(x)))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_hidden_map_after_a_state() -> None:
    mixer, x = made(CHOICES[1]), torch.randn(2, 19, 24)
    _, state = mixer(x[:, :9])
    whole = mixer.map(x).dense()
    torch.testing.assert_close(mixer.map(x[:, 9:], state).dense(), whole[:, :, 9:, 9:], atol=1e-5, rtol=1e-4)


def test_strong_forgetting_stays_finite() -> None:
    """Channels that forget at once, over a text of many chunks: nothing is the exponential of a large number."""
    mixer, x = made({}), torch.randn(1, 700, 24)
    with torch.no_grad():
        mixer.gk_proj[1].bias.fill_(-4000.0)
    y, _ = mixer(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in mixer.parameters())
    projected = mixer.project(x)
    alone = mixer.out((projected["query"] * projected["key"]).sum(-1, keepdim=True) * projected.value, projected)
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_kv_heads": 3}, r"GatedLinearAttention: heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"expand_k": 0.3}, r"a width of 16, expanded 0.3 times, must be a multiple of 4, got 4.8"),
        ({"gate_low_rank_dim": 0}, r"GatedLinearAttention: gate_low_rank_dim must be above 0, got 0"),
    ],
)
def test_bad_layers(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention(16, **choices)


def test_gradients_of_shared_heads() -> None:
    """Each shared key has the sum of what its queries' heads give it."""
    mixer, x = made({"num_kv_heads": 1, "expand_k": 1.0}), torch.randn(1, 9, 12)
    weight: Tensor = mixer.k_proj.weight
    (found,) = torch.autograd.grad(mixer(x)[0].square().sum(), weight)
    alone = GatedLinearAttention(12, 3, expand_k=1.0)
    shared = mixer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"):
        shared[name] = torch.cat([shared[name]] * 3)
    alone.load_state_dict(shared)
    (of_each,) = torch.autograd.grad(alone(x)[0].square().sum(), alone.k_proj.weight)
    torch.testing.assert_close(found, of_each.unflatten(0, (3, 4)).sum(0), atol=1e-5, rtol=1e-4)
