"""What is read under autocast is that of the rounded queries and keys, and as exact as without: R8."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import regard
from tests.runtime.models import gemma2
from tests.watch.test_models import built

TEXT = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
TOKENS = 300  # of more than one strip


def statistics() -> list[regard.Statistic]:
    return [
        regard.Entropy(), regard.Received(), regard.Mass({"first": slice(0, 9)}), regard.Sinks(), regard.TopK(3),
        regard.Rows([1, 40]), regard.MeanDistance(), regard.ValueNorm(), regard.At("previous", "own"), regard.Pooled(50),
    ]  # fmt: skip


class Attention(nn.Module):
    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return scaled_dot_product_attention(*inputs, enable_gqa=True, **options)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double() if tensor.is_floating_point() else tensor


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.4},
    "bias": {"attn_mask": 3 * torch.randn(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))},
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_every_statistic(options: dict[str, Any], share: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Attention(), [3 * torch.randn(2, 4, TOKENS, 16), *torch.randn(2, 2, 2, TOKENS, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(*inputs, **options)
        with regard.watch(model, *statistics(), share=share) as seen:
            output = model(*inputs, **options)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, plain)
    with regard.watch(model, *statistics()) as exact:
        model(*map(rounded, inputs), **{k: rounded(v) if isinstance(v, Tensor) else v for k, v in options.items()})
    data = seen.dataset()
    for name, wanted in exact.dataset().data_vars.items():
        assert data[name].dtype == np.float32
        np.testing.assert_allclose(data[name], wanted, rtol=2e-5, atol=2e-6, err_msg=str(name))


def test_a_map_that_is_asked_under_autocast() -> None:
    query, key = 3 * torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    rows, columns = [2, 7], [0, 5, 19]
    with torch.autocast("cpu", torch.bfloat16):
        with regard.watch(keep_maps=True) as seen:
            scaled_dot_product_attention(query, key, key, enable_gqa=True)
        ((found,),) = seen.maps.values()
        tile, row, dense = found.tile(rows, columns), found.rows(rows), found.dense()
        own = found.at(torch.arange(20))
    wanted = (rounded(query) @ rounded(key).repeat_interleave(2, 1).mT / 4).softmax(-1)
    for one, other in (
        (dense, wanted),
        (row, wanted[:, :, rows]),
        (tile, wanted[:, :, rows][..., columns]),
        (own, wanted.diagonal(dim1=-2, dim2=-1)),
    ):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-6, rtol=2e-5)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()


@pytest.mark.parametrize("make", [lambda: built("llama"), gemma2, encoder_layer], ids=["sdpa", "eager", "fast path"])
def test_models(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 12, 32)

    def run() -> Tensor:
        with torch.no_grad():
            return model(x) if isinstance(model, nn.TransformerEncoderLayer) else model(input_ids=TEXT)[0]

    with torch.autocast("cpu", torch.bfloat16):
        plain = run()
        with regard.watch(model, regard.Received(), regard.Entropy(), share=False) as seen:
            assert torch.equal(run(), plain)
        with regard.capture(model, maps=True) as source:
            run()
    data = seen.dataset()
    for number, path in enumerate(seen.layers):
        call = source.at(path).call
        assert call is not None
        exact = call.to(torch.bfloat16).to(torch.float64).map()
        np.testing.assert_allclose(data.received[number], exact.received(), rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(data.entropy[number], exact.entropy(), rtol=1e-4, atol=1e-5)
