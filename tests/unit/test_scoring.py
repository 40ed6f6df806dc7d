"""Loading scorers and scoring streams of records, with fake scorers and the shapes judge."""

import math
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from PIL import Image

from diffalign import records, scoring
from diffalign.errors import UserError
from diffalign.records import Candidate, Message, Record
from diffalign.scoring import Failure, Sample, Score, load_scorer, score_records, scorer_names

from .fake_scorers import Brightness, Length, OutOfMemoryError, Picky, Returns, Seen, Together, labels, texts


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
        calls = {1: [1] * 6, 2: [2, 1, 2, 1], 3: [3, 3], 4: [3, 3], 6: [6], 100: [6]}
        assert [len(b) for b in scorer.batches] == calls[batch], "whole records, unless one alone is larger"

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
            yield from self.ROWS[:2]
            raise AssertionError("read ahead of the next batch")

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
            ([0.5], "returned float .*expected a Score"),
        ],
    )
    def test_scorers_that_misbehave(self, tmp_path, answer, message):
        with pytest.raises(UserError, match=message):
            list(score_records([texts("a", "t")], tmp_path, {"n": Returns(answer)}, 1))

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (Score(math.nan), "not-finite: value nan, units None"),
            (Score(1.0, (1.0, math.inf)), "not-finite: value 1.0, units (1.0, inf)"),
            (Score(1.0, ()), "not-finite: value 1.0, units ()"),
            (Failure("timeout", "after\n5 s"), "timeout: after 5 s"),
        ],
    )
    def test_failures_are_reasons_and_no_labels(self, tmp_path, answer, reason):
        (out,) = score_records([texts("a", "t")], tmp_path, {"n": Returns([answer]), "m": Length()}, 1)
        assert out.candidates[0].labels == {"m": 1.0}
        assert out.candidates[0].errors == {"n": reason}
        records.write(tmp_path / "out.jsonl", [out])
        assert list(records.read(tmp_path / "out.jsonl")) == [out]

    def test_one_bad_item_costs_no_other_its_score(self, tmp_path):
        (out,) = score_records([texts("a", "1", "bad", "333")], tmp_path, {"n": Picky()}, 8)
        assert [c.labels for c in out.candidates] == [{"n": 1.0}, {}, {"n": 3.0}]
        assert [c.errors for c in out.candidates] == [{}, {"n": "KeyError: 'bad'"}, {}]
        assert out.meta["scores"]["n"] == [{"seen": "1"}, {}, {"seen": "333"}]

    def test_out_of_memory_is_no_property_of_an_item(self, tmp_path):
        with pytest.raises(OutOfMemoryError):
            list(score_records([texts("a", "1", "2")], tmp_path, {"n": Picky(OutOfMemoryError())}, 8))

    def test_a_scorer_that_compares_sees_whole_records(self, tmp_path):
        scorer = Together()
        out = list(score_records(self.ROWS, tmp_path, {"n": scorer}, 2))
        assert scorer.batches == [["1", "22"], ["333"], ["4444", "", "666666"]]
        assert labels(out) == [[0, 1], [0], [1, 0, 2]]

    def test_what_is_there_is_kept_and_what_failed_is_scored_again(self, tmp_path):
        kept = Candidate(text="t", labels={"n": 7.0})
        failed = Candidate(text="tt", errors={"n": "timeout: after 5 s", "m": "input: x"})
        row = Record(id="a", prompt="", candidates=[kept, failed], meta={"scores": {"n": [{"by": "hand"}, {}]}})
        (out,) = score_records([row], tmp_path, {"n": Length()}, 1)
        assert [c.labels for c in out.candidates] == [{"n": 7.0}, {"n": 2.0}]
        assert [c.errors for c in out.candidates] == [{}, {"m": "input: x"}]
        assert out.meta["scores"]["n"] == [{"by": "hand"}, {}]

    def test_files_that_cannot_be_read_fail_alone(self, tmp_path):
        records.save_image(tmp_path / "a.png", np.full((4, 4, 3), 9, np.uint8))
        row = Record(id="i", prompt="", candidates=[Candidate(sample="x.png"), Candidate(sample="a.png")])
        (out,) = score_records([row], tmp_path, {"b": Brightness()}, 1)
        assert out.candidates[0].errors["b"].startswith("input: ")
        assert out.candidates[0].errors["b"].endswith("x.png: no such image")
        assert out.candidates[1].labels == {"b": 9.0}

    def test_clips_meshes_and_conditions_are_files(self, tmp_path):
        for name in ("a.mp4", "b.ply", "c.png"):
            (tmp_path / name).write_bytes(b"content")
        clips = Record(id="v", prompt="p", candidates=[Candidate(sample="a.mp4", condition="c.png")])
        meshes = Record(id="m", prompt="p", condition="c.png", candidates=[Candidate(sample="b.ply")])
        seen = Seen()
        list(score_records([clips, meshes], tmp_path, {"s": seen}, 8))
        clip, mesh = seen.samples
        assert (clip.kind, clip.video, clip.condition) == ("video", tmp_path / "a.mp4", tmp_path / "c.png")
        assert (mesh.kind, mesh.mesh, mesh.condition) == ("mesh", tmp_path / "b.ply", tmp_path / "c.png")

    def test_refusals(self, tmp_path):
        with pytest.raises(UserError, match="'b' reads image, but record 'a', candidate 0 is text"):
            list(score_records([texts("a", "t")], tmp_path, {"b": Brightness()}, 1))
        with pytest.raises(UserError, match="record 'e' has no candidates"):
            list(score_records([texts("e")], tmp_path, {"n": Length()}, 1))
        with pytest.raises(UserError, match=r"meta\.scores"):
            list(score_records([texts("a", "t", scores=3)], tmp_path, {"n": Length()}, 1))


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

    def test_an_image_it_cannot_read_fails_alone(self, tmp_path, images):
        records.save_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
        images[0].save(tmp_path / "b.png")
        pair = [Candidate(sample="a.png"), Candidate(sample="b.png")]
        row = Record(id="r7", prompt="p", candidates=pair, meta=RED_CIRCLE)
        (out,) = score_records([row], tmp_path, {"judge": load_scorer("shapes", metric="correct")}, 4)
        assert "reads 32x32 images, got 8x8" in out.candidates[0].errors["judge"]
        assert out.candidates[1].labels == {"judge": 1.0}
