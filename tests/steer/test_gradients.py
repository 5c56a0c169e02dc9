"""Gradients through edits, of what goes into a call and of strengths that are learned, against the stored matrix."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.steer import Edit
from regard.steer.language import CalibrateSinks
from regard.steer.vision import FuseGaze, RedistributeSinks
from tests.steer.reference import dense

HEADS = 2


def tensors(queries: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, HEADS, queries, 3), (1, 1, 5, 3), (1, 1, 5, 3))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes)


def steered(*made: Edit, causal: bool = True) -> Callable[..., Tensor]:
    def output(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with regard.steer(None, *made):
            return attention(query, key, value, is_causal=causal, enable_gqa=True)

    return output


@pytest.mark.parametrize(
    "edit",
    [
        regard.Redistribute([0], [1, 2], 0.5),
        regard.Redistribute([0], [1, 2]),
        CalibrateSinks(threshold=0.2),
        RedistributeSinks([0], [0, 1, 2], least=0.0),
        FuseGaze([[0.2, 0.9, 0.0, 0.0, 0.0]], [0, 1], [2, 3]),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_what_edits_read_of_the_matrix_has_a_gradient(edit: Edit) -> None:
    given = tensors()
    assert torch.autograd.gradcheck(steered(edit), given)
    with torch.no_grad():
        assert not torch.allclose(steered(edit)(*given), steered(regard.Gate(1.0))(*given))


LEARNED = {
    "gate": lambda by: regard.Gate(by, queries=[1, 3]),
    "reweight": lambda by: regard.Reweight([0, 2], by),
    "factor": lambda by: regard.Reweight([0, 2], by, queries=[2, 4], renormalize=False),
    "factor of all": lambda by: regard.Reweight([0, 2], by, renormalize=False),
    "bias": lambda by: regard.Bias([1], by, heads=1),
    "temperature": lambda by: regard.Temperature(by),
    "redistribute": lambda by: regard.Redistribute([0], [1, 2], by),
}


@pytest.mark.parametrize("queries", [5, 9], ids=["a bias", "columns"])
@pytest.mark.parametrize("by", [torch.tensor(0.6), torch.tensor([0.3, 0.8])], ids=["one", "one a head"])
@pytest.mark.parametrize("name", LEARNED)
def test_strengths_are_learned(name: str, by: Tensor, queries: int) -> None:
    given = tensors(queries)
    strength = by.double().requires_grad_()
    edits = [regard.Bias([1], 0.3), LEARNED[name](strength), regard.Block([1], queries=[4])]
    every = (*given, strength)
    output = steered(*edits, causal=False)(*given)
    _, wanted = dense(*given, None, False, edits)
    torch.testing.assert_close(output, wanted)
    weights = torch.randn(output.shape, dtype=torch.float64)
    found = torch.autograd.grad((output * weights).sum(), every)
    expected = torch.autograd.grad((wanted * weights).sum(), every)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    assert found[-1].abs().min() > 0 or name == "bias"


@pytest.mark.parametrize("make", [regard.AddToQuery, regard.AddToKey, regard.AddToValue, regard.AddToOutput])
def test_directions_are_learned(make: Callable[..., Edit]) -> None:
    given = tuple(tensor.detach() for tensor in tensors())

    def of_direction(direction: Tensor) -> Tensor:
        return steered(make(direction, [1, 2], heads=[1]))(*given)

    assert torch.autograd.gradcheck(of_direction, torch.randn(HEADS, 3, dtype=torch.float64, requires_grad=True))


def test_strengths_are_trained_in_one_block() -> None:
    """An optimizer moves them between two runs of a model, each of which has a graph of its own."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    ).eval()
    ids = torch.randint(0, 20, (1, 8))
    with torch.no_grad(), regard.steer(model, regard.Bias([0], 2.0)):
        wanted = model(ids).logits
    by = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([by], lr=0.1)
    losses = []
    with regard.steer(model, regard.Bias([0], by)):
        for _ in range(40):
            loss = (model(ids).logits - wanted).square().sum()
            (by.grad,) = torch.autograd.grad(loss, [by])
            optimizer.step()
            losses.append(float(loss))
    assert losses[-1] < losses[0] / 50
    torch.testing.assert_close(by.detach(), torch.full((2,), 2.0), atol=0.5, rtol=0)


def test_bare_calls_in_one_block_see_the_strength_of_their_time() -> None:
    given = tuple(tensor.detach() for tensor in tensors())
    by = torch.ones(HEADS, dtype=torch.float64)
    with regard.steer(None, regard.Reweight([0], by)):
        before = attention(*given, enable_gqa=True)
        by.fill_(5.0)
        after = attention(*given, enable_gqa=True)
    torch.testing.assert_close(before, attention(*given, enable_gqa=True))
    torch.testing.assert_close(after, steered(regard.Reweight([0], 5.0), causal=False)(*given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNED)
def test_strengths_in_half_precision(name: str, dtype: torch.dtype) -> None:
    given = tuple(tensor.detach().to(dtype) for tensor in tensors(9))
    strength = torch.tensor([0.3, 0.8], requires_grad=True)
    edit = LEARNED[name](strength)
    output = steered(edit, causal=False)(*given)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), dense(*given, None, False, [edit])[1], atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(output.float().sum(), strength)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regard.Gate(torch.tensor([1.0, float("nan")])), r"Gate needs each of by to be a finite number, got \[nan\]"),
        (lambda: regard.Reweight(0, [1.0, -2.0]), r"a finite number of at least 0, got \[-2.0\]"),
        (lambda: regard.Gate(torch.ones(2, 2)), r"a tensor of shape \(\) or \(heads,\), got torch.float32 of shape \(2, 2\)"),
        (lambda: regard.Gate(torch.ones(2, dtype=torch.bool)), r"got torch.bool of shape \(2,\)"),
        (lambda: regard.Gate(["a", "b"]), r"needs by to hold numbers"),
        (lambda: regard.Temperature([1.0, 0.0]), r"greater than 0; to attend to one key only"),
        (lambda: steered(regard.Gate([1.0, 2.0, 3.0]))(*tensors()), r"by is of 3 heads, but .* has 2; give one for each"),
        (lambda: steered(regard.Reweight(0, [1.0, 0.0]))(*tensors()), r"to be greater than 0, where it has a logarithm"),
        (lambda: steered(regard.Redistribute(0, 1, torch.tensor(1.0)))(*tensors()), r"to be less than 1"),
    ],
)  # fmt: skip
def test_bad_strengths(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_strength_that_an_optimizer_moved_out_of_range() -> None:
    by = torch.ones(HEADS)
    edit = regard.Reweight(0, by)
    by.fill_(-1.0)
    with pytest.raises(ValueError, match=r"at least 0, got \[-1.0, -1.0\]"):
        steered(edit)(*tensors())


def test_recipes_hold_the_values_of_strengths(tmp_path: Path) -> None:
    learned = [
        regard.Gate(torch.nn.Parameter(torch.tensor([0.5, 2.0]))),
        regard.Bias([0], torch.tensor(0.25, requires_grad=True)),
    ]
    regard.save_recipe(tmp_path / "recipe.json", learned)
    assert regard.load_recipe(tmp_path / "recipe.json") == [regard.Gate([0.5, 2.0]), regard.Bias([0], 0.25)]
    given = tensors()
    torch.testing.assert_close(
        steered(*learned)(*given), steered(*regard.load_recipe(tmp_path / "recipe.json"))(*given)
    )
    with pytest.raises(TypeError, match=r"source is a capture, which a recipe cannot hold"):
        regard.save_recipe(tmp_path / "recipe.json", [regard.PatchOutput(regard.capture(None))])
