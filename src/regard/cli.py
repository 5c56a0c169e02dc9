"""The command line; no logic."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit('regard: the command line needs typer and rich: pip install "regard[hf,report]"') from error

if TYPE_CHECKING:
    from regard.cache.trial import Trial
    from regard.explain.explain_text import Explained
    from regard.mixers import Mixer
    from regard.steer import SweepResult
    from regard.steer.compare import Comparison

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: one progress bar is enough, ours
console = Console(stderr=True)
TextFile = Annotated[str | None, typer.Option(metavar="FILE", help="A text file, or - for the standard input.")]
Prompt = Annotated[str | None, typer.Option(help="The text itself, in place of a file.")]
Chat = Annotated[bool, typer.Option("--chat", help="The text is a message to a chat model, read in its template.")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in a browser.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from regard import __version__

        typer.echo(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def regard(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and end.")
    ] = False,
) -> None:
    """Run attention, see it, steer it."""


@app.command()
def look(
    model: Annotated[str | None, typer.Option(help="Folder or name of a model; by default the bundled one.")] = None,
    text: TextFile = None,
    prompt: Prompt = None,
    pair: Annotated[str | None, typer.Option(help="A second text, for models that compare two.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What the decoder reads; by default what an encoder–decoder writes itself.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture, for ViT, DINO, CLIP, SigLIP and language models that see.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="A .wav file, for Whisper and its like.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("report.html"),
    save: Annotated[
        Path | None,
        typer.Option(help="Also write the statistics, as netCDF; a file for each part if there are several."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers, ranges or globs on module paths, with commas.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Read the first tokens only.")] = None,
    window: Annotated[bool, typer.Option(help="Read a text longer than the model in windows.")] = False,
    open_it: Open = False,
) -> None:
    """Report where a model looks when it reads a text, by default a chapter of a novel, a picture or a recording."""
    with _errors():
        from regard import mini
        from regard.look import look
        from regard.models import load
        from regard.tokens import parse_layers

        _quiet()
        chosen = None if layers is None else parse_layers(layers)
        _check_report(out, save)
        files = [file.name for file in (image, audio) if file]
        content, text_name = (None, "") if files and text is None and prompt is None else _read(text, prompt)
        with console.status(Text(f"loading {model or mini.name}")):
            loaded, processor = load(model or mini.path(), device, dtype)
        with _share_bar() as (announce, advance):
            seen = look(
                loaded,
                processor,
                content,
                pair=pair,
                target=target,
                image=image,
                audio=audio,
                model_name=Path(model).name if model else mini.name,
                text_name=" and ".join(filter(None, [text_name, *files])),
                layers=chosen,
                max_tokens=max_tokens,
                window=window,
                progress=advance,
                announce=announce,
            )
        out.write_text(seen.html(), encoding="utf-8")
        for note in seen.notes:
            console.print(Text(note), soft_wrap=True)
        for file in seen.save(save) if save else []:
            console.print(Text(f"statistics: {file.resolve()}"), soft_wrap=True)
        facts = seen.facts
        console.print(f"{facts.tokens:,} tokens, {facts.layers} layers of {facts.heads} heads, {facts.seconds:.1f} s")
        _show_report(out, open_it)


@app.command()
def steer(
    text: TextFile = None,
    prompt: Prompt = None,
    edit: Annotated[
        list[str] | None, typer.Option(help="Such as 'Reweight(keys=\"a passage\", by=4)'; repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A file of edits, as regard.save_recipe writes it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a language model; by default the bundled one.")
    ] = None,
    complete: Annotated[int, typer.Option(min=0, help="Also write this many tokens.")] = 0,
    likeliest: Annotated[int, typer.Option(min=1, help="Compare this many next tokens.")] = 5,
    heads: Annotated[
        int | None,
        typer.Option(min=0, help="Name so many heads that did it; by default 5, where that takes no minutes."),
    ] = None,
    chat: Chat = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Edit a model's attention and compare what it says of a text, by default a chapter, before and after."""
    with _errors():
        from regard import load_recipe, mini, parse_edit
        from regard.models import load
        from regard.steer.compare import compare

        _quiet()
        edits = [*(load_recipe(recipe) if recipe else []), *(parse_edit(written) for written in edit or [])]
        if not edits:
            raise ValueError("nothing to do: give an --edit, or a --recipe")
        content, _ = _read(text, prompt)
        with console.status(Text(f"loading {model or mini.name}")):
            loaded, tokenizer = load(model or mini.path(), device, dtype, language=True)
        with _bar() as advance:
            found = compare(
                loaded,
                tokenizer,
                content,
                edits,
                likeliest=likeliest,
                complete=complete,
                heads=heads,
                chat=chat,
                progress=advance,
            )
        _show(found)


@app.command()
def sweep(
    text: TextFile = None,
    prompt: Prompt = None,
    answer: Annotated[str | None, typer.Option(help="How the text may go on, such as ' Paris'.")] = None,
    wrong: Annotated[str | None, typer.Option(help="How else it may; the answer is compared with it.")] = None,
    kind: Annotated[str, typer.Option(help="zero, mean, gate, resample or patch.")] = "zero",
    by: Annotated[float | None, typer.Option(help="The factor of --kind gate.")] = None,
    source: Annotated[str | None, typer.Option(help="The other prompt, for mean, resample and patch.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a language model; by default the bundled one.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers, ranges or globs on module paths, with commas.")] = None,
    strongest: Annotated[int, typer.Option(min=1, help="List this many heads.")] = 10,
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("sweep.html"),
    save: Annotated[Path | None, typer.Option(help="Also write the numbers, as netCDF.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Read the first tokens only.")] = None,
    chat: Chat = False,
    open_it: Open = False,
) -> None:
    """Find the heads that matter for what a model says of a text, by changing one after the other."""
    with _errors():
        from regard import mini
        from regard.models import load
        from regard.steer.sweep_text import sweep_text
        from regard.tokens import parse_layers

        _quiet()
        chosen = None if layers is None else parse_layers(layers)
        _check_report(out, save)
        content, text_name = _read(text, prompt)
        with console.status(Text(f"loading {model or mini.name}")):
            loaded, tokenizer = load(model or mini.path(), device, dtype, language=True)
        with _bar() as advance:
            found = sweep_text(
                loaded,
                tokenizer,
                content,
                answer=answer,
                wrong=wrong,
                kind=kind,  # type: ignore[arg-type]
                by=by,
                source=source,
                layers=chosen,
                max_tokens=max_tokens,
                chat=chat,
                progress=advance,
            )
        out.write_text(found.html(Path(model).name if model else mini.name, text_name), encoding="utf-8")
        if save:
            found.save(save)
            console.print(Text(f"numbers: {save.resolve()}"), soft_wrap=True)
        _show_sweep(found, strongest)
        _show_report(out, open_it)


def _show_sweep(found: SweepResult, strongest: int) -> None:
    """The change of every head as a small picture, then the strongest in order."""
    out, change = Console(), found.change
    heads, most = change["head"].values.tolist(), float(abs(change).max()) or 1.0
    out.print(Text(f"{found.dataset.attrs['metric']}: {found.plain:.4g}\n"), soft_wrap=True)
    out.print(Text("".join(f"{head:>3}" for head in heads) + "  head", "dim"), soft_wrap=True)
    for path, row in zip(change["layer"].values.tolist(), change.values.tolist(), strict=True):
        cells = (_cell(value / most) for value in row)
        out.print(Text.assemble(*cells, ("  " + path, "dim")), soft_wrap=True)
    out.print(f"\nlargest change {most:.3g}: + − from a tenth of it, ++ −− from half", style="dim", highlight=False)
    table = Table("layer", "head", "metric", "change", box=box.SIMPLE)
    for one in found.strongest(strongest):
        table.add_row(
            one.layer,
            str(one.head),
            f"{one.metric:.4g}",
            Text(f"{one.change:+.4g}", "green" if one.change > 0 else "red"),
        )
    out.print(table)


def _cell(share: float) -> tuple[str, str]:
    """The change of one head, a share from −1 to 1 of the largest: a sign where it is a tenth, two where it is half."""
    if math.isnan(share):
        return "   ", ""
    level = sum(abs(share) >= least for least in (0.1, 0.5))
    return f"{('−' if share < 0 else '+') * level or '·':>3}", ("red" if share < 0 else "green") if level else "dim"


@app.command()
def cache(
    text: TextFile = None,
    prompt: Prompt = None,
    policy: Annotated[
        str, typer.Option(help="Such as snapkv, or 'SnapKV(window=16, budget=Adaptive(0.25))'.")
    ] = "snapkv",
    budget: Annotated[
        str | None, typer.Option(help="Entries of each head, or a share of the tokens; 0.25 by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a language model; by default the bundled one.")
    ] = None,
    complete: Annotated[int, typer.Option(min=0, help="Write this many tokens.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    chat: Chat = False,
    policies: Annotated[bool, typer.Option("--policies", help="List the policies, and do nothing else.")] = False,
) -> None:
    """Compress a model's key-value cache of a text, by default a chapter, and see what is kept and what is then said."""
    with _errors():
        if policies:
            _show_policies()
            return
        from regard import mini
        from regard.cache.trial import read_policy, trial
        from regard.models import load

        _quiet()
        chosen = read_policy(policy, None if budget is None else _budget(budget))
        content, _ = _read(text, prompt)
        with console.status(Text(f"loading {model or mini.name}")):
            loaded, tokenizer = load(model or mini.path(), device, dtype, language=True)
        with console.status("reading"):
            found = trial(loaded, tokenizer, content, chosen, complete, chat=chat)
        _show_kept(found)


def _show_policies() -> None:
    """What each keeps, in a line, and what may be said in their slots."""
    from inspect import isabstract

    from regard import cache

    out = Console()
    slots = {"": cache.Policy, "budget=": cache.Budget, "when=": cache.When, "rest=": cache.Rest}
    for slot, base in slots.items():
        if slot:
            out.print(Text(f"\n{slot}"))
        for name in cache.__all__:
            kind = getattr(cache, name)
            if isinstance(kind, type) and issubclass(kind, base) and not isabstract(kind):
                said = (kind.__doc__ or "").partition("\n")[0].rstrip(":").replace("`", "")
                out.print(Text.assemble((f"{name:<19} ", "bold"), said), soft_wrap=True)


def _budget(written: str) -> int | float:
    try:
        return int(written) if written.strip().isdecimal() else float(written)
    except ValueError as error:
        raise ValueError(f"the budget must be a number of entries or a share such as 0.25, got {written!r}") from error


def _show_kept(found: Trial) -> None:
    """The report, the text shaded by how many heads keep each token, and the completions."""
    out = Console()
    out.print(Text(str(found.report)))
    coloured = out.is_terminal and not out.no_color
    out.print(Text("\nthe bluer a token, the more heads keep it" if coloured else "\nwhat no head keeps is shown as ·"))
    shaded = Text()
    for piece, share in zip(found.tokens, found.shares, strict=True):
        level = round(255 - 150 * share)
        shown = piece if share or coloured else "·"
        shaded.append(shown, f"black on rgb({level},{level},255)" if share else "dim")
    out.print(shaded, soft_wrap=True)
    out.print()
    _show_said(out, {"full cache": found.plain, "compressed": found.compressed}, found.shared)
    if found.missed:
        heads = ", ".join(f"layer {layer} head {head} {share:.0%}" for layer, head, share in found.missed[:5])
        out.print(Text(f"attention that went to what is dropped, where they part: {heads}", "dim"), soft_wrap=True)


@app.command()
def explain(
    target: Annotated[str, typer.Option(help="How the text goes on, such as ' Mary'.")],
    text: TextFile = None,
    prompt: Prompt = None,
    foil: Annotated[str | None, typer.Option(help="How else it could; what sets the two apart is explained.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Such as rollout, or 'Rollout(residual=0.3)'; repeatable.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="All explanations beside one another.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or name of a language model; by default the bundled one.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="In so many steps tokens are hidden, to see what is true.")] = 10,
    chat: Chat = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Explain which tokens made a language model go on as it does, and measure how true the explanation is."""
    with _errors():
        from regard import mini
        from regard.explain import GenericRelevance
        from regard.explain.explain_text import every_explanation, explain_text, read_explanation
        from regard.models import load

        _quiet()
        chosen = [read_explanation(written) for written in method or []]
        chosen += every_explanation() if compare else []
        content, _ = _read(text, prompt)
        with console.status(Text(f"loading {model or mini.name}")):
            loaded, tokenizer = load(model or mini.path(), device, dtype, language=True)
        with _bar() as advance:
            found = explain_text(
                loaded,
                tokenizer,
                content,
                chosen or [GenericRelevance()],
                target=target,
                foil=foil,
                chat=chat,
                steps=steps,
                progress=advance,
            )
        _show_explained(found)


def _show_explained(found: Explained) -> None:
    """The text shaded by each explanation, its strongest tokens, and how true each is."""
    out = Console()
    out.print(Text(f"{found.said}: {found.plain:.4g}"), soft_wrap=True)
    for name, scores in found.scores.items():
        values = scores.tolist()
        most = max([*values[1:-1], 1e-12])  # the first and the last token are looked at whatever there is to explain
        shaded = Text()
        for piece, score in zip(found.tokens, values, strict=True):
            level = round(255 - 150 * min(max(score / most, 0.0), 1.0))
            shaded.append(piece, f"black on rgb(255,{level},{level})" if level < 250 else "dim")
        out.print(Text.assemble((f"\n{name}\n", "bold"), shaded), soft_wrap=True)
        order = sorted(range(1, len(values) - 1), key=lambda at: -values[at])[:8]
        out.print(Text("   ".join(f"{found.tokens[at]!r} {values[at]:.3g}" for at in order), "dim"), soft_wrap=True)
    table = Table("explanation", "comprehensiveness", "sufficiency", "deletion", "insertion", box=box.SIMPLE)
    for name, truth in found.truth.items():
        measures = (truth.comprehensiveness, truth.sufficiency, truth.deletion_area, truth.insertion_area)
        table.add_row(Text(name), *(f"{float(measure):.3g}" for measure in measures))
    out.print(table)
    out.print("true ones have much of the first and the last, little of the others", style="dim", highlight=False)


@app.command()
def mixers(
    name: Annotated[str | None, typer.Argument(help="One of them, for its formula and an example.")] = None,
) -> None:
    """List the sequence mixers: what they cost, what they remember, and where they come from."""
    with _errors():
        from regard.mixers import catalogue

        if name is None:
            _show_mixers(catalogue.mixers(), catalogue.exponents())
        else:
            kind = catalogue.mixer_named(name)
            _show_mixer(kind, catalogue.exponents().get(kind.__name__), catalogue.example(kind))


_MIXER, _COST = "{:<24}{:<29}{:<6}{}", "  {:<27}{:<9}{}"  # two lines for each: one would not fit a terminal

_LETTERS = (
    "N tokens, D width, H heads, W window, F features of a head, S states or codes, C tokens of a segment, P persistent "
    "tokens, K tokens of a convolution, M exponentials, E matrices of a memory times their expansion."
)


def _show_mixers(kinds: Mapping[str, type[Mixer]], exponents: Mapping[str, float]) -> None:
    out = Console()
    out.print(Text(_MIXER.format("mixer", "sees", "exact", "paper"), "bold"), soft_wrap=True)
    out.print(Text(_COST.format("time", "measured", "state") + "\n", "bold"), soft_wrap=True)
    for name, kind in kinds.items():
        facts, measured = kind.facts, exponents.get(name)
        grows = "" if measured is None else f"N^{measured:.2f}"
        exact = "exact" if facts.exact else ""
        out.print(Text(_MIXER.format(name, _sees(kind), exact, facts.cited)), soft_wrap=True)
        out.print(Text(_COST.format(facts.time, grows, facts.state), "dim"), soft_wrap=True)
    out.print(f"\n{_LETTERS} Measured on a CPU, over the four longest of 512 to 65,536 tokens.", highlight=False)


def _show_mixer(kind: type[Mixer], exponent: float | None, example: str) -> None:
    out, facts = Console(), kind.facts
    out.print(Text(f"{kind.__name__}: {facts.paper}\n\n    {facts.formula}\n"), soft_wrap=True)
    measured = "" if exponent is None else f", measured N^{exponent:.2f}"
    out.print(Text(f"time {facts.time}{measured}; state {facts.state}; {_sees(kind)}"), soft_wrap=True)
    out.print(_LETTERS, highlight=False, style="dim")
    out.print(Text(f"\n{example}"), soft_wrap=True)


def _sees(kind: type[Mixer]) -> str:
    directions = {
        "causal": kind.facts.causal, "bidirectional": kind.facts.bidirectional, "cross": kind.facts.cross,
        "grids": kind.facts.grids,
    }  # fmt: skip
    return ", ".join(direction for direction, true in directions.items() if true)


def _show(found: Comparison) -> None:
    """Edits, the tokens at which the completions part, the completions side by side, and the heads that did it."""
    out = Console()
    for edit in found.edits:
        out.print(Text(str(edit)), soft_wrap=True)
    if found.shared:
        out.print(Text(f"\nafter {found.shared!r}, where the completions part:"), soft_wrap=True)
    table = Table("next token", "plain", "steered", box=box.SIMPLE)
    for token, plain in found.plain.probabilities.items():
        steered = found.steered.probabilities[token]
        colour = "green" if steered > plain else "red"
        table.add_row(Text(repr(token)), f"{plain:.1%}", Text(f"{steered:.1%}", colour if steered != plain else ""))
    out.print(table)
    _show_said(out, {"plain": found.plain.completion, "steered": found.steered.completion}, found.shared)
    if found.heads:
        out.print(
            Text(
                "\nheads that did most: each alone as in the steered run, and what that adds to the steered token's lead"
            )
        )
        for one in found.heads:
            out.print(Text(f"{one.change:>+8.2f}  {one.layer} head {one.head}"), soft_wrap=True)


def _show_said(out: Console, completions: Mapping[str, str], shared: str) -> None:
    """Completions one under the other, what they share in a fainter colour."""
    if not any(completions.values()):
        return
    for name, said in completions.items():
        alike = len(shared) if said.startswith(shared) else 0
        out.print(Text.assemble((f"{name:>10} ", "bold"), (said[:alike], "dim"), said[alike:]), soft_wrap=True)


def _show_report(file: Path, open_it: bool) -> None:
    console.print(Text(f"report: {file.resolve().as_uri()}"), soft_wrap=True)
    if open_it:
        typer.launch(file.resolve().as_uri())


def _quiet() -> None:
    """One progress bar is enough: ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _read(file: str | None, prompt: str | None) -> tuple[str, str]:
    """The text and its name, unless no model could read it. The line breaks at the end of a file are the file's."""
    from regard.tokens import check_text

    content, name = _content(file, prompt)
    check_text(content)
    return content, name


def _content(file: str | None, prompt: str | None) -> tuple[str, str]:
    from regard import demo

    if file is not None and prompt is not None:
        raise ValueError("the text is given twice, by --text and by --prompt")
    if prompt is not None:
        return prompt, "the prompt"
    if file is None:
        return demo.text(), demo.TEXT_NAME
    try:
        if file == "-":
            return sys.stdin.read().rstrip("\n"), "standard input"
        path = Path(file)
        if not path.exists():
            raise FileNotFoundError(f"there is no file {file}; the words of a text are given by --prompt")
        if path.is_dir():
            raise IsADirectoryError(f"{file} is a folder; --text names a file")
        return path.read_text(encoding="utf-8").rstrip("\n"), path.name
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error


def _check_report(out: Path, save: Path | None) -> None:
    """Refuse what could not be written in the end, before hours of work: places, and what is not installed."""
    from importlib.util import find_spec

    for option, path in (("--out", out), ("--save", save)):
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            raise IsADirectoryError(f"{option} names a folder, {path}; give a file in it")
        if not folder.is_dir():
            raise FileNotFoundError(f"{option} {path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise PermissionError(f"{option} {path} cannot be written: it is not permitted")
    needed = ["jinja2", "plotly", "xarray", *(["h5netcdf"] if save else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(f'a report needs {" and ".join(missing)}: pip install "regard[report]"')


@contextmanager
def _share_bar() -> Iterator[tuple[Callable[[object], None], Callable[[str, float], None]]]:
    """What says what a run will take, and a bar that the share of it that is done moves on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("looking ahead", total=1.0)
        yield (
            lambda expected: console.print(Text(str(expected)), soft_wrap=True),
            lambda path, share: progress.update(task, description=path, completed=share),
        )


@contextmanager
def _bar() -> Iterator[Callable[[str, int | None], None]]:
    """A bar that one call for each layer moves on."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda path, total: progress.update(task, description=path, total=total, advance=1)


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of the user's making, in one line."""
    try:
        yield
    except (ImportError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error
