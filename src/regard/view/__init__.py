"""See what was recorded: a summary of every head, single pictures, and one self-contained HTML report."""

from regard.view.heads import summarize
from regard.view.plot import Plot
from regard.view.report import RunFacts, report

__all__ = ["Plot", "RunFacts", "report", "summarize"]
