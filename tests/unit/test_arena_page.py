"""The page of an arena: everyone is on it, nothing is markup that should be text, and its charts stand alone."""

import re
import xml.etree.ElementTree as ET

import pytest

from diffalign import charts
from diffalign.arena import page as arena_page
from diffalign.arena.results import ArenaResults, EntryResult, Failure, write
from diffalign.errors import UserError

HOSTILE = "</title><script>alert(1)</script> & co"


def score(value: float, half: float = 0.02, base: float = 0.4) -> dict:
    return {
        "policy": value,
        "interval": (value - half, value + half),
        "against": base,
        "against_interval": (base - half, base + half),
        "difference": value - base,
        "difference_interval": (value - base - half, value - base + half),
        "seeds": [value - 0.01, value + 0.01],
    }


def moment(step: int, correct: float, kl: float, **more: float) -> dict:
    return {
        "updates": step,
        "evaluations": 100_000 * step,
        "seconds": 90.0 * step,
        "scores": {name: score(value) for name, value in {"correct": correct, "graded": correct, **more}.items()},
        "kl": {"mean": kl, "seeds": [kl, kl]},
        "diversity": {"mean": 0.3, "seeds": [0.3, 0.3]},
    }


def finished(name: str, group: str, last: float, **more) -> dict:
    middle = 0.4 + 0.6 * (last - 0.4)
    return {
        "entry": {"name": name, "title": f"Method {name}", "group": group, "learning_rate": 3e-4,
                  "tuning": [{"learning_rate": 1e-4, "score": 0.41}, {"learning_rate": 3e-4, "score": 0.43}]},
        "seeds": [0, 1],
        "moments": [moment(1, middle, 0.1), moment(2, last, 0.4, guided=last + 0.1)],
        "peak": {"best_updates": 2, "best_kl": 0.4, "best_score": last},
        **more,
    }  # fmt: skip


def results(**changes) -> ArenaResults:
    fallen = {"best_updates": 1, "best_kl": 0.1, "best_score": 0.5, "updates": 2, "kl": 0.4,
              "change": -0.1, "change_interval": (-0.13, -0.07)}  # fmt: skip
    entries = [finished(f"off{n}", "offline", 0.38 + 0.01 * n) for n in range(10)]
    entries += [finished("on", "online", 0.6), finished("fell", "online", 0.455, peak=fallen)]
    entries += [{"entry": {"name": "broken", "title": HOSTILE}, "seeds": [],
                 "failures": [{"seed": 0, "reason": "<b>loss</b>"}, {"seed": 1, "reason": "<b>loss</b>"}]}]  # fmt: skip
    content = {
        "title": "Arena <i>one</i>",
        "main": "correct",
        "trained": "graded",
        "labels": {
            "correct": {"title": "held-out correct", "about": "share that is right"},
            "guided": {"title": "guided"},
            "graded": {"title": "graded"},
        },
        "n": 768,
        "prompts": 192,
        "seeds": [0, 1],
        "resamples": 10_000,
        "base": moment(0, 0.4, 0.0, guided=0.5),
        "entries": entries,
        "contrasts": [
            {"contrast": {"question": "Is on better?", "first": "on", "second": "off1"}, "seeds": [0, 1],
             "difference": score(0.6, base=0.39), "text": "Yes it is."},
            {"contrast": {"question": "And the <u>broken</u> one?", "first": "broken", "second": "on"},
             "text": "Cannot be answered."},
        ],
        "reaches": [
            {"target": {"question": "How fast?", "reference": "fell", "of": "fell", "asked": ["on"]}, "value": 0.45,
             "rows": [{"entry": "on", "evaluations": 50_000.0, "seeds": [40_000.0, None], "ratio": 4.0,
                       "ratio_interval": (3.0, None)},
                      {"entry": "fell", "evaluations": 200_000.0, "seeds": [190_000.0, 210_000.0]},
                      {"entry": "off1", "seeds": [None, None]}],
             "texts": ["Very fast."]},
        ],
        "tuning": "Three rates each.",
        "settings": {"sampler": {"steps": 20, "name": "euler"}, "budget": 1_200_000, "tasks": ["a", "b"]},
        "waiting": ["Another"],
        "trained_prompts": 1,
        "trained_samples": 2,
        "machine": "a machine",
        "command": "diffalign arena <config>",
    }  # fmt: skip
    return ArenaResults.model_validate(content | changes)


def text(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_everyone_is_on_the_page():
    html = arena_page.page(results())
    body = html[html.index("<h2>Results") : html.index("<h2>Over-optimisation")]
    for one in results().entries:
        if one.final:
            assert one.entry.title in body
    order = re.findall(r"Method (\w+)", body[: body.index("</table>")])
    assert order == ["on", *(f"off{n}" for n in (9, 8)), "fell", *(f"off{n}" for n in range(7, -1, -1))]
    assert "failed: &lt;b&gt;loss&lt;/b&gt; (seed 0, 1)" in " ".join(body.split())


def test_foreign_text_is_no_markup():
    html = arena_page.page(results())
    assert "<script" not in html
    assert "<i>one" not in html
    assert "<u>broken" not in html
    assert "&lt;/title&gt;&lt;script&gt;" in html
    assert "default-src 'none'" in html


def test_answers_numbers_and_settings_are_shown():
    shown = text(arena_page.page(results()))
    assert "Method on ends highest: held-out correct .40 → .60 (+.20, 95 % interval +.18 to +.22)." in shown
    assert "How fast? Very fast." in shown
    assert "Is on better? Yes it is." in shown
    assert "Method on 50 k 40 k, never 4.0 times as many (95 % interval 3.0 or more)" in shown
    assert "Method off1 never never, never –" in shown
    assert "sampler steps: 20; name: euler budget 1,200,000 tasks a, b" in shown
    assert "0.0001: .410, 0.0003: .430" in shown
    assert "Three rates each." in shown
    assert "diffalign arena &lt;config&gt;" in shown
    assert "768 samples of 192 prompts" in shown


def test_prompts_of_training_are_owned_up_to():
    assert "1 of them, 2 of" in text(arena_page.page(results()))
    assert "which none of them trained on" in text(arena_page.page(results(trained_prompts=0)))


def test_over_optimisation_is_told_apart():
    shown = text(arena_page.page(results()))
    assert "Method fell .50 1 0.1 2 0.4 −.10 −.13 to −.07" in shown
    assert "Not seen within this budget: Method on" in shown


def test_verdicts_are_marked():
    html = arena_page.page(results())
    assert '<p class="answer better">Yes it is.' in html
    assert '<p class="answer ">Cannot be answered.' in html


def test_charts_hold_few_lines_and_every_entry():
    for row in arena_page._rows(results()):
        assert all(len(one.traces) <= charts.MOST_LINES for one in row.panels)
        assert sum(len(one.traces) for one in row.panels) == 12
    assert [one.title for one in arena_page._rows(results())[0].panels] == [
        "held-out correct: offline (1 of 2)",
        "held-out correct: offline (2 of 2)",
        "held-out correct: online",
    ]


def test_the_divergence_is_drawn_by_its_square_root_and_marked():
    (row,) = [row for row in arena_page._rows(results()) if row.axis.key == "kl"]
    on, fell = row.panels[-1].traces
    (x0, _), (x1, _), (x2, _) = on.dots
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=0.01)  # .1 and .4
    assert (on.marks, fell.marks) == ({}, {"best": fell.dots[1], "onset": fell.dots[2]})


def test_files(tmp_path):
    write(tmp_path / "results.json", results())
    page = arena_page.write(tmp_path / "results.json")
    assert page == tmp_path / "arena.html"
    assert page.read_text(encoding="utf-8") == arena_page.page(results())
    files = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert "differences.svg" in files
    assert "held-out-correct-online-by-evaluations.svg" in files
    assert len(files) == 1 + 3 * 9
    for name in files:
        root = ET.parse(tmp_path / "charts" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}style") is not None


def test_nothing_finished():
    lost = EntryResult.model_validate(
        {"entry": {"name": "a", "title": "A"}, "seeds": [], "failures": [Failure(seed=0, reason="out of memory")]}
    )
    html = arena_page.page(results(entries=[lost], contrasts=[], reaches=[]))
    assert "A finished no run." in html
    assert "failed: out of memory (seed 0)" in " ".join(html.split())


def test_results_must_be_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        arena_page.write(tmp_path / "results.json")
