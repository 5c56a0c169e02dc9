"""Linear attention with decay: the recurrence on which most mechanisms of this folder stand.

S_i = diag(exp g_i) S_{i−1} + k_i v_iᵀ,    o_i = S_iᵀ q_i,    g_i ≤ 0
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from regard.mixers.forms import Form, check_form, check_heads, cut, initial_state
from regard.mixers.linear import _fla_kernels

CHUNK = 64
_PIECE = 512  # tokens whose chunks are computed together where no gradients are wanted: they stay in the cache


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    causal: bool = True,
    form: Form = "chunked",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``o_i = Σ_{j≤i} (q_i · exp(G_i − G_j) k_j) v_j``, with G the running sum of the log decays.

    On a GPU where flash-linear-attention is installed, the chunked form of values in half precision with a decay for each
    channel is its Triton kernel, whose gradients have none of their own, unless `chunk` is given.

    Args:
        query, key: (B, H, N, Dk), keys and values of any other number of tokens where nothing is causal and there is no
            decay; feature maps and scales are the caller's.
        value: (B, H, N, Dv).
        log_decay: at most 0; (H,) a constant of each head, (B, H, N) one for each token, (B, H, N, Dk) one for each channel;
            None for none.
        state: S before the first token, (B, H, Dk, Dv); zeros by default.
        causal: else each token sees all, as far as the decay between them reaches: ``exp(−|G_i − G_j|)``.
        form: "parallel" the quadratic reference, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens of a chunk, by default 64, 16 with a decay for each channel, or the kernel's own.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and S after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit; a state where nothing is causal.

    A. Katharopoulos et al. (2020), Transformers are RNNs; with decay, Y. Sun et al. (2023), Retentive Network.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> decay = torch.tensor([-0.1, -0.01])
    >>> chunked, state = linear_attention(q, k, v, decay)
    >>> parallel, _ = linear_attention(q, k, v, decay, form="parallel")
    >>> bool(torch.allclose(chunked, parallel, atol=1e-3))
    True
    """
    check_form(form)
    check_heads(query, key, value, cross=not causal and log_decay is None)
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    if not causal:
        output, after = _both_ways(q, k, v, log_decay, state, form, chunk)
        return output.to(value.dtype), after
    decay = _spread(log_decay, q)
    before = initial_state(state, q, v)
    if form == "chunked" and chunk is None and log_decay is not None and log_decay.ndim == 4:
        kernel = _fla_kernels.operator("gla", query, value)
        if kernel is not None:
            heads = {"q": query.to(value), "k": key.to(value), "v": value, "g": decay}
            return _fla_kernels.run(kernel, heads, value, state)
    run = {"parallel": _parallel, "chunked": _chunked, "recurrent": _recurrent}[form]
    output, after = run(q, k, v, decay, before, CHUNK if chunk is None else chunk)
    return output.to(value.dtype), after


def _both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    form: Form,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """What comes before and what comes after, the token itself once; the decay from j to i is that of the tokens between."""
    if state is not None:
        raise ValueError("without causal=True there is no state to begin with: every token sees all others")
    if log_decay is None:
        memory = key.mT @ value
        return (query @ key.mT) @ value if form == "parallel" else query @ memory, memory
    forward, after = linear_attention(query, key, value, log_decay, form=form, chunk=chunk)
    turned = (query.flip(2), key.flip(2), value.flip(2))
    if log_decay.ndim > 1:  # from j back to i < j, the decays are g_{i+1} … g_j
        log_decay = functional.pad(log_decay.flip(2)[:, :, :-1], (0, 0) * (log_decay.ndim - 3) + (1, 0))
    backward, _ = linear_attention(*turned, log_decay, form=form, chunk=chunk)
    own = (query * key).sum(-1, keepdim=True) * value
    return forward + backward.flip(2) - own, after


def _parallel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, before: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The matrix of all pairs."""
    total = _of_each(decay, q).cumsum(2)  # (B or 1, H, N, 1 or Dk)
    matrix = _inside(*(tensor[:, :, None] for tensor in (q, k, total))).squeeze(2)
    output = matrix @ v + (q * total.exp()) @ before
    left = (total[:, :, -1:] - total).exp()
    return output, total[:, :, -1, :, None].exp() * before + (k * left).mT @ v


def _chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, before: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Piece by piece, each from the state of the one before; where gradients are wanted there is but one."""
    length, constant = q.shape[2], decay.shape[2] < q.shape[2]
    chunk = min(chunk, length)
    piece = length if torch.is_grad_enabled() else max(_PIECE // chunk, 1) * chunk
    rest = length % chunk if constant else 0  # by itself, for zeros after it would decay the state as well
    outputs = []
    for start, end in pairwise(sorted({*range(0, length - rest, piece), length - rest, length})):
        query, key, value = (tensor[:, :, start:end] for tensor in (q, k, v))
        decays = decay if constant else decay[:, :, start:end]
        output, before = _piece(query, key, value, decays, before, min(chunk, end - start))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), before


def _piece(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, before: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Within chunks as in the parallel form, between them by the state at each chunk's start."""
    batch, heads, length, _ = q.shape
    decay = decay.expand(-1, -1, chunk, -1) if decay.shape[2] == 1 else decay
    q, k, v, decay = (cut(tensor, chunk) for tensor in (q, k, v, decay))  # (B, H, chunks, chunk, D)
    total = decay.cumsum(3)
    end = total[:, :, :, -1:]
    inside = _inside(q, k, total) @ v
    added = (k * (end - total).exp()).mT @ v  # what each chunk adds to the state
    kept = end.exp().mT.expand(-1, -1, added.shape[2], -1, -1)  # and what it leaves of it, (…, chunks, 1 or Dk, 1)
    states = []
    for factor, addition in zip(kept.unbind(2), added.unbind(2), strict=True):
        states.append(before)
        before = factor * before + addition
    output = inside + (q * total.exp()) @ torch.stack(states, dim=2)
    return output.reshape(batch, heads, -1, v.shape[-1])[:, :, :length], before


def _inside(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The matrices of the chunks, (B, H, chunks, chunk, chunk)."""
    length = q.shape[3]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if total.shape[-1] == 1:
        between = (total - total.mT).masked_fill(hidden, -torch.inf)
        return (q @ k.mT) * between.exp()
    return _inside_by_halves(q, k, total)


def _inside_by_halves(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The matrices where each channel has a decay: from those of single tokens to those of twice as many, and so on.

    What the second half of a block takes from the first decays to the border between them and from there on: two factors, of
    which neither exceeds 1, however strong the decay, and each token needs one of them at each size.
    """
    length = q.shape[3]
    extra = (1 << (length - 1).bit_length()) - length
    q, k = (functional.pad(tensor, (0, 0, 0, extra)) for tensor in (q, k))
    total = torch.cat([total, total[:, :, :, -1:].expand(-1, -1, -1, extra, -1)], dim=3)
    blocks = (q * k).sum(-1)[..., None, None]  # (B, H, chunks, blocks, size, size)
    while blocks.shape[3] > 1:
        size = blocks.shape[4]
        first_k, first = (tensor.unflatten(3, (-1, 2, size))[:, :, :, :, 0] for tensor in (k, total))
        last_q, last = (tensor.unflatten(3, (-1, 2, size))[:, :, :, :, 1] for tensor in (q, total))
        border = first[:, :, :, :, -1:]
        across = (last_q * (last - border).exp()) @ (first_k * (border - first).exp()).mT
        upper, lower = blocks.unflatten(3, (-1, 2)).unbind(4)
        blocks = torch.cat([functional.pad(upper, (0, size)), torch.cat([across, lower], dim=-1)], dim=-2)
    return blocks[:, :, :, 0, :length, :length]


def _recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, before: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Token by token."""
    outputs = []
    kept = _of_each(decay, q).exp()
    tokens = zip(
        q[..., None, :].unbind(2), k[..., None].unbind(2), v[..., None, :].unbind(2), kept.unbind(2), strict=True
    )
    for query, key, value, factor in tokens:
        before = factor[..., None] * before + key * value
        outputs.append(query @ before)
    return torch.cat(outputs, dim=2), before


def _spread(log_decay: Tensor | None, query: Tensor) -> Tensor:
    """The log decays as (B, H, N, 1 or Dk), or (1, H, 1, 1) where they are the same for all tokens."""
    batch, heads, length, width = query.shape
    if log_decay is None:
        return query.new_zeros(1, heads, 1, 1)
    shapes = ((heads,), (batch, heads, length), (batch, heads, length, width))
    if log_decay.shape not in shapes:
        raise ValueError(
            f"log_decay must be of shape {', '.join(map(str, shapes))} for queries of {tuple(query.shape)}, "
            f"got {tuple(log_decay.shape)}"
        )
    log_decay = log_decay.to(query)
    if log_decay.ndim == 1:
        return log_decay[None, :, None, None]
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def _of_each(decay: Tensor, query: Tensor) -> Tensor:
    """The log decay of each token."""
    return decay.expand(-1, -1, query.shape[2], -1)
