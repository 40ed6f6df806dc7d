"""`diffalign score`: resumable, with a budget for what cannot be scored."""

import json
import math

import pytest

from diffalign import records, score
from diffalign.config import ScoreConfig
from diffalign.errors import UserError

from .fake_scorers import labels, texts


class TestVerb:
    @pytest.fixture
    def config(self, tmp_path, outside):
        records.write(tmp_path / "in.jsonl", [texts(f"r{i}", "x" * i, "y" * (i % 3)) for i in range(11)])

        def make(out="out.jsonl", **changes) -> ScoreConfig:
            content = {"scorers": [{"name": "other_scorers:length", "label": "n"}], "batch": 5, **changes}
            return ScoreConfig(records=str(tmp_path / "in.jsonl"), out=str(tmp_path / out), **content)

        return make

    def test_scores_and_summarises(self, config, tmp_path, capsys):
        assert score.run(config()) == tmp_path / "out.jsonl"
        assert labels(records.read(tmp_path / "out.jsonl")) == [[i, i % 3] for i in range(11)]
        assert "n: mean 2.9545, min 0.0000, max 10.0000" in capsys.readouterr().out

    @pytest.mark.parametrize("fail_after", [0, 1, 2, 5])
    def test_killed_and_resumed_gives_the_same_file(self, config, outside, tmp_path, fail_after):
        score.run(config("whole.jsonl"))
        outside.fail_after = fail_after
        with pytest.raises(KeyboardInterrupt, match="killed"):
            score.run(config())
        survived = (tmp_path / "out.jsonl").read_bytes()
        whole = (tmp_path / "whole.jsonl").read_bytes()
        assert whole.startswith(survived)
        (tmp_path / "out.jsonl").write_bytes(whole[: len(survived) + 5])  # and a torn line
        outside.fail_after = math.inf
        score.run(config())
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        rescored = sum(map(len, outside.built[-1].batches))
        assert rescored == 22 - 2 * survived.count(b"\n"), "records already there are not scored again"
        assert bool(survived) == (fail_after >= 1)

    def test_resumed_stage_scores_the_same_batches(self, config, outside, tmp_path):
        score.run(config())
        whole = outside.built[-1].batches
        lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:5]))
        score.run(config())
        assert outside.built[-1].batches == whole[2:], "the fifth record is in the batch of the sixth"
        assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines)

    def test_finished_output_needs_no_scorer(self, config, outside):
        score.run(config())
        score.run(config())
        assert len(outside.built) == 1

    def test_changed_scorers_are_refused(self, config):
        score.run(config())
        with pytest.raises(UserError, match=r"out\.jsonl: was made with different scorers"):
            score.run(config(scorers=[{"name": "other_scorers:length", "label": "n", "params": {"scale": 2.0}}]))

    def test_changed_input_is_refused(self, config, tmp_path):
        score.run(config())
        records.write(tmp_path / "in.jsonl", [texts("r0", "x"), texts("new", "x")])
        with pytest.raises(UserError, match="made with different records"):
            score.run(config())

    def test_output_of_unknown_origin_is_refused(self, config, tmp_path):
        score.run(config())
        (tmp_path / "out.jsonl.meta.json").unlink()
        with pytest.raises(UserError, match=r"exists without its out\.jsonl\.meta\.json"):
            score.run(config())

    def test_strangers_in_the_output_are_refused(self, config, tmp_path):
        score.run(config())
        with records.Appender(tmp_path / "out.jsonl") as out:
            out.append([texts("stranger", "x")])
        with pytest.raises(UserError, match="'stranger' is not in"):
            score.run(config())

    def test_dry_run_writes_nothing(self, config, outside, tmp_path, capsys):
        score.run(config(), dry_run=True)
        assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
        assert "would score 11 records" in capsys.readouterr().out
        assert sum(map(len, outside.built[-1].batches)) <= 5, "one batch"

    def test_bad_input_fails_before_any_scorer_is_built(self, config, outside, tmp_path):
        with (tmp_path / "in.jsonl").open("a") as handle:
            handle.write('{"id": "last", "prompt": ""}\n')
        with pytest.raises(UserError, match="'last' has no candidates"):
            score.run(config())
        assert not outside.built

    def test_two_scorers_of_one_label(self, config):
        with pytest.raises(UserError, match="two scorers write the label 'n'"):
            score.run(config(scorers=[{"name": "other_scorers:length", "label": "n"}] * 2))

    def test_a_label_that_is_there_is_refused(self, config):
        score.run(config())
        again = config("again.jsonl").model_copy(update={"records": config().out})
        with pytest.raises(UserError, match=r"record 'r0', candidate 0: label 'n' is already there"):
            score.run(again)

    def test_failures_within_the_budget_are_counted_and_scored_again_on_demand(
        self, config, outside, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr(outside, "refuses", {"xxx", "xxxxx"})
        score.run(config())
        assert "n: mean 2.8500, min 0.0000, max 10.0000; 2 candidates not scored" in capsys.readouterr().out
        assert records.summary(records.read(tmp_path / "out.jsonl"))["failed"] == {"n": 2}
        outside.refuses = set()
        again = config("again.jsonl", retry=True).model_copy(update={"records": config().out})
        score.run(again)
        assert [text for batch in outside.built[-1].batches for text in batch] == ["xxx", "xxxxx"]
        assert labels(records.read(tmp_path / "again.jsonl")) == [[i, i % 3] for i in range(11)]
        assert "not scored" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("refuses", "failures", "message"),
        [
            ({"x", "xx"}, 0.02, "'n' failed on [34] of .* candidates .*refused"),
            ({"x" * i for i in range(11)} | {"y", "yy"}, 1.0, "'n' failed on 16 of 16 candidates"),
        ],
    )
    def test_too_many_failures_stop_the_run(self, config, outside, monkeypatch, refuses, failures, message):
        monkeypatch.setattr(outside, "refuses", refuses | {"y"})
        with pytest.raises(UserError, match=message):
            score.run(config(failures=failures))

    def test_output_elsewhere(self, config):
        with pytest.raises(UserError, match="media paths are relative"):
            score.run(config("elsewhere/out.jsonl"))

    def test_sidecar_names_input_and_scorers(self, config, tmp_path):
        score.run(config())
        content = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
        assert content["records"]["file"] == "in.jsonl"
        assert content["scorers"] == {"n": {"name": "other_scorers:length", "params": {}}}
