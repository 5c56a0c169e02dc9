"""Each statistic, against the dense matrix."""

from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.at import induction_targets, repeated_targets, retrieval_targets
from tests.watch.test_models import built, ids

TOKENS = 11


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(2, 4, TOKENS, 8), torch.randn(2, 2, TOKENS, 8), torch.randn(2, 2, TOKENS, 8)


def seen(tensors: tuple[Tensor, ...], *statistics: regard.Statistic, causal: bool = True) -> regard.Recording:
    with regard.watch(*statistics) as recording:
        F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    return recording


def matrix_of(tensors: tuple[Tensor, ...], causal: bool = True) -> np.ndarray:
    query, key = tensors[0].double(), tensors[1].double().repeat_interleave(2, dim=1)
    logits = query @ key.transpose(-1, -2) * 8**-0.5
    if causal:
        logits = logits.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1).numpy()


def test_mass_of_positions_slices_and_masks(tensors: tuple[Tensor, ...]) -> None:
    rows = torch.rand(2, TOKENS) > 0.5
    segments = {"first": 0, "last": -1, "some": [1, 3, 4], "slice": slice(2, 6), "mask": rows}
    mass = seen(tensors, regard.Mass(segments)).dataset().mass[0]
    matrix = matrix_of(tensors)
    assert mass.segment.values.tolist() == list(segments)
    np.testing.assert_allclose(mass.sel(segment="first"), matrix[..., 0], atol=1e-6)
    np.testing.assert_allclose(mass.sel(segment="last"), matrix[..., -1], atol=1e-6)
    np.testing.assert_allclose(mass.sel(segment="some"), matrix[..., [1, 3, 4]].sum(-1), atol=1e-6)
    np.testing.assert_allclose(mass.sel(segment="slice"), matrix[..., 2:6].sum(-1), atol=1e-6)
    np.testing.assert_allclose(mass.sel(segment="mask"), (matrix * rows.numpy()[:, None, None]).sum(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "chosen"),
    [
        ([2, -1], [2, 10]),
        (slice(4, None), list(range(4, 11))),
        (torch.arange(TOKENS) < 3, [0, 1, 2]),
        (range(0, 5, 2), [0, 2, 4]),
        (7, [7]),
    ],
)
def test_received_from_chosen_queries(tensors: tuple[Tensor, ...], queries: object, chosen: list[int]) -> None:
    received = seen(tensors, regard.Received(queries=queries)).dataset().received[0]  # type: ignore[arg-type]
    np.testing.assert_allclose(received, matrix_of(tensors)[:, :, chosen].sum(2), atol=1e-5)


def test_at_offsets_and_targets(tensors: tuple[Tensor, ...]) -> None:
    targets = torch.randint(-1, TOKENS, (2, TOKENS))
    at = regard.At("own", "next", three_back=-3, chosen=targets)
    data = seen(tensors, at, causal=False).dataset()["at"][0]
    matrix = matrix_of(tensors, causal=False)
    for name, offset in (("own", 0), ("next", 1), ("three_back", -3)):
        rows = [i for i in range(TOKENS) if 0 <= i + offset < TOKENS]
        shares = data.sel(target=name)
        np.testing.assert_allclose(shares[:, :, rows], matrix[:, :, rows, [i + offset for i in rows]], atol=1e-6)
        assert shares.isnull().sum() == 2 * 4 * (TOKENS - len(rows))
    chosen = np.take_along_axis(matrix, targets.clamp(min=0).numpy()[:, None, :, None], axis=3)[..., 0]
    chosen = np.where(targets.numpy()[:, None] < 0, np.nan, chosen)
    np.testing.assert_allclose(data.sel(target="chosen"), chosen, atol=1e-6)


def test_induction_targets_are_those_of_the_definition() -> None:
    tokens = torch.randint(0, 5, (3, 40))
    targets = induction_targets(tokens)
    for row in range(3):
        for i in range(40):
            earlier = [j for j in range(i) if tokens[row, j] == tokens[row, i]]
            assert targets[row, i] == (earlier[-1] + 1 if earlier else -1)


def test_retrieval_targets_are_those_of_the_definition() -> None:
    tokens = torch.randint(0, 3, (3, 40))
    targets, simpler, repeated = (find(tokens) for find in (retrieval_targets, induction_targets, repeated_targets))
    for row in range(3):
        said = tokens[row].tolist()
        for i in range(40):
            earlier = [j for j in range(1, i + 1) if said[j : j + 3] == said[i + 1 : i + 4] and i + 4 <= 40]
            told = said[simpler[row, i]] if simpler[row, i] >= 0 else None
            after = said[i + 1] if i + 1 < 40 else -1
            assert targets[row, i] == (earlier[-1] if earlier and told != after else -1)
            assert repeated[row, i] == (simpler[row, i] if told == after else -1)
    assert (targets >= 0).any()
    assert (retrieval_targets(tokens[:, :3]) == -1).all()


def test_induction_reads_the_token_ids_of_the_model() -> None:
    model, tokens = built("llama"), ids(12) % 4 + 3
    matrices = []
    with torch.no_grad(), regard.watch(model, regard.At("induction"), keep_maps=True) as recording:
        model(input_ids=tokens)
    targets = induction_targets(tokens)
    for maps in recording.maps.values():
        matrices.append(maps[0].at(targets).masked_fill(targets[:, None] < 0, torch.nan))
    np.testing.assert_allclose(recording.dataset()["at"][..., 0], torch.stack(matrices), atol=1e-6)
    with torch.no_grad(), regard.watch(model, regard.At("induction", token_ids=tokens)) as given:
        model(inputs_embeds=model.model.embed_tokens(tokens))
    np.testing.assert_allclose(given.dataset()["at"], recording.dataset()["at"], atol=1e-6)
    embeddings = model.model.embed_tokens(tokens)
    with pytest.raises(ValueError, match="needs token ids"), regard.watch(model, regard.At("induction")):
        model(inputs_embeds=embeddings)


def test_sinks_count_the_queries_that_see_a_key(tensors: tuple[Tensor, ...]) -> None:
    query, key, value = tensors
    key = key.clone()
    query[..., 0], key[:, :, 4, 0] = 3.0, 12.0  # every query that sees token 4 looks there
    data = seen((query, key, value), regard.Sinks(threshold=0.6)).dataset()
    share = matrix_of((query, key)).sum(2) / np.arange(TOKENS, 0, -1)
    np.testing.assert_allclose(data.sink_share[0], share, atol=1e-5)
    np.testing.assert_array_equal(data.sinks[0], share > 0.6)
    assert data.sinks[0].sel(key=4).all()


def test_mean_distance_and_topk(tensors: tuple[Tensor, ...]) -> None:
    data = seen(tensors, regard.MeanDistance(), regard.TopK(3)).dataset()
    matrix = matrix_of(tensors)
    distance = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
    np.testing.assert_allclose(data.mean_distance[0], (matrix * distance).sum(-1), atol=1e-5)
    order = np.argsort(-matrix, axis=-1)[..., :3]
    best = np.take_along_axis(matrix, order, axis=-1)
    visible = best > 0
    np.testing.assert_allclose(data.topk_share[0].values[visible], best[visible], atol=1e-6)
    np.testing.assert_array_equal(data.topk_key[0].values[visible], order[visible])
    assert np.isnan(data.topk_share[0].values[~visible]).all()


def test_pooled_and_rows(tensors: tuple[Tensor, ...]) -> None:
    data = seen(tensors, regard.Pooled(4), regard.Rows([0, 7])).dataset()
    matrix = matrix_of(tensors)
    blocks = np.add.reduceat(np.add.reduceat(matrix, [0, 4, 8], axis=2), [0, 4, 8], axis=3)
    np.testing.assert_allclose(data.pooled[0], blocks, atol=1e-5)
    assert data.pooled.attrs["size"] == 4
    np.testing.assert_allclose(data.rows[0], matrix[:, :, [0, 7]], atol=1e-6)


def test_blocks_may_have_another_side_in_keys(tensors: tuple[Tensor, ...]) -> None:
    pooled = seen(tensors, regard.Pooled(4, columns=5)).dataset().pooled[0]
    expected = np.add.reduceat(np.add.reduceat(matrix_of(tensors), [0, 4, 8], axis=-2), [0, 5, 10], axis=-1)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    assert (pooled.attrs["size"], pooled.attrs["columns"]) == (4, 5)


def test_grid_distance(tensors: tuple[Tensor, ...]) -> None:
    patches = torch.full((TOKENS, 2), torch.nan)  # a token first that is no patch, then two rows of five
    patches[1:] = torch.cartesian_prod(torch.arange(2.0), torch.arange(5.0))
    found = seen(tensors, regard.GridDistance(patches), causal=False).dataset().grid_distance[0]
    matrix, places = matrix_of(tensors, causal=False)[..., 1:, 1:], patches[1:].numpy()
    squares = ((places[:, None] - places[None]) ** 2).sum(-1)
    np.testing.assert_allclose(found[..., 1:], np.sqrt((matrix * squares).sum(-1) / matrix.sum(-1)), atol=1e-4)
    assert np.isnan(found[..., 0]).all()


def test_rows_are_chosen_by_slices_and_masks_too(tensors: tuple[Tensor, ...]) -> None:
    chosen = torch.arange(TOKENS) % 4 == 1
    data = [seen(tensors, regard.Rows(where)).dataset().rows[0] for where in (slice(2, 5), chosen)]
    matrix = matrix_of(tensors)
    np.testing.assert_allclose(data[0], matrix[:, :, 2:5], atol=1e-6)
    np.testing.assert_allclose(data[1], matrix[:, :, [1, 5, 9]], atol=1e-6)


def test_a_picture_leaves_out_padded_queries(tensors: tuple[Tensor, ...]) -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([[0], [3]])
    with regard.watch(regard.Pooled(4), token_mask=mask) as recording:
        F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    matrix = matrix_of(tensors) * mask[:, None, :, None].numpy()
    blocks = np.add.reduceat(np.add.reduceat(matrix, [0, 4, 8], axis=2), [0, 4, 8], axis=3)
    np.testing.assert_allclose(recording.dataset().pooled[0], blocks, atol=1e-5)
    with pytest.raises(ValueError, match=r"token_mask must be \(batch, tokens\), got shape \(11,\)"):
        regard.watch(regard.Pooled(4), token_mask=mask[0])


@pytest.mark.parametrize("heads", [[2], [3, 0]])
def test_chosen_heads_have_their_own_masks(tensors: tuple[Tensor, ...], heads: list[int]) -> None:
    bias = torch.randn(1, 4, TOKENS, TOKENS)
    with regard.watch(regard.Received(), heads=heads) as recording:
        F.scaled_dot_product_attention(*tensors, bias, enable_gqa=True)
    logits = tensors[0].double() @ tensors[1].double().repeat_interleave(2, 1).mT * 8**-0.5 + bias
    received = recording.dataset().received[0].sel(head=heads)
    np.testing.assert_allclose(received, logits.softmax(-1).sum(2)[:, heads], atol=1e-5)


def test_value_norm(tensors: tuple[Tensor, ...]) -> None:
    data = seen(tensors, regard.ValueNorm()).dataset()
    matrix, value = matrix_of(tensors), tensors[2].double().repeat_interleave(2, dim=1).numpy()
    np.testing.assert_allclose(data.value_norm[0], np.linalg.norm(matrix @ value, axis=-1), atol=1e-5)
    moved = matrix.sum(2) * np.linalg.norm(value, axis=-1)
    np.testing.assert_allclose(data.value_share[0], moved / moved.sum(-1, keepdims=True), atol=1e-6)


def test_statistic_of_ones_own(tensors: tuple[Tensor, ...]) -> None:
    class Extremes(regard.Statistic):
        """The largest share of each query, and of each key."""

        name, dims = "extremes", ("query",)

        def measure(self, attention: TokenMap, call: Call) -> Mapping[str, Tensor]:
            matrix = attention.dense()
            return {"of_query": matrix.amax(-1), "of_key": matrix.amax(-2)}

        def dimensions(self) -> Mapping[str, tuple[str, ...]]:
            return {"of_query": ("query",), "of_key": ("key",)}

    data = seen(tensors, Extremes()).dataset()
    np.testing.assert_allclose(data.of_query[0], matrix_of(tensors).max(-1), atol=1e-6)
    np.testing.assert_allclose(data.of_key[0], matrix_of(tensors).max(-2), atol=1e-6)


def test_recordings_are_saved_and_loaded(tensors: tuple[Tensor, ...], tmp_path: Path) -> None:
    recording = seen(tensors, regard.Entropy(), regard.Received(), regard.Mass({"a": 0, "b": [1, 2]}), regard.Pooled(4))
    tokens = [f"token{number}" for number in range(TOKENS)]
    recording.save(tmp_path / "seen.nc", tokens=tokens)
    loaded = regard.load(tmp_path / "seen.nc")
    expected = recording.dataset(tokens=tokens)
    assert loaded.query_token[1].values.tolist() == tokens
    assert loaded.entropy.attrs["units"] == "nats"
    for name, variable in expected.data_vars.items():
        np.testing.assert_array_equal(loaded[name], variable)
    assert loaded.layer.values.tolist() == expected.layer.values.tolist()


def test_tokens_must_fit(tensors: tuple[Tensor, ...]) -> None:
    recording = seen(tensors, regard.Entropy())
    rows = [["a", "b"], ["c"] * TOKENS]
    assert recording.dataset(tokens=rows).query_token.values.tolist() == [["a", "b", *[""] * (TOKENS - 2)], rows[1]]
    with pytest.raises(ValueError, match="2 tokens, the dataset 11 positions along 'query'"):
        recording.dataset(tokens=["a", "b"])
    with pytest.raises(ValueError, match="12 tokens, the dataset 11 positions along 'query'"):
        recording.dataset(tokens=["a"] * 12)
    with pytest.raises(ValueError, match="tokens has 3 rows, the dataset a batch of 2"):
        recording.dataset(tokens=[["a"], ["b"], ["c"]])


def test_a_tokenizer_labels_what_is_recorded(mini: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = mini
    inputs = tokenizer("It rained all day.", return_tensors="pt")
    with regard.watch(model, regard.Received(), tokenizer=tokenizer) as seen:
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
    read = tokenizer.convert_ids_to_tokens(written[:-1])  # the last one is never read
    assert seen.dataset().key_token[0].values.tolist() == read
    shown = [unescape(text) for text in seen.plot.tokens().data[0].text]
    assert shown[:7] == [tokenizer.decode(token).strip() for token in written[:7]]
    seen.save(tmp_path / "seen.nc")
    assert regard.load(tmp_path / "seen.nc").key_token.attrs["spelling"] == "byte-level"
    with regard.watch(model, regard.Received(), tokenizer=tokenizer) as twice, torch.no_grad():
        model(**inputs)
        model(inputs["input_ids"][:, :4])
    assert "key_token" not in twice.dataset().coords


def test_what_they_are_is_shown(mini: tuple[Any, Any]) -> None:
    model, tokenizer = mini
    statistics = (regard.Entropy(), regard.Received(queries=[-1]), regard.Sinks(0.5), regard.At("own", two_back=-2))
    said = "Entropy(), Received(queries=[-1]), Sinks(threshold=0.5), At(targets={'own': 'own', 'two_back': -2})"
    watched = regard.watch(model, *statistics)
    assert repr(watched) == f"watch(LlamaForCausalLM, {said})"
    with watched as seen, torch.no_grad():
        assert repr(seen) == f"Recording of nothing yet: {said}"
        model(tokenizer("It rained.", return_tensors="pt")["input_ids"])
    assert repr(seen) == f"Recording of 4 layers: {said}"
    assert repr(regard.watch(regard.Entropy())) == "watch(Entropy())"
    assert repr(regard.steer(None, regard.Gate(0))) == "steer(Gate(by=0))"


def test_words_that_netcdf_cannot_hold_are_read_back(tensors: tuple[Tensor, ...], tmp_path: Path) -> None:
    words = ["a\0b", "\ud800", "\udfffé", "\\x00", "\\", "\\\\ud800", "", "\n", "你", "\\u", "\0"]
    recording = seen(tensors, regard.Mass({"si\0nk": 0}))
    recording.save(tmp_path / "seen.nc", words)
    read, wanted = regard.load(tmp_path / "seen.nc"), recording.dataset(words)
    assert read.query_token.values.tolist() == [words, words]
    assert read.identical(wanted)
    plain = (words[2:3] + words[5:]) * 2
    recording.save(tmp_path / "plain.nc", [word.replace("\udfff", "").replace("\0", "") for word in plain[:TOKENS]])
    assert "escaped" not in regard.load(tmp_path / "plain.nc").query_token.attrs


def test_pictures_of_a_recording(tensors: tuple[Tensor, ...]) -> None:
    recording = seen(tensors, regard.Entropy(), regard.Received(), regard.Pooled(4))
    assert recording.plot.heads("entropy").data[0].z.shape == (1, 4)
    assert recording.plot.tokens().data
    assert recording.plot.map(0, 3).data[0].z.shape == (3, 3)


def test_ranks_that_no_query_has(tensors: tuple[Tensor, ...]) -> None:
    with pytest.raises(IndexError, match=r"TopK: k is 99, but no query saw more than 11 keys"):
        seen(tensors, regard.TopK(99)).dataset()


def test_a_folder_that_is_not_there(tensors: tuple[Tensor, ...], tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"cannot write {tmp_path}/no/seen.nc: there is no folder {tmp_path}/no"
    ):
        seen(tensors, regard.Entropy()).save(tmp_path / "no" / "seen.nc")


def test_arguments_that_make_no_sense() -> None:
    for error, message, make in (
        (ValueError, "mapping from names to keys", lambda: regard.Mass([0])),  # type: ignore[arg-type]
        (ValueError, "threshold between 0 and 1, got 2", lambda: regard.Sinks(threshold=2)),
        (ValueError, "k of at least 1, got 0", lambda: regard.TopK(0)),
        (ValueError, "at least 1 token, got 0", lambda: regard.Pooled(0)),
        (ValueError, r"at least 1 token, got \(4, 0\)", lambda: regard.Pooled(4, columns=0)),
        (
            ValueError,
            r"GridDistance needs patches of shape \(tokens, 2\), got \(5,\)",
            lambda: regard.GridDistance(torch.ones(5)),
        ),
        (ValueError, r"positions that can be counted", lambda: regard.Rows(slice(3, None))),
        (
            ValueError,
            "knows the targets previous, own, next, induction, repeated, retrieval, got 'last'",
            lambda: regard.At("last"),
        ),
        (ValueError, "needs a target", lambda: regard.At()),
    ):
        with pytest.raises(error, match=message):
            make()
