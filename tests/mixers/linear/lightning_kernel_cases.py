"""Run by itself, as Triton's interpreter is chosen before Triton is imported: prints the kernel's errors as JSON.

On a machine with a GPU the kernel runs there, compiled.
"""

import json

import torch
from torch import Tensor

from regard.mixers import lightning_attention, linear_attention
from regard.mixers.linear._lightning_kernel import sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["output", "after", "query", "key", "value", "state"]
CASES = {
    "one token": (1, 8, 8, torch.float32),
    "less than a block": (29, 12, 5, torch.float32),
    "one block": (64, 16, 16, torch.float32),
    "blocks and a rest": (150, 20, 40, torch.float32),
    "widest": (70, 128, 128, torch.float32),
    "bfloat16": (100, 16, 24, torch.bfloat16),
}


def inputs(length: int, width: int, breadth: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 1, 2, length, width, generator=generator) / width**0.5
    v = torch.randn(1, 2, length, breadth, generator=generator)
    state = torch.randn(1, 2, width, breadth, generator=generator)
    return [tensor.to(DEVICE, dtype) for tensor in (q, k, v)] + [state.to(DEVICE)]


def with_gradients(tensors: list[Tensor], log_decay: Tensor, kernel: bool) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, after = (
        sweep(*leaves, log_decay)
        if kernel
        else linear_attention(*leaves[:3], log_decay.to(leaves[0].dtype), leaves[3], form="parallel")
    )
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
    total = (output.float() * weights).sum() + after.sin().sum()
    return [output, after, *torch.autograd.grad(total, leaves)]


def errors(length: int, width: int, breadth: int, dtype: torch.dtype) -> dict[str, float]:
    tensors = inputs(length, width, breadth, dtype)
    log_decay = torch.tensor([-0.7, -0.01], device=DEVICE)
    found = with_gradients(tensors, log_decay, True)
    expected = with_gradients([tensor.double() for tensor in tensors], log_decay, False)
    return {
        name: float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1))
        for name, one, other in zip(NAMES, found, expected, strict=True)
    }


def other_uses() -> dict[str, float]:
    """Without a state, in a text that does not lie in one piece, in two pieces, of gradients, and transposed."""
    q, k, v, state = inputs(40, 8, 8, torch.float32)
    log_decay = torch.tensor([-0.1, 0.0], device=DEVICE)
    whole, after = sweep(q, k, v, state, log_decay)
    first, middle = sweep(q[:, :, :17], k[:, :, :17], v[:, :, :17], state, log_decay)
    rest, end = sweep(q[:, :, 17:], k[:, :, 17:], v[:, :, 17:], middle, log_decay)
    plain, _ = linear_attention(q, k, v, log_decay)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    second = [second_derivative(run, q, k, v, log_decay) for run in (sweep, reference)]
    transposed = [
        torch.func.vjp(lambda values, run=run: run(q, k, values, None, log_decay)[0], v)[1](whole.detach())[0]
        for run in (sweep, reference)
    ]
    pairs = {
        "no state": (sweep(q, k, v, None, log_decay)[0], plain),
        "strides": (sweep(*strided, None, log_decay)[0], plain),
        "lightning_attention": (lightning_attention(q, k, v, log_decay.exp(), state)[0], whole),
        "pieces": (torch.cat([first, rest], 2), whole),
        "state of pieces": (end, after),
        "second derivative": (second[0], second[1]),
        "transposed": (transposed[0], transposed[1]),
    }
    return {name: float((one - other).abs().max() / other.abs().max()) for name, (one, other) in pairs.items()}


def reference(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    return linear_attention(q, k, v, log_decay, state)


def second_derivative(run, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    q = q.clone().requires_grad_()
    k = k.clone().requires_grad_()
    (to_q,) = torch.autograd.grad(run(q, k, v, None, log_decay)[0].square().sum(), q, create_graph=True)
    (to_k,) = torch.autograd.grad(to_q.sin().sum(), k)
    return to_k


if __name__ == "__main__":
    found = {name: errors(*case) for name, case in CASES.items()}
    print(json.dumps(found | {"other uses": other_uses()}))
