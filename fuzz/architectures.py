"""Runs a small model of every type of transformers and says where each attends, and what regard sees of it.

python -m fuzz.architectures [--only NAME…] [--for SECONDS] [--out results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto

import regard
from fuzz.softmaxes import Matrix, Witness, tensors
from fuzz.tiny_models import inputs_of, model_classes, model_types, tiny_model

TOLERANCE = 1e-4
LIMIT = 60  # seconds of computing for one type; ten times as much by the clock, for the machine may be busy


def main() -> None:
    """Run the types that the results do not have yet, as long as told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--for", dest="seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    arguments = parser.parse_args()
    known = {json.loads(line)["type"] for line in arguments.out.open()} if arguments.out.exists() else set()
    names = arguments.only or [name for name in model_types() if name not in known]
    started = time.monotonic()
    with arguments.out.open("a") as file:
        for row in rows(names, arguments.workers, started + arguments.seconds):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['type']:32} {row['verdict']:16} {row.get('class') or row['errors'][0][:120]}", flush=True)
            for check in row.get("checks", ()):
                for what in ("wrong", "unseen", "named", "refused"):
                    if check[what] and row["verdict"] != "agrees":
                        print(f"    {check['attention']}, {what}: {str(check[what])[:300]}")
    print(
        f"{time.monotonic() - started:.0f} s: {dict(Counter(json.loads(line)['verdict'] for line in arguments.out.open()))}"
    )


def verdict(row: dict[str, Any]) -> str:
    """What came of a type: one word, or two."""
    checks = row.get("checks")
    if not checks:
        return "not run"
    if any(check["wrong"] for check in checks):
        return "wrong"
    if any(check["unseen"] and not (check["named"] or check["refused"]) for check in checks):
        return "unseen, unnamed"
    if any(check["unseen"] for check in checks):
        return "refused" if any(check["refused"] for check in checks) else "unseen, named"
    return "agrees" if any(check["agree"] for check in checks) else "no attention"


def rows(names: list[str], workers: int, until: float) -> Iterator[dict[str, Any]]:
    """The observations, each made in a process of its own, which is ended where it takes too long."""
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: dict[Any, Any] = {}
    while running or (waiting and time.monotonic() < until):
        while waiting and len(running) < workers and time.monotonic() < until:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(name, sender), daemon=True)
            process.start()
            sender.close()
            running[name] = (process, receiver, time.monotonic())
        for name, (process, receiver, began) in list(running.items()):
            late = time.monotonic() - began > 10 * LIMIT
            if not (receiver.poll(0.02) or late):
                continue
            try:
                row = {"type": name, "errors": [f"longer than {10 * LIMIT} s"]} if late else receiver.recv()
            except EOFError:
                row = {"type": name, "errors": [f"the process died, or computed for {LIMIT} s"]}
            process.kill()
            process.join()
            del running[name]
            yield row | {"verdict": verdict(row), "seconds": round(time.monotonic() - began, 2)}


def _send(name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        row = observe(name)
    except BaseException as error:
        row = {"type": name, "errors": [_said(error)]}
    sender.send(row)


def observe(model_type: str) -> dict[str, Any]:
    """One type: a model, its softmaxes, and what regard says of it."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    errors: list[str] = []
    for model, inputs, how in _runs(model_type, errors):
        row: dict[str, Any] = {
            "type": model_type, "class": type(model).__name__, "how": how, "errors": errors,
            "implementations": _implementations(model),
            "inputs": {name: list(value.shape) for name, value in inputs.items() if hasattr(value, "shape")},
            "checks": [_check(model, inputs)],
        }  # fmt: skip
        if row["implementations"] != ["eager"]:
            try:
                model.set_attn_implementation("eager")
            except Exception as error:  # a part of it has none
                errors.append(_said(error))
            else:
                row["checks"].append(_check(model, inputs))
        return row
    return {"type": model_type, "errors": errors}


def _implementations(model: nn.Module) -> list[str]:
    configs = (getattr(module, "config", None) for module in model.modules())
    return sorted({str(getattr(config, "_attn_implementation", None)) for config in configs if config is not None})


def _runs(model_type: str, errors: list[str]) -> Iterator[tuple[nn.Module, dict[str, Any], str]]:
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    classes = model_classes(model_type)
    if not classes:
        errors.append("no model class of its own")
    for narrow, shallow in ((True, True), (True, False), (False, True)):
        for kind in classes[:3]:
            form = f"{'narrow' if narrow else 'wide'}, {'shallow' if shallow else 'deep'}"
            try:
                model = tiny_model(kind, config_class, narrow, shallow)
            except Exception as error:
                errors.append(f"{kind.__name__}, {form}: {_said(error)}")
                continue
            for number, inputs in enumerate(inputs_of(model)):
                try:
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:
                    errors.append(f"{kind.__name__}, inputs {number}: {_said(error)}")
                    continue
                yield model, inputs, f"{form}, inputs {number}"
                return


def _said(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:200]} ({Path(place.filename).name}:{place.lineno})"


def _check(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Where the model attends, by the witness, held to what regard sees there."""
    witness = Witness(model)
    plain = _outputs(model, inputs, witness.following())
    check: dict[str, Any] = {
        "attention": _implementations(model), "agree": 0, "worst": 0.0, "wrong": [], "unseen": [], "named": "",
        "refused": "", "witness_error": repr(getattr(witness, "error", "")),
    }  # fmt: skip
    if any(bool(tensor.isnan().any()) for tensor in plain if tensor.is_floating_point()):
        return check | {"refused": "the model's own output holds NaN"}
    seen: list[Matrix] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            watched = _outputs(model, inputs, regard.watch(model, _Sums(seen)))
            _hold_outputs(plain, watched, check)
        except Exception as error:
            if "no attention call was seen" in str(error):
                check["refused"] = str(error)
            else:
                check["wrong"].append(_said(error))
    check["named"] = "; ".join(str(one.message) for one in caught if "was not seen" in str(one.message))
    _hold_matrices(witness.matrices, seen, check)
    return check


class _Sums(regard.Statistic):
    """What `weighted` says of each matrix that regard sees, in the order of the calls."""

    name, dims = "sums", ("key",)

    def __init__(self, seen: list[Matrix]) -> None:
        self.seen = seen

    def measure(self, attention: Any, call: Any) -> Tensor:
        weights = torch.arange(attention.shape[2]).cos()
        sums = (attention.T @ weights.expand(*attention.shape[:2], -1).unsqueeze(-1)).squeeze(-1)
        self.seen.append(Matrix(call.place.path, sums.double().flatten()))
        return sums


def _outputs(model: nn.Module, inputs: dict[str, Any], following: Any) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw numbers
    with torch.no_grad(), following:
        return list(tensors(model(**inputs)))


def _hold_outputs(plain: list[Tensor], watched: list[Tensor], check: dict[str, Any]) -> None:
    for one, other in zip(plain, watched, strict=True):
        if one.shape != other.shape:
            check["wrong"].append(f"an output is {list(other.shape)} and was {list(one.shape)}")
        elif one.numel():
            _hold(one.double(), other.double(), "an output", check)


def _hold_matrices(witnessed: list[Matrix], seen: list[Matrix], check: dict[str, Any]) -> None:
    """Each matrix seen to the one most like it, if there is any, that its module or one beside it multiplied with values."""
    left = list(witnessed)
    for matrix in seen:
        parent = matrix.module.split("#")[0].rpartition(".")[0]
        near = [one for one in left if one.module == parent or one.module.startswith(f"{parent}." if parent else "")]
        alike = [one for one in near if one.sums.shape == matrix.sums.shape]
        if alike:
            nearest = min(alike, key=lambda one: float((one.sums - matrix.sums).abs().max()))
            left.remove(nearest)
            check["agree"] += _hold(nearest.sums, matrix.sums, matrix.module, check)
    check["unseen"] = sorted({matrix.module for matrix in left})


def _hold(wanted: Tensor, value: Tensor, what: str, check: dict[str, Any]) -> bool:
    """Note how far it is off, by its largest number, and whether that is wrong."""
    wanted, value = wanted.nan_to_num(), value.nan_to_num()
    off = float((wanted - value).abs().max() / wanted.abs().max().clamp(min=1.0))
    check["worst"] = max(check["worst"], off)
    if off > TOLERANCE:
        check["wrong"].append(f"{what} is off by {off:.1e}")
    return off <= TOLERANCE


if __name__ == "__main__":
    main()
