"""`diffalign score`: records -> the same records with a label per scorer. Resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffalign import records
from diffalign.config import ScoreConfig, ScorerConfig
from diffalign.errors import UserError
from diffalign.files import claim, siblings
from diffalign.records import Record
from diffalign.scoring import Scorer, check_unscored, load_scorer, score_records

APPEND = 32  # records per write; a crash loses at most these and one batch


def run(config: ScoreConfig, dry_run: bool = False) -> Path:
    """Score every record that the output does not hold yet and print a line per label.

    ``dry_run`` checks the input, loads the scorers, scores the first record and writes nothing.

    Returns:
        The output file. Beside it, ``<out>.meta.json`` says which input and scorers it belongs to.

    Raises:
        UserError: the input does not fit, or an existing output belongs to another input or other scorers.
    """
    source, out = siblings(config.records, config.out)
    specs = _by_label(config.scorers)
    ids: set[str] = set()
    for record in records.read(source):
        check_unscored(record, specs)
        ids.add(record.id)
    sidecar = out.with_name(f"{out.name}.meta.json")
    claim(out, sidecar, _identity(source, specs), write=not dry_run)
    if dry_run:
        first = next(score_records(records.read(source), source.parent, _load(specs), config.batch))
        labels = [dict(candidate.labels) for candidate in first.candidates]
        print(f"would score {len(ids)} records of {source} with {', '.join(specs)} into {out}; first record: {labels}")
        return out
    _score_missing(source, out, specs, config.batch, ids)
    for label, stats in records.summary(records.read(out))["labels"].items():
        if label in specs:
            print(f"{label}: mean {stats['mean']:.4f}, min {stats['min']:.4f}, max {stats['max']:.4f}")
    return out


def _by_label(scorers: Iterable[ScorerConfig]) -> dict[str, ScorerConfig]:
    specs: dict[str, ScorerConfig] = {}
    for spec in scorers:
        label = spec.label or spec.name
        if label in specs:
            raise UserError(f"two scorers write the label {label!r}; give one of them another `label:`")
        specs[label] = spec
    return specs


def _load(specs: dict[str, ScorerConfig]) -> dict[str, Scorer]:
    return {label: load_scorer(spec.name, **spec.params) for label, spec in specs.items()}


def _identity(source: Path, specs: dict[str, ScorerConfig]) -> dict[str, Any]:
    """What an output depends on: the bytes of the input and the scorers."""
    with source.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    scorers = {label: {"name": spec.name, "params": spec.params} for label, spec in specs.items()}
    return {"records": {"file": source.name, "sha256": digest}, "scorers": scorers}


def _score_missing(source: Path, out: Path, specs: dict[str, ScorerConfig], batch: int, ids: set[str]) -> None:
    with records.Appender(out) as output, Progress() as progress:
        strangers = sorted(output.done - ids)
        if strangers:
            raise UserError(
                f"{out}: record {strangers[0]!r} is not in {source}; choose another `out` or delete this one"
            )
        task = progress.add_task("score", total=len(ids), completed=len(output.done))
        if len(output.done) == len(ids):
            return
        missing = (record for record in records.read(source) if record.id not in output.done)
        for group in _groups(score_records(missing, source.parent, _load(specs), batch), APPEND):
            output.append(group)
            progress.advance(task, len(group))


def _groups(items: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while group := list(islice(items, size)):
        yield group
