"""The frame of a self-contained HTML file.

A page loads nothing: its policy forbids every request, allows images that stand in the page, and runs the one
script whose hash it names. Every text from outside is escaped.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mllm_protector.reporting.tables import showable


def data_uri(content: bytes, media_type: str) -> str:
    """A file as an address that stands in the page itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def render(template: str, *, script: str | None = None, **context: Any) -> str:
    """Fill a template of this folder into a page: escaped, self-contained, with its content policy.

    Args:
        template: its file name.
        script: the file name of the one script that may run.
        context: what the page shows; a ``str`` is text, never HTML.
    """
    code = "" if script is None else _own_text(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if code else "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
        f"; script-src {allowed}"
    )
    frame = {"policy": policy, "script": Markup(code), "style": Markup(_own_text("page.css.j2"))}  # noqa: S704
    return _templates().get_template(template).render(context | frame)


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    return showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _own_text(name: str) -> str:
    """The page's style or script: a fixed text of ours, which no data enters."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()
