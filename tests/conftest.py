"""Set-up of the whole suite: no test reaches the network, and the command line runs in-process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a library that reads it
settings.register_profile("diffalign", deadline=None)  # the first example of a test may import torch
settings.load_profile("diffalign")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registered here and not in ``golden/``: pytest reads options before it descends into folders."""
    parser.addoption("--golden-dir", metavar="DIR", help="reference numbers to check, instead of tests/golden/data")


class Outcome(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def cli(capsys) -> Callable[..., Outcome]:
    """``cli("train", path, "run.steps=2")`` runs that command line here and captures what it prints."""
    from diffalign.cli import main

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run
