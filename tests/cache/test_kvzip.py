"""KVzip: its scores against stored matrices in float64, and what is left of the cache after them."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.cache import KeepAll, Knorm, KVzip, reconstruction
from regard.cache.reconstruction import Reconstruction
from tests.cache.conftest import DECODERS, MORE, decoder, texts
from tests.cache.test_families import LATENTS, SHARED, masked, model_of

BIASED = {
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    )
}
CAPPED = {
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, head_dim=8, layer_types=["full_attention"] * 2, attn_logit_softcapping=2.0,
        )
    )
}  # fmt: skip


class Letters:
    """A tokenizer of a token for each letter, for models that know 97 tokens."""

    chat_template: str | None = None
    model_max_length = 10**9

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [3 + ord(letter) % 90 for letter in text]

    def __repr__(self) -> str:
        return "Letters()"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options["add_generation_prompt"]
        return f"USER {messages[0]['content']} DONE"


class Chat(Letters):
    """With a template of what users say."""

    chat_template = "…"


def model_named(name: str) -> Any:
    if name in DECODERS | MORE:
        return decoder(name)
    return model_of((LATENTS | SHARED | BIASED | CAPPED)[name])


def recorded(model: Any, ids: Tensor) -> list[regard.AttentionCall]:
    calls: list[regard.AttentionCall] = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        calls.append(call)
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        model(ids, use_cache=False)
    return calls


def probabilities(call: regard.AttentionCall, seen: int, keys: list[int]) -> Tensor:
    """(B, Hq, new, keys) of the queries after so many tokens, of these keys alone, in float64."""
    shared = call.query.shape[1] // call.key.shape[1]
    query, key = call.query[:, :, seen:].double(), call.key[:, :, keys].double().repeat_interleave(shared, dim=1)
    logits = query @ key.mT * call.factor
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    hidden = torch.tensor(keys) > torch.arange(seen, call.query.shape[2])[:, None]
    if call.attn_mask is not None and call.attn_mask.is_floating_point():
        logits = logits + call.attn_mask[..., seen:, keys].double()
    logits = logits.masked_fill(hidden, -math.inf)
    if call.sinks is not None:
        sinks = call.sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], dim=3).softmax(dim=3)[..., :-1]
    return logits.softmax(dim=3)


def reference(model: Any, ids: Tensor, chunk: int, sinks: int) -> list[Tensor]:
    """(B, Hq, tokens) of each call: the highest attention of a repetition, a plain reading of everything for each chunk."""
    seen, found = ids.shape[1], []
    for first in range(0, seen, chunk):
        own = list(range(first, min(first + chunk, seen)))
        asked = Letters().encode(
            "\n\nRepeat the previous context exactly."
            if not first
            else "\n\nRepeat the part of the previous context exactly, starting with",
            add_special_tokens=False,
        )
        before = ids[:, max(first - 8, 0) : first]
        line = Letters().encode("\n", add_special_tokens=False)
        request = [torch.tensor([part]).expand(len(ids), -1) for part in (asked, line)]
        whole = torch.cat([ids, request[0], before, request[1], ids[:, own]], dim=1)
        firsts = list(range(min(sinks, first)))
        keys = [*firsts, *own, *range(seen, whole.shape[1])]
        maxima = [probabilities(call, seen, keys).amax(dim=2) for call in recorded(model, whole)]
        found.append([of[:, :, len(firsts) : len(firsts) + len(own)] for of in maxima])
    return [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "sdpa") for name in (*DECODERS, *LATENTS, *SHARED, *BIASED)),
        *((name, "eager") for name in ("llama", "gemma3", "deepseek v3", *MORE, *CAPPED)),
    ],
)
def test_scores_are_the_highest_attention_of_a_repetition(name: str, implementation: str) -> None:
    model, ids = model_named(name), torch.cat([texts(21, seed=seed)["input_ids"] for seed in (0, 1)])
    model.set_attn_implementation(implementation)
    with torch.no_grad(), regard.compress(model, KeepAll()):
        cache = model(ids).past_key_values
    before = [copy.deepcopy(layer) for layer in cache.layers]
    found = Reconstruction(Letters(), 8, 3, False).scores(model, cache)
    expected = reference(model, ids, 8, 3)
    rank = 0
    for number, layer in enumerate(cache.layers):
        own = before[number]
        if not hasattr(layer, "get_seq_length"):  # it attends to the keys of another
            continue
        assert layer.get_seq_length() == own.get_seq_length() == 21
        if not hasattr(layer, "groups"):  # a sliding window, as it was
            assert torch.equal(layer.keys, own.keys)
            continue
        assert torch.equal(layer.groups[0].keys, own.groups[0].keys)
        heads = found[rank].shape[1]
        maxima = expected[number].unflatten(1, (heads, -1)).amax(dim=2)
        assert bool(found[rank][..., :3].isinf().all())
        torch.testing.assert_close(found[rank][..., 3:].double(), maxima[..., 3:], atol=1e-5, rtol=1e-3)
        rank += 1
    assert rank == len(found)


def policy(**settings: Any) -> KVzip:
    return KVzip(Letters(), **{"budget": 0.25, "chunk": 8, "sinks": 2} | settings)


def chosen(scores: list[Tensor], number: int) -> list[Tensor]:
    """The best entries, so many of each text, of all these layers and heads together."""
    every = torch.cat([of.flatten(1) for of in scores], dim=1)
    best = torch.zeros_like(every, dtype=torch.bool)
    for row, order in enumerate(every.argsort(dim=1, descending=True).tolist()):
        best[row, order[:number]] = True
    return [part.view_as(of) for part, of in zip(best.split([of[0].numel() for of in scores], 1), scores, strict=True)]


@pytest.mark.parametrize("budget", [0.25, 0.3, 5])
@pytest.mark.parametrize("across", ["model", "layer", "head"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek v3"])
def test_the_best_entries_stay(name: str, across: str, budget: int | float) -> None:
    model, ids = model_named(name), torch.cat([texts(21, seed=seed)["input_ids"] for seed in (0, 1)])
    with torch.no_grad(), regard.compress(model, KeepAll()):
        cache = model(ids).past_key_values
    scores = Reconstruction(Letters(), 8, 2, False).scores(model, cache)
    with torch.no_grad(), regard.compress(model, policy(across=across, budget=budget)) as block:
        model(ids)
    each = budget if isinstance(budget, int) else budget * 21
    groups = {
        "model": [scores],
        "layer": [[of] for of in scores],
        "head": [[of[:, [head]]] for of in scores for head in range(of.shape[1])],
    }[across]
    expected = [kept for group in groups for kept in chosen(group, math.ceil(each * sum(of.shape[1] for of in group)))]
    layers = [layer.positions for layer in block.report().layers if not layer.window]
    if across == "head":
        layers = [head[:, None] for layer in layers for head in layer.unbind(1)]
    for one, other in zip(layers, expected, strict=True):
        assert torch.equal(one, other)
        assert bool(one[..., :2].all())


@pytest.mark.parametrize("name", ["llama", "gpt2", *LATENTS, *SHARED])
def test_steps_after_the_block_attend_to_what_is_left(name: str) -> None:
    model, inputs = model_named(name), texts(20)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), regard.compress(model, policy()) as block:
        context = model(ids[:, :16]).past_key_values
    left = {layer.layer: layer.positions for layer in block.report().layers if not layer.window}
    with torch.no_grad(), regard.compress(model, KeepAll()):
        steps = [model(ids[:, place : place + 1], past_key_values=context).logits[:, -1] for place in range(16, 20)]
    expected = masked(
        model, ids, mask, 16, {layer: torch.nn.functional.pad(kept, (0, 4), value=True) for layer, kept in left.items()}
    )
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, atol=2e-4, rtol=1e-3)


def test_one_context_for_many_questions_saved_and_loaded() -> None:
    model, ids, file = decoder("llama"), texts(20)["input_ids"], io.BytesIO()
    with torch.no_grad(), regard.compress(model, policy()) as block:
        context = model(ids).past_key_values
    assert 0.24 < block.report().kept < 0.27
    assert str(block.report()).startswith("KVzip(budget=0.25, chunk=8, sinks=2): 25")
    regard.cache.save(context, file)
    file.seek(0)
    loaded = regard.cache.load(file)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for number in (7, 8):
        asked = torch.cat([ids, torch.tensor([[number, 9]])], dim=1)
        answers = [model.generate(asked, past_key_values=copy.deepcopy(one), **options) for one in (context, loaded)]
        assert torch.equal(*answers)
        assert context.get_seq_length() == 20


def test_what_is_written_inside_is_a_part_of_the_text() -> None:
    """Nothing is dropped before the end, whatever is written until then; then all of it."""
    model, ids = decoder("llama"), texts(12)["input_ids"]
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    for helped in ({}, {"prompt_lookup_num_tokens": 3}):
        with regard.compress(model, policy(budget=4)) as block:
            written = model.generate(ids, max_new_tokens=6, do_sample=False, **helped)
        assert torch.equal(written, plain)
        assert sum(sum(layer.kept) for layer in block.report().layers) >= 4 * 6  # the mean of 3 layers of 2 heads
        assert block.report().kept == pytest.approx(4 / block.report().layers[0].seen)


def test_a_head_may_keep_nothing() -> None:
    model, ids = decoder("llama"), texts(40)["input_ids"]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[:8] = 0  # whose head looks nowhere in particular
    with torch.no_grad(), regard.compress(model, policy(budget=1, sinks=0)) as block:
        context = model(ids).past_key_values
    assert block.report().layers[1].kept[0] == 0
    with torch.no_grad():
        assert bool(model(torch.tensor([[5]]), past_key_values=context).logits.isfinite().all())


def test_a_text_of_first_tokens_is_kept_whole() -> None:
    model = decoder("llama")
    with torch.no_grad(), regard.compress(model, policy(sinks=4)) as block:
        model(texts(12)["input_ids"])
    assert block.report().kept == 1.0
    assert "1 text is kept whole" in str(block.report())


def test_what_begins_a_turn_stays_and_is_not_repeated() -> None:
    model, chat = decoder("llama"), Chat()
    before = chat.encode("USER ", add_special_tokens=False)
    ids = torch.cat([torch.tensor([before]), texts(20)["input_ids"]], dim=1)
    passes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: passes.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    with torch.no_grad(), regard.compress(model, KVzip(chat, budget=0.4, chunk=20)) as block:
        model(ids)
    after = chat.encode(" DONE", add_special_tokens=False)
    assert [given[-25:] for given in passes[1:]] == [after + ids[0, len(before) :].tolist()]
    assert all(bool(layer.positions[..., : len(before)].all()) for layer in block.report().layers)
    assert block.report().kept == pytest.approx(0.4, abs=0.01)


def test_entries_that_matter_are_found(mini: tuple[Any, Any]) -> None:
    """Of a tenth of the entries the bundled model reads a code that nobody had asked for yet."""
    model, tokenizer = mini
    text = "The code of Ada is 48213. It rained all day and nobody went out. The code of Tom is 70455. They slept. " * 2
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), regard.compress(model, KVzip(tokenizer, budget=0.3)):
        context = model(**inputs).past_key_values
    for name, code in (("Ada", "48213"), ("Tom", "70455")):
        question = tokenizer(f"The code of {name} is", return_tensors="pt")["input_ids"]
        asked = torch.cat([inputs["input_ids"], question], dim=1)
        written = model.generate(asked, past_key_values=copy.deepcopy(context), max_new_tokens=6, do_sample=False)
        assert code in tokenizer.decode(written[0, asked.shape[1] :])


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[1] > 1:
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()  # an expanded mask has few
                self.numbers = max(self.numbers, numbers)
        return result


def test_no_matrix_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask for all heads is transformers' own; nothing as large is made for each head."""
    monkeypatch.setattr(reconstruction, "_NUMBERS_AT_ONCE", 2**15)
    model, ids = decoder("llama"), texts(400)["input_ids"]
    with torch.no_grad(), regard.compress(model, KeepAll()):
        cache = model(ids).past_key_values
    with Largest() as largest:
        Reconstruction(Letters(), 400, 4, False).scores(model, cache)
    assert largest.numbers < 4 * 400 * 400


def test_a_block_that_fails_repeats_nothing() -> None:
    model, ids = decoder("llama"), texts(12)["input_ids"]
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))

    def fails() -> None:
        with regard.compress(model, policy()):
            model(ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert len(passes) == 2


def read(model: Any, settings: KVzip, ids: Tensor, **options: Any) -> Any:
    with torch.no_grad(), regard.compress(model, settings):
        return model(ids, **options).past_key_values


def test_what_cannot_be_repeated() -> None:
    model, inputs = decoder("llama"), texts(12, 7)
    with pytest.raises(ValueError, match=r"texts of a batch must be equally long, without padding"):
        read(model, policy(), inputs["input_ids"], attention_mask=inputs["attention_mask"])
    ids = inputs["input_ids"][:1]
    with pytest.raises(ValueError, match=r"7 of 15 tokens were dropped already"):
        read(model, policy(), texts(3)["input_ids"], past_key_values=read(model, Knorm(budget=5), ids))
    with torch.no_grad():
        before = model(ids, past_key_values=hf.DynamicCache(config=model.config)).past_key_values
        embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"not all of its token ids are known"):
        read(model, policy(), ids, past_key_values=before)
    with pytest.raises(ValueError, match=r"not all of its token ids are known"):
        read(model, policy(), None, inputs_embeds=embedded)  # type: ignore[arg-type]
    model.config.max_position_embeddings = 60
    with pytest.raises(
        ValueError, match=r"12 tokens, and 81 more .* 8 of them repeated, are beyond the model's 60 positions"
    ):
        read(model, policy(), ids)
    model.config.image_token_id = int(ids[0, 3])
    with pytest.raises(ValueError, match=r"1 of its tokens stand for images"):
        read(model, policy(), ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "always keeps 2 entries, but the budget is 0"),
        ({"budget": 1.5}, "share of the tokens must be above 0 and at most 1, got 1.5"),
        ({"budget": "half"}, "must be a number of entries or a share"),
        ({"across": "heads"}, 'across must be "model", "layer" or "head", got \'heads\''),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^KVzip: .*{message}"):
        policy(**settings)
    with pytest.raises(TypeError, match=r"KVzip needs the model's tokenizer first, got 0.25"):
        KVzip(0.25)
