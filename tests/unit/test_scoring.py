"""Loading scorers, scoring streams of records, and the resumable verb, with fake scorers and the shapes judge."""

import json
import math
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from diffalign import records, score, scoring
from diffalign.config import ScoreConfig
from diffalign.errors import UserError
from diffalign.records import Candidate, Message, Record
from diffalign.scoring import Sample, Score, load_scorer, score_records, scorer_names


@dataclass
class Length:
    """Scores a text by its length and remembers what it was asked."""

    scale: float = 1.0
    fail_after: float = math.inf
    accepts: frozenset[str] = frozenset({"text"})
    batches: list[list[str]] = field(default_factory=list)

    def __call__(self, samples):
        if len(self.batches) >= self.fail_after:
            raise RuntimeError("killed")
        self.batches.append([s.text for s in samples])
        return [Score(self.scale * len(s.text)) for s in samples]


@dataclass
class Returns:
    """Returns the same answer whatever it is asked."""

    answer: object
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples):
        return self.answer


@dataclass
class Brightness:
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples):
        return [Score(float(np.asarray(s.image).mean()), detail={"tag": s.meta["tag"]}) for s in samples]


def texts(name: str, *contents: str, **meta) -> Record:
    return Record(id=name, prompt=f"prompt {name}", candidates=[Candidate(text=c) for c in contents], meta=meta)


def labels(rows, label="n") -> list[list[float]]:
    return [[c.labels[label] for c in row.candidates] for row in rows]


@pytest.fixture
def outside(monkeypatch):
    """A module outside the project with build functions; returns the scorers it built."""
    module = ModuleType("other_scorers")
    built = []

    def length(scale: float = 1.0) -> Length:
        built.append(Length(scale, module.fail_after))
        return built[-1]

    def needy(path: str, *, size: int = 3):
        return Length()

    module.fail_after = math.inf
    module.built = built
    module.length, module.needy = length, needy
    module.anything = lambda **params: Length(**params)
    module.broken = lambda: 3
    monkeypatch.setitem(sys.modules, "other_scorers", module)
    return module


class TestLoad:
    def test_by_file_name(self):
        assert "shapes" in scorer_names()
        assert load_scorer("shapes", metric="strict").accepts == {"image"}

    def test_by_module_and_function(self, outside):
        assert load_scorer("other_scorers:length", scale=2.0)([Sample("", text="abc")]) == [Score(6.0)]
        assert load_scorer("other_scorers:anything", scale=3.0).scale == 3.0

    def test_by_entry_point(self, outside, monkeypatch):
        points = [
            EntryPoint("len", "other_scorers:length", scoring.GROUP),
            EntryPoint("shapes", "diffalign.scorers.shapes:build", scoring.GROUP),
        ]
        monkeypatch.setattr(scoring, "entry_points", lambda group: points)
        assert {"len", "shapes"} <= set(scorer_names())
        assert isinstance(load_scorer("len"), Length)

    def test_one_name_twice(self, monkeypatch):
        points = [EntryPoint("shapes", "other_scorers:length", scoring.GROUP)]
        monkeypatch.setattr(scoring, "entry_points", lambda group: points)
        with pytest.raises(UserError, match="'shapes' is both"):
            scorer_names()

    @pytest.mark.parametrize(
        ("name", "params", "message"),
        [
            ("shape", {}, "unknown scorer 'shape'; did you mean 'shapes'"),
            ("qqq", {}, "unknown scorer 'qqq'; valid: .*shapes"),
            ("no_such_module:build", {}, "no module 'no_such_module'"),
            ("other_scorers:nothing", {}, "has no function 'nothing'"),
            (":build", {}, "expected a scorer name or"),
            ("shapes", {"metrc": 1}, "unknown parameter 'metrc'; valid: metric"),
            ("shapes", {"metric": "best"}, "metric 'best': choose correct, strict, graded"),
            ("other_scorers:needy", {"size": 1}, "missing parameter 'path'; valid: path, size"),
            ("other_scorers:broken", {}, "returned int, which is not a Scorer"),
        ],
    )
    def test_refusals(self, outside, name, params, message):
        with pytest.raises(UserError, match=message) as caught:
            load_scorer(name, **params)
        assert "\n" not in str(caught.value)


class TestScoreRecords:
    ROWS = (texts("a", "1", "22"), texts("b", "333"), texts("c", "4444", "", "666666"))

    @pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 100])
    def test_batches_across_records(self, tmp_path, batch):
        scorer = Length()
        out = list(score_records(iter(self.ROWS), tmp_path, {"n": scorer}, batch))
        assert [r.id for r in out] == ["a", "b", "c"]
        assert labels(out) == [[1, 2], [3], [4, 0, 6]]
        assert [len(b) for b in scorer.batches] == [min(batch, 6 - i) for i in range(0, 6, batch)]

    def test_inputs_stay_as_they_are(self, tmp_path):
        before = [r.model_dump() for r in self.ROWS]
        out = list(score_records(self.ROWS, tmp_path, {"n": Length(), "m": Length(2.0)}, 4))
        assert [r.model_dump() for r in self.ROWS] == before
        assert labels(out, "m") == [[2, 4], [6], [8, 0, 12]]

    def test_other_labels_and_origin_are_kept(self, tmp_path):
        row = Record(id="a", prompt="", candidates=[Candidate(text="t", labels={"old": 5.0}, origin={"seed": 1})])
        (out,) = score_records([row], tmp_path, {"n": Length()}, 1)
        assert out.candidates[0].labels == {"old": 5.0, "n": 1.0}
        assert out.candidates[0].origin == {"seed": 1}

    def test_is_lazy(self, tmp_path):
        def endless():
            yield self.ROWS[0]
            raise AssertionError("read ahead of the batch")

        assert next(score_records(endless(), tmp_path, {"n": Length()}, 2)).id == "a"

    def test_images_meta_and_details(self, tmp_path):
        for value in (10, 20):
            records.save_image(tmp_path / "media" / f"{value}.png", np.full((4, 4, 3), value, np.uint8))
        candidates = [Candidate(sample=f"media/{value}.png") for value in (20, 10)]
        row = Record(id="a", prompt="p", candidates=candidates, meta={"tag": "colors", "scores": {"old": [{}, {}]}})
        (out,) = score_records([row], tmp_path, {"light": Brightness()}, 8)
        assert labels([out], "light") == [[20, 10]]
        assert out.meta == {"tag": "colors", "scores": {"old": [{}, {}], "light": [{"tag": "colors"}] * 2}}
        assert row.meta["scores"] == {"old": [{}, {}]}

    def test_units_become_a_list(self, tmp_path):
        (out,) = score_records([texts("a", "t")], tmp_path, {"n": Returns([Score(1.5, (1.0, 2.0))])}, 1)
        assert labels([out]) == [[[1.0, 2.0]]]
        assert out.meta == {}

    def test_conversations_become_text(self, tmp_path):
        asked = [Message(role="user", content="hi"), Message(role="user", content="there?")]
        answer = Candidate(text=[Message(role="assistant", content="yes")])
        scorer = Length()
        list(score_records([Record(id="a", prompt=asked, candidates=[answer])], tmp_path, {"n": scorer}, 1))
        assert scorer.batches == [["yes"]]

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([], "'n' returned 0 scores for 1 samples .*record 'a'"),
            ([Score(1.0)] * 2, "returned 2 scores for 1"),
            ([Score(math.nan)], "'n' returned value nan .*record 'a', candidate 0"),
            ([Score(1.0, (1.0, math.inf))], r"units \(1.0, inf\)"),
            ([Score(1.0, ())], r"units \(\)"),
            ([0.5], "returned float .*expected a Score"),
        ],
    )
    def test_scorers_that_misbehave(self, tmp_path, answer, message):
        with pytest.raises(UserError, match=message):
            list(score_records([texts("a", "t")], tmp_path, {"n": Returns(answer)}, 1))

    def test_labels_are_never_overwritten(self, tmp_path):
        row = Record(id="a", prompt="", candidates=[Candidate(text="t", labels={"n": 1.0})])
        with pytest.raises(UserError, match=r"record 'a', candidate 0: label 'n' is already there"):
            list(score_records([row], tmp_path, {"n": Length()}, 1))

    def test_refusals(self, tmp_path):
        image = Record(id="i", prompt="", candidates=[Candidate(sample="media/x.png")])
        with pytest.raises(UserError, match=r"record 'i': .*x\.png: no such image"):
            list(score_records([image], tmp_path, {"b": Brightness()}, 1))
        with pytest.raises(UserError, match="'b' reads image, but record 'a', candidate 0 is text"):
            list(score_records([texts("a", "t")], tmp_path, {"b": Brightness()}, 1))
        with pytest.raises(UserError, match="record 'e' has no candidates"):
            list(score_records([texts("e")], tmp_path, {"n": Length()}, 1))
        with pytest.raises(UserError, match=r"meta\.scores"):
            list(score_records([texts("a", "t", scores=3)], tmp_path, {"n": Length()}, 1))


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
        with pytest.raises(RuntimeError, match="killed"):
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

    def test_output_elsewhere(self, config):
        with pytest.raises(UserError, match="media paths are relative"):
            score.run(config("elsewhere/out.jsonl"))

    def test_sidecar_names_input_and_scorers(self, config, tmp_path):
        score.run(config())
        content = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
        assert content["records"]["file"] == "in.jsonl"
        assert content["scorers"] == {"n": {"name": "other_scorers:length", "params": {}}}


RED_CIRCLE = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
BLUE_CIRCLE = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "blue"}]}


@pytest.fixture(scope="module")
def images():
    """A red and a blue circle."""
    import torch

    from diffalign.worlds.shapes.render import render_prompts

    pixels = render_prompts([RED_CIRCLE, BLUE_CIRCLE], torch.Generator().manual_seed(0))
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


class TestShapes:
    def test_right_and_wrong(self, images):
        samples = [Sample("a red circle", image, meta=RED_CIRCLE) for image in images]
        right, wrong = load_scorer("shapes", metric="correct")(samples)
        assert right == Score(1.0)
        assert wrong.value == 0.0
        assert "red circle" in wrong.detail["reason"]
        good, bad = load_scorer("shapes")(samples)
        assert good.value > 0.9 > bad.value > 0.0

    @pytest.mark.parametrize(
        ("meta", "message"),
        [
            ({}, "has no GenEval `include`"),
            ({"include": []}, "has no GenEval `include`"),
            ({"include": [{"class": "dog", "count": 1}]}, "`class` must be one of circle"),
            ({"include": [{"class": "ring"}]}, "`count` must be"),
            ({"include": [{"class": "ring", "count": 1, "color": "pink"}]}, "`color` must be"),
            ({"include": [{"class": "ring", "count": 1, "position": ["above", 0]}]}, "`position` must be"),
            ({"include": [{"class": "ring", "count": 1}] * 3}, "one clause, or two"),
            ({"include": ["ring"]}, "`class` must be"),
        ],
    )
    def test_metadata_it_cannot_read(self, images, meta, message):
        with pytest.raises(UserError, match=message):
            load_scorer("shapes")([Sample("p", images[0], meta=meta)])

    def test_size(self):
        with pytest.raises(UserError, match="reads 32x32 images, got 64x32"):
            load_scorer("shapes")([Sample("p", Image.new("RGB", (64, 32)), meta=RED_CIRCLE)])

    def test_errors_name_records(self, tmp_path):
        records.save_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
        row = Record(id="r7", prompt="p", candidates=[Candidate(sample="a.png")], meta=RED_CIRCLE)
        with pytest.raises(UserError, match=r"scorer 'judge', record 'r7', candidate 0 .*32x32"):
            list(score_records([row], tmp_path, {"judge": load_scorer("shapes")}, 4))
