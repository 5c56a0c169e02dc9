"""Saved datasets: whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from torch import nn

import regard
from regard.watch.recording import load, save


@pytest.fixture
def dataset() -> xarray.Dataset:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 6, 8)
    with torch.no_grad(), regard.watch(module, regard.Entropy(), regard.Received()) as seen:
        module(x, x, x)
    return seen.dataset(["a", "\0", "\ud800", "\\x00", "e", "f"])


def test_what_is_saved_is_loaded_and_is_netcdf(dataset: xarray.Dataset, tmp_path: Path) -> None:
    save(dataset, tmp_path / "seen.nc")
    assert load(tmp_path / "seen.nc").equals(dataset)
    np.testing.assert_array_equal(xarray.load_dataset(tmp_path / "seen.nc").entropy, dataset.entropy)
    assert [file.name for file in tmp_path.iterdir()] == ["seen.nc"]


def test_a_damaged_file_is_refused(dataset: xarray.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "seen.nc"
    save(dataset, path)
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            load(path)
        path.write_bytes(good[:place])
        with pytest.raises(ValueError, match="checksum"):
            load(path)


def test_a_disk_that_is_full_leaves_the_good_file(
    dataset: xarray.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "seen.nc"
    save(dataset, path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(dataset.isel(head=[0]), path)
    assert [file.name for file in tmp_path.iterdir()] == ["seen.nc"]
    assert load(path).equals(dataset)
