"""How the pieces of different tokenizers are joined."""

import pytest

from regard.view.words import join


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["[CLS]", "don", "'", "t", "(", "un", "##wind", ")", "!"], "[CLS] don't (unwind)!"),
        (["he", "said", ":", '"', "no", '"', "twice"], 'he said: "no" twice'),
        (["The", "Ġlight", "house", "Ċ", "ĠâĢ", "ľ", "Yes"], "The lighthouse\n “Yes"),
        (["##", "ĠTitle"], "## Title"),
        (["<s>", "▁The", "▁light", "house", "<0x0A>", "<0xC3>", "<0xA9>"], "<s> The lighthouse\né"),
        (["The", " light", "house"], "The lighthouse"),
        (["a", "b", " ", "c"], "ab c"),
        (["ä½łå¥½", "ï¼Į", "ä¸ĸçķĮ", "ãĢĤĊ"], "你好，世界。\n"),
        (["caf", "##é"], "café"),
        ([], ""),
    ],
)
def test_the_pieces_read_as_text(tokens: list[str], text: str) -> None:
    pieces = join(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


def test_padding_stays_empty() -> None:
    assert join(["the", "house", "", ""]) == ["the", " house", "", ""]


def test_a_word_in_pieces_is_one_word_where_the_spelling_is_known() -> None:
    tokens = ["Ant", "idis", "establish", "ment"]
    assert "".join(join(tokens, "byte-level")) == "".join(join(tokens, "SentencePiece")) == "Antidisestablishment"
    assert "".join(join(tokens, "WordPiece")) == "Ant idis establish ment"
