"""Which heads matter: what a metric becomes when one head after the other is ablated or patched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from regard.runtime import AttentionCall, HiddenCall, Proceed, Site, entered
from regard.steer._capture import capture
from regard.steer.metrics import Metric
from regard.steer.sweep_result import SweepResult
from regard.tokens import Heads, Layers, Selection

Kind = Literal["zero", "mean", "resample", "gate", "patch"]
Inputs = Tensor | Mapping[str, Any]

if TYPE_CHECKING:
    import xarray

_TOKENS = 2048
"""About so many are run at once: the logits of a large vocabulary are most of what a pass holds."""


def sweep(
    model: Module,
    inputs: Inputs,
    metric: Metric,
    *,
    kind: Kind = "zero",
    by: float | None = None,
    source: Inputs | capture | None = None,
    layers: Layers | None = None,
    heads: Heads | Mapping[Any, Heads] | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda path, total: None,
) -> SweepResult:
    """What a metric of the model's output becomes when a single head's output ``O = P V`` is changed, for head after head.

    Many heads are tried in one pass: the inputs are repeated along the batch, and each copy has one head changed.

    What the output of the head becomes, at every token: with "zero" 0; with "gate" ``by · O``; with "mean" its mean over all
    tokens and texts of ``source``, without padding where that has an ``attention_mask``; with "resample" that of another text
    of ``source`` at the same position; with "patch" that of the same text of ``source``, such as a counterfactual one.

    Args:
        model: as for `regard.steer`, in evaluation mode.
        inputs: its arguments by name, or its one tensor. Every tensor whose first dimension is as long as the first tensor's
            is taken to have the texts there.
        metric: a function of what the model returns for ``inputs``, of one number for each text or one for all, such as
            `regard.logit_difference` or `regard.log_probability`.
        kind: what is done to each head.
        by: the factor of "gate".
        source: other inputs for "mean", "resample" and "patch", for the last two with as many tokens; for "mean" and
            "resample" by default the inputs themselves. For "patch" also a run of the inputs that `regard.capture` kept
            with ``outputs=True``, such as a steered one: then the change tells through which heads the edits did most.
        layers: which to sweep, as for `regard.watch`; all by default.
        heads: which heads, in the same way.
        batch: run so many texts at once, 1 to repeat nothing; by default as many as have about 2,048 tokens.
        seed: of "resample": the texts are put in a circle by chance, and each takes the outputs of the next.
        progress: called for each head that was tried, with its layer's path and the number of heads.

    Raises:
        RuntimeError: no attention call was seen.
        IndexError, ValueError: layers or heads that do not exist; a mixer among the layers, which has no heads to change; a
            source of other shape; a model in training mode, whose dropout would drown the change; a metric of other shape,
            or that is NaN; inputs that do not have their texts in the first dimension.

    P. Michel, O. Levy, G. Neubig (2019), Are Sixteen Heads Really Better than One? J. Vig et al. (2020), Investigating Gender
    Bias in Language Models Using Causal Mediation Analysis. L. Chan et al. (2022), Causal Scrubbing, for "resample".

    >>> import torch, regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is 4", return_tensors="pt")
    >>> right, wrong = tokenizer.convert_tokens_to_ids(["8", "7"])
    >>> found = regard.sweep(model, inputs, regard.logit_difference(right, wrong), layers=[2, 3])
    >>> found.change.dims, found.change.shape
    (('layer', 'head'), (2, 8))
    """
    _check(model, kind, by, source, batch)
    started = time.perf_counter()
    texts = _count(inputs)
    with torch.no_grad():
        every = _Calls()
        output = _run(model, inputs, every)
        plain = _measured(metric, output, "the model as it is")
        chosen = _chosen(every, Selection(layers, heads))
        if kind in ("zero", "gate"):
            change = _scaled(by or 0.0)
        else:
            given = inputs if source is None else source
            outputs, count = _outputs(model, given, list(chosen), texts)
            index = _index(kind, count, texts, seed, same=source is None)
            shapes = {path: every.shapes[path] for path in chosen}
            change = _replaced(_others(kind, given, outputs, count, shapes, index))
        cells = [_Cell(path, head) for path, numbers in chosen.items() for head in numbers]
        at_once = _copies(batch, texts, every)
        values: dict[_Cell, Tensor] = {}
        for start in range(0, len(cells), at_once):
            part = cells[start : start + at_once]
            edit = _OneHeadEach(part, every.shapes, change)
            output = _run(model, _repeated(inputs, texts, len(part)), edit)
            for number, cell in enumerate(part):
                values[cell] = _measured(metric, _copy_of(output, number, len(part), texts), str(cell), plain.shape)
                progress(cell.path, len(cells))
    dataset = _dataset(chosen, values, plain)
    dataset = dataset.assign_coords(number=("layer", [every.numbers[path] for path in chosen]))
    dataset.attrs |= {"kind": kind, "metric": getattr(metric, "__name__", type(metric).__name__)}
    dataset.attrs |= {"seconds": time.perf_counter() - started} | ({} if by is None else {"by": by})
    return SweepResult(dataset)


class _Cell(NamedTuple):
    path: str
    head: int

    def __str__(self) -> str:
        return f"head {self.head} of {self.path}"


class _Calls:
    """Looks at the calls of a run, and keeps the outputs of some, (batch, heads, tokens, width)."""

    edits = outermost = False

    def __init__(self, keep: Sequence[str] = ()) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.numbers: dict[str, int] = {}
        self.mixers: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        self._keep = set(keep)

    def wants(self, site: Site) -> bool:
        return True

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        output, path = proceed(call), call.place.path
        self.numbers[path] = call.place.layer
        if isinstance(call, HiddenCall):
            self.mixers.append(path)
            return output
        self.shapes[path] = output.shape
        if path in self._keep:
            self.outputs[path] = output.detach().clone()
        return output


class _OneHeadEach:
    """Changes one head's output in each copy of the inputs."""

    edits, outermost = True, False

    def __init__(self, cells: list[_Cell], shapes: Mapping[str, torch.Size], change: _Change) -> None:
        self._cells = cells
        self._waiting = {cell.path for cell in cells}
        self._paths = frozenset(self._waiting)
        self._shapes = shapes
        self._change = change

    def wants(self, site: Site) -> bool:
        return site.path in self._paths

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        path, copies = call.place.path, len(self._cells)
        output = proceed(call).clone()
        batch, *others = self._shapes[path]
        if tuple(output.shape) != (copies * batch, *others):
            raise ValueError(
                f"{path} has outputs of shape {tuple(output.shape)} for {copies} copies of the inputs, and of "
                f"{(batch, *others)} for one; inputs must have their texts in the first dimension; batch=1 repeats nothing"
            )
        rows = output.unflatten(0, (copies, batch))
        for copy, cell in enumerate(self._cells):
            if cell.path == path:
                rows[copy, :, cell.head] = self._change(cell, rows[copy, :, cell.head])
        self._waiting.discard(path)
        return output

    def check(self) -> None:
        """Refuse a run in which not every head was changed."""
        if self._waiting:
            raise RuntimeError(f"{', '.join(sorted(self._waiting))} ran in the first pass, but not in a later one")


_Change = Callable[[_Cell, Tensor], Tensor]
"""What the output of a head, (batch, tokens, width), is changed to."""


def _run(model: Module, inputs: Inputs, looking: _Calls | _OneHeadEach) -> Any:
    with entered(looking, model) as block:
        output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    block.check()
    if isinstance(looking, _OneHeadEach):
        looking.check()
    return output


def _chosen(every: _Calls, selection: Selection) -> dict[str, list[int]]:
    """The heads to sweep, by the path of their layer."""
    number = len(every.numbers)
    paths = {layer: path for path, layer in every.numbers.items() if selection.wants(path, layer, number)}
    mixers = [path for path in paths.values() if path in every.mixers]
    if mixers:
        others = f"; choose by layers= from {', '.join(every.shapes)}" if every.shapes else ""
        raise ValueError(f"{', '.join(mixers)}: a mixer, which has no heads of attention to change{others}")
    selection.check({every.numbers[path]: path for path in every.shapes}, number)
    chosen: dict[str, list[int]] = {}
    for layer, path in paths.items():
        heads = every.shapes[path][1]
        found = selection.heads(path, layer, heads, number)
        chosen[path] = list(range(heads)) if found is None else found
    return chosen


def _scaled(by: float) -> _Change:
    return lambda cell, output: output * by


def _replaced(others: Mapping[str, Tensor]) -> _Change:
    return lambda cell, output: others[cell.path][:, cell.head]


def _outputs(model: Module, source: Inputs | capture, paths: list[str], texts: int) -> tuple[dict[str, Tensor], int]:
    """What the heads of these layers put out on the source, and how many texts that has."""
    if isinstance(source, capture):
        found = {path: source.at(path).output for path in paths if path in source.paths}
        outputs = {path: output for path, output in found.items() if output is not None}
        if found and not outputs:
            raise ValueError("the captured run has no outputs: regard.capture(model, outputs=True) keeps them")
        return outputs, texts
    kept = _Calls(keep=paths)
    _run(model, source, kept)
    return kept.outputs, _count(source)


def _index(kind: Kind, count: int, texts: int, seed: int, same: bool) -> list[int]:
    """Of which text of the source, which has so many, each text takes the outputs."""
    if kind == "patch":
        if count not in (1, texts):
            raise ValueError(f"patch: the source has {count} texts, the inputs {texts}; it needs as many, or one")
        return [text % count for text in range(texts)]
    if kind == "resample" and same and count == 1:
        raise ValueError(
            "resample: one text has no other to take outputs from; give a source, or inputs of several texts"
        )
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [following[text % count] for text in range(texts)]


def _others(
    kind: Kind,
    source: Inputs | capture,
    outputs: Mapping[str, Tensor],
    count: int,
    shapes: Mapping[str, torch.Size],
    index: list[int],
) -> dict[str, Tensor]:
    """What is put in the place of the outputs of each layer, (batch|1, heads, tokens|1, width)."""
    others: dict[str, Tensor] = {}
    for path, shape in shapes.items():
        if path not in outputs:
            raise ValueError(f"{kind}: {path} did not run on the source")
        output = outputs[path]
        if kind == "mean" and not isinstance(source, capture):
            others[path] = _mean(output, _token_mask(source, path, output))
            continue
        others[path] = output.unflatten(0, (count, -1))[index].flatten(0, 1)
        if others[path].shape != shape:
            raise ValueError(
                f"{kind}: {path} has {shape[2]} tokens on the inputs, but {output.shape[2]} on the source, which must "
                f"have as many; its outputs are of shape {tuple(shape)} and {tuple(others[path].shape)}"
            )
    return others


def _mean(output: Tensor, mask: Tensor | None) -> Tensor:
    """Of each head, over texts and tokens, (1, heads, 1, width)."""
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    if mask is None:
        return wide.mean((0, 2), keepdim=True)
    real = mask[:, None, :, None].to(wide)
    return (wide * real).sum((0, 2), keepdim=True) / real.sum()


def _token_mask(inputs: Inputs, path: str, output: Tensor) -> Tensor | None:
    """(batch, tokens), True for real ones, as transformers names it; None where there is none."""
    if isinstance(inputs, Tensor):
        return None
    decodes = "decoder" in path and any(name.startswith("decoder_") for name in inputs)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    fits = isinstance(mask, Tensor) and mask.shape == (output.shape[0], output.shape[2])
    return mask.bool() if isinstance(mask, Tensor) and fits else None


def _count(inputs: Inputs) -> int:
    """How many texts the inputs have."""
    given = {"inputs": inputs} if isinstance(inputs, Tensor) else inputs
    for name, value in given.items():
        if not isinstance(value, Tensor | bool | int | float | str | None):
            raise TypeError(
                f"{name} is a {type(value).__name__}, which a sweep cannot repeat along the batch; inputs are tensors, "
                "numbers and flags"
            )
    first = next((value for value in given.values() if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise ValueError(
            f"inputs has no tensor with texts in its first dimension, only {', '.join(given) or 'nothing'}"
        )
    return first.shape[0]


def _copies(batch: int | None, texts: int, every: _Calls) -> int:
    if batch is not None:
        return max(1, batch // texts)
    tokens = max(shape[0] * shape[2] for shape in every.shapes.values())
    return max(1, _TOKENS // tokens)


def _repeated(inputs: Inputs, texts: int, copies: int) -> Inputs:
    def repeated(value: Any) -> Any:
        if copies == 1 or not isinstance(value, Tensor) or not value.ndim or value.shape[0] != texts:
            return value
        return value.repeat(copies, *[1] * (value.ndim - 1))

    if isinstance(inputs, Tensor):
        return repeated(inputs)  # type: ignore[no-any-return]
    return {name: repeated(value) for name, value in inputs.items()}


def _copy_of(output: Any, number: int, copies: int, texts: int) -> Any:
    """What the model would have returned for one copy alone; a number of all copies, as their loss, is NaN."""

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.ndim:
            return torch.full_like(value, math.nan) if value.is_floating_point() else value
        return value[number * texts : (number + 1) * texts] if value.shape[0] == copies * texts else value

    return output if copies == 1 else pytree.tree_map(part, output)


def _measured(metric: Metric, output: Any, what: str, shape: torch.Size | None = None) -> Tensor:
    """(batch,), or (1,) of a metric of all texts."""
    found = metric(output)
    if not isinstance(found, Tensor) or found.ndim > 1 or (shape is not None and found.reshape(-1).shape != shape):
        seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"metric must return a tensor with one number for each text, or one for all, got {seen}")
    if bool(found.isnan().any()):
        raise ValueError(
            f"metric is NaN for {what}; a number such as the output's loss is that of all copies of the inputs at once: take "
            "the metric from logits, as regard.log_probability does, or pass batch=1"
        )
    return found.detach().reshape(-1).double().cpu()


def _dataset(chosen: Mapping[str, list[int]], values: Mapping[_Cell, Tensor], plain: Tensor) -> xarray.Dataset:
    heads = sorted({head for numbers in chosen.values() for head in numbers})
    full = numpy.full((len(chosen), len(heads), len(plain)), numpy.nan)
    for layer, path in enumerate(chosen):
        for head in chosen[path]:
            full[layer, heads.index(head)] = values[_Cell(path, head)].numpy()
    import xarray

    return xarray.Dataset(
        {"metric": (("layer", "head", "batch"), full), "plain": (("batch",), plain.numpy())},
        {"layer": list(chosen), "head": heads, "batch": range(len(plain))},
    )


def _check(model: Module, kind: Kind, by: float | None, source: Inputs | capture | None, batch: int | None) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"sweep needs an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode, whose dropout would drown the change; call model.eval() first")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if (kind == "gate") != (by is not None) or (by is not None and not math.isfinite(by)):
        raise ValueError(f'by is the finite factor of kind="gate", and of no other; got kind={kind!r} and by={by!r}')
    if source is not None and kind in ("zero", "gate"):
        raise ValueError(f'{kind} has no source; choose kind="mean", "resample" or "patch"')
    if isinstance(source, capture) and kind != "patch":
        raise ValueError(f'a captured run is a source of kind="patch" alone, got kind={kind!r}')
    if source is None and kind == "patch":
        raise ValueError("patch needs a source: the inputs of the run whose outputs are put in")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
