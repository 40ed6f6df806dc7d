"""`diffalign score`: records -> the same records with a label per scorer. Resumable; a crash loses at most a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffalign import records
from diffalign.config import ScoreConfig, ScorerConfig
from diffalign.errors import UserError
from diffalign.files import claim, require_complete, siblings
from diffalign.records import Record
from diffalign.scoring import Scorer, check_unscored, load_scorer, score_records


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
    require_complete(source, len(ids))
    claim(out, {**_identity(source, specs), "count": len(ids)}, write=not dry_run)
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
        scorers = _load(specs)
        for group in _groups(records.read(source), batch):
            missing = {record.id for record in group} - output.done
            if missing:
                scored = score_records(group, source.parent, scorers, batch)
                output.append(record for record in scored if record.id in missing)
                progress.advance(task, len(missing))


def _groups(found: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Runs of records with up to ``size`` candidates, or one record with more.

    The same runs whatever was done before: the last bits of a score may depend on the batch it is computed in.
    """
    group: list[Record] = []
    held = 0
    for record in found:
        if group and held + len(record.candidates) > size:
            yield group
            group, held = [], 0
        group.append(record)
        held += len(record.candidates)
    if group:
        yield group
