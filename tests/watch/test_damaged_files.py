"""A saved recording that was damaged is refused, or is what was saved. Found by `fuzz.files`."""

from pathlib import Path

import pytest
import torch
import xarray as xr
from torch.nn.functional import scaled_dot_product_attention

import regard


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, xr.Dataset]:
    query, key = torch.randn(2, 1, 2, 12, 8).unbind()
    with regard.watch(regard.Received()) as seen:
        scaled_dot_product_attention(query, key, key)
    seen.save(tmp_path / "seen.nc")
    return tmp_path / "seen.nc", seen.dataset()


def test_an_undamaged_file_is_what_was_saved(saved: tuple[Path, xr.Dataset]) -> None:
    path, expected = saved
    assert regard.load(path).equals(expected)
    assert xr.load_dataset(path, engine="h5netcdf").equals(expected)  # with xarray alone, as any netCDF file


def test_one_bit_of_a_number_is_enough(saved: tuple[Path, xr.Dataset]) -> None:
    """HDF5 reads it without a word: only the checksum tells."""
    path, expected = saved
    content = bytearray(path.read_bytes())
    place = content.index(expected.received.values[0, 0, 0, :2].tobytes())
    content[place + 2] ^= 1
    path.write_bytes(content)
    assert not xr.load_dataset(path, engine="h5netcdf").equals(expected)
    with pytest.raises(ValueError, match=r"seen\.nc is not as regard saved it"):
        regard.load(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.95])
def test_a_file_that_was_cut_off(saved: tuple[Path, xr.Dataset], share: float) -> None:
    path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"seen\.nc is not as regard saved it"):
        regard.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        regard.load(tmp_path / "none.nc")
