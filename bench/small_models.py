"""Small models of equal size around each mixer, how they are trained, and results that survive an interruption."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList, RMSNorm, functional

from regard.mixers import Mixer, catalogue
from regard.mixers.linear.short_convolution import ShortConvolution

Batch = tuple[Tensor, Tensor]  # token ids, and targets of which −100 do not count
Make = Callable[[int, int, int], Mixer]  # of a width, for a layer of several


class Block(Module):
    """A mixer and a multilayer perceptron, which takes the parameters that the mixer leaves of the block's share."""

    def __init__(self, mixer: Mixer, parameters: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norms = ModuleList(RMSNorm(mixer.dim) for _ in range(2))
        taken = sum(parameter.numel() for parameter in mixer.parameters())
        hidden = (parameters - taken) // (2 * mixer.dim)
        if hidden < mixer.dim // 2:
            raise ValueError(
                f"{type(mixer).__name__} has {taken:,} parameters of {parameters:,}: no room for a perceptron"
            )
        self.up, self.down = Linear(mixer.dim, hidden, bias=False), Linear(hidden, mixer.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))[0]
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class SmallModel(Module):
    """Embedding, a short convolution as in Zoology, by which all know the token before, blocks, and the embedding again."""

    def __init__(self, make: Make, vocabulary: int, dim: int, layers: int, parameters: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, dim)
        self.convolution = ShortConvolution(dim, 3)
        self.blocks = ModuleList(Block(make(dim, layer, layers), parameters) for layer in range(layers))
        self.norm = RMSNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.convolution(x)[0]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T / math.sqrt(x.shape[-1])


def train(model: Module, batches: Callable[[float], Batch], steps: int, rate: float) -> None:
    """AdamW with a warm-up and a cosine; batches are told how much of the training is done, from 0 to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        loss = loss_of(model, batches(step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def loss_of(model: Module, batch: Batch) -> Tensor:
    ids, targets = batch
    return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)


def state_bytes(model: SmallModel, tokens: int) -> int:
    """What the mixers remember of a text, all layers together."""
    x = torch.zeros(1, tokens, model.embedding.embedding_dim)
    with torch.no_grad():
        return sum(block.mixer(x)[1].bytes for block in model.blocks)


def maker(name: str, **arguments: Any) -> Make:
    """Mixers of this name and these arguments; told which layer they are where they want to know."""
    kind = catalogue.mixer_named(name)
    asks = "layers" in inspect.signature(kind).parameters
    return lambda dim, layer, layers: kind(dim, **arguments, **({"layer": layer, "layers": layers} if asks else {}))


class Results:
    """Lines of JSON in a file, by key: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: dict[str, Any] = dict(json.loads(line) for line in lines)

    def of(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """The result of each, kept or new; a core runs one at a time, for small operators gain little from several."""
        missing = {key: run for key, run in runs.items() if key not in self.found}
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,))
        with Progress() as bar, pool:
            task = bar.add_task("training", total=len(runs), completed=len(runs) - len(missing))
            under_way = {pool.submit(run): key for key, run in missing.items()}
            try:
                for done in as_completed(under_way):
                    self._keep(under_way[done], done.result())
                    bar.update(task, advance=1, description=under_way[done])
            finally:
                pool.shutdown(cancel_futures=True)
        return {key: self.found[key] for key in runs}

    def one(self, key: str, run: Callable[[], Any]) -> Any:
        """One result, kept or new, run in this process."""
        if key not in self.found:
            self._keep(key, run())
        return self.found[key]

    def _keep(self, key: str, result: Any) -> None:
        self.found[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, result]) + "\n")
