"""`diffalign eval` on the embedded model: panel, card, two evaluations, snapshots, GenEval's files."""

import json

import pytest

from diffalign import evaluate, geneval_layout, records
from diffalign.config import EvalConfig, TrainConfig
from diffalign.results import Results, Trajectory
from diffalign.train import offline

MODEL = {"family": "sd3", "path": "embedded:shapes"}
JUDGE = {"name": "shapes", "label": "correct", "params": {"metric": "correct"}}
PANEL = [
    {"name": "shapes", "label": "graded", "params": {"metric": "graded"}},
    {"name": "jpeg"},
    {"name": "diversity"},
    {"name": "picture", "label": "picture_sharpness"},
]


def config(out, **changes) -> EvalConfig:
    content = {
        "model": MODEL,
        "prompts": {"source": "shapes:heldout", "per_task": 2},
        "judge": JUDGE,
        "candidates": 2,
        "sampling": {"steps": 4, "batch": 32},
        "out": str(out),
        **changes,
    }
    return EvalConfig.model_validate(content)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Two evaluations, without and with guidance. Read only."""
    root = tmp_path_factory.mktemp("judged")
    evaluate.run(config(root / "plain", panel=PANEL))
    evaluate.run(config(root / "guided", sampling={"steps": 4, "batch": 32, "guidance": 3.0}))
    return root


def test_panel_and_card(judged):
    results = Results.model_validate_json((judged / "plain/results.json").read_bytes())
    assert list(results.panel) == ["graded", "jpeg", "diversity", "picture_sharpness"]
    assert results.panel["jpeg"].policy < 0 < results.panel["diversity"].policy
    assert results.panel["graded"].interval[0] < results.panel["graded"].policy < results.panel["graded"].interval[1]
    assert (results.n, results.prompts, results.failed, results.wins) == (24, 12, 0, None)
    card = results.card
    assert card["sampling"]["steps"] == 4
    assert len(card["model"]["revision"]) == 16
    assert card["judge"]["params"] == {"metric": "correct"}
    assert "torch" in card["versions"]
    assert card["prompts"]["source"] == "shapes:heldout"


def test_against_a_baseline(tmp_path):
    out = tmp_path / "same"
    evaluate.run(config(out, against=MODEL, panel=PANEL[:1]))
    results = Results.model_validate_json((out / "results.json").read_bytes())
    assert results.wins is not None
    assert (results.wins.policy, results.wins.interval) == (0.5, (0.5, 0.5)), "a model ties with itself"
    assert results.panel["graded"].difference == 0.0


def test_two_evaluations_against_each_other(judged, cli):
    done = cli("eval", judged / "guided", judged / "plain")
    assert done.code == 0
    last = done.out.strip().splitlines()[-1]
    assert "(judge: correct, n = 24)" in last
    assert "significant" in last
    other = cli("eval", judged / "plain", judged)
    assert other.code == 2
    assert "holds no judged samples" in other.err


def test_who_wins():
    def row(difference, low, high):
        return evaluate.Measured(policy=0.5, interval=(0, 1), difference=difference, difference_interval=(low, high))

    assert evaluate.winner(row(0.1, 0.05, 0.2), "A", "B").startswith("A wins by 0.1000")
    assert evaluate.winner(row(-0.1, -0.2, -0.05), "A", "B").startswith("B wins by 0.1000")
    assert evaluate.winner(row(0.1, -0.05, 0.2), "A", "B").startswith("no significant difference: A is ahead")
    assert evaluate.winner(row(0.0, 0.0, 0.0), "A", "B") == "no difference at all"


def test_judges_must_be_the_same(judged, tmp_path, cli):
    evaluate.run(config(tmp_path / "other", judge=PANEL[0]))
    done = cli("eval", judged / "plain", tmp_path / "other")
    assert done.code == 2
    assert "evaluate both with one judge" in done.err


def test_what_the_judge_fails_on_is_left_out_and_counted(judged, tmp_path):
    out = tmp_path / "failing"
    evaluate.run(config(out))
    scored = list(records.read(out / "policy/scored.jsonl"))
    scored[0].candidates[0] = scored[0].candidates[0].model_copy(update={"labels": {}, "errors": {"correct": "x: y"}})
    records.write(out / "policy/scored.jsonl", scored)
    results = evaluate.summarise("n", [out / "policy"], "correct", [])
    assert (results.n, results.failed) == (23, 1)


def test_genevals_own_files(tmp_path, capsys):
    out = tmp_path / "geneval"
    evaluate.run(config(out, layout="geneval"))
    found = geneval_layout.summary(out / "policy/geneval/results.jsonl")
    results = Results.model_validate_json((out / "results.json").read_bytes())
    assert found["overall"] == pytest.approx(results.overall.policy, abs=1e-5)
    assert f"overall: {found['overall']:.5f}" in capsys.readouterr().out
    assert (out / "policy/geneval/00000/samples/00001.png").is_file()


def test_over_training(judged, tmp_path, capsys):
    pairs = []
    for row in records.read(judged / "plain/policy/scored.jsonl"):
        rated = [c.model_copy(update={"labels": {"reward": c.labels["graded"]}}) for c in row.candidates]
        pairs.append(row.model_copy(update={"candidates": rated}))
    records.write(judged / "plain/policy/pairs.jsonl", pairs)
    training = {
        "model": {**MODEL, "lora": {"rank": 4}},
        "data": {"records": str(judged / "plain/policy/pairs.jsonl")},
        "method": {"name": "diffusion-dpo", "objective": {"beta": 20.0}},
        "optim": {"lr": 1e-3},
        "run": {"dir": str(tmp_path / "run"), "steps": 4, "batch": 8, "save_every": 2, "keep": 1, "snapshots": True},
    }
    offline.run(TrainConfig.model_validate(training))
    assert [p.name for p in sorted((tmp_path / "run/snapshots").iterdir())] == ["000002", "000004"]
    out = tmp_path / "curve"
    evaluate.run(config(out, snapshots=str(tmp_path / "run"), trained="graded", panel=PANEL))
    found = Trajectory.model_validate_json((out / "trajectory.json").read_bytes())
    assert [point.step for point in found.points] == [0, 2, 4]
    assert found.held_out == ["correct", "jpeg"]
    assert list(found.points[1].values) == ["correct", "graded", "jpeg", "diversity", "picture_sharpness"]
    assert found.points[0].values["graded"].difference == 0.0
    assert found.points[2].values["graded"].difference != 0.0
    assert "curve: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"snapshots": "nowhere", "trained": "correct"}, "holds none; train with run.snapshots=true"),
        ({"snapshots": "nowhere"}, "which label was trained on"),
        ({"panel": [JUDGE]}, "two scorers write the label 'correct'"),
    ],
)
def test_refusals(tmp_path, cli, changes, words):
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(config(tmp_path / "out", **changes).model_dump(mode="json")))
    done = cli("eval", path)
    assert done.code == 2
    assert words in done.err
