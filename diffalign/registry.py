"""Objectives by name, anything by ``module:attribute``, and keyword-only signatures as the parameter schema."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError, nearest
from diffalign.types import Labels, LogProbs, Loss, Role


@dataclass(frozen=True, slots=True)
class Objective:
    """A registered loss and what it needs.

    ``k`` None means any number of candidates; ``identity`` is its value wherever policy = reference, None if that
    depends on the data.
    """

    name: str
    fn: Callable[..., Loss]
    k: int | None
    paper: str
    roles: tuple[Role, ...]
    labels: tuple[str, ...]
    identity: float | None

    def __call__(self, lp: LogProbs, labels: Labels, **params: Any) -> Loss:
        return self.fn(lp, labels, **params)

    @property
    def origin(self) -> str:
        """``file:line`` of the definition."""
        return f"{inspect.getsourcefile(self.fn)}:{inspect.getsourcelines(self.fn)[1]}"


OBJECTIVES: dict[str, Objective] = {}
PLAIN: dict[str, Any] = {"float": float | int, "int": int, "bool": bool, "str": str, "None": type(None)}
"""Annotations that a value of a config is checked against."""


def objective(
    *,
    k: int | None,
    paper: str,
    roles: Sequence[Role] = (),
    labels: Sequence[str] = ("reward",),
    identity: float | None = None,
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Register a pure function ``(lp, labels, *, params) -> Loss`` under its own name.

    Args:
        k: candidates per record, None for any.
        paper: arXiv id and equation.
        roles: roles beside the policy whose log-probs it reads.
        labels: labels it reads.
        identity: value per record at policy = reference; every run checks it at step 0.
    """

    def register(fn: Callable[..., Loss]) -> Callable[..., Loss]:
        name = fn.__name__
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is already registered at {OBJECTIVES[name].origin}")
        OBJECTIVES[name] = Objective(name, fn, k, paper, tuple(roles), tuple(labels), identity)
        return fn

    return register


def find_objective(name: str) -> Objective:
    """An objective by name, or a foreign one by ``package.module:function`` (registered by its own decorator)."""
    importlib.import_module("diffalign.objectives")
    if ":" in name:
        fn = load_attribute(name)
        return next((o for o in OBJECTIVES.values() if o.fn is fn), None) or _unregistered(name)
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def _unregistered(name: str) -> Objective:
    raise UserError(f"{name} is not an objective: decorate it with diffalign.registry.objective")


def load_attribute(path: str) -> Any:
    """The object at ``package.module:attribute``."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load {path!r}: {error}") from None


def keyword_parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a part: its YAML schema."""
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation of plain types asks for; numbers must be finite."""
    names = str(getattr(annotation, "__name__", annotation)).split(" | ")
    if not all(name in PLAIN for name in names):
        return True
    if isinstance(value, bool):
        return "bool" in names
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and any(isinstance(value, PLAIN[name]) for name in names)


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
            raise UserError(f"{where}: {name} must be {schema[name].annotation}, got {value!r}")
    missing = [n for n, p in schema.items() if p.default is inspect.Parameter.empty and n not in given]
    if complete and missing:
        raise UserError(f"{where} needs {', '.join(missing)}")
