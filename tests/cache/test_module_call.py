"""What policies find of the model's layer, beside what the layer itself makes of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import Entries, Every, ModuleCall, Random, Reads
from tests.cache.conftest import GROUPED, decoder, texts
from tests.cache.test_families import LATENTS, model_of

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: decoder("llama"),
    "qwen3": lambda: decoder("qwen3"),
    "gemma3": lambda: decoder("gemma3"),
    "gpt2": lambda: decoder("gpt2"),
    "side by side": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)).eval(),
    "a part of the width": lambda: hf.PhiForCausalLM(
        hf.PhiConfig(**{name: GROUPED[name] for name in GROUPED if name != "head_dim"}, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})).eval(),
    "scaled": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, max_position_embeddings=64, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16})).eval(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asking(Random):
    """Asks for what a test wants, and drops something."""

    ask: Callable[[ModuleCall], Any] = lambda given: given
    found: list[Any]
    keeps: int = 0

    @property
    def reads(self) -> Reads:
        return Reads(queries=self.keeps)

    def score(self, entries: Entries) -> Tensor:
        self.found.append(self.ask(entries.module_call))
        return super().score(entries)


def unturned(given: ModuleCall) -> tuple[Tensor, Tensor]:
    turned = given.rotation(given.query_ranks.clamp(min=0))
    return given.queries if turned is None else turned.undo(given.queries), given.query_ranks


def projected(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The queries that the layers make before they turn them, by their own modules, of those without a window."""
    made: list[Tensor] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        made.append(output)

    handles = []
    for name, module in model.named_modules():
        attention = model.get_submodule(name.rpartition(".")[0])
        last = (
            "q_norm"
            if hasattr(attention, "q_norm")
            else "q_layernorm"
            if getattr(attention, "qk_layernorm", 0)
            else "q_proj"
        )
        if name.endswith((f".{last}", "c_attn")) and not getattr(attention, "is_sliding", False):
            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    width = model.config.hidden_size // 4
    flat = [output[..., : 4 * width] if output.ndim == 3 else output for output in made]
    return [q if q.ndim == 4 else q.unflatten(2, (4, -1)).transpose(1, 2) for q in flat]


@pytest.mark.parametrize("lengths", [(12,), (12, 7)], ids=["one", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_queries_without_their_positions(name: str, lengths: tuple[int, ...]) -> None:
    model, inputs = MODELS[name](), texts(*lengths)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs = inputs | {"position_ids": places}
    policy = Asking(budget=6, ask=unturned, found=[])
    with torch.no_grad(), regard.compress(model, policy):
        model(**inputs)
    expected = projected(model, inputs)
    assert len(policy.found) == len(expected) >= 1
    for (queries, ranks), own in zip(policy.found, expected, strict=True):
        real = inputs["attention_mask"].bool()
        assert torch.equal(ranks, places.masked_fill(~real, -1))
        own = own if own.shape[1] == 4 else own.transpose(1, 2)
        torch.testing.assert_close(queries.transpose(1, 2)[real], own.transpose(1, 2)[real], atol=1e-4, rtol=1e-4)


def test_queries_of_steps_are_those_that_were_kept() -> None:
    """While decoding, the last ones, of the prompt and of steps, as one pass over the whole text has them."""
    model, inputs = decoder("llama"), texts(9, 6)
    ids = torch.cat([inputs["input_ids"], torch.full((2, 4), 7)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    policy = Asking(budget=0.9, ask=unturned, found=[], keeps=7, when=Every(4, prompt=False))
    with torch.no_grad(), regard.compress(model, policy):
        past = model(ids[:, :9], attention_mask=mask[:, :9], position_ids=places[:, :9]).past_key_values
        for end in range(10, 14):
            model(ids[:, end - 1 : end], attention_mask=mask[:, :end], position_ids=places[:, end - 1 : end],
                  past_key_values=past)  # fmt: skip
    own = projected(model, {"input_ids": ids, "attention_mask": mask, "position_ids": places})[0]
    queries, ranks = policy.found[0]
    assert ranks.tolist() == [[*range(6, 13)], [*range(3, 10)]]
    for row, first in ((0, 0), (1, 3)):
        for number, rank in enumerate(ranks[row].tolist()):
            if rank >= 0:
                torch.testing.assert_close(queries[row, :, number], own[row, :, first + rank], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "side by side", "a part of the width"])
def test_the_parts_of_heads_add_up_to_the_output(name: str) -> None:
    model, inputs = MODELS[name](), texts(12)

    def ask(given: ModuleCall) -> tuple[Any, ...]:
        return given.output_weight, given.hidden_states, given.call, given.module

    policy = Asking(budget=6, ask=ask, found=[])
    with torch.no_grad(), regard.compress(model, policy):
        model(**inputs)
    for weight, hidden, call, module in policy.found:
        heads = torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, scale=call.factor, enable_gqa=True
        )
        parts = torch.einsum("bhnd,hde->bne", heads, weight)
        last = next(getattr(module, name) for name in ("o_proj", "c_proj", "dense") if hasattr(module, name))
        own = last(heads.transpose(1, 2).flatten(2))
        torch.testing.assert_close(parts + (0 if last.bias is None else last.bias), own, atol=1e-4, rtol=1e-4)
        assert hidden.shape == (1, 12, 32)


def test_latents_are_not_taken_for_turned_queries() -> None:
    model = model_of(LATENTS["deepseek v3"])
    with pytest.raises(ValueError, match=r"turns a part of its latents only"), torch.no_grad(), \
            regard.compress(model, regard.cache.ExpectedAttention(budget=6)):  # fmt: skip
        model(**texts(12))
