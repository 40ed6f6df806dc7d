"""Fixtures of the unit tests."""

import math
import sys
from types import ModuleType

import pytest

from .fake_scorers import Length


@pytest.fixture
def outside(monkeypatch):
    """A module outside the project with build functions; returns the scorers it built."""
    module = ModuleType("other_scorers")
    built = []

    def length(scale: float = 1.0) -> Length:
        built.append(Length(scale, module.fail_after, module.refuses))
        return built[-1]

    def needy(path: str, *, size: int = 3):
        return Length()

    module.fail_after = math.inf
    module.refuses = set()
    module.built = built
    module.length, module.needy = length, needy
    module.anything = lambda **params: Length(**params)
    module.broken = lambda: 3
    monkeypatch.setitem(sys.modules, "other_scorers", module)
    return module
