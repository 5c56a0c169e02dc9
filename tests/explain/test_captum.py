"""captum's attributions, by captum itself and by gradients taken by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.explain import Captum

TEXTS = ["The code of Ada is 48213. The code of Ada is 4", "It rained. The code of Tom is 48"]


@pytest.fixture
def given(mini: tuple[Any, Any]) -> tuple[Any, dict[str, Tensor], Any]:
    model, tokenizer = mini
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    return model, dict(inputs), regard.logit_difference(*tokenizer.convert_tokens_to_ids(["8", "7"]))


def test_gradient_times_input(given: tuple[Any, dict[str, Tensor], Any]) -> None:
    model, inputs, metric = given
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    metric(model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])).sum().backward()
    found = Captum(method="LayerGradientXActivation").explain(model, inputs, metric)
    torch.testing.assert_close(found, (embedded * embedded.grad).sum(-1).detach(), atol=1e-4, rtol=1e-4)


def test_integrated_gradients_sum_to_the_change(given: tuple[Any, dict[str, Tensor], Any]) -> None:
    model, inputs, metric = given
    found = Captum(arguments={"n_steps": 64, "baselines": 5}).explain(model, inputs, metric)
    with torch.no_grad():
        change = metric(model(**inputs)) - metric(
            model(**inputs | {"input_ids": torch.full_like(inputs["input_ids"], 5)})
        )
    assert found.shape == inputs["input_ids"].shape
    torch.testing.assert_close(found.sum(-1), change, atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "Saliency"}, "captum.attr has no layer attribution 'Saliency'; there are LayerActivation"),
        ({"metric": None}, "needs a metric, such as"),
        ({"inputs": torch.zeros(1, 3)}, "need inputs by name, with input_ids"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear does not tell its embeddings"),
    ],
)
def test_what_is_refused(given: tuple[Any, dict[str, Tensor], Any], change: dict[str, Any], message: str) -> None:
    names = dict(zip(("model", "inputs", "metric"), given, strict=True)) | change
    method = Captum(method=names.pop("method", "LayerIntegratedGradients"))
    with pytest.raises(ValueError, match=message):
        method.explain(**names)
