"""The report: what it shows, what it refuses, and that it needs nothing beside itself."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffalign import charts, pages, records, report
from diffalign.config import ReportConfig
from diffalign.errors import UserError
from diffalign.records import Record

from . import report_folder as folder


def page(root: Path, **settings) -> str:
    return report.run(ReportConfig(dir=str(root), **settings)).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element of a page, and the text outside of elements."""

    VOID = frozenset({"meta", "img", "line", "circle", "path", "rect"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for found, attributes in self.found if found == tag and name in attributes]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return folder.build(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def elements(full) -> Elements:
    return Elements(page(full))


class TestPage:
    def test_says_everything(self, elements):
        words = elements.words()
        for expected in (
            "Unguided held-out score .40 → .51 (+.11, 95 % interval +.08 to +.14, n = 384)",
            "Guided held-out score .62 → .63 (+.01, 95 % interval −.02 to +.04, n = 384): no significant change",
            "is measured on training prompts",
            "Held-out prompts; single_object has no held-out prompts. Judge: shapes (correct)",
            "Not hand-picked: the first prompts of every task in file order",
            "24 prompts 96 candidates",
            "ln 2: no preference",
            "5 min 56 s in all",
            "diffalign quickstart seed=0",
            "guided: {candidates: 1}",
            "torch 2.13.0",
            "gpu none",
        ):
            assert expected in words

    def test_evaluations_follow_the_config(self, elements):
        assert elements.words().index("Unguided held-out") < elements.words().index("Guided held-out")

    def test_needs_nothing_beside_itself(self, full, elements):
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in elements.found}
        assert elements.attributes("img", "src")
        assert all(source.startswith("data:image/png;base64,") for source in elements.attributes("img", "src"))
        assert not re.search(r"https?:|url\(|@import|\bhref=", (full / "report.html").read_text(encoding="utf-8"))

    def test_elements_are_balanced(self, elements):
        assert elements.stack == []

    def test_pictures_are_the_files(self, full, elements):
        data = elements.attributes("img", "src")[0].partition(",")[2]
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        original = Image.open(full / "eval" / "unguided" / "against" / "media" / "single_object-0.png")
        assert shown.tobytes() == original.tobytes()

    def test_title(self, full):
        assert "<title>Quickstart</title>" in page(full)
        assert "<title>mine</title>" in page(full, title="mine")

    def test_dry_run_writes_nothing(self, tmp_path, capsys):
        folder.add_job(tmp_path)
        report.run(ReportConfig(dir=str(tmp_path)), dry_run=True)
        assert not (tmp_path / "report.html").exists()
        assert "would write" in capsys.readouterr().out

    def test_large_images_are_thumbnails(self, tmp_path):
        folder.add_evaluation(tmp_path, per_task=1, side=512)
        sources = Elements(page(tmp_path)).attributes("img", "src")
        assert len(sources) == 6
        assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 20_000 for source in sources)


class TestGallery:
    def test_shows_the_first_prompts_in_file_order(self, full):
        shown = report.gallery(full / "eval" / "unguided", "correct", per_task=3)
        assert list(shown) == list(folder.TASKS)
        assert [pair.prompt for pair in shown["counting"]] == [f"{folder.PROMPTS[2]} {index}" for index in range(3)]

    def test_marks_follow_the_judge(self, full):
        root = full / "eval" / "unguided"
        labels = {r.id: r.candidates[0].labels["correct"] for r in records.read(root / "policy" / "scored.jsonl")}
        for task, pairs in report.gallery(root, "correct", per_task=8).items():
            expected = ["right" if labels[f"{task}-{index}"] else "wrong" for index in range(8)]
            assert [pair.after.verdict for pair in pairs] == expected

    def test_a_graded_label_is_shown_as_a_number(self, tmp_path):
        sample = folder.candidate(tmp_path / "policy", "a", 0, graded=0.25)
        records.write(tmp_path / "policy" / "scored.jsonl", [Record(id="a", prompt="p", candidates=[sample])])
        (pair,) = report.gallery(tmp_path, "graded", per_task=3)["all"]
        assert (pair.after.verdict, pair.after.score, pair.before) == ("", ".25", None)

    def test_a_repeated_prompt_is_shown_once(self, tmp_path):
        rows = [
            Record(id=str(i), prompt=f"p{i % 2}", candidates=[folder.candidate(tmp_path / "policy", str(i), i)])
            for i in range(4)
        ]
        records.write(tmp_path / "policy" / "scored.jsonl", rows)
        assert [pair.prompt for pair in report.gallery(tmp_path, "correct", per_task=3)["all"]] == ["p0", "p1"]

    def test_a_page_has_a_bounded_number_of_pictures(self, tmp_path):
        for index in range(6):
            folder.add_evaluation(tmp_path, folder.results(name=f"e{index}"))
        sources = Elements(page(tmp_path)).attributes("img", "src")
        assert 0 < len(sources) <= report.MAX_PICTURES


class TestEscaping:
    ATTACK = "<script>alert(1)</script> \"><img src='https://example.org/x.png' onerror=alert(1)>"

    def test_foreign_text_stays_text(self, tmp_path):
        for role in ("policy", "against"):
            sample = folder.candidate(tmp_path / "eval" / "unguided" / role, "a", 0, correct=1.0)
            row = Record(id="a", prompt=self.ATTACK, candidates=[sample], meta={"tag": self.ATTACK})
            records.write(tmp_path / "eval" / "unguided" / role / "scored.jsonl", [row])
        content = folder.results(note=self.ATTACK, judge=self.ATTACK, metric="correct")
        content["tasks"] = {self.ATTACK: content["tasks"]["counting"]}
        folder.write_json(tmp_path / "eval" / "unguided" / "results.json", content)
        folder.write_json(tmp_path / "job.json", {"command": self.ATTACK, "versions": {self.ATTACK: self.ATTACK}})
        (tmp_path / "config.yaml").write_text(f"a: '{self.ATTACK.replace(chr(39), '')}'\n")
        found = Elements(page(tmp_path, title=self.ATTACK))
        assert "script" not in {tag for tag, _ in found.found}
        assert not any("onerror" in attributes for _, attributes in found.found)
        assert all(source.startswith("data:") for source in found.attributes("img", "src"))
        assert found.text.count(self.ATTACK) >= 6


class TestMissingParts:
    @pytest.mark.parametrize(
        ("part", "section"),
        [
            (folder.add_job, "Time"),
            (folder.add_pool, "Training set"),
            (folder.add_training, "Training"),
            (folder.add_evaluation, "Results"),
        ],
    )
    def test_shows_what_is_there(self, tmp_path, part, section):
        part(tmp_path)
        shown = re.findall(r"<h2>(.*)</h2>", page(tmp_path))
        optional = {"Results", "Images", "Training", "Training set", "Time"}
        assert section in shown
        assert set(shown) & optional <= {section, "Images"}

    def test_evaluation_without_baseline(self, tmp_path):
        folder.add_evaluation(tmp_path, folder.unpaired(folder.results()))
        found = Elements(page(tmp_path))
        assert "before" not in found.words()
        assert len(found.attributes("img", "src")) == 3 * report.MAX_PER_TASK

    @pytest.mark.parametrize("name", ["records.jsonl", "scored.jsonl", "train.jsonl"])
    def test_pool_without_one_of_its_files(self, tmp_path, name):
        (folder.add_pool(tmp_path) / name).unlink()
        assert "Training set" in page(tmp_path)

    def test_nothing_at_all(self, tmp_path):
        with pytest.raises(UserError, match=r"nothing to report.*job\.json"):
            page(tmp_path)
        with pytest.raises(UserError, match="no such folder"):
            page(tmp_path / "absent")


class TestCorruptFiles:
    def test_metrics_line(self, tmp_path):
        path = folder.add_training(tmp_path, steps=3) / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: Invalid JSON"):
            page(tmp_path)

    def test_metrics_value(self, tmp_path):
        path = folder.add_training(tmp_path, steps=1) / "metrics.jsonl"
        path.write_text('{"step": 0, "loss": "low"}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: loss: .*valid number"):
            page(tmp_path)

    @pytest.mark.parametrize("name", ["job.json", "eval/unguided/results.json"])
    def test_json(self, full, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{\n"name": tru}')
        with pytest.raises(UserError, match=rf"{path.name}: Invalid JSON.*line 2"):
            page(tmp_path)

    def test_results_without_a_key(self, tmp_path):
        content = folder.results()
        del content["overall"]["policy"]
        folder.write_json(tmp_path / "eval" / "a" / "results.json", content)
        with pytest.raises(UserError, match=r"results\.json: overall\.policy: Field required"):
            page(tmp_path)

    def test_config(self, tmp_path):
        (tmp_path / "config.yaml").write_text("a: 1\nb: [\n")
        with pytest.raises(UserError, match=r"config\.yaml: not valid YAML.*line 3"):
            page(tmp_path)

    def test_records(self, tmp_path):
        with (folder.add_pool(tmp_path) / "scored.jsonl").open("a") as handle:
            handle.write("{}\n")
        with pytest.raises(UserError, match=r"scored\.jsonl:25: id"):
            page(tmp_path)

    def test_missing_picture(self, tmp_path):
        (folder.add_evaluation(tmp_path) / "policy" / "media" / "counting-0.png").unlink()
        with pytest.raises(UserError, match=r"counting-0\.png: no such image"):
            page(tmp_path)

    def test_a_failed_report_leaves_the_last_one(self, tmp_path):
        path = folder.add_job(tmp_path)
        before = page(tmp_path)
        path.write_text("{")
        with pytest.raises(UserError):
            page(tmp_path)
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


class TestCurves:
    def steps(self, **columns) -> list[report.Step]:
        names = {"accuracy": "reward/accuracy", "chosen": "drift/chosen", "rejected": "drift/rejected"}
        rows = zip(*columns.values(), strict=True)
        return [
            report.Step.model_validate({"step": i, **{names.get(n, n): v for n, v in zip(columns, row, strict=True)}})
            for i, row in enumerate(rows)
        ]

    def test_only_the_columns_that_are_there(self):
        (only,) = report.curves(self.steps(grad_norm=[1.0, 2.0]))
        assert only.title == "gradient norm"

    def test_ln2_line_only_if_the_loss_starts_there(self):
        (dpo,) = report.curves(self.steps(loss=[math.log(2), 0.6]))
        (other,) = report.curves(self.steps(loss=[1.0, 0.6]))
        assert dpo.guide is not None
        assert other.guide is None

    def test_not_finite_values_break_the_line(self):
        (loss,) = report.curves(self.steps(loss=[1.0, 2.0, math.nan, 1.0, math.inf]))
        assert loss.lines[0].raw.count("M") == 2
        assert "nan" not in json.dumps(loss)

    def test_a_column_of_nothing_finite_is_left_out(self):
        assert report.curves(self.steps(loss=[math.nan, math.inf])) == []

    def test_one_step(self):
        (loss,) = report.curves(self.steps(loss=[math.log(2)]))
        assert loss.lines[0].raw.startswith(f"M{charts.LEFT:.1f} ")

    def test_winner_and_loser_share_a_chart(self):
        (drift,) = report.curves(self.steps(chosen=[0.0, -1.0], rejected=[0.0, 2.0]))
        winner, loser = drift.lines
        assert (winner.name, loser.name) == ("winner", "loser")
        assert float(winner.raw.split()[-1]) > float(loser.raw.split()[-1])  # y points down in SVG


class TestDistributions:
    def test_values_and_ties(self, tmp_path):
        rows = [
            Record(
                id="a", prompt="", candidates=[records.Candidate(text="", labels={"s": v}) for v in (0.0, 0.0, 1.0)]
            ),
            Record(id="b", prompt="", candidates=[records.Candidate(text="", labels={"s": [0.0, 2.0]})]),
        ]
        (found,) = report.distributions(rows)
        assert found.label == "s"
        assert found.shape.mean == pytest.approx(0.5)
        assert found.ties == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.99, "1 min 0 s"), (204.2, "3 min 24 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert pages.duration(seconds) == text


def test_reward_hacking(tmp_path):
    def measured(value):
        return {"policy": value, "interval": (value, value), "difference": value, "difference_interval": (value, value)}

    points = [
        {"step": step, "values": {"held": measured(held), "trained": measured(step / 10), "diversity": measured(0.5)}}
        for step, held in ((0, 0.0), (10, 1.0), (20, 0.5))
    ]
    trajectory = {"name": "curve", "trained": "trained", "held_out": ["held"], "points": points, "best": 10, "stop": 20}
    (tmp_path / "eval/curve").mkdir(parents=True)
    (tmp_path / "eval/curve/trajectory.json").write_text(json.dumps(trajectory))
    report.run(ReportConfig(dir=str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    titles = [page.index(title) for title in ("trained (trained on)", "held (held out)", "diversity (description)")]
    assert titles == sorted(titles)
    assert "Curve: stop at step 10: by step 20 trained has risen further" in page
