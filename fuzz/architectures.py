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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto

import regard
from fuzz.softmaxes import Witness
from fuzz.tiny_models import inputs_of, model_classes, model_types, tiny_model

LIMIT = 20  # seconds of computing for one type; ten times as much by the clock, for the machine may be busy


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
            print(f"{row['type']:32} {row.get('class') or row['errors'][-1][:90]:40} {row.get('regard', '')[:80]}")
            for module in unseen(row):
                print(f"    not seen: {module}")
    print(f"{time.monotonic() - started:.0f} s")


def unseen(row: dict[str, Any]) -> list[str]:
    """The modules whose softmax over keys the witness saw to enter a product with values, and regard did not see."""
    layers = [layer.split("#")[0] for layer in row.get("layers", ())]
    return sorted(
        {
            softmax["module"]
            for softmax in row.get("softmaxes", ())
            if softmax["consumer"] in ("matmul", "__matmul__", "bmm", "einsum")
            and len(softmax["shape"]) >= 3
            # The product is made by the module itself, or by the one whose nn.Softmax it is.
            and not any(softmax["module"] == layer or softmax["module"].startswith(f"{layer}.") for layer in layers)
        }
    )


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
            yield row | {"seconds": round(time.monotonic() - began, 2)}


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
        witness = Witness(model)
        with torch.no_grad(), _counted() as counts, witness.following():
            model(**inputs)
        for softmax in witness.softmaxes:
            softmax.returned = False
        row = {
            "type": model_type, "class": type(model).__name__, "how": how, "attention": model.config._attn_implementation,
            "supports_sdpa": bool(getattr(model, "_supports_sdpa", False)),
            "implementations": _implementations(model),
            "inputs": {name: list(value.shape) for name, value in inputs.items() if hasattr(value, "shape")},
            "sdpa": witness.sdpa, "sdpa_dispatched": counts["scaled_dot_product_attention"],
            "softmax_dispatched": counts["softmax.int"], "eager": witness.eager,
            "softmaxes": [softmax.row() for softmax in witness.softmaxes], "errors": errors,
            "witness_error": repr(getattr(witness, "error", "")),
        }  # fmt: skip
        return row | _regard(model, inputs)
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


def _regard(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        with torch.no_grad(), regard.watch(model, regard.Received()) as seen:
            model(**inputs)
        data = seen.dataset()
        return {"regard": f"sees {data.sizes.get('layer', 0)}", "layers": [str(layer) for layer in data.layer.values]}
    except BaseException as error:
        return {"regard": f"{type(error).__name__}: {str(error)[:300]}"}


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """How often each is dispatched in the block, whoever calls it."""
    counts = {"scaled_dot_product_attention": 0, "softmax.int": 0}
    inside = [False]
    library = torch.library.Library("aten", "IMPL")

    def counting(name: str, overload: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            outer, inside[0] = inside[0], inside[0] or name.startswith("scaled")
            counts[name] += not outer
            try:
                return overload._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
            finally:
                inside[0] = outer

        return counted

    try:
        for name, overload in (
            ("scaled_dot_product_attention", torch.ops.aten.scaled_dot_product_attention.default),
            ("softmax.int", torch.ops.aten.softmax.int),
        ):
            for key in ("CompositeExplicitAutograd", "Autograd"):
                library.impl(name, counting(name, overload), key)
        yield counts
    finally:
        library._destroy()


if __name__ == "__main__":
    main()
