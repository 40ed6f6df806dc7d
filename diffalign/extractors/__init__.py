"""Extractors: what reads a condition (edges, depth ...) off a picture, as ControlNets are given it.

An extractor is one file with ``build(**params) -> Extractor``; files that begin with ``_`` are parts of them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from diffalign.errors import UserError, nearest

Extractor = Callable[[Sequence[Image.Image]], list[Image.Image]]
"""RGB pictures -> their conditions, RGB and of the same sizes."""


def extractor_names() -> list[str]:
    """The names that :func:`load_extractor` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load_extractor(name: str, **params: Any) -> Extractor:
    """An extractor by file name.

    Raises:
        UserError: unknown name or parameter, a parameter is missing or wrong, or a package is not installed.
    """
    names = extractor_names()
    if name not in names:
        raise UserError(f"unknown extractor {name!r}{nearest(name, names)}")
    build: Callable[..., Extractor] = importlib.import_module(f"{__name__}.{name}").build
    valid = inspect.signature(build).parameters
    wrong = next((key for key in params if key not in valid), None)
    if wrong is not None:
        raise UserError(f"extractor {name!r}: unknown parameter {wrong!r}{nearest(wrong, valid)}")
    missing = next((key for key, p in valid.items() if p.default is p.empty and key not in params), None)
    if missing is not None:
        raise UserError(f"extractor {name!r}: missing parameter {missing!r}")
    return build(**params)
