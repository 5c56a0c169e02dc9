"""Focus directions: the edit by hand, what is learned, and a whole model."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

import regard
from regard.steer.language import Example, FocusDirections, best_heads, context_share, learn_focus_directions
from tests.steer.language.toy import Toy


def test_the_rule() -> None:
    """q + α d_q and k + α d_k on the chosen head, in a layer whose heads share keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    toward = [torch.randn(4, 8, generator=generator) for _ in range(2)]
    directions = FocusDirections({0: toward[0]}, {0: toward[1]}, keys=[2, 3])
    with regard.steer(None, *directions.edits(by=0.3, heads=[(0, 1)])):
        steered = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    key, value = (tensor.repeat_interleave(2, 1).clone() for tensor in (key, value))
    query = query.clone()
    query[:, 1] += 0.3 * toward[0][1]
    key[:, 1, 2:4] += 0.3 * toward[1][1]
    torch.testing.assert_close(steered, functional.scaled_dot_product_attention(query, key, value))


def test_a_direction_of_every_key_does_nothing() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    with regard.steer(None, *FocusDirections({0: torch.zeros(2, 8)}, {0: 9 * torch.ones(2, 8)}).edits(1.0)):
        steered = functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(steered, functional.scaled_dot_product_attention(query, key, value))


def test_the_first_step_is_of_the_learning_rate() -> None:
    """Of AdamW: each entry moves by the learning rate, in the sign of the gradient; and there is none for a common d_k."""
    key = torch.zeros(1, 3, 4)
    key[0, 1] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    model = Toy(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), key)
    example = Example([0, 1, 2], highlighted=1)
    directions = learn_focus_directions(model, [example], epochs=1, learning_rate=0.1, seed=3)
    start = torch.normal(0.0, 0.01, (1, 4), generator=torch.Generator().manual_seed(3))
    moved = directions.query[0] - start * (1 - 0.1 * 0.01)
    torch.testing.assert_close(moved, 0.1 * key[:, 1].sign(), atol=1e-4, rtol=0)
    assert directions.key[0].abs().max() < 0.15


def test_learning_finds_the_relevant_token() -> None:
    key = torch.zeros(2, 3, 4)
    key[0, 1], key[1, 1] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, -1.0, 0, 0])
    model = Toy(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), key)
    example = Example([0, 1, 2], highlighted=1)
    done: list[tuple[int, int]] = []
    directions = learn_focus_directions(
        model, [example], epochs=60, learning_rate=0.1, progress=lambda *at: done.append(at)
    )
    assert done[-1] == (60, 60)
    with regard.steer(model, *directions.edits(by=1.0, heads=[(0, 1)])):
        shares = context_share(model, [example])
    assert shares[0, 0] == pytest.approx(1 / 3)
    assert shares[0, 1] > 0.8
    with regard.steer(model, *directions.edits(by=-1.0)):
        assert max(context_share(model, [example]).values()) < 0.1


def test_generate(llama: LlamaForCausalLM, ids: Tensor) -> None:
    example = Example(ids[0], highlighted=slice(4, 7), response=slice(10, 12))
    before = context_share(llama, [example])
    directions = learn_focus_directions(llama, [example], epochs=30, learning_rate=0.1, keys=slice(1, None))
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert {layer: tuple(d.shape) for layer, d in directions.query.items()} == {0: (4, 8), 1: (4, 8)}
    heads = best_heads(before, top=3)
    first = [head for head in heads if head[0] == 0] or [(0, 0)]
    with regard.steer(llama, *directions.edits(by=1.0, heads=first)):
        after = context_share(llama, [example])
    assert all(after[head] > before[head] for head in first)
    edits = directions.edits(by=1.0)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    with regard.steer(llama, *edits):
        cached = llama.generate(ids, **arguments)
    with regard.steer(llama, *edits):
        assert torch.equal(cached, llama.generate(ids, **arguments, use_cache=False))
    assert not torch.equal(cached, llama.generate(ids, **arguments))


def test_errors() -> None:
    with pytest.raises(ValueError, match="no examples"):
        learn_focus_directions(Toy(torch.zeros(1, 2, 2)), [])
    with pytest.raises(ValueError, match=r"known for the layers \[0\], not for layer 2"):
        FocusDirections({0: torch.zeros(1, 2)}, {0: torch.zeros(1, 2)}).edits(heads=[(2, 0)])
    with pytest.raises(ValueError, match="one of 2 tokens has none"):
        learn_focus_directions(Toy(torch.zeros(1, 2, 2)), [Example([0, 1])])


def test_a_key_direction_for_all_keys_is_not_added() -> None:
    """No softmax notices it, and a decoding step would pay for longer keys."""
    directions = FocusDirections({0: torch.ones(2, 4)}, {0: torch.ones(2, 4)})
    assert [type(edit) for edit in directions.edits()] == [regard.AddToQuery]
    some = FocusDirections({0: torch.ones(2, 4)}, {0: torch.ones(2, 4)}, keys=slice(1, None))
    assert [type(edit) for edit in some.edits()] == [regard.AddToQuery, regard.AddToKey]
