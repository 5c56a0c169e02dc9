"""A model with eight layers of any mixer trains as it is initialised."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regard.mixers import catalogue
from regard.mixers import mixer as mixer_module

DIM, LAYERS, TOKENS = 32, 8, 4
VOCABULARY = TOKENS**2  # a target for each pair of tokens
HEAVY: dict[str, dict[str, int]] = {"Memora": {"heads": 8}}  # a softmax of all weights for each token: smaller memories


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
        logits: Tensor = self.head(self.norms[-1](x))
        return logits


def texts() -> tuple[Tensor, Tensor]:
    """Each token is to be answered with one for it and the token before it, which who sees himself alone cannot know."""
    tokens = torch.randint(TOKENS, (12, 13))
    before = nn.functional.pad(tokens[:, :-1], (1, 0))
    return tokens, tokens * TOKENS + before


def least_alone(tokens: Tensor, targets: Tensor) -> float:
    """The entropy of the targets given their own tokens: no model that sees no other token has a smaller loss."""
    pairs = nn.functional.one_hot(tokens * VOCABULARY + targets, TOKENS * VOCABULARY).double().mean((0, 1))
    joint = pairs.view(TOKENS, VOCABULARY)
    return float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())


@pytest.mark.parametrize("name", sorted(catalogue.mixers()))
def test_eight_layers_train(name: str) -> None:
    """Within 40 steps, where the slowest takes 13, the loss is far below what a layer could reach that mixes nothing."""
    model = Model(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens, targets = texts()
    wanted = 0.75 * least_alone(tokens, targets)
    losses: list[float] = []
    while not losses or losses[-1] >= wanted:
        assert len(losses) < 40, losses
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
        optimizer.step()
        losses.append(float(loss.detach()))


def stored(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What it returns, and the bytes that autograd stores for it."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return output, sum(held.values())


@pytest.mark.parametrize("name", sorted(name for name, kind in catalogue.mixers().items() if kind.in_pieces))
def test_a_long_text_is_mixed_again_for_its_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, of which autograd stores little; the gradients are those of the text at once."""
    torch.manual_seed(0)
    layer, x = catalogue.mixers()[name](16, **HEAVY.get(name, {})).double(), torch.randn(2, 96, 16).double()
    mask = torch.ones(2, 96, dtype=torch.bool)
    mask[0, :5] = False
    found = []
    for numbers in (2 * 1024 * 16, 2 * 16 * 16):
        monkeypatch.setattr(mixer_module, "_TRAINED", numbers)
        monkeypatch.setattr(mixer_module, "_SMALLEST_PIECE", 16)
        y, size = stored(lambda: layer(x, mask=mask)[0])
        found.append((size, y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)))
    (at_once, *expected), (in_pieces, *actual) = found
    assert in_pieces < 0.7 * at_once
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # one keeps its sums in float32
