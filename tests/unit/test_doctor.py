"""The doctor finds what is broken and says what to do; `list` shows what a config can name."""

import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from diffalign import doctor, records
from diffalign.errors import UserError
from diffalign.records import Candidate, Record


@pytest.fixture
def healthy(monkeypatch):
    """An environment in which nothing is broken, whatever this one is like."""
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["rich>=1", "pytest>=1; extra == 'dev'"])
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Check("torchvision", "not installed (not needed)"))


def write_pairs(path, k=2, label="reward"):
    candidates = [Candidate(text=str(i), labels={label: float(i)}) for i in range(k)]
    records.write(path, [Record(id="a", prompt="a circle", candidates=candidates)])


@pytest.fixture
def write_config(tmp_path):
    """Write a training config, with changes to its sections, and return its path."""

    def write(**sections):
        content = {
            "model": {"family": "sd3", "path": "some-organisation/some-model"},
            "data": {"records": str(tmp_path / "pairs.jsonl")},
            "method": {"name": "diffusion-dpo"},
            "run": {"dir": "runs/x", "steps": 3},
        }
        for name, changes in sections.items():
            content[name] = {**content[name], **changes}
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.usefixtures("healthy")
def test_healthy_environment(cli):
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.err
    for part in ("python", "rich", "free disk", "threads", "attention", "torchvision"):
        assert part in outcome.out
    assert "broken" not in outcome.out
    assert "pytest" not in outcome.out


@pytest.mark.usefixtures("healthy")
def test_what_is_broken_fails_the_command(cli, monkeypatch):
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Check("torchvision", "9.9", "run `pip uninstall`"))
    outcome = cli("doctor")
    assert outcome.code == 2
    assert "run `pip uninstall`" in outcome.out
    assert outcome.err.endswith("checks failed: torchvision\n")


@pytest.mark.usefixtures("healthy")
def test_missing_installation(monkeypatch):
    def absent(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    [check] = doctor._libraries()
    assert "pip install -e ." in check.problem


@pytest.mark.parametrize(
    ("requirement", "version", "problem"),
    [
        ("diffusers>=0.40", "0.42.1", ""),
        ("diffusers>=0.40", "0.41.0.dev0", ""),
        ("diffusers>=0.40", "0.39.0", "needs >=0.40: run `pip install 'diffusers>=0.40'`"),
        ("ray[data]>=2", None, "run `pip install 'ray[data]>=2'`"),
    ],
)
def test_library_versions(monkeypatch, requirement, version, problem):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._library(Requirement(requirement)).problem == problem


def test_torchvision_of_another_torch(monkeypatch):
    command = [sys.executable, "-c", "raise RuntimeError('operator torchvision::nms does not exist')"]
    failed = subprocess.run(command, capture_output=True, text=True)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.28.0")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: failed)
    check = doctor._torchvision()
    assert "torchvision::nms does not exist" in check.value
    assert "pip uninstall torchvision" in check.problem


def test_torchvision_that_hangs(monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor, "_version", lambda name: "0.28.0")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "did not finish" in doctor._torchvision().problem


def test_torchvision_absent_is_fine(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor._torchvision().problem == ""


@pytest.mark.usefixtures("healthy")
def test_training_config_that_can_run(cli, write_config, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    outcome = cli("doctor", write_config())
    assert outcome.code == 0, outcome.err
    for part in ("diffusion-dpo", "some-organisation/some-model", "1 records", "1 with 2 candidates", "labels reward"):
        assert part in outcome.out


@pytest.mark.parametrize(
    ("sections", "pairs", "failed", "part"),
    [
        ({"run": {"steps": 0}}, {}, "config", "run.steps"),
        ({"method": {"name": "difusion-dpo"}}, {}, "config", "'diffusion-dpo'"),
        ({"method": {"objective": {"bta": 1}}}, {}, "config", "'beta'"),
        ({"model": {"family": "sd33"}}, {}, "model", "sd33"),
        ({"model": {"path": "./no/such/folder"}}, {}, "model", "no such folder"),
        ({"model": {"path": "."}}, {}, "model", "model_index.json"),
        ({"model": {"path": ".", "family": "causal_lm"}}, {}, "model", "no config.json"),
        ({"model": {"path": "embedded:squares"}}, {}, "model", "'squares'"),
        ({"data": {"records": "gone.jsonl"}}, {}, "records", "gone.jsonl"),
        ({}, {"k": 3}, "records", "needs 2 candidates"),
        ({}, {"label": "graded"}, "records", "'reward'"),
    ],
)
@pytest.mark.usefixtures("healthy")
def test_training_config_that_cannot_run(cli, write_config, tmp_path, sections, pairs, failed, part):
    write_pairs(tmp_path / "pairs.jsonl", **pairs)
    outcome = cli("doctor", write_config(**sections))
    assert outcome.code == 2
    assert outcome.err.endswith(f"checks failed: {failed}\n")
    assert part in outcome.out


def test_run_raises_one_summary(healthy, write_config):
    with pytest.raises(UserError, match="checks failed: records"):
        doctor.run(str(write_config()))


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("methods", ["diffusion-dpo", "sigmoid: K = 2", "arXiv:2311.12908", "diffalign/methods.py:"]),
        ("objectives", ["sigmoid", "role reference", "arXiv:2305.18290", "diffalign/objectives/pair.py:"]),
        ("families", ["sd3", "diffalign/families/sd3.py:"]),
        ("scorers", ["shapes", "scorers/shapes.py:"]),
        ("extractors", ["canny", "diffalign/extractors/canny.py:"]),
    ],
)
def test_list(cli, what, parts):
    outcome = cli("list", what)
    assert outcome.code == 0
    for part in parts:
        assert part in outcome.out


def test_list_points_at_the_row_of_a_method(cli, root):
    line = next(text for text in cli("list", "methods").out.splitlines() if "diffusion-dpo " in text)
    number = int(line.rstrip().rpartition(":")[2])
    source = (root / "diffalign" / "methods.py").read_text(encoding="utf-8").splitlines()
    assert '"diffusion-dpo"' in source[number - 1]
