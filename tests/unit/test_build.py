"""Rewards from labels, the three rules against hand-computed answers, and the verb."""

import math

import pytest

from diffalign import build, records
from diffalign.build import Choice, all_pairs, best_worst, combine, ranked
from diffalign.config import BuildConfig
from diffalign.errors import UserError
from diffalign.records import Candidate, Record


def record(name="a", **columns) -> Record:
    """A record from one list per label."""
    rows = zip(*columns.values(), strict=True)
    candidates = [Candidate(sample=f"{i}.png", labels=dict(zip(columns, row))) for i, row in enumerate(rows)]  # noqa: B905
    return Record(id=name, prompt=f"prompt {name}", candidates=candidates, meta={"tag": "colors"})


class TestCombine:
    def test_weighted_sum(self):
        row = record(clip=[1.0, 2.0], hps=[10.0, 0.0])
        assert combine(row, {"clip": 2.0, "hps": 0.5}, "sum") == [7.0, 4.0]
        assert combine(row, {"clip": 1.0, "hps": -1.0}, "sum") == [-9.0, 2.0]

    def test_wins_by_hand(self):
        row = record(a=[0.3, 0.1, 0.2, 0.4], b=[5.0, 5.0, 1.0, 2.0], c=[1.0, 2.0, 3.0, 4.0])
        # wins per label: a 2 0 1 3, b 2 2 0 1 (one comparison ties), c 0 1 2 3; over 3 labels and 3 rivals
        assert combine(row, {"a": 1, "b": 1, "c": 1}, "wins") == pytest.approx([4 / 9, 3 / 9, 3 / 9, 7 / 9])
        # weights 2, 1, 1: (4 + 2 + 0, 0 + 2 + 1, 2 + 0 + 2, 6 + 1 + 3) over 4 * 3
        assert combine(row, {"a": 2, "b": 1, "c": 1}, "wins") == pytest.approx([6 / 12, 3 / 12, 4 / 12, 10 / 12])

    @pytest.mark.parametrize("k", [2, 3, 4, 7])
    def test_wins_without_ties_sum_to_half_of_k(self, k):
        row = record(a=[float(i * 3 % 7) for i in range(k)], b=[-float(i) for i in range(k)])
        rewards = combine(row, {"a": 0.3, "b": 1.7}, "wins")
        assert sum(rewards) == pytest.approx(k / 2)
        assert min(rewards) >= 0
        assert max(rewards) <= 1

    def test_a_tie_wins_for_nobody(self):
        assert combine(record(a=[1.0, 1.0, 0.0]), {"a": 1}, "wins") == [0.5, 0.5, 0.0]

    def test_negative_weight_turns_wins_around(self):
        row = record(error=[0.1, 0.2, 0.3])
        assert combine(row, {"error": -2.0}, "wins") == [1.0, 0.5, 0.0]

    def test_wins_ignore_scale(self):
        small, large = record(a=[1e-300, 2e-300]), record(a=[1.0, 2e300])
        assert combine(small, {"a": 1e-30}, "wins") == combine(large, {"a": 1e-30}, "wins") == [0.0, 1.0]

    def test_per_unit(self):
        row = record(vq=[[1.0, 4.0], [2.0, 2.0]], mq=[[0.0, 1.0], [0.0, 3.0]])
        assert combine(row, {"vq": 1.0, "mq": 2.0}, "sum") == [[1.0, 6.0], [2.0, 8.0]]
        # unit 0: vq 0 1, mq tie; unit 1: vq 1 0, mq 0 1
        assert combine(row, {"vq": 1.0, "mq": 3.0}, "wins") == [[0.0, 0.25], [0.25, 0.75]]

    @pytest.mark.parametrize(
        ("row", "weights", "message"),
        [
            (record(clip=[1.0, 2.0]), {"hps": 1.0}, "record 'a', candidate 0: no label 'hps'; it has: clip"),
            (record(clip=[1.0]), {"clip": 1.0}, "record 'a' has 1 candidates"),
            (Record(id="e", prompt=""), {"clip": 1.0}, "record 'e' has 0 candidates"),
            (record(a=[1.0, [1.0, 2.0]]), {"a": 1.0}, "record 'a': a: numbers mixed with lists"),
            (record(a=[[1.0], [1.0, 2.0]]), {"a": 1.0}, "lists of different lengths"),
            (record(a=[1.0, 2.0], b=[[1.0], [2.0]]), {"a": 1.0, "b": 1.0}, "a, b: numbers mixed"),
            (record(a=[1.0, 2.0]), {"a": math.nan}, "must be finite"),
            (record(a=[1.0, 2.0]), {"a": 0.0}, "not all zero"),
            (record(a=[1e308, 2.0]), {"a": 10.0}, "record 'a': the reward is not finite"),
        ],
    )
    @pytest.mark.parametrize("how", ["sum", "wins"])
    def test_refusals(self, row, weights, message, how):
        if how == "wins" and "reward is not finite" in message:
            assert combine(row, weights, how) == [1.0, 0.0]
            return
        with pytest.raises(UserError, match=message):
            combine(row, weights, how)


class TestRules:
    def test_best_worst(self):
        assert best_worst([1.0, 3.0, 2.0, 0.0], 0.0) == Choice([(1, 3)], ties=0)
        assert best_worst([1.0, 3.0, 3.0, 1.0], 0.0) == Choice([(1, 0)], ties=0)
        assert best_worst([1.0, 1.0], 0.0) == Choice([], ties=1)

    @pytest.mark.parametrize(("margin", "kept"), [(1.9, 1), (2.0, 0), (2.1, 0)])
    def test_a_difference_equal_to_the_margin_is_a_tie(self, margin, kept):
        assert len(best_worst([1.0, 3.0], margin).groups) == kept
        assert len(all_pairs([1.0, 3.0], margin).groups) == kept
        assert len(ranked([1.0, 3.0], margin).groups) == kept

    def test_all_pairs_widest_first(self):
        rewards = [1.0, 4.0, 1.0, 2.0]
        assert all_pairs(rewards, 0.0) == Choice([(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)], ties=1)
        assert all_pairs(rewards, 1.0) == Choice([(1, 0), (1, 2), (1, 3)], ties=3)
        assert all_pairs(rewards, 0.0, per_prompt=2) == Choice([(1, 0), (1, 2)], ties=1)

    def test_ranked(self):
        rewards = [1.0, 4.0, 1.0, 2.0]
        assert ranked(rewards, 0.0) == Choice([(1, 3, 0, 2)], ties=0)
        assert ranked(rewards, 0.0, top=2) == Choice([(1, 3)], ties=0)
        assert ranked([4.0, 4.0, 1.0], 0.0, top=2) == Choice([], ties=1)
        assert ranked([1.0] * 3, 0.0) == Choice([], ties=1)

    def test_units_compare_by_their_mean(self):
        rewards = [[0.0, 0.0], [3.0, -1.0], [1.0, 1.0]]
        assert best_worst(rewards, 0.5).groups == [(1, 0)]
        assert best_worst(rewards, 1.0).groups == []
        assert all_pairs(rewards, 0.0) == Choice([(1, 0), (2, 0)], ties=1)


class TestTrainingRecord:
    def test_pair(self):
        row = record(clip=[1.0, 2.0, 3.0])
        out = build.training_record(row, [1.0, 2.0, 3.0], (2, 0), "best_worst")
        assert out.id == "a#2-0"
        assert (out.prompt, out.meta) == (row.prompt, row.meta)
        assert [c.sample for c in out.candidates] == ["2.png", "0.png"]
        assert [c.labels for c in out.candidates] == [{"clip": 3.0, "reward": 3.0}, {"clip": 1.0, "reward": 1.0}]
        assert "reward" not in row.candidates[0].labels

    def test_ranking_keeps_its_id(self):
        assert build.training_record(record(clip=[1.0, 2.0]), [1.0, 2.0], (1, 0), "ranked").id == "a"

    def test_details_follow_their_candidates(self):
        row = record(clip=[1.0, 2.0, 3.0])
        row = row.model_copy(update={"meta": {"scores": {"clip": [{"n": 0}, {}, {"n": 2}], "note": "text"}}})
        out = build.training_record(row, [1.0, 2.0, 3.0], (2, 0), "best_worst")
        assert out.meta == {"scores": {"clip": [{"n": 2}, {"n": 0}], "note": "text"}}

    def test_an_existing_reward_is_not_overwritten_by_another_value(self):
        row = record(reward=[1.0, 2.0])
        assert build.training_record(row, [1.0, 2.0], (1, 0), "ranked").candidates[0].labels == {"reward": 2.0}
        with pytest.raises(UserError, match="record 'a', candidate 1: label 'reward' is already there"):
            build.training_record(row, [1.0, 5.0], (1, 0), "ranked")


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
        assert len(list(tmp_path.iterdir())) == 2

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
