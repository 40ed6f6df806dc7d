"""Configs: what is valid loads with the right types, what is not is refused in one line that says how to fix it."""

import pytest
import yaml
from pydantic import ValidationError

from diffalign.config import BuildConfig, EvalConfig, GenerateConfig, QuickstartConfig, TrainConfig
from diffalign.config import file as configfile
from diffalign.config.file import ConfigError

TRAIN = {
    "model": {"family": "sd3", "path": "embedded:shapes"},
    "data": {"records": "pairs.jsonl"},
    "method": {"name": "diffusion-dpo", "objective": {"beta": 2000}},
    "run": {"dir": "runs/x", "steps": 3},
}


@pytest.fixture
def train(tmp_path):
    """A valid training config on disk."""
    return save(tmp_path / "train.yaml", TRAIN)


def save(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refuse(model, path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        configfile.load(model, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loads_values_and_defaults(train):
    loaded = configfile.load(TrainConfig, train)
    assert loaded.run.steps == 3
    assert loaded.method.objective == {"beta": 2000}
    assert loaded.optim.name == "adamw"
    assert loaded.model.lora is None


def test_values_cannot_be_changed(train):
    with pytest.raises(ValidationError):
        configfile.load(TrainConfig, train).run.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.steps=7", lambda c: c.run.steps, 7),
        ("optim.lr=1e-4", lambda c: c.optim.lr, 1e-4),
        ("optim.clip=null", lambda c: c.optim.clip, None),
        ("data.size=[32, 48]", lambda c: c.data.size, (32, 48)),
        ("method.objective.beta=5e3", lambda c: c.method.objective["beta"], 5000.0),
        ("method.objective.name=ipo", lambda c: c.method.objective["name"], "ipo"),
        ("model.lora.rank=4", lambda c: c.model.lora.rank, 4),
        ("run.dir=runs/a=b", lambda c: c.run.dir, "runs/a=b"),
        ("run.dir=2026", lambda c: c.run.dir, "2026"),
        ("run.dir=1e4", lambda c: c.run.dir, "1e4"),
        ("run.dir=no", lambda c: c.run.dir, "no"),
    ],
)
def test_override_has_the_type_of_its_key(train, override, read, value):
    found = read(configfile.load(TrainConfig, train, [override]))
    assert found == value
    assert type(found) is type(value)


def test_override_opens_a_section_that_the_file_sets_to_null(tmp_path):
    path = save(tmp_path / "a.yaml", {**TRAIN, "model": {**TRAIN["model"], "lora": None}})
    assert configfile.load(TrainConfig, path, ["model.lora.rank=8"]).model.lora.rank == 8


def test_last_override_wins(train):
    assert configfile.load(TrainConfig, train, ["run.steps=7", "run.steps=8"]).run.steps == 8


def test_scientific_notation_in_a_file_is_a_number_everywhere(tmp_path):
    text = yaml.safe_dump(TRAIN).replace("beta: 2000", "beta: 2e3")
    beta = configfile.load(TrainConfig, save(tmp_path / "a.yaml", text)).method.objective["beta"]
    assert beta == 2000.0
    assert isinstance(beta, float)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.step=3", ["run.step", "'steps'"]),
        ("modle.path=x", ["'modle'", "'model'"]),
        ("model.lora.rnk=3", ["model.lora.rnk", "'rank'"]),
        ("run.steps=0", ["run.steps", "greater than 0", "0"]),
        ("run.steps=many", ["run.steps", "integer", "'many'"]),
        ("run.precision=fp16", ["run.precision", "fp32", "bf16"]),
        ("optim.lr=nan", ["optim.lr"]),
        ("optim.lr=inf", ["optim.lr"]),
        ("run.steps", ["run.steps", "key.path=value"]),
        ("=3", ["key.path=value"]),
        ("run.steps.x=3", ["'steps'", "not a section"]),
        ("run.steps=[1", ["run.steps", "YAML"]),
    ],
)
def test_wrong_override_names_key_and_remedy(train, override, parts):
    message = refuse(TrainConfig, train, override)
    for part in parts:
        assert part in message


def test_every_mistake_of_a_file_is_reported_at_once(tmp_path):
    path = save(tmp_path / "a.yaml", {**TRAIN, "data": {}, "run": {"dir": "x", "stepz": 3}})
    message = refuse(TrainConfig, path)
    for part in ("missing key 'data.records'", "unknown key 'run.stepz'", "'steps'", "missing key 'run.steps'"):
        assert part in message
    assert message.startswith(str(path))


def test_suggestions_reach_into_lists_and_mappings(tmp_path):
    judge = {"name": "shapes", "parms": {}}
    prompts = {"source": "shapes:heldout"}
    message = refuse(
        EvalConfig,
        save(tmp_path / "a.yaml", {"model": TRAIN["model"], "prompts": prompts, "judge": judge, "out": "x"}),
    )
    assert "judge.parms" in message
    assert "'params'" in message
    stage = {"prompts": {"sorce": "shapes:train"}}
    message = refuse(QuickstartConfig, save(tmp_path / "b.yaml", {"evaluate": {"heldout": stage}, "scorers": [judge]}))
    assert "evaluate.heldout.prompts.sorce" in message
    assert "'source'" in message
    assert "scorers.0.parms" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("", "expected a mapping"),
        ("- a", "found list"),
        ("run: {dir: a, dir: b}", "'dir' is given twice"),
    ],
)
def test_broken_file(tmp_path, text, part):
    message = refuse(TrainConfig, save(tmp_path / "a.yaml", text))
    assert part in message
    assert "a.yaml" in message


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in refuse(TrainConfig, path)


def test_missing_file_suggests_shipped_configs(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    save(tmp_path / "shapes" / "train.yaml", TRAIN)
    monkeypatch.setattr(configfile, "config_root", lambda: tmp_path)
    assert "shapes/train.yaml" in refuse(TrainConfig, "shapes/tarin.yaml")


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    save(tmp_path / "shapes" / "train.yaml", TRAIN)
    monkeypatch.setattr(configfile, "config_root", lambda: tmp_path)
    for name in ("shapes/train.yaml", "shapes/train"):
        assert configfile.load(TrainConfig, name).run.steps == 3


def test_extends_merges_sections_and_replaces_values(tmp_path):
    save(tmp_path / "base.yaml", {**TRAIN, "optim": {"lr": 0.5, "params": {"eps": 1e-6}}})
    child = save(tmp_path / "a.yaml", {"extends": "base.yaml", "optim": {"params": {"fused": False}}})
    loaded = configfile.load(TrainConfig, child, ["run.seed=5"])
    assert loaded.optim.lr == 0.5
    assert loaded.optim.params == {"eps": 1e-6, "fused": False}
    assert loaded.run.seed == 5


def test_extends_a_shipped_config_by_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    save(shipped / "base.yaml", TRAIN)
    monkeypatch.setattr(configfile, "config_root", lambda: shipped)
    child = save(tmp_path / "a.yaml", {"extends": "base.yaml", "run": {"seed": 7}})
    assert configfile.load(TrainConfig, child).run.seed == 7


def test_extends_is_one_level_deep(tmp_path):
    save(tmp_path / "c.yaml", TRAIN)
    save(tmp_path / "b.yaml", {"extends": "c.yaml"})
    assert "one level" in refuse(TrainConfig, save(tmp_path / "a.yaml", {"extends": "b.yaml"}))


def test_extends_a_file_that_is_not_there(tmp_path):
    assert "gone.yaml" in refuse(TrainConfig, save(tmp_path / "a.yaml", {"extends": "gone.yaml"}))


@pytest.mark.parametrize(
    ("model", "content"),
    [
        (TrainConfig, TRAIN),
        (BuildConfig, {"records": "a.jsonl", "out": "b.jsonl", "reward": {"graded": 1.0}}),
        (
            GenerateConfig,
            {"model": TRAIN["model"], "prompts": {"source": "a.txt"}, "sampling": {"size": [8, 8]}, "out": "x"},
        ),
    ],
)
def test_dump_loads_to_the_same_config(tmp_path, model, content):
    loaded = configfile.load(model, save(tmp_path / "a.yaml", content))
    assert configfile.load(model, save(tmp_path / "b.yaml", configfile.dump(loaded))) == loaded
