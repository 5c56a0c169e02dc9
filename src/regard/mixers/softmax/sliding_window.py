"""Sliding-window attention: softmax attention to the last few tokens, with a state of that many keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, check_heads, cut
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.value_mixer import ValueMixer

_SMALLEST_BLOCK = 16


class WindowState(NamedTuple):
    """The last W − 1 tokens: ``key`` (B, H, W−1, Dk) without positions, ``value`` (B, H, W−1, Dv), and ``real`` (B, W−1),
    false where a text is shorter than that."""

    key: Tensor
    value: Tensor
    real: Tensor


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    state: WindowState | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    rotary: float | None = None,
    form: Form = "chunked",
    chunk: int | None = None,
) -> tuple[Tensor, WindowState]:
    """``o_i = Σ_j softmax_j(scale · q_i·k_j) v_j`` over the tokens ``i − W < j ≤ i``, the query's own among them.

    Args:
        query, key: (B, H, N, Dk).
        value: (B, H, N, Dv).
        window: W, the keys that a query sees, its own among them.
        state: the tokens before the first.
        mask: (B, N), false for padding, which comes first in each text and is of zeros; its outputs mean nothing.
        scale: 1/√Dk by default.
        rotary: the base of rotary positions (10,000 in most models); none by default. Only distances matter to them, so
            that the state needs no positions.
        form: "parallel" a matrix of all pairs under a band, "chunked" blocks that see one another's ends, in linear time,
            "recurrent" token by token.
        chunk: tokens of a block; the window by default.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state after the last token, in the dtypes of keys and values.

    Raises:
        ValueError: shapes that do not fit, a window of no tokens, rotary positions for an odd head dimension.

    I. Beltagy, M. E. Peters and A. Cohan (2020), Longformer: The Long-Document Transformer; rotary positions, J. Su et al.
    (2021), RoFormer.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> chunked, state = sliding_window_attention(q, k, v, window=8)
    >>> distance = torch.arange(100)[:, None] - torch.arange(100)
    >>> band = (distance >= 0) & (distance < 8)
    >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band)
    >>> bool(torch.allclose(chunked, dense, atol=1e-5)), state.key.shape
    (True, torch.Size([1, 2, 7, 16]))
    """
    check_form(form)
    check_heads(query, key, value)
    check_window(window, query, mask)
    if rotary is not None and query.shape[3] % 2:
        raise ValueError(f"rotary positions need an even head dimension, got queries of {tuple(query.shape)}")
    before = _empty(key, value, window) if state is None else _checked(state, key, value, window)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if form != "recurrent":
        size = query.shape[2] if form == "parallel" else chunk or max(window, _SMALLEST_BLOCK)
        return _blocks(query, key, value, before, mask, scale, rotary, min(size, query.shape[2]))
    outputs = []
    for i in range(query.shape[2]):
        q, k, v = (tensor[:, :, i : i + 1] for tensor in (query, key, value))
        real = None if mask is None else mask[:, i : i + 1]
        output, before = _blocks(q, k, v, before, real, scale, rotary, 1)
        outputs.append(output)
    return torch.cat(outputs, dim=2), before


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: WindowState,
    mask: Tensor | None,
    scale: float,
    rotary: float | None,
    size: int,
) -> tuple[Tensor, WindowState]:
    """Each block of queries against its own keys and the W − 1 before them."""
    batch, heads, length, _ = query.shape
    window = before.key.shape[2] + 1
    keys, values, real = join(before.real, mask, (before.key, key), (before.value, value))
    after = WindowState(keys[:, :, length:], values[:, :, length:], real[:, length:])
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, keys, values))
    if rotary is not None:
        rates, places = rotary_rates(q.shape[3], rotary, q.device), torch.arange(k.shape[2], device=q.device)[None]
        q, k = rotate(q, places[:, window - 1 :], rates), rotate(k, places, rates)
    distance = distances(size, window, q.device)
    seen = windows(real[:, None, :, None], size, window).mT | (distance == 0)  # itself always, so that no row is empty
    hidden = ~seen | (distance < 0) | (distance >= window)
    scores = scale * cut(q, size) @ windows(k, size, window).mT
    output = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ windows(v, size, window)
    return output.reshape(batch, heads, -1, v.shape[3])[:, :, :length].to(value.dtype), after


def join(real: Tensor, mask: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Tokens of a state and new ones, (B, H, W−1 + N, D) each, and at the end which of them are real, (B, W−1 + N).

    Padding moves before the state's tokens: the state goes right before the first real token.
    """
    length = pairs[0][1].shape[2]
    new = real.new_ones(real.shape[0], length) if mask is None else mask
    flags = torch.cat([real, new], dim=1)
    tensors = [torch.cat(pair, dim=2) for pair in pairs]
    if mask is None:
        return [*tensors, flags]
    order = flags.long().argsort(dim=1, stable=True)
    index = order[:, None, :, None]
    return [*(tensor.gather(2, index.expand_as(tensor)) for tensor in tensors), flags.gather(1, order)]


def windows(tensor: Tensor, size: int, window: int) -> Tensor:
    """Of (B, H, W−1 + N, D), what each block of ``size`` tokens may see: (B, H, blocks, size + W−1, D)."""
    missing = -(tensor.shape[2] - window + 1) % size
    return functional.pad(tensor, (0, 0, 0, missing)).unfold(2, size + window - 1, size).mT


def distances(size: int, window: int, device: torch.device) -> Tensor:
    """How far each token that a block may see lies behind each of the block's own, (size, size + W−1)."""
    return torch.arange(window - 1, window - 1 + size, device=device)[:, None] - torch.arange(
        size + window - 1, device=device
    )


def slots(query: Tensor, key: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """A window as a system whose state is a slot for each of its tokens, the oldest first.

    The transition (W, W), which moves every slot's value to the one before; b (B, H, N, W), by which a value enters the last;
    and ``q_i·k_j`` of the tokens in the slots, (B, H, N, W), −∞ where the text has not begun.
    """
    shift = query.new_ones(window - 1).diag(1)
    newest = torch.eye(window).to(query)[-1]
    seen = windows(functional.pad(key, (0, 0, window - 1, 0)), 1, window)  # (B, H, N, W, D)
    scores = (seen @ query[..., None]).squeeze(-1)
    token, back = (torch.arange(size, device=query.device) for size in (query.shape[2], window))
    return shift, newest.expand_as(scores), scores.masked_fill(token[:, None] < back.flip(0), -torch.inf)


def check_window(window: int, query: Tensor, mask: Tensor | None) -> None:
    """Refuse a window of no tokens, and a mask of another shape."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    expected = (query.shape[0], query.shape[2])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != expected):
        raise ValueError(f"mask must be boolean, of shape {expected}, got {mask.dtype} {tuple(mask.shape)}")


def _empty(key: Tensor, value: Tensor, window: int) -> WindowState:
    batch, heads = key.shape[:2]
    keys, values = (tensor.new_zeros(batch, heads, window - 1, tensor.shape[3]) for tensor in (key, value))
    return WindowState(keys, values, torch.zeros(batch, window - 1, dtype=torch.bool, device=key.device))


def _checked(state: WindowState, key: Tensor, value: Tensor, window: int) -> WindowState:
    expected = tuple(tuple(tensor.shape) for tensor in _empty(key, value, window))
    found = tuple(tuple(tensor.shape) for tensor in state)
    if found != expected:
        raise ValueError(f"the state must be of shapes {expected} for a window of {window}, got {found}")
    return WindowState(*state)


class SlidingWindow(ValueMixer):
    """The layer: projections, rotary positions, softmax attention to the last ``window`` tokens.

    Its state is ``2 (window − 1) dim`` numbers and ``window − 1`` flags for each text.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        window: tokens that each sees, itself among them.
        rotary: the base of rotary positions, or None.

    I. Beltagy, M. E. Peters and A. Cohan (2020), Longformer: The Long-Document Transformer.

    >>> import torch
    >>> mixer = SlidingWindow(32, heads=4, window=8)
    >>> y, state = mixer(torch.randn(2, 20, 32))
    >>> y.shape, state.tensors["key"].shape
    (torch.Size([2, 20, 32]), torch.Size([2, 4, 7, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="I. Beltagy, M. E. Peters and A. Cohan (2020), Longformer: The Long-Document Transformer",
        formula="o_i = Σ_{i−W<j≤i} softmax_j(q_i·k_j / √d) v_j",
        time="O(N W D)",
        state="2 (W − 1) D",
    )

    def __init__(self, dim: int, heads: int = 4, window: int = 64, rotary: float | None = 10_000.0) -> None:
        super().__init__(dim)
        name = type(self).__name__
        check_divides(name, dim, heads)
        if window < 1:
            raise ValueError(f"{name}: window must be at least 1, got {window}")
        if rotary is not None:
            check_rotary(name, dim, heads)
        self.heads, self.window, self.rotary = heads, window, rotary
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = Linear(dim, dim, bias=False)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries, keys and values."""
        query, key, value = heads_of(x, self.heads, self.q_proj, self.k_proj, self.v_proj)
        return Projected(value, {"query": query, "key": key})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention to the window, turned by positions."""
        before = None if state is None else WindowState(state["key"], state["value"], state["real"])
        mixed, after = sliding_window_attention(
            projected["query"], projected["key"], projected.value, self.window, before, layout.mask, rotary=self.rotary
        )
        return mixed, after._asdict()

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The output's projection."""
        y: Tensor = self.o_proj(join_heads(mixed))
        return y

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count, with values of zero."""
        return {**state, "value": state["value"].new_zeros(*state["value"].shape[:3], width)}

    def system(self, x: Tensor) -> DynamicalSystem:
        """Λ moves W slots by one, b is the newest, c a softmax over the slots."""
        projected = self.project(x)
        query, key = projected["query"], projected["key"]
        if self.rotary is not None:
            rates = rotary_rates(query.shape[3], self.rotary, x.device)
            places = torch.arange(x.shape[1], device=x.device)[None]
            query, key = rotate(query, places, rates), rotate(key, places, rates)
        shift, newest, scores = slots(query * query.shape[3] ** -0.5, key, self.window)
        return DynamicalSystem(shift[None, None, None], newest, scores.softmax(-1))
