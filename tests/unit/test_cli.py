"""The command line: how words become a config and a call, and how failures become one line and an exit code."""

import errno
import os
import subprocess
import sys
from types import ModuleType

import pytest
import yaml
from safetensors import SafetensorError

from diffalign import __version__, cli, config
from diffalign.config import VERBS
from diffalign.config import file as configfile
from diffalign.errors import UserError

TRAIN = {
    "model": {"family": "sd3", "path": "embedded:shapes"},
    "data": {"records": "pairs.jsonl"},
    "method": {"name": "diffusion-dpo"},
    "run": {"dir": "runs/x", "steps": 3},
}


@pytest.fixture
def train_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRAIN))
    return path


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the function of a verb by another one."""

    def install(function, verb="train"):
        module = ModuleType("stand_in")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stand_in", module)
        model, _, text = VERBS[verb]
        monkeypatch.setitem(VERBS, verb, (model, "stand_in:run", text))

    return install


@pytest.fixture
def calls(stand_in):
    """The calls that `diffalign train` makes."""
    made = []
    stand_in(lambda config, *, dry_run: made.append((config, dry_run)))
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["run.steps=7", "data.size=[8,8]", "run.dir=a.yaml"],
        ["--run.steps", "7", "--data.size", "[8,8]", "--run.dir", "a.yaml"],
        ["--run.steps=7", "--data.size=[8,8]", "--run.dir=a.yaml"],
        ["run.steps=7", "--dry-run", "--data.size", "[8,8]", "run.dir=a.yaml"],
    ],
)
def test_overrides_have_two_spellings(cli, calls, train_yaml, words):
    assert cli("train", train_yaml, *words).code == 0
    [(loaded, _)] = calls
    assert (loaded.run.steps, loaded.data.size, loaded.run.dir) == (7, (8, 8), "a.yaml")


def test_config_may_follow_the_overrides(cli, calls, train_yaml):
    assert cli("train", "run.seed=1", "--run.steps", "5", train_yaml).code == 0
    assert calls[0][0].run.seed == 1


def test_negative_values_are_values(cli, calls, train_yaml):
    assert cli("train", train_yaml, "--run.seed", "-1").code == 0
    assert calls[0][0].run.seed == -1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume"], "latest"),
        (["--resume", "latest"], "latest"),
        (["--resume", "runs/x/checkpoint-3"], "runs/x/checkpoint-3"),
        (["--resume=runs/x"], "runs/x"),
        (["--resume", "run.seed=1"], "latest"),
        (["--resume", "--dry-run"], "latest"),
        ([], None),
    ],
)
def test_resume_is_sugar(cli, calls, train_yaml, words, value):
    assert cli("train", train_yaml, *words).code == 0
    assert calls[0][0].run.resume == value


def test_resume_before_the_config(cli, calls, train_yaml):
    assert cli("train", "--resume", train_yaml).code == 0
    assert calls[0][0].run.resume == "latest"


def test_resume_belongs_to_train(cli):
    outcome = cli("score", "x.yaml", "--resume")
    assert outcome.code == 2
    assert "diffalign train" in outcome.err


@pytest.mark.parametrize(("words", "dry_run"), [([], False), (["--dry-run"], True)])
def test_dry_run_reaches_the_verb(cli, calls, train_yaml, words, dry_run):
    assert cli("train", *words, train_yaml).code == 0
    assert calls[0][1] is dry_run


def test_quickstart_has_a_default_config(cli, stand_in, monkeypatch, tmp_path):
    stage = {"prompts": {"source": "shapes:train"}}
    content = {
        "model": TRAIN["model"],
        "generate": stage,
        "scorers": [{"name": "shapes"}],
        "build": {"reward": {"shapes": 1}},
        "train": {"method": {"name": "diffusion-dpo"}, "steps": 1, "batch": 1},
        "judge": {"name": "shapes"},
        "evaluate": {"heldout": stage},
    }
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(configfile, "config_root", lambda: tmp_path)
    seen = []
    stand_in(lambda config, dry_run: seen.append(config), "quickstart")
    assert cli("quickstart", "seed=4").code == 0
    assert seen[0].seed == 4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "needs a config file"),
        (["train", "gone.yaml"], "gone.yaml"),
        (["train", "a.yaml", "b.yaml"], "'a.yaml' and 'b.yaml'"),
        (["train", "a.yaml", "--run.steps"], "--run.steps needs a value"),
        (["train", "a.yaml", "--run.steps", "--dry-run"], "--run.steps needs a value"),
        (["train", "a.yaml", "-x"], "-x"),
        (["list"], "what"),
        (["list", "method"], "methods"),
        (["doctor", "a.yaml", "b.yaml"], "b.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(cli, words, part):
    outcome = cli(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("diffalign: error: ")
    assert outcome.err.count("\n") == 1
    assert part in outcome.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "diffalign: error: two lines"),
        (KeyboardInterrupt(), 130, "diffalign: interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
            2,
            "diffalign: error: disk full while writing runs/x/metrics.jsonl; free space and resume",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
            2,
            "diffalign: error: disk full while writing a file; free space and resume",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            2,
            "diffalign: error: disk full while writing a file; free space and resume",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "diffalign: error: out: permission denied"),
        (OSError("no such repository\nsee the docs"), 2, "diffalign: error: no such repository see the docs"),
        (ConnectionResetError(), 2, "diffalign: error: ConnectionResetError"),
    ],
)
def test_failures_are_one_line(cli, stand_in, train_yaml, error, code, line):
    def fail(config, dry_run):
        raise error

    stand_in(fail)
    outcome = cli("train", train_yaml)
    assert outcome.code == code
    assert outcome.err == f"{line}\n"


def test_bugs_keep_their_traceback(cli, stand_in, train_yaml):
    stand_in(lambda config, dry_run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("train", train_yaml)


def test_a_bad_config_is_refused_before_the_verb_is_imported(cli, train_yaml, monkeypatch):
    monkeypatch.setitem(VERBS, "train", (VERBS["train"][0], "no_such_module:run", ""))
    assert "run.steps" in cli("train", train_yaml, "run.steps=0").err


@pytest.mark.parametrize(("before", "after"), [(None, "error"), ("info", "info")])
def test_libraries_are_quiet_unless_asked(cli, stand_in, train_yaml, monkeypatch, before, after):
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    if before:
        monkeypatch.setenv("DIFFUSERS_VERBOSITY", before)
    seen = []
    stand_in(lambda config, dry_run: seen.append(os.environ["DIFFUSERS_VERBOSITY"]))
    assert cli("train", train_yaml).code == 0
    assert seen == [after]
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)


def test_closed_output_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "train", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


def test_version(cli):
    assert cli("--version").out == f"diffalign {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview_names_every_verb(cli, words):
    outcome = cli(*words)
    assert outcome.code == 0
    for verb, (_, _, text) in VERBS.items():
        assert f"  {verb} " in outcome.out
        assert text in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help_is_complete(cli, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert VERBS[verb][2] in outcome.out
    model = VERBS[verb][0]
    for name, field in model.model_fields.items() if model else ():
        assert f"\n  {name}" in outcome.out
        assert field.description is None or field.description in outcome.out


def test_help_shows_type_default_and_description(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = [" ".join(line.split()) for line in cli("train", "--help").out.splitlines()]
    assert "run.steps int required optimiser updates in all; online: rounds times online.updates" in lines
    assert (
        "run.ema float or null null decay of a moving average; it is what gets exported (online it warms up)" in lines
    )
    assert "run.precision fp32 or bf16 fp32" in lines
    assert "model.lora.rank int 16 rank of the update" in lines


def test_help_flattens_lists_and_mappings():
    paths = [key.path for key in cli._keys(config.QuickstartConfig)]
    assert "scorers[].name" in paths
    assert "evaluate.<name>.prompts.source" in paths
    assert "model" not in paths
