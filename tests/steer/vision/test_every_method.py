"""What every method owes its user: padded batches, beams, half precision, and no matrix."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import regard
from regard.steer import vision
from regard.steer.recipe import load_recipe, save_recipe
from tests.steer.vision.conftest import WORDS, Seer

Method = Callable[[torch.nn.Module, dict[str, Tensor]], Sequence[regard.Edit]]

METHODS: dict[str, Method] = {
    "var": lambda model, inputs: vision.var(model, inputs, ratio=0, least=0, threshold=1, dimensions=[3, 5]),
    "image_boost": lambda model, inputs: [vision.image_boost(model)],
    "gift": lambda model, inputs: [vision.gift(model, inputs)],
    "dual_stream": lambda model, inputs: vision.dual_stream(model, inputs),
    "vif": lambda model, inputs: vision.vif(model, inputs),
}
PROCESSORS = {
    "AvisC": lambda model, inputs: vision.AvisC(model, inputs, beta=1e-9),
    "AGLA": lambda model, inputs: vision.AGLA(model, inputs, vision.noised(inputs), beta=1e-9),
    "Rebalancing": lambda model, inputs: vision.Rebalancing(model, inputs, beta=1e-9, noisy=inputs),
}


def beside(seer: Seer) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The prompt, another with two words less and another image, and both as a batch padded on the left."""
    one = seer.inputs
    other = {name: value.clone() for name, value in one.items()}
    generator = torch.Generator().manual_seed(7)
    other["pixel_values"] = torch.randn(one["pixel_values"].shape, generator=generator)
    for name, value in one.items():
        if value.shape == (1, 22):
            other[name] = value[:, :20].clone()
    both = {}
    for name, value in one.items():
        padded = functional.pad(other[name], (2, 0)) if value.shape == (1, 22) else other[name]
        both[name] = torch.cat([value, padded])
    return one, other, both


def scores(seer: Seer, inputs: dict[str, Tensor], **arguments: object) -> Tensor:
    return Seer(seer.name, seer.model, inputs, seer.image, seer.question).scores(**arguments)


@pytest.mark.parametrize("name", METHODS)
def test_padded_batches(seer: Seer, name: str) -> None:
    one, other, both = beside(seer)
    found = []
    for inputs in (one, other, both):
        with regard.steer(seer.model, *METHODS[name](seer.model, inputs)):
            found.append(scores(seer, inputs))
    torch.testing.assert_close(found[2][:, :1], found[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[2][:, 1:], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_padded_batches(seer: Seer, name: str) -> None:
    torch.manual_seed(0)
    one, other, both = beside(seer)
    if name == "AGLA":  # whose noise stands for a masked image: the same for the batch as for its texts
        rest = [vision.noised(inputs) for inputs in (one, other)]
        rest.append(both | {"pixel_values": torch.cat([noisy["pixel_values"] for noisy in rest])})
        made = [vision.AGLA(seer.model, i, n, beta=1e-9) for i, n in zip((one, other, both), rest, strict=True)]
    else:
        made = [PROCESSORS[name](seer.model, inputs) for inputs in (one, other, both)]
    found = [scores(seer, i, logits_processor=[p]) for i, p in zip((one, other, both), made, strict=True)]
    for alone, together in ((found[0], found[2][:, :1]), (found[1], found[2][:, 1:])):
        allowed = alone.isfinite() & together.isfinite()
        torch.testing.assert_close(together[allowed], alone[allowed], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_beams(seer: Seer, name: str) -> None:
    with regard.steer(seer.model, *METHODS[name](seer.model, seer.inputs)):
        assert seer.generate(num_beams=2).shape == (1, 26)


@pytest.mark.parametrize("name", ["var", "vif", "gift", "dual_stream"])
def test_recipes(seer: Seer, name: str, tmp_path: Path) -> None:
    edits = METHODS[name](seer.model, seer.inputs)
    save_recipe(tmp_path / "recipe.json", edits)
    with regard.steer(seer.model, *edits):
        wanted = seer.logits()
    with regard.steer(seer.model, *load_recipe(tmp_path / "recipe.json")):
        torch.testing.assert_close(seer.logits(), wanted)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(seer: Seer, name: str) -> None:
    edits = METHODS[name](seer.model, seer.inputs)
    plain = seer.logits()
    with regard.steer(seer.model, *edits):
        exact = seer.logits()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in seer.inputs.items()}
    try:
        with torch.no_grad(), regard.steer(seer.model.bfloat16(), *edits):
            rounded = seer.model(**half).logits[..., :WORDS].float()
        METHODS[name](seer.model, half)
    finally:
        seer.model.float()
    assert (rounded - exact)[:, -1].norm() < 0.5 * plain[:, -1].norm()


def test_no_matrix_is_made() -> None:
    tokens = 4096
    query, key, value = torch.randn(3, 1, 2, tokens, 16)
    image = torch.zeros(1, tokens, dtype=torch.bool)
    image[:, 5:1000] = True
    saliency = torch.rand(1, tokens) * image
    edits = (
        vision.RedistributeSinks(sinks=[0, 7, 9], image=image, ratio=0, least=0),
        vision.FuseGaze(saliency, image, slice(1000, 1200)),
        vision.Emphasize(slice(10, 50), 0.5, image),
    )
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                r.numel() for r in (result if isinstance(result, tuple) else [result]) if isinstance(r, Tensor)
            )
            return result

    with Sizes(), regard.steer(None, *edits):
        functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert max(sizes) < tokens * tokens / 8
