"""Rounds that people label: what is asked, what training makes of it, and a run that is killed while it waits."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffalign import config as cfg
from diffalign import label
from diffalign import records as store
from diffalign.config.file import load
from diffalign.errors import UserError
from diffalign.records import Record
from diffalign.train import human, job

from . import people, test_family_sd

PROMPTS = ["a photo of a red circle", "a photo of a blue square"]


class Squares:
    """A family whose samples are 8x8 pictures of one grey level, that of the latent."""

    modality = "image"

    def decode(self, latents):
        return latents[:, :, None, None].expand(-1, 3, 8, 8)


def submitted(folder: Path, samples: int, levels: torch.Tensor, chunk: int = 64) -> human.Human:
    """A round 3 that has been sampled; ``levels`` (G, S)."""
    feedback = human.Human(Squares(), folder, folder, samples)
    feedback.begin(3)
    each = [Record(id=str(n), prompt=f"prompt {n}") for n in range(len(levels)) for _ in range(samples)]
    for start in range(0, len(each), chunk):
        part = slice(start, start + chunk)
        feedback.submit(each[part], levels.flatten()[part, None])
    return feedback


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(human, "POLL", 0.02)


class TestRound:
    def test_files_and_labels_in_order(self, tmp_path, quick, cli, capsys):
        levels = torch.arange(6).reshape(2, 3) / 8
        feedback = submitted(tmp_path, 3, levels, chunk=2)
        feedback._complete()
        folder = tmp_path / "000003"
        shown = list(store.read(folder / "records.jsonl"))
        assert [(r.id, r.prompt, len(r.candidates)) for r in shown] == [
            ("000000", "prompt 0", 3),
            ("000001", "prompt 1", 3),
        ]
        seen = [[np.asarray(Image.open(folder / c.sample))[0, 0, 0] / 255 for c in r.candidates] for r in shown]
        np.testing.assert_allclose(seen, levels, atol=2e-3)
        asked = cli("label", folder / "label.yaml", "--dry-run")
        assert (asked.code, asked.out.split(" into ")[0]) == (
            0,
            f"would ask 2 questions (rank) about {folder / 'records.jsonl'}",
        )
        assert people.answer(folder) == 2
        assert feedback.collect().tolist() == [[0.0], [0.5], [1.0]] * 2
        assert [[c.labels["human"] for c in r.candidates] for r in store.read(folder / "labelled.jsonl")] == [
            [0.0, 0.5, 1.0]
        ] * 2
        assert "wait for people" not in capsys.readouterr().out, "everything was answered already"

    def test_it_waits_and_says_once_what_to_run(self, tmp_path, quick, capsys):
        feedback = submitted(tmp_path, 2, torch.rand(2, 2))
        feedback._complete()
        people.answer(tmp_path / "000003", limit=1)
        found: list[torch.Tensor] = []
        waiting = threading.Thread(target=lambda: found.append(feedback.collect()))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        people.answer(tmp_path / "000003")
        waiting.join(10)
        assert found[0].tolist() == [[0.0], [1.0]] * 2
        lines = [line for line in capsys.readouterr().out.splitlines() if "wait for people" in line]
        command = f"diffalign label {tmp_path / '000003' / 'label.yaml'}"
        assert lines == [f"round 4: 2 prompts x 2 samples wait for people: {command}"]
        assert load(cfg.LabelConfig, command.split()[-1]).task == "pair"
        assert feedback.seconds["wait"] >= 0.3

    def test_a_prompt_that_everybody_skipped_has_no_label(self, tmp_path, quick):
        feedback = submitted(tmp_path, 2, torch.rand(2, 2))
        feedback._complete()
        people.answer(tmp_path / "000003", limit=1)
        path = tmp_path / "000003" / "answers.jsonl"
        first = json.loads(path.read_text())
        other = {"000000#0-1": "000001", "000001#0-1": "000000"}[first["item"]]
        skip = {**first, "item": f"{other}#0-1", "record": other, "answer": "skip"}
        path.write_text(path.read_text() + json.dumps(skip) + "\n")
        found = feedback.collect().reshape(2, 2)
        assert found[int(first["record"])].tolist() == [0.0, 1.0]
        assert found[int(other)].isnan().all()

    def test_a_round_that_is_there_is_kept(self, tmp_path, quick):
        levels = torch.rand(2, 2)
        submitted(tmp_path, 2, levels)._complete()
        people.answer(tmp_path / "000003")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert submitted(tmp_path, 2, levels * 1.01).collect().tolist() == [[0.0], [1.0]] * 2
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_a_round_of_other_weights_is_refused(self, tmp_path):
        submitted(tmp_path, 2, torch.tensor([[0.1, 0.9]]))._complete()
        with pytest.raises(UserError, match="samples of other weights or settings; delete it to ask anew"):
            submitted(tmp_path, 2, torch.tensor([[0.9, 0.1]])).collect()

    def test_answers_to_something_else_are_refused(self, tmp_path, quick):
        feedback = submitted(tmp_path, 3, torch.rand(2, 3))
        feedback._complete()
        config = load(cfg.LabelConfig, tmp_path / "000003" / "label.yaml")
        label.claim(Path(config.out), label.identity(config.model_copy(update={"task": "best"})))
        line = {"annotator": "a", "item": "000000", "record": "000000", "shown": [0, 1, 2], "answer": 0, "time": ""}
        Path(config.out).write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=r"answers\.jsonl: was made with different task"):
            feedback.collect()


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        test_family_sd._pipeline("sd1").save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def d3po(tmp_path, tiny_sd):
    """``d3po(run={"steps": 3})`` writes the config of D3PO with people: three samples of a prompt from one noise."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    content = {
        "model": {"family": "sd", "path": str(tiny_sd), "device": "cpu", "lora": {"rank": 2}},
        "online": {
            "prompts": {"source": str(tmp_path / "prompts.txt")},
            "groups": 2,
            "samples": 3,
            "sampling": {"steps": 3, "size": [32, 32]},
            "shared_noise": True,
            "source": "human",
            "credit": {"pairs": "all"},
            "updates": 2,
            "anchors": {"reference": {}},
        },
        "method": {"name": "d3po", "draw": {"count": None}},
        "optim": {"lr": 1e-3},
        "run": {"dir": str(tmp_path / "run"), "steps": 4, "batch": 3},
    }

    def write(**changes) -> Path:
        made = {name: {**content[name], **changes.get(name, {})} for name in content}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(made))
        return tmp_path / "train.yaml"

    return write


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, list]:
    return {name: value.tolist() for name, value in load_file(folder / "lora/pytorch_lora_weights.safetensors").items()}


class TestRun:
    def test_killed_while_it_waits(self, d3po, tmp_path, warm, cli, quick):
        config, rounds = d3po(), tmp_path / "run/rounds"

        def second_round_is_half_answered() -> bool:
            if people.is_whole(rounds / "000000") and not (rounds / "000000/answers.jsonl").is_file():
                assert people.answer(rounds / "000000") == 2
            return people.is_whole(rounds / "000001") and people.answer(rounds / "000001", limit=1) == 1

        warm.kill(second_round_is_half_answered, 0.2, "train", config)
        kept = [path for path in rounds.rglob("*") if path.is_file() and path.name != "labelled.jsonl"]
        before = {path: path.read_bytes() for path in kept}
        assert len([path for path in kept if path.suffix == ".png"]) == 2 * 6
        assert people.answer(rounds / "000001") == 1
        outcome = cli("train", config, "--resume", "latest")
        assert outcome.code == 0, outcome.err
        assert "wait for people" not in outcome.out, "all was answered, though nothing was trained"
        for path, content in before.items():
            assert path.read_bytes().startswith(content), path
        rows = metrics(tmp_path / "run")
        assert len(rows) == 4
        assert [row["reward/mean"] for row in rows if "reward/mean" in row] == [0.5, 0.5]
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert rows[2]["loss"] == pytest.approx(np.log(2), abs=1e-6), "the reference is the start of the round"
        assert rows[1]["loss"] != pytest.approx(np.log(2), abs=1e-9)
        thread = people.answering(tmp_path / "again/rounds", 2)
        assert cli("train", config, f"run.dir={tmp_path / 'again'}").code == 0
        thread.join()
        assert final(tmp_path / "again") == final(tmp_path / "run")

    def test_a_rehearsal_asks_nobody(self, d3po, tmp_path, cli):
        outcome = cli("train", d3po(), "--dry-run")
        assert outcome.code == 0, outcome.err
        assert "one update: loss 0.6931" in outcome.out
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("word", "text"),
        [
            ("online.scorers=[{name: jpeg}]", "online.scorers: are not asked with online.source=human"),
            ("online.samples=1", "people compare two samples of a prompt or more"),
            ("online.refill=1", "online.refill"),
            ("online.reward={jpeg: 1}", "'jpeg': the label of people is 'human'"),
            ("run.rollback=1", "run.rollback"),
            (
                "online.stop={prompts: {source: 'shapes:heldout'}, scorers: [{name: jpeg}]}",
                "online.stop: compares held-out rewards with a scorer's",
            ),
        ],
    )
    def test_what_people_cannot_do(self, d3po, refused, word, text):
        refused("train", d3po(), word, names=[text])

    def test_one_process(self, d3po, monkeypatch):
        monkeypatch.setattr("diffalign.train.run.Run.world", 2)
        with pytest.raises(UserError, match="people answer one process, and this run has 2"):
            job.prepare(load(cfg.TrainConfig, d3po(online={"updates": 1})))
