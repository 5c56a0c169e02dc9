"""Chains of maps against the same with stored matrices, in float64."""

from typing import Any

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BartConfig, BartModel, ViTConfig, ViTForImageClassification

import regard
from regard.explain import Flow, GenericRelevance, Rollout
from tests.explain.tiny import DIM, Kind, Tiny
from tests.maps.answers import hidden

close = torch.testing.assert_close

kinds = st.builds(
    Kind, heads=st.just(4), key_heads=st.sampled_from([1, 2, 4]), layers=st.integers(1, 4), causal=st.booleans()
)


def texts(draw_seed: int, batch: int, tokens: int, padded: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(draw_seed)
    x = torch.randn(batch, tokens, DIM, dtype=torch.float64, generator=generator)
    if not padded:
        return {"x": x, "real": None}
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    return {"x": x, "real": torch.arange(tokens) >= tokens - lengths[:, None]}


@given(kinds, st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.floats(0, 1))
def test_rollout(kind: Kind, seed: int, batch: int, tokens: int, padded: bool, residual: float) -> None:
    model, inputs = Tiny(kind, seed), texts(seed, batch, tokens, padded)
    product = torch.eye(tokens, dtype=torch.float64)
    with torch.no_grad():
        for matrix in model.stored(**inputs)[1]:
            product = (residual * torch.eye(tokens) + (1 - residual) * matrix.mean(1)) @ product
    for query in (-1, 0, tokens // 2):
        close(Rollout(residual=residual, query=query).explain(model, inputs), product[:, query])
    close(Rollout(residual=residual, query=None).explain(model, inputs), product.mean(1))


@given(kinds, st.integers(0, 99), st.integers(1, 2), st.integers(1, 6), st.booleans(), st.floats(0, 1))
def test_flow(kind: Kind, seed: int, batch: int, tokens: int, padded: bool, residual: float) -> None:
    model, inputs = Tiny(kind, seed), texts(seed, batch, tokens, padded)
    with torch.no_grad():
        matrices = model.stored(**inputs)[1]
    layers = [residual * torch.eye(tokens) + (1 - residual) * matrix.mean(1) for matrix in matrices]
    for query in (-1, 0):
        found = Flow(residual=residual, query=query).explain(model, inputs)
        for text in range(batch):
            wanted = [largest_flow([layer[text] for layer in layers], start, query % tokens) for start in range(tokens)]
            close(found[text], torch.tensor(wanted, dtype=torch.float64), atol=1e-7, rtol=0.0)


def largest_flow(layers: list[Tensor], start: int, end: int) -> float:
    """By networkx, in floating point, on a graph of all tokens."""
    graph = networkx.DiGraph()
    graph.add_nodes_from([(0, start), (len(layers), end)])
    for number, layer in enumerate(layers):
        for query, key in layer.nonzero().tolist():
            graph.add_edge((number, key), (number + 1, query), capacity=float(layer[query, key]))
    return float(networkx.maximum_flow_value(graph, (0, start), (len(layers), end)))


def test_flow_by_hand() -> None:
    """Two layers of two tokens: what passes is bound by the narrower pipe of each way."""
    layers = [torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.2, 0.8], [0.3, 0.7]])]
    maps = [hidden(layer[None, None].double()) for layer in layers]
    found = Flow(residual=0.0, query=0).through(maps)
    close(found, torch.tensor([[0.2 + 0.5, 0.1 + 0.5]], dtype=torch.float64), atol=1e-8, rtol=0.0)


def test_long_texts_flow_in_blocks() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 1, 3, 10, 10, dtype=torch.float64).softmax(-1)
    found = Flow(blocks=5, query=7).through([hidden(matrix) for matrix in matrices])
    blocks = [matrix.mean(1).unflatten(2, (5, 2)).sum(3).unflatten(1, (5, 2)).mean(2) for matrix in matrices]
    layers = [(block[0] + torch.eye(5)) / 2 for block in blocks]
    wanted = torch.tensor([largest_flow(layers, start, 3) for start in range(5)], dtype=torch.float64)
    close(found[0], wanted.repeat_interleave(2) / 2, atol=1e-7, rtol=0.0)


def squares(output: Tensor) -> Tensor:
    return output[:, -1].square().sum(-1)


@given(kinds, st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_generic_relevance(kind: Kind, seed: int, batch: int, tokens: int, padded: bool) -> None:
    model, inputs = Tiny(kind, seed), texts(seed, batch, tokens, padded)
    output, matrices = model.stored(**inputs)
    gradients = torch.autograd.grad(squares(output).sum(), matrices)
    relevance = torch.eye(tokens, dtype=torch.float64).expand(batch, -1, -1)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        relevance = relevance + (gradient * matrix).clamp(min=0).mean(1) @ relevance
    for query in (-1, 0, tokens // 2):
        close(GenericRelevance(query=query).explain(model, inputs, squares), relevance[:, query].detach())


def test_parameters_need_no_gradient_and_keep_none() -> None:
    model, inputs = Tiny(Kind()), texts(0, 2, 5, False)
    wanted = GenericRelevance().explain(model, inputs, squares)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    close(GenericRelevance().explain(model, inputs, squares), wanted)
    with torch.no_grad():
        close(GenericRelevance().explain(model, inputs, squares), wanted)


@pytest.mark.parametrize("method", [Rollout(layers=[0, 2]), GenericRelevance(layers=[0, 2])], ids=repr)
def test_chosen_layers(method: Any) -> None:
    model, inputs = Tiny(Kind()), texts(0, 2, 5, False)
    output, matrices = model.stored(**inputs)
    gradients = torch.autograd.grad(squares(output).sum(), matrices)
    row = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
    for layer in (0, 2):
        if isinstance(method, Rollout):
            row = (torch.eye(5) + matrices[layer].mean(1)) / 2 @ row
        else:
            row = row + (gradients[layer] * matrices[layer]).clamp(min=0).mean(1) @ row
    close(method.explain(model, inputs, squares), row[:, -1].detach())


def test_a_vision_model_in_half_the_bytes() -> None:
    """A class token's row of a model of transformers, in bfloat16 near to float32."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8
    )
    model = ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    metric = regard.logit_difference(1, 0)
    methods = (Rollout(query=0), GenericRelevance(query=0))
    wanted = [method.explain(model, inputs, metric) for method in methods]
    assert all(found.shape == (2, 10) for found in wanted)
    close(wanted[0].sum(-1), torch.ones(2))
    half = {"pixel_values": inputs["pixel_values"].bfloat16()}
    for method, found in zip(methods, wanted, strict=True):
        close(
            method.explain(model.bfloat16() if method is methods[0] else model, half, metric),
            found,
            atol=2e-2,
            rtol=5e-2,
        )


def test_hidden_maps_are_followed_too() -> None:
    """Of a model of mixers, each of whose maps is known by what it does to values."""
    from regard.mixers.linear import DeltaRule

    torch.manual_seed(0)
    mixers = [DeltaRule(16, heads=2), DeltaRule(16, heads=2)]
    x = torch.randn(1, 7, 16)
    maps = [mixer.map(x).dense()[0].mean(0).detach() for mixer in mixers]
    wanted = (torch.eye(7) + maps[1]) @ (torch.eye(7) + maps[0]) / 4
    found = Rollout().through([mixer.map(x) for mixer in mixers])
    close(found[0], wanted[-1])


def test_what_makes_no_chain() -> None:
    config = BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = BartModel(config).eval()
    inputs = {"input_ids": torch.arange(4, 11)[None], "decoder_input_ids": torch.arange(4, 9)[None]}
    with pytest.raises(
        ValueError, match=r"decoder.layers.0.self_attn has 5 queries and 5 keys, the first layer 7 tokens"
    ):
        Rollout().explain(model, inputs)
    assert Rollout(layers="encoder.*").explain(model, inputs).shape == (1, 7)
    tiny = Tiny(Kind())
    x = texts(0, 1, 5, False)
    for method in (Rollout(query=5), GenericRelevance(query=-6), Flow(query=5)):
        with pytest.raises(IndexError, match=r"query -?\d was asked for, but there are 5 tokens"):
            method.explain(tiny, x, squares)
    for method in (Rollout(layers="decoder.*"), GenericRelevance(layers="decoder.*")):
        with pytest.raises(ValueError, match=r"'decoder\.\*' matches no attention call; seen were layers\.0"):
            method.explain(tiny, x, squares)
    with pytest.raises(ValueError, match="residual must be from 0 to 1, got 2"):
        Rollout(residual=2)
    with pytest.raises(ValueError, match="residual must be from 0 to 1, got -1"):
        Flow(residual=-1)
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        Flow(blocks=0)
    with pytest.raises(ValueError, match=r"needs a metric, such as regard\.logit_difference"):
        GenericRelevance().explain(tiny, x)
    with pytest.raises(ValueError, match=r"one number for each text, or one for all, got shape \(1, 5, 12\)"):
        GenericRelevance().explain(tiny, x, lambda output: output)


def test_a_layer_that_runs_twice_is_two_layers() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tiny(Kind(layers=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    model, x = Twice().eval(), torch.randn(1, 5, DIM, dtype=torch.float64)
    between, (first,) = model.inner.stored(x)
    output, (second,) = model.inner.stored(between)
    found = Rollout().explain(model, x)
    close(found, ((torch.eye(5) + second.mean(1)) @ (torch.eye(5) + first.mean(1)) / 4)[:, -1].detach())
    row = torch.eye(5, dtype=torch.float64).expand(1, -1, -1)
    matrices = (first, second)
    for matrix, gradient in zip(matrices, torch.autograd.grad(squares(output).sum(), matrices), strict=True):
        row = row + (matrix * gradient).clamp(min=0).mean(1) @ row
    close(GenericRelevance().explain(model, x, squares), row[:, -1].detach())
