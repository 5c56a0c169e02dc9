"""Prompts with an image in them, and models that compare images with texts."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from regard.look import look
from regard.view.segments import between
from tests.inputs.models import VOCABULARY, clip, image, llava, tokenizer
from tests.steer.vision.conftest import qwen

QUESTION = "what is in it ?"


def matrices(model: Any, **inputs: Any) -> Any:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(**inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return told


def test_a_prompt_is_words_and_patches() -> None:
    model, processor = llava()
    seen = look(model, processor, f"user : <image> {QUESTION}", image=image())
    assert [part.name for part in seen.parts] == ["Prompt and image", "Image encoder"]
    prompt = seen.parts[0]
    patches = [f"row {row}, column {column}" for row in range(4) for column in range(4)]
    assert prompt.dataset.key_token[0].values.tolist() == ["<s>", "user", ":", *patches, *QUESTION.split(), "</s>"]
    assert prompt.picture is not None
    assert prompt.picture.positions == tuple(range(3, 19))
    inputs = processor(images=image(), text=f"user : <image> {QUESTION}", return_tensors="pt")
    told = matrices(model, **inputs).attentions
    words = [1, 2, *range(19, 24)]
    for layer, matrix in enumerate(told):
        dense = matrix[0].double().numpy()
        np.testing.assert_allclose(prompt.dataset.received[layer, 0], dense.sum(1), rtol=1e-3, atol=1e-5)
        share = dense[:, words, 3:19].sum(-1).mean(-1)
        np.testing.assert_allclose(between(prompt.dataset)["text → image"][layer], share, atol=1e-5)
    assert seen.notes == ()


def test_patches_are_no_repeated_words() -> None:
    """All tokens of an image have one id; that is no repetition that a head could continue."""
    data = look(*llava(), f"<image> {QUESTION}", image=image()).parts[0].dataset
    assert np.isnan(data["at"].sel(target=["induction", "retrieval"])).all()


def test_where_the_image_stands_is_said_unless_the_prompt_does() -> None:
    model, processor = llava()
    seen = look(model, processor, QUESTION, image=image())
    assert seen.parts[0].dataset.key_token[0].values[1] == "row 0, column 0"
    assert seen.notes == ("the image stands before the prompt; write <image> to have it elsewhere",)
    processor.chat_template = (
        "{% for message in messages %}user : {% for part in message.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    seen = look(model, processor, QUESTION, image=image())
    assert seen.parts[0].dataset.key_token[0].values[1:4].tolist() == ["user", ":", "row 0, column 0"]
    assert seen.notes == ("the prompt is what the model's chat template makes of image and text",)


def test_without_an_image_the_text_alone_is_read_and_it_is_said() -> None:
    seen = look(*llava(), QUESTION)
    assert seen.dataset.key_token[0].values.tolist() == ["<s>", *QUESTION.split(), "</s>"]
    assert seen.notes == ("no --image was given: LlavaModel reads the text alone",)


def test_tiles_have_no_one_grid_and_it_is_said() -> None:
    """As where a processor cuts an image into several, of which each has patches of its own."""
    model, processor = llava()

    def tiles(images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        made = processor(images=[images] * 2, text=text, return_tensors=return_tensors)
        return dict(made)

    cut = SimpleNamespace(
        image_processor=processor.image_processor, tokenizer=processor.tokenizer, image_token="<image>"
    )
    calling = type("Tiles", (SimpleNamespace,), {"__call__": staticmethod(tiles)})(**vars(cut))
    seen = look(model, calling, f"<image> <image> {QUESTION}", image=image())
    assert seen.parts[0].dataset.key_token[0].values[1:3].tolist() == ["image token 0", "image token 1"]
    assert seen.parts[0].picture is None
    assert "how the 32 image tokens lie on the image is not known" in seen.notes[0]


def test_merged_patches_of_images_of_any_size() -> None:
    """Qwen2-VL makes one token of 2×2 patches, and says how many there are."""
    seer = qwen()
    processor = type("Processor", (SimpleNamespace,), {"__call__": lambda self, **_: dict(seer.inputs)})(
        image_processor=SimpleNamespace(), tokenizer=tokenizer(), image_token="<image>"
    )
    tokenizer_ids = {"convert_ids_to_tokens": lambda ids: [f"word{number}" for number in ids]}
    processor.tokenizer = SimpleNamespace(
        **tokenizer_ids, all_special_ids=[], model_max_length=64, convert_tokens_to_string="".join
    )
    seen = look(seer.model.model, processor, "<image>", image=image())
    names = seen.parts[0].dataset.key_token[0].values.tolist()
    assert names[2] == "row 0, column 0"
    assert names[17] == "row 3, column 3"
    assert seen.parts[0].picture is not None
    assert seen.notes[-1].startswith("not shown: 2 calls over other tokens, such as visual.blocks.0.attn, 64×64")


@pytest.mark.parametrize(
    ("text", "pictured", "parts", "note"),
    [
        ("a red cat", False, ["Text"], "no --image was given: the encoder of texts alone is shown"),
        (None, True, ["Image"], "no text was given: the encoder of images alone is shown"),
        ("a red cat", True, ["Image", "Text"], None),
    ],
)
def test_of_two_encoders_those_run_that_are_needed(
    text: str | None, pictured: bool, parts: list[str], note: str | None
) -> None:
    model, processor = clip()
    seen = look(model, processor, text, image=image() if pictured else None)
    assert [part.name for part in seen.parts] == parts
    assert seen.notes == (() if note is None else (note,))
    pixels = processor.image_processor(images=image(), return_tensors="pt").pixel_values
    ids = processor.tokenizer("a red cat", return_tensors="pt").input_ids
    stored = {
        "Image": matrices(model.vision_model, pixel_values=pixels).attentions,
        "Text": matrices(model.text_model, input_ids=ids).attentions,
    }
    for part in seen.parts:
        for layer, matrix in enumerate(stored[part.name]):
            np.testing.assert_allclose(part.dataset.received[layer, 0], matrix[0].sum(1), rtol=1e-3, atol=1e-5)


def test_siglip_reads_texts_filled_up() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = hf.SiglipTextConfig(**sizes, vocab_size=len(VOCABULARY), max_position_embeddings=16)
    vision = hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    processor = hf.SiglipProcessor(hf.SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer())
    (part,) = look(model, processor, "a red cat").parts
    assert part.dataset.key_token[0].values.tolist() == ["<s>", "a", "red", "cat", "</s>"] + ["<pad>"] * 11
