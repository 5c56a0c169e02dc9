"""A little task on which a layer shows that it trains: keys and their values, and then the values of keys once more."""

import torch
from torch import Tensor, nn

from regard.mixers import Mixer

KEYS, PAIRS = 8, 4


def recall_losses(mixer: Mixer, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """The mean loss of the first and of the last ten steps of Adam."""
    torch.manual_seed(seed)
    embedding, norm = nn.Embedding(2 * KEYS, mixer.dim), nn.LayerNorm(mixer.dim)
    head = nn.Linear(mixer.dim, 2 * KEYS)
    parameters = [parameter for part in (embedding, mixer, norm, head) for parameter in part.parameters()]
    optimizer = torch.optim.Adam(parameters, 5e-3)
    losses = []
    for _ in range(steps):
        tokens, asked = _texts(16)
        embedded = embedding(tokens)
        logits = head(norm(embedded + mixer(embedded)[0]))
        loss = nn.functional.cross_entropy(logits[:, 2 * PAIRS :: 2].flatten(0, 1), asked.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in parameters if parameter.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


def _texts(number: int) -> tuple[Tensor, Tensor]:
    keys = torch.stack([torch.randperm(KEYS)[:PAIRS] for _ in range(number)])
    values = torch.randint(KEYS, 2 * KEYS, (number, PAIRS))
    order = torch.stack([torch.randperm(PAIRS) for _ in range(number)])
    again, asked = keys.gather(1, order), values.gather(1, order)
    halves = [torch.stack(pair, 2).flatten(1) for pair in ((keys, values), (again, asked))]
    return torch.cat(halves, 1), asked
