"""What a trained model can do, on names, numbers and books that it never saw.

``python -m training.evaluate --model DIR --data BOOKS --held-out BOOKS`` prints one table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

import regard
from training.books import Books
from training.ngram import ORDER, KneserNey
from training.tasks import QUESTIONS, STATEMENTS, Material, Row, between_sentences, pick
from training.tokenizer import books

SEED = 20_000
CONTEXTS = (256, 512, 1024)
DISTRACTORS = (4, 8, 16)
DIGITS = 5
ROWS = 16


@dataclass(frozen=True)
class Figure:
    """A measured number with its 95% interval; ``target`` where one was set, ``samples`` of what it is a mean."""

    name: str
    value: float
    low: float
    high: float
    samples: int
    target: float | None = None


def proportion(name: str, hits: int, samples: int, target: float | None = None) -> Figure:
    """A share, with Wilson's interval."""
    z, share = 1.959964, hits / samples
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return Figure(
        name, share, max(middle - half, 0.0), min(middle + half, 1.0), samples, target
    )  # but for rounding, within


def bootstrap(name: str, values: np.ndarray, weights: np.ndarray | None = None, target: float | None = None) -> Figure:
    """A (weighted) mean of independent rows, with the percentile interval of 2,000 resamplings."""
    weights = np.ones(len(values)) if weights is None else weights
    chosen = np.random.default_rng(SEED).integers(0, len(values), (2000, len(values)))
    means = (values * weights)[chosen].sum(1) / weights[chosen].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(name, float((values * weights).sum() / weights.sum()), float(low), float(high), len(values), target)


@torch.inference_mode()
def logits(model: Module, rows: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Each row with the model's logits; rows of one length share a batch."""
    for start in range(0, len(rows), ROWS):
        batch = np.stack(rows[start : start + ROWS])
        ids = torch.from_numpy(batch).to(next(model.parameters()).device)
        yield from zip(batch, model(input_ids=ids, use_cache=False).logits.float().cpu(), strict=True)


def induction(model: Module, material: Material, span: int, samples: int, target: float | None = None) -> Figure:
    """How often the next token is right in the second half of random tokens said twice, but for its first."""
    random = np.random.default_rng((SEED, span))
    rows = []
    for _ in range(samples):
        once = random.integers(material.specials, material.vocabulary, span)
        rows.append(np.concatenate([[material.begin], once, once]))
    right = [
        float((scores[span + 1 : -1].argmax(-1).numpy() == ids[span + 2 :]).mean())
        for ids, scores in logits(model, rows)
    ]
    return bootstrap(f"induction, {span} random tokens said twice", np.array(right), target=target)


@dataclass(frozen=True)
class FactRow:
    """A text with facts at random places and a question about one of them at its end, answered.

    ``ids`` are its tokens, the `DIGITS` of the answer last; ``statement`` the positions at which the fact was stated.
    """

    ids: np.ndarray
    statement: slice


def fact_row(material: Material, random: np.random.Generator, length: int, distractors: int) -> FactRow:
    """A row of ``length`` tokens between whose sentences ``1 + distractors`` facts stand; the first is asked for."""
    known = material.facts(random, 1 + distractors, digits=DIGITS)
    pieces: list[tuple[float, Row]] = [
        (float(random.random()), material.say(pick(random, STATEMENTS), fact, 0.0)) for fact in known
    ]
    stated = pieces[0][1][0]
    question = pick(random, QUESTIONS).removesuffix(".")
    pieces.append((1.0, material.say(question, known[0], 1.0)))
    said = sum(len(row[0]) for _, row in pieces)
    if said >= length:
        raise ValueError(
            f"{1 + distractors} facts and a question take {said} tokens; a text of {length} has no room for them"
        )
    ids, _ = between_sentences(material, random, pieces, length)
    start = _find(ids, stated)
    return FactRow(ids, slice(start, start + len(stated)))


def retrieval(
    model: Module, material: Material, length: int, distractors: int, samples: int, target: float | None = None
) -> Figure:
    """How often all five digits are the likeliest, each after the right ones before it: what greedy decoding would say."""
    random = np.random.default_rng((SEED, length, distractors))
    rows = [fact_row(material, random, length, distractors) for _ in range(samples)]
    answers = (
        bool((scores[-DIGITS - 1 : -1].argmax(-1).numpy() == ids[-DIGITS:]).all())
        for ids, scores in logits(model, [row.ids for row in rows])
    )
    return proportion(f"facts, {length:,} tokens, {distractors} distractors", sum(answers), samples, target)


def heads(model: Module, material: Material, samples: int) -> Iterator[Figure]:
    """The head that does each of four things most, and how much of its attention it gives to it."""
    random = np.random.default_rng(SEED)
    begin, span, length = np.array([material.begin]), 128, 512
    prose = [np.concatenate([begin, material.books.window(random, length - 1)]) for _ in range(samples)]
    share = seen(model, prose, regard.Mass({"first": [0]})).mass[..., 1:, 0]
    yield strongest("on the first token (sink)", share.mean("query").values)
    share = seen(model, prose, regard.At("previous")).at[..., 0]
    yield strongest("on the token before", share.mean("query").values)
    twice = [np.tile(random.integers(material.specials, material.vocabulary, span), 2) for _ in range(samples)]
    said = [np.concatenate([begin, ids]) for ids in twice]
    share = seen(model, said, regard.At("induction")).at[..., span + 1 : -1, 0]
    yield strongest("on what followed before (induction)", share.mean("query").values)
    rows = [fact_row(material, random, length, 4) for _ in range(samples)]
    targets = torch.full((samples, length), -1)
    for number, row in enumerate(rows):
        answer = row.statement.start + _find(row.ids[row.statement], row.ids[-DIGITS:])
        targets[number, -DIGITS - 1 : -1] = torch.arange(answer, answer + DIGITS)
    share = seen(model, [row.ids for row in rows], regard.At(targets={"answer": targets})).at[..., -DIGITS - 1 : -1, 0]
    yield strongest("on the digit to be told (retrieval)", share.mean("query").values)


def seen(model: Module, rows: Sequence[np.ndarray], statistic: regard.Statistic) -> xarray.Dataset:
    """What one statistic reads of a batch."""
    with torch.inference_mode(), regard.watch(model, statistic) as recording:
        model(input_ids=torch.from_numpy(np.stack(rows)).to(next(model.parameters()).device), use_cache=False)
    return recording.dataset()


def strongest(what: str, shares: np.ndarray) -> Figure:
    """The head with the largest mean of (layer, batch, head) shares."""
    means = shares.mean(1)
    layer, head = np.unravel_index(means.argmax(), means.shape)
    return bootstrap(f"share of head {layer}.{head} {what}", shares[layer, :, head])


def _find(tokens: np.ndarray, part: np.ndarray) -> int:
    """Where a part begins."""
    return int(np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, len(part)) == part).all(1))[0])


def bits_per_byte(model: Module, tokenizer: Any, texts: list[str], context: int) -> Figure:
    """``−Σ log₂ p / bytes``, every token with at least half a context before it, but for a book's beginning."""
    stride = context // 2
    bits, sizes = [], []
    for text in texts:
        ids = np.array(tokenizer(text, verbose=False)["input_ids"])
        starts = range(0, max(1, len(ids) - stride), stride)
        windows = [ids[start : start + context] for start in starts]
        full, rest = [window for window in windows if len(window) == context], [w for w in windows if len(w) < context]
        scored = [*logits(model, full), *(pair for window in rest for pair in logits(model, [window]))]
        for number, (window, scores) in enumerate(scored):
            each = -scores[:-1].log_softmax(-1).gather(-1, torch.from_numpy(window[1:])[:, None])[:, 0] / math.log(2)
            new = 0 if number == 0 else stride - 1
            bits.append(float(each[new:].sum()))
            sizes.append(len(tokenizer.decode(window[1 + new :], skip_special_tokens=True).encode()))
    rates, weights = np.array(bits) / np.array(sizes), np.array(sizes, float)
    return bootstrap("bits per byte, regard-mini", rates, weights)


def baselines(tokenizer: Any, train: Books, texts: list[str]) -> list[Figure]:
    """Bits per byte of gzip and of a 5-gram model of the same tokens, trained on the same books."""
    size = sum(len(text.encode()) for text in texts)
    zipped = 8 * sum(len(gzip.compress(text.encode(), 9)) for text in texts) / size
    model = KneserNey(train.tokens, len(tokenizer))
    bits = 0.0
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        start = np.full(ORDER - 1, tokenizer.eos_token_id)
        bits -= float(np.log2(model.probabilities(np.concatenate([start, ids]))).sum())
    return [
        Figure("bits per byte, gzip -9", zipped, zipped, zipped, len(texts)),
        Figure(f"bits per byte, {ORDER}-gram (Kneser–Ney)", bits / size, bits / size, bits / size, len(texts)),
    ]


def figures(
    model: Module, tokenizer: Any, train: Books | None, folder: Path, samples: int, with_text: bool = True
) -> Iterator[Figure]:
    """All that is measured; the 5-gram and gzip only where the training books are given."""
    material = Material(Books.read(folder, tokenizer), tokenizer, held_out=True)
    for span in (32, 128, 500):
        yield induction(model, material, span, samples, 0.95)
    for length in CONTEXTS:
        yield retrieval(model, material, length, 4, samples, {512: 0.95, 1024: 0.90}.get(length))
    for distractors in DISTRACTORS[1:]:
        yield retrieval(model, material, 1024, distractors, samples)
    yield from heads(model, material, min(samples, 64))
    if with_text:
        texts = list(books(folder))
        yield bits_per_byte(model, tokenizer, texts, CONTEXTS[-1])
        if train is not None:
            yield from baselines(tokenizer, train, texts)


def show(measured: Sequence[Figure]) -> Table:
    """One table for the terminal."""
    table = Table("what", "value", "95% interval", "asked")
    for figure in measured:
        asked = "" if figure.target is None else f"≥ {figure.target}"
        table.add_row(figure.name, f"{figure.value:.3f}", f"{figure.low:.3f} … {figure.high:.3f}", asked)
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of books that were not trained on")
    parser.add_argument("--data", type=Path, help="folder of the training books, for the 5-gram model")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train = Books.read(arguments.data, tokenizer) if arguments.data else None
    found = figures(model, tokenizer, train, arguments.held_out, arguments.samples)
    measured = list(track(found, "measuring", total=15 if train else 13))
    Console(width=120).print(show(measured))
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(figure) for figure in measured], indent=1) + "\n")


if __name__ == "__main__":
    main()
