"""What every mechanism is held to: its forms agree, in values and gradients, at any length and from any state."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from regard.mixers import Mixer, SoftmaxAttention, ValueMixer
from regard.mixers import mixer as module

Run = Callable[..., tuple[Tensor, Any]]


def check_forms(
    function: Run, inputs: Sequence[Tensor], forms: Sequence[str] = ("chunked", "recurrent"), tolerance: float = 1e-4
) -> None:
    """Outputs, states and gradients of each form in float32, and outputs in bfloat16, against the parallel one in float64."""
    _check_half(function, [tensor.detach().bfloat16() for tensor in inputs], ("parallel", *forms))
    expected = _with_gradients(function, [tensor.double() for tensor in inputs], "parallel")
    for form in forms:
        found = _with_gradients(function, list(inputs), form)
        for name, one, other in zip(("output", "state", "gradients"), found, expected, strict=True):
            for part, reference in zip(one, other, strict=True):
                if not reference.numel():
                    continue
                error = _error(part, reference)
                assert error < tolerance, f"{form}: {name} off by {error:.2e}"


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest number expected, or of 1."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1.0))


def _check_half(function: Run, inputs: Sequence[Tensor], forms: Sequence[str]) -> None:
    """What goes in is rounded, and what comes out."""
    with torch.no_grad():
        expected, _ = function(*(tensor.double() for tensor in inputs), form="parallel")
        for form in forms:
            found, _ = function(*inputs, form=form)
            assert found.dtype == torch.bfloat16, form
            error = _error(found, expected)
            assert error < 2e-2, f"{form} in bfloat16: output off by {error:.2e}"


def _with_gradients(
    function: Run, inputs: Sequence[Tensor], form: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output, state = function(*leaves, form=form)
    tensors = _tensors(state)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    total = (output * weights).sum() + sum((tensor.float().sin().sum() for tensor in tensors), torch.zeros(()))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [output.detach()], [tensor.detach() for tensor in tensors], list(gradients)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [tensor for tensor in values if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def check_mixer(mixer: Mixer, tokens: int = 37, tolerance: float = 1e-4, half: float = 2e-2) -> None:
    """A layer: in pieces as at once, decoding as reading, padding on either side as none, and gradients everywhere."""
    mixer = mixer.eval()
    x = torch.randn(2, tokens, mixer.dim, generator=torch.Generator().manual_seed(tokens))
    whole, after = mixer(x)
    assert whole.shape == x.shape
    assert after.seen == tokens
    _check_pieces(mixer, x, whole, tolerance)
    _check_padding(mixer, x, tolerance)
    _check_reading(mixer, x, tolerance)
    _check_gradients(mixer, x)
    _check_map(mixer, x, whole, tolerance)
    _check_layer_in_half(deepcopy(mixer).bfloat16(), x.bfloat16(), half)


def _check_map(mixer: Mixer, x: Tensor, whole: Tensor, tolerance: float) -> None:
    """The three steps, of which the middle one is the map, make the output; what follows is not seen."""
    if not isinstance(mixer, ValueMixer) or not (mixer.hides_map or isinstance(mixer, SoftmaxAttention)):
        return
    projected, found = mixer.project(x), mixer.map(x)
    torch.testing.assert_close(mixer.out(found @ projected.value, projected), whole, atol=tolerance, rtol=tolerance)
    assert not found.dense().triu(1).any()


def _check_layer_in_half(mixer: Mixer, x: Tensor, tolerance: float) -> None:
    """Reading and decoding in bfloat16 against the same weights in float32."""
    with torch.no_grad():
        expected, _ = deepcopy(mixer).float()(x.float())
        whole, _ = mixer(x)
        first, state = mixer(x[:, :-1])
        step, _ = mixer.decode(x[:, -1], state)
        for found, reference in ((whole, expected), (first, expected[:, :-1]), (step, expected[:, -1])):
            assert found.dtype == torch.bfloat16
            error = _error(found, reference)
            assert error < tolerance, f"in bfloat16: off by {error:.2e}"


def _check_pieces(mixer: Mixer, x: Tensor, whole: Tensor, tolerance: float) -> None:
    for cut in (1, 5, 16, x.shape[1] - 3):
        first, state = mixer(x[:, :cut])
        rest, state = mixer(x[:, cut:-2], state)
        steps = []
        for token in (-2, -1):
            step, state = mixer.decode(x[:, token], state)
            steps.append(step)
        joined = torch.cat([first, rest, torch.stack(steps, 1)], 1)
        assert torch.allclose(joined, whole, atol=tolerance, rtol=tolerance), f"cut at {cut}"


def _check_padding(mixer: Mixer, x: Tensor, tolerance: float) -> None:
    for left in (True, False):
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        mask[1, slice(None, 4) if left else slice(-4, None)] = False
        real = x[1:, 4:] if left else x[1:, :-4]
        padded, state = mixer(x.masked_fill(~mask[..., None], 7.0), mask=mask)
        alone, own = mixer(real)
        assert torch.allclose(padded[1][mask[1]], alone[0], atol=tolerance, rtol=tolerance), f"left={left}"
        assert not padded[1][~mask[1]].any()
        more = x[:, :1]
        after, _ = mixer(more, state)
        after_alone, _ = mixer(more[1:], own)
        assert torch.allclose(after[1], after_alone[0], atol=tolerance, rtol=tolerance), f"after padding, left={left}"


def _check_reading(mixer: Mixer, x: Tensor, tolerance: float) -> None:
    """Without gradients a text is read in pieces, some of which may be padding alone."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, :18] = False
    whole, after = mixer(x, mask=mask)
    with torch.no_grad(), patch.multiple(module, _PIECE=8, _SMALLEST_PIECE=8):
        pieces, state = mixer(x, mask=mask)
    assert torch.allclose(pieces, whole, atol=tolerance, rtol=tolerance), "in pieces"
    for name, tensor in after.tensors.items():
        if tensor.is_floating_point():
            assert torch.allclose(state.tensors[name], tensor, atol=tolerance, rtol=tolerance), f"in pieces: {name}"


def _check_gradients(mixer: Mixer, x: Tensor) -> None:
    output, _ = mixer(x)
    output.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        assert torch.isfinite(parameter.grad).all(), name
    mixer.zero_grad()
