"""The source tree as the architecture tests see it: parsed files by module name."""

import ast
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted module name -> syntax tree, for the package and the scorers (under the name they install to)."""
    trees = {}
    for folder, package in ((root / "diffalign", "diffalign"), (root / "scorers", "diffalign.scorers")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees
