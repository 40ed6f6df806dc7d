"""Who may import whom. Imports inside functions count; the few exceptions are listed with the rule they bend."""

import ast
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from diffalign.worlds import WORLDS

LEVELS = (
    {"errors", "types", "registry", "randomness"},
    {
        *("schedule", "likelihood", "transitions", "timesteps", "edm", "credit", "token_credit", "objectives"),
        *("anchors", "merging", "games", "diagnostics", "geneval", "charts"),
    },
    {
        *("files", "families", "weights", "kohya", "records", "results", "importers", "scoring", "worlds"),
        *("media", "networks", "mesh", "foreign", "sharding", "parquet", "extractors", "engines", "engine_ray"),
        *("wire", "outcomes", "machine"),
    },
    {"estimate", "samplers", "draws"},
    {"methods"},
    {"config"},
    {
        *("generate", "prompts", "models", "score", "rewards", "choices", "build", "pool_page", "pages", "importing"),
        *("encoding", "dataset", "bank", "textset", "train", "evaluate"),
        *("label", "report", "doctor", "quickstart", "export", "predict", "serve", "serve_http", "serving"),
        *("geneval_layout", "comparison", "overoptimisation"),
        *("arena", "held_out"),
    },
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

SIDEWAYS = {
    "registry": {"errors", "types"},
    "types": {"randomness"},
    "transitions": {"schedule", "likelihood"},
    "edm": {"schedule"},
    "objectives": {"credit"},
    "records": {"files"},
    "weights": {"files", "sharding"},
    "sharding": {"networks"},
    "media": {"files", "records", "mesh"},
    "families": {"media", "networks", "foreign"},
    "kohya": {"weights"},
    "scoring": {"records"},
    "extractors": {"foreign"},
    "wire": {"records", "scoring"},
    "outcomes": {"files"},
    "engines": {"records", "engine_ray"},
    "engine_ray": {"records"},
    "generate": {"models", "prompts"},
    "choices": {"rewards"},
    "pool_page": {"rewards", "pages"},
    "build": {"rewards", "choices", "pool_page"},
    "score": {"engines"},
    "report": {"pages", "overoptimisation"},
    "serve": {"score", "serve_http", "serving"},
    "serve_http": {"serving"},
    "importers": {"records", "files", "parquet"},
    "parquet": {"records", "files"},
    "mesh": {"files"},
    "draws": {"estimate"},
    "estimate": {"samplers"},
    "textset": {"dataset"},
    "dataset": {"encoding"},
    "bank": {"dataset", "encoding"},
    "train": {
        "bank",
        "encoding",
        "dataset",
        "textset",
        "models",
        "score",
        "build",
        "prompts",
        "generate",
        "rewards",
        "comparison",
        "overoptimisation",
        "held_out",
        "label",
    },
    "evaluate": LEVELS[6] - {"quickstart", "report", "build", "export"},
    "overoptimisation": {"comparison"},
    "arena": {
        *("build", "comparison", "generate", "held_out", "models", "overoptimisation", "pages", "prompts", "rewards"),
        *("score", "train"),
    },
    "held_out": {"comparison", "generate", "train"},
    "prompts": {"geneval_layout"},
    "predict": {"train"},
    "doctor": {"predict"},
    "quickstart": LEVELS[6],
    "__main__": {"cli"},
}
"""What a part may import of its own level."""

PURE = {"torch", "numpy", "diffalign", *sys.stdlib_module_names}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib", "tensorboard"}
NOT_IN_BASE = {"torchvision", "open_clip", "timm"}
FAST = {"errors", "config", "cli", "__main__"}
PARTS = {
    ("diffalign.families.sdxl", "diffalign.families.sd"),
    ("diffalign.families.controlnet", "diffalign.families.sd"),
    ("diffalign.families.controlnet", "diffalign.families.sdxl"),
    ("diffalign.families.controlnet", "diffalign.families.flux"),
    ("diffalign.families.flux2", "diffalign.families.flux"),
    ("diffalign.families.qwen_image", "diffalign.families.flux"),
    ("diffalign.families.trellis", "diffalign.families._trellis_files"),
    ("diffalign.families._trellis_files", "diffalign.families._trellis_net"),
}
"""Families that are made of other files of the package."""
SCORERS = {"scoring", "errors", "geneval", "mesh", "records", "extractors"}
"""What scorers may import: the protocol, and what reads the files and conditions they are given."""
COMMON = {f"diffalign.families.{name}" for name in ("base", "_pipeline")}
ON_USE = {"diffalign.families._trellis_net"}
"""Modules that are only imported inside functions, so that what they import costs nothing before."""


class Import(NamedTuple):
    """One imported module: its dotted name and whether importing the file imports it."""

    module: str
    eager: bool
    line: int


def part(module: str) -> str:
    """``diffalign.train.step`` -> ``train``; the package itself -> ``""``."""
    return module.split(".")[1] if "." in module else ""


def imports(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; `from package import module` names the module."""
    lazy = {id(node) for block in ast.walk(tree) if _is_lazy(block) for node in ast.walk(block)}
    is_package = any(other.startswith(f"{name}.") for other in modules)
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, eager, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in modules else source, eager, node.lineno)


def _is_lazy(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def inside(modules) -> Iterator[tuple[str, Import]]:
    """(importer, import) for imports of diffalign by diffalign; the package's lazy front door is no layer."""
    for name, tree in modules.items():
        for item in imports(name, tree, modules):
            if name != "diffalign" and part(item.module) and item.module.split(".")[0] == "diffalign":
                yield name, item


def outside(modules) -> Iterator[tuple[str, Import, str]]:
    """(importer, import, top-level package) for everything else."""
    for name, tree in modules.items():
        for item in imports(name, tree, modules):
            top = item.module.split(".")[0]
            if top != "diffalign" and top not in sys.stdlib_module_names:
                yield name, item, top


def test_every_module_has_a_level(modules):
    parts = {part(name) for name in modules} - {"", "scorers"}
    assert parts <= set(LEVEL), f"give these a level: {sorted(parts - set(LEVEL))}"


def upward(modules) -> list[str]:
    """Imports of a higher level, or sideways without permission."""
    wrong = []
    for name, item in inside(modules):
        above, below = part(name), part(item.module)
        if above in ("scorers", below) or below not in LEVEL:
            continue
        if LEVEL[below] > LEVEL[above] or (LEVEL[below] == LEVEL[above] and below not in SIDEWAYS.get(above, set())):
            wrong.append(f"{name}:{item.line} imports {item.module}")
    return wrong


def test_imports_point_downwards(modules):
    wrong = upward(modules)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "code", "allowed"),
    [
        ("diffalign.schedule", "def f():\n    from diffalign import config", False),
        ("diffalign.schedule", "from .config import load", False),
        ("diffalign.schedule", "from diffalign import likelihood", False),
        ("diffalign.objectives.pair", "from ..config import load", False),
        ("diffalign.objectives", "from .pair import sigmoid", True),
        ("diffalign.draws", "from diffalign import estimate, types", True),
        ("diffalign.estimate", "import diffalign.draws", False),
    ],
)
def test_the_rule_sees_every_kind_of_import(modules, name, code, allowed):
    wrong = upward({**dict.fromkeys(modules, ast.parse("")), name: ast.parse(code)})
    assert not wrong if allowed else wrong


def test_config_knows_only_errors(modules):
    found = {part(item.module) for name, item in inside(modules) if part(name) == "config"}
    assert found <= {"errors", "config"}
    assert {top for name, _, top in outside(modules) if part(name) == "config"} <= {"pydantic", "yaml"}


def test_concrete_families_are_reached_by_name_only(modules):
    for name, item in inside(modules):
        if item.module.startswith("diffalign.families.") and item.module not in COMMON:
            assert (name, item.module) in PARTS, f"{name}:{item.line}"


def test_scorers_are_reached_by_name_only(modules):
    for name, item in inside(modules):
        if part(item.module) == "scorers":  # a file whose name begins with _ is a shared part
            is_shared = part(name) == "scorers" and item.module.startswith("diffalign.scorers._")
            assert is_shared, f"{name}:{item.line} imports {item.module}"


def test_scorers_know_only_the_protocol(modules):
    for name, item in inside(modules):
        if part(name) == "scorers" and part(item.module) != "scorers":
            allowed = {"scoring", "errors", "geneval", "foreign", "mesh", "media", "records", "extractors", "wire"} | (
                {"worlds"} if name.rpartition(".")[2] in WORLDS else set()
            )
            assert part(item.module) in allowed, f"{name}:{item.line} imports {item.module}"


def test_nothing_is_built_on_a_training_loop(modules):
    for name, item in inside(modules):
        if part(name) == "train" and name != "diffalign.train.start":
            assert item.module not in ("diffalign.train.offline", "diffalign.train.online"), f"{name}:{item.line}"


def test_levels_0_and_1_are_pure(modules):
    for name, item, top in outside(modules):
        if LEVEL.get(part(name), 9) <= 1:
            assert top in PURE, f"{name}:{item.line} imports {item.module}"


def test_slow_libraries_are_imported_on_use(modules):
    for name, item, top in outside(modules):
        is_slow = item.eager and top in HEAVY and name not in ON_USE
        assert not is_slow, f"{name}:{item.line} imports {item.module} when it is imported"
    for name, item in inside(modules):
        assert not (item.eager and item.module in ON_USE), f"{name}:{item.line} imports {item.module} too early"


def test_base_install_needs_no_torchvision(modules):
    for name, item, top in outside(modules):
        if part(name) != "scorers":
            assert top not in NOT_IN_BASE, f"{name}:{item.line} imports {item.module}"


def test_config_and_cli_do_not_import_torch(modules):
    """The closure of eager imports; ``test_startup`` checks the same in a fresh interpreter."""
    for name, item, top in outside(modules):
        if part(name) in FAST:
            assert top not in {"torch", "numpy", "rich", *HEAVY}, f"{name}:{item.line} imports {item.module}"
    for name, item in inside(modules):
        if part(name) in FAST:
            assert part(item.module) in FAST, f"{name}:{item.line} imports {item.module}"
