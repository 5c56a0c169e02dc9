"""Lightning attention: its forms, its decays, and the layer around it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from regard.mixers import LightningAttention, lightning_attention, lightning_decay, linear_attention
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 2, 3, length, 4, generator=generator)
    v, state = (torch.randn(2, 3, rows, 5, generator=generator) for rows in (length, 4))
    return [q, k, v, torch.tensor([0.3, 0.97, 1.0]), state]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 70))
def test_forms_agree(length: int, chunk: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return lightning_attention(q, k, v, decay, state, form=form, chunk=chunk)

    check_forms(run, inputs(length))


def test_definition() -> None:
    q, k, v, decay, state = (tensor.double() for tensor in inputs(9))
    expected, before = [], state
    for i in range(9):
        before = decay[:, None, None] * before + k[:, :, i, :, None] * v[:, :, i, None]
        expected.append(torch.einsum("bhkv,bhk->bhv", before, q[:, :, i]))
    found, after = lightning_attention(q, k, v, decay, state, chunk=4)
    torch.testing.assert_close(found, torch.stack(expected, 2))
    torch.testing.assert_close(after, before)


def test_half_precision() -> None:
    q, k, v, decay, _ = inputs(100)
    expected, _ = lightning_attention(q, k, v, decay)
    found, state = lightning_attention(*(tensor.bfloat16() for tensor in (q, k, v)), decay)
    assert (found.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_decays() -> None:
    slopes = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    torch.testing.assert_close(lightning_decay(8, 0, 5), (-slopes * (1 + 1e-5)).exp())
    torch.testing.assert_close(lightning_decay(8, 1, 5), (-slopes * (0.75 + 1e-5)).exp())
    torch.testing.assert_close(lightning_decay(8, 4, 5), torch.ones(8), atol=1e-5, rtol=0)
    # Six heads have the slopes of four, and then the first and third of eight.
    found = -lightning_decay(6).log() / (1 + 1e-5)
    torch.testing.assert_close(found, torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]))
    paper = lightning_decay(4, 1, 4, schedule="paper")
    torch.testing.assert_close(paper, (-torch.tensor([2.0, 4, 6, 8]) * 0.75).exp())


@pytest.mark.parametrize("layer", [0, 3])
def test_layer(layer: int) -> None:
    torch.manual_seed(0)
    mixer = LightningAttention(24, heads=3, layer=layer, layers=4)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    memory = mixer(x)[1].tensors["memory"]
    assert memory.shape == (2, 3, 16 if layer == 0 else 8, 8)


def test_layer_as_written() -> None:
    torch.manual_seed(0)
    mixer = LightningAttention(8, heads=2, layer=0, layers=2).double()
    x = torch.randn(1, 7, 8).double()
    q, k, v, u = (part(x) for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    heads = [
        _head(silu(q), silu(k), v, slice(4 * h, 4 * h + 4), mixer.theta[h], lightning_decay(2, 0, 2)[h]) for h in (0, 1)
    ]
    mixed = torch.cat(heads, -1)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(mixer(x)[0], (normed * u) @ mixer.o_proj.weight.T, atol=1e-6, rtol=1e-5)


def _head(q: Tensor, k: Tensor, v: Tensor, columns: slice, theta: Tensor, decay: Tensor) -> Tensor:
    q, k, v = (tensor[..., columns] for tensor in (q, k, v))
    distance = (torch.arange(7)[:, None] - torch.arange(7)).double()
    matrix = torch.einsum("bic,bjc,ijc->bij", q, k, (distance[..., None] * theta).cos()) * decay.double() ** distance
    return matrix.tril() @ v


def test_the_angles_begin_as_the_papers() -> None:
    mixer = LightningAttention(6, heads=2)
    torch.testing.assert_close(mixer.theta.flatten(), 10000.0 ** (-2 * torch.arange(6) / 6))
    assert LightningAttention(6, heads=2, turned=False).theta is None
    assert LightningAttention(6, heads=2, layer=1, layers=2, turned=True).theta is not None


def test_padding_after_a_state_does_not_decay_it() -> None:
    torch.manual_seed(0)
    mixer = LightningAttention(8, heads=2, layer=1, layers=4)
    x, more = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    _, state = mixer(x)
    mask = torch.tensor([[True] * 4, [False] * 3 + [True]])
    found, after = mixer(more, state, mask)
    _, alone = mixer(x[1:])
    expected, end = mixer(more[1:, 3:], alone)
    torch.testing.assert_close(found[1:, 3:], expected)
    torch.testing.assert_close(after.tensors["memory"][1:], end.tensors["memory"])


def test_a_layer_in_half_precision_keeps_its_decays() -> None:
    torch.manual_seed(0)
    mixer = LightningAttention(16, heads=2, layer=2, layers=8)
    x = torch.randn(1, 300, 16)
    with torch.no_grad():
        expected, _ = mixer(x)
        found, _ = mixer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(found.float(), expected, atol=5e-2 * float(expected.abs().max()), rtol=5e-2)


def test_no_decay_is_linear_attention() -> None:
    q, k, v, _, state = inputs(40)
    found = lightning_attention(q, k, v, torch.ones(3), state)
    for one, other in zip(found, linear_attention(q, k, v, None, state), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.ones(3)}, r"decay must be of shape \(2,\), one for each head, got \(3,\)"),
        ({"decay": torch.tensor([1.0, 0.0])}, r"decay must be above 0 and at most 1, got \[1.0, 0.0\]"),
        ({"decay": torch.tensor([0.5, 1.5])}, r"decay must be above 0 and at most 1, got \[0.5, 1.5\]"),
        ({"state": torch.zeros(1, 2, 3, 4)}, r"the state must be of shape \(1, 2, 4, 4\), got \(1, 2, 3, 4\)"),
        ({"form": "fast"}, r"form must be one of parallel, chunked, recurrent; got 'fast'"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        lightning_attention(**({"query": q, "key": k, "value": v, "decay": torch.ones(2)} | change))


def test_bad_layers() -> None:
    with pytest.raises(
        ValueError, match=r"LightningAttention: dim must be a multiple of heads, got dim=10 and heads=4"
    ):
        LightningAttention(10, heads=4)
    with pytest.raises(ValueError, match=r"layer must be from 0 to layers − 1, got layer=8 and layers=8"):
        LightningAttention(8, layer=8, layers=8)
    with pytest.raises(ValueError, match=r"schedule must be one of released, paper; got 'own'"):
        lightning_decay(4, schedule="own")


def test_rates_are_part_of_what_is_loaded() -> None:
    made = LightningAttention(8, heads=2, layer=1, layers=4)
    with torch.device("meta"):
        empty = LightningAttention(8, heads=2, layer=1, layers=4)
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(made.state_dict())
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(loaded(x)[0], made(x)[0])
