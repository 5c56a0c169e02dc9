"""Who keeps all and who streams; and the profile, held to the stored matrices."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import RetrievalHeads, StreamingLLM
from tests.cache.conftest import decoder, texts
from tests.cache.reference import matrix

HEADS = {0: [1], 2: [0, 1]}


@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=["one", "padded"])
@pytest.mark.parametrize("budget", [6, 0.5])
def test_retrieval_heads_keep_all(llama: hf.PreTrainedModel, budget: int | float, lengths: tuple[int, ...]) -> None:
    with torch.no_grad(), regard.compress(llama, RetrievalHeads(budget=budget, sinks=2, heads=HEADS)) as cache:
        llama(**texts(*lengths))
    real = texts(*lengths)["attention_mask"].bool()[:, None]
    for layer in cache.report().layers:
        for row, length in enumerate(lengths):
            first, number = 20 - length, budget if isinstance(budget, int) else -(-length // 2)
            streaming = [first, first + 1, *range(20 - number + 2, 20)]
            for head, kept in enumerate((layer.positions & real)[row]):
                full = head in HEADS.get(layer.layer, [])
                assert kept.nonzero()[:, 0].tolist() == (list(range(first, 20)) if full else streaming)


def test_the_others_stay_at_their_budget_while_decoding(llama: hf.PreTrainedModel) -> None:
    policy = RetrievalHeads(budget=6, sinks=2, heads=HEADS)
    with regard.compress(llama, policy) as cache:
        llama.generate(**texts(12), max_new_tokens=8, do_sample=False)
    assert [layer.kept for layer in cache.report().layers] == [[6, 19], [6, 6], [19, 19]]
    for head in cache.report().layers[1].positions[0]:
        assert head.nonzero()[:, 0].tolist() == [0, 1, 15, 16, 17, 18]


def test_all_heads_and_none(llama: hf.PreTrainedModel) -> None:
    inputs, options = texts(20, 15), {"max_new_tokens": 8, "do_sample": False}
    plain = llama.generate(**inputs, **options)
    with regard.compress(llama, RetrievalHeads(budget=5, heads={layer: [0, 1] for layer in range(3)})):
        assert torch.equal(llama.generate(**inputs, **options), plain)
    with regard.compress(llama, StreamingLLM(budget=5)):
        streaming = llama.generate(**inputs, **options)
    with regard.compress(llama, RetrievalHeads(budget=5, heads={})):
        assert torch.equal(llama.generate(**inputs, **options), streaming)


def test_a_text_in_a_padded_batch_is_as_alone(llama: hf.PreTrainedModel) -> None:
    both, policy = texts(16, 11), RetrievalHeads(budget=0.5, sinks=1, heads=HEADS)
    alone = {key: value[1:, 5:] for key, value in both.items()}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with regard.compress(llama, policy):
        together = torch.stack(llama.generate(**both, **options).logits)[:, 1]
    with regard.compress(llama, policy):
        single = torch.stack(llama.generate(**alone, **options).logits)[:, 0]
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-3)


# --- the profile ------------------------------------------------------------------------------------------------------


def copies(seed: int) -> Tensor:
    """A text with a passage that comes again after its first token was seen elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    passage, other, filler = (torch.randint(3, 97, (n,), generator=generator) for n in (8, 3, 9))
    return torch.cat([passage, filler, passage[:1], other, passage, other, passage])


def targets(ids: list[int], by: str) -> dict[int, int]:
    """The position that each token should look at, in plain Python."""
    found: dict[int, int] = {}
    for place, token in enumerate(ids):
        earlier = [past for past in range(place) if ids[past] == token]
        if by == "induction":
            if earlier:
                found[place] = earlier[-1] + 1
            continue
        following = ids[place + 1 : place + 4]
        said = [past + 1 for past in range(place) if ids[past + 1 : past + 4] == following]
        told = bool(earlier) and following and ids[earlier[-1] + 1] == following[0]
        if len(following) == 3 and said and not told:
            found[place] = said[-1]
    return found


@pytest.mark.parametrize("by", ["induction", "retrieval"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_profile(name: str, by: str) -> None:
    model = decoder(name)
    windows = {0, 1} if name == "gemma3" else set()
    key_heads = 4 if name == "gpt2" else 2
    samples = [copies(1), copies(2).tolist(), copies(3)]
    looks: dict[tuple[int, int], list[float]] = {}

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if call.place.layer not in windows:
            key = call.key[:, :: call.key.shape[1] // key_heads]
            scale = call.factor * call.query.shape[-1] ** 0.5
            weights = matrix(call.query * scale, key, torch.ones(1, key.shape[2], dtype=torch.bool))[0]
            for query, target in targets(call.place.token_ids[0].tolist(), by).items():
                for head, weight in enumerate(weights[:, query, target].tolist()):
                    looks.setdefault((call.place.layer, head), []).append(weight)
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        for sample in samples:
            model(torch.as_tensor(sample)[None])
    numbers = sorted({layer for layer, _ in looks})
    best: dict[tuple[int, int], float] = {}
    for (layer, head), found in looks.items():
        key_head = (numbers.index(layer), head // (4 // key_heads))
        best[key_head] = max(best.get(key_head, 0), sum(found) / len(found))
    ranking = sorted(best, key=lambda head: -best[head])
    for share, number in ((1e-6, 1), (0.4, -(-len(ranking) * 2 // 5)), (1.0, len(ranking))):
        profile = RetrievalHeads.profile(model, samples, share=share, by=by)
        assert {(layer, head) for layer, heads in profile.items() for head in heads} == set(ranking[:number])


def test_a_profile_is_of_the_layers_that_are_compressed() -> None:
    """Of Gemma 3's three layers, the last has no window: it is layer 0 here."""
    model = decoder("gemma3")
    profile = RetrievalHeads.profile(model, [copies(1)], share=0.5)
    assert list(profile) == [0]
    with torch.no_grad(), regard.compress(model, RetrievalHeads(budget=6, heads=profile)) as cache:
        model(**texts(20))
    (kept,) = [layer.kept for layer in cache.report().layers if not layer.window]
    assert sorted(kept) == [6, 20]
    assert kept[profile[0][0]] == 20


def test_the_bundled_model_answers_from_its_retrieval_heads() -> None:
    """With a quarter of its heads, the bundled model knows what streaming alone forgets."""
    model, tokenizer = regard.mini()
    text = "The code of Ada is 48213. They slept through the afternoon, and nobody spoke. " * 2
    heads = RetrievalHeads.profile(model, [tokenizer(text)["input_ids"]], share=0.25, by="induction")
    prompt = "The code of Ada is 48213. The rain fell upon the roof, and they slept. The code of Ada is"
    inputs = tokenizer(prompt, return_tensors="pt")

    def answer(policy: regard.cache.Policy) -> str:
        with regard.compress(model, policy):
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]))

    assert "48213" in answer(RetrievalHeads(budget=10, heads=heads))
    assert "48213" not in answer(StreamingLLM(budget=10))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({3: [0]}, r"heads has layer 3, but 3 layers are compressed, numbered from 0, and this one has 2 key heads"),
        ({1: [0, 2]}, r"heads has heads \[0, 2\] of layer 1, but 3 layers .* this one has 2 key heads"),
        ({1: [-1]}, r"heads has heads \[-1\] of layer 1"),
    ],
)
def test_heads_that_do_not_exist(llama: hf.PreTrainedModel, heads: dict[int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message), regard.compress(llama, RetrievalHeads(budget=5, heads=heads)):
        llama(**texts(12))


def test_misuse(llama: hf.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"heads must map layers to key heads, such as .*; got \[1, 2\]"):
        RetrievalHeads(budget=5, heads=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"always keeps 5 entries, but the budget is 4"):
        RetrievalHeads(budget=4, heads=HEADS)
    with pytest.raises(ValueError, match=r"share must be above 0 and at most 1, got 0"):
        RetrievalHeads.profile(llama, [copies(1)], share=0)
    with pytest.raises(ValueError, match=r"no token of 2 samples has a target .* that repeat passages"):
        RetrievalHeads.profile(llama, [range(3, 30), range(3, 20)])
    with pytest.raises(ValueError, match=r"no token of 0 samples"):
        RetrievalHeads.profile(llama, [])
    with pytest.raises(ValueError, match=r"At knows the targets .* got 'copy'"):
        RetrievalHeads.profile(llama, [copies(1)], by="copy")
