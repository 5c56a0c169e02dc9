"""Self-contained HTML pages, which need no network."""

import json
from importlib.resources import files
from typing import Any


def render(template: str, script: str, data: dict[str, object], **values: Any) -> str:
    """One HTML page: a template of this folder filled in, with its style, its script, plotly and what the script reads.

    Args:
        template: the name of a file that extends ``page.html``.
        script: the name of the file with its script.
        data: what the script reads, plain values.
        values: what the template names.

    Raises:
        ImportError: jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('a report needs jinja2 and plotly: pip install "regard[report]"') from error

    def read(name: str) -> str:
        return files("regard.view").joinpath(name).read_text("utf-8")

    environment = Environment(loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(
        data=Markup(_json(data)),
        style=Markup(read("report.css")),
        script=Markup(read(script)),
        plotly=Markup(get_plotlyjs()),
        **values,
    )


def _json(data: dict[str, object]) -> str:
    """Write JSON that cannot end the script element it stands in, whatever the tokens are."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
