"""Lightning attention as a Triton kernel, forward and backward.

One sweep over blocks of tokens, within a block by the products of queries and keys, between blocks by the state:

    o_i = Σ_{j≤i} λ^{i−j} (q_i · k_j) v_j + λ^{i+1} Sᵀ q_i,       S' = λ^N S + Σ_j λ^{N−1−j} k_j v_jᵀ,    i, j = 0 … N − 1

and the same from the other end, which is its transpose:

    o_i = Σ_{j≥i} λ^{j−i} (q_i · k_j) v_j + λ^{N−1−i} Sᵀ q_i,     S' = λ^N S + Σ_j λ^{j+1} k_j v_jᵀ

Each gradient of one sweep is another with its arguments in other places, so that one kernel is all there is, and its
gradients have gradients.
"""

# A kernel's arguments are annotated for Triton alone, and autograd's functions are not.
# mypy: disable-error-code="name-defined, no-untyped-call, no-untyped-def, valid-type"
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def _optional(name: str) -> Any:
    """A module of Triton, or None: the package does without."""
    return importlib.import_module(name) if importlib.util.find_spec("triton") else None


triton, tl = _optional("triton"), _optional("triton.language")

_DTYPES = (torch.float32, torch.bfloat16)
_WIDEST = 128  # keys, and, in the gradients' sweeps, values
_SLAB = 32  # columns of the values that one program carries the state of
_NARROWEST = 16  # what a product of tensor cores takes


def fits(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> bool:
    """Whether the kernel can do it: on a GPU with Triton, one dtype of two, heads up to 128 wide, constant decays."""
    return (
        triton is not None
        and query.is_cuda
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[3], value.shape[3]) <= _WIDEST
        and not log_decay.requires_grad
    )


def sweep(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, log_decay: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, Dk), values (B, H, N, Dv), a state (B, H, Dk, Dv), log λ (H,): the output, and S'."""
    shape = (*query.shape[:2], query.shape[3], value.shape[3])
    state = query.new_zeros(shape, dtype=torch.float32) if state is None else state.float()
    output, after = _Sweep.apply(query, key, value, state, log_decay.float(), reverse)
    return output, after


class _Sweep(Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        return _launch(query, key, value, state, log_decay, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, state, log_decay = ctx.saved_tensors
        output, after = gradients
        output = output.to(query.dtype)
        to_query = to_key = to_value = to_state = None
        if ctx.needs_input_grad[0]:
            to_query, _ = _Sweep.apply(output, value, key, state.mT, log_decay, ctx.reverse)
        if ctx.needs_input_grad[1]:
            to_key, _ = _Sweep.apply(value, output, query, after.mT, log_decay, not ctx.reverse)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            to_value, to_state = _Sweep.apply(key, query, output, after, log_decay, not ctx.reverse)
        return to_query, to_key, to_value, to_state, None, None


def _launch(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    breadth = value.shape[3]
    query, key, value, state, log_decay = (t.contiguous() for t in (query, key, value, state, log_decay))
    output, after = torch.empty_like(value), torch.empty_like(state)
    whole = max(triton.next_power_of_2(width), _NARROWEST)
    half = query.dtype == torch.bfloat16
    with torch.cuda.device_of(query):
        _blocks[batch * heads, triton.cdiv(breadth, _SLAB)](
            query, key, value, state, log_decay, output, after, heads, length, width, breadth,
            REVERSE=int(reverse), WIDTH=whole, SLAB=_SLAB,
            BLOCK=64 if half else 32,  # what fits a processor's own memory
            PRODUCTS=tl.bfloat16 if half and query.is_cuda else tl.float32,  # the interpreter has none of bfloat16
        )  # fmt: skip
    return output, after


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _blocks(
    query,
    key,
    value,
    state,
    log_decay,
    output,
    after,
    heads,
    length,
    width,
    breadth,
    REVERSE: tl.constexpr,  # noqa: N803 - constants of the compiler
    WIDTH: tl.constexpr,  # noqa: N803
    SLAB: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PRODUCTS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)  # a head of a text
    across = tl.arange(0, WIDTH)
    columns = tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    near = tl.arange(0, BLOCK)
    decay = tl.load(log_decay + row % heads)
    between = near[:, None] - near[None, :]
    inside = tl.where(between >= 0, tl.exp(decay * tl.maximum(between, 0)), 0.0)
    seen = tl.exp(decay * (near + (1 - REVERSE)))
    place = row * width * breadth + across[:, None] * breadth + columns[None, :]
    there = (across[:, None] < width) & (columns[None, :] < breadth)
    memory = tl.load(state + place, mask=there, other=0.0)
    for start in range(0, length, BLOCK):
        order = start + near
        real = order < length
        tokens = row * length + (length - 1 - order if REVERSE else order)
        keyed = tokens[:, None] * width + across[None, :]
        valued = tokens[:, None] * breadth + columns[None, :]
        q = tl.load(query + keyed, mask=real[:, None] & (across[None, :] < width), other=0.0).to(PRODUCTS)
        k = tl.load(key + keyed, mask=real[:, None] & (across[None, :] < width), other=0.0).to(PRODUCTS)
        v = tl.load(value + valued, mask=real[:, None] & (columns[None, :] < breadth), other=0.0).to(PRODUCTS)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * inside
        mixed = tl.dot(scores.to(PRODUCTS), v, input_precision="ieee")
        mixed += tl.dot(q, memory.to(PRODUCTS), input_precision="ieee") * seen[:, None]
        tl.store(output + valued, mixed.to(output.dtype.element_ty), mask=real[:, None] & (columns[None, :] < breadth))
        count = tl.minimum(length - start, BLOCK)  # the last block may be short, and its keys' powers smaller
        left = tl.exp(decay * tl.maximum(count - 1 + REVERSE - near, 0))
        kept = tl.trans((k * left[:, None]).to(PRODUCTS))
        memory = memory * tl.exp(decay * count) + tl.dot(kept, v, input_precision="ieee")
    tl.store(after + place, memory, mask=there)
