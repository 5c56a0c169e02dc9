"""Where edits hold: parts of models, caches of every kind, padded batches, threads, passes."""

from threading import Thread
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM, PreTrainedTokenizerFast

import regard
from tests.steer.reference import dense

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 60,
    "initializer_range": 0.3, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))


def logits_of_steps(model: Any, ids: Tensor, *edits: regard.Edit, **more: Any) -> Tensor:
    with regard.steer(model, *edits):
        told = model.generate(ids, **GREEDY, **more, output_logits=True, return_dict_in_generate=True)
    return torch.stack(told.logits)


def test_queries_of_decoding_steps_are_looked_at(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """One row of all heads is no reason to take all queries for chosen."""
    plain = logits_of_steps(llama, ids, regard.Gate(1.0))
    steps = logits_of_steps(llama, ids, regard.Temperature(5.0, queries=slice(0, 12)))
    with torch.no_grad():
        whole = logits_of_steps(llama, ids, regard.Temperature(5.0, queries=slice(0, 12)), use_cache=False)
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)
    only = logits_of_steps(llama, ids, regard.Temperature(5.0, queries=11))
    torch.testing.assert_close(only[:2], plain[:2], atol=1e-5, rtol=1e-5)
    assert (only[2] - plain[2]).abs().max() > 0.01


def test_a_part_of_a_model_with_a_cache(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """Layers before it have filled the cache by then."""
    part, edit = llama.model.layers[1], regard.Block([2, 3])
    with torch.no_grad():
        with regard.steer(llama, regard.Block([2, 3], layers=1)):
            wanted = llama(ids).logits
        with regard.steer(part, edit), regard.watch(part, regard.Mass({"hidden": [2, 3]})) as seen:
            steered = llama(ids).logits
        torch.testing.assert_close(steered, wanted)
        assert (steered - llama(ids).logits).abs().max() > 0.01
    assert (seen.dataset().mass.sel(segment="hidden").values[..., 4:] == 0).all()
    whole = logits_of_steps(llama, ids, regard.Block([2, 11], layers=1))
    with regard.steer(part, regard.Block([2, 11])), regard.watch(part, regard.Mass({"hidden": [2, 11]})) as seen:
        told = llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(told.logits), whole)
    assert seen.dataset().sizes["query"] == 14


def test_a_first_layer_without_keys() -> None:
    """MiniMax's first layer is linear: how long the text is, another layer of the cache tells."""
    kinds = ["linear_attention", "full_attention"]
    config = MiniMaxConfig(
        **SIZES, num_hidden_layers=2, layer_types=kinds, num_local_experts=2, head_dim=8, block_size=8
    )
    model = MiniMaxForCausalLM(config).eval()
    ids = torch.randint(3, 60, (1, 10))
    plain = logits_of_steps(model, ids, regard.Gate(1.0))
    edited = logits_of_steps(model, ids, regard.Gate(0.0, queries=11))
    torch.testing.assert_close(edited[:2], plain[:2])
    assert (edited[2] - plain[2]).abs().max() > 1e-3
    with regard.watch(model, regard.Rows([11])) as seen:
        model.generate(ids, **GREEDY)
    rows = torch.tensor(seen.dataset().rows.values)  # NaN for keys that came later
    torch.testing.assert_close(rows.nansum(-1), torch.ones(1, 1, 4, 1))
    assert int(rows.isfinite()[0, 0, 0, 0].sum()) == 12


@pytest.mark.parametrize(
    "keys",
    [
        [False, True, False, True, False],
        (False, True, False, True, False),
        torch.tensor([False, True, False, True, False]),
        numpy.array([False, True, False, True, False]),
        torch.tensor([1, 3]),
        numpy.array([1, 3], dtype=numpy.int32),
        [numpy.int64(1), torch.tensor(3)],
        [-4, -2],
    ],
    ids=lambda keys: type(keys).__name__,
)
def test_positions_in_every_form(keys: Any) -> None:
    tensors = torch.randn(3, 1, 2, 5, 4)
    mask = torch.tensor([True, False, True, False, True])
    with regard.steer(None, regard.Block(keys)):
        torch.testing.assert_close(attention(*tensors), attention(*tensors, mask[None]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regard.Block(torch.tensor([0, 1, 0, 1, 0], dtype=torch.int8)), "is this a mask"),
        (lambda: regard.Gate(0.0, heads=[]), "heads"),
        (lambda: regard.Gate(0.0, heads={}), "heads is empty"),
        (lambda: regard.Gate(0.0, layers=[]), "layers"),
    ],
)
def test_choices_of_nothing_and_masks_of_integers(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), regard.steer(None, make()):
        attention(*torch.randn(3, 1, 2, 5, 4))


@pytest.mark.parametrize("layers", [-1, numpy.int64(2), torch.tensor([2]), slice(-1, None), [-1]], ids=str)
def test_layers_in_every_form(llama: LlamaForCausalLM, ids: Tensor, layers: Any) -> None:
    with torch.no_grad():
        with regard.steer(llama, regard.Gate(0.0, layers=layers, heads=torch.tensor(-1))):
            steered = llama(ids).logits
        with regard.steer(llama, regard.Gate(0.0, layers=2, heads=3)):
            assert torch.equal(llama(ids).logits, steered)


def test_passages_of_a_padded_batch(llama: LlamaForCausalLM) -> None:
    words = ["[PAD]", "Ada", "Tom", "has", "a", "cat", "dog", "and", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", padding_side="left")
    texts = ["Tom has a cat and a dog and no cat", "Ada has a cat and no cat"]
    located = regard.locate(regard.Reweight(keys="cat", by=9.0), texts, fast, occurrence=-1)
    inputs = fast(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        with regard.steer(llama, located):
            together = llama(**inputs).logits[:, -1]
        for number, text in enumerate(texts):
            one = regard.locate(regard.Reweight(keys="cat", by=9.0), text, fast, occurrence=-1)
            with regard.steer(llama, one):
                alone = llama(**fast(text, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
            torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=1e-4)


def test_generate_in_a_thread(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """As a streamer has it: the thread that was begun in the block is the block's."""
    edit = regard.Reweight([0, 4], 20.0)
    wanted = logits_of_steps(llama, ids, edit)
    told: list[Any] = []

    def write() -> None:
        told.append(llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True))

    with regard.steer(llama, edit), regard.watch(llama, regard.Mass({"chosen": [0, 4]})) as seen:
        thread = Thread(target=write)
        thread.start()
        thread.join()
    assert torch.equal(torch.stack(told[0].logits), wanted)
    assert seen.dataset().sizes["query"] == 14


def test_a_function_of_token_ids_with_a_static_cache_and_with_prompt_lookup(llama: LlamaForCausalLM) -> None:
    """Either has keys beyond the text."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    edit = regard.Reweight(keys=lambda ids: ids == 6, by=6.0)
    wanted = logits_of_steps(llama, ids, edit)
    static = logits_of_steps(llama, ids, edit, cache_implementation="static")
    torch.testing.assert_close(static, wanted, atol=1e-4, rtol=1e-4)
    with regard.steer(llama, edit):
        plain = llama.generate(ids, **GREEDY)
    with regard.steer(llama, edit):
        assert torch.equal(llama.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), plain)


class Denoiser(Module):
    """A U-Net's attention in small: one layer of self-attention that a loop of denoising steps runs again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = Linear(8, 24), Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("passes", [[1, 3], slice(1, 4, 2), range(1, 4, 2)], ids=str)
def test_edits_of_some_denoising_steps(passes: Any) -> None:
    model, noise = Denoiser().eval(), torch.randn(1, 6, 8)

    def run(*edits: regard.Edit) -> list[Tensor]:
        x, states = noise, []
        with torch.no_grad(), regard.steer(model, *edits):
            for _ in range(5):
                x = model(x)
                states.append(x)
        return states

    found = run(regard.Block([0], passes=passes), regard.Gate(0.5, passes=4))
    x = noise
    for step, state in enumerate(found):
        edit = regard.Block([0]) if step in (1, 3) else regard.Gate(0.5 if step == 4 else 1.0)
        with torch.no_grad(), regard.steer(model, edit):
            x = model(x)
        torch.testing.assert_close(state, x)
    with pytest.raises(IndexError, match="pass 7 was chosen, but 5 passes were seen"):
        run(regard.Gate(0.5, passes=7))


def test_the_prompt_is_pass_0_of_generate(llama: LlamaForCausalLM, ids: Tensor) -> None:
    by_pass = logits_of_steps(llama, ids, regard.Gate(0.3, passes=slice(1, None)))
    by_query = logits_of_steps(llama, ids, regard.Gate(0.3, queries=slice(10, None)))
    torch.testing.assert_close(by_pass, by_query)
    prompt = logits_of_steps(llama, ids, regard.Gate(0.3, passes=0))
    torch.testing.assert_close(prompt, logits_of_steps(llama, ids, regard.Gate(0.3, queries=slice(0, 10))))
    assert not torch.allclose(prompt[0], by_pass[0])


@pytest.mark.parametrize("queries", [4, 12], ids=["a bias", "columns"])
def test_hidden_keys_stay_hidden_however_hot(queries: int) -> None:
    query, key, value = torch.randn(3, 1, 2, queries, 128).half()
    edits = [regard.Block([0]), regard.Temperature(1000.0)]
    with regard.steer(None, *edits):
        output = attention(query, key, value)
    wanted = dense(query, key, value, None, False, edits)[1]
    torch.testing.assert_close(output.double(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_strengths_in_decoding_steps_of_half_precision(dtype: torch.dtype) -> None:
    """A bias that is rounded to half precision would be lost, or 0.35% off."""
    key = torch.zeros(1, 1, 8, 8, dtype=dtype)
    value = torch.zeros(1, 1, 8, 8, dtype=dtype)
    value[..., 0, 0] = 1.0
    query = torch.zeros(1, 1, 1, 8, dtype=dtype)
    far = [regard.Bias(slice(None), 100.3), regard.Reweight(0, 1.3)]
    for edits in ([regard.Reweight(0, 4.0)], far):
        with regard.steer(None, *edits):
            found = float(attention(query, key, value)[..., 0])
        wanted = dense(query, key, value, None, False, edits)[1][..., 0]
        exact = float(wanted.to(dtype))  # no more than the rounding of the output itself
        assert abs(found - exact) <= torch.finfo(dtype).eps * exact
    with regard.steer(None, regard.Gate(1.002)):
        gated = attention(query, key, (torch.ones_like(value) * 1.5))
    assert float(gated[0, 0, 0, 0]) == float(torch.tensor(1.5 * 1.002).to(dtype))
