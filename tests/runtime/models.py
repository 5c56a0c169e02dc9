"""Small random models whose attention does not go through scaled_dot_product_attention."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn import Module

import regard
from regard.steer import Edit
from tests.steer.reference import Dense

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": 97, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GPT = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def widened(model: Module) -> Module:
    """Weights wide enough for attention that is not nearly uniform."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def gemma2() -> Module:
    config = hf.Gemma2Config(
        **TEXT, attn_logit_softcapping=2.0, sliding_window=6, query_pre_attn_scalar=8, attn_implementation="eager"
    )
    return widened(hf.Gemma2ForCausalLM(config))


def gpt_oss() -> Module:
    return widened(
        hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1, sliding_window=6))
    )


def bloom() -> Module:
    return widened(hf.BloomForCausalLM(hf.BloomConfig(**GPT, hidden_size=32, n_layer=2, n_head=4)))


def mpt() -> Module:
    config = hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=97, use_cache=True)
    return widened(hf.MptForCausalLM(config))


def gptj() -> Module:
    return widened(hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)))


def deberta() -> Module:
    config = hf.DebertaV2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97,
        relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=32,
    )  # fmt: skip
    return widened(hf.DebertaV2Model(config))


def xlnet() -> Module:
    return widened(hf.XLNetModel(hf.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)))


def t5() -> Module:
    config = hf.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=97, attn_implementation="eager"
    )
    return widened(hf.T5EncoderModel(config))


def donut_swin() -> Module:
    config = hf.DonutSwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return widened(hf.DonutSwinModel(config))


def inputs_of(model: Module, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if "Swin" in type(model).__name__:
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 97, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : 4 if padded else 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


EDITS: tuple[Sequence[Edit], ...] = (
    [regard.Temperature(0.5)],
    [regard.Temperature(0.5, heads=[1], queries=[8, 9])],
    [regard.Reweight(keys=[5, 6], by=4, heads=[0, 1])],
    [regard.Reweight(keys=[5, 6], by=0.2, renormalize=False)],
    [regard.Bias(keys=slice(2, 9), by=-1.5), regard.Temperature(2.0)],
    [regard.Block(keys=[3], queries=slice(5, None)), regard.Gate(by=0.5, heads=[1])],
    [regard.ReplaceMap("uniform", queries=slice(2, None))],
    [regard.ReplaceMap("identity", heads=[1])],
    [regard.Redistribute(source=[0, 1], target=[2, 3], share=0.5)],
)


class DenseWithSinks(Dense):
    """The stored matrix with one more logit in each row, which goes to no key."""

    def __init__(self, logits: Tensor, values: Tensor, sinks: Tensor | None) -> None:
        super().__init__(logits, values)
        self.sinks = logits.new_full((*logits.shape[:3], 1), -torch.inf) if sinks is None else sinks

    def probabilities(self) -> Tensor:
        both = torch.cat([self.logits, self.sinks.expand_as(self.logits[..., :1])], dim=-1)
        blind = both.isneginf().all(-1, keepdim=True)
        return torch.softmax(both.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)[..., :-1]

    def apply(self, edit: Edit) -> None:
        heads = torch.zeros(self.logits.shape[1], dtype=torch.bool)
        heads[slice(None) if edit.heads is None else edit.heads] = True
        rows = torch.zeros_like(self.sinks, dtype=torch.bool)
        rows[:, heads, slice(None) if getattr(edit, "queries", None) is None else getattr(edit, "queries", None)] = True
        rows &= heads[:, None, None]
        rest = (1 - self.probabilities().sum(-1, keepdim=True)).clamp(min=0).log()
        super().apply(edit)
        if isinstance(edit, regard.Redistribute):
            self.sinks = rest
        if isinstance(edit, regard.Temperature):
            self.sinks = torch.where(rows, self.sinks / edit.by, self.sinks)
        elif isinstance(edit, regard.ReplaceMap) and edit.kind == "uniform":
            self.sinks = self.sinks.masked_fill(rows, -torch.inf)


def edited_matrix(logits: Tensor, edits: Sequence[Edit], sinks: Tensor | None = None) -> Tensor:
    """What the edits make of the matrix of these logits, with the factors of what it is multiplied with, in float64."""
    wide = logits.double()
    wide = wide.masked_fill(wide < torch.finfo(logits.dtype).min / 2, -torch.inf)
    dense = DenseWithSinks(wide, torch.eye(logits.shape[-1], dtype=torch.float64), sinks)
    for edit in edits:
        dense.apply(edit)
    return dense.output()


def check_seen(model: Module, padded: bool) -> Any:
    """Watched, a model returns what it does, and its maps are the matrices that it returns; here is what it returned."""
    inputs = inputs_of(model, padded)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        with regard.watch(model, regard.Received(), keep_maps=True) as seen:
            watched = model(**inputs, output_attentions=True)
    assert torch.equal(watched[0], plain[0])
    assert len(seen.layers) == len(plain.attentions) == 2
    for path, matrix in zip(seen.layers, plain.attentions, strict=True):
        torch.testing.assert_close(seen.maps[path][0].dense(), matrix, atol=1e-6, rtol=1e-5)
    return watched


def check_steered(model: Module, edits: Sequence[Edit], write_out: Callable[[], None]) -> None:
    """Steered, a model returns what it does once the edits are written out on its stored matrices in float64."""
    inputs = inputs_of(model)
    plain = first_output(model, inputs)
    with regard.steer(model, *edits):
        steered = first_output(model, inputs)
    write_out()
    wanted = first_output(model, inputs)
    torch.testing.assert_close(steered, wanted, atol=1e-3, rtol=1e-3)
    assert (plain - wanted).abs().max() > 0.01


def first_output(model: Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs, **more)[0]
    return output
