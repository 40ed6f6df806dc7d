"""`diffalign label` without its page: what is asked, the file of answers, agreement, labels."""

import json
from collections import Counter

import pytest

from diffalign import build, label, records
from diffalign.config import BuildConfig, LabelConfig
from diffalign.errors import UserError
from diffalign.label import agreement, answers, merge, plan
from diffalign.label.answers import Answers, Conflict, Journal, Line
from diffalign.label.plan import Item
from diffalign.records import Candidate, Record

from . import label_kit as kit


def made(source, task="pair", **changes) -> plan.Plan:
    return plan.make(source, task, **{"seed": 0, "pairs": 3, "limit": None, "segment_seconds": 1.0, **changes})


def line(annotator, item, answer, shown=(0, 1), **more) -> Line:
    record = item.partition("#")[0]
    return Line(annotator=annotator, item=item, record=record, shown=list(shown), answer=answer, time="t", **more)


def config(tmp_path, **changes) -> LabelConfig:
    paths = {"records": str(tmp_path / "records.jsonl"), "out": str(tmp_path / "answers.jsonl")}
    return LabelConfig(**{**paths, "task": "pair", **changes})


class TestPlan:
    def test_items_of_every_task(self, tmp_path):
        source = kit.texts(tmp_path, (2, 1, 4))
        pairs = made(source, pairs=2).items
        assert len(pairs) == 3
        assert pairs["r0#0-1"].candidates == (0, 1)
        assert [len(item.candidates) for item in made(source, "rank").items.values()] == [2, 4]

    @pytest.mark.parametrize("k", range(2, 9))
    def test_pairs_meet_every_candidate_evenly(self, k):
        found = list(plan.spread_pairs(k, "seed"))
        assert sorted(found) == [(i, j) for i in range(k) for j in range(i + 1, k)]
        met = Counter(i for pair in found[: k // 2] for i in pair)
        assert max(met.values()) == 1, "the first pairs share no candidate"
        assert set(Counter(i for pair in found[:k] for i in pair)) == set(range(k))

    def test_seed_and_name_decide_order_and_sides(self, tmp_path):
        source = kit.texts(tmp_path, [2] * 200)
        job, again, other = made(source), made(source), made(source, seed=1)
        assert job.order("ann") == again.order("ann") != job.order("bob")
        assert job.order("ann") != other.order("ann")
        sides = [job.shown("ann", item)[0] for item in job.items.values()]
        assert sides == [again.shown("ann", item)[0] for item in again.items.values()]
        assert 70 < sum(sides) < 130, "half of the time the other one is on the left"

    def test_limit(self, tmp_path):
        assert list(made(kit.texts(tmp_path), limit=1).items) == ["r0#0-1"]

    @pytest.mark.parametrize(
        ("candidate", "problem"),
        [
            ({"sample": "gone.png"}, "no such file"),
            ({"sample": "../secret.png"}, "must be relative"),
            ({"sample": "shape.npz"}, "does not show 'shape.npz'"),
            ({"sample": "drawing.svg"}, "does not show 'drawing.svg'"),
        ],
    )
    def test_what_cannot_be_shown_is_refused(self, tmp_path, candidate, problem):
        rows = [Record(id="a", prompt="p", candidates=[Candidate(text="t"), Candidate(**candidate)])]
        with pytest.raises(UserError, match=f"record 'a', candidate 1: .*{problem}|{problem}"):
            made(kit.stored(tmp_path, rows))

    def test_links_out_of_the_folder_are_refused(self, tmp_path):
        (tmp_path / "data").mkdir()
        source = kit.pictures(tmp_path / "data", n=1)
        (tmp_path / "secret.png").write_bytes((tmp_path / "data/model-0-0.png").read_bytes())
        (tmp_path / "data/model-1-0.png").unlink()
        (tmp_path / "data/model-1-0.png").symlink_to(tmp_path / "secret.png")
        with pytest.raises(UserError, match="a link leads out of"):
            made(source)

    def test_nothing_to_compare(self, tmp_path):
        with pytest.raises(UserError, match="no record has two candidates"):
            made(kit.texts(tmp_path, (1, 1)))

    def test_segments_are_for_clips(self, tmp_path):
        with pytest.raises(UserError, match="compares clips"):
            made(kit.texts(tmp_path), "segments")

    @pytest.mark.parametrize(
        ("frames", "rate", "seconds", "count"),
        [
            (81, 16, 1, 5),
            (80, 16, 1, 5),
            (33, 16, 1, 2),
            (5, 16, 1, 1),
            (1, 16, 1, 1),
            (82, 16, 1, 6),
            (81, 16, 2.5, 2),
        ],
    )
    def test_segment_count(self, frames, rate, seconds, count):
        assert plan.segment_count(frames, rate, seconds) == count

    def test_segments_of_clips(self, tmp_path):
        job = made(kit.clips(tmp_path, n=1, seconds=3), "segments")
        assert job.items["r0#0-1"].segments == 3

    @pytest.mark.parametrize(
        ("task", "good", "bad"),
        [
            ("pair", [0, 1, "tie", "skip"], [2, -1, True, 0.0, "left", None, [0]]),
            ("best", [0, 2, "tie", "skip"], [3, "1", [1]]),
            (
                "rank",
                [[[2], [0, 1]], [[0, 1, 2]], "skip"],
                [[[0], [1]], [[0], [], [1], [2]], [[0, 0], [1], [2]], "tie"],
            ),
            ("segments", [[0, 1, "tie"], "skip"], [[0, 1], [0, 1, 2], [0, 1, None], "tie", 0]),
        ],
    )
    def test_answers_are_checked(self, task, good, bad):
        record = Record(id="r", prompt="p")
        item = Item("r", record, (0, 1) if task in ("pair", "segments") else (0, 1, 2), 3)
        assert [plan.check_answer(task, item, answer) for answer in good] == [None] * len(good)
        assert all(plan.check_answer(task, item, answer) for answer in bad)

    def test_places_and_candidates(self):
        shown = [4, 0, 2]
        for answer in (1, "tie", [[0, 2], [1]], [0, "tie", 2]):
            assert plan.as_places(plan.as_candidates(answer, shown), shown) in (answer, [[2, 0], [1]])
        assert plan.as_candidates([[0, 2], [1]], shown) == [[2, 4], [0]]


class TestJournal:
    def test_resumes_with_a_torn_line(self, tmp_path):
        path = tmp_path / "deep" / "answers.jsonl"
        with Journal(path) as journal:
            journal.put(line("ann", "r0#0-1", 0))
            journal.put(line("ann", "r1#0-1", "tie"))
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:30])
        assert len(answers.read(path)) == 2
        with Journal(path) as journal:
            assert path.read_bytes() == whole
            assert len(journal.answers) == 2
            journal.put(line("bob", "r0#0-1", 1))
        assert path.read_bytes().startswith(whole)
        assert answers.read(path).of("bob", "r0#0-1").answer == 1

    def test_undo_appends(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        with Journal(path) as journal:
            journal.put(line("ann", "a", 0))
            journal.put(line("ann", "b", 1))
            before = path.read_bytes()
            journal.put(line("ann", "b", None, retracted=True))
            assert path.read_bytes().startswith(before)
            assert journal.answers.last("ann").item == "a"
            journal.put(line("ann", "b", 0))
        found = answers.read(path)
        assert (found.of("ann", "b").answer, len(found)) == (0, 2)
        assert [json.loads(text).get("retracted", False) for text in path.read_text().splitlines()] == [0, 0, 1, 0]

    def test_the_same_answer_twice_is_one(self, tmp_path):
        with Journal(tmp_path / "answers.jsonl") as journal:
            journal.put(line("ann", "a", 0))
            journal.put(line("ann", "a", 0))
            with pytest.raises(Conflict, match="undo"):
                journal.put(line("ann", "a", 1))
            assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1

    def test_one_server_per_file(self, tmp_path):
        with Journal(tmp_path / "answers.jsonl"), pytest.raises(UserError, match="another `diffalign label`"):
            Journal(tmp_path / "answers.jsonl").__enter__()

    def test_half_a_line_is_taken_back(self, tmp_path, monkeypatch):
        path = tmp_path / "answers.jsonl"
        with Journal(path) as journal:
            journal.put(line("ann", "a", 0))
            whole, handle = path.read_bytes(), journal._handle

            class Full:
                truncate = handle.truncate

                def write(self, text):
                    return handle.write(text[:9])

            journal._handle = Full()  # type: ignore[assignment]
            with pytest.raises(OSError, match="No space left"):
                journal.put(line("ann", "b", 0))
            journal._handle = handle
            assert path.read_bytes() == whole
            assert journal.answers.of("ann", "b") is None

    @pytest.mark.parametrize(("text", "problem"), [("{}", "not an answer: annotator"), ("[1", "not valid JSON")])
    def test_foreign_lines_are_named(self, tmp_path, text, problem):
        (tmp_path / "answers.jsonl").write_text(f"{text}\n")
        with pytest.raises(UserError, match=rf"answers.jsonl:1: {problem}"):
            answers.read(tmp_path / "answers.jsonl")


class TestAgreement:
    def test_alpha_of_a_published_example(self):
        """Krippendorff (2011), section C: four observers, twelve units, missing data; nominal alpha .743."""
        observers = {
            "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
            "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
            "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
            "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
        }
        units = [{name: row[u] for name, row in observers.items() if row[u] is not None} for u in range(12)]
        assert agreement.alpha(units) == pytest.approx(0.743, abs=5e-4)

    def test_by_hand(self):
        """Two annotators, verdicts 00 01 11 11: coincidences o_00 = 2, o_11 = 4, o_01 = 1 twice, n = 8."""
        units = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]
        assert agreement.raw(units) == (0.75, 4)
        assert agreement.alpha(units) == pytest.approx(1 - (2 / 8) / (2 * 3 * 5 / (8 * 7)))
        assert agreement.pairwise(units) == [("a", "b", 0.75, 4)]

    def test_undefined(self):
        assert agreement.alpha([]) is None
        assert agreement.alpha([{"a": 1}]) is None
        assert agreement.alpha([{"a": 1, "b": 1}]) is None, "one verdict only: chance would agree as well"
        assert agreement.raw([{"a": 1}]) == (None, 0)

    def test_units_of_rankings_and_segments(self):
        given = {"ann": line("ann", "r", [[0, 1], [2]]), "bob": line("bob", "r", [[1], [0], [2]])}
        assert list(agreement.units("rank", given)) == [
            {"ann": "tie", "bob": 1},
            {"ann": 0, "bob": 0},
            {"ann": 1, "bob": 1},
        ]
        given = {
            "ann": line("ann", "r", [0, "tie"]),
            "bob": line("bob", "r", "skip"),
            "cy": line("cy", "r", [1, "tie"]),
        }
        assert list(agreement.units("segments", given)) == [{"ann": 0, "cy": 1}, {"ann": "tie", "cy": "tie"}]

    def test_disputes_and_habits(self):
        found = Answers()
        items = {name: Item(name, Record(id=name, prompt="p"), (0, 1)) for name in "abc"}
        for given in (
            line("ann", "a", 1, (1, 0), seconds=2.0),
            line("ann", "b", 1, (0, 1), seconds=4.0),
            line("ann", "c", "tie"),
            line("bob", "a", 0),
            line("bob", "b", 1),
            line("bob", "c", "skip"),
        ):
            found.take(given)
        assert [(d.item.id, d.share) for d in agreement.disputes("pair", items, found)] == [("a", 0.0)]
        ann, bob = agreement.habits("pair", items, found)
        assert ann == ("ann", 3, 0, pytest.approx(1 / 3), 0.5, 3.0)
        assert bob == ("bob", 2, 1, 0.0, 0.5, None)


class TestLabels:
    def item(self, k=2, pair=None):
        return Item("i", Record(id="r", prompt="p"), pair or tuple(range(k)))

    def test_pairs_are_win_shares(self):
        given = [(self.item(pair=(0, 1)), [0, 0, "tie"]), (self.item(pair=(1, 2)), [2])]
        assert merge.labels("pair", given) == pytest.approx({0: 2.5 / 3, 1: 0.5 / 4, 2: 1.0})

    def test_best_is_the_share_of_votes(self):
        found = merge.labels("best", [(self.item(4), [2, 2, 0, "tie"])])
        assert found == {0: 1.25 / 4, 1: 0.25 / 4, 2: 2.25 / 4, 3: 0.25 / 4}

    def test_ranks_are_normalised_means(self):
        found = merge.labels("rank", [(self.item(3), [[[2], [0], [1]], [[0, 2], [1]]])])
        assert found == {0: (0.5 + 0.75) / 2, 1: 0.0, 2: (1.0 + 0.75) / 2}

    def test_segments_are_majorities(self):
        votes = [[0, 1, "tie", 0, 0], [0, 1, 1, 1, "tie"], [1, 1, 1, "tie", "tie"]]
        found = merge.labels("segments", [(self.item(), votes)])
        assert found == {0: [1, 0, 0, 0.5, 0.5], 1: [0, 1, 1, 0.5, 0.5]}
        assert merge.labels("segments", [(self.item(), votes[:1])])[0] == [1, 0, 0.5, 1, 1]
        assert merge.labels("segments", [(self.item(), [[0], [1]])])[0] == [0.5], "no majority: a tie"


class TestVerb:
    def answered(self, tmp_path, *lines, counts=(2, 2, 3)):
        source = kit.texts(tmp_path, counts)
        job = made(source)
        label.claim(tmp_path / "answers.jsonl", label.identity(config(tmp_path)))
        with Journal(tmp_path / "answers.jsonl") as journal:
            for given in lines:
                journal.put(given)
        return job

    def test_merge_and_build(self, tmp_path, capsys):
        self.answered(
            tmp_path,
            line("ann", "r0#0-1", 1),
            line("bob", "r0#0-1", "tie", (1, 0)),
            line("ann", "r1#0-1", "skip"),
            line("ann", "r2#0-2", 2, (2, 0)),
        )
        before = (tmp_path / "answers.jsonl").read_bytes()
        out = label.run(config(tmp_path, merge=str(tmp_path / "labelled.jsonl")))
        rows = list(records.read(out))
        assert [[c.labels.get("human") for c in row.candidates] for row in rows] == [[0.25, 0.75], [0.0, None, 1.0]]
        assert rows[1].candidates[1].errors == {"human": "not compared"}
        said = capsys.readouterr().out
        assert "wrote 2 records with the label 'human'" in said
        assert "1 records left out without an answer; 1 candidates not compared" in said
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        final = build.run(BuildConfig(records=str(out), out=str(tmp_path / "train.jsonl"), reward={"human": 1.0}))
        assert {r.id: [c.labels["reward"] for c in r.candidates] for r in records.read(final)} == {
            "r0#1-0": [0.75, 0.25],
            "r2#1-0": [1.0, 0.0],
        }

    def test_segments_build(self, tmp_path):
        kit.clips(tmp_path, n=2, seconds=2)
        settings = config(tmp_path, task="segments")
        label.claim(tmp_path / "answers.jsonl", label.identity(settings))
        with Journal(tmp_path / "answers.jsonl") as journal:
            journal.put(line("ann", "r0#0-1", [1, "tie"]))
        out = label.run(settings.model_copy(update={"merge": str(tmp_path / "labelled.jsonl")}))
        assert [c.labels["human"] for c in next(records.read(out)).candidates] == [[0.0, 0.5], [1.0, 0.5]]
        reward = {"records": str(out), "out": str(tmp_path / "train.jsonl"), "reward": {"human": 1.0}}
        final = build.run(BuildConfig(**reward, rule="segments", page=False))
        assert [c.labels["reward"] for c in next(records.read(final)).candidates] == [[0.0, 0.0], [1.0, 0.0]]

    def test_dry_run_writes_nothing(self, tmp_path, capsys):
        kit.texts(tmp_path)
        label.run(config(tmp_path), dry_run=True)
        assert "would ask 5 questions (pair)" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]

    def test_dry_merge_writes_nothing(self, tmp_path, capsys):
        self.answered(tmp_path, line("ann", "r0#0-1", 1))
        label.run(config(tmp_path, merge=str(tmp_path / "labelled.jsonl")), dry_run=True)
        assert "would write 1 records" in capsys.readouterr().out
        assert not (tmp_path / "labelled.jsonl").exists()

    def test_nothing_to_merge(self, tmp_path):
        self.answered(tmp_path, line("ann", "r0#0-1", "skip"))
        with pytest.raises(UserError, match="no answers yet"):
            label.run(config(tmp_path, merge=str(tmp_path / "labelled.jsonl")))
        assert not (tmp_path / "labelled.jsonl").exists()

    def test_a_label_is_not_overwritten(self, tmp_path):
        made_ = [Candidate(text=t, labels={"human": 1.0}) for t in "ab"]
        kit.stored(tmp_path, [Record(id="r", prompt="p", candidates=made_)])
        label.claim(tmp_path / "answers.jsonl", label.identity(config(tmp_path)))
        with Journal(tmp_path / "answers.jsonl") as journal:
            journal.put(line("ann", "r#0-1", 1))
        with pytest.raises(UserError, match="has the label 'human' already"):
            label.run(config(tmp_path, merge=str(tmp_path / "labelled.jsonl")))
        label.run(config(tmp_path, merge=str(tmp_path / "labelled.jsonl"), label="second"))

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"seed": 1}, "made with different seed"),
            ({"task": "best"}, "made with different task"),
            ({"pairs": 1}, "made with different pairs"),
            ({"merge": "answers.jsonl"}, "holds the answers"),
            ({"out": "records.jsonl"}, "is the input itself"),
            ({"host": "0.0.0.0"}, "needs a `token:`"),
            ({"annotators": ["ann", "ann"]}, "is there twice"),
            ({"annotators": [" ann"]}, "is no name"),
            ({"annotators": ["ann"], "overlap": 2}, "only 1 annotators"),
        ],
    )
    def test_bad_settings(self, tmp_path, changes, problem):
        self.answered(tmp_path, line("ann", "r0#0-1", 1))
        changes = {k: str(tmp_path / v) if k in ("merge", "out") else v for k, v in changes.items()}
        with pytest.raises(UserError, match=problem):
            label.run(config(tmp_path, **changes), dry_run=True)

    def test_answers_that_do_not_fit_are_named(self, tmp_path):
        self.answered(tmp_path, line("ann", "r0#0-1", 0, (0, 2)))
        with pytest.raises(UserError, match="'ann' on 'r0#0-1': shown must be"):
            label.run(config(tmp_path), dry_run=True)

    def test_an_answer_out_of_range_is_named(self, tmp_path):
        self.answered(tmp_path, line("ann", "r0#0-1", 7))
        with pytest.raises(UserError, match="'ann' on 'r0#0-1': "):
            label.run(config(tmp_path), dry_run=True)
