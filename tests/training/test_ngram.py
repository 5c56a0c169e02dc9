"""The 5-gram baseline is a probability, and Kneser and Ney's."""

from collections import Counter
from typing import Any

import numpy as np
from training.ngram import KneserNey


def test_probabilities_sum_to_one() -> None:
    random = np.random.default_rng(0)
    model = KneserNey(random.integers(0, 7, 400), 7)
    for _ in range(10):
        history = random.integers(0, 7, 4)
        each = [model.probabilities(np.append(history, token))[0] for token in range(7)]
        np.testing.assert_allclose(sum(each), 1, atol=1e-12)
        assert min(each) > 0


def test_trigrams_by_definition() -> None:
    tokens = np.random.default_rng(1).integers(0, 4, 60)
    row = tokens.tolist()
    model = KneserNey(tokens, 4, order=3)
    trigrams = Counter(zip(row, row[1:], row[2:], strict=False))
    bigrams = Counter(gram[1:] for gram in trigrams)
    unigrams = Counter(gram[1:] for gram in bigrams)
    tables: dict[int, Counter[Any]] = {3: trigrams, 2: bigrams, 1: unigrams}

    def discount(table: Counter[tuple[int, ...]]) -> float:
        counts = Counter(table.values())
        return counts[1] / max(counts[1] + 2 * counts[2], 1)

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / 4
        table = tables[len(gram)]
        lower = probability(gram[1:])
        followers = [count for other, count in table.items() if other[:-1] == gram[:-1]]
        if not followers:
            return lower
        d, total = discount(table), sum(followers)
        return float(max(table[gram] - d, 0) / total + d * len(followers) / total * lower)

    wanted = [probability(gram) for gram in zip(row, row[1:], row[2:], strict=False)]
    np.testing.assert_allclose(model.probabilities(tokens), wanted, atol=1e-12)
    unseen = np.array([3, 3, 3, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    wanted = [probability(gram) for gram in zip(*(unseen.tolist()[start:] for start in range(3)), strict=False)]
    np.testing.assert_allclose(model.probabilities(unseen), wanted, atol=1e-12)


def test_too_long_for_an_integer() -> None:
    import pytest

    with pytest.raises(ValueError, match=r"6-grams of a vocabulary of 2048 do not fit into 63 bits"):
        KneserNey(np.zeros(10, int), 2048, order=6)
