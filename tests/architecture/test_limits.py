"""Limits that keep the code readable, and what must not be in any file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 80
SOURCES = ("diffalign", "scorers", "tests", "benchmarks")
TEXT = {".py", ".toml", ".yaml", ".yml", ".md", ".txt", ".cfg", ".ipynb", ".html", ".lock", ".json", ".jsonl"}
PLAIN = ("Makefile", ".ci/run", ".gitignore")
REGISTRY = re.compile(r"index[-_]url|uv[._]index|pip_index|[/.]simple/|https?://[^\s\"'`)]*/simple\b", re.IGNORECASE)


def sources(root: Path) -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted((root / folder).rglob("*.py"))


def texts(root: Path) -> Iterator[Path]:
    """Every text file of the project, without what tools and runs leave behind."""
    for top in (*SOURCES, "configs", "notebooks", ".ci"):
        yield from (path for path in sorted((root / top).rglob("*")) if path.suffix in TEXT)
    yield from (path for path in sorted(root.iterdir()) if path.suffix in TEXT)
    yield from (root / name for name in PLAIN)


def test_files_are_short(root):
    long = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    long = {name: lines for name, lines in long.items() if lines >= FILE_LINES}
    assert not long, f"{FILE_LINES} lines or more: {long}"


def test_functions_are_short(root):
    long = []
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= FUNCTION_LINES:
                    long.append(f"{path.relative_to(root)}:{node.lineno} {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_public_things_say_what_they_are(modules):
    silent = []
    for name, tree in modules.items():
        if tree.body and not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                public = not node.name.startswith("_") and not name.rpartition(".")[2].startswith("_")
                if public and not ast.get_docstring(node):
                    silent.append(f"{name}:{node.lineno} {node.name}")
    assert not silent, "no docstring:\n" + "\n".join(silent)


def test_no_file_names_a_package_registry(root):
    own = Path(__file__).resolve()
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in texts(root)
        if path.resolve() != own
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if REGISTRY.search(line)
    ]
    assert not found, "\n".join(found)
