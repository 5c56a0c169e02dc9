"""Small decoders of every kind."""

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import Policy

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None}  # fmt: skip

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=None)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, sliding_window=8, sliding_window_pattern=3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
}
MORE = {  # attention of its own: a sink beside the keys
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3)
    ),
}


def decoder(name: str) -> hf.PreTrainedModel:
    """A random model with attention far from uniform."""
    torch.manual_seed(0)
    model = (DECODERS | MORE)[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture
def llama() -> hf.PreTrainedModel:
    return decoder("llama")


def texts(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded texts of these lengths."""
    longest = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def watched_as_unwatched(model: hf.PreTrainedModel, inputs: dict[str, Tensor], policy: Policy) -> None:
    """A compressed model writes the same while it is watched, with beams too."""
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for beams in (1, 2):
        with regard.compress(model, policy):
            plain = model.generate(**inputs, **options, num_beams=beams)
        with regard.compress(model, policy), regard.watch(model, regard.Entropy()):
            seen = model.generate(**inputs, **options, num_beams=beams)
        assert torch.equal(plain.sequences, seen.sequences)
        torch.testing.assert_close(torch.stack(plain.logits), torch.stack(seen.logits), atol=1e-4, rtol=1e-3)
