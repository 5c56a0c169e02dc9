"""A model with eight layers of any mixer trains as it is initialised."""

import math

import pytest
import torch
from torch import Tensor, nn

from regard.mixers import catalogue

DIM, LAYERS, VOCABULARY = 32, 8, 16
HEAVY = {"Memora": {"heads": 8}}  # a softmax of all weights for each token: smaller memories


class Model(nn.Module):
    """Nothing beside the mixers but norms, embeddings and the sums around them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind = catalogue.mixers()[name]
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(LAYERS + 1))
        self.mixers = nn.ModuleList(kind(DIM, **HEAVY.get(name, {})) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))[0]
        return self.head(self.norms[-1](x))


def texts() -> tuple[Tensor, Tensor]:
    """Each token is to be answered with one for it and the token before it, which who sees himself alone cannot know."""
    tokens = torch.randint(VOCABULARY // 4, (32, 13))
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    return tokens, tokens * (VOCABULARY // 4) + before


@pytest.mark.parametrize("name", sorted(catalogue.mixers()))
def test_eight_layers_train(name: str) -> None:
    model = Model(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        tokens, targets = texts()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
        optimizer.step()
        losses.append(float(loss.detach()))
    alone = math.log(VOCABULARY / 4)  # what is left to a layer that sees no other token
    assert losses[-1] < 0.75 * alone, losses
