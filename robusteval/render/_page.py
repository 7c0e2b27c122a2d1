"""Pages that need nothing but themselves: templates, and a policy that lets only their own script and style run."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

STYLE = "_style.css.j2"


def environment() -> Environment:
    """Return the templates; all that they are given is escaped, whatever their names end in."""
    found = Environment(
        loader=PackageLoader("robusteval.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


def page(template: str, script: str, **values: Any) -> str:
    """Return a page: ``template`` given ``values``, and as text ``style``, ``script`` and the ``policy`` that fits."""
    templates = environment()
    style, code = (templates.get_template(name).render() for name in (STYLE, script))
    return templates.get_template(template).render(
        **values,
        style=Markup(style),
        script=Markup(code),
        policy=policy(style, code),
    )


def policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy: only ``data:`` images are loaded, only this style and script apply."""
    sources = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _source(style),
        "script-src": _source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{kind} {source}" for kind, source in sources.items())


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
