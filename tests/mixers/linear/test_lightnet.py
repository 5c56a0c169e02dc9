"""LightNet: the additive recurrence, its one scan both ways, its positions, and its layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.mixers import MDLRPE, MDTPE, TPE, Layout, LightNet, lightnet
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int, turned: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 2, 3, length, 4, generator=generator)
    v = torch.randn(2, 3, length, 5, generator=generator)
    memory = torch.randn(2, 3, 8 if turned else 4, 5, generator=generator)
    total = torch.randn(2, 3, 4, generator=generator)
    return [q, 3 * k, v, memory, total]


def angles(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(length, dtype=dtype)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.0], dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.booleans(), st.booleans(), st.integers(1, 40))
def test_forms_agree(length: int, turned: bool, begun: bool, chunk: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, total: Tensor, form: str) -> tuple[Tensor, object]:
        turns = angles(length, torch.promote_types(q.dtype, torch.float32)) if turned else None
        return lightnet(q, k, v, (memory, total) if begun else None, angles=turns, form=form, chunk=chunk)

    check_forms(run, inputs(length, turned))


@pytest.mark.parametrize("turned", [True, False])
def test_forms_agree_both_ways(turned: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, form: str) -> tuple[Tensor, object]:
        turns = angles(31, torch.promote_types(q.dtype, torch.float32)) if turned else None
        return lightnet(q, k, v, angles=turns, causal=False, form=form)

    check_forms(run, inputs(31)[:3])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_definition(causal: bool, turned: bool) -> None:
    q, k, v, _, _ = (tensor.double() for tensor in inputs(17))
    turns = angles(17, torch.float64) if turned else torch.zeros(17, 4).double()
    expected = []
    for i in range(17):
        seen = slice(i + 1 if causal else 17)
        weights = q[:, :, i, None] * k[:, :, seen].softmax(2) * (turns[i] - turns[seen]).cos()
        expected.append(weights.sum(-1)[:, :, None] @ v[:, :, seen])
    found, _ = lightnet(q, k, v, angles=turns if turned else None, causal=causal, chunk=5)
    torch.testing.assert_close(found, torch.cat(expected, 2))


def test_large_keys_stay_finite() -> None:
    q, k, v, _, _ = inputs(200)
    k = (200 * k).requires_grad_()
    output, _ = lightnet(q, k, v)
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(k.grad).all()


def test_keys_of_nothing_are_as_if_they_were_not_there() -> None:
    q, k, v, _, _ = inputs(12)
    empty = k.clone()
    empty[:, :, [0, 1, 5, 11]] = -1e4
    there = [2, 3, 4, 6, 7, 8, 9, 10]
    found, (memory, total) = lightnet(q, empty, v)
    expected, (alone, same) = lightnet(q[:, :, there], k[:, :, there], v[:, :, there])
    torch.testing.assert_close(found[:, :, there], expected)
    torch.testing.assert_close(memory, alone)
    torch.testing.assert_close(total, same)
    assert not found[:, :, :2].any()


def test_one_scan_does_not_know_the_order() -> None:
    q, k, v, _, _ = inputs(20)
    order = torch.randperm(20)
    whole, _ = lightnet(q, k, v, causal=False)
    mixed, _ = lightnet(q[:, :, order], k[:, :, order], v[:, :, order], causal=False)
    torch.testing.assert_close(mixed, whole[:, :, order])


def test_a_sum_that_begins_at_one_is_that_of_the_authors_code() -> None:
    q, k, v, _, _ = (tensor.double() for tensor in inputs(12))
    found, _ = lightnet(q, k, v, (torch.zeros(2, 3, 4, 5).double(), torch.zeros(2, 3, 4).double()))
    weights = k.exp()
    expected = torch.einsum("bhid,bhijd,bhje->bhie", q / (1 + weights.cumsum(2)), weights[:, :, None].expand(
        -1, -1, 12, -1, -1) * torch.ones(12, 12).tril()[:, :, None], v)  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_half_precision() -> None:
    q, k, v, _, _ = inputs(100)
    expected, _ = lightnet(q, k, v)
    found, (memory, _) = lightnet(*(tensor.bfloat16() for tensor in (q, k, v)))
    assert (found.dtype, memory.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_layer() -> None:
    torch.manual_seed(0)
    mixer = LightNet(24, heads=3)
    check_mixer(mixer)


def test_map_after_a_state() -> None:
    torch.manual_seed(0)
    mixer, x = LightNet(24, heads=3), torch.randn(2, 19, 24)
    _, state = mixer(x[:, :8])
    torch.testing.assert_close(
        mixer.map(x[:, 8:], state).dense(), mixer.map(x).dense()[:, :, 8:, 8:], atol=1e-5, rtol=1e-4
    )


def test_a_text_of_padding_only_leaves_an_empty_state() -> None:
    torch.manual_seed(0)
    mixer, x = LightNet(8, heads=2), torch.randn(2, 5, 8)
    _, state = mixer(x, mask=torch.tensor([[True] * 5, [False] * 5]))
    found, _ = mixer(x, state)
    torch.testing.assert_close(found[1:], mixer(x[1:])[0])


def test_scan_of_a_grid() -> None:
    torch.manual_seed(0)
    mixer, x = LightNet(24, heads=2, causal=False), torch.randn(2, 24, 24)
    y, _ = mixer(x, grid=(4, 6))
    projected = mixer.project(x, None, Layout(grid=(4, 6), causal=False))
    hidden = mixer.map(x, grid=(4, 6))
    torch.testing.assert_close(mixer.out(hidden @ projected.value, projected), y, atol=1e-5, rtol=1e-4)
    assert (hidden.dense() != mixer.map(x).dense()).any(), "the places of a grid are not those of a line"
    assert (hidden.dense()[..., 0, -1] != 0).all(), "the first token sees the last"
    distance = hidden.dense() / mixer.map(x, grid=(24,)).dense()
    assert distance.isfinite().all()
    assert mixer(x, grid=(2, 3, 4))[0].shape == x.shape
    with pytest.raises(ValueError, match=r"LightNet was given 24 tokens and a grid of sides \(4, 5\), of 20 places"):
        mixer(x, grid=(4, 5))
    with pytest.raises(ValueError, match=r"LightNet reads a text in its order; of a grid .* causal=False"):
        LightNet(24)(x, grid=(4, 6))


def test_angles_know_distances_along_each_axis() -> None:
    positions = MDLRPE(7)
    found = positions(torch.tensor([[2, 5], [3, 5], [2, 6]]))
    theta = 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(found[1] - found[0], torch.cat([theta, torch.zeros(3)]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2] - found[0], torch.cat([torch.zeros(4), theta[:3]]), atol=1e-5, rtol=1e-5)


def test_toeplitz_encodings() -> None:
    torch.manual_seed(0)
    encoding = TPE(6, heads=2, rank=3)
    torch.nn.init.normal_(encoding.weight)
    x = torch.randn(1, 11, 6)
    decays = (-encoding.rate.exp()).exp()
    powers = decays[..., None] ** torch.arange(11)
    taps = (encoding.weight[..., None] * powers).sum(1)  # (heads, distance)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    matrix = taps[:, distance.abs()]
    lines = x.unflatten(-1, (2, 3))
    causal = torch.einsum("hij,bjhc->bihc", matrix.tril(), lines).flatten(2)
    torch.testing.assert_close(encoding(x)[0], causal, atol=1e-5, rtol=1e-5)
    encoding.causal = False
    both = torch.einsum("hij,bjhc->bihc", matrix, lines).flatten(2)
    torch.testing.assert_close(encoding(x)[0], both, atol=1e-5, rtol=1e-5)


def test_toeplitz_encodings_of_several_axes() -> None:
    torch.manual_seed(0)
    encoding, x = MDTPE(4, axes=2), torch.randn(2, 3, 5, 4)
    down = torch.stack([encoding.along[0](x[:, :, column])[0] for column in range(5)], 2)
    across = torch.stack([encoding.along[1](x[:, row])[0] for row in range(3)], 1)
    torch.testing.assert_close(encoding(x), down + across)
    encoding(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoding.parameters())
    with pytest.raises(ValueError, match=r"MDTPE of 2 axes takes x of \(batch, 2 sides, dim\), got \(2, 15, 4\)"):
        encoding(x.flatten(1, 2))
    with pytest.raises(ValueError, match=r"TPE: dim must be a multiple of heads, got dim=5 and heads=2"):
        TPE(5, heads=2)
    with pytest.raises(ValueError, match=r"TPE: rank must be at least 1, got 0"):
        TPE(4, rank=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.randn(1, 2, 5, 3)}, r"query and key must be of one shape"),
        ({"angles": torch.zeros(5, 3)}, r"angles must be broadcastable to keys of \(1, 2, 5, 4\), got \(5, 3\)"),
        (
            {"state": (torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4))},
            r"the state must be of shapes \(1, 2, 4, 4\) and \(1, 2, 4\), got \(1, 2, 4, 5\) and \(1, 2, 4\)",
        ),
        (
            {"state": (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4)), "causal": False},
            r"without causal=True there is no state",
        ),
        ({"form": "fast"}, r"form must be one of parallel, chunked, recurrent; got 'fast'"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        lightnet(**({"query": q, "key": k, "value": v} | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"LightNet: dim must be a multiple of heads, got dim=10 and heads=4"):
        LightNet(10, heads=4)
