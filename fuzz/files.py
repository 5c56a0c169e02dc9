"""Saved files that were damaged: they are refused, or hold what was saved; never something else without a word.

python -m fuzz.files [--minutes 5] [--seed SEED]
"""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import torch
import xarray as xr
from torch.nn.functional import scaled_dot_product_attention

import regard
from fuzz.drawing import Check, main


@cache
def recording() -> tuple[bytes, xr.Dataset]:
    """A recording as it is saved, and as it is."""
    query, key = torch.randn(2, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    with regard.watch(regard.Entropy(), regard.Received(), regard.Mass({"sink": [0]})) as seen:
        scaled_dot_product_attention(query, key, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seen.nc"
        seen.save(path)
        return path.read_bytes(), regard.load(path).load()


@cache
def recipe() -> tuple[bytes, str]:
    """Edits as they are saved, and in writing."""
    edits = [regard.Reweight([1, 2], 3.0, heads=[1]), regard.Block(slice(0, 4)), regard.Gate(0.25, layers=2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.json"
        regard.save_recipe(path, edits)
        return path.read_bytes(), repr(regard.load_recipe(path))


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bits turned, an end cut off, a piece lost or zeroed."""
    data = bytearray(content)
    place = draw.randrange(len(data))
    match draw.choice(("bits", "cut", "lost", "zeros")):
        case "bits":
            for _ in range(draw.choice((1, 1, 8))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "cut":
            del data[place:]
        case "lost":
            del data[place : place + draw.randint(1, 64)]
        case "zeros":
            size = min(draw.randint(1, 64), len(data) - place)
            data[place : place + size] = bytes(size)
    return bytes(data)


def of_recording(draw: random.Random) -> str:
    """Numbers that were changed are not given out as those that were seen."""
    content, expected = recording()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seen.nc"
        path.write_bytes(damaged(draw, content))
        try:
            found = regard.load(path).load()
        except (OSError, ValueError) as error:
            return f"refused: {error}"
    for name in expected.variables:
        if name not in found.variables or not expected[name].equals(found[name]):
            raise AssertionError(f"{name} was loaded as something else:\n{found.get(name)}\n{expected[name]}")
    return "as it was"


def of_recipe(draw: random.Random) -> str:
    """Edits are refused where they cannot be read, with an error that says so."""
    content, _ = recipe()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.json"
        path.write_bytes(damaged(draw, content))
        try:
            return f"loaded: {regard.load_recipe(path)!r}"
        except (ValueError, TypeError, OSError) as error:
            return f"refused: {error}"


CHECKS: dict[str, Check] = {"recordings": of_recording, "recipes": of_recipe}

if __name__ == "__main__":
    main("fuzz.files", __doc__, CHECKS)
