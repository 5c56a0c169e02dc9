"""Without a folder of books, benches ask for facts about names that training never had."""

from typing import Any

import numpy as np
from bench.held_out import held_out_books
from torch.nn import Module
from training.evaluate import fact_row
from training.tasks import Material, is_held_out

from bench import steering_quality


def test_the_chapter_that_ships_serves(mini: tuple[Module, Any]) -> None:
    _, tokenizer = mini
    books = held_out_books(None, tokenizer)
    material = Material(books, tokenizer, held_out=True)
    assert len(material.names) == len(books.names) >= 5
    assert all(map(is_held_out, books.names))
    random = np.random.default_rng(0)
    length, distractors = steering_quality.LENGTH, max(steering_quality.DISTRACTORS)
    row = fact_row(material, random, length, distractors)
    assert row.ids.shape == (length,)
