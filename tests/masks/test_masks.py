"""Every rule against its definition, pair by pair; its tiles; the algebra; FlexAttention's forms."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from regard import masks
from regard.masks import Mask

MANY = settings(max_examples=60, deadline=None, derandomize=True)
See = Callable[[int, int], bool]


def written_out(see: See, queries: int, keys: int) -> Tensor:
    return torch.tensor([[see(i, j) for j in range(keys)] for i in range(queries)])


def agrees(mask: Mask, see: See, queries: int, keys: int) -> None:
    assert torch.equal(mask.dense(1, 1, queries, keys)[0, 0], written_out(see, queries, keys)), mask


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
REACH = st.one_of(st.none(), st.integers(0, 20))


@MANY
@given(sizes=SIZES, left=REACH, right=REACH)
def test_window(sizes: tuple[int, int], left: int | None, right: int | None) -> None:
    def see(i: int, j: int) -> bool:
        return (left is None or j >= i - left) and (right is None or j <= i + right)

    agrees(masks.window(left, right), see, *sizes)


@MANY
@given(sizes=SIZES, length=st.integers(0, 40))
def test_causal_and_prefix(sizes: tuple[int, int], length: int) -> None:
    agrees(masks.causal(), lambda i, j: j <= i, *sizes)
    agrees(masks.prefix(length), lambda i, j: j < length or j <= i, *sizes)


@MANY
@given(sizes=SIZES, chosen=st.sets(st.integers(0, 45)).filter(bool))
def test_chosen_keys_and_queries(sizes: tuple[int, int], chosen: set[int]) -> None:
    agrees(masks.keys(sorted(chosen)), lambda i, j: j in chosen, *sizes)
    agrees(masks.queries(list(chosen)), lambda i, j: i in chosen, *sizes)


@MANY
@given(sizes=SIZES, stride=st.integers(1, 12), data=st.data())
def test_sparse_transformers(sizes: tuple[int, int], stride: int, data: st.DataObject) -> None:
    summary = data.draw(st.integers(1, stride))
    near = {i: set(range(max(0, i - stride), i + 1)) for i in range(40)}
    agrees(masks.strided(stride), lambda i, j: j <= i and (j in near[i] or (i - j) % stride == 0), *sizes)
    last = set(range(stride - summary, stride))
    agrees(
        masks.fixed(stride, summary), lambda i, j: j <= i and (j // stride == i // stride or j % stride in last), *sizes
    )


@MANY
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_documents(lengths: list[int]) -> None:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    for mask in (
        masks.documents(lengths),
        masks.documents(cu_seqlens=borders),
        masks.documents(ids=torch.tensor(ids)),
        masks.documents(ids=torch.tensor(ids)[None]),
    ):
        agrees(mask, lambda i, j: ids[i] == ids[j], len(ids), len(ids))


@MANY
@given(data=st.data())
def test_blocks(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, n)) for n in (2, 3, 4, 4))
    size = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) > 0.5
    queries, keys = shape[2] * size[0], shape[3] * size[1]
    expected = chosen.repeat_interleave(size[0], dim=2).repeat_interleave(size[1], dim=3)
    batch, heads = (2 if shape[0] == 1 else shape[0]), (3 if shape[1] == 1 else shape[1])
    dense = masks.blocks(chosen, size).dense(batch, heads, queries, keys)
    assert torch.equal(dense, expected.expand(batch, heads, -1, -1))


def neighbours(index: int, size: int, kernel: int, dilation: int, stride: int, is_causal: bool) -> set[int]:
    """The coordinates that a token sees along one dimension, by walking over its dilation group."""
    group = list(range(index % dilation, size, dilation))
    place = group.index(index)
    shared = range(place // stride * stride, place // stride * stride + stride)
    if is_causal:
        leader = min(shared[-1], len(group) - 1)
        return {group[p] for p in range(max(0, leader - kernel + 1), place + 1)}
    leader = min(shared[stride // 2], len(group) - 1)
    window = [leader - kernel // 2 + step for step in range(kernel)]
    while window[0] < 0:
        window = [p + 1 for p in window]
    while window[-1] >= len(group):
        window = [p - 1 for p in window]
    return {group[p] for p in window}


@st.composite
def grids(draw: st.DrawFn) -> list[tuple[int, int, int, int, bool]]:
    """Size, kernel, dilation, stride and causality of each dimension."""
    found = []
    for most in draw(st.sampled_from([(40,), (7, 9), (4, 5, 6)])):
        size = draw(st.integers(1, most))
        kernel = draw(st.integers(1, size))
        dilation = draw(st.integers(1, size // kernel))
        found.append((size, kernel, dilation, draw(st.integers(1, kernel)), draw(st.booleans())))
    return found


@MANY
@given(axes=grids())
def test_neighbourhood(axes: list[tuple[int, int, int, int, bool]]) -> None:
    sizes, kernel, dilation, stride, causal = zip(*axes, strict=True)
    places = list(itertools.product(*(range(size) for size in sizes)))

    def see(i: int, j: int) -> bool:
        return all(b in neighbours(a, *axis) for a, b, axis in zip(places[i], places[j], axes, strict=True))

    mask = masks.neighbourhood(sizes, kernel, dilation, stride, causal)
    agrees(mask, see, len(places), len(places))
    if not any(causal):
        seen = torch.tensor(kernel).prod()
        assert bool((mask.dense(1, 1, len(places), len(places)).sum(dim=-1) == seen).all())
    tiles_are_right(mask, 1, 1, len(places), len(places), (7, 5))


def test_blocked_attention_is_the_stride_of_the_kernel() -> None:
    """Of a length that the kernel divides."""
    blocked = masks.neighbourhood(24, kernel_size=4, stride=4)
    agrees(blocked, lambda i, j: i // 4 == j // 4, 24, 24)


def some_masks(tokens: int) -> list[Mask]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2, 3, tokens // 5 + 1, tokens // 3 + 1, generator=generator) > 0.5
    return [
        masks.causal(),
        masks.window(7, 2),
        masks.window(None, None),
        masks.prefix([3, 17]),
        masks.documents([5, tokens - 12, 0, 7]),
        masks.documents(ids=torch.randint(0, 4, (2, tokens), generator=generator)),
        masks.keys([0, 5, 6, 7, 13]),
        masks.queries(slice(2, 20, 3)),
        masks.strided(1),
        masks.strided(2),
        masks.strided(6),
        masks.fixed(6, 2),
        masks.fixed(3, 3),
        masks.blocks(chosen, (5, 3)),
        masks.neighbourhood((tokens // 6 + 1, 6), (3, 4), dilation=(2, 1), stride=(1, 2)),
        masks.neighbourhood(tokens, 9, stride=4),
        masks.from_mask_mod(lambda b, h, q, k: (q * 3 + k + h) % 4 > 1),
    ]


def tiles_are_right(mask: Mask, batch: int, heads: int, queries: int, keys: int, tile: tuple[int, int]) -> None:
    tiles, dense = mask.tiles(batch, heads, queries, keys, tile), mask.dense(batch, heads, queries, keys)
    rows = [dense[..., start : start + tile[0], :] for start in range(0, queries, tile[0])]
    parts = [[row[..., start : start + tile[1]] for start in range(0, keys, tile[1])] for row in rows]
    some = torch.stack([torch.stack([part.any(-1).any(-1) for part in row], -1) for row in parts], -2)
    every = torch.stack([torch.stack([part.all(-1).all(-1) for part in row], -1) for row in parts], -2)
    assert torch.equal(tiles.empty.expand_as(some), ~some), mask
    assert torch.equal(tiles.full.expand_as(every), every), mask
    assert torch.equal(tiles.partial.expand_as(some), some & ~every), mask


@pytest.mark.parametrize("sizes", [(40, 40), (33, 40), (40, 13), (1, 29)])
@pytest.mark.parametrize("tile", [(8, 8), (1, 1), (16, 3), (64, 64)])
def test_tiles_are_exact(sizes: tuple[int, int], tile: tuple[int, int]) -> None:
    for mask in some_masks(40):
        tiles_are_right(mask, 2, 3, *sizes, tile)


def test_what_structure_alone_says_of_tiles_is_never_wrong() -> None:
    """Before any pair is evaluated: what is called empty, full or certain is."""
    found = some_masks(40)
    for mask in [
        *found,
        *(a & ~b for a, b in itertools.pairwise(found)),
        *(a | b for a, b in itertools.pairwise(found)),
    ]:
        positions = torch.arange(40)
        tiling = masks.Tiling.of_call(2, 3, positions, positions, (8, 4))
        said, exact = mask.tiles_of(tiling), mask.tiles(2, 3, 40, 40, (8, 4))
        assert not (said.empty & exact.seen).any(), mask
        assert not (said.full & exact.hidden).any(), mask
        certain = said.certain.expand_as(exact.seen)
        assert torch.equal(said.seen.expand_as(certain)[certain], exact.seen[certain]), mask
        assert torch.equal(said.hidden.expand_as(certain)[certain], exact.hidden[certain]), mask


def test_structure_leaves_no_doubt_in_simple_masks() -> None:
    positions = torch.arange(64)
    tiling = masks.Tiling.of_call(1, 1, positions, positions, (8, 8))
    for mask in (
        masks.causal(),
        masks.window(9, 3),
        masks.strided(6),
        masks.fixed(6, 2),
        masks.prefix(9),
        masks.keys(slice(3, 20)),
        masks.queries([5, 60]),
        masks.documents([30, 34]),
        masks.neighbourhood(64, 9, stride=4),
    ):
        assert bool(mask.tiles_of(tiling).certain.all()), mask


def test_algebra() -> None:
    found = some_masks(30)
    for a, b in itertools.pairwise(found):
        left, right = a.dense(2, 3, 30, 30), b.dense(2, 3, 30, 30)
        assert torch.equal((a & b).dense(2, 3, 30, 30), left & right)
        assert torch.equal((a | b).dense(2, 3, 30, 30), left | right)
        assert torch.equal((~(a | b)).dense(2, 3, 30, 30), (~a & ~b).dense(2, 3, 30, 30))
        for mask in (a & b, a | b, ~a, ~(a & b)):
            tiles_are_right(mask, 2, 3, 30, 30, (8, 4))


def test_offsets_and_heads() -> None:
    for mask in some_masks(40):
        whole = mask.dense(2, 3, 40, 40)
        late = mask.offset(query_start=11, key_start=6)
        assert torch.equal(late.dense(2, 3, 20, 34), whole[:, :, 11:31, 6:]), mask
        tiles_are_right(late, 2, 3, 20, 34, (8, 4))
        chosen = mask.heads([2, 0])
        assert torch.equal(chosen.dense(2, 2, 40, 40), whole[:, [2, 0]]), mask
        tiles_are_right(chosen, 2, 2, 40, 40, (8, 4))


def test_mask_mods_and_block_masks_are_those_of_flex_attention() -> None:
    for mask in [*some_masks(300), masks.causal() & masks.window(70, 0), ~masks.causal()]:
        function = mask.mask_mod
        assert torch.equal(create_mask(function, 2, 3, 300, 280, device="cpu"), mask.dense(2, 3, 300, 280)), mask
        theirs, ours = create_block_mask(function, 2, 3, 300, 280, device="cpu"), mask.block_mask(2, 3, 300, 280)
        blocks = theirs.to_dense()
        assert torch.equal(ours.to_dense().expand_as(blocks), blocks), mask
        assert torch.equal(ours.full_kv_num_blocks.expand_as(theirs.full_kv_num_blocks), theirs.full_kv_num_blocks), (
            mask
        )
        assert ours.shape[2:] == theirs.shape[2:]
        for block_mask in (theirs, ours):
            again = masks.from_block_mask(block_mask).dense(2, 3, 300, 280)
            assert torch.equal(again, mask.dense(2, 3, 300, 280)), mask


def test_masks_are_readable() -> None:
    mask = (masks.causal() | masks.window(2, 2)) & ~masks.documents([4, 4])
    assert repr(mask) == "(causal() | window(left=2, right=2)) & ~documents([4, 4])"
    assert repr(masks.prefix([2, 3])) == "prefix([2, 3])"
    assert repr(masks.strided(4) & masks.fixed(4, 2)) == "strided(4) & fixed(4, summary=2)"
    assert repr(masks.blocks(torch.eye(2).bool()[None, None], 4)) == "blocks(2 of (1, 1, 2, 2), block_size=(4, 4))"
    assert repr(mask.heads([0, 2])) == f"({mask!r}).heads([0, 2])"
    assert repr((~mask).offset(3)) == f"(~({mask!r})).offset(query_start=3, key_start=0)"
    assert repr(masks.neighbourhood((4, 4), 3, stride=(1, 2))) == "neighbourhood((4, 4), (3, 3), stride=(1, 2))"


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("window: left is a number of tokens", lambda: masks.window(-1, 0)),
        ("pass one of lengths, ids and cu_seqlens", lambda: masks.documents()),
        ("no document has a token", lambda: masks.documents([0, 0])),
        (r"kernel_size · dilation is 5 · 2 along dimension 1", lambda: masks.neighbourhood((9, 9), 5, dilation=(1, 2))),
        (r"stride is from 1 to kernel_size \(3\)", lambda: masks.neighbourhood(9, 3, stride=4)),
        ("one value or one for each dimension", lambda: masks.neighbourhood((9, 9), (3, 3, 3))),
        ("keys of a rule are numbers that count from the text's begin", lambda: masks.keys([3, -1])),
        ("queries of a rule need a first and a last", lambda: masks.queries(slice(4, None))),
        ("keys of a rule must be the same for all texts", lambda: masks.keys(torch.ones(2, 4, dtype=torch.bool))),
        ("a length is 0 or more", lambda: masks.prefix(-1)),
        ("summary is from 1 to the stride", lambda: masks.fixed(4, 5)),
        ("chosen is boolean", lambda: masks.blocks(torch.ones(1, 1, 2, 2), 4)),
        ("positions count from 0", lambda: masks.causal().offset(-3)),
        ("takes 1024.0 GiB", lambda: masks.causal().dense(1, 1, 2**20, 2**20)),
        (
            r"a grid of \(3, 3\) has 9 tokens, but the call reaches 10",
            lambda: masks.neighbourhood((3, 3), 3).dense(1, 1, 10, 9),
        ),
        ("2 lengths, but a batch of 3", lambda: masks.prefix([1, 2]).dense(3, 1, 4, 4)),
        ("one to three dimensions of at least one token", lambda: masks.neighbourhood((4, 0), 1)),
        ("one number of tokens, or one of each batch element", lambda: masks.prefix(torch.ones(2, 2).long())),
        ("the stride is 1 or more, got 0", lambda: masks.strided(0)),
        (r"ids are integers.* got torch.float32 \(3,\)", lambda: masks.documents(ids=torch.rand(3))),
        (
            r"goes from 0 to the number of tokens; got \[1, 4\]",
            lambda: masks.documents(cu_seqlens=torch.tensor([1, 4])),
        ),
        ("lengths are numbers of tokens", lambda: masks.documents([3, -1])),
        (
            "ids of 2 batch elements, but a batch of 3",
            lambda: masks.documents(ids=torch.zeros(2, 4).long()).dense(3, 1, 4, 4),
        ),
        ("at least one query and one key, got 0", lambda: masks.blocks(torch.ones(1, 1, 2, 2).bool(), 0)),
        (
            r"do not broadcast to a batch of 2 and 4 heads",
            lambda: masks.blocks(torch.ones(1, 3, 2, 2).bool(), 4).dense(2, 4, 8, 8),
        ),
        ("one of 2 chosen heads, but the call has 3", lambda: masks.causal().heads([0, 2]).dense(1, 3, 4, 4)),
        ("cover 8 queries and 8 keys", lambda: masks.blocks(torch.ones(1, 1, 2, 2).bool(), 4).dense(1, 1, 9, 8)),
    ],
)
def test_what_is_refused(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_mod_that_is_not_boolean_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a mask_mod returns a boolean tensor.*returned torch\.int64"):
        masks.from_mask_mod(lambda b, h, q, k: q - k).dense(1, 1, 4, 4)
