"""Self-contained HTML pages from the templates of the package. Torch-free."""

from __future__ import annotations

from typing import Any

import jinja2

from diffalign.charts import HEIGHT, WIDTH, count, tick
from diffalign.results import number


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def render(template: str, **content: Any) -> str:
    """A page. Everything is escaped: prompts are foreign text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffalign"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "duration": duration, "tick": tick, "count": count}
    environment.globals["size"] = (WIDTH, HEIGHT)  # of charts; a global, since imported macros see no context
    return environment.get_template(template).render(**content)
