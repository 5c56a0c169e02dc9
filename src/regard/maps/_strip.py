"""The arithmetic of one strip of the matrix, forward and backward, for the kernels that go strip by strip.

A strip is (heads, groups, rows, columns): some query rows of some heads over all the keys that they may see, so that its
softmax is exact in one pass. Groups are the query heads that share a key head. Tensors of queries are (heads, groups, rows,
…), those of keys (heads, columns, …), or (heads · groups, columns, …) where each query head has its own.

These functions keep to what TorchScript compiles: see `unlocked`.
"""

# No `from __future__ import annotations`: TorchScript reads the annotations themselves.
import functools
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_compiling = threading.Lock()
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@functools.cache
def unlocked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function as TorchScript runs it, without the interpreter's lock.

    Workers that call one operator after another hand the lock to each other at every one, which takes as long as a small
    operator does; two of them were slower than one. Where TorchScript has no source to read or has gone, the function itself
    computes as much, only slower.
    """
    with _compiling, warnings.catch_warnings():  # which two threads would mix up
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # in favour of compilers that need one on the user's machine
        try:
            compiled: Callable[Parameters, Result] = torch.jit.script(function)
        except (AttributeError, OSError, RuntimeError):
            return function
    return compiled


def capped(query: Tensor, key: Tensor, scale: float, softcap: float, out: Tensor) -> Tensor:
    """``scale · query keyᵀ`` in ``out``; or softcap times its tanh, where there is one (0: none)."""
    flat = out.view(key.size(0), -1, key.size(1))
    torch.baddbmm(flat, query.reshape(key.size(0), -1, key.size(2)), key.transpose(1, 2), beta=0, alpha=scale, out=flat)
    return out if softcap == 0 else out.tanh_().mul_(softcap)


def hide(logits: Tensor, mask: Tensor | None, hidden: float, starts: list[int], biases: list[Tensor]) -> Tensor:
    """The logits, with the mask and, from each column of ``starts`` on, a bias added in place; ``hidden`` where False."""
    if mask is not None:
        if mask.dtype == torch.bool:  # many times as fast as masked_fill_
            logits.add_((~mask).to(logits.dtype), alpha=hidden)
        else:
            logits.add_(mask)
    for index, start in enumerate(starts):
        logits.narrow(3, start, biases[index].size(3)).add_(biases[index])
    return logits


def shift(logits: Tensor, sinks: Tensor | None, hidden: float, to_log2: float) -> Tensor:
    """The highest logit of each row, which is taken from the logits, now in units of log 2; 0 for a row that sees nothing."""
    highest = logits.amax(dim=-1)
    if sinks is not None:
        highest = torch.maximum(highest, sinks)
    highest.masked_fill_(highest <= hidden / 2, 0.0)
    logits.sub_(highest.unsqueeze(-1))
    if to_log2 != 1:
        logits.mul_(to_log2)
    return highest


def add_sinks(total: Tensor, sinks: Tensor, highest: Tensor | None, to_log2: float) -> None:
    """Add to each row's sum of exponentials that of its sink."""
    logits = sinks if highest is None else sinks - highest
    total.add_((logits * to_log2).exp2_())


def multiply(matrix: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the strip times (heads, columns, W), or times (heads · groups, columns, W), to (heads, groups, rows, W)."""
    left = matrix.view(right.size(0), -1, matrix.size(3))
    if out.is_contiguous():
        flat = out.view(right.size(0), -1, right.size(2))
        torch.bmm(left, right, out=flat)
    else:
        out.copy_(torch.bmm(left, right).view(out.shape))


def multiply_transposed(matrix: Tensor, right: Tensor, total: Tensor) -> None:
    """Add the transposed strip times (heads, groups, rows, W) to (heads, columns, W), or to (heads · groups, columns, W)."""
    left = matrix.view(total.size(0), -1, matrix.size(3))
    right = right.reshape(total.size(0), left.size(1), -1)
    total.transpose(1, 2).baddbmm_(right.transpose(1, 2), left)


def answer(
    logits: Tensor,
    another: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    values: Tensor | None,
    weights: Tensor | None,
    segments: list[list[list[int]]],
    scale: float,
    softcap: float,
    hidden: float,
    to_log2: float,
    starts: list[int],
    biases: list[Tensor],
    highest: Tensor | None,
    total: Tensor,
    expected: Tensor | None,
    mass: Tensor | None,
    forward: Tensor | None,
    transposed: Tensor | None,
) -> None:
    """Write what is asked of the strip; but for ``transposed``, rows are to be divided by their totals in the end.

    ``logits`` is a buffer. ``total`` is each row's sum of exponentials, of logits less the ``highest``, where there is room
    for that; ``expected`` that of exponentials times logits, in units of log 2, for which ``another`` is a buffer; ``mass``
    those over the segments' runs (start, stop, step).
    """
    hide(capped(query, key, scale, softcap, logits), mask, hidden, starts, biases)
    if highest is not None:
        highest.copy_(shift(logits, sinks, hidden, to_log2))
    exps = another.view(logits.shape) if expected is not None else logits
    torch.exp2(logits, out=exps)
    torch.sum(exps, [-1], out=total)
    if sinks is not None:
        add_sinks(total, sinks, highest, to_log2)
    if expected is not None:
        if to_log2 != 1:  # a hidden key's −inf · 0 counts as nothing
            logits.clamp_(min=-1e30)
        torch.sum(logits.mul_(exps), [-1], out=expected)
    if mass is not None:
        for number, runs in enumerate(segments):
            of_segment = mass.select(-1, number)
            for index, run in enumerate(runs):
                of_run = exps[:, :, :, run[0] : run[1] : run[2]]
                if index == 0:
                    torch.sum(of_run, [-1], out=of_segment)
                else:
                    of_segment.add_(of_run.sum([-1]))
            if len(runs) == 0:
                of_segment.zero_()
    if forward is not None and values is not None:
        multiply(exps, values, forward)
    if transposed is not None and weights is not None:
        multiply_transposed(exps, weights / divisor_of(total).unsqueeze(-1), transposed)


def add_blocks(exps: Tensor, weights: Tensor, total: Tensor, blocks: list[list[int]], sums: Tensor) -> None:
    """Add up the strip's rows by block, (heads, groups, blocks, columns), given each block as (number, first row, stop)."""
    shares = weights / divisor_of(total)
    first, number = blocks[0][0], len(blocks)
    of_blocks = torch.zeros([exps.size(0), exps.size(1), number, exps.size(2)], dtype=exps.dtype, device=exps.device)
    for index, block in enumerate(blocks):
        of_blocks[:, :, index, block[1] : block[2]] = shares[:, :, block[1] : block[2]]
    part = sums[:, :, first : first + number].flatten(0, 1)
    part.baddbmm_(of_blocks.flatten(0, 1), exps.flatten(0, 1))


def add_distances(exps: Tensor, first: int, zero: int, ramp: Tensor, out: Tensor) -> None:
    """Write ``Σ_j e_ij |first + i − j|`` for each row i of the strip, to be divided by its total in the end.

    ``ramp`` holds distances from its ``zero``-th place. That from the strip's first row is the same for all rows, and so a
    product with one vector; what it is off by is known wherever keys are before all rows or after them, and is taken entry
    by entry between.
    """
    rows, columns = exps.size(2), exps.size(3)
    from_first = ramp[zero - first : zero - first + columns]
    out.copy_(torch.mv(exps.view(-1, columns), from_first).view(out.shape))
    low, high = min(max(first, 0), columns), min(max(first + rows, 0), columns)
    before, after = exps[:, :, :, :low].sum([-1]), exps[:, :, :, high:].sum([-1])
    down = torch.arange(rows, device=exps.device)
    out.add_((before - after) * down)
    if low < high:
        keys = torch.arange(low - first, high - first, device=exps.device)
        off = (down.unsqueeze(1) - keys).abs() - keys.abs()
        out.add_((exps[:, :, :, low:high] * off).sum([-1]))


def divisor_of(total: Tensor) -> Tensor:
    """What a row's sums are divided by: its total, which is e⁻²⁰ at least, but 0 in a row that sees nothing."""
    return total.clamp(min=1e-10)


def finish(
    total: Tensor,
    highest: Tensor | None,
    expected: Tensor | None,
    mass: Tensor | None,
    forward: Tensor | None,
    sinks: Tensor | None,
    unit: float,
    to_log2: float,
) -> tuple[Tensor, Tensor | None]:
    """Divide what `answer` wrote by the totals; each row's log-sum-exp, in nats, and its entropy.

    The entropy is ``Σ P (log Σ e^s − s)`` over the keys, beside which a sink has its share of Σ e^s. A row that sees
    nothing has a total of 0.
    """
    divisor = divisor_of(total)
    logsumexp = total.log()
    entropy: Tensor | None = None
    if expected is not None:
        logsum = logsumexp
        if sinks is not None:
            of_sinks = torch.zeros_like(total)
            add_sinks(of_sinks, sinks, highest, to_log2)
            logsum = logsum * (1 - of_sinks / divisor)
        entropy = torch.sub(logsum, expected.div_(divisor), alpha=0.6931471805599453).clamp_(min=0)  # log 2
    if highest is not None:
        logsumexp.add_(highest, alpha=unit)
    if forward is not None:
        forward.div_(divisor.unsqueeze(-1))
    if mass is not None:
        mass.div_(divisor.unsqueeze(-1))
    return logsumexp, entropy


def gradient(
    matrix: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    d_logsumexp: Tensor | None,
    d_forward: Tensor | None,
    d_transposed: Tensor | None,
    d_entropy: Tensor | None,
    row_sums: Tensor | None,
) -> Tensor:
    """The logits' gradient ``P ⊙ (dP − rowsum(P ⊙ dP) + dL)`` with ``dP = dO Vᵀ + W dTᵀ − dH (log P + 1)``, P the matrix.

    The sums are written to ``row_sums`` too, for a sink has no dP, but its share of the rest.
    """
    if values is not None and d_forward is not None:
        d_matrix = torch.empty_like(matrix)
        multiply(d_forward.contiguous(), values.transpose(1, 2), d_matrix)
    else:
        d_matrix = torch.zeros_like(matrix)
    if weights is not None and d_transposed is not None:
        more = torch.empty_like(matrix)
        multiply(weights.contiguous(), d_transposed.transpose(1, 2), more)
        d_matrix.add_(more)
    if d_entropy is not None:
        log_matrix = matrix.log().clamp_(min=-1e30)  # so that 0 · it is 0
        d_matrix.sub_(log_matrix.add_(1).mul_(d_entropy.unsqueeze(-1)))
    sums = torch.linalg.vecdot(matrix, d_matrix)
    if row_sums is not None:
        row_sums.copy_(sums)
    if d_logsumexp is not None:
        sums = sums - d_logsumexp
    return d_matrix.sub_(sums.unsqueeze(-1)).mul_(matrix)


def backward(
    logits: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    values: Tensor | None,
    weights: Tensor | None,
    logsumexp: Tensor,
    scale: float,
    softcap: float,
    hidden: float,
    to_log2: float,
    starts: list[int],
    biases: list[Tensor],
    d_logsumexp: Tensor | None,
    d_forward: Tensor | None,
    d_transposed: Tensor | None,
    d_entropy: Tensor | None,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_mask: Tensor | None,
    d_values: Tensor | None,
    d_weights: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    """Write or add the strip's part of every gradient for which there is room.

    ``logits`` is a buffer; ``logsumexp``, +inf for rows that see nothing, and the strip are in units of what the logits are
    in. ``d_query`` and ``d_key`` are for the products before they are scaled.
    """
    capped(query, key, scale, softcap, logits)
    slope: Tensor | None = None
    if softcap != 0:  # of c · tanh
        slope = 1 - (logits / softcap).square_()
    matrix = hide(logits, mask, hidden, starts, biases).sub_(logsumexp.unsqueeze(-1))
    if to_log2 != 1:
        matrix.mul_(to_log2)
    matrix.exp2_()
    if d_values is not None and d_forward is not None:
        multiply_transposed(matrix, d_forward, d_values)
    if d_weights is not None and d_transposed is not None:
        multiply(matrix, d_transposed, d_weights)
    if d_query is None and d_key is None and d_mask is None and row_sums is None:
        return
    d_logits = gradient(matrix, values, weights, d_logsumexp, d_forward, d_transposed, d_entropy, row_sums)
    if d_mask is not None:
        d_mask.add_(d_logits.sum_to_size(d_mask.shape))
    if slope is not None:
        d_logits.mul_(slope)
    if d_query is not None:
        multiply(d_logits, key, d_query)
    if d_key is not None:
        multiply_transposed(d_logits, query, d_key)
