"""Figures of compressed caches, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from rich.table import Table
from training.evaluate import proportion

from bench.cache_case import Measures
from bench.cache_families import FULL, Family
from bench.cache_plan import Plan

Row = tuple[str, float]  # a policy's name and its budget
Found = dict[int, dict[Row, list[Measures]]]  # by length, a text's measures each
WHOLE = (FULL, 1.0)


def search_table(searched: Mapping[str, Mapping[str, float]], of: Mapping[str, Family], plan: Plan) -> Table:
    """What the usual settings of each policy gain on the calibration half, and its best ones."""
    title = (
        f"settings, by answers right on {plan.calibrated} texts of the calibration half, {plan.shortest:,} tokens, "
        f"{plan.searched:.1%} of the entries"
    )
    table = Table("policy", "tried", "usual", "right", "best", "best right", "worst", "worst right", title=title)
    for name, shares in searched.items():
        first, ranked = str(of[name].settings[0]), sorted(shares, key=lambda which: -shares[which])
        high = max(of[name].settings, key=lambda settings: shares[str(settings)])
        cells = [cell for which in (first, str(high), ranked[-1]) for cell in (_plain(which), f"{shares[which]:.0%}")]
        table.add_row(name, str(len(shares)), *cells)
    return table


def _plain(settings: str) -> str:
    return settings.strip("{}").replace("'", "")


def shares(measures: Sequence[Measures], what: str = "right", questions: slice = slice(None)) -> str:
    """Answers right of all, with Wilson's 95% interval; empty where none was asked for."""
    right = [answer for one in measures for answer in one.get(what, [])[questions]]
    if not right:
        return ""
    figure = proportion("", sum(right), len(right))
    return f"{figure.value:.2f} ({figure.low:.2f}–{figure.high:.2f})"


def perplexity(measures: Sequence[Measures], full: Sequence[Measures]) -> float | None:
    """That of the books' next tokens, as a ratio to the full cache's of the same texts."""
    pairs = [(one["loss"], other["loss"]) for one, other in zip(measures, full, strict=False) if "loss" in one]
    return math.exp(statistics.mean(own - other for own, other in pairs)) if pairs else None


def table_of(found: Found, plan: Plan) -> Table:
    """A line for each policy and budget."""
    lengths, short = list(plan.lengths), plan.shortest
    asked = ", ".join(f"{texts} texts of {length:,}" for length, texts in plan.lengths.items())
    title = (
        f"{asked} tokens, a needle and {plan.facts} facts each: answers right (95% interval), and beside the full cache"
    )
    columns = ["bytes", f"needle, {short:,}", f"facts, {short:,}", *(f"all, {length:,}" for length in lengths[1:])]
    table = Table(
        "policy",
        *columns,
        f"asked before, {short:,}",
        "perplexity, ×",
        "same words",
        "tokens/s, ×",
        "chosen in, s",
        title=title,
    )
    budgets = dict(reversed(found[short]))  # the first of each, whose choice found what others reuse
    for (name, budget), measures in found[short].items():
        whole = found[short][WHOLE]
        loss = perplexity(measures, whole)
        same = [one["same"] for one in measures if "same" in one]
        table.add_row(
            name if budget == 1 else f"{name}, {_fraction(budget)}",
            f"{statistics.mean(one['bytes'] for one in measures):.3f}",
            shares(measures, questions=slice(0, 1)),
            shares(measures, questions=slice(1, None)),
            *(shares(found[length].get((name, budget), [])) for length in lengths[1:]),
            shares(measures, "before"),
            "" if loss is None else f"{loss:.3f}",
            f"{statistics.mean(same):.2f}" if same else "",
            _speed(found[lengths[-1]], (name, budget)),
            _seconds(found[short][name, budgets[name]]),
        )
    return table


def _fraction(budget: float) -> str:
    return f"1/{round(1 / budget)}" if abs(1 / budget - round(1 / budget)) < 1e-9 else f"{budget}"


def _seconds(measures: Sequence[Measures]) -> str:
    """What choosing takes, the median."""
    return f"{statistics.median(one['seconds'] for one in measures):.2f}" if "seconds" in measures[0] else ""


def _speed(measures: Mapping[Row, Sequence[Measures]], row: Row) -> str:
    """Tokens for each second, as a ratio to the full cache's."""
    own, full = (measures.get(which, [{}])[0].get("step") for which in (row, WHOLE))
    return f"{full / own:.2f}" if own and full else ""


def smaller(found: Found, plan: Plan) -> list[str]:
    """The policies that are measured at every budget, and hold less than the full cache."""
    rows = found[plan.shortest]
    return [name for name, budget in rows if budget == plan.budgets[0] and rows[name, budget][0]["bytes"] < 1]


@dataclass(frozen=True)
class Mean:
    """A policy's mean over the budgets, with the interval of a bootstrap over the texts."""

    name: str
    value: float
    low: float
    high: float


def means(found: Found, plan: Plan, measure: Callable[[Measures, Measures], float | None]) -> list[Mean]:
    """Of policies that hold less than the full cache, the highest mean first."""
    ranked = []
    for name in smaller(found, plan):
        by_text: list[float] = []
        for of_length in found.values():
            full = of_length[WHOLE]
            for number, whole in enumerate(full):
                rows = [of_length.get((name, budget), []) for budget in plan.budgets]
                values = [measure(row[number], whole) for row in rows if len(row) > number]
                known = [value for value in values if value is not None]
                if known:
                    by_text.append(statistics.mean(known))
        if by_text:
            drawn = np.random.default_rng(0).choice(by_text, (2000, len(by_text))).mean(axis=1)
            low, high = np.percentile(drawn, [2.5, 97.5])
            ranked.append(Mean(name, statistics.mean(by_text), float(low), float(high)))
    return sorted(ranked, key=lambda one: -one.value)


def right_later(own: Measures, full: Measures) -> float | None:
    """The share of answers right, questions later."""
    return statistics.mean(own["right"])


def right_before(own: Measures, full: Measures) -> float | None:
    """The share of answers right, questions before."""
    return statistics.mean(own["before"]) if own.get("before") else None


def less_loss(own: Measures, full: Measures) -> float | None:
    """How much less a token of the book is lost than with the full cache: below 0, in nats."""
    return full["loss"] - own["loss"] if "loss" in own else None


RANKED = {
    "answers, asked later": right_later,
    "answers, asked before": right_before,
    "next tokens, nats gained": less_loss,
}


def best_table(found: Found, plan: Plan) -> Table:
    """The first three of each ranking."""
    title = "the best, by the mean over the budgets and all texts (95% interval over texts)"
    table = Table("by", "first", "second", "third", "last", title=title)
    for what, measure in RANKED.items():
        ranked = means(found, plan, measure)
        table.add_row(
            what, *(f"{one.name}: {one.value:.2f} ({one.low:.2f}–{one.high:.2f})" for one in [*ranked[:3], ranked[-1]])
        )
    return table


def plot(found: Found, plan: Plan) -> go.Figure:
    """Quality against bytes: the best three of each ranking and some to compare them with, the others grey."""
    panels = ("questions after the text was compressed", "questions before", "perplexity of the book's next tokens")
    figure = make_subplots(cols=3, subplot_titles=panels, horizontal_spacing=0.06)
    named = {one.name for measure in RANKED.values() for one in means(found, plan, measure)[:3]}
    named |= {"SnapKV, usual", "StreamingLLM", "random", "TOVA"}
    names = smaller(found, plan)
    colours = dict(zip([name for name in names if name in named], qualitative.Dark24, strict=False))
    for name in sorted(names, key=lambda name: name in named):
        for column, values in enumerate(_lines(found, plan, name), start=1):
            if values:
                figure.add_scatter(
                    x=[x for x, _ in values], y=[y for _, y in values], name=name, legendgroup=name, row=1, col=column,
                    mode="lines+markers" if name in named else "lines", showlegend=name in named and column == 1,
                    line={"color": colours.get(name, "#dddddd"), "width": 2 if name in named else 1},
                )  # fmt: skip
    for column, values in enumerate(_lines(found, plan, FULL), start=1):
        figure.add_hline(y=values[0][1], line={"dash": "dot", "color": "#555555"}, row=1, col=column)
    ticks = [100 * budget for budget in sorted(plan.budgets)]
    figure.update_xaxes(type="log", title="bytes of the cache, %", tickvals=ticks, ticktext=[f"{t:.3g}" for t in ticks])
    figure.update_yaxes(title="answers right, %", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="answers right, %", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="× that of the full cache (dotted)", range=[0.95, 2.0], row=1, col=3)
    title = "What SmolLM2-135M-Instruct still knows of book text with a compressed cache"
    figure.update_layout(
        template="plotly_white", width=1350, height=520, title=title, margin={"t": 90, "b": 60, "r": 20}
    )
    return figure


def _lines(found: Found, plan: Plan, name: str) -> list[list[tuple[float, float]]]:
    """Percent of bytes and what came of it, for each panel, of the shortest texts."""
    rows = found[plan.shortest]
    lines: list[list[tuple[float, float]]] = [[], [], []]
    for budget in plan.budgets if name != FULL else (1.0,):
        measures = rows[name, budget]
        size = 100 * statistics.mean(own["bytes"] for own in measures)
        for line, what in zip(lines, ("right", "before"), strict=False):
            answers = [answer for own in measures for answer in own.get(what, [])]
            line += [(size, 100 * statistics.mean(answers))] if answers else []
        loss = perplexity(measures, rows[WHOLE])
        lines[2] += [] if loss is None else [(size, loss)]
    return lines
