"""Books that the bundled model was not trained on."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from training.books import Books
from training.tasks import is_held_out

from regard import demo

FIRST = ("Al", "Ber", "Cor", "Dor", "El", "Fen", "Gil", "Hal", "Ir", "Jas")
LAST = ("vin", "tram", "nelia", "othy", "mer", "bert", "wen", "ric", "dith", "lan")


def held_out_books(folder: Path | None, tokenizer: Any) -> Books:
    """The books of a folder; by default the chapter that ships, with names that none of the training had."""
    if folder is not None:
        return Books.read(folder, tokenizer)
    ids = tokenizer(demo.text() * 2, add_special_tokens=False, verbose=False)["input_ids"]
    names = tuple(filter(is_held_out, map("".join, product(FIRST, ("", "a", "en", "o"), LAST))))
    return Books(np.array(ids, np.uint16), names, tokenizer.convert_tokens_to_ids("."))
