"""Outputs and matrices of another run's heads in this one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import LlamaConfig, LlamaForCausalLM

import regard


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=50, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    first, second = torch.randint(0, 50, (2, 1, 9), generator=torch.Generator().manual_seed(0))
    return first, second


def test_every_output_of_the_last_layer_and_the_last_token_make_the_other_run(
    llama: LlamaForCausalLM, texts: tuple[Tensor, Tensor]
) -> None:
    clean, corrupted = texts
    corrupted[0, -1] = clean[0, -1]  # what the last token adds besides attention is the same
    with torch.no_grad():
        with regard.capture(llama, outputs=True) as source:
            wanted = llama(clean).logits[:, -1]
        with regard.steer(llama, regard.PatchOutput(source, queries=-1)):
            patched = llama(corrupted).logits[:, -1]
        plain = llama(corrupted).logits[:, -1]
    torch.testing.assert_close(patched, wanted, atol=1e-5, rtol=1e-5)
    assert (plain - wanted).abs().max() > 0.1


def test_some_heads_of_some_queries(llama: LlamaForCausalLM, texts: tuple[Tensor, Tensor]) -> None:
    clean, corrupted = texts
    with torch.no_grad():
        with regard.capture(llama, outputs=True) as source:
            llama(clean)
        with regard.capture(llama, outputs=True) as own:
            llama(corrupted)
        patch = regard.PatchOutput(source, queries=[2, 5], heads=[1, 3], layers=0)
        with regard.capture(llama, outputs=True) as seen, regard.steer(llama, patch):
            llama(corrupted)
    first, second = source.paths
    wanted = own.at(first).output.clone()
    wanted[:, [[1], [3]], [2, 5]] = source.at(first).output[:, [[1], [3]], [2, 5]]
    torch.testing.assert_close(seen.at(first).output, wanted)
    assert not torch.allclose(seen.at(second).output[:, :, 5:], own.at(second).output[:, :, 5:])


def test_positions_are_those_of_the_text_in_generate(llama: LlamaForCausalLM, texts: tuple[Tensor, Tensor]) -> None:
    clean, corrupted = texts
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), regard.capture(llama, outputs=True) as source:
        llama(clean)
    with regard.steer(llama, regard.PatchOutput(source, queries=slice(3, 9))):
        cached = llama.generate(corrupted, **arguments)
    with regard.steer(llama, regard.PatchOutput(source, queries=slice(3, 9))):
        whole = llama.generate(corrupted, **arguments, use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, llama.generate(corrupted, **arguments))
    message = r"the positions 0 to 8 were captured, but its queries stand at 9 to 9; choose among those captured"
    with pytest.raises(ValueError, match=message), regard.steer(llama, regard.PatchOutput(source)):
        llama.generate(corrupted, **arguments)


def test_each_pass_has_its_own(llama: LlamaForCausalLM, texts: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        with regard.capture(llama, outputs=True) as source:
            wanted = [llama(ids).logits[:, -1] for ids in texts]
        with regard.steer(llama, regard.PatchOutput(source)):
            same = [llama(ids).logits[:, -1] for ids in texts]
            with pytest.raises(ValueError, match=r"2 passes of .* were captured, but this is pass 3"):
                llama(texts[0])
    for one, other in zip(same, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gates_after_a_patch_scale_it_and_before_it_do_not() -> None:
    clean, corrupted = torch.randn(2, 3, 1, 2, 5, 8)
    with regard.capture(None, outputs=True) as source:
        wanted = attention(*clean)
    patch, gate = regard.PatchOutput(source), regard.Gate(0.5)
    with regard.steer(None, patch, gate):
        torch.testing.assert_close(attention(*corrupted), wanted / 2)
    with regard.steer(None, gate, patch):
        torch.testing.assert_close(attention(*corrupted), wanted)


def test_one_text_serves_a_batch() -> None:
    query, key, value = torch.randn(3, 3, 2, 5, 8)
    with regard.capture(None, outputs=True) as source:
        wanted = attention(query[:1], key[:1], value[:1])
    with regard.steer(None, regard.PatchOutput(source)):
        assert torch.equal(attention(query, key, value), wanted.expand(3, -1, -1, -1))


def test_what_does_not_fit() -> None:
    tensors = torch.randn(3, 1, 2, 5, 8)
    with regard.capture(None) as bare:
        attention(*tensors)
    with (
        pytest.raises(ValueError, match=r"capture\(model, outputs=True\)"),
        regard.steer(None, regard.PatchOutput(bare)),
    ):
        attention(*tensors)
    with regard.capture(None, outputs=True) as source:
        attention(*tensors)
    message = r"puts out \(1, 4, 5, 8\), \(batch, heads, queries, width\), the captured run \(1, 2, 5, 8\)"
    with pytest.raises(ValueError, match=message), regard.steer(None, regard.PatchOutput(source)):
        attention(*torch.randn(3, 1, 4, 5, 8))


@pytest.mark.parametrize("edit", [{}, {"heads": [1, 2]}, {"queries": [4, 8]}], ids=["all", "heads", "queries"])
def test_maps_of_another_run_in_a_model(
    llama: LlamaForCausalLM, texts: tuple[Tensor, Tensor], edit: dict[str, Any]
) -> None:
    """Where a head looks is the other run's, what it finds there is this one's."""
    clean, corrupted = texts
    with torch.no_grad():
        with regard.capture(llama, maps=True, outputs=True) as source:
            llama(clean)
        with regard.capture(llama, maps=True, outputs=True) as own:
            llama(corrupted)
        patch = regard.PatchMap(source, layers=0, **edit)
        watched, outer = regard.watch(llama, keep_maps=True), regard.capture(llama, outputs=True)
        with watched as seen, outer, regard.steer(llama, patch):
            llama(corrupted)
    first = source.paths[0]
    theirs, mine = (run.at(first).call.map().dense() for run in (source, own))
    chosen = torch.zeros(1, 4, 9, 1, dtype=torch.bool)
    chosen[:, edit.get("heads", slice(None))] = True
    rows = torch.zeros(9, 1, dtype=torch.bool)
    rows[edit.get("queries", slice(None))] = True
    wanted = torch.where(chosen & rows, theirs, mine)
    torch.testing.assert_close(seen.maps[first][0].dense(), wanted, atol=1e-5, rtol=1e-4)
    value = own.at(first).value.repeat_interleave(2, 1)
    torch.testing.assert_close(outer.at(first).output, (wanted @ value.to(wanted)).float(), atol=1e-5, rtol=1e-4)


def test_maps_that_do_not_fit() -> None:
    tensors = torch.randn(3, 1, 2, 5, 8)
    with regard.capture(None) as bare:
        attention(*tensors)
    with pytest.raises(ValueError, match=r"capture\(model, maps=True\)"), regard.steer(None, regard.PatchMap(bare)):
        attention(*tensors)
    with regard.capture(None, maps=True) as source:
        attention(*tensors, is_causal=True)
    message = r"has \(batch, heads, queries, keys\) \(1, 2, 6, 6\), the captured run \(1, 2, 5, 5\)"
    with pytest.raises(ValueError, match=message), regard.steer(None, regard.PatchMap(source)):
        attention(*torch.randn(3, 1, 2, 6, 8))
    with (
        pytest.raises(ValueError, match=r"the masks of .* differ"),
        regard.steer(None, regard.PatchMap(source, heads=0)),
    ):
        attention(*tensors)
    with regard.steer(None, regard.PatchMap(source)):
        patched = attention(*tensors)
    torch.testing.assert_close(patched, attention(*tensors, is_causal=True))
    with pytest.raises(TypeError, match=r"needs source to be a run that regard\.capture kept, in Python, got int"):
        regard.PatchMap(3)
