"""Each cell of a sweep is the model run by itself with that one head changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import regard
from regard.mixers import DeltaRule

HEADS, WIDTH = 3, 4
close = torch.testing.assert_close


class Layer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = Linear(12, 3 * 12), Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        output = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(output.transpose(1, 2).flatten(2))


class Tiny(Module):
    """Two layers of attention in float64, and the same by stored matrices with some heads' outputs replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = ModuleList([Layer(), Layer()])
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def by_hand(self, x: Tensor, replace: dict[tuple[int, int], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output, and each layer's (batch, heads, tokens, width)."""
        outputs = []
        for number, layer in enumerate(self.layers):
            q, k, v = layer.into(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            output = (q @ k.mT / WIDTH**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
            for (where, head), other in replace.items():
                if where == number:
                    output[:, head] = other
            outputs.append(output)
            x = x + layer.out(output.transpose(1, 2).flatten(2))
        return x, outputs


def last_sum(output: Tensor) -> Tensor:
    return output[:, -1].square().sum(-1)


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, 12, dtype=torch.float64)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def padded() -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model: Module, inputs: dict[str, Tensor], metric: Any, found: regard.SweepResult, by: float) -> None:
    """Compare with an edit of each head alone."""
    data = found.dataset
    with torch.no_grad():
        close(torch.tensor(data.plain.values), metric(model(**inputs)).double(), check_dtype=False)
        for path in data.layer.values.tolist():
            for head in data["head"].values.tolist():
                with regard.steer(model, regard.Gate(by, layers=path, heads=head)):
                    wanted = metric(model(**inputs)).double()
                close(torch.tensor(data.metric.sel(layer=path, head=head).values), wanted, atol=1e-6, rtol=1e-6)
    assert float(abs(found.change).min()) > 0


@pytest.mark.parametrize(("kind", "by"), [("zero", None), ("gate", 0.4)])
def test_grouped_heads_and_padding(
    llama: LlamaForCausalLM, padded: dict[str, Tensor], kind: Any, by: float | None
) -> None:
    metric = regard.logit_difference([5, 6], 7)
    found = regard.sweep(llama, padded, metric, kind=kind, by=by)
    assert found.dataset.metric.shape == (3, 4, 2)
    assert found.dataset.layer.values.tolist() == [f"model.layers.{layer}.self_attn" for layer in range(3)]
    one_by_one(llama, padded, metric, found, by or 0.0)


def test_encoder_decoder_with_cross_attention() -> None:
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=32, init_std=0.3,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).double().eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": mask}
    inputs["decoder_input_ids"] = torch.randint(4, 60, (2, 5))
    metric = regard.log_probability(9)
    found = regard.sweep(model, inputs, metric, batch=7)
    assert "model.decoder.layers.0.encoder_attn" in found.dataset.layer
    one_by_one(model, inputs, metric, found, 0.0)


def test_a_vision_model() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    model = ViTForImageClassification(config).double().eval()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64)}
    metric = regard.logit_difference(answer=3, wrong=1)
    one_by_one(model, inputs, metric, regard.sweep(model, inputs, metric), 0.0)


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention(weights: bool) -> None:
    model = torch.nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    inputs = {"query": x, "key": x, "value": x, "need_weights": weights}

    def metric(output: tuple[Tensor, Tensor | None]) -> Tensor:
        return last_sum(output[0])

    one_by_one(model, inputs, metric, regard.sweep(model, inputs, metric), 0.0)


def by_hand(tiny: Tiny, x: Tensor, others: list[Tensor], found: regard.SweepResult) -> None:
    """Compare with each head's output replaced, by stored matrices; ``others`` as (batch, heads, tokens, width)."""
    with torch.no_grad():
        close(torch.tensor(found.dataset.plain.values), last_sum(tiny.by_hand(x, {})[0]))
        for layer in range(2):
            for head in range(HEADS):
                output, _ = tiny.by_hand(x, {(layer, head): others[layer][:, head]})
                close(torch.tensor(found.dataset.metric[layer, head].values), last_sum(output))


def test_mean_over_the_inputs_and_over_a_source(tiny: Tiny, x: Tensor) -> None:
    other = torch.randn(3, 9, 12, dtype=torch.float64)
    for source in (None, other):
        found = regard.sweep(tiny, x, last_sum, kind="mean", source=source)
        with torch.no_grad():
            _, outputs = tiny.by_hand(x if source is None else source, {})
        means = [output.mean((0, 2), keepdim=True).expand(4, -1, 6, -1) for output in outputs]
        by_hand(tiny, x, means, found)


@pytest.mark.parametrize("texts", [1, 4])
def test_patch_from_another_run(tiny: Tiny, x: Tensor, texts: int) -> None:
    other = torch.randn(texts, 6, 12, dtype=torch.float64)
    found = regard.sweep(tiny, x, last_sum, kind="patch", source=other, batch=9)
    with torch.no_grad():
        _, outputs = tiny.by_hand(other, {})
    by_hand(tiny, x, [output.expand(4, -1, -1, -1) for output in outputs], found)


def test_patching_a_run_with_itself_changes_nothing(llama: LlamaForCausalLM, padded: dict[str, Tensor]) -> None:
    found = regard.sweep(llama, padded, regard.log_probability(5), kind="patch", source=padded)
    assert float(abs(found.change).max()) < 1e-12


def test_patch_from_a_captured_run(tiny: Tiny, x: Tensor) -> None:
    with torch.no_grad(), regard.steer(tiny, regard.Temperature(3.0)), regard.capture(tiny, outputs=True) as source:
        tiny(x)
    outputs = [source.at(path).output for path in source.paths]
    by_hand(tiny, x, outputs, regard.sweep(tiny, x, last_sum, kind="patch", source=source))
    with torch.no_grad(), regard.capture(tiny) as bare:
        tiny(x)
    with pytest.raises(ValueError, match=r"has no outputs: regard\.capture\(model, outputs=True\) keeps them"):
        regard.sweep(tiny, x, last_sum, kind="patch", source=bare)
    with pytest.raises(ValueError, match=r'a captured run is a source of kind="patch" alone, got kind=\'mean\''):
        regard.sweep(tiny, x, last_sum, kind="mean", source=source)


@pytest.mark.parametrize("seed", [0, 1])
def test_resampling_takes_the_outputs_of_another_text(tiny: Tiny, x: Tensor, seed: int) -> None:
    found = regard.sweep(tiny, x, last_sum, kind="resample", seed=seed)
    with torch.no_grad():
        _, outputs = tiny.by_hand(x, {})
        candidates = [
            last_sum(tiny.by_hand(x, {(0, 1): outputs[0][[text] * 4, 1]})[0]) for text in range(4)
        ]  # each text with the outputs of this one
    got = torch.tensor(found.dataset.metric[0, 1].values)
    taken = [next(t for t in range(4) if torch.allclose(candidates[t][text], got[text])) for text in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    assert all(text != other for text, other in enumerate(taken))
    by_hand(tiny, x, [output[taken] for output in outputs], found)


def test_resampling_from_a_source(tiny: Tiny, x: Tensor) -> None:
    other = torch.randn(1, 6, 12, dtype=torch.float64)
    found = regard.sweep(tiny, x, last_sum, kind="resample", source=other)
    assert found.dataset.metric.equals(
        regard.sweep(tiny, x, last_sum, kind="patch", source=other).dataset.metric
    )  # there is but one text to take


def test_padding_counts_in_no_mean(llama: LlamaForCausalLM, padded: dict[str, Tensor]) -> None:
    metric = regard.log_probability(5)
    alone = {name: tensor[:1, 4:] for name, tensor in padded.items()}
    text = {name: tensor[:1] for name, tensor in padded.items()}
    for inputs in (text, padded):
        found = regard.sweep(llama, inputs, metric, kind="mean", source=text)
        wanted = regard.sweep(llama, inputs, metric, kind="mean", source=alone)
        close(torch.tensor(found.dataset.metric.values), torch.tensor(wanted.dataset.metric.values))


@pytest.mark.parametrize("batch", [1, 4, 5, 12, None])
def test_the_batch_changes_nothing(tiny: Tiny, x: Tensor, batch: int | None) -> None:
    calls: list[int] = []
    hook = tiny.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    found = regard.sweep(tiny, x, last_sum, batch=batch)
    hook.remove()
    by_hand(tiny, x, [torch.zeros(4, HEADS, 6, WIDTH, dtype=torch.float64)] * 2, found)
    assert calls[0] == 4
    assert calls[1:] == {None: [24], 12: [12, 12]}.get(batch, [4] * 6)


def test_layers_and_heads(tiny: Tiny, x: Tensor) -> None:
    whole = regard.sweep(tiny, x, last_sum)
    told: list[tuple[str, int]] = []
    part = regard.sweep(tiny, x, last_sum, layers=-1, heads=[0, -1], progress=lambda *one: told.append(one))
    assert told == [("layers.1", 2)] * 2
    assert part.dataset.layer.values.tolist() == ["layers.1"]
    assert part.dataset["head"].values.tolist() == [0, 2]
    assert part.dataset.number.values.tolist() == [1]
    figure = part.plot()
    assert figure.layout.yaxis.ticktext == ("1",)
    assert figure.data[0].z.tolist() == part.change.values.tolist()
    assert -figure.data[0].zmin == figure.data[0].zmax == float(abs(part.change).max())
    close(part.dataset.metric.values, whole.dataset.metric[1:, [0, 2]].values)
    uneven = regard.sweep(tiny, x, last_sum, heads={0: [0, 1], 1: 2})
    assert uneven.change.isnull().values.tolist() == [[False, False, True], [True, True, False]]
    assert len(uneven.strongest()) == 3
    assert uneven.plot().data[0].z.tolist()[0][2] is None


def test_strongest_heads_can_be_pruned_together(tiny: Tiny, x: Tensor) -> None:
    found = regard.sweep(tiny, x, last_sum)
    changes = [abs(head.change) for head in found.strongest(6)]
    assert changes == sorted(changes, reverse=True)
    first, second = found.strongest(2)
    assert first.change == pytest.approx(float(found.change.sel(layer=first.layer, head=first.head)))
    assert first.metric == pytest.approx(found.plain + first.change)
    chosen = found.heads(2)
    assert sorted((layer, head) for layer, heads in chosen.items() for head in heads) == sorted(
        [(first.layer, first.head), (second.layer, second.head)]
    )
    with torch.no_grad(), regard.steer(tiny, regard.Gate(0, heads=chosen)):
        assert not torch.allclose(tiny(x), tiny.by_hand(x, {})[0])


def test_within_a_block_of_edits(tiny: Tiny, x: Tensor) -> None:
    with torch.no_grad():
        plain = tiny(x)
        with regard.steer(tiny, regard.Gate(0, layers=0, heads=0)):
            found = regard.sweep(tiny, x, last_sum)
        assert torch.equal(tiny(x), plain)
        nothing = torch.zeros(4, 6, WIDTH, dtype=torch.float64)
        wanted = last_sum(tiny.by_hand(x, {(0, 0): nothing, (1, 2): nothing})[0])
    close(torch.tensor(found.dataset.metric[1, 2].values), wanted)
    close(found.dataset.metric[0, 0].values, found.dataset.plain.values)


def test_a_metric_of_all_texts(tiny: Tiny, x: Tensor) -> None:
    found = regard.sweep(tiny, x, lambda output: last_sum(output).mean())
    each = regard.sweep(tiny, x, last_sum)
    assert found.dataset.metric.shape == (2, 3, 1)
    close(found.change.values, each.change.values)


def test_saved_and_loaded(tiny: Tiny, x: Tensor, tmp_path: Path) -> None:
    found = regard.sweep(tiny, x, last_sum, kind="gate", by=0.5)
    found.save(tmp_path / "sweep.nc")
    again = regard.SweepResult(regard.load(tmp_path / "sweep.nc"))
    assert again.dataset.equals(found.dataset)
    assert again.dataset.attrs["kind"] == "gate"
    assert again.dataset.attrs["by"] == 0.5
    assert again.dataset.attrs["metric"] == "last_sum"
    assert again.strongest(3) == found.strongest(3)


def test_what_the_bundled_model_recalls_with(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    text = "The code of Ada is 48213. The code of Tom is 70455. They slept. The code of Ada is 4"
    right, wrong = tokenizer.convert_tokens_to_ids(["8", "0"])
    found = regard.sweep(model, tokenizer(text, return_tensors="pt"), regard.logit_difference(right, wrong))
    assert found.plain > 5
    (worst,) = found.strongest(1)
    assert worst.change < -3
    assert found.dataset.metric.shape == (4, 8, 1)


class WithMixer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.layer = DeltaRule(12, heads=3), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.mixer(x)[0])


def test_a_mixer_has_no_heads_to_change() -> None:
    model, x = WithMixer().eval(), torch.randn(1, 5, 12)
    for layers in (None, 0):
        with pytest.raises(ValueError, match=r"^mixer: a mixer, which has no heads .* choose by layers= from layer$"):
            regard.sweep(model, x, last_sum, layers=layers)
    assert regard.sweep(model, x, last_sum, layers="layer").dataset.layer.values.tolist() == ["layer"]


def test_a_loss_of_all_copies_is_refused(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 97, (1, 8))
    inputs = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"NaN for head 0 of model.layers.0.self_attn; .* pass batch=1"):
        regard.sweep(llama, inputs, lambda output: output.loss)
    losses = regard.sweep(llama, inputs, lambda output: output.loss, batch=1)
    likelihood = regard.sweep(llama, inputs, regard.log_probability(ids[:, 1:], position=-2))
    close(-7 * losses.dataset.metric.values, likelihood.dataset.metric.values, rtol=1e-6, atol=1e-6)


def test_texts_must_be_in_the_first_dimension() -> None:
    model = torch.nn.TransformerEncoderLayer(12, 3, 16).eval()  # (tokens, batch, width)
    with pytest.raises(ValueError, match=r"texts in the first dimension; batch=1 repeats nothing"):
        regard.sweep(model, torch.randn(5, 2, 12), lambda output: output[-1].sum(-1))
    found = regard.sweep(model, torch.randn(5, 2, 12), lambda output: output[-1].sum(-1), batch=1)
    assert found.dataset.metric.shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "none"}, "kind must be one of zero, mean, resample, gate, patch, got 'none'"),
        ({"kind": "gate"}, 'by is the finite factor of kind="gate"'),
        ({"kind": "gate", "by": float("nan")}, "finite"),
        ({"by": 0.5}, "and of no other; got kind='zero' and by=0.5"),
        ({"source": torch.zeros(1, 6, 12)}, 'zero has no source; choose kind="mean", "resample" or "patch"'),
        ({"kind": "patch"}, "patch needs a source"),
        ({"kind": "patch", "source": torch.zeros(3, 6, 12)}, "the source has 3 texts, the inputs 4"),
        ({"kind": "patch", "source": torch.zeros(4, 5, 12)}, "6 tokens on the inputs, but 5 on the source"),
        ({"kind": "resample", "inputs": torch.zeros(1, 6, 12)}, "one text has no other to take outputs from"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"layers": "decoder.*"}, "'decoder.*' matches no attention call; seen were layers.0, layers.1"),
        ({"layers": 2}, "layer 2 was chosen, but 2 attention calls were seen"),
        ({"heads": 3}, "layers.0 has 3 heads, 0 to 2"),
        ({"metric": lambda output: output}, "one number for each text, or one for all, got shape (4, 6, 12)"),
        ({"metric": lambda output: 0.5}, "one number for each text, or one for all, got float"),
        ({"metric": lambda output: output[:, 0, 0] * torch.nan}, "NaN for the model as it is"),
        ({"inputs": {"x": None}}, "no tensor with texts in its first dimension, only x"),
        ({"inputs": {"x": [1, 2]}}, "x is a list, which a sweep cannot repeat along the batch"),
    ],
)
def test_errors(tiny: Tiny, x: Tensor, arguments: dict[str, Any], message: str) -> None:
    tiny.float()
    given = {"inputs": x.float(), "metric": last_sum} | arguments
    with pytest.raises((ValueError, IndexError, TypeError)) as error:
        regard.sweep(tiny, **given)
    assert message in str(error.value)


def test_a_model_in_training_is_refused(tiny: Tiny, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        regard.sweep(tiny.train(), x, last_sum)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no attention call was seen in Linear"):
        regard.sweep(Linear(4, 4).eval(), torch.zeros(1, 4), lambda output: output.sum(-1))


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_logit_difference() -> None:
    logits = torch.randn(3, 5, 7)
    close(regard.logit_difference(2, 4)(logits), logits[:, -1, 2] - logits[:, -1, 4])
    where = torch.tensor([1, -2, 0])
    got = regard.logit_difference([1, 2, 3], torch.tensor([0, 0, 6]), position=where)({"logits": logits})
    close(got, torch.stack([logits[0, 1, 1] - logits[0, 1, 0], logits[1, 3, 2] - logits[1, 3, 0],
                            logits[2, 0, 3] - logits[2, 0, 6]]))  # fmt: skip
    close(regard.logit_difference(0, 1)(logits[:, 0]), logits[:, 0, 0] - logits[:, 0, 1])


def test_log_probability() -> None:
    logits = torch.randn(3, 5, 7)
    chances = logits.log_softmax(-1)
    close(regard.log_probability(2)(logits), chances[:, -1, 2])
    close(regard.log_probability([2, 4])(logits), chances[:, -2, 2] + chances[:, -1, 4])
    each = torch.tensor([[1, 2], [3, -100], [5, 6]])
    got = regard.log_probability(each, position=[2, 4, 1])(logits)
    wanted = [chances[0, 1, 1] + chances[0, 2, 2], chances[1, 3, 3], chances[2, 0, 5] + chances[2, 1, 6]]
    close(got, torch.stack(wanted))
    assert regard.log_probability(2)(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (regard.log_probability([1] * 6), IndexError, "6 tokens end at position -1, but the output has 5 positions"),
        (regard.log_probability(7), IndexError, "token 7 was named, but the output has 7 tokens"),
        (regard.log_probability(1, position=5), IndexError, "position 5 was named, but the output has 5 positions"),
        (regard.log_probability(1, position=-6), IndexError, "position -6 was named"),
        (regard.logit_difference(-1, 0), IndexError, "token -1 was named"),
        (regard.logit_difference([1, 2], 0), ValueError, "tokens of shape (2, 1) were given for a batch of 3"),
        (regard.logit_difference(0.5, 0), ValueError, "tokens are whole numbers, got 0.5"),
    ],
)
def test_metrics_refuse(metric: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        metric(torch.randn(3, 5, 7))
    assert message in str(raised.value)


def test_metrics_need_logits() -> None:
    with pytest.raises(TypeError, match="needs logits"):
        regard.log_probability(1)(object())
