"""The online quickstart at a small size: rounds in place of a pool, then the same evaluations and report."""

import json


def test_rounds_stand_in_for_the_pool(cli, tmp_path):
    small = ["train.steps=4", "train.online.groups=4", "train.online.samples=4", "train.online.sampling.steps=4"]
    judged = [f"evaluate.{name}.{key}" for name in ("unguided", "guided") for key in ("prompts.per_task=2",)]
    result = cli("quickstart", "--method", "awm", f"dir={tmp_path / 'run'}", *small, *judged)
    assert result.code == 0, result.err
    root = tmp_path / "run"
    assert not (root / "pool").exists()
    lines = [json.loads(line) for line in (root / "train/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert "reward/mean" in lines[0]
    for name in ("unguided", "guided"):
        assert json.loads((root / "eval" / name / "results.json").read_text())["n"] == 12
    assert "reward of own samples" in (root / "report.html").read_text()


def test_a_method_without_a_quickstart_is_refused(cli):
    result = cli("quickstart", "--method", "magic")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "diffusion-dpo, awm" in result.err


def test_a_quickstart_needs_a_pool_or_rounds(cli):
    result = cli("quickstart", "build=null")
    assert result.code == 2
    assert "train.online" in result.err
