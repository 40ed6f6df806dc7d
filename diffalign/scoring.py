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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from diffalign.errors import UserError, nearest
from diffalign.records import Candidate, Record, media_kind, media_path, plain_text, read_image

if TYPE_CHECKING:
    from PIL import Image

GROUP = "diffalign.scorers"
KINDS = ("image", "text", "video", "mesh")


@dataclass(frozen=True, slots=True)
class Sample:
    """What a scorer sees of a candidate: what was made, its prompt, what it was made from, and the record's ``meta``.

    Pictures come decoded; clips, meshes and condition pictures as the files they are.
    """

    prompt: str
    image: Image.Image | None = None
    text: str | None = None
    video: Path | None = None
    mesh: Path | None = None
    condition: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``"image"``, ``"text"``, ``"video"`` or ``"mesh"``."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


@dataclass(frozen=True, slots=True)
class Score:
    """Higher is better. With ``units`` (one number per frame, segment or token) the label is that list."""

    value: float
    units: tuple[float, ...] | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Instead of a score: this one item could not be scored. It is counted and masked, and never taken for a zero."""

    kind: str
    """``input`` (the item), ``not-finite``, ``timeout``, ``remote`` or the name of an exception."""
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(self.reason.split())}"


Outcome = Score | Failure


class Scorer(Protocol):
    """A callable with its needs: one outcome per sample, in order.

    A scorer with a true ``together`` compares: it is called with all candidates of one record at a time.
    """

    @property
    def accepts(self) -> frozenset[str]:
        """Of :data:`KINDS`."""
        ...

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Outcome]: ...


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
    for key, annotation in _choices(build).items():
        if key in params and params[key] not in annotation:
            raise UserError(f"scorer {name!r}: {key} {params[key]!r}: choose {', '.join(map(str, annotation))}")


def _choices(build: Callable[..., Scorer]) -> dict[str, tuple[Any, ...]]:
    """The parameters that are one of some words, by their annotations."""
    try:
        hints = get_type_hints(build)
    except NameError:  # a type that is only imported for checking
        return {}
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


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


def check_unscored(record: Record, labels: Collection[str], *, retry: bool = False) -> None:
    """A record can take these labels: it has candidates and none of them carries one already.

    Args:
        retry: labels may be there, since only what failed is scored again.
    """
    if not record.candidates:
        raise UserError(f"record {record.id!r} has no candidates to score")
    if not isinstance(record.meta.get("scores", {}), dict):
        raise UserError(f"record {record.id!r}: meta.scores is where scorers put details; rename this key")
    for index, candidate in enumerate(record.candidates):
        taken = sorted((candidate.labels.keys() | candidate.errors.keys()) & set(labels))
        if taken and not retry:
            where = f"record {record.id!r}, candidate {index}"
            raise UserError(f"{where}: label {taken[0]!r} is already there; choose another `label:`")


def record_groups(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Runs of records with up to ``size`` candidates, or one record with more.

    The same runs whatever was done before: the last bits of a score may depend on the batch it is computed in.
    """
    group: list[Record] = []
    held = 0
    for record in records:
        if group and held + len(record.candidates) > size:
            yield group
            group, held = [], 0
        group.append(record)
        held += len(record.candidates)
    if group:
        yield group


def score_records(records: Iterable[Record], root: Path, scorers: Mapping[str, Scorer], batch: int) -> Iterator[Record]:
    """Stream records with a label per scorer added, in order; the inputs stay as they are.

    A candidate that a scorer fails on, or that cannot be read, gets the reason in ``errors[label]`` instead. A label
    that is already there is kept.

    Args:
        root: folder that media paths are relative to.
        scorers: label -> scorer. Its details, if any, go to ``meta["scores"][label]``, one per candidate.
        batch: candidates per scorer call, across records.

    Raises:
        UserError: a scorer does not read what it is given, or does not return one outcome per sample.
    """
    for group in record_groups(records, batch):
        for record in group:
            check_unscored(record, scorers, retry=True)
        items = [_Item(record, index, root) for record in group for index in range(len(record.candidates))]
        columns = {label: _column(label, scorer, items, batch) for label, scorer in scorers.items()}
        start = 0
        for record in group:
            end = start + len(record.candidates)
            yield _labelled(record, {label: column[start:end] for label, column in columns.items()})
            start = end


class _Item:
    """A candidate on its way to the scorers."""

    def __init__(self, record: Record, index: int, root: Path) -> None:
        self.record, self.index = record, index
        self.candidate = record.candidates[index]
        self.name = f"record {record.id!r}, candidate {index}"
        self.sample: Sample | Failure
        try:
            self.sample = _sample(record, self.candidate, root)
        except UserError as error:
            self.sample = Failure("input", str(error))


def _sample(record: Record, candidate: Candidate, root: Path) -> Sample:
    prompt = plain_text(record.prompt)
    if candidate.text is not None:
        return Sample(prompt, text=plain_text(candidate.text), meta=record.meta)
    assert candidate.sample is not None  # a candidate has either
    condition = candidate.condition or record.condition
    given: dict[str, Any] = {"meta": record.meta}
    if condition is not None:
        given["condition"] = media_path(root, condition)
    kind = media_kind(candidate.sample)
    if kind == "image":
        return Sample(prompt, image=read_image(root, candidate.sample), **given)
    path = media_path(root, candidate.sample)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return Sample(prompt, **{kind: path}, **given)


def _column(label: str, scorer: Scorer, items: Sequence[_Item], batch: int) -> list[Outcome | None]:
    """The outcomes of one scorer for every item; None where the label is there already."""
    column: list[Outcome | None] = [None] * len(items)
    todo: dict[int, Sample] = {}
    for n, item in enumerate(items):
        if label in item.candidate.labels:
            continue
        if isinstance(item.sample, Failure):
            column[n] = item.sample
        else:
            todo[n] = item.sample
    for call in _calls(scorer, items, list(todo), batch):
        outcomes = score_batch(label, scorer, [todo[n] for n in call], [items[n].name for n in call])
        for n, outcome in zip(call, outcomes, strict=True):
            column[n] = outcome
    return column


def _calls(scorer: Scorer, items: Sequence[_Item], todo: Sequence[int], batch: int) -> list[Sequence[int]]:
    """Which items go together into a call."""
    if not getattr(scorer, "together", False):
        return [todo[start : start + batch] for start in range(0, len(todo), batch)]
    by_record: dict[str, list[int]] = {}
    for n in todo:
        by_record.setdefault(items[n].record.id, []).append(n)
    return list(by_record.values())


def score_batch(label: str, scorer: Scorer, samples: Sequence[Sample], names: Sequence[str]) -> list[Outcome]:
    """One scorer on one batch, its answer checked; ``names`` say which candidates these are.

    A batch that fails as a whole is scored again item by item, so that one bad item costs no other its score.

    Raises:
        UserError: the scorer does not read what it is given, or does not return one outcome per sample.
    """
    for sample, name in zip(samples, names, strict=True):
        if sample.kind not in scorer.accepts:
            accepts = " or ".join(sorted(scorer.accepts))
            raise UserError(f"scorer {label!r} reads {accepts}, but {name} is {sample.kind}")
    try:
        outcomes = list(scorer(samples))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch; smaller calls would hide that `batch` is too large
            raise
        if len(samples) == 1 or getattr(scorer, "together", False):
            kind = "input" if isinstance(error, UserError) else type(error).__name__
            return [Failure(kind, str(error))] * len(samples)
        return [score_batch(label, scorer, [s], [n])[0] for s, n in zip(samples, names, strict=True)]
    if len(outcomes) != len(samples):
        where = f"({names[0]} to {names[-1]})"
        raise UserError(f"scorer {label!r} returned {len(outcomes)} scores for {len(samples)} samples {where}")
    return [_checked(label, outcome, name) for outcome, name in zip(outcomes, names, strict=True)]


def _checked(label: str, outcome: Outcome, name: str) -> Outcome:
    """A score of plain finite floats; what is not finite is a failure."""
    if isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome, Score):
        raise UserError(f"scorer {label!r} returned {type(outcome).__name__} for {name}, expected a Score or a Failure")
    value = float(outcome.value)
    units = None if outcome.units is None else tuple(float(unit) for unit in outcome.units)
    if not all(map(math.isfinite, (value, *(units or ())))) or units == ():
        return Failure("not-finite", f"value {value}, units {units}")
    return Score(value, units, outcome.detail)


def _labelled(record: Record, columns: Mapping[str, Sequence[Outcome | None]]) -> Record:
    """A copy with labels, or the reasons why there are none; outcomes of K candidates by label."""
    candidates = []
    for index, candidate in enumerate(record.candidates):
        labels, errors = dict(candidate.labels), dict(candidate.errors)
        for label, column in columns.items():
            outcome = column[index]
            if isinstance(outcome, Failure):
                errors[label] = str(outcome)
            elif outcome is not None:
                labels[label] = outcome.value if outcome.units is None else list(outcome.units)
                errors.pop(label, None)
        candidates.append(candidate.model_copy(update={"labels": labels, "errors": errors}))
    return record.model_copy(update={"candidates": candidates, "meta": _with_details(record.meta, columns)})


def _with_details(meta: dict[str, Any], columns: Mapping[str, Sequence[Outcome | None]]) -> dict[str, Any]:
    """``meta`` with what the scorers say beside their numbers."""
    known = meta.get("scores", {})
    details = {}
    for label, column in columns.items():
        before = known.get(label) or [{}] * len(column)
        column_details = [
            dict(outcome.detail) if isinstance(outcome, Score) else earlier
            for outcome, earlier in zip(column, before, strict=True)
        ]
        if any(column_details):
            details[label] = column_details
    return {**meta, "scores": {**known, **details}} if details else meta
