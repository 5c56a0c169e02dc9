"""Models of linear mixers: each is seen by its hidden map, and every statistic of it is that of the stored matrix."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.maps import TokenMap
from regard.mixers import (
    HiddenMap,
    SoftmaxAttention,
)
from regard.runtime import Call, looked_at
from tests.watch.mixers import (
    DIM,
    TOKENS,
    built,
    every_hidden_kind,
    every_kind,
    hybrid,
    largest,
    matrix_of,
    text,
    value_of,
)


@every_kind
def test_each_statistic_is_that_of_the_stored_matrix(kind: str) -> None:
    mixer, x = built(kind), text()
    targets = torch.randint(-1, TOKENS, (2, TOKENS))
    statistics = (
        regard.Received(), regard.Received(queries=[2, -1], name="some"), regard.Mass({"first": [0], "rest": slice(1, None)}),
        regard.At("previous", chosen=targets), regard.TopK(3), regard.MeanDistance(), regard.Pooled(4),
        regard.Rows([0, 7]), regard.ValueNorm(),
    )  # fmt: skip
    with torch.no_grad(), regard.watch(mixer, *statistics) as seen:
        y, _ = mixer(x)
        values = value_of(mixer, x)
    torch.testing.assert_close(y, mixer(x)[0])
    data, matrix = seen.dataset().isel(layer=0), matrix_of(mixer, x)
    assert seen.layers == [type(mixer).__name__]
    same = {"atol": 1e-12, "rtol": 1e-10}
    np.testing.assert_allclose(data.received, matrix.sum(2), **same)
    np.testing.assert_allclose(data.some, matrix[:, :, [2, -1]].sum(2), **same)
    np.testing.assert_allclose(data.mass, np.stack([matrix[..., 0], matrix[..., 1:].sum(-1)], -1), **same)
    np.testing.assert_allclose(data["at"][..., 1:, 0], np.diagonal(matrix, -1, 2, 3), **same)
    chosen = np.take_along_axis(matrix, targets.clamp(min=0).numpy()[:, None, :, None], axis=3)[..., 0]
    np.testing.assert_allclose(data["at"][..., 1], np.where(targets.numpy()[:, None] < 0, np.nan, chosen), **same)
    best, keys = largest(matrix, 3)
    np.testing.assert_allclose(data.topk_share, best, **same)
    np.testing.assert_array_equal(data.topk_key, keys)
    distance = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
    np.testing.assert_allclose(data.mean_distance, (matrix * distance).sum(-1), **same)
    blocks = np.add.reduceat(np.add.reduceat(matrix, [0, 4, 8], axis=2), [0, 4, 8], axis=3)
    np.testing.assert_allclose(data.pooled, blocks, **same)
    np.testing.assert_allclose(data["rows"], matrix[:, :, [0, 7]], **same)
    np.testing.assert_allclose(data.value_norm, np.linalg.norm(matrix @ values, axis=-1), **same)
    moved = matrix.sum(2) * np.linalg.norm(values, axis=-1)
    np.testing.assert_allclose(data.value_share, moved / moved.sum(-1, keepdims=True), **same)


@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_a_model_in_order(grad: bool) -> None:
    model, x = hybrid(), text()
    with torch.set_grad_enabled(grad):
        with regard.watch(model, regard.Received(), regard.TopK(2), keep_maps=True) as seen:
            watched_output = model(x)
        plain = model(x)
    torch.testing.assert_close(watched_output, plain, atol=1e-12, rtol=1e-10)
    assert seen.layers == [f"{number}.mixer" for number in range(4)]
    data = seen.dataset()
    for number, layer in enumerate(seen.layers):
        block = model[number]
        if number != 1:
            matrix = matrix_of(block.mixer, x.detach())
        else:
            matrix = block.mixer(x, x, x, average_attn_weights=False)[1].detach().numpy()
        heads = matrix.shape[1]
        np.testing.assert_allclose(data.received.sel(layer=layer)[:, :heads], matrix.sum(2), atol=1e-12)
        best = largest(matrix, 2)[0]
        np.testing.assert_allclose(data.topk_share.sel(layer=layer)[:, :heads], best, atol=1e-12)
        assert data.received.sel(layer=layer)[:, heads:].isnull().all()
        x = block(x)
        assert not (seen.maps[layer][0] @ torch.ones(1, 1, TOKENS, 1).double()).requires_grad
    assert [isinstance(maps[0], HiddenMap) for maps in seen.maps.values()] == [True, False, True, False]


def test_chosen_layers_and_heads() -> None:
    model, x = hybrid(), text()
    for layers, expected in ((2, [2]), ([0, 3], [0, 3]), ("2.*", [2]), (["0.mixer", 1], [0, 1])):
        with torch.no_grad(), regard.watch(model, regard.Received(), layers=layers) as seen:
            model(x)
        assert seen.layers == [f"{number}.mixer" for number in expected]
    heads = {0: [1], "2.mixer": [3, 0]}
    statistics = (regard.Received(), regard.Rows([4]), regard.ValueNorm(), regard.MeanDistance())
    with torch.no_grad(), regard.watch(model, *statistics) as whole:
        model(x)
    with torch.no_grad(), regard.watch(model, *statistics, heads=heads, layers=[0, 2]) as seen:
        model(x)
    every, some = whole.dataset(), seen.dataset()
    for layer, chosen in (("0.mixer", [1]), ("2.mixer", [0, 3])):
        for name in some.data_vars:
            found, wanted = (data[name].sel(layer=layer, head=chosen) for data in (some, every))
            assert not found.isnull().all()
            np.testing.assert_allclose(found, wanted, atol=1e-12, err_msg=f"{layer} {name}")
    message = "heads names head 2, but 0.mixer has 2 heads"
    with pytest.raises(IndexError, match=message), torch.no_grad(), regard.watch(model, regard.Received(), heads=2):
        model(x)


def test_edits_count_layers_as_statistics_do() -> None:
    model, x = hybrid(), text()
    with torch.no_grad():
        plain = model(x)
        with (
            regard.steer(model, regard.Block(keys=[0], layers=1)),
            regard.watch(model, regard.Mass({"a": [0]})) as seen,
        ):
            steered = model(x)
        assert not torch.allclose(steered, plain)
        assert (seen.dataset().mass.sel(layer="1.mixer")[:, :2, 1:] == 0).all()
        with regard.steer(model, regard.Block(keys=[0], layers=1)):
            torch.testing.assert_close(model(x), steered, atol=1e-12, rtol=1e-10)
        with (
            pytest.raises(IndexError, match="layer 0 was chosen"),
            regard.steer(model, regard.Temperature(2, layers=0)),
        ):
            torch.testing.assert_close(model(x), plain, atol=1e-12, rtol=1e-10)
        with regard.capture(model) as source:
            model(x)
    assert repr(source) == "capture of 1.mixer, 3.mixer"


@every_kind
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("told", [True, False], ids=["with token_mask", "without"])
def test_padding(kind: str, left: bool, told: bool) -> None:
    mixer, x = built(kind), text()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, slice(None, 4) if left else slice(-4, None)] = False
    x[~mask] = 7.0
    statistics = (regard.Received(), regard.TopK(1), regard.Rows([5]), regard.ValueNorm())
    token_mask = mask if told else None
    with torch.no_grad(), regard.watch(mixer, *statistics, token_mask=token_mask, keep_maps=True) as seen:
        mixer(x, mask=mask)
    data = seen.dataset().isel(layer=0)
    for row in range(2):
        real, alone = mask[row].numpy(), matrix_of(mixer, x[row : row + 1, mask[row]])[0]
        matrix = np.zeros((alone.shape[0], TOKENS, TOKENS))
        matrix[np.ix_(range(len(alone)), real, real)] = alone
        if told or "Softmax" not in kind:
            np.testing.assert_allclose(data.received[row], matrix.sum(1), atol=1e-12)
        if told:
            assert data.topk_share[row, :, ~real].isnull().all()
        np.testing.assert_allclose(data.topk_share[row, :, real, 0], largest(alone, 1)[0][..., 0], atol=1e-12)
        np.testing.assert_allclose(data["rows"][row, :, 0], matrix[:, 5], atol=1e-12)
        with torch.no_grad():
            own = value_of(mixer, x[row : row + 1, mask[row]])[0]
        values = np.zeros((len(alone), TOKENS, own.shape[-1]))
        values[:, real] = own
        norms = np.linalg.norm(matrix @ values, axis=-1)
        np.testing.assert_allclose(data.value_norm[row][:, real], norms[:, real], atol=1e-12)


@every_hidden_kind
def test_going_on_from_a_state_is_refused_where_the_map_tells_of_own_tokens_alone(kind: str) -> None:
    mixer, x = built(kind), text()
    model, state = nn.ModuleDict({"mixer": mixer}), mixer(x)[1]
    model.forward = lambda x, state: mixer(x, state)
    if kind == "AdaptiveFilterAttention":  # whose state, and so its map, is all tokens
        with torch.no_grad(), regard.watch(model, regard.MeanDistance(), regard.Received()) as seen:
            model(x, state)
        both = matrix_of(mixer, torch.cat([x, x], dim=1))[:, :, TOKENS:]
        np.testing.assert_allclose(seen.dataset().received[0], both.sum(2), atol=1e-12)
        distance = np.abs(TOKENS + np.arange(TOKENS)[:, None] - np.arange(2 * TOKENS))
        found = seen.dataset().mean_distance[0, ..., TOKENS:]
        np.testing.assert_allclose(found, (both * distance).sum(-1), atol=1e-12)
        return
    message = rf"mixer \({kind}\) goes on from a state, and its map tells of the 11 tokens of this call alone.*layers="
    with pytest.raises(ValueError, match=message), regard.watch(model, regard.Received()):
        model(x, state)
    with pytest.raises(ValueError, match="goes on from a state"), regard.watch(mixer, regard.Received()):
        mixer.decode(x[:, 0], state)
    model["other"] = SoftmaxAttention(DIM).double()
    model.forward = lambda x, state: model["other"](mixer(x, state)[0])
    with torch.no_grad(), regard.watch(model, regard.Received(), layers="other") as seen:
        model(x, state)
    assert seen.layers == ["other"]


@pytest.mark.parametrize("kind", ["SoftmaxAttention", "ChunkedSoftmaxAttention", "AdaptiveFilterAttention"])
def test_one_text_in_several_calls(kind: str) -> None:
    mixer, x = built(kind), text()
    with torch.no_grad(), regard.watch(mixer, regard.Received(), regard.MeanDistance()) as whole:
        mixer(x)
    with torch.no_grad(), regard.watch(mixer, regard.Received(), regard.MeanDistance()) as seen:
        _, state = mixer(x[:, :5])
        _, state = mixer(x[:, 5:9], state)
        for token in (9, 10):
            _, state = mixer.decode(x[:, token], state)
    for name in ("received", "mean_distance"):
        np.testing.assert_allclose(seen.dataset()[name], whole.dataset()[name], atol=1e-12)


@every_hidden_kind
@pytest.mark.parametrize("statistic", [regard.Entropy(), regard.Sinks()], ids=["Entropy", "Sinks"])
def test_statistics_of_probabilities_are_refused(kind: str, statistic: regard.Statistic) -> None:
    model, name = nn.Sequential(built(kind)), type(statistic).__name__
    message = rf"{name} of 0: HiddenMap\(.*\) has no (entropy|viewers): .*received, mass, pool, at.*with layers="
    with pytest.raises(NotImplementedError, match=message), regard.watch(model, statistic):
        model(text())
    assert not looked_at()


def test_softmax_in_tiles_has_every_statistic() -> None:
    mixer, x = built("ChunkedSoftmaxAttention"), text()
    with torch.no_grad(), regard.watch(mixer, regard.Entropy(), regard.Sinks()) as seen:
        mixer(x)
    matrix = matrix_of(mixer, x)
    entropy = -np.sum(matrix * np.log(np.where(matrix > 0, matrix, 1)), axis=-1)
    np.testing.assert_allclose(seen.dataset().entropy[0], entropy, atol=1e-12)
    np.testing.assert_allclose(seen.dataset().sink_share[0], matrix.sum(2) / np.arange(TOKENS, 0, -1), atol=1e-12)


def test_statistic_of_ones_own_reads_the_map_and_the_call() -> None:
    class Own(regard.Statistic):
        name, dims = "own", ("query",)

        def measure(self, attention: TokenMap, call: Call) -> Tensor:
            assert call.value.shape[2] == TOKENS
            assert not hasattr(call, "query")  # a mixer has none
            assert (call.place.path, call.place.query_start, call.place.key_start) == ("0", 0, 0)
            return attention.dense().diagonal(dim1=2, dim2=3)

    model, x = nn.Sequential(built("DeltaRule")), text()
    with regard.watch(model, Own()) as seen:
        model(x)
    np.testing.assert_allclose(seen.dataset().own[0], np.diagonal(matrix_of(model[0], x), 0, 2, 3), atol=1e-12)
