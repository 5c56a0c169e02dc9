"""JUICE: the two runs by hand and through a whole model, the choice of heads, and generate."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

import regard
from regard.steer.language import (
    Example,
    JuiceHeads,
    JustRunTwice,
    calibrate_juice,
    find_juice_heads,
    generate_twice,
    juice,
    run_twice,
)
from tests.steer.language.toy import Toy

HEADS = JuiceHeads(enlarge=[(0, 1), (1, 3)], suppress=[(1, 0), (0, 2)])


def test_the_rule() -> None:
    """O + α⁺ Ō and O − α⁻ Ō on the heads chosen, in the half that is steered, whatever edits came before."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    before = (regard.Temperature(0.5, heads=[1]), regard.Gate(0.3, heads=[0, 3]))
    with regard.steer(None, *before):
        plain = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with regard.steer(None, *before, *juice(JuiceHeads([(0, 1), (0, 3)], [(0, 0)]), up=3, down=2)):
        steered = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    wanted = plain.clone()
    wanted[2:, [1, 3]] += 3 * plain[:2, [1, 3]]
    wanted[2:, [0]] -= 2 * plain[:2, [0]]
    torch.testing.assert_close(steered, wanted)


def test_cross_attention_and_edits_that_follow() -> None:
    """The clean output is what it was where the edit stands; the steered one goes on being changed."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, 2, tokens, 8, generator=generator) for tokens in (5, 9, 9))
    clean = functional.scaled_dot_product_attention(query, key, value)
    with regard.steer(None, JustRunTwice(2), regard.Block(keys=1)):
        steered = functional.scaled_dot_product_attention(query, key, value)
    with regard.steer(None, regard.Block(keys=1)):
        wanted = functional.scaled_dot_product_attention(query, key, value)
    wanted[2:] += 2 * clean[:2]
    torch.testing.assert_close(steered, wanted)


def clean_outputs(llama: LlamaForCausalLM, ids: Tensor) -> list[Tensor]:
    """What each layer's heads put out in a run by itself: the input of the output projection."""
    kept: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        for layer in llama.model.layers
    ]
    llama(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return kept


def by_hooks(llama: LlamaForCausalLM, ids: Tensor, up: float, down: float) -> Tensor:
    """The paper's two runs, one after the other."""
    clean = clean_outputs(llama, ids)
    hooks = []
    for number, layer in enumerate(llama.model.layers):
        factors = torch.zeros(4, 8)
        for by, heads in ((up, HEADS.enlarge), (-down, HEADS.suppress)):
            factors[[head for of, head in heads if of == number]] = by
        added = clean[number] * factors.flatten()
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, added=added: (args[0] + added,)))
    logits = llama(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def test_two_runs_of_a_whole_model(llama: LlamaForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        twice = run_twice(llama, juice(HEADS, up=2, down=1.5), input_ids=ids)
        torch.testing.assert_close(twice, by_hooks(llama, ids, 2, 1.5), atol=1e-4, rtol=1e-4)
        gates = [
            regard.Gate(by, layers=layer, heads=head)
            for by, heads in ((3, HEADS.enlarge), (-0.5, HEADS.suppress))
            for layer, head in heads
        ]
        with regard.steer(llama, *gates):
            once = llama(input_ids=ids).logits
    assert (twice - once).abs().max() > 0.05  # a gate in one run is not the same


def test_generate(llama: LlamaForCausalLM, ids: Tensor) -> None:
    edits = juice(HEADS, up=4, down=3)
    generated = generate_twice(llama, edits, input_ids=ids, max_new_tokens=6)
    text = ids
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, by_hooks(llama, text, 4, 3)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, text)
    assert not torch.equal(generated, llama.generate(ids, max_new_tokens=6, do_sample=False))
    beams = generate_twice(llama, edits, input_ids=ids, max_new_tokens=6, num_beams=3)
    assert beams.shape == generated.shape
    with pytest.raises(ValueError, match="needs do_sample=False"):
        generate_twice(llama, edits, input_ids=ids, do_sample=True)


def test_heads_are_chosen_that_help_on_every_set() -> None:
    """Head 0 speaks for the answer 3, head 1 against it, head 2 for the answer of one set and against that of the other."""
    value = torch.zeros(3, 3, 4)
    value[0, :, 3], value[1, :, 2], value[2, :, 1] = 0.5, 0.5, 0.5
    value[2, :, 2] = -0.1
    example, other = Example([0, 1, 2], answer=3), Example([0, 1, 2], answer=3, choices=[1, 3])
    done: list[tuple[int, int]] = []
    found = find_juice_heads(
        Toy(value), {"clean": [example], "conflict": [other, example]}, progress=lambda *at: done.append(at)
    )
    assert done[-1] == (3, 3)
    assert found.enlarge == [(0, 0)]
    assert found.suppress == [(0, 2), (0, 1)] or found.suppress == [(0, 1), (0, 2)]
    only_choices = find_juice_heads(Toy(value), {"conflict": [other]}, number=1)
    assert only_choices.suppress == [(0, 2)]


def test_a_head_that_helps_on_one_set_alone_is_not_chosen() -> None:
    value = torch.zeros(3, 3, 4)
    value[0, :, 3] = value[1, :, 2] = 0.5
    value[2, :, 2:] = 0.5
    sets = {name: [Example([0, 1, 2], answer=answer)] for name, answer in (("memory", 3), ("context", 2))}
    assert find_juice_heads(Toy(value), sets) == JuiceHeads(enlarge=[(0, 2)], suppress=[])


def test_factors_are_chosen() -> None:
    """The answer starts behind by 0.5 and gains 0.25 by a head's α⁺: more of it is better, and the other does harm."""
    value = torch.zeros(2, 3, 2)
    value[0, :, 1], value[1, :, 0] = 0.25, 0.75
    heads = JuiceHeads(enlarge=[(0, 0)], suppress=[(0, 1)])
    edits = calibrate_juice(Toy(value), [Example([0, 1, 2], answer=1)], heads, up=range(3), down=range(2))
    assert edits == juice(heads, up=2, down=1)
    assert calibrate_juice(Toy(value), [Example([0, 1, 2], answer=0)], heads) == ()


def test_errors(llama: LlamaForCausalLM, ids: Tensor) -> None:
    with (
        pytest.raises(ValueError, match=r"has a batch of 1; use run_twice or generate_twice"),
        regard.steer(llama, JustRunTwice(1)),
    ):
        llama(input_ids=ids)
    with pytest.raises(ValueError, match=r"needs sets that have examples, got \{'a': 0\}"):
        find_juice_heads(llama, {"a": []})
    with pytest.raises(ValueError, match="no examples"):
        calibrate_juice(llama, [], HEADS)
