"""The catalogue: one row per named method, with its paper's parameters as defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from diffalign import draws, estimate
from diffalign.errors import UserError, nearest
from diffalign.registry import check_parameters, find_objective
from diffalign.types import Method, Term

pair = draws.forward
half = estimate.denoising  # scale 1/2, the "half" of the published code

METHODS: dict[str, Method] = {
    row.name: row
    for row in (Method("diffusion-dpo", "arXiv:2311.12908", Term(pair, half, "sigmoid", params={"beta": 5000.0})),)
}


def _with(part: Callable[..., Any], params: Mapping[str, Any]) -> Callable[..., Any]:
    return partial(part, **params) if params else part


def resolve(
    name: str,
    *,
    draw: Mapping[str, Any] | None = None,
    estimate: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
) -> Method:
    """A row with changes to its main term, every parameter checked against the part that takes it.

    ``objective["name"]`` swaps the objective; the row's objective parameters then no longer apply.

    Raises:
        UserError: unknown method, objective or parameter, or a parameter without a value.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    row = METHODS[name]
    term = row.main
    changes = dict(objective or {})
    swapped = changes.pop("name", term.objective)
    found = find_objective(swapped)
    params = {**(term.params if swapped == term.objective else {}), **changes}
    check_parameters(term.draw, draw or {}, f"the draw of {name}")
    check_parameters(term.estimate, estimate or {}, f"the estimate of {name}")
    check_parameters(found.fn, params, f"objective {swapped!r}", complete=True)
    main = replace(
        term,
        draw=_with(term.draw, draw or {}),
        estimate=_with(term.estimate, estimate or {}),
        objective=swapped,
        params=params,
    )
    return replace(row, main=main)
