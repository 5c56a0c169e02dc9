"""Sources and targets: encoder, decoder and cross-attention are told from each other, also where both texts are as long."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from regard.look import Look, look
from tests.inputs.models import bart, t5

SOURCE = "it rained all day ."
PARTS = ["Encoder self-attention", "Decoder self-attention", "Cross-attention"]


def stored(model: Any, source: torch.Tensor, target: torch.Tensor) -> list[Any]:
    """The matrices of each part and layer, as the model stores them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(input_ids=source, decoder_input_ids=target, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return [told.encoder_attentions, told.decoder_attentions, told.cross_attentions]


def names(seen: Look, part: int, dim: str) -> str:
    return " ".join(seen.parts[part].dataset[f"{dim}_token"][0].values.tolist())


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("target", ["he slept", "he slept all the day"])  # the second is as long as the source
def test_each_part_is_that_of_the_stored_matrices(build: Any, target: str) -> None:
    model, tokenizer = build()
    seen = look(model, tokenizer, SOURCE, target=target)
    assert [part.name for part in seen.parts] == PARTS
    start = tokenizer.convert_ids_to_tokens(model.config.decoder_start_token_id)
    read = f"{start} <s> {target}"  # the end is what the last token is to say
    assert names(seen, 0, "key") == names(seen, 2, "key") == f"<s> {SOURCE} </s>"
    assert names(seen, 1, "query") == names(seen, 1, "key") == names(seen, 2, "query") == read
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(read.split())])
    for part, matrices in zip(
        seen.parts, stored(model, tokenizer(SOURCE, return_tensors="pt").input_ids, ids), strict=True
    ):
        for layer, matrix in enumerate(matrices):
            dense = matrix[0].double().numpy()
            entropy = -(dense * np.log(np.maximum(dense, 1e-300))).sum(-1)
            np.testing.assert_allclose(part.dataset.received[layer, 0], dense.sum(1), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(part.dataset.entropy[layer, 0], entropy, atol=1e-4)


def test_from_one_text_to_another_there_is_no_order() -> None:
    cross = look(*t5(), SOURCE, target="he slept").parts[2].dataset
    assert set(cross.data_vars) == {"entropy", "received", "pooled", "mass"}


@pytest.mark.parametrize("build", [t5, bart])
def test_without_a_target_the_model_writes_one_and_it_is_said(build: Any) -> None:
    model, tokenizer = build()
    seen = look(model, tokenizer, SOURCE)
    ids = tokenizer(SOURCE, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=32, do_sample=False, num_beams=1)[0]
    read = tokenizer.convert_ids_to_tokens(written[:-1] if written[-1] == 3 else written)
    assert names(seen, 1, "key") == " ".join(read)
    assert seen.notes[0].startswith("no --target was given: the decoder reads what the model itself writes, ")


def test_a_model_without_a_head_shows_its_encoder_and_says_so() -> None:
    model, tokenizer = t5()
    seen = look(hf.T5Model(model.config).eval(), tokenizer, SOURCE)
    assert [part.name for part in seen.parts] == PARTS[:1]
    assert "the encoder alone is shown" in seen.notes[0]


def test_layers_are_chosen_among_all_parts() -> None:
    seen = look(*t5(), SOURCE, target="he slept", layers=["*.EncDecAttention", 0])
    assert [(part.name, part.dataset.sizes["layer"]) for part in seen.parts] == [(PARTS[0], 1), (PARTS[2], 2)]


@pytest.mark.parametrize(
    ("target", "message"),
    [(" ", "the target is empty"), ("day " * 70, r"the target has 72 tokens, but the decoder has positions for 64")],
)
def test_targets_that_cannot_be_read(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        look(*bart(), SOURCE, target=target)


def test_several_parts_have_datasets_of_their_own(tmp_path: Any) -> None:
    import regard

    seen = look(*t5(), SOURCE, target="he slept")
    with pytest.raises(ValueError, match="there are 3 parts, each with a dataset of its own: Encoder self-attention, "):
        _ = seen.dataset
    files = seen.save(tmp_path / "seen.nc")
    assert [file.name for file in files] == [
        "seen.encoder-self-attention.nc", "seen.decoder-self-attention.nc", "seen.cross-attention.nc",
    ]  # fmt: skip
    for file, part in zip(files, seen.parts, strict=True):
        assert regard.load(file).equals(part.dataset)


def test_a_source_of_one_token_is_told_from_the_target() -> None:
    model, tokenizer = t5()
    tokenizer.backend_tokenizer.post_processor = None  # nothing stands around a text
    seen = look(model, tokenizer, "rained", target="he slept")
    assert [part.name for part in seen.parts] == PARTS
    assert [(part.dataset.sizes["query"], part.dataset.sizes["key"]) for part in seen.parts] == [(1, 1), (3, 3), (3, 1)]
