"""Scorers: the protocol, loading them by name, and adding their labels to records.

A scorer is one file ``scorers/<name>.py`` with ``build(**params) -> Scorer``, the same as an entry point of group
``diffalign.scorers``, or anything that ``"package.module:build"`` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffalign.errors import UserError, nearest
from diffalign.records import Candidate, Record, plain_text, read_image

if TYPE_CHECKING:
    from PIL import Image

GROUP = "diffalign.scorers"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a scorer sees of a candidate: an image or a text, its prompt, and the record's ``meta``."""

    prompt: str
    image: Image.Image | None = None
    text: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``"image"`` or ``"text"``."""
        return "text" if self.image is None else "image"


@dataclass(frozen=True, slots=True)
class Score:
    """Higher is better. With ``units`` (one number per frame, segment or token) the label is that list."""

    value: float
    units: tuple[float, ...] | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """A callable with its needs: one score per sample, in order."""

    @property
    def accepts(self) -> frozenset[str]:
        """Of ``"image"`` and ``"text"``."""
        ...

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Score]: ...


def _package() -> str | None:
    """The import name of the folder ``scorers``: installed, or beside the package in a checkout."""
    if importlib.util.find_spec(GROUP):
        return GROUP
    spec = importlib.util.find_spec("scorers")
    ours = Path(__file__).resolve().parents[1] / "scorers" / "__init__.py"
    return "scorers" if spec and spec.origin and Path(spec.origin).resolve() == ours else None


def _targets() -> dict[str, str]:
    """Scorer name -> ``"module:build"``, without importing any scorer."""
    package = _package()
    targets: dict[str, str] = {}
    if package:
        folder = importlib.import_module(package).__path__
        names = (module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))
        targets = {name: f"{package}.{name}:build" for name in names}
    for point in entry_points(group=GROUP):
        if point.value.startswith(f"{GROUP}."):  # this project's own, found by file name
            continue
        if point.name in targets:
            raise UserError(f"scorer {point.name!r} is both {targets[point.name]} and {point.value}; uninstall one")
        targets[point.name] = point.value
    return targets


def scorer_names() -> list[str]:
    """The names that :func:`load_scorer` knows."""
    return sorted(_targets())


def _resolve(name: str) -> Callable[..., Scorer]:
    """The ``build`` function of a scorer."""
    target = name
    if ":" not in name:
        targets = _targets()
        if name not in targets:
            raise UserError(f"unknown scorer {name!r}{nearest(name, targets)}")
        target = targets[name]
    module, _, attribute = target.partition(":")
    try:
        build: Callable[..., Scorer] | None = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"scorer {name!r}: no module {error.name!r}; is its package installed?") from None
    except (TypeError, ValueError):  # "", ".x": not module names
        raise UserError(f"scorer {name!r}: expected a scorer name or package.module:build") from None
    if not callable(build):
        raise UserError(f"scorer {name!r}: {module} has no function {attribute!r}")
    return build


def _check_params(name: str, build: Callable[..., Scorer], params: Mapping[str, Any]) -> None:
    parameters = inspect.signature(build).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    valid = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    wrong = [f"unknown parameter {key!r}" for key in params if key not in valid]
    wrong += [f"missing parameter {key!r}" for key in needed if key not in params]
    if wrong:
        raise UserError(f"scorer {name!r}: {', '.join(wrong)}; valid: {', '.join(valid) or 'none'}")


def load_scorer(name: str, **params: Any) -> Scorer:
    """Build a scorer by file name, entry point or ``"package.module:build"``.

    Raises:
        UserError: the name or a parameter is not known, a parameter is missing, or a package is not installed.
    """
    build = _resolve(name)
    _check_params(name, build, params)
    scorer = build(**params)
    if not callable(scorer) or not hasattr(scorer, "accepts"):
        raise UserError(f"scorer {name!r}: build() returned {type(scorer).__name__}, which is not a Scorer")
    return scorer


def check_unscored(record: Record, labels: Collection[str]) -> None:
    """A record can take these labels: it has candidates and none of them carries one already."""
    if not record.candidates:
        raise UserError(f"record {record.id!r} has no candidates to score")
    if not isinstance(record.meta.get("scores", {}), dict):
        raise UserError(f"record {record.id!r}: meta.scores is where scorers put details; rename this key")
    for index, candidate in enumerate(record.candidates):
        taken = sorted(candidate.labels.keys() & set(labels))
        if taken:
            where = f"record {record.id!r}, candidate {index}"
            raise UserError(f"{where}: label {taken[0]!r} is already there; choose another `label:`")


def score_records(records: Iterable[Record], root: Path, scorers: Mapping[str, Scorer], batch: int) -> Iterator[Record]:
    """Stream records with a label per scorer added, in order; the inputs stay as they are.

    Args:
        root: folder that media paths are relative to.
        scorers: label -> scorer. Its details, if any, go to ``meta["scores"][label]``, one per candidate.
        batch: candidates per scorer call, across records.

    Raises:
        UserError: a label is already there, a sample cannot be read, or a scorer does not fit or misbehaves.
    """
    scored: list[dict[str, Score]] = []
    for record, scores in _scored_candidates(records, root, scorers, batch):
        scored.append(scores)
        if len(scored) == len(record.candidates):
            yield _labelled(record, scored)
            scored = []


def _scored_candidates(
    records: Iterable[Record], root: Path, scorers: Mapping[str, Scorer], batch: int
) -> Iterator[tuple[Record, dict[str, Score]]]:
    """Every candidate of every record, in order: its record and its score per label."""
    candidates = _candidates(records, scorers)
    while chunk := list(islice(candidates, batch)):
        samples = [_sample(record, record.candidates[index], root) for record, index in chunk]
        names = [f"record {record.id!r}, candidate {index}" for record, index in chunk]
        columns = {label: _call(label, scorer, samples, names) for label, scorer in scorers.items()}
        for row, (record, _) in enumerate(chunk):
            yield record, {label: column[row] for label, column in columns.items()}


def _candidates(records: Iterable[Record], labels: Collection[str]) -> Iterator[tuple[Record, int]]:
    for record in records:
        check_unscored(record, labels)
        for index in range(len(record.candidates)):
            yield record, index


def _sample(record: Record, candidate: Candidate, root: Path) -> Sample:
    prompt = plain_text(record.prompt)
    if candidate.text is not None:
        return Sample(prompt, text=plain_text(candidate.text), meta=record.meta)
    assert candidate.sample is not None  # a candidate has either
    try:
        return Sample(prompt, image=read_image(root, candidate.sample), meta=record.meta)
    except UserError as error:
        raise UserError(f"record {record.id!r}: {error}") from None


def _call(label: str, scorer: Scorer, samples: Sequence[Sample], names: Sequence[str]) -> list[Score]:
    """One scorer on one batch, its answer checked; ``names`` say which candidates these are."""
    for sample, name in zip(samples, names, strict=True):
        if sample.kind not in scorer.accepts:
            accepts = " or ".join(sorted(scorer.accepts))
            raise UserError(f"scorer {label!r} reads {accepts}, but {name} is {sample.kind}")
    try:
        scores = list(scorer(samples))
    except UserError as error:
        raise UserError(f"scorer {label!r}, {names[0]} to {names[-1]}: {error}") from None
    if len(scores) != len(samples):
        raise UserError(
            f"scorer {label!r} returned {len(scores)} scores for {len(samples)} samples ({names[0]} to {names[-1]})"
        )
    return [_checked(label, score, name) for score, name in zip(scores, names, strict=True)]


def _checked(label: str, score: Score, name: str) -> Score:
    """A score of plain finite floats."""
    if not isinstance(score, Score):
        raise UserError(f"scorer {label!r} returned {type(score).__name__} for {name}, expected a Score")
    value = float(score.value)
    units = None if score.units is None else tuple(float(unit) for unit in score.units)
    if not all(map(math.isfinite, (value, *(units or ())))) or units == ():
        raise UserError(
            f"scorer {label!r} returned value {value} and units {units} for {name}, expected finite numbers"
        )
    return Score(value, units, score.detail)


def _labelled(record: Record, scored: Sequence[Mapping[str, Score]]) -> Record:
    """A copy with labels; scores of K candidates by label."""
    candidates = []
    for candidate, scores in zip(record.candidates, scored, strict=True):
        new = {label: s.value if s.units is None else list(s.units) for label, s in scores.items()}
        candidates.append(candidate.model_copy(update={"labels": {**candidate.labels, **new}}))
    details = {label: [dict(scores[label].detail) for scores in scored] for label in scored[0]}
    details = {label: column for label, column in details.items() if any(column)}
    meta = {**record.meta, "scores": {**record.meta.get("scores", {}), **details}} if details else record.meta
    return record.model_copy(update={"candidates": candidates, "meta": meta})
