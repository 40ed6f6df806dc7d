"""Training records from scored ones: the form of every rule's records, the verb, and the page of statistics."""

import math

import numpy as np
import pytest
import torch

from diffalign import build, records
from diffalign.config import BuildConfig
from diffalign.errors import UserError
from diffalign.objectives.diffusion import lead
from diffalign.records import Candidate, Record

from .labelled import record


class TestTrainingRecord:
    def test_pair(self):
        row = record(clip=[1.0, 2.0, 3.0])
        out = build.training_record(row, [1.0, 2.0, 3.0], (2, 0))
        assert out.id == "a#2-0"
        assert (out.prompt, out.meta) == (row.prompt, row.meta)
        assert [c.sample for c in out.candidates] == ["2.png", "0.png"]
        assert [c.labels for c in out.candidates] == [{"clip": 3.0, "reward": 3.0}, {"clip": 1.0, "reward": 1.0}]
        assert "reward" not in row.candidates[0].labels

    def test_ranking_keeps_its_id(self):
        assert build.training_record(record(clip=[1.0, 2.0]), [1.0, 2.0], (1, 0), whole=True).id == "a"

    def test_details_follow_their_candidates(self):
        row = record(clip=[1.0, 2.0, 3.0])
        row = row.model_copy(update={"meta": {"scores": {"clip": [{"n": 0}, {}, {"n": 2}], "note": "text"}}})
        out = build.training_record(row, [1.0, 2.0, 3.0], (2, 0))
        assert out.meta == {"scores": {"clip": [{"n": 2}, {"n": 0}], "note": "text"}}

    def test_an_existing_reward_is_not_overwritten_by_another_value(self):
        row = record(reward=[1.0, 2.0])
        assert build.training_record(row, [1.0, 2.0], (1, 0)).candidates[0].labels == {"reward": 2.0}
        with pytest.raises(UserError, match="record 'a', candidate 1: label 'reward' is already there"):
            build.training_record(row, [1.0, 5.0], (1, 0))


class TestVerb:
    @pytest.fixture
    def config(self, tmp_path):
        rows = [record("a", clip=[1.0, 2.0, 4.0]), record("b", clip=[5.0, 5.0, 5.0]), record("c", clip=[2.0, 1.0, 2.0])]
        records.write(tmp_path / "scored.jsonl", rows)

        def make(**changes) -> BuildConfig:
            content = {"reward": {"clip": 1.0}, "out": str(tmp_path / "train.jsonl"), **changes}
            return BuildConfig(records=str(tmp_path / "scored.jsonl"), **content)

        return make

    @pytest.mark.parametrize(
        ("changes", "ids", "ties"),
        [
            ({}, ["a#2-0", "c#0-1"], "1 records dropped"),
            ({"rule": "all_pairs"}, ["a#2-0", "a#2-1", "a#1-0", "c#0-1", "c#2-1"], "4 pairs dropped"),
            ({"rule": "all_pairs", "per_prompt": 1}, ["a#2-0", "c#0-1"], "4 pairs dropped"),
            ({"rule": "all_pairs", "margin": 1.0}, ["a#2-0", "a#2-1"], "7 pairs dropped"),
            ({"rule": "ranked"}, ["a", "c"], "1 records dropped"),
            ({"rule": "ranked", "top": 2}, ["a"], "2 records dropped"),
        ],
    )
    def test_rules(self, config, tmp_path, capsys, changes, ids, ties):
        assert build.run(config(**changes)) == tmp_path / "train.jsonl"
        out = list(records.read(tmp_path / "train.jsonl"))
        assert [r.id for r in out] == ids
        for row in out:
            rewards = [c.labels["reward"] for c in row.candidates]
            assert rewards == sorted(rewards, reverse=True)
        printed = capsys.readouterr().out
        assert f"wrote {len(ids)} training records from 3" in printed
        assert ties in printed

    def test_all_ties(self, config, tmp_path):
        with pytest.raises(UserError, match="all ties"):
            build.run(config(margin=10.0))
        assert [p.name for p in tmp_path.iterdir()] == ["scored.jsonl"]

    def test_failure_keeps_the_old_output(self, config, tmp_path):
        build.run(config())
        before = (tmp_path / "train.jsonl").read_bytes()
        with (tmp_path / "scored.jsonl").open("ab") as handle:
            handle.write(b'{"id": "last", "prompt": ""}\n')
        with pytest.raises(UserError, match="'last' has 0 candidates"):
            build.run(config())
        assert (tmp_path / "train.jsonl").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["scored.jsonl", "train.html", "train.jsonl"]

    def test_dry_run_writes_nothing(self, config, tmp_path, capsys):
        build.run(config(), dry_run=True)
        assert [p.name for p in tmp_path.iterdir()] == ["scored.jsonl"]
        assert "would write 2 training records" in capsys.readouterr().out

    @pytest.mark.parametrize("changes", [{"per_prompt": 2}, {"top": 2}, {"rule": "all_pairs", "top": 2}])
    def test_options_of_another_rule(self, config, changes):
        with pytest.raises(UserError, match="belongs to `rule: "):
            build.run(config(**changes))

    def test_output_must_not_be_the_input(self, config, tmp_path):
        with pytest.raises(UserError, match="is the input itself"):
            build.run(config(out=str(tmp_path / "scored.jsonl")))


def p(z: float) -> float:
    return 1 / (1 + math.exp(-z))


class TestRulesOfTheVerb:
    @pytest.fixture
    def built(self, tmp_path, capsys):
        def run(rows, **changes) -> list[Record]:
            records.write(tmp_path / "scored.jsonl", rows)
            content = {"reward": {"a": 1.0}, "out": str(tmp_path / "train.jsonl"), **changes}
            out = build.run(BuildConfig(records=str(tmp_path / "scored.jsonl"), **content))
            run.printed = capsys.readouterr().out
            return list(records.read(out))

        return run

    def test_what_failed_is_left_out_and_counted(self, built):
        rows = [record("r", a=[1.0, 2.0, 3.0]), record("s", a=[1.0, 2.0])]
        for row, index in ((rows[0], 2), (rows[1], 0)):
            failed = Candidate(sample="x.png", errors={"a": "timeout: after 5 s"})
            row.candidates[index] = failed
        (pair,) = built(rows)
        assert pair.id == "r#1-0"
        assert (
            "2 candidates left out because a scorer failed on them; 1 records dropped because too few" in built.printed
        )

    def test_a_failure_of_another_label_does_not_count(self, built):
        row = record("r", a=[1.0, 2.0])
        row.candidates[0] = row.candidates[0].model_copy(update={"errors": {"other": "x"}})
        assert len(built([row])) == 1
        assert "left out" not in built.printed

    def test_constraints(self, built):
        rows = [record("r", a=[1.0, 2.0, 3.0], safe=[0.0, 0.0, -5.0])]
        (pair,) = built(rows, constraints={"safe": 1.0})
        assert pair.id == "r#1-0"
        assert [r.id for r in built(rows, constraints={"safe": 1.0}, rule="all_pairs")] == ["r#1-0"]
        assert "2 pairs dropped by constraints" in built.printed

    def test_pareto_pairs_cost_nothing(self, built):
        rows = [record("r", a=[3.0, 1.0, 2.0, 0.0], b=[1.0, 3.0, 0.5, 0.0])]
        pairs = built(rows, reward={"a": 1.0, "b": 1.0}, combine="pareto", rule="all_pairs")
        assert {r.id for r in pairs} == {"r#0-2", "r#0-3", "r#1-3", "r#2-3"}

    def test_kept_ties_have_equal_rewards(self, built):
        rows = [record("r", a=[1.0, 1.5]), record("s", a=[1.0, 4.0])]
        first, second = built(rows, margin=1.0, ties="keep")
        assert [c.labels["reward"] for c in first.candidates] == [1.25, 1.25]
        assert [c.labels["reward"] for c in second.candidates] == [4.0, 1.0]
        assert "1 records kept as ties" in built.printed

    def test_soft_labels(self, built):
        rows = [record("r", a=[1.0, 3.0]), record("s", a=[1.0, 0.0])]
        first, second = built(rows, soft=2.0)
        assert [c.labels["reward"] for c in first.candidates] == pytest.approx(
            [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]
        )
        assert second.candidates[0].labels["reward"] == pytest.approx(p(0.5))
        first, _ = built(rows, soft="range")
        assert first.candidates[0].labels["reward"] == pytest.approx(p(2 / 3))

    def test_soft_labels_are_those_of_smpo(self, built):
        """p of SmPO from normalised scores (arXiv:2506.02698): what its objective computes itself from raw ones."""
        scores = [0.21, 0.24]
        (pair,) = built([record("r", a=scores)], soft=0.28 - 0.115)
        reward = torch.tensor([[0.24, 0.21]], dtype=torch.float64)
        better, worse = (c.labels["reward"] for c in pair.candidates)
        assert better - worse == pytest.approx(float(lead(reward, 0.115, 0.28)), abs=1e-12)

    def test_unpaired(self, built):
        made = built([record("r", a=[0.1, 0.9, 0.5])], rule="unpaired", threshold=0.5)
        assert [r.id for r in made] == ["r#0", "r#1"]
        assert [r.candidates[0].labels["desirable"] for r in made] == [0.0, 1.0]
        assert "1 candidates dropped as ties" in built.printed
        assert len(built([record("r", a=[0.9])], rule="unpaired", threshold=0.5)) == 1

    def test_segments(self, built):
        rows = [record("r", a=[[1.0, 0.0, 3.0], [0.0, 0.0, 4.0]]), record("s", a=[[1.0, 0.0], [1.0, 0.0]])]
        (pair,) = built(rows, rule="segments", decided=0.5)
        assert [c.labels["reward"] for c in pair.candidates] == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
        assert "1 pairs dropped as ties" in built.printed

    def test_a_share_of_zero_is_not_the_default(self, built):
        rows = [record("r", a=[[1.0] + [0.0] * 9, [0.0] * 10])]
        assert len(built(rows, rule="segments", decided=0.0)) == 1
        with pytest.raises(UserError, match="all ties"):
            built(rows, rule="segments")

    def test_curriculum(self, built, tmp_path):
        rows = [record("r", a=[1.0, 2.0, 4.0]), record("s", a=[5.0, 1.0])]
        assert [r.id for r in built(rows, rule="curriculum", stages=2)] == ["r#2-0", "s#0-1"]
        assert [r.id for r in records.read(tmp_path / "train-2.jsonl")] == ["r#2-1"]

    def test_conditions(self, built):
        made = [Candidate(sample=f"made{k}.png", origin={"seed": k, "condition": f"shown{k}.png"}) for k in range(2)]
        row = Record(id="r", prompt="p", source="real.png", condition="asked.png", candidates=made)
        first, second = built([row], reward={}, rule="conditions")
        assert (first.id, second.id, first.condition) == ("r#0", "r#1", None)
        assert {c.sample for c in first.candidates} == {"real.png"}
        assert [(c.condition, c.labels["reward"]) for c in second.candidates] == [
            ("asked.png", 1.0),
            ("shown1.png", 0.0),
        ]
        with pytest.raises(UserError, match="generate with `extract`"):
            built([row.model_copy(update={"candidates": [Candidate(sample="x.png")]})], reward={}, rule="conditions")
        with pytest.raises(UserError, match="need its `source` picture and its `condition`"):
            built([row.model_copy(update={"source": None})], reward={}, rule="conditions")

    def test_an_imported_reward_takes_the_form_of_the_rule(self, built):
        (pair,) = built([record("r", reward=[0.0, 1.0])], reward={"reward": 1.0}, soft=1.0)
        assert pair.candidates[0].labels["reward"] == pytest.approx(p(1.0))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rule": "unpaired"}, "needs `threshold`"),
            ({"rule": "curriculum"}, "needs `stages`"),
            ({"reward": {}}, "`reward` says which labels count"),
            ({"rule": "conditions"}, "whose pairs need no reward"),
            ({"rule": "unpaired", "threshold": 1.0, "ties": "keep"}, "has nothing to keep"),
            ({"rule": "ranked", "constraints": {"a": 0.0}}, "`constraints` belongs to `rule: best_worst` or"),
            ({"soft": "range"}, "`soft: range` needs rewards that differ"),
        ],
    )
    def test_settings_that_do_not_fit(self, built, changes, message):
        with pytest.raises(UserError, match=message):
            built([record("r", a=[1.0, 1.0])], **changes)


class TestPage:
    def test_says_what_is_in_the_pool(self, tmp_path):
        for name, value in (("0", 10), ("1", 200), ("2", 10)):
            records.save_image(tmp_path / f"{name}.png", np.full((4, 6, 3), value, np.uint8))
        rows = [record("r", a=[1.0, 2.0, 3.0], b=[3.0, 2.0, 5.0]), record("s", a=[1.0, 2.0, 0.0], b=[1.0, 2.0, 3.0])]
        rows[1].candidates[0] = rows[1].candidates[0].model_copy(update={"errors": {"c": "timeout: x"}})
        rows = [r.model_copy(update={"prompt": "<b>two words"}) for r in rows]
        records.write(tmp_path / "scored.jsonl", rows)
        build.run(
            BuildConfig(records=str(tmp_path / "scored.jsonl"), out=str(tmp_path / "train.jsonl"), reward={"a": 1.0})
        )
        page = (tmp_path / "train.html").read_text()
        plain = " ".join(page.split())
        assert "<td>a, b</td><td>.50</td><td>6</td>" in page, "3 of 6 pairs are ordered alike"
        assert "Of 6 candidates looked at, 4 are copies of another one, 2 of them within their record." in plain
        assert "<td>6 × 4</td><td>6</td>" in page
        assert "<b>1</b> prompts occur more than once" in page
        assert "c: all 1 candidates failed" in page
        assert "<td>unknown</td><td>6</td> <td>1.500</td><td>2.667</td>" in plain
        assert "<script" not in page

    def test_can_be_left_out(self, tmp_path):
        records.write(tmp_path / "scored.jsonl", [record("r", a=[1.0, 2.0])])
        settings = {
            "records": str(tmp_path / "scored.jsonl"),
            "out": str(tmp_path / "train.jsonl"),
            "reward": {"a": 1.0},
        }
        build.run(BuildConfig(**settings, page=False))
        assert not (tmp_path / "train.html").exists()
