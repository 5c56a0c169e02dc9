"""A model's own softmax over keys is seen and steered where it meets its values."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module, functional

import regard
from regard.cache import KeepAll
from regard.steer import Edit
from tests.runtime.models import (
    EDITS,
    bloom,
    check_seen,
    check_steered,
    deberta,
    donut_swin,
    edited_matrix,
    first_output,
    gptj,
    inputs_of,
    mpt,
    xlnet,
)

MODELS = [bloom, mpt, gptj, deberta, donut_swin, xlnet]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_seen_as_the_model_returns_it(make: Callable[[], Module], padded: bool) -> None:
    watched = check_seen(make(), padded)
    assert all(type(matrix) is Tensor for matrix in watched.attentions)


@pytest.mark.parametrize("make", [bloom, mpt, gptj, deberta, donut_swin])
@pytest.mark.parametrize("edits", EDITS, ids=str)
def test_steered_as_the_stored_matrix_is(
    make: Callable[[], Module], edits: Sequence[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def softmax(logits: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        assert dim in (-1, logits.ndim - 1)
        return edited_matrix(logits, edits).to(logits.dtype)

    check_steered(make(), edits, lambda: monkeypatch.setattr(functional, "softmax", softmax))


@pytest.mark.parametrize("make", [bloom, mpt, gptj])
def test_generate_is_one_text(make: Callable[[], Module]) -> None:
    model: Any = make()
    inputs, options = inputs_of(model), {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with regard.watch(model, regard.Entropy()) as seen:
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert seen.dataset().entropy.sizes["query"] == 15
    with (
        pytest.raises(RuntimeError, match=r"computes its softmax itself.*cannot be dropped"),
        regard.compress(model, KeepAll()),
    ):
        model.generate(**inputs, **options)


def test_what_needs_queries_is_refused() -> None:
    model = bloom()
    with (
        pytest.raises(ValueError, match=r"AddToQuery: transformer\.h\.0\.self_attention computes its softmax itself"),
        regard.steer(model, regard.AddToQuery(torch.ones(8))),
    ):
        first_output(model, inputs_of(model))


class Own(nn.Module):
    """Attention of one head in some form of its own."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.num_heads = 2

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        return self.mix(logits, values)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda s, v: s.softmax(-1) @ v,
    "half": lambda s, v: torch.matmul(torch.softmax(s, -1, dtype=torch.float64).to(s.dtype), v),
    "bmm": lambda s, v: torch.bmm(s.flatten(0, 1).softmax(-1), v.flatten(0, 1)).view(2, 2, 5, 3),
    "einsum": lambda s, v: torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v).transpose(1, 2),
    "dots": lambda s, v: torch.einsum("...ij,...jd->...id", s.softmax(-1), v),
    "keys first": lambda s, v: torch.einsum("ijbh,bhjd->bhid", s.permute(2, 3, 0, 1).softmax(1), v),
    "transposed": lambda s, v: (v.mT @ s.softmax(-1).mT).mT,
    "over rows": lambda s, v: s.mT.softmax(-2).mT @ v,
    "masked after": lambda s, v: s.softmax(-1).masked_fill(torch.eye(5, 6, dtype=torch.bool), 0.0) @ v,
    "a key of its own": lambda s, v: functional.pad(s, (0, 1)).softmax(-1)[..., :-1] @ v,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    module, eye = Own(FORMS[form]), torch.eye(6).expand(2, 2, 6, 6)
    plain = module(logits, values)
    wanted = FORMS[form](logits, eye) if form != "bmm" else logits.softmax(-1)
    with regard.watch(module, regard.Received(), keep_maps=True) as seen:
        assert torch.equal(module(logits, values), plain)
    torch.testing.assert_close(seen.maps["Own"][0].dense(), wanted, atol=1e-6, rtol=1e-5)
    with regard.steer(module, regard.Reweight(keys=[1], by=0, renormalize=False), regard.Gate(2.0, heads=1)):
        steered = module(logits, values)
    factor = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    without = wanted * (torch.arange(6) != 1)
    torch.testing.assert_close(steered, without @ values * factor, atol=1e-5, rtol=1e-5)


def test_dropout_is_of_the_model_and_not_of_what_is_read() -> None:
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    module = Own(lambda s, v: functional.dropout(s.softmax(-1), 0.5, training=True) @ v)
    torch.manual_seed(1)
    plain = module(logits, values)
    torch.manual_seed(1)
    with regard.watch(module, regard.Received(), keep_maps=True) as seen:
        assert torch.equal(module(logits, values), plain)
    torch.testing.assert_close(seen.maps["Own"][0].dense(), logits.softmax(-1))


def test_gradients_are_the_models_own() -> None:
    logits, values = torch.randn(2, 2, 5, 6, requires_grad=True), torch.randn(2, 2, 6, 3, requires_grad=True)
    module = Own(FORMS["matmul"])
    wanted = torch.autograd.grad(module(logits, values).square().sum(), (logits, values))
    with regard.watch(module, regard.Received()):
        watched = torch.autograd.grad(module(logits, values).square().sum(), (logits, values))
    assert all(map(torch.equal, watched, wanted))
    with regard.steer(module, regard.Temperature(0.5)):
        steered = torch.autograd.grad(module(logits, values).square().sum(), (logits, values))
    wanted = torch.autograd.grad(module(logits * 2, values).square().sum(), (logits, values))
    for one, other in zip(steered, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_calls_outside_the_model_and_the_block_are_left_alone() -> None:
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    module, other = Own(FORMS["matmul"]), Own(FORMS["matmul"])
    with regard.steer(module, regard.Gate(0.0)):
        assert not module(logits, values).any()
        outside = other(logits, values)
    assert torch.equal(outside, logits.softmax(-1) @ values)
    assert torch.equal(module(logits, values), outside)
    assert type(logits.softmax(-1)) is Tensor


class Attention(nn.Module):
    """Weights that enter no product with values."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1).amax(-1)


def test_a_softmax_that_is_not_followed_is_named() -> None:  # R4
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    model = nn.ModuleDict({"seen": Own(FORMS["matmul"]), "lost": Attention()})
    model.forward = lambda: (model["seen"](logits, values), model["lost"](logits))  # type: ignore[method-assign]
    where = r"softmax of Attention at runtime/test_softmax.py:\d+"
    for block in (regard.watch(model, regard.Received()), regard.steer(model, regard.Gate(2.0)), regard.capture(model)):
        with pytest.warns(UserWarning, match=rf"not seen: lost \({where}\)") as warned, block:
            model()
        assert [warning.filename for warning in warned] == [__file__]
    with pytest.raises(RuntimeError, match=where), regard.watch(model["lost"], regard.Received()):
        model["lost"](logits)


class InParts(nn.Module):
    """One softmax, the values of whose keys are multiplied a few at a time, as Longformer's and BigBird's are."""

    def __init__(self, *ends: int) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        weights, total = logits.softmax(-1), torch.zeros(())
        for start, end in zip((0, *self.ends), self.ends, strict=False):
            total = total + weights[..., start:end] @ values[..., start:end, :]
        return total


def test_a_softmax_in_parts_is_named_and_left_alone() -> None:
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    model = nn.ModuleDict({"whole": InParts(6), "parts": InParts(2, 4, 6)})
    model.forward = lambda: model["whole"](logits, values) + model["parts"](logits, values)  # type: ignore[method-assign]
    plain = model()
    named = pytest.warns(UserWarning, match=r"not seen: parts \(softmax of InParts at .*, some of its keys at a time\)")
    with named, regard.watch(model, regard.Received()) as seen:
        assert torch.equal(model(), plain)
    assert seen.layers == ["whole"]
    with (
        pytest.raises(RuntimeError, match="some of its keys at a time"),
        regard.watch(model["parts"], regard.Received()),
    ):
        model["parts"](logits, values)


def test_a_sink_put_beside_the_keys_is_no_part() -> None:
    logits, values = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = InParts(5)
        with regard.watch(model, regard.Received()) as seen:
            model(logits, values)
    torch.testing.assert_close(
        torch.as_tensor(seen.dataset().received.values)[0], logits.softmax(-1)[..., :5].sum(2), atol=1e-5, rtol=1e-5
    )


def test_what_is_all_seen_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bloom()
        with torch.no_grad(), regard.watch(model, regard.Received()):
            model(**inputs_of(model))


def test_no_implementation_is_advised_that_a_model_does_not_have() -> None:  # R18, S11
    model: Any = bloom()
    assert not model._supports_sdpa
    model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(RuntimeError, match=r'set_attn_implementation\("eager"\)'),
        regard.watch(model, regard.Received()),
    ):
        pass
