"""Preference alignment for image, video and 3D generators and text LLMs: generate candidates, score them, take a step.

The public names below resolve on first use, so that ``import diffalign`` and the command line stay instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.families.base import load_family
    from diffalign.methods import METHODS
    from diffalign.records import Record
    from diffalign.registry import OBJECTIVES
    from diffalign.scoring import load_scorer
    from diffalign.train.step import loss_step
    from diffalign.types import Batch

__version__ = "0.1.0"

__all__ = ["METHODS", "OBJECTIVES", "Batch", "Record", "load_family", "load_scorer", "loss_step"]

_HOMES = {
    "METHODS": "diffalign.methods",
    "OBJECTIVES": "diffalign.registry",
    "Batch": "diffalign.types",
    "Record": "diffalign.records",
    "load_family": "diffalign.families.base",
    "load_scorer": "diffalign.scoring",
    "loss_step": "diffalign.train.step",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "OBJECTIVES":
        import_module("diffalign.objectives")  # fills the registry
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
