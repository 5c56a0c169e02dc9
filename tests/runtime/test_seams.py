"""The seams let nothing by while some block is open, and leave everything alone when none is."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention

import regard
from regard.runtime import AttentionCall

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


def in_place() -> list[Any]:
    """What an interception changes in PyTorch."""
    return [
        torch.backends.mha.get_fastpath_enabled,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
        vars(CausalBias)["_dispatch"],
        functional.multi_head_attention_forward,
        multi_head_attention_forward,
    ]


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_restored(raises: bool) -> None:
    before, q = in_place(), torch.randn(1, 2, 3, 8)
    try:
        with regard.watch(regard.Entropy()), regard.steer(None, regard.Temperature(2.0)):
            scaled_dot_product_attention(q, q, q)
            assert all(now != then for now, then in zip(in_place()[:-1], before, strict=False))
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert in_place() == before


def test_the_operator_itself() -> None:
    q = torch.randn(1, 2, 3, 8)
    with regard.watch(regard.Received()) as seen:
        OPERATOR(q, q, q, is_causal=True)
    torch.testing.assert_close(torch.as_tensor(seen.dataset().received[0].values).sum(-1), torch.full((1, 2), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_are_seen_too(dtype: torch.dtype) -> None:
    q = torch.empty(1, 2, 3, 8, device="meta", dtype=dtype)
    seen = []

    def note(call: AttentionCall, heads: Tensor) -> AttentionCall:
        seen.append(call.query.shape)
        return call

    with regard.steer(None, regard.Custom(note)):
        assert scaled_dot_product_attention(q, q, q).shape == q.shape
    assert seen == [q.shape]


@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 2)])
def test_calls_of_any_dimensions_that_no_layer_is_looked_at_for(lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 5, 8)
    expected = scaled_dot_product_attention(x, x, x)
    layer = Attend()
    with regard.watch(layer, regard.Entropy(), passes=[0]):
        layer(x)
        assert torch.equal(layer(x), expected)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)


def test_other_threads_are_left_alone() -> None:
    q, outputs = torch.randn(1, 2, 3, 8), {}
    plain = scaled_dot_product_attention(q, q, q)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(60)
        outputs["during"] = scaled_dot_product_attention(q, q, q)
        with regard.steer(None, regard.Gate(0)):
            outputs["own"] = scaled_dot_product_attention(q, q, q)
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with regard.steer(None, regard.Gate(2.0)):
        inside.set()
        done.wait(60)
        steered = scaled_dot_product_attention(q, q, q)
    thread.join()
    torch.testing.assert_close(steered, 2 * plain)
    assert torch.equal(outputs["during"], plain)
    assert not outputs["own"].any()


def test_multi_head_function_under_its_own_name() -> None:
    module, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 1, 8)
    positional = (
        x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias,
    )  # fmt: skip
    options = {"training": False, "average_attn_weights": False}
    _, weights = multi_head_attention_forward(*positional, **options)
    with regard.steer(None, regard.Block(keys=[0])), torch.no_grad():
        _, steered = functional.multi_head_attention_forward(*positional, **options)
    others = weights[..., 1:] / weights[..., 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(steered, functional.pad(others, (1, 0)))


def test_triangles_of_their_own_class_are_steered() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    with regard.steer(None, regard.Block(keys=[0])):
        steered = scaled_dot_product_attention(q, k, k, causal_lower_right(3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    mask[:, 0] = False
    torch.testing.assert_close(steered, scaled_dot_product_attention(q, k, k, mask))


class Channels(nn.Module):
    """Attention from channels to channels, of (B, N, C) or of (B, C, H, W)."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2) if x.ndim == 4 else x.mT
        query = key = value = tokens.unflatten(1, (2, -1))
        if self.fused:
            return functional.scaled_dot_product_attention(query, key, value).flatten(1, 2)
        return ((query @ key.mT).softmax(-1) @ value).flatten(1, 2)


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 16, 8), (2, 12, 3, 3)])
@pytest.mark.parametrize("fused", [False, True])
def test_channels_are_not_taken_for_tokens(shape: tuple[int, ...], fused: bool) -> None:
    model = nn.Sequential(Channels(fused))
    with torch.no_grad(), regard.watch(model, regard.Received()) as seen:
        model(torch.randn(shape))
    assert seen.layers == ["0.channels"]
    assert seen.dataset().sizes["key"] == (4 if len(shape) == 3 else 6)


@pytest.mark.parametrize("tokens", [4, 8, 9])
def test_tokens_as_many_as_a_head_is_wide_are_tokens(tokens: int) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, tokens, 8)
    with torch.no_grad(), regard.watch(layer, regard.Received()) as seen:
        layer(x, x[:, :4], x[:, :4])
    assert seen.layers == ["MultiheadAttention"]
