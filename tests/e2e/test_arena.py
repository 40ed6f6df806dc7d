"""`diffalign arena`: cells trained to a budget and judged, kept over a stop, put together as a page."""

import json

import pytest
import yaml

SHAPES = {"family": "sd3", "path": "embedded:shapes", "lora": {"rank": 2}}
SAMPLING = {"steps": 2, "guidance": 1.0, "batch": 32}
ARENA = {
    "title": "Three methods",
    "model": SHAPES,
    "scorers": [{"name": "shapes", "label": "graded", "params": {"metric": "graded"}}],
    "reward": {"graded": 1.0},
    "pool": SAMPLING,
    "pool_prompts": {"source": "shapes:train", "per_task": 4},
    "pool_share": 0.3,
    "candidates": 3,
    "rounds": {
        "prompts": {"source": "shapes:train", "per_task": 4},
        "groups": 2,
        "samples": 4,
        "updates": 2,
        "sampling": SAMPLING,
    },
    "optim": {"warmup": 1},
    "budget": 480,
    "moments": [0.5, 1.0],
    "seeds": [0],
    "tuning": {"factors": [1.0, 2.0], "budget": 240, "prompts": {"source": "shapes:train", "per_task": 1}},
    "evaluate": {
        "prompts": {"source": "shapes:heldout", "per_task": 3},
        "sampling": SAMPLING,
        "guided": {**SAMPLING, "guidance": 3.0},
        "judge": {"name": "shapes", "label": "correct", "params": {"metric": "correct"}},
        "panel": [{"name": "shapes", "label": "graded", "params": {"metric": "graded"}}],
    },
    "entries": {
        "awm": {
            "title": "AWM",
            "group": "online",
            "method": {"name": "awm", "draw": {"kind": "discrete", "steps": 4, "count": 2}},
            "online": {},
            "batch": 4,
        },
        "dpo": {
            "title": "DPO",
            "group": "offline",
            "method": {"name": "diffusion-dpo", "objective": {"beta": 20.0}},
            "build": {"rule": "all_pairs"},
            "flip": 0.5,
            "batch": 4,
        },
        "dro": {
            "title": "DRO",
            "group": "online",
            "method": {"name": "diffusion-dro"},
            "build": {"rule": "ranked"},
            "best_only": True,
            "online": {"prompts": None, "samples": 1, "groups": 4, "updates": 1},
            "batch": 4,
        },
    },
    "contrasts": [{"question": "Is AWM better than DPO?", "first": "awm", "second": "dpo"}],
    "targets": [{"question": "Who gets to DPO's score?", "of": "dpo", "reference": "dpo", "asked": ["awm"]}],
    "workers": 1,
}


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    root = tmp_path_factory.mktemp("arena")
    path = root / "arena.yaml"
    settings = {**ARENA, "dir": str(root / "cells"), "out": str(root / "out")}
    path.write_text(yaml.safe_dump(settings))
    return path


def cell(path, name):
    return json.loads((path.parent / "cells" / name / "cell.json").read_text())


def test_every_cell_keeps_to_the_budget_and_is_judged_where_it_should(arena, cli):
    result = cli("arena", arena)
    assert result.code == 0, result.err
    results = json.loads((arena.parent / "out/results.json").read_text())
    assert [entry["entry"]["name"] for entry in results["entries"]] == ["awm", "dpo", "dro"]
    assert not any(entry["failures"] for entry in results["entries"])
    for name in ("awm-0", "dpo-0", "dro-0"):
        found = cell(arena, f"cells/{name}")["snapshots"]
        assert len(found) == 2
        assert found[0]["updates"] * 2 == found[1]["updates"]
        assert 0.6 * 480 < found[-1]["evaluations"] < 1.4 * 480
        assert found[0]["evaluations"] < found[1]["evaluations"]
        assert "guided" in found[1]["outcomes"]
        assert "guided" not in found[0]["outcomes"]
        assert found[1]["kl"] > 0
    # a round: 8 samples of 2 steps, then twice 2 times per sample under policy (3) and reference (1)
    lines = (arena.parent / "cells/cells/awm-0/train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["evaluations"] for line in lines[:2]] == [8 * 2 + 4 * 2 * 4, 4 * 2 * 4]
    assert cell(arena, "cells/awm-0")["lr"] in (1e-3, 2e-3)
    assert "AWM" in (arena.parent / "out/arena.html").read_text()


def test_a_second_call_repeats_no_cell(arena, cli):
    before = {path: path.stat().st_mtime_ns for path in arena.parent.rglob("cell.json")}
    (arena.parent / "cells/cells/dpo-0/cell.json").unlink()
    assert cli("arena", arena).code == 0
    after = {path: path.stat().st_mtime_ns for path in arena.parent.rglob("cell.json")}
    assert [path.parent.name for path in before if after[path] != before[path]] == ["dpo-0"]


def test_another_budget_is_another_arena(arena, cli):
    result = cli("arena", arena, "budget=500")
    assert result.code == 2
    assert "budget" in result.err


def test_an_entry_without_data_is_refused(arena, cli):
    result = cli("arena", arena, "entries.dpo.build=null")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "entries.dpo" in result.err


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("entries.awm.online={grups: 3}", ["entries.awm", "grups"]),
        ("entries.dpo.build={ruel: ranked}", ["entries.dpo", "ruel"]),
        ("entries.dpo.method.name=dppo", ["entries.dpo", "dppo"]),
        ("optim={lerning: 1}", ["lerning"]),
        ("entries.awm.online={samples: 1}", ["entries.awm", "online.samples"]),
        ("entries.awm.online={window: 5}", ["entries.awm", "online.window"]),
        ("rounds.credit={spread: group}", ["entries.dro", "online.credit"]),
        ("entries.dpo.build={rule: unpaired}", ["entries.dpo", "threshold"]),
        (
            "entries.awm.online.stop={prompts: {source: 'shapes:train'}, scorers: [{name: picture}]}",
            ["entries.awm", "stop"],
        ),
        ("seeds=[0, 0]", ["seeds", "differ"]),
        ("evaluate.panel.0.label=guided", ["guided"]),
        ("moments=[0.7, 1.0]", ["moments", "multiples"]),
        ("contrasts=[{question: q, first: awmm}]", ["contrasts.0", "awmm", "awm"]),
        ("contrasts=[{question: q, first: awm, label: nice}]", ["contrasts.0", "nice"]),
        ("targets=[{question: q, asked: [dpoo]}]", ["targets.0", "dpoo"]),
        ("targets=[{question: q, offf: awm}]", ["targets", "offf"]),
        ("only=[dr]", ["only", "dr"]),
        ("evaluate.panel=[]", ["evaluate.panel"]),
        ("evaluate.panel=[{name: picture}]", ["evaluate.panel", "graded"]),
        ("reward={beauty: 1}", ["reward", "beauty"]),
        ("moments=[0.5, 0.2, 1.0]", ["moments", "rise"]),
        ("moments=[0.5]", ["moments", "rise"]),
        ("model.lora=null", ["model.lora"]),
    ],
)
def test_what_a_cell_would_refuse_is_refused_before_anything_runs(arena, cli, tmp_path, override, names):
    result = cli("arena", arena, f"dir={tmp_path / 'cells'}", override)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert all(name in result.err for name in names), result.err
    assert not (tmp_path / "cells").exists()


def test_a_cell_of_other_settings_is_not_taken_for_this_one(arena, cli):
    result = cli("arena", arena, "entries.dpo.batch=2", "--dry-run")
    assert result.code == 2
    assert "batch" in result.err
    assert "choose another `dir`" in result.err
    assert cli("arena", arena, "entries.dpo.batch=2", "only=[awm]", "--dry-run").code == 2, "the page would show it"
    assert cli("arena", arena, "entries.dpo.title=Another name", "--dry-run").code == 0


def test_a_trial_that_ran_later_changes_no_rate_of_a_cell(arena, cli):
    trial = arena.parent / "cells/tuning/awm-2/cell.json"
    unfinished, kept = arena.parent / "cells/cells/awm-0/cell.json", trial.read_text()
    known = json.loads(unfinished.read_text())
    other = {1e-3: 1.0, 2e-3: 0.0}[known["lr"]]  # makes the other rate the best
    found = json.loads(kept)
    for prompts in found["snapshots"][-1]["outcomes"]["correct"].values():
        prompts.update({prompt: [other] * len(row) for prompt, row in prompts.items()})
    trial.write_text(json.dumps(found))
    unfinished.unlink()
    result = cli("arena", arena)
    assert result.code == 2
    assert "chosen" in result.err
    trial.write_text(kept)
    assert cli("arena", arena).code == 0
    assert json.loads(unfinished.read_text())["lr"] == known["lr"]


def test_samples_that_a_trial_could_not_judge_count_for_none(arena):
    from diffalign.arena.plan import trials
    from diffalign.arena.tuning import tuned
    from diffalign.config import ArenaConfig
    from diffalign.config.file import load

    plans = trials(load(ArenaConfig, arena), "awm")
    whole = tuned(plans)
    path, kept = plans[0].result, plans[0].result.read_text()
    found = json.loads(kept)
    for prompts in found["snapshots"][-1]["outcomes"]["correct"].values():
        prompts.update({prompt: [float("nan")] * len(row) for prompt, row in prompts.items()})
    path.write_text(json.dumps(found))
    lame = tuned(plans)
    halved = load(ArenaConfig, arena, ["tuning.scale=0.5"])
    assert tuned(trials(halved, "awm")).rate == lame.rate / 2
    path.write_text(kept)
    assert lame.rate == plans[1].lr
    assert [trial.score for trial in lame.trials] == [None, whole.trials[1].score]


def test_a_failed_cell_says_why_and_runs_again(arena, cli, monkeypatch):
    from diffalign.arena import cell as cells

    (arena.parent / "cells/cells/awm-0/cell.json").unlink()

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(cells, "judged", fail)
        result = cli("arena", arena)
    assert (result.code, "1 of the cells failed" in result.err) == (2, True), result.err
    failed = (arena.parent / "cells/cells/awm-0/failed.txt").read_text()
    assert "Traceback" in failed
    assert "RuntimeError: out of luck" in (arena.parent / "out/arena.html").read_text()
    assert cli("arena", arena).code == 0
    assert "out of luck" not in (arena.parent / "out/arena.html").read_text()
    assert not (arena.parent / "cells/cells/awm-0/failed.txt").exists()


def test_moments_are_judged_at_the_nearest_multiple_of_the_first(arena, cli, tmp_path):
    changes = ["moments=[0.2, 0.33, 1.0]", "only=[awm]", "contrasts=[]", "targets=[]", "budget=960"]
    result = cli("arena", arena, f"dir={tmp_path / 'cells'}", f"out={tmp_path / 'out'}", *changes)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "cells/cells/awm-0/cell.json").read_text())["snapshots"]
    last = found[-1]["updates"]
    assert [one["updates"] / last for one in found] == [0.2, 0.4, 1.0]
