"""`diffalign score`: records -> the same records with a label per scorer. Resumable; a crash loses at most a batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffalign import records
from diffalign.config import ScoreConfig, ScorerConfig
from diffalign.engines import stream
from diffalign.errors import UserError
from diffalign.files import claim, require_complete, siblings
from diffalign.records import Record
from diffalign.scoring import Scorer, check_unscored, load_scorer, record_groups, score_records


def run(config: ScoreConfig, dry_run: bool = False) -> Path:
    """Score every record that the output does not hold yet; print a line per label and what could not be scored.

    ``dry_run`` checks the input, loads the scorers, scores the first record and writes nothing.

    Returns:
        The output file. Beside it, ``<out>.meta.json`` says which input and scorers it belongs to.

    Raises:
        UserError: the input does not fit, an existing output belongs to another input or other scorers, or more than
            ``config.failures`` of the candidates cannot be scored.
    """
    source, out = siblings(config.records, config.out)
    specs = by_label(config.scorers)
    ids: set[str] = set()
    total = 0
    for record in records.read(source):
        check_unscored(record, specs, retry=config.retry)
        ids.add(record.id)
        total += len(record.candidates)
    require_complete(source, len(ids))
    claim(out, {**_identity(source, specs), "count": len(ids)}, write=not dry_run)
    if dry_run:
        first = next(score_records(records.read(source), source.parent, load_scorers(specs), config.batch))
        labels = [{**candidate.labels, **candidate.errors} for candidate in first.candidates]
        print(f"would score {len(ids)} records of {source} with {', '.join(specs)} into {out}; first record: {labels}")
        return out
    _score_missing(source, out, specs, config, ids, _Budget(config.failures, total))
    _print_summary(out, specs)
    return out


def _print_summary(out: Path, specs: Collection[str]) -> None:
    summary = records.summary(records.read(out))
    for label in specs:
        stats, failed = summary["labels"].get(label), summary["failed"].get(label, 0)
        line = (
            "no scores"
            if stats is None
            else f"mean {stats['mean']:.4f}, min {stats['min']:.4f}, max {stats['max']:.4f}"
        )
        print(f"{label}: {line}{f'; {failed} candidates not scored' if failed else ''}")


def by_label(scorers: Iterable[ScorerConfig]) -> dict[str, ScorerConfig]:
    """Label -> what is configured for it.

    Raises:
        UserError: two scorers have the same label.
    """
    specs: dict[str, ScorerConfig] = {}
    for spec in scorers:
        label = spec.key
        if label in specs:
            raise UserError(f"two scorers write the label {label!r}; give one of them another `label:`")
        specs[label] = spec
    return specs


def load_scorers(specs: dict[str, ScorerConfig]) -> dict[str, Scorer]:
    """Label -> scorer."""
    return {label: load_scorer(spec.name, **spec.params) for label, spec in specs.items()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _identity(source: Path, specs: dict[str, ScorerConfig]) -> dict[str, Any]:
    """What an output depends on: the bytes of the input and the scorers."""
    scorers = {label: {"name": spec.name, "params": spec.params} for label, spec in specs.items()}
    return {"records": {"file": source.name, "sha256": file_digest(source)}, "scorers": scorers}


def _score_missing(
    source: Path, out: Path, specs: dict[str, ScorerConfig], config: ScoreConfig, ids: set[str], budget: _Budget
) -> None:
    with records.Appender(out) as output, Progress() as progress:
        strangers = sorted(output.done - ids)
        if strangers:
            raise UserError(
                f"{out}: record {strangers[0]!r} is not in {source}; choose another `out` or delete this one"
            )
        task = progress.add_task("score", total=len(ids), completed=len(output.done))
        if len(output.done) == len(ids):
            return
        groups = [g for g in record_groups(records.read(source), config.batch) if not output.done.issuperset(_ids(g))]
        load = partial(load_worker, source.parent, specs, config.batch)
        for scored in stream(load, groups, config.engine, config.workers):
            budget.spend(scored, specs)
            missing = [record for record in scored if record.id not in output.done]
            output.append(missing)
            progress.advance(task, len(missing))


def _ids(group: Iterable[Record]) -> set[str]:
    return {record.id for record in group}


def load_worker(root: Path, specs: dict[str, ScorerConfig], batch: int) -> Callable[[Sequence[Record]], list[Record]]:
    """What scores a group of records in whole; the scorers are loaded once."""
    scorers = load_scorers(specs)
    return lambda group: list(score_records(group, root, scorers, batch))


class _Budget:
    """Stops a run that mostly fails: a wrong setting should not cost the whole pool."""

    def __init__(self, share: float, total: int) -> None:
        self.share, self.seen = share, 0
        self.few = min(total, 16)  # so many that all fail say what is wrong
        self.failed: Counter[str] = Counter()

    def spend(self, scored: Iterable[Record], labels: Collection[str]) -> None:
        """Count what a batch lost.

        Raises:
            UserError: a label has lost more than the share (of a hundred candidates at least), or every candidate.
        """
        examples: dict[str, str] = {}
        for record in scored:
            self.seen += len(record.candidates)
            for index, candidate in enumerate(record.candidates):
                for label in candidate.errors.keys() & set(labels):
                    self.failed[label] += 1
                    examples[label] = f"record {record.id!r}, candidate {index}: {candidate.errors[label]}"
        for label, count in self.failed.items():
            if count > self.share * max(self.seen, 100) or (count == self.seen >= self.few):
                raise UserError(
                    f"scorer {label!r} failed on {count} of {self.seen} candidates (`failures: {self.share}`), "
                    f"for example {examples.get(label, 'as the output says')}"
                )
