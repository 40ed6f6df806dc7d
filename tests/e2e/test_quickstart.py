"""The quickstart's own code at a small size: every stage runs, resumes, and writes what the next one needs."""

import json

import pytest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from diffalign.cli import main

    root = tmp_path_factory.mktemp("quickstart") / "run"
    words = ["quickstart", "quickstart_short", f"dir={root}", "generate.prompts.per_task=4", "train.steps=6"]
    assert main(words) == 0
    return root, words


def test_every_stage_leaves_its_output(finished):
    root, _ = finished
    for name in ("pool/records.jsonl", "pool/scored.jsonl", "pool/train.jsonl", "train/metrics.jsonl", "job.json"):
        assert (root / name).stat().st_size > 0, name
    assert (root / "train/lora/pytorch_lora_weights.safetensors").is_file()
    assert any((root / "train/tensorboard").iterdir())
    for name in ("unguided", "guided"):
        results = json.loads((root / "eval" / name / "results.json").read_text())
        assert results["n"] == 48
        assert set(results["tasks"]) == {
            "single_object", "two_object", "counting", "colors", "position", "color_attr",
        }  # fmt: skip
        assert results["note"]


def test_training_sees_only_train_prompts(finished):
    from diffalign.records import read
    from diffalign.worlds.shapes.prompts import is_held_out

    root, _ = finished
    assert not any(is_held_out(record.meta) for record in read(root / "pool/train.jsonl"))
    judged = [r for r in read(root / "eval/unguided/policy/scored.jsonl") if r.meta["tag"] != "single_object"]
    assert all(is_held_out(record.meta) for record in judged)


def test_training_starts_at_ln_2_and_moves(finished):
    root, _ = finished
    metrics = [json.loads(line) for line in (root / "train/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 7))
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics[0]["reward/accuracy"] == 0.5
    assert metrics[0]["grad_live"] > 0
    assert metrics[1]["gap"] > 0
    expected = {
        "err/policy",
        "err/reference",
        "reward/chosen",
        "reward/rejected",
        "reward/margin",
        "drift/chosen",
        "lr",
    }
    assert expected <= metrics[-1].keys()


def test_a_finished_job_is_not_redone(finished):
    from safetensors.torch import load_file

    from diffalign.cli import main

    root, words = finished
    kept = ["pool/records.jsonl", "train/metrics.jsonl", "eval/guided/policy/records.jsonl"]
    before = {name: (root / name).read_bytes() for name in kept}
    weights = root / "train/lora/pytorch_lora_weights.safetensors"
    tensors = load_file(weights)
    for _ in range(4):  # the library orders a file's header by chance; that must not pass for another model
        assert main(words) == 0
    assert before == {name: (root / name).read_bytes() for name in kept}
    again = load_file(weights)
    assert tensors.keys() == again.keys()
    assert all((tensors[name] == again[name]).all() for name in tensors)


def test_another_job_does_not_enter_the_folder(finished, capsys):
    from diffalign.cli import main

    _, words = finished
    assert main([*words, "seed=1"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "source"), [("score", "records.jsonl"), ("build", "scored.jsonl")])
def test_the_next_stage_refuses_an_unfinished_one(finished, tmp_path, capsys, verb, source):
    import shutil

    from diffalign.cli import main

    pool = finished[0] / "pool"
    lines = (pool / source).read_bytes().splitlines(keepends=True)
    (tmp_path / source).write_bytes(b"".join(lines[:-1]))
    shutil.copy(pool / f"{source}.meta.json", tmp_path)
    shutil.copytree(pool / "media", tmp_path / "media")
    words = [f"shapes/{verb}", f"records={tmp_path / source}", f"out={tmp_path / 'out.jsonl'}"]
    assert main([verb, *words]) == 2
    assert f"holds {len(lines) - 1} of {len(lines)} records" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
