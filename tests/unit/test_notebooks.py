"""The notebooks are short, without outputs, and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ("add_an_objective", "anatomy_of_a_step", "build_a_ranked_set")


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(name: str) -> list[str]:
    """The source of every code cell."""
    return ["".join(cell["source"]) for cell in load(name)["cells"] if cell["cell_type"] == "code"]


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_sound_notebook_without_outputs(name):
    notebook = load(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell_id) for cell_id in ids)
    for cell in notebook["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            expected |= {"outputs", "execution_count"}
        assert cell.keys() == expected


@pytest.mark.parametrize("name", NAMES)
def test_is_short(name):
    cells = ["".join(cell["source"]) for cell in load(name)["cells"]]
    assert len(code(name)) <= 8
    assert max(len(line) for cell in cells for line in cell.splitlines()) <= 120
    assert all(compile(cell, name, "exec") for cell in code(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path):
    script = tmp_path / f"{name}.py"
    script.write_text("\n\n".join(code(name)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
