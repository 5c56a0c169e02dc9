"""What a model is not made for is refused in one line that says what it reads."""

from typing import Any

import pytest

from regard.look import look
from tests.inputs.models import bert, clip, dinov2, image, llava, sound, t5, vit, whisper

WORDS = "it rained all day"


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (bert, {"text": WORDS, "image": image()}, "BertModel reads texts: leave out --image"),
        (bert, {"text": WORDS, "target": WORDS}, "BertModel reads texts: leave out --target"),
        (bert, {"text": WORDS, "audio": sound(1), "image": image()}, "leave out --audio and --image"),
        (bert, {}, "BertModel reads texts: give --prompt or --text"),
        (vit, {"text": WORDS}, "ViTModel reads images alone: give --image"),
        (dinov2, {}, "Dinov2WithRegistersModel reads images alone: give --image"),
        (vit, {"text": WORDS, "image": image()}, "ViTModel reads images alone: leave out --prompt or --text"),
        (clip, {"audio": sound(1)}, "CLIPModel compares images with texts: leave out --audio"),
        (clip, {}, "CLIPModel reads an image, a text or both: give --image, --prompt or --text"),
        (llava, {"image": image()}, "LlavaModel reads texts with an image in them: give --prompt or --text"),
        (llava, {"text": WORDS, "pair": WORDS}, "reads texts with an image in them: leave out --pair"),
        (t5, {"text": WORDS, "pair": WORDS}, "makes one text of another: leave out --pair"),
        (t5, {"text": WORDS, "window": True}, "--window cuts a text alone, and nothing else"),
        (bert, {"text": WORDS, "pair": WORDS, "window": True}, "--window cuts a text alone, and nothing else"),
        (vit, {"image": image(), "max_tokens": 3}, "--max-tokens shortens texts, and ViTModel reads images alone"),
        (whisper, {"text": WORDS}, "writes what is said in a recording: give --audio"),
        (whisper, {"image": image(), "audio": sound(1)}, "writes what is said in a recording: leave out --image"),
    ],
)
def test_what_a_model_is_not_made_for(build: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        look(*build(), **given)
    assert len(str(raised.value).splitlines()) == 1


def test_inputs_that_are_of_no_known_kind() -> None:
    model, _ = vit()
    with pytest.raises(ValueError, match="ViTModel reads pixel_values, which is prepared here neither from a text"):
        look(model, bert()[1], WORDS)
