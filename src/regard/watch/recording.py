"""What a watch has seen, as one labelled dataset."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy
from torch import Tensor

from regard.maps import TokenMap
from regard.tokens import Spelling, spelling_of
from regard.watch._sequence import Sequence
from regard.watch.statistic import Statistic

if TYPE_CHECKING:
    import xarray

    from regard.view import Plot

_ENGINE: Literal["h5netcdf"] = "h5netcdf"
_LARGE = 2**29  # bytes


class Recording:
    """The measurements of one ``regard.watch`` block: the ``seen`` of ``with regard.watch(…) as seen``.

    Attributes:
        layers: the attention calls that were seen, by the path of the module that made them, in order.
        maps: with ``keep_maps=True`` the attention maps of each layer, a list with one for each of its calls.
        token_ids: (batch, tokens) that the model was given and, in ``generate``, went on with; None if there were none.
    """

    def __init__(self, statistics: Items[Statistic], tokenizer: Any = None) -> None:
        self.layers: list[str] = []
        self.maps: dict[str, list[TokenMap]] = {}
        self.token_ids: Tensor | None = None
        self._statistics = statistics
        self._tokenizer = tokenizer
        self._sequences: dict[str, list[Sequence]] = {}

    def __repr__(self) -> str:
        said = ", ".join(repr(statistic) for statistic in self._statistics) or "maps"
        return f"Recording of {len(self.layers)} layers: {said}" if self.layers else f"Recording of nothing yet: {said}"

    def dataset(
        self, tokens: Items[str] | Items[Items[str]] | None = None, beam_indices: Tensor | None = None
    ) -> xarray.Dataset:
        """Everything measured: variables over (layer, batch, head, …), NaN where layers differ in length or heads.

        ``layer`` holds module paths. If the block held several independent passes, the first dimension is ``pass``.

        Raises:
            MemoryError: more than half a gigabyte for layers that differ so much in length or heads that most is gaps.

        Args:
            tokens: the text's tokens, or one list for each batch row; they become the coordinates ``query_token`` and
                ``key_token``. By default those of ``token_ids``, where the watch was given a tokenizer and its block held one
                text that all layers saw from end to end.
            beam_indices: what ``generate`` returns of that name under beam search. Without it a batch row is a beam's
                slot, which changes hands between steps; with it, one of the sequences returned.
        """
        import xarray

        measured = {layer: [s for s in sequences if s.parts] for layer, sequences in self._sequences.items()}
        measured = {layer: sequences for layer, sequences in measured.items() if sequences}
        every = self._statistics if measured else ()
        parts = [statistic.finish(_variables(statistic, measured, beam_indices)) for statistic in every]
        dataset = xarray.merge(parts, join="outer", compat="no_conflicts") if parts else xarray.Dataset()
        if "pass" in dataset.dims and dataset.sizes["pass"] == 1:
            dataset = dataset.isel({"pass": 0}, drop=True)
        if tokens is not None:
            return with_tokens(dataset, tokens)
        return dataset if beam_indices is not None else self._labelled(dataset)

    def _labelled(self, dataset: xarray.Dataset) -> xarray.Dataset:
        """The dataset with the tokens that were read, where they are known for every position."""
        ids, sizes = self.token_ids, dataset.sizes
        if self._tokenizer is None or ids is None or "pass" in sizes or sizes.get("batch") != len(ids):
            return dataset
        if any(sizes.get(dim, ids.shape[1]) != ids.shape[1] for dim in ("query", "key")):
            return dataset
        tokens = [self._tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        return with_tokens(dataset, tokens, spelling_of(self._tokenizer))

    def save(self, path: str | Path, tokens: Items[str] | Items[Items[str]] | None = None) -> None:
        """Write the dataset to one netCDF file, which ``regard.load`` and xarray read."""
        save(self.dataset(tokens), path)

    @cached_property
    def plot(self) -> Plot:
        """Pictures of the dataset: ``plot.heads(statistic)``, ``plot.tokens()``, ``plot.map(layer, head)``."""
        from regard.view import Plot

        return Plot(self.dataset())


def save(dataset: xarray.Dataset, path: str | Path) -> None:
    """Write a dataset to one netCDF file, with a checksum at its end, which readers of netCDF pass over.

    What stands at ``path`` is replaced once everything is written. Words that netCDF cannot hold, with NUL or half of a
    surrogate pair in them, are written as ``\\x00`` and ``\\ud800``, backslashes among them twice, and the variable says so
    by its attribute ``escaped``; `load` reads them back as they were.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    written = io.BytesIO()
    _changed(dataset, _escaped).to_netcdf(written, engine=_ENGINE)
    content = written.getvalue()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content + _checksum(content))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path) -> xarray.Dataset:
    """Read a dataset that ``Recording.save`` or ``regard look --save`` wrote.

    Raises:
        ValueError: a file that is not as it was written, or was not written by them.
    """
    import xarray

    whole = Path(path).read_bytes()
    size = len(_checksum(b""))
    content, checksum = whole[:-size], whole[-size:]
    if checksum != _checksum(content):
        raise ValueError(
            f"{path} is not as regard saved it: its checksum does not match, so that it is damaged or cut off, or was "
            "written by something else; xarray.load_dataset reads any netCDF file as it is"
        )
    return _changed(xarray.load_dataset(io.BytesIO(content), engine=_ENGINE), _unescaped)


def _checksum(content: bytes) -> bytes:
    return b"\nsha256 " + hashlib.sha256(content).hexdigest().encode()


_UNWRITABLE = re.compile(r"[\x00\ud800-\udfff]")
_ESCAPES = re.compile(r"\\(\\|x00|u[0-9a-f]{4})")


def _changed(dataset: xarray.Dataset, change: Callable[[xarray.Variable], xarray.Variable]) -> xarray.Dataset:
    """The dataset with each of its variables of words changed."""
    words = {name: variable for name, variable in dataset.variables.items() if variable.dtype.kind in "OU"}
    changed = {name: change(variable) for name, variable in words.items()}
    return dataset.assign({name: variable for name, variable in changed.items() if variable is not words[name]})


def _escaped(words: xarray.Variable) -> xarray.Variable:
    if not any(_UNWRITABLE.search(str(word)) for word in words.values.flat):
        return words
    return _each(words, lambda word: re.sub(r"[\\\x00\ud800-\udfff]", _escape, word), words.attrs | {"escaped": 1})


def _escape(found: re.Match[str]) -> str:
    return {"\\": "\\\\", "\0": "\\x00"}.get(found.group()) or f"\\u{ord(found.group()):04x}"


def _unescaped(words: xarray.Variable) -> xarray.Variable:
    if "escaped" not in words.attrs:
        return words
    attributes = {name: value for name, value in words.attrs.items() if name != "escaped"}
    return _each(words, lambda word: _ESCAPES.sub(_unescape, word), attributes)


def _unescape(found: re.Match[str]) -> str:
    return "\\" if found.group(1) == "\\" else chr(int(found.group(1)[1:], 16))


def _each(words: xarray.Variable, change: Callable[[str], str], attributes: Mapping[str, object]) -> xarray.Variable:
    import xarray

    changed = numpy.array([change(str(word)) for word in words.values.flat], dtype=object).reshape(words.shape)
    return xarray.Variable(words.dims, changed, attributes)


_Measured = dict[str, list[Sequence]]


def _variables(statistic: Statistic, measured: _Measured, beam_indices: Tensor | None) -> xarray.Dataset:
    import xarray

    dimensions = statistic.dimensions().items()
    return xarray.Dataset({name: _variable(name, dims, statistic, measured, beam_indices) for name, dims in dimensions})


def _variable(
    name: str, dims: tuple[str, ...], statistic: Statistic, measured: _Measured, beam_indices: Tensor | None
) -> xarray.DataArray:
    """One variable of all layers and passes, (pass, layer, batch, head, *dims), NaN where some are shorter."""
    import xarray

    slots = max(part.measured[name].shape[0] for sequences in measured.values() for s in sequences for part in s.parts)
    joined = {
        layer: [s.join(name, dims, _rows(s, name, beam_indices, slots)) for s in sequences]
        for layer, sequences in measured.items()
    }
    heads = {layer: sequences[0].parts[0].heads for layer, sequences in measured.items()}
    every_head = sorted({head for index in heads.values() for head in index})
    arrays = [array for sequences in joined.values() for array in sequences]
    batch, _, *sizes = [max(array.shape[axis] for array in arrays) for axis in range(arrays[0].ndim)]
    numbers = _numbered(measured)
    passes = 1 + max(number for own in numbers.values() for number in own)
    _check_size(name, (passes, len(joined), batch, len(every_head), *sizes), arrays)
    full = numpy.full((passes, len(joined), batch, len(every_head), *sizes), numpy.nan, dtype=arrays[0].dtype)
    for number, (layer, sequences) in enumerate(joined.items()):
        columns = [every_head.index(head) for head in heads[layer]]
        for index, array in zip(numbers[layer], sequences, strict=True):
            inner: tuple[Any, ...] = tuple(slice(size) for size in array.shape[2:])
            for column, values in zip(columns, array.swapaxes(0, 1), strict=True):
                full[(index, number, slice(array.shape[0]), column, *inner)] = values
    coordinates: dict[str, Any] = {"layer": list(joined), "head": every_head, "batch": range(batch)}
    coordinates |= {dim: range(size) for dim, size in zip(dims, sizes, strict=True)}
    coordinates |= {dim: labels for dim, labels in statistic.coordinates().items() if dim in dims}
    labels = {dim: list(values) for dim, values in coordinates.items()}
    return xarray.DataArray(
        full, labels, ("pass", "layer", "batch", "head", *dims), name, attrs=dict(statistic.attributes())
    )


def _check_size(name: str, shape: tuple[int, ...], arrays: Items[numpy.ndarray]) -> None:
    """Refuse to fill a block that is mostly gaps, where layers differ much in length or heads."""
    size, measured = math.prod(shape) * arrays[0].itemsize, sum(array.nbytes for array in arrays)
    if size > _LARGE and size > 4 * measured:
        raise MemoryError(
            f"the dataset would hold {name} as one block of shape {shape}, {size / 1e9:.1f} GB for {measured / 1e9:.3f} GB "
            "measured, since layers differ in length or heads; watch them in blocks of their own, chosen with layers="
        )


def _numbered(measured: _Measured) -> dict[str, list[int]]:
    """The place of each layer's texts along the dimension "pass".

    The n-th text of each layer is the same one, unless layers saw different numbers of them, as after an interrupt: then
    those are the same that the same pass began.
    """
    if len({len(sequences) for sequences in measured.values()}) == 1:
        return {layer: list(range(len(sequences))) for layer, sequences in measured.items()}
    begun = sorted({sequence.first_pass for sequences in measured.values() for sequence in sequences})
    return {layer: [begun.index(sequence.first_pass) for sequence in own] for layer, own in measured.items()}


def _rows(sequence: Sequence, name: str, beam_indices: Tensor | None, slots: int) -> list[Tensor | None]:
    """For each part the batch rows that make up the sequences returned by a beam search."""
    if beam_indices is None:
        return [None] * len(sequence.parts)
    beam_indices = beam_indices.cpu()
    rows: list[Tensor | None] = []
    for step, part in enumerate(sequence.parts):
        if step >= beam_indices.shape[1]:
            raise ValueError(
                f"beam_indices has {beam_indices.shape[1]} steps, but {len(sequence.parts)} were seen; pass those of "
                "the one generate() call in the block"
            )
        own = part.measured[name].shape[0]  # an encoder runs once for all beams of a text
        slot = beam_indices[:, step]
        rows.append(slot.where(slot < 0, slot // (slots // own)))
    return rows


def with_tokens(
    dataset: xarray.Dataset, tokens: Items[str] | Items[Items[str]], spelling: Spelling | None = None
) -> xarray.Dataset:
    """The dataset with the text's tokens, or one list for each batch row, as coordinates; they say how they are spelled.

    Raises:
        ValueError: other numbers of rows or tokens than the dataset has; only the shorter texts of a batch may have fewer.
    """
    rows = [cast("list[str]", list(tokens))] if isinstance(tokens[0], str) else [list(row) for row in tokens]
    batch = dataset.sizes["batch"]
    if len(rows) not in (1, batch):
        raise ValueError(f"tokens has {len(rows)} rows, the dataset a batch of {batch}")
    longest = max(len(row) for row in rows)
    for dim in ("query", "key"):
        if dim not in dataset.sizes:
            continue
        size = dataset.sizes[dim]
        if longest != size:
            raise ValueError(
                f"tokens has {longest} tokens, the dataset {size} positions along {dim!r}; the token that "
                "generate writes last is never read"
            )
        padded = [[*row, *[""] * (size - len(row))] for row in rows] * (batch if len(rows) == 1 else 1)
        attributes = {"spelling": spelling} if spelling else {}
        labels = (("batch", dim), numpy.array(padded, dtype=object), attributes)
        dataset = dataset.assign_coords({f"{dim}_token": labels})
    return dataset
