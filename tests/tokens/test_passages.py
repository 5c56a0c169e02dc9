"""A passage's tokens are found where the model reads them: in padded batches, truncated texts and several occurrences."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import Module

import regard
from regard.tokens import locate, resolve

TEXTS = [
    "The code of Ada is 48213.",
    "They slept. It rained all day, and the code of Ada is 48213, says Tom.",
    "Ada is 48213",
]


@pytest.fixture(params=["left", "right"])
def tokenizer(request: pytest.FixtureRequest, mini: tuple[Module, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(mini[1], "padding_side", request.param)
    return mini[1]


def words(tokenizer: Any, ids: list[int], positions: list[int]) -> str:
    return str(tokenizer.decode([ids[position] for position in positions]))


def test_a_padded_batch(tokenizer: Any) -> None:
    found = locate("Ada is 48213", TEXTS, tokenizer)
    ids = tokenizer(TEXTS, padding=True)["input_ids"]
    assert [words(tokenizer, row, positions).strip() for row, positions in zip(ids, found, strict=True)] == [
        "Ada is 48213"
    ] * 3
    assert len({tuple(row) for row in found}) > 1


def test_one_text_of_a_batch_is_that_text_alone(tokenizer: Any) -> None:
    assert locate("Ada", TEXTS[:1], tokenizer) == [locate("Ada", TEXTS[0], tokenizer)]


def test_an_edit_of_a_padded_batch_is_that_of_each_text(mini: tuple[Module, Any], tokenizer: Any) -> None:
    model, _ = mini
    edit = locate(regard.Reweight(keys=" 48213", by=0.1), TEXTS[:2], tokenizer)
    assert edit == regard.Reweight(keys=locate(" 48213", TEXTS[:2], tokenizer), by=0.1)
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    edit = replace(edit, keys=resolve(edit.keys, 0, batch["input_ids"].shape[1]))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.steer(model, edit):
        together = model(**batch, position_ids=positions).logits
    for row, text in enumerate(TEXTS[:2]):
        alone = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            plain = model(**alone).logits[0]
            with regard.steer(model, locate(regard.Reweight(keys=" 48213", by=0.1), text, tokenizer)):
                wanted = model(**alone).logits[0]
        assert (wanted - plain).abs().max() > 0.01
        torch.testing.assert_close(together[row, batch["attention_mask"][row].bool()], wanted, atol=2e-4, rtol=1e-4)


def test_what_the_tokenizer_returned_tells_of_its_padding_and_truncation(tokenizer: Any) -> None:
    encoded = tokenizer(TEXTS, padding="max_length", max_length=40, truncation=True)
    found = locate("Ada", TEXTS, encoded)
    assert [words(tokenizer, row, at).strip() for row, at in zip(encoded["input_ids"], found, strict=True)] == [
        "Ada"
    ] * 3
    chat = tokenizer("<s>user: Who is Ada?", add_special_tokens=False)
    assert words(tokenizer, chat["input_ids"], locate("Ada", "<s>user: Who is Ada?", chat)) == " Ada"
    short = tokenizer(TEXTS[1], truncation=True, max_length=5)
    with pytest.raises(ValueError, match=r"the passage 'Ada' is cut off: the tokens end at character \d+ of the text"):
        locate("Ada", TEXTS[1], short)


def test_passages_become_their_tokens(mini: tuple[Module, Any]) -> None:
    _, tokenizer = mini
    text = "It rained. The secret number of Ada is 48213. It rained again."
    edit = locate(regard.Redistribute("It rained. ", "secret number of Ada", 0.5), text, tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([ids[position] for position in edit.target]) == " secret number of Ada"
    assert edit.source[0] == 1
    unchanged = regard.Reweight([3], 2)
    assert locate(unchanged, text, tokenizer) is unchanged


@pytest.mark.parametrize(("occurrence", "wanted"), [(0, [0]), (1, [1]), (-1, [2]), ("all", [0, 1, 2])])
def test_occurrences(mini: tuple[Module, Any], occurrence: Any, wanted: list[int]) -> None:
    _, tokenizer = mini
    text = "Ada slept. Ada woke. Tom saw Ada."
    each = [3, 14, 29]  # characters
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    starts = [0, 11, 29]
    by_hand = [
        n for n, (first, last) in enumerate(offsets) for w in wanted if first < starts[w] + 3 and last > starts[w]
    ]
    assert locate("Ada", text, tokenizer, occurrence=occurrence) == by_hand
    assert len(each) == text.count("Ada")
    edit = locate(regard.Block(keys="Ada"), text, tokenizer, occurrence=occurrence)
    assert edit == regard.Block(keys=by_hand)


def test_occurrences_may_overlap(mini: tuple[Module, Any]) -> None:
    with pytest.raises(ValueError, match="occurs 3 times, at characters 0, 1, 2 in the text"):
        locate("aa", "aaaa", mini[1])


@pytest.mark.parametrize(
    ("passage", "options", "error", "message"),
    [
        (
            "snow",
            {},
            ValueError,
            "the passage 'snow' does not occur in the text; name one that does, or give positions",
        ),
        ("", {}, ValueError, "does not occur"),
        (
            "Ada",
            {},
            ValueError,
            r"occurs 4 times, at characters 0, 4, 8, … in the text; say which with occurrence=",
        ),
        ("Ada", {"occurrence": 4}, IndexError, "occurrence 4 was asked for, but the passage 'Ada' occurs 4 times"),
        ("Ada", {"occurrence": -5}, IndexError, "occurrence -5 was asked for"),
        ("Ada", {"occurrence": "first"}, TypeError, "occurrence must be a number, \"all\" or None, got 'first'"),
        ("Ada", {"occurrence": True}, TypeError, "got True"),
    ],
)
def test_passages_that_are_not_told_apart(
    mini: tuple[Module, Any], passage: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        locate(passage, "Ada Ada Ada Ada.", mini[1], **options)


def test_the_text_that_lacks_a_passage_is_named(mini: tuple[Module, Any]) -> None:
    with pytest.raises(ValueError, match="'Tom' does not occur in text 0"):
        locate("Tom", TEXTS, mini[1])


def test_segments_of_a_statistic(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    text = TEXTS[0]
    segments = locate({"name": "Ada", "sink": [0]}, text, tokenizer)
    assert segments == {"name": locate("Ada", text, tokenizer), "sink": [0]}
    with torch.no_grad(), regard.watch(model, regard.Mass(segments)) as seen:
        model(**tokenizer(text, return_tensors="pt"))
    assert seen.dataset().mass.segment.values.tolist() == ["name", "sink"]


def test_whatever_says_which_of_its_arguments_are_places(mini: tuple[Module, Any]) -> None:
    class Plain:
        places = ("segments", "queries")

        def __init__(self, segments: Any, queries: Any) -> None:
            self.segments, self.queries = segments, queries

    @dataclass(frozen=True)
    class Frozen:
        places: ClassVar[tuple[str, ...]] = ("queries",)
        queries: Any

    before = Plain({"name": "Ada", "sink": 0}, [1])
    after = locate(before, TEXTS[0], mini[1])
    assert after.segments == {"name": locate("Ada", TEXTS[0], mini[1]), "sink": 0}
    assert (before.segments, after.queries) == ({"name": "Ada", "sink": 0}, [1])
    assert locate(Frozen("Ada"), TEXTS[0], mini[1]) == Frozen(locate("Ada", TEXTS[0], mini[1]))
    unchanged = Frozen([3])
    assert locate(unchanged, TEXTS[0], mini[1]) is unchanged
    with pytest.raises(TypeError, match=r"locate needs a passage, a mapping .* got int"):
        locate(3, TEXTS[0], mini[1])


def test_tokenizers_that_do_not_tell(mini: tuple[Module, Any]) -> None:
    with pytest.raises(ValueError, match="locate needs a fast tokenizer, which tells where its tokens stand; got"):
        locate("Ada", TEXTS[0], lambda text: text)
    with pytest.raises(ValueError, match="1 texts were tokenized, but 3 are given"):
        locate("Ada", TEXTS, mini[1](TEXTS[0]))
    with pytest.raises(ValueError, match="there is no text to locate anything in"):
        locate("Ada", [], mini[1])


def test_words_that_a_tokenizer_drops(minilm: tuple[Module, Any]) -> None:
    with pytest.raises(ValueError, match="no token stands for the passage '  ' of the text"):
        locate("  ", "Ada  slept", minilm[1])
