"""See what was recorded: a summary of every head, single pictures, and one self-contained HTML report."""

from regard.view._report import RunFacts, ShownPart, report
from regard.view.heads import summarize
from regard.view.plot import Plot

__all__ = ["Plot", "RunFacts", "ShownPart", "report", "summarize"]
