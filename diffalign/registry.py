"""Objectives and shapings by name, anything by ``module:attribute``, keyword-only signatures as parameter schema."""

from __future__ import annotations

import importlib
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from diffalign.errors import UserError, nearest
from diffalign.types import Labels, LogProbs, Loss, Role, parts


@dataclass(frozen=True, slots=True)
class Objective:
    """A registered loss and what it needs.

    ``k`` None means any number of candidates; ``reads`` names entries of ``LogProbs.extra`` and ``"gap.<role>"``, after
    ``"text:"`` for text alone;
    ``fits`` says which modalities it makes sense for; ``identity`` is its value wherever policy = reference, None if
    that depends on the data; ``differences``: it reads nothing but the difference of the two log-ratios; ``listwise``:
    it learns from an order of three or more; ``vectors``: labels that may be (B, K, ...), where others are (B, K).
    """

    name: str
    fn: Callable[..., Loss | tuple[Loss, ...]]
    k: int | None
    paper: str
    roles: tuple[Role, ...]
    labels: tuple[str, ...]
    reads: tuple[str, ...]
    fits: tuple[str, ...]
    identity: float | None
    optional: tuple[str, ...]
    differences: bool
    listwise: bool
    vectors: tuple[str, ...]

    def __call__(self, lp: LogProbs, labels: Labels, **params: Any) -> tuple[Loss, ...]:
        """The parts of the loss.

        Raises:
            UserError: the batch has another number of candidates, or lacks a label or has it in another shape.
        """
        k = lp.mask.shape[1]
        if self.k not in (None, k):
            raise UserError(f"objective {self.name!r} needs exactly {self.k} candidates per record, the batch has {k}")
        given = (label for label in self.optional if label in labels)
        _check_labels(f"objective {self.name!r}", (*self.labels, *given), self.vectors, lp, labels)
        return parts(self.fn(lp, labels, **params))


@dataclass(frozen=True, slots=True)
class Shaping:
    """A registered transformation of log-probs that composes with objectives: ``over`` says with which.

    ``"any"``, those over ``"pairs"``, or only those that read ``"differences"`` of log-ratios.
    """

    name: str
    fn: Callable[..., LogProbs]
    paper: str
    roles: tuple[Role, ...]
    labels: tuple[str, ...]
    over: Literal["any", "pairs", "differences"]
    fits: tuple[str, ...]
    vectors: tuple[str, ...]

    def __call__(self, lp: LogProbs, labels: Labels, **params: Any) -> LogProbs:
        """The log-probs in another form.

        Raises:
            UserError: the batch lacks a label or has it in another shape.
        """
        _check_labels(f"shaping {self.name!r}", self.labels, self.vectors, lp, labels)
        return self.fn(lp, labels, **params)


def _check_labels(part: str, names: Sequence[str], vectors: Sequence[str], lp: LogProbs, labels: Labels) -> None:
    """Refuse a batch that lacks a label, or has several numbers per candidate of one that is a single number."""
    b, k = lp.mask.shape[:2]
    for name in names:
        if name not in labels:
            raise UserError(f"{part} reads the label {name!r}, which the batch lacks")
        shape = tuple(labels[name].shape)
        if shape[:2] != (b, k) or (len(shape) > 2 and name not in vectors):
            wanted = f"({b}, {k}, ...)" if name in vectors else (b, k)
            raise UserError(f"{part}: label {name!r} has shape {shape}, not {wanted}")


OBJECTIVES: dict[str, Objective] = {}
SHAPINGS: dict[str, Shaping] = {}


def objective(
    *,
    k: int | None,
    paper: str,
    roles: Sequence[Role] = (),
    labels: Sequence[str] = ("reward",),
    reads: Sequence[str] = (),
    fits: Sequence[str] = ("diffusion", "text"),
    identity: float | None = None,
    optional: Sequence[str] = (),
    differences: bool = False,
    listwise: bool = False,
    vectors: Sequence[str] = (),
) -> Callable[[Callable[..., Loss | tuple[Loss, ...]]], Callable[..., Any]]:
    """Register a pure function ``(lp, labels, *, params) -> Loss`` (or several parts) under its own name.

    Args:
        k: candidates per record, None for any.
        paper: arXiv id and equation.
        roles: roles beside the policy whose log-probs it reads.
        labels: labels it reads.
        reads: what else it reads of the log-probs: names in ``extra``, or ``gap.<role>``.
        fits: ``"diffusion"``, ``"text"`` or both.
        identity: value per record at policy = reference; every run checks it at step 0.
        optional: labels it reads where the records have them.
        differences: it reads nothing but the difference of the two candidates' log-ratios to the reference.
        listwise: it learns from an order of three or more; records of pairs alone are refused.
        vectors: labels that may hold several numbers per candidate (B, K, ...); others are refused unless (B, K).
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        needs = (tuple(roles), tuple(labels), tuple(reads), tuple(fits))
        kind = (identity, tuple(optional), differences, listwise, tuple(vectors))
        _add(OBJECTIVES, "objective", Objective(fn.__name__, fn, k, paper, *needs, *kind))
        return fn

    return register


def shaping(
    *,
    paper: str,
    roles: Sequence[Role] = (),
    labels: Sequence[str] = (),
    over: Literal["any", "pairs", "differences"] = "any",
    fits: Sequence[str] = ("diffusion", "text"),
    vectors: Sequence[str] = (),
) -> Callable[[Callable[..., LogProbs]], Callable[..., LogProbs]]:
    """Register a pure function ``(lp, labels, *, params) -> LogProbs`` under its own name.

    Args:
        paper: arXiv id and equation.
        roles: roles beside the policy whose log-probs it reads.
        labels: labels it reads.
        over: which objectives it composes with: any, those over pairs, or those that read differences of log-ratios
            alone, since only these mean something in its output.
        fits: ``"diffusion"``, ``"text"`` or both.
        vectors: as of :func:`objective`.
    """

    def register(fn: Callable[..., LogProbs]) -> Callable[..., LogProbs]:
        kind = (over, tuple(fits), tuple(vectors))
        _add(SHAPINGS, "shaping", Shaping(fn.__name__, fn, paper, tuple(roles), tuple(labels), *kind))
        return fn

    return register


def _add(registry: dict[str, Any], what: str, entry: Any) -> None:
    if entry.name in registry:
        raise ValueError(f"{what} {entry.name!r} is already registered by {registry[entry.name].fn.__module__}")
    registry[entry.name] = entry


def find_objective(name: str) -> Objective:
    """An objective by name, or a foreign one by ``package.module:function`` (registered by its own decorator)."""
    return _find(OBJECTIVES, "objective", name)


def find_shaping(name: str) -> Shaping:
    """A shaping by name, or a foreign one by ``package.module:function`` (registered by its own decorator)."""
    return _find(SHAPINGS, "shaping", name)


def _find(registry: dict[str, Any], what: str, name: str) -> Any:
    importlib.import_module("diffalign.objectives")
    if ":" in name:
        fn = load_attribute(name)
        found = next((entry for entry in registry.values() if entry.fn is fn), None)
        if found is None:
            raise UserError(f"{name} is no {what}: decorate it with diffalign.registry.{what}")
        return found
    if name not in registry:
        raise UserError(f"unknown {what} {name!r}{nearest(name, registry)}")
    return registry[name]


def load_attribute(path: str) -> Any:
    """The object at ``package.module:attribute``."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load {path!r}: {error}") from None


def keyword_parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a part, their annotations as types: its YAML schema."""
    try:
        signature = inspect.signature(fn, eval_str=True)
    except NameError:  # an annotation that exists for type checkers alone
        signature = inspect.signature(fn)
    return {p.name: p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation asks for; numbers must be finite, other types are not looked at."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) in (list, tuple, Sequence):
        inner = get_args(annotation)[0]
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _kind(annotation: Any) -> str:
    """An annotation in words."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return str(getattr(annotation, "__name__", annotation)) if isinstance(annotation, type) else str(annotation)


def check_parameters(fn: Callable[..., Any], given: Mapping[str, Any], where: str, *, complete: bool = False) -> None:
    """Refuse parameters a part does not have, values of another type, and missing ones if ``complete``.

    Raises:
        UserError: names the parameter, the part and the nearest valid name or the type.
    """
    schema = keyword_parameters(fn)
    for name, value in given.items():
        if name not in schema:
            raise UserError(f"{where} has no parameter {name!r}{nearest(name, schema)}")
        if not _fits(value, schema[name].annotation):
            raise UserError(f"{where}: {name} must be {_kind(schema[name].annotation)}, got {value!r}")
    missing = [n for n, p in schema.items() if p.default is inspect.Parameter.empty and n not in given]
    if complete and missing:
        raise UserError(f"{where} needs {', '.join(missing)}")
