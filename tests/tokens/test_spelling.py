"""How tokenizers of every kind write their tokens."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from regard.tokens import spelling_of


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        (decoders.ByteLevel(), "byte-level"),
        (decoders.Metaspace(), "SentencePiece"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "SentencePiece"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), None),
        (None, None),
    ],
    ids=["byte-level", "metaspace", "byte fallback", "wordpiece", "end of word", "none"],
)
def test_of_every_decoder(decoder: Any, found: str | None) -> None:
    written = Tokenizer(models.BPE())
    if decoder is not None:
        written.decoder = decoder
    assert spelling_of(PreTrainedTokenizerFast(tokenizer_object=written)) == found
