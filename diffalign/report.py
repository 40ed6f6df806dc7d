"""`diffalign report`: a folder of runs and evaluations -> one self-contained HTML page. Torch-free.

Any part of the folder may be absent; the page shows what is there. Markup lives in ``templates/report.html.j2``, which
gets finished text and coordinates.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field

from diffalign import overoptimisation, records
from diffalign.charts import Chart, Histogram, chart, histogram
from diffalign.config import ReportConfig
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.pages import render
from diffalign.records import Candidate, Record
from diffalign.results import Results, Row, Trajectory, headline, number, panel, parse, table

MAX_PICTURES = 192
MAX_PER_TASK = 6
MAX_TEXT = 600  # characters of a text sample
THUMBNAIL = 192  # pixels; with MAX_PICTURES it keeps the pictures of a page below 2 MB or so
PIXEL_ART = 64  # images up to this side are enlarged without smoothing


class _Input(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Stage(_Input):
    """One stage of a job."""

    name: str
    seconds: float
    summary: str = ""


class Job(_Input):
    """``job.json``."""

    title: str | None = None
    command: str | None = None
    seconds: float | None = None
    stages: list[Stage] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)


class Step(_Input):
    """The columns of ``metrics.jsonl`` that are drawn."""

    step: int
    loss: float | None = None
    accuracy: float | None = Field(None, alias="reward/accuracy")
    chosen: float | None = Field(None, alias="drift/chosen")
    rejected: float | None = Field(None, alias="drift/rejected")
    reward: float | None = Field(None, alias="reward/mean")
    best: float | None = Field(None, alias="reward/best")
    gap: float | None = None
    grad_norm: float | None = None
    alarms: dict[str, str] = Field(default_factory=dict)


# --- reading ------------------------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> list[Step]:
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    return [parse(Step, line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _read_records(path: Path) -> list[Record]:
    return list(records.read(path)) if path.is_file() else []


def _read_sources(root: Path) -> dict[str, str]:
    """The settings to print verbatim: file name -> text."""
    sources = {}
    for name in ("config.yaml", "train/config.yaml", "train/run.json"):
        path = root / name
        if path.is_file():
            try:
                sources[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text: {error}") from None
    return sources


def _evaluation_order(root: Path, config: str) -> list[Path]:
    """Evaluation folders in the order of the job's config, the others after them by name."""
    try:
        content = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise UserError(f"{root / 'config.yaml'}: not valid YAML: {' '.join(str(error).split())}") from None
    planned = content.get("evaluate") if isinstance(content, dict) else None
    names = list(planned) if isinstance(planned, dict) else []
    folders = sorted(path.parent for path in root.glob("eval/*/results.json"))
    return sorted(folders, key=lambda folder: names.index(folder.name) if folder.name in names else len(names))


# --- pictures -----------------------------------------------------------------------------------------------------


class Exhibit(NamedTuple):
    """An image as a data URI, or a text, with the judge's verdict."""

    image: str
    pixelated: bool
    text: str
    verdict: Literal["right", "wrong", ""]
    score: str


class Pair(NamedTuple):
    """One prompt before and after."""

    prompt: str
    before: Exhibit | None
    after: Exhibit


def _exhibit(root: Path, candidate: Candidate, metric: str) -> Exhibit:
    labels = candidate.labels
    score = labels.get(metric, next(iter(labels.values()))) if len(labels) == 1 else labels.get(metric)
    verdict = "right" if score == 1 else "wrong" if score == 0 else ""
    mark = {"right": "✓", "wrong": "✗"}.get(verdict, number(score) if isinstance(score, float) else "")
    if candidate.text is not None:
        return Exhibit("", False, records.plain_text(candidate.text)[:MAX_TEXT], verdict, mark)
    return Exhibit(*_picture(root, candidate), "", verdict, mark)


def _picture(root: Path, candidate: Candidate) -> tuple[str, bool]:
    """A thumbnail as a data URI, and whether to enlarge it without smoothing."""
    image = records.read_image(root, candidate.sample or "")
    small = max(image.size) <= THUMBNAIL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", optimize=True)
    data = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return data, max(image.size) <= PIXEL_ART


def _answered(path: Path) -> list[Record]:
    return [record for record in _read_records(path) if record.candidates]


def gallery(folder: Path, metric: str, per_task: int) -> dict[str, list[Pair]]:
    """The first prompts of every task in file order, each with its first sample, beside the baseline's."""
    first: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for record in _answered(folder / "policy" / "scored.jsonl"):
        first[_task(record)].setdefault(_prompt(record), record)
    before = {record.id: record.candidates[0] for record in _answered(folder / "against" / "scored.jsonl")}

    def pair(prompt: str, record: Record) -> Pair:
        base = before.get(record.id)
        left = _exhibit(folder / "against", base, metric) if base else None
        return Pair(prompt, left, _exhibit(folder / "policy", record.candidates[0], metric))

    return {task: [pair(*item) for item in list(chosen.items())[:per_task]] for task, chosen in first.items()}


def _task(record: Record) -> str:
    return str(record.meta.get("tag", "all"))


def _prompt(record: Record) -> str:
    return records.plain_text(record.prompt)


def _evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    parsed = [parse(Results, (f / "results.json").read_bytes(), str(f / "results.json")) for f in folders]
    columns = 2 * sum(max(1, len(results.tasks)) for results in parsed)
    per_task = max(1, min(MAX_PER_TASK, MAX_PICTURES // max(1, columns)))
    return [
        {
            "results": results,
            "headline": headline(results),
            "rows": table(results),
            "panel": panel(results),
            "axis": _axis(table(results)),
            "gallery": gallery(folder, results.metric, per_task),
        }
        for folder, results in zip(folders, parsed, strict=True)
    ]


def _axis(rows: Sequence[Row]) -> tuple[float, float]:
    """[0, 1] for shares, else what holds every interval."""
    ends = [end for row in rows for shown in (row.after, row.before) if shown for end in shown.ends]
    return (0.0, 1.0) if min(ends) >= 0 and max(ends) <= 1 else (min(ends), max(ends))


def _trajectories(root: Path) -> list[dict[str, Any]]:
    """Every evaluation over training: its curves, the trained reward first, and what they say."""
    shown = []
    for path in sorted(root.glob(f"eval/*/{overoptimisation.FILE}")):
        found = parse(Trajectory, path.read_bytes(), str(path))
        charts = [
            chart(
                f"{label} ({_role(found, label)})",
                {label: [(point.step, point.values[label].policy) for point in found.points]},
                guide=(found.points[0].values[label].policy, "before training"),
            )
            for label in sorted(found.points[0].values, key=lambda name: _ROLES.index(_role(found, name)))
        ]
        shown.append({"verdict": overoptimisation.verdict(found), "note": found.note, "charts": charts})
    return shown


_ROLES = ("trained on", "held out", "description")


def _role(found: Trajectory, label: str) -> str:
    return _ROLES[0] if label == found.trained else _ROLES[1] if label in found.held_out else _ROLES[2]


# --- training -----------------------------------------------------------------------------------------------------


def curves(steps: Sequence[Step]) -> list[Chart]:
    """Learning curves of the columns that are there."""

    def column(name: str) -> list[tuple[float, float]]:
        return [(step.step, value) for step in steps if (value := getattr(step, name)) is not None]

    loss = column("loss")
    starts_at_ln2 = bool(loss) and abs(loss[0][1] - math.log(2)) < 0.01
    drawn = [
        chart(
            "reward of own samples",
            {"mean": column("reward"), "best of each prompt": column("best")},
            "Of the training prompts of every round, from other prompts each time.",
        ),
        chart("loss", {"loss": loss}, guide=(math.log(2), "ln 2: no preference") if starts_at_ln2 else None),
        chart(
            "implicit accuracy",
            {"accuracy": column("accuracy")},
            "Share of training pairs whose winner gains more on the reference than the loser.",
            guide=(0.5, "chance"),
        ),
        chart(
            "drift from the reference",
            {"winner": column("chosen"), "loser": column("rejected")},
            "Error (of text: negative log-likelihood per token) of the policy minus that of the reference.",
            guide=(0.0, "reference"),
        ),
        chart(
            "distance from the reference",
            {"distance": column("gap")} if column("reward") else {},
            "Mean squared difference of the policy's and the reference's predictions.",
        ),
        chart("gradient norm", {"gradient norm": column("grad_norm")}),
    ]
    return [found for found in drawn if found]


class Distribution(NamedTuple):
    """One label over the scored candidates, and the share of pairs within a record that tie."""

    label: str
    shape: Histogram
    ties: float | None


def distributions(scored: Iterable[Record]) -> list[Distribution]:
    """One per label."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    pairs: Counter[str] = Counter()
    ties: Counter[str] = Counter()
    for record in scored:
        for label in sorted({label for candidate in record.candidates for label in candidate.labels}):
            column = [_level(c.labels[label]) for c in record.candidates if label in c.labels]
            values[label] += column
            pairs[label] += math.comb(len(column), 2)
            ties[label] += sum(a == b for a, b in combinations(column, 2))
    return [
        Distribution(label, histogram(column), ties[label] / pairs[label] if pairs[label] else None)
        for label, column in values.items()
    ]


def _level(value: float | list[float]) -> float:
    return fmean(value) if isinstance(value, list) else value


def _pool(folder: Path) -> dict[str, Any]:
    """What the pool holds; empty without records."""
    files = {name: _read_records(folder / f"{name}.jsonl") for name in ("records", "scored", "train")}
    generated = files["records"] or files["scored"]
    train = files["train"]
    if not generated and not train:
        return {}
    rewards = [[_level(c.labels["reward"]) for c in r.candidates if "reward" in c.labels] for r in train]
    margins = [max(row) - min(row) for row in rewards if len(row) > 1]
    sizes = sorted({len(record.candidates) for record in train})
    columns = {name: Counter(map(_task, rows)) for name, rows in (("prompts", generated), ("train", train)) if rows}
    return {
        "prompts": len(generated),
        "candidates": sum(len(record.candidates) for record in generated),
        "train": len(train),
        "unit": "pairs" if sizes == [2] else "records",
        "distributions": distributions(files["scored"]),
        "margins": histogram(margins) if margins else None,
        "tasks": {
            task: {name: counts[task] for name, counts in columns.items()}
            for task in {task: None for counter in columns.values() for task in counter}
        },
    }


# --- the page -----------------------------------------------------------------------------------------------------


def _collect(root: Path) -> dict[str, Any]:
    """Everything the folder has to show, under the names the template uses."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    sources = _read_sources(root)
    job = root / "job.json"
    steps = _read_metrics(root / "train" / "metrics.jsonl")
    parts = {
        "sources": sources,
        "evaluations": _evaluations(_evaluation_order(root, sources.get("config.yaml", ""))),
        "charts": curves(steps),
        "trajectories": _trajectories(root),
        "alarms": [(step.step, name, text) for step in steps for name, text in step.alarms.items()],
        "pool": _pool(root / "pool"),
        "job": parse(Job, job.read_bytes(), str(job)) if job.is_file() else None,
    }
    if not any(parts.values()):
        raise UserError(f"{root}: nothing to report; expected config.yaml, job.json, pool/, train/ or eval/NAME/")
    return parts


def run(config: ReportConfig, dry_run: bool = False) -> Path:
    """Write the page and print its headlines; ``dry_run`` does all of it except writing.

    Raises:
        UserError: there is nothing to report, or a file (named with its line) is corrupt.
    """
    root = Path(config.dir)
    parts = _collect(root)
    job = parts["job"]
    given = "title" in config.model_fields_set
    title = config.title if given or not (job and job.title) else job.title
    page = render("report.html.j2", **parts, title=title).encode()
    out = root / config.out
    if not dry_run:
        with replacing(out) as handle:
            handle.write(page)
    for evaluation in parts["evaluations"]:
        print(evaluation["headline"])
    print(f"{'would write' if dry_run else 'wrote'} {out} ({len(page) / 1e6:.1f} MB)")
    return out
