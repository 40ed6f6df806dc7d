"""The results of an evaluation in words and tables, claiming no more than their intervals allow. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.errors import UserError

M = TypeVar("M", bound=BaseModel)
Interval = tuple[float, float]


def parse(model: type[M], text: str | bytes, where: str) -> M:
    """JSON as a model, or one line that names the place and the first thing wrong with it."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {place + ': ' if place else ''}{first['msg']}") from None


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Measured(_Read):
    """A score with its 95 % interval and, next to a baseline, the paired difference."""

    n: int | None = Field(None, description="samples; given per task")
    policy: float
    interval: Interval
    against: float | None = None
    against_interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None


class Results(_Read):
    """``results.json`` of one evaluation."""

    name: str
    judge: str
    metric: str
    note: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    n: int
    prompts: int
    failed: int = Field(0, description="samples that the judge could not score; left out of both models")
    overall: Measured
    tasks: dict[str, Measured] = Field(default_factory=dict)
    wins: Measured | None = Field(None, description="share of samples that beat the baseline's from the same noise")
    panel: dict[str, Measured] = Field(default_factory=dict, description="label -> mean over all samples")
    card: dict[str, Any] = Field(default_factory=dict, description="everything it takes to measure this again")


def number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """``.51``, ``1.00``, ``−.02``, and ``+.11`` with ``sign``: no zero before the point, a true minus."""
    text = f"{abs(value):.{digits}f}"
    mark = "" if not float(text) else "−" if value < 0 else "+" if sign else ""
    return mark + text.removeprefix("0")


class Point(_Read):
    """One snapshot of a run, measured like the others."""

    step: int
    values: dict[str, Measured]


class Trajectory(_Read):
    """``trajectory.json``: rewards over training, and when to stop."""

    name: str
    trained: str = Field(description="label of the reward that was trained on")
    held_out: list[str] = Field(description="labels of rewards that were not")
    points: list[Point]
    best: int = Field(description="step with the highest held-out score")
    stop: int | None = Field(
        None, description="first step at which held-out rewards have fallen while the trained rose"
    )
    note: str = ""


class Shown(NamedTuple):
    """A value with its interval as text, and (low, value, high) to draw."""

    value: str
    interval: str
    ends: tuple[float, float, float]


def shown(value: float | None, interval: Interval | None, *, sign: bool = False) -> Shown | None:
    """As text, with the fewest digits (two to four) at which no end of a signed interval passes for zero."""
    if value is None or interval is None:
        return None
    ends = [end for end in interval if sign and end]
    digits = next((d for d in (2, 3) if all(round(end, d) for end in ends)), 4)
    low, high = (number(end, digits, sign=sign) for end in interval)
    return Shown(number(value, digits, sign=sign), f"{low} to {high}", (interval[0], value, interval[1]))


Verdict = Literal["better", "worse", "unclear", ""]


def verdict(interval: Interval | None) -> Verdict:
    """What the interval of a difference says; empty without one."""
    if interval is None:
        return ""
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


class Row(NamedTuple):
    """A line of the results table."""

    task: str
    n: int
    after: Shown
    before: Shown | None
    difference: Shown | None

    @property
    def verdict(self) -> Verdict:
        """What the interval of the difference says; empty without a baseline."""
        return verdict(self.difference and (self.difference.ends[0], self.difference.ends[2]))


def _row(task: str, n: int, measured: Measured) -> Row:
    after = shown(measured.policy, measured.interval)
    assert after is not None
    before = shown(measured.against, measured.against_interval)
    return Row(task, n, after, before, shown(measured.difference, measured.difference_interval, sign=True))


def table(results: Results) -> list[Row]:
    """One row per task, then the overall one."""
    rows = [_row(task, measured.n or 0, measured) for task, measured in results.tasks.items()]
    return [*rows, _row("overall", results.n, results.overall)]


def panel(results: Results) -> list[Row]:
    """One row per label of the panel, and the win rate."""
    rows = [_row(label, results.n, measured) for label, measured in results.panel.items()]
    return rows if results.wins is None else [*rows, _row("win rate against before", results.n, results.wins)]


def headline(results: Results) -> str:
    """One sentence that claims no more than the interval of the difference allows."""
    overall = _row("overall", results.n, results.overall)
    held_out = "held-out " if results.note.lower().startswith("held-out") else ""
    what = f"{results.name[:1].upper()}{results.name[1:]} {held_out}score"
    if overall.before is None or overall.difference is None:
        return f"{what} {overall.after.value} (95 % interval {overall.after.interval}, n = {results.n})"
    change = f"{overall.difference.value}, 95 % interval {overall.difference.interval}, n = {results.n}"
    claim = ": no significant change" if overall.verdict == "unclear" else ""
    return f"{what} {overall.before.value} → {overall.after.value} ({change}){claim}"


def markdown_table(results: Mapping[str, Any]) -> str:
    """The content of a ``results.json`` as a Markdown table, one line per task and the overall one last."""
    rows = table(Results.model_validate(results))
    paired = all(row.before and row.difference for row in rows)
    head = (
        ["task", "n", "before", "after", "difference (95 % interval)"]
        if paired
        else ["task", "n", "score (95 % interval)"]
    )
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [row.task.replace("|", "\\|"), str(row.n)]
        if row.before and row.difference:
            cells += [row.before.value, row.after.value, f"{row.difference.value} ({row.difference.interval})"]
        else:
            cells.append(f"{row.after.value} ({row.after.interval})")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
