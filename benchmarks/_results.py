"""RESULTS.md: one section per benchmark, written by its script and by nothing else."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from diffalign.machine import described

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "# Results\n\nWritten by the scripts in this folder; each section names its command, date and machine."


def machine() -> str:
    """Date, hardware and versions in one line; no names of machines, users or folders."""
    return f"{datetime.date.today()}, {described()}"


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Put ``body`` under ``## title``, in the place of what was there, else at the end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else HEADER
    head, *sections = (part.strip() for part in re.split(r"(?m)^(?=## )", text))
    section = f"## {title}\n\n{body.strip()}"
    places = [i for i, old in enumerate(sections) if old.partition("\n")[0] == f"## {title}"]
    if places:
        sections[places[0]] = section
    else:
        sections.append(section)
    path.write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
