"""Every edit, alone and together, against the stored matrix in float64."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import regard
from regard import masks
from regard.steer import Edit
from tests.steer.reference import dense

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-3, torch.float16: 5e-3}

KINDS = (
    "reweight", "remove", "factor", "block", "bias", "temperature", "gate", "uniform", "value", "output", "patch output",
    "patch map", "restrict", "redistribute",
)  # fmt: skip


def positions(length: int) -> st.SearchStrategy[object]:
    index = st.integers(-length, length - 1)
    return st.one_of(
        index,
        st.lists(index, min_size=1, max_size=min(4, 2 * length), unique=True),
        st.slices(length).filter(lambda s: len(range(length)[s]) > 0),
        st.lists(st.booleans(), min_size=length, max_size=length).filter(any).map(torch.tensor),
    )


def strengths(heads: int, numbers: st.SearchStrategy[float]) -> st.SearchStrategy[object]:
    """A number, or several."""
    one_each = st.lists(numbers, min_size=heads, max_size=heads)
    return st.one_of(numbers, numbers, one_each, one_each.map(torch.tensor), numbers.map(torch.tensor))


@st.composite
def edits(
    draw: st.DrawFn,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    source: regard.capture,
    kinds: Sequence[str] = KINDS,
) -> Edit:
    chosen = draw(st.none() | st.lists(st.integers(0, heads - 1), min_size=1, max_size=heads, unique=True))
    rows = draw(st.none() | positions(queries))
    number = strengths(heads, st.floats(0.05, 8))
    shape = draw(st.sampled_from([(width,), (heads, width)]))
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(heads))
    match draw(st.sampled_from(kinds if keys > 1 else kinds[:-1])):
        case "reweight":
            return regard.Reweight(draw(positions(keys)), draw(number), rows, heads=chosen)
        case "remove":
            return regard.Reweight(draw(positions(keys)), 0, rows, heads=chosen)
        case "factor":
            return regard.Reweight(
                draw(positions(keys)), draw(strengths(heads, st.floats(0, 3))), rows, renormalize=False, heads=chosen
            )
        case "block":
            return regard.Block(draw(positions(keys)), rows, heads=chosen)
        case "bias":
            return regard.Bias(draw(positions(keys)), draw(strengths(heads, st.floats(-5, 5))), rows, heads=chosen)
        case "temperature":
            return regard.Temperature(draw(strengths(heads, st.floats(0.5, 3))), rows, heads=chosen)
        case "gate":
            return regard.Gate(draw(strengths(heads, st.floats(-2, 2))), rows, heads=chosen)
        case "restrict":
            rule = draw(
                st.sampled_from(
                    [masks.window(2, 0), masks.window(0, 1) | masks.keys([0]), masks.strided(2), ~masks.prefix(1)]
                )
            )
            return regard.Restrict(rule, heads=chosen)
        case "redistribute":
            share = st.floats(0, 1) | strengths(heads, st.floats(0, 0.99))
            cut = draw(st.integers(1, keys - 1))
            return regard.Redistribute(slice(0, cut), range(cut, keys), draw(share), rows, heads=chosen)
        case "value":
            return regard.AddToValue(direction, draw(st.none() | positions(keys)), heads=chosen)
        case "output":
            return regard.AddToOutput(direction.tolist(), rows, heads=chosen)
        case "patch output":
            return regard.PatchOutput(source, rows, heads=chosen)
        case "patch map":
            return regard.PatchMap(source, rows, heads=chosen)
    return regard.ReplaceMap("uniform", rows, heads=chosen)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[Edit]]:
    batch, key_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, width = draw(st.sampled_from([1, 3, 8, 9, 20])), draw(st.sampled_from([4, 8, 13, 32]))
    kind = draw(st.sampled_from(["none", "causal", "boolean", "additive"]))
    keys = queries if kind == "causal" else draw(st.sampled_from([1, 5, 17, 24]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    heads = key_heads * groups
    shapes = {"query": (heads, queries), "key": (key_heads, keys), "value": (key_heads, keys)}
    tensors: dict[str, Any] = {
        name: torch.randn(batch, *shape, width, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    if kind == "boolean":
        tensors["attn_mask"] = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    if kind == "additive":
        tensors["attn_mask"] = torch.randn(batch, 1, queries, keys, generator=generator).to(dtype)
    tensors |= {"is_causal": kind == "causal", "enable_gqa": groups > 1}
    other = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in tensors.items()
        if name in shapes
    }
    with regard.capture(None, outputs=True, maps=True) as source:
        functional.scaled_dot_product_attention(**(tensors | other))
    kinds = tuple(
        name for name in KINDS if name != "patch map" or kind != "additive"
    )  # a temperature changes such a mask
    drawn = edits(heads, queries, keys, width, source, kinds)
    made = draw(st.lists(drawn, min_size=1, max_size=4))
    # Part of a map cannot be patched by one under another mask, so the rules come last.
    return tensors, sorted(made, key=lambda edit: isinstance(edit, regard.Restrict))


def reference(tensors: dict[str, Any], made: list[Edit]) -> tuple[Tensor, Tensor]:
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    return dense(q, k, v, tensors.get("attn_mask"), tensors["is_causal"], made)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_edits_are_exact(case: tuple[dict[str, Any], list[Edit]]) -> None:
    tensors, made = case
    matrix, output = reference(tensors, made)
    dtype = tensors["query"].dtype
    with regard.steer(None, *made), regard.watch(None, keep_maps=True) as seen:
        steered = functional.scaled_dot_product_attention(**tensors)
    tolerance = TOLERANCE[dtype]
    scale = max(1.0, float(output.abs().max()))
    torch.testing.assert_close(steered.double(), output, atol=tolerance * scale, rtol=tolerance)
    (maps,) = seen.maps.values()
    torch.testing.assert_close(maps[0].dense().double(), matrix, atol=tolerance, rtol=0)
    torch.testing.assert_close(maps[0].received().double(), matrix.sum(-2), atol=10 * tolerance, rtol=tolerance)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_blocks_nest_as_edits_follow_one_another(case: tuple[dict[str, Any], list[Edit]]) -> None:
    tensors, made = case
    with regard.steer(None, *made):
        together = functional.scaled_dot_product_attention(**tensors)
    with regard.steer(None, *made[:1]), regard.steer(None, *(made[1:] or [regard.Gate(1.0)])):
        nested = functional.scaled_dot_product_attention(**tensors)
    torch.testing.assert_close(nested, together, atol=1e-5, rtol=1e-5)


def attend(tensors: tuple[Tensor, ...], *made: Edit, **arguments: object) -> Tensor:
    with regard.steer(None, *made):
        return functional.scaled_dot_product_attention(*tensors, **arguments)


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 2, 4, 20, 16, generator=torch.Generator().manual_seed(0)).unbind())


def test_identity_is_the_value_of_the_query_itself(tensors: tuple[Tensor, ...]) -> None:
    output = attend(tensors, regard.ReplaceMap("identity", heads=[1]), is_causal=True)
    plain = functional.scaled_dot_product_attention(*tensors, is_causal=True)
    torch.testing.assert_close(output[:, 1], tensors[2][:, 1])
    torch.testing.assert_close(output[:, [0, 2, 3]], plain[:, [0, 2, 3]])


def test_identity_needs_self_attention(tensors: tuple[Tensor, ...]) -> None:
    query, key, value = tensors
    with pytest.raises(ValueError, match="20 queries from position 0 on and 5 keys"):
        attend((query, key[:, :, :5], value[:, :, :5]), regard.ReplaceMap("identity"))


@pytest.mark.parametrize("queries", [20, 3])
def test_directions(tensors: tuple[Tensor, ...], queries: int) -> None:
    query, key, value = tensors
    query = query[:, :, :queries]
    by_query, by_key = torch.randn(16), torch.randn(4, 16)
    output = attend(
        (query, key[:, :2], value[:, :2]),
        regard.AddToKey(by_key, keys=[2, 3], heads=[0, 3]),
        regard.AddToQuery(by_query.tolist(), queries=[1]),
        enable_gqa=True,
    )
    longer_key, longer_query = key[:, :2].repeat_interleave(2, 1).clone(), query.clone()
    for head in (0, 3):
        longer_key[:, head, 2:4] += by_key[head]
    longer_query[:, :, 1] += by_query
    wanted = functional.scaled_dot_product_attention(longer_query, longer_key, value[:, :2].repeat_interleave(2, 1))
    torch.testing.assert_close(output, wanted)


def test_custom(tensors: tuple[Tensor, ...]) -> None:
    double = regard.Custom(lambda call, heads: dataclasses.replace(call, query=2 * call.query))
    torch.testing.assert_close(attend(tensors, double), attend(tensors, regard.Temperature(0.5)))


def test_masks_by_batch_row(tensors: tuple[Tensor, ...]) -> None:
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 3], mask[1, 7:9] = True, True
    output = attend(tensors, regard.Reweight(mask, 5))
    for row, keys in enumerate(([3], [7, 8])):
        alone = tuple(tensor[row : row + 1] for tensor in tensors)
        torch.testing.assert_close(output[row : row + 1], attend(alone, regard.Reweight(keys, 5)))


def test_gradients_reach_the_model(tensors: tuple[Tensor, ...]) -> None:
    query, key, value = (tensor.double().requires_grad_() for tensor in tensors)
    made = (regard.Reweight([0, 4], 3, heads=[1]), regard.Block([2], queries=[5]), regard.Gate(0.5))

    def steered(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend((query, key, value), *made)

    small = tuple(tensor[:1, :2, :10, :3] for tensor in (query, key, value))
    assert torch.autograd.gradcheck(steered, small)


def test_no_matrix_is_made() -> None:
    q, k, v = torch.randn(3, 1, 2, 4096, 16)
    made = (regard.Reweight(0, 2), regard.Block([5], queries=slice(9, None)), regard.Redistribute(0, slice(9, 99), 0.5))
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                r.numel() for r in (result if isinstance(result, tuple) else [result]) if isinstance(r, Tensor)
            )
            return result

    with Sizes():
        attend((q, k, v), *made, is_causal=True)
    assert max(sizes) < 4096 * 4096 / 8


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: regard.Reweight(0, -1), ValueError, r"Reweight needs by to be a finite number of at least 0, got -1"),
        (lambda: regard.Reweight(0, float("nan")), ValueError, r"got nan"),
        (lambda: regard.Bias(0, float("inf")), ValueError, r"Bias needs by to be a finite number, got inf"),
        (lambda: regard.Temperature(0), ValueError, r"greater than 0; to attend to one key only, Block the others"),
        (lambda: regard.Gate("x"), ValueError, r"Gate needs by to be a finite number, got 'x'"),
        (lambda: regard.Redistribute(0, 1, 1.5), ValueError, r"share to be a number from 0 to 1, got 1.5"),
        (lambda: regard.ReplaceMap("zero"), ValueError, r'"identity" and "uniform", got \'zero\''),
    ],
)
def test_bad_edits(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (
            regard.Reweight([3, 99], 2),
            IndexError,
            r"Reweight\(keys=\[3, 99\], by=2\): keys names position 99, but 20 tokens",
        ),
        (regard.Reweight(slice(50, 60), 2), ValueError, r"keys select none of the 20 tokens"),
        (regard.Block(0, queries=torch.zeros(20, dtype=torch.bool)), ValueError, r"queries select none"),
        (regard.Gate(0, layers=3), IndexError, r"layer 3 was chosen, but 1 attention calls were seen"),
        (regard.Gate(0, layers="decoder.*"), ValueError, r"'decoder.\*' matches no attention call"),
        (regard.Gate(0, heads=9), IndexError, r"head 9, but .* has 4 heads"),
        (regard.AddToQuery([1.0]), ValueError, r"direction of shape \(16,\) or \(4, 16\) for .*, got \(1,\)"),
        (regard.Redistribute([1, 2], [2]), ValueError, r"source and target share 1 keys"),
        (regard.Reweight(lambda ids: ids == 1, 2), ValueError, r"the model was not given them as input_ids"),
        (regard.Custom(cast(Any, lambda call, heads: None)), TypeError, r"must return an AttentionCall, got NoneType"),
        (
            regard.Reweight(torch.zeros(3, 20, dtype=torch.bool), 2),
            ValueError,
            r"keys is a mask for 3 texts, .* but the batch is 2",
        ),
    ],
)
def test_errors(tensors: tuple[Tensor, ...], made: Edit, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(tensors, made)


def test_what_steer_refuses() -> None:
    with pytest.raises(ValueError, match="steer has nothing to do"):
        regard.steer(None)
    with pytest.raises(TypeError, match=r"got <class .*Gate'>\(…\)"):
        regard.steer(None, regard.Gate)
    with pytest.raises(ValueError, match="Custom needs a function, in Python, got 'x'"):
        regard.parse_edit('Custom(function="x")')
    with pytest.raises(TypeError, match=r"needs an nn\.Module"):
        regard.steer("gpt2", regard.Gate(0))
    with pytest.raises(RuntimeError, match="no attention call was seen"), regard.steer(None, regard.Gate(0)):
        pass
