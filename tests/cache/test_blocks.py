"""Blocks of compress beside whatever else goes on: compiled models, copies, errors, other blocks."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import Knorm, SnapKV

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip
PROMPT = torch.randint(5, 50, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


def write(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    written: Tensor = model.generate(tokens, max_new_tokens=4, do_sample=False, **options)
    return written


@pytest.mark.parametrize("part_first", [False, True])
def test_a_model_and_its_part_are_not_compressed_at_once(llama: hf.PreTrainedModel, part_first: bool) -> None:
    outer, inner = (llama.model, llama) if part_first else (llama, llama.model)
    with torch.no_grad(), regard.compress(outer, Knorm(budget=5)) as cache:
        with pytest.raises(RuntimeError, match=f"being compressed already, by a block on {type(outer).__name__}"):
            regard.compress(inner, Knorm(budget=3)).__enter__()
        llama(PROMPT)
    assert cache.report().kept == 0.25


def test_a_compiled_model(llama: hf.PreTrainedModel) -> None:
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        compiled(PROMPT)
    with regard.compress(llama, Knorm(budget=5)):
        expected = write(llama, PROMPT)
    for model in (compiled, llama):
        with regard.compress(compiled, Knorm(budget=5)) as cache, regard.watch(compiled, regard.Entropy()) as seen:
            assert torch.equal(write(model, PROMPT), expected)
        assert cache.report().kept < 0.5
        assert seen.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_gradient_checkpointing_is_refused(llama: hf.PreTrainedModel) -> None:
    llama.train()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    llama.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="gradient checkpointing"), regard.compress(llama, Knorm(budget=5)):
        llama(PROMPT).logits.mean().backward()
    with pytest.raises(RuntimeError, match="gradient checkpointing"), regard.compress(llama, Knorm(budget=5)):
        llama(PROMPT)


def test_one_context_for_many_questions(llama: hf.PreTrainedModel) -> None:
    questions = [torch.tensor([[number, 3, 4]]) for number in range(1, 4)]
    policy = SnapKV(budget=10, window=4)
    answers, alone = [], []
    with torch.no_grad(), regard.compress(llama, policy) as cache:
        context = llama(PROMPT).past_key_values
        for question in questions:
            answers.append(write(llama, torch.cat([PROMPT, question], 1), past_key_values=copy.deepcopy(context)))
        assert context.get_seq_length() == PROMPT.shape[1]
    for question in questions:
        with torch.no_grad(), regard.compress(llama, policy):
            context = llama(PROMPT).past_key_values
            alone.append(write(llama, torch.cat([PROMPT, question], 1), past_key_values=context))
    assert all(torch.equal(one, other) for one, other in zip(answers, alone, strict=True))
    assert cache.report().kept < 1


def test_a_second_try_after_an_interrupt_in_a_layer(llama: hf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the update of the cache and its attention, on a cache that is begun anew."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with regard.compress(llama, Knorm(budget=5)):
        expected = write(llama, PROMPT)
    with torch.no_grad(), regard.compress(llama, Knorm(budget=5)) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(llama, PROMPT)
        assert torch.equal(write(llama, PROMPT), expected)
    assert cache.report().kept < 0.5


def test_models_that_cannot_be_compressed_say_why_at_once() -> None:
    doge = hf.DogeForCausalLM(hf.DogeConfig(**SIZES)).eval()
    with (
        pytest.raises(NotImplementedError, match="makes its mask from the keys"),
        regard.compress(doge, Knorm(budget=5)),
    ):
        write(doge, PROMPT)
    hybrid = hf.FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    falcon = hf.FalconH1ForCausalLM(hybrid).eval()
    with pytest.raises(ValueError, match="recurrent state"), regard.compress(falcon, Knorm(budget=5)):
        write(falcon, PROMPT)
    flex = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attn_implementation="flex_attention")).eval()
    unseen = pytest.raises(RuntimeError, match=r'set_attn_implementation\("sdpa"\)')
    with torch.no_grad(), unseen, regard.compress(flex, Knorm(budget=5)):
        flex(PROMPT)
