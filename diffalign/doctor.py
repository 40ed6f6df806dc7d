"""`diffalign doctor`: is everything here that a run needs? And `diffalign list`: what can be named in a config."""

from __future__ import annotations

import ast
import inspect
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffalign import __version__, extractors, predict, records, scoring
from diffalign.config import ModelConfig, TrainConfig
from diffalign.config.file import load
from diffalign.errors import UserError, nearest
from diffalign.families import base
from diffalign.methods import METHODS, needs, resolve
from diffalign.registry import OBJECTIVES, SHAPINGS, find_objective, find_shaping
from diffalign.types import Method

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LOW_DISK = GIB  # not even the quickstart's candidates and checkpoints fit comfortably into less
OPTIONAL = ("torchvision", "xformers", "bitsandbytes", "open_clip_torch")
IMPORT_TIMEOUT = 300  # seconds; torchvision takes a minute on a slow disk


class Check(NamedTuple):
    """One line of the doctor's table; ``problem`` says what is broken and what to do, empty when nothing is."""

    name: str
    value: str
    problem: str = ""


# --- doctor -------------------------------------------------------------------------------------------------------


def run(config_path: str | None = None) -> None:
    """Print what is installed and, given a training config, whether it can run here.

    Raises:
        UserError: something is broken; the table says what.
    """
    checks = [*_system(), *_libraries(), *_torch(), _torchvision()]
    if config_path is not None:
        checks += _training(config_path)
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = Text("broken", "red") if check.problem else Text("ok", "green")
        table.add_row(mark, check.name, Text("\n".join(filter(None, (check.value, check.problem)))))
    _print(table)
    broken = [check.name for check in checks if check.problem]
    if broken:
        raise UserError(f"{len(broken)} of {len(checks)} checks failed: {', '.join(broken)}")


def _system() -> Iterator[Check]:
    yield Check("diffalign", f"{__version__} at {ROOT}")
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    yield Check("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores (OMP_NUM_THREADS {threads})")
    free = shutil.disk_usage(Path.cwd()).free
    problem = "less than 1 GiB: free space before you generate or train" if free < LOW_DISK else ""
    yield Check("free disk", f"{free / GIB:.1f} GiB at {Path.cwd()}", problem)


def _libraries() -> Iterator[Check]:
    """The declared base dependencies against what is installed, and the optional ones that are there."""
    try:
        declared = [Requirement(text) for text in metadata.requires("diffalign") or []]
    except metadata.PackageNotFoundError:
        yield Check("installation", "not installed", "run `pip install -e .` in the checkout")
        return
    for requirement in declared:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _library(requirement)
    for name in OPTIONAL:
        if (version := _version(name)) is not None:
            yield Check(name, f"{version} (optional)")


def _library(requirement: Requirement) -> Check:
    version = _version(requirement.name)
    if version is None:
        return Check(requirement.name, "missing", f"run `pip install '{requirement}'`")
    fits = requirement.specifier.contains(version, prereleases=True)
    problem = "" if fits else f"needs {requirement.specifier}: run `pip install '{requirement}'`"
    return Check(requirement.name, version, problem)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Check(f"cuda:{index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Check("device", f"CPU only ({built})")
    switches = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    backends = ["flash", *(name for name, on in switches.items() if on and torch.cuda.is_available()), "math"]
    yield Check("attention", f"torch SDPA: {', '.join(backends)}")


def _torchvision() -> Check:
    """A torchvision built for another torch breaks transformers and diffusers; only an import can tell."""
    version = _version("torchvision")
    if version is None:
        return Check("torchvision", "not installed (not needed)")
    command = [sys.executable, "-W", "ignore", "-c", "import torchvision"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT)
    except subprocess.TimeoutExpired:
        return Check("torchvision", version, f"its import did not finish within {IMPORT_TIMEOUT} s")
    if done.returncode == 0:
        return Check("torchvision", f"{version}, fits torch {torch.__version__}")
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check(
        "torchvision",
        f"{version}, does not fit torch {torch.__version__} ({reason})",
        "transformers and diffusers will fail to import: run `pip uninstall torchvision` (diffalign does not need it), "
        "or install the torchvision built for this torch from where torch came from",
    )


def _training(config_path: str) -> Iterator[Check]:
    """A training config: its keys, its method, its model and its records."""
    try:
        config = load(TrainConfig, config_path)
        method = resolve(**config.method.model_dump())
    except UserError as error:
        yield Check("config", config_path, str(error))
        return
    yield Check("config", f"{config_path}: {method.name}, {config.run.steps} steps into {config.run.dir}")
    yield _model(config.model)
    if config.data is not None:
        yield _data(config.data.records, method)
    for name, text in predict.lines(config, method):
        yield Check(name, text)


def _model(config: ModelConfig) -> Check:
    try:
        if config.family not in base.family_names():
            raise UserError(f"no family {config.family!r}{nearest(config.family, base.family_names())}")
        base.pick_device(config.device)
    except UserError as error:
        return Check("model", config.path, str(error))
    kind, _, world = config.path.partition(":")
    if kind == "embedded":
        folder = base.EMBEDDED.get(world)
        problem = "" if folder and folder.is_dir() else f"no embedded model {world!r}"
        return Check("model", f"{config.family}, embedded model {world}", problem)
    if Path(config.path).is_dir():
        index = base.family_class(config.family).index_file
        problem = "" if (Path(config.path) / index).is_file() else f"no {index} in this folder"
        return Check("model", f"{config.family} at {config.path}", problem)
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        return Check("model", config.path, "no such folder")
    return Check("model", f"{config.family}, {config.path} from the Hub or its cache (not checked)")


def _data(path: str, method: Method) -> Check:
    """Whether the records have the candidates and labels that every objective of the method reads."""
    try:
        found = records.summary(records.read(path))
    except UserError as error:
        return Check("records", path, str(error))
    sizes = ", ".join(f"{n} with {k} candidates" for k, n in found["candidates"].items())
    value = f"{found['records']} records in {path}: {sizes}; labels {', '.join(found['labels']) or 'none'}"
    needed = needs(*method.terms)
    missing = [label for label in needed.labels if label not in found["labels"]]
    if missing:
        return Check("records", value, f"{method.name} reads label {missing[0]!r}: run `diffalign build` first")
    if needed.k is not None and set(found["candidates"]) != {needed.k}:
        return Check("records", value, f"{method.name} needs {needed.k} candidates in every record")
    return Check("records", value)


def _print(table: Table) -> None:
    """Fit a table to the terminal; elsewhere keep one line per entry, so that it can be searched."""
    Console(width=None if sys.stdout.isatty() else 240).print(table)


# --- list ---------------------------------------------------------------------------------------------------------


def list_command(what: str) -> None:
    """Print a table of what a config can name: methods, objectives, shapings, families, scorers or extractors."""
    columns, rows = _listing(what)
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table)


def markdown_list(what: str) -> str:
    """The same table in Markdown, without places; the README holds it, and a test compares the two."""
    columns, rows = _listing(what)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line[:-1])} |\n" for line in lines)


def _listing(what: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns, rows = {
        "methods": (("name", "needs", "paper", "where"), _method_rows),
        "objectives": (("name", "needs", "for", "paper", "where"), _objective_rows),
        "shapings": (("name", "over", "for", "paper", "where"), _shaping_rows),
        "families": (("name", "what", "where"), _family_rows),
        "scorers": (("name", "what", "where"), _scorer_rows),
        "extractors": (("name", "what", "where"), _extractor_rows),
    }[what]
    return columns, list(rows())


def _method_rows() -> Iterator[tuple[str, ...]]:
    source = Path(inspect.getfile(resolve))
    lines = source.read_text(encoding="utf-8").splitlines()
    for name, method in METHODS.items():
        line = next((number for number, text in enumerate(lines, 1) if f'"{name}"' in text), 1)
        needs = dict.fromkeys(f"{term.objective}: {_needs(term.objective)}" for term in method.terms)
        yield name, f"{'; '.join(needs)}; {method.source} data", method.paper, f"{_relative(source)}:{line}"


def _objective_rows() -> Iterator[tuple[str, ...]]:
    import diffalign.objectives  # noqa: F401  (fills the registry)

    for name, objective in sorted(OBJECTIVES.items()):
        yield name, _needs(name), ", ".join(objective.fits), objective.paper, _place(objective.fn)


def _shaping_rows() -> Iterator[tuple[str, ...]]:
    find_shaping("f_divergence")  # fills the registry
    for name, found in sorted(SHAPINGS.items()):
        parts = [{"any": "any objective", "pairs": "pairs"}.get(found.over, "pairs, by differences alone")]
        parts += [f"role {role}" for role in found.roles] + [f"label {label}" for label in found.labels]
        yield name, ", ".join(parts), ", ".join(found.fits), found.paper, _place(found.fn)


def _place(fn: Any) -> str:
    """``file:line`` of a definition, for people to open."""
    return f"{_relative(Path(inspect.getsourcefile(fn) or ''))}:{inspect.getsourcelines(fn)[1]}"


def _needs(objective_name: str) -> str:
    objective = find_objective(objective_name)
    parts = [f"K = {objective.k}" if objective.k is not None else "any K"]
    parts += [f"role {role}" for role in objective.roles]
    parts += [f"label {label}" for label in objective.labels]
    parts += [f"estimate {entry}" for entry in objective.reads if not entry.startswith("gap.")]
    return ", ".join(parts)


def _family_rows() -> Iterator[tuple[str, ...]]:
    for name in base.family_names():
        yield name, *_module_row(Path(base.__file__).with_name(f"{name}.py"), "Family")


def _scorer_rows() -> Iterator[tuple[str, ...]]:
    folders = (Path(__file__).with_name("scorers"), ROOT / "scorers")  # installed, or in a checkout
    for name in scoring.scorer_names():
        path = next((folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file()), None)
        if path is not None:
            yield name, *_module_row(path, "build")
        else:
            [point] = metadata.entry_points(group=scoring.GROUP, name=name)
            yield name, f"from {point.dist.name if point.dist else 'another package'}", point.value


def _extractor_rows() -> Iterator[tuple[str, ...]]:
    for name in extractors.extractor_names():
        yield name, *_module_row(Path(extractors.__file__).with_name(f"{name}.py"), "build")


def _module_row(path: Path, definition: str) -> tuple[str, str]:
    """First line of a module's docstring, and where in it something is defined; the module is not imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    line = next((node.lineno for node in tree.body if getattr(node, "name", None) == definition), 1)
    return summary, f"{_relative(path)}:{line}"


def _relative(path: Path) -> Path:
    """Short inside a checkout, absolute for what third parties define."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
