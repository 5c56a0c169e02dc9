"""LongVQ: attention to vector-quantised keys, so that the past is as long as the codebook, and to a window beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, check_heads, cut
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._long_convolution import LongConvolution
from regard.mixers.linear.mega_gate import MegaGate
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads, split_heads
from regard.mixers.projected import Projected
from regard.mixers.softmax.sliding_window import check_window, distances, join, slots, windows
from regard.mixers.value_mixer import ValueMixer


class CodebookState(NamedTuple):
    """The last W − 1 tokens, and those before by their codes.

    ``key`` (B, H, W−1, Dk) quantised, ``code`` (B, H, W−1), ``value`` (B, H, W−1, Dv) and ``real`` (B, W−1), false
    where a text is shorter; ``counts`` (B, H, S), the earlier tokens of each code, and ``total`` (B, H, S, Dv), the sum of
    their values, both in float32 at least.
    """

    key: Tensor
    code: Tensor
    value: Tensor
    real: Tensor
    counts: Tensor
    total: Tensor


def quantise(key: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each key (B, H, N, Dk), and its number (B, H, N), from a codebook (H, S, Dk).

    The gradient goes straight through to the key, and to the codeword as well.

    >>> import torch
    >>> codebook = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    >>> quantise(torch.tensor([[[[0.9, 0.8], [0.1, -0.3]]]]), codebook)[1].tolist()
    [[[1, 0]]]
    """
    with torch.no_grad():
        code = (codebook.square().sum(-1)[:, None] - 2 * key @ codebook.mT).argmin(-1)
    return look_up(codebook, code) + (key - key.detach()), code


def look_up(codebook: Tensor, code: Tensor) -> Tensor:
    """Codewords (B, H, …, Dk) from their numbers (B, H, …)."""
    batch, heads, *rest = code.shape
    words = codebook.expand(batch, -1, -1, -1)
    index = code.reshape(batch, heads, -1, 1).expand(-1, -1, -1, codebook.shape[2])
    return words.gather(2, index).reshape(batch, heads, *rest, codebook.shape[2])


def codebook_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    bias: Tensor,
    state: CodebookState | None = None,
    mask: Tensor | None = None,
    *,
    form: Form = "chunked",
    chunk: int | None = None,
) -> tuple[Tensor, CodebookState]:
    """``o_i = Σ_{j≤i} softmax_j(q_i·k̂_j / √Dk + [i − j < W] b_{i−j}) v_j``, with k̂ the codeword nearest to k.

    Beyond the window a token counts by its code alone, so that the sum over all earlier tokens is one over S codewords:
    ``Σ_s n_s exp(q_i·C_s / √Dk) μ_s``, with n_s tokens of mean value μ_s. That is exact; only the keys are quantised.

    The codebook gets gradients from every score. Keys get theirs straight through the quantisation, and within the window
    only: beyond it they are no longer kept. The counts get none, and neither form differs in that.

    Args:
        query, key: (B, H, N, Dk), the keys before quantisation.
        value: (B, H, N, Dv).
        codebook: C, (H, S, Dk).
        bias: b, (H, W), of the distances from 0 to W − 1, which also says how wide the window is.
        state: the tokens before the first.
        mask: (B, N), false for padding, which comes first in each text; its outputs mean nothing.
        form: "parallel" a matrix of all pairs, "chunked" blocks, in linear time, "recurrent" token by token.
        chunk: tokens of a block; 64, or the window where that is larger, by default.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit.

    Z. Liu et al. (2024), LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory;
    the sum over codewords, L. D. Lingle (2024), Transformer-VQ: Linear-Time Transformers via Vector Quantization.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> y, state = codebook_attention(q, k, v, torch.randn(2, 16, 8), torch.zeros(2, 5))
    >>> y.shape, state.total.shape, int(state.counts[0, 0].sum())
    (torch.Size([1, 2, 50, 8]), torch.Size([1, 2, 16, 8]), 46)
    """
    check_form(form)
    check_heads(query, key, value)
    _check_codebook(query, codebook, bias)
    check_window(bias.shape[1], query, mask)
    dtype = torch.promote_types(value.dtype, torch.float32)
    before = _empty(key, value, codebook, bias)
    if state is not None:
        before = _checked(state, before)
    q, k, v, codebook, bias = (tensor.to(dtype) for tensor in (query, key, value, codebook, bias))
    quantised, code = quantise(k, codebook)
    length = q.shape[2]
    size = {"parallel": length, "chunked": chunk or max(bias.shape[1], 64), "recurrent": 1}[form]
    step = 1 if form == "recurrent" else length
    outputs = []
    for start in range(0, length, step):
        parts = (tensor[:, :, start : start + step] for tensor in (q, quantised, code, v))
        real = None if mask is None else mask[:, start : start + step]
        output, before = _blocks(_Tokens(*parts), codebook, bias, before, real, min(size, length))
        outputs.append(output)
    kept = before._replace(value=before.value.to(value.dtype), key=before.key.to(key.dtype))
    return torch.cat(outputs, dim=2).to(value.dtype), kept


class _Tokens(NamedTuple):
    query: Tensor
    key: Tensor
    code: Tensor
    value: Tensor


def _blocks(
    tokens: _Tokens, codebook: Tensor, bias: Tensor, before: CodebookState, mask: Tensor | None, size: int
) -> tuple[Tensor, CodebookState]:
    """Each block of queries against its own tokens, the W − 1 before them, and the codewords of all earlier ones."""
    length, window = tokens.query.shape[2], bias.shape[1]
    code = (before.code[..., None], tokens.code[..., None])
    keys, codes, values, real = join(
        before.real, mask, (before.key.to(bias), tokens.key), code, (before.value.to(bias), tokens.value)
    )
    # One more row than blocks: what has left the window before each block, and after the last.
    count, total = _left(codes[:, :, :length], values[:, :, :length], real[:, :length], before, size)
    query = cut(tokens.query, size) * tokens.query.shape[3] ** -0.5
    inside = _inside(query, keys, codes, real, codebook, bias)
    earlier = query @ codebook[:, None].mT + count[:, :, :-1, None].log()
    weights, of_codes = (
        torch.cat([inside, earlier], dim=-1).softmax(-1).split([inside.shape[-1], codebook.shape[1]], -1)
    )
    means = total[:, :, :-1] / count[:, :, :-1, :, None].clamp(min=1)
    output = (weights @ windows(values, size, window) + of_codes @ means).flatten(2, 3)[:, :, :length]
    last = (keys[:, :, length:], codes[:, :, length:, 0], values[:, :, length:], real[:, length:])
    return output, CodebookState(*last, count[:, :, -1], total[:, :, -1])


def _left(codes: Tensor, values: Tensor, real: Tensor, before: CodebookState, size: int) -> tuple[Tensor, Tensor]:
    """Tokens of each code (B, H, blocks + 1, S), and the sums of their values (B, H, blocks + 1, S, Dv)."""
    chosen = functional.one_hot(codes[..., 0], before.counts.shape[2]) * real[:, None, :, None]
    member = cut(chosen.to(values), size)
    count = torch.cat([before.counts[:, :, None].to(values), member.sum(3)], dim=2).cumsum(2)
    total = torch.cat([before.total[:, :, None].to(values), member.mT @ cut(values, size)], dim=2).cumsum(2)
    return count.detach(), total


def _inside(query: Tensor, keys: Tensor, codes: Tensor, real: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """Scores of the tokens that a block sees one by one, (B, H, blocks, size, size + W−1)."""
    size, window = query.shape[3], bias.shape[1]
    distance = distances(size, window, query.device)
    near = query @ windows(keys, size, window).mT + bias[:, None, distance.clamp(0, window - 1)]
    # Of one value with q·k̂, but a token that has left the window has no more gradient for its key, whatever the blocks.
    far = query @ windows(look_up(codebook, codes[..., 0]), size, window).mT
    scores = torch.where(distance < window, near, far)
    seen = windows(real[:, None, :, None], size, window).mT | (distance == 0)  # itself always: no row is empty
    return scores.masked_fill(~seen | (distance < 0), -torch.inf)


def _check_codebook(query: Tensor, codebook: Tensor, bias: Tensor) -> None:
    heads, width = query.shape[1], query.shape[3]
    if codebook.ndim != 3 or codebook.shape[::2] != (heads, width) or not codebook.shape[1]:
        raise ValueError(
            f"the codebook must be ({heads}, codes, {width}) for queries of {tuple(query.shape)}, "
            f"got {tuple(codebook.shape)}"
        )
    if bias.ndim != 2 or len(bias) != heads:
        raise ValueError(f"the bias must be ({heads}, window), got {tuple(bias.shape)}")


def _empty(key: Tensor, value: Tensor, codebook: Tensor, bias: Tensor) -> CodebookState:
    batch, heads = key.shape[:2]
    last, codes = bias.shape[1] - 1, codebook.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    return CodebookState(
        key.new_zeros(batch, heads, last, key.shape[3]),
        key.new_zeros(batch, heads, last, dtype=torch.long),
        value.new_zeros(batch, heads, last, value.shape[3]),
        key.new_zeros(batch, last, dtype=torch.bool),
        value.new_zeros(batch, heads, codes, dtype=dtype),
        value.new_zeros(batch, heads, codes, value.shape[3], dtype=dtype),
    )


def _checked(state: CodebookState, empty: CodebookState) -> CodebookState:
    for name, tensor, like in zip(CodebookState._fields, state, empty, strict=True):
        if tensor.shape != like.shape:
            raise ValueError(f"the state's {name} must be of shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    return CodebookState(*state)


class LongVQ(ValueMixer):
    """The layer: a moving average of the tokens, `codebook_attention` with queries and keys from it, gates from it.

    Quantised keys, a learned codebook, straight-through gradients, a window with a bias of distance, and a
    state-space part before the attention are the paper's, as its summaries have them. The rest is chosen here:
    ``z = SiLU(LongConvolution(x))``, the moving average of Mega; ``q, k = RMSnorm(W z)`` without gains; values
    ``SiLU(W x)`` of the layer's input; one softmax over window and codewords, as in Transformer-VQ, whose keys are quantised
    in the window too; `MegaGate`; and a codebook that is a parameter and learns by its gradients, from the attention
    and from `commitment`, where Transformer-VQ keeps a running mean.

    Its state is, for each text, ``codes (dim + heads) + 2 (window − 1) dim + exponentials dim`` numbers,
    ``(window − 1) heads`` integers and ``window − 1`` flags.

    Args:
        dim: of the tokens.
        heads: that divide it.
        codes: S, codewords of each head.
        window: tokens whose distance each token knows, itself among them.
        exponentials: of the moving average, for each channel.
        cost: of keys far from their codewords, in `commitment`, beside that of codewords far from their keys.

    Z. Liu et al. (2024), LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory.

    >>> import torch
    >>> mixer, x = LongVQ(32, heads=4, codes=16, window=8), torch.randn(2, 40, 32)
    >>> y, state = mixer(x)
    >>> y.shape, state.tensors["total"].shape
    (torch.Size([2, 40, 32]), torch.Size([2, 4, 16, 8]))
    >>> loss = y.square().mean() + 0.1 * mixer.commitment
    >>> loss.backward()
    """

    facts: ClassVar[Facts] = Facts(
        paper="Z. Liu et al. (2024), LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory, IJCAI, "
        "arXiv 2404.11163",
        formula="o_i = Σ_{j≤i} softmax_j(q_i·k̂_j / √d + [i−j<W] b_{i−j}) v_j,  k̂ = the codeword nearest to k",
        time="O(N (S + W) D)",
        state="S (D + H) + (W − 1) (2D + H) + M D",
    )

    commitment: Tensor | None
    """Of the last call: the mean over real tokens and heads of ``‖sg k − C‖² + cost ‖k − sg C‖²``, to add to the loss, with a
    small weight, where codewords ought to follow the keys. It has a graph while gradients are on, and tells of the last
    piece alone where a long text is read without; copies drop it."""

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        codes: int = 64,
        window: int = 32,
        exponentials: int = 8,
        cost: float = 0.25,
    ) -> None:
        super().__init__(dim)
        name = type(self).__name__
        check_divides(name, dim, heads)
        for what, number in (("codes", codes), ("window", window)):
            if number < 1:
                raise ValueError(f"{name}: {what} must be at least 1, got {number}")
        self.heads, self.cost = heads, cost
        self.average = LongConvolution(dim, exponentials)
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.codebook = Parameter(torch.randn(heads, codes, dim // heads))  # as long as the keys, which are normed
        self.bias = Parameter(torch.zeros(heads, window))
        self.gate = MegaGate(dim)
        self.commitment = None

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries and keys of the moving average, normed, values of the tokens; and how far keys are from codewords."""
        convolved, average = self.average(x, None if state is None else state["average"], layout.mask)
        convolved = functional.silu(convolved)
        query, key = heads_of(convolved, self.heads, self.q_proj, self.k_proj)
        width = query.shape[3:]
        query, key = (functional.rms_norm(part, width, eps=1e-5) for part in (query, key))
        value = split_heads(functional.silu(self.v_proj(x)), self.heads)
        parts = {"query": query, "key": key, "convolved": convolved, "commitment": self._commitment(key, layout.mask)}
        return Projected(value, parts, {"average": average})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention to the window and to the codewords."""
        before = None if state is None else _from_mapping(state)
        mixed, after = codebook_attention(
            projected["query"], projected["key"], projected.value, self.codebook, self.bias, before, layout.mask
        )
        return mixed, after._asdict()

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The gate of the moving average; the call's commitment is kept for the loss."""
        self.commitment = projected["commitment"]
        y: Tensor = self.gate(projected["convolved"], join_heads(mixed))
        return y

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count, with values of zero."""
        none = {name: state[name].new_zeros(*state[name].shape[:3], width) for name in ("value", "total")}
        return {**state, **none}

    def system(self, x: Tensor) -> DynamicalSystem:
        """Λ moves W slots by one, and what leaves them to its code's sum; b is the newest slot, c a softmax.

        It is over slots and sums, and counts a sum once for each token in it.
        """
        projected = self.project(x)
        query, key = projected["query"], projected["key"]
        key, code = quantise(key, self.codebook)
        query, window, codes = query * query.shape[3] ** -0.5, self.bias.shape[1], self.codebook.shape[1]
        shift, newest, near = slots(query, key, window)
        leaving = functional.pad(functional.one_hot(code, codes), (0, 0, window, 0))[:, :, : x.shape[1]].to(near)
        count = leaving.cumsum(2)
        near, far = near + self.bias.flip(-1)[:, None], (query @ self.codebook.mT).masked_fill(count == 0, -torch.inf)
        total = torch.cat([near, far + count.log()], dim=-1).logsumexp(-1, keepdim=True)
        transition = torch.block_diag(shift, torch.eye(codes).to(shift)).repeat(*leaving.shape[:3], 1, 1)
        transition[..., window:, 0] = leaving
        into, out = functional.pad(newest, (0, codes)), (torch.cat([near, far], dim=-1) - total).exp()
        return DynamicalSystem(transition, into, out)

    def _commitment(self, key: Tensor, mask: Tensor | None) -> Tensor:
        word = look_up(self.codebook, quantise(key.detach(), self.codebook)[1])
        apart = (key.detach() - word).square().sum(-1) + self.cost * (key - word.detach()).square().sum(-1)
        return apart.mean() if mask is None else apart.mT[mask].sum() / (mask.sum().clamp(min=1) * self.heads)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last call's commitment: a tensor with a graph can be neither copied nor pickled."""
        return self.__dict__ | {"commitment": None}


def _from_mapping(state: Mapping[str, Tensor]) -> CodebookState:
    return CodebookState(*(state[name] for name in CodebookState._fields))
