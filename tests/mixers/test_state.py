"""States are values: moved, cut off, reordered, saved and loaded, and refused by layers that are not theirs."""

import io
import re

import pytest
import torch

from regard.mixers import DeltaRule, LongTermMemory, Memory, Mixer, SlidingWindow, SoftmaxAttention, State, catalogue

NAMES = sorted(catalogue.mixers())


def made(name: str) -> Mixer:
    torch.manual_seed(0)
    return catalogue.mixers()[name](16).eval()


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str) -> None:
    mixer, x = made(name), torch.randn(2, 25, 16)
    _, state = mixer(x[:, :20])
    file = io.BytesIO()
    torch.save(state.detach(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, State)
    assert (loaded.seen, loaded.bytes, loaded.texts) == (20, state.bytes, 2)
    torch.testing.assert_close(made(name)(x[:, 20:], loaded)[0], mixer(x[:, 20:], state)[0])


@pytest.mark.parametrize("name", NAMES)
def test_reordered_as_beams_are(name: str) -> None:
    mixer, x, more = made(name), torch.randn(3, 20, 16), torch.randn(4, 3, 16)
    beams = torch.tensor([2, 0, 0, 1])
    _, state = mixer(x)
    _, expected = mixer(x[beams])
    torch.testing.assert_close(mixer(more, state.reorder(beams))[0], mixer(more, expected)[0])


@pytest.mark.parametrize("name", NAMES)
def test_detached(name: str) -> None:
    mixer, x = made(name), torch.randn(1, 20, 16, requires_grad=True)
    _, state = mixer(x)
    y, _ = mixer(torch.randn(1, 4, 16), state.detach())
    assert not any(tensor.requires_grad for tensor in state.detach().tensors.values())
    (slope,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    assert slope is None


@pytest.mark.parametrize("name", NAMES)
def test_for_another_dtype(name: str) -> None:
    mixer, x = made(name), torch.randn(1, 24, 16)
    expected, _ = mixer(x)
    _, state = mixer(x[:, :20])
    half, last = made(name).bfloat16(), x[:, 20:].bfloat16()
    with pytest.raises(
        ValueError, match=r"tokens of torch.bfloat16, cpu, and a state of torch.float32, cpu: state.to\("
    ):
        half(last, state)
    y, after = half(last, state.to(dtype=torch.bfloat16))
    assert after.dtype == torch.bfloat16
    assert (y.float() - expected[:, 20:]).norm() < 0.03 * expected[:, 20:].norm()
    counts = [key for key, tensor in state.tensors.items() if not tensor.is_floating_point()]
    assert all(state.to(dtype=torch.bfloat16).tensors[key].dtype == state.tensors[key].dtype for key in counts)


def test_on_another_device() -> None:
    mixer, x = DeltaRule(8, heads=2), torch.randn(1, 5, 8)
    _, state = mixer(x)
    assert all(tensor.device.type == "meta" for tensor in state.to("meta").tensors.values())
    with pytest.raises(ValueError, match=r"tokens of torch.float32, cpu, and a state of torch.float32, meta"):
        mixer(x, state.to("meta"))


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (DeltaRule(8, heads=2), DeltaRule(8, heads=4), "DeltaRule(heads=4) goes on from a state of its own, got that of "
         "DeltaRule(heads=2)"),
        (LongTermMemory(8, 2, chunk=4), LongTermMemory(8, 2, chunk=8), "LongTermMemory(chunk=8) goes on from a state of its "
         "own, got that of LongTermMemory(chunk=4)"),
        (LongTermMemory(8, 2, memory=Memory(1)), LongTermMemory(8, 2), "LongTermMemory(memory=None) goes on"),
        (SlidingWindow(8, 2, window=3), SlidingWindow(8, 2, window=4), "SlidingWindow(window=4) goes on"),
        (SoftmaxAttention(8, 2, rotary=None), SoftmaxAttention(8, 2), "SoftmaxAttention(rotary=10000.0) goes on"),
    ],
)  # fmt: skip
def test_states_of_other_configurations(one: Mixer, other: Mixer, message: str) -> None:
    x = torch.randn(1, 5, 8)
    _, state = one(x)
    with pytest.raises(ValueError, match=re.escape(message)):
        other(x, state)


def test_what_is_refused() -> None:
    mixer, x = DeltaRule(8, heads=2), torch.randn(2, 5, 8)
    _, state = mixer(x)
    with pytest.raises(
        ValueError, match=r"takes x of shape \(batch, tokens, 8\), at least one of each, got \(0, 5, 8\)"
    ):
        mixer(x[:0])
    with pytest.raises(IndexError, match=r"the state is of 2 texts; reorder was given \[0, 2\]"):
        state.reorder(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"reorder takes a vector of texts' numbers, got torch.float32 \(2,\)"):
        state.reorder(torch.zeros(2))
