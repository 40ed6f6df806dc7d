"""An arena's statistics on runs with a known truth: means, paired differences, the way to a score, failures."""

import math
import re

import numpy as np
import pytest

from diffalign import comparison
from diffalign.arena.answers import crossing
from diffalign.arena.results import BASE, Contrast, Entry, Label, Target, headline, read, write
from diffalign.arena.scores import Cell, Snapshot
from diffalign.arena.summary import summarise
from diffalign.comparison import bootstrap, interval, over_seeds
from diffalign.errors import UserError

PROMPTS = 40
DIFFICULTY = np.random.default_rng(0).standard_normal(PROMPTS)
LABELS = {"correct": Label(title="held-out correct"), "graded": Label(title="graded"), "guided": Label(title="guided")}


def outcomes(mean: float, noise: float = 0.0, seed: int = 0):
    """Exactly this mean over two tasks; prompts differ in difficulty alike for all, and by noise of their own."""
    own = noise * np.random.default_rng(seed).standard_normal(PROMPTS)
    values = mean + 0.1 * (DIFFICULTY - DIFFICULTY.mean()) + own - own.mean()
    half = PROMPTS // 2
    values[:half] -= values[:half].mean() - mean
    values[half:] -= values[half:].mean() - mean
    return {
        "one": {f"p{i}": [float(v)] for i, v in enumerate(values[:half])},
        "two": {f"p{i}": [float(v)] for i, v in enumerate(values[half:])},
    }


def snapshot(step: int, correct: float, graded: float = 0.5, guided: float | None = None, noise: float = 0.0, seed=0):
    scores = {"correct": outcomes(correct, noise, seed), "graded": outcomes(graded)}
    if guided is not None:
        scores["guided"] = outcomes(guided)
    return Snapshot(step, 100 * step, 1.0 * step, scores, 0.01 * step, 0.3)


def run(entry: str, curve, seed: int = 0, graded=None, guided: float = 0.6, noise: float = 0.0):
    snapshots = []
    for n, (value, trained) in enumerate(zip(curve, graded or curve, strict=True), 1):
        last = guided if n == len(curve) else None
        snapshots.append(snapshot(n, value, trained, last, noise, seed=100 * sum(map(ord, entry)) + n))
    return Cell(entry, seed, snapshots)


ORIGIN = snapshot(0, 0.4, 0.4, guided=0.55)


def arena(cells, **asked):
    names = dict.fromkeys([cell.entry for cell in cells])
    entries = asked.pop("entries", [Entry(name=name, title=name.upper()) for name in names])
    return summarise("title", ORIGIN, entries, cells, labels=LABELS, **asked)


class TestSeeds:
    def test_one_seed_is_its_own_mean(self):
        draws = bootstrap(outcomes(0.5))["overall"]
        assert np.array_equal(over_seeds(draws), draws[0])

    def test_the_variance_over_seeds_is_that_of_the_mean(self):
        """Of constants per seed prompts add nothing: what is left is the variance of the seeds over their number."""
        values = np.array([0.1, 0.5, 0.6])
        drawn = over_seeds(np.repeat(values[:, None], 10_000, axis=1))
        assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
        assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.05)

    def test_methods_that_share_seeds_stay_paired(self):
        values = np.repeat(np.array([[0.1], [0.5], [0.6]]), 10_000, axis=1)
        assert over_seeds(values + 0.2) - over_seeds(values) == pytest.approx(0.2)

    def test_models_are_drawn_together_as_apart(self):
        one, two = outcomes(0.5, 0.1, 1), outcomes(0.6, 0.1, 2)
        together = bootstrap(one, two)["overall"]
        assert together[0] == pytest.approx(bootstrap(one)["overall"][0], abs=1e-12)
        assert together[1] == pytest.approx(bootstrap(two)["overall"][0], abs=1e-12)

    def test_intervals_cover_the_truth(self, monkeypatch):
        """Differences of three seeds to a base, prompts, seeds and their interaction all random.

        .95 less three standard errors of 200 simulations at least; no upper limit, since the interaction counts twice.
        """
        monkeypatch.setattr(comparison, "RESAMPLES", 500)
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(200):
            prompt, base = rng.standard_normal((2, 60))
            runs = [0.3 + prompt + 0.1 * rng.standard_normal() + rng.standard_normal(60) for _ in range(3)]
            models = [{"t": {str(i): [v] for i, v in enumerate(one)}} for one in (prompt + base, *runs)]
            draws = bootstrap(*models)["overall"]
            low, high = interval(over_seeds(draws[1:]) - over_seeds(draws[:1]))
            hits += low <= 0.3 <= high
        assert hits >= 180


class TestValues:
    def test_means_and_differences(self):
        found = arena([run("a", [0.5, 0.6], seed=s) for s in range(3)] + [run("b", [0.4, 0.5], seed=7)])
        first, second = found.entries
        final = first.final.scores["correct"]
        assert final.policy == pytest.approx(0.6)
        assert final.seeds == pytest.approx([0.6] * 3)
        assert final.difference == pytest.approx(0.2)
        assert final.difference_interval == pytest.approx((0.2, 0.2))
        assert final.interval[0] < 0.6 < final.interval[1]
        assert set(first.moments[0].scores) == {"correct", "graded"}
        assert first.final.scores["guided"].difference == pytest.approx(0.05)
        assert (first.final.updates, first.final.evaluations, first.final.seconds) == (2, 200, 2)
        assert (first.seeds, second.seeds, found.seeds) == ([0, 1, 2], [7], [0, 1, 2, 7])
        assert (found.n, found.prompts, found.failed) == (PROMPTS, PROMPTS, 0)
        assert [one.entry.name for one in found.ranked()] == ["a", "b"]
        assert (first.to_best, second.to_best.difference) == (None, pytest.approx(-0.1))

    def test_a_sample_that_could_not_be_judged_is_left_out_of_everyone(self):
        cell = run("a", [0.5])
        cell.snapshots[0].outcomes["correct"]["one"]["p3"][0] = math.nan
        found = arena([cell])
        assert (found.failed, found.n) == (1, PROMPTS - 1)

    def test_headline(self):
        cells = [run("a", [0.6]), run("b", [0.601], noise=0.3), run("c", [0.3]), Cell("d", 0, [], "out of memory")]
        sentences = headline(arena(cells))
        assert sentences[0] == "B ends highest: held-out correct .40 → .60 (+.20, 95 % interval +.11 to +.29)."
        assert sentences[1:] == [
            "Not significantly below: A.",
            "2 of 3 methods end significantly above the base, 1 significantly below it.",
            "D finished no run.",
        ]

    def test_round_trip(self, tmp_path):
        found = arena(
            [run("a", [0.45, 0.6]), run("b", [0.41, 0.42]), Cell("c", 0, [], "why")],
            entries=[Entry(name=n, title=n, tuning=[{"learning_rate": 1e-3}]) for n in "abc"],
            contrasts=[Contrast(question="?", first="a", second="c")],
            targets=[Target(question="?", of="a", reference="a", asked=["b"])],
            settings={"steps": 20},
        )
        write(tmp_path / "results.json", found)
        assert read(tmp_path / "results.json") == found

    def test_reading_is_strict(self, tmp_path):
        path = tmp_path / "results.json"
        with pytest.raises(UserError, match="no such file"):
            read(path)
        path.write_text('{"title": "x", "surprise": 1}')
        with pytest.raises(UserError, match=r"results\.json: main: Field required"):
            read(path)


class TestFailures:
    def test_a_failed_seed_is_named_and_the_others_count(self):
        found = arena([run("a", [0.5], seed=0), run("a", [0.7], seed=1), Cell("a", 2, [], "loss is not a number")])
        (one,) = found.entries
        assert one.final.scores["correct"].policy == pytest.approx(0.6)
        assert [(failure.seed, failure.reason) for failure in one.failures] == [(2, "loss is not a number")]

    @pytest.mark.parametrize(
        ("cell", "reason"),
        [
            (Cell("a", 0, [], "diverged"), "diverged"),
            (Cell("a", 0, []), "no snapshot"),
            (Cell("a", 0, [snapshot(1, 0.5)]), "the last snapshot lacks guided"),
            (Cell("a", 0, [snapshot(1, 0.5, guided=0.5)._replace(kl=math.inf)]), "divergence .* after 1 updates"),
            (Cell("a", 0, [snapshot(1, math.nan, guided=0.5)]), r"no sample could be judged \(correct\)"),
        ],
    )
    def test_an_entry_without_a_finished_run_stays(self, cell, reason):
        found = arena([cell, run("b", [0.5])])
        broken, sound = found.entries
        assert (broken.final, broken.seeds) == (None, [])
        assert re.match(reason, broken.failures[0].reason)
        assert sound.final.scores["correct"].policy == pytest.approx(0.5)
        assert found.ranked()[-1] is broken

    def test_an_entry_that_was_never_run(self):
        found = arena([run("a", [0.5])], entries=[Entry(name=n, title=n) for n in "ab"])
        assert found.entries[1].failures[0].reason == "never run"

    def test_nothing_finished(self):
        found = arena([Cell("a", 0, [], "why")])
        assert headline(found) == ["A finished no run."]

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"contrasts": [Contrast(question="?", first="z")]}, "no entry 'z'"),
            ({"targets": [Target(question="?", reference="z")]}, "no entry 'z'"),
            ({"main": "beauty"}, "label 'beauty'"),
            ({"entries": [Entry(name="a", title="A")] * 2}, "names must differ"),
        ],
    )
    def test_unknown_names(self, asked, message):
        with pytest.raises(UserError, match=message):
            arena([run("a", [0.5])], **asked)

    def test_seeds_measured_at_other_moments(self):
        with pytest.raises(UserError, match="a: its seeds were measured after different numbers of updates"):
            arena([run("a", [0.5], seed=0), run("a", [0.5, 0.6], seed=1)])

    def test_a_run_twice(self):
        with pytest.raises(UserError, match="two runs of one seed"):
            arena([run("a", [0.5]), run("a", [0.5])])


class TestContrasts:
    def ask(self, cells, **contrast):
        return arena(cells, contrasts=[Contrast(question="Is A better?", **contrast)]).contrasts[0]

    def test_a_difference_that_pairs_reveal(self):
        """Far smaller than the spread of prompts, the same on every one of them."""
        found = self.ask([run("a", [0.51]), run("b", [0.50])], first="a", second="b")
        assert found.difference.difference_interval == pytest.approx((0.01, 0.01))
        assert found.verdict == "better"
        assert found.text == (
            "A ends above B: held-out correct .51 against .50 "
            "(+.01, 95 % interval +.01 to +.01; one seed, so the interval covers prompts alone)."
        )

    def test_worse(self):
        found = self.ask([run("a", [0.45]), run("b", [0.50])], first="a", second="b")
        assert (found.verdict, found.text.startswith("A ends below B")) == ("worse", True)

    def test_a_difference_within_the_noise(self):
        found = self.ask([run("a", [0.51], noise=0.3), run("b", [0.50], noise=0.3)], first="a", second="b")
        low, high = found.difference.difference_interval
        assert low < 0 < high
        assert found.text.startswith("No significant difference between A and B: held-out correct .51 against .50")

    def test_seeds_that_disagree_are_no_difference(self):
        """Every prompt agrees within a seed: prompts alone would call it certain."""
        cells = [run("a", [value], seed=s) for s, value in enumerate((0.4, 0.7, 0.5))]
        cells += [run("b", [value], seed=s) for s, value in enumerate((0.5, 0.5, 0.5))]
        assert self.ask(cells, first="a", second="b").verdict == "unclear"

    def test_seeds_that_both_finished_are_compared(self):
        cells = [run("a", [0.5], seed=0), run("a", [0.9], seed=1), run("b", [0.4], seed=0), Cell("b", 1, [], "why")]
        found = self.ask(cells, first="a", second="b")
        assert (found.seeds, found.difference.difference) == ([0], pytest.approx(0.1))

    def test_against_the_base_on_another_label(self):
        found = self.ask([run("a", [0.6])], first="a", second=BASE, label="correct", second_label="guided")
        assert found.text.startswith("A (held-out correct) ends above the base (guided): score .60 against .55 (+.05,")

    def test_what_failed_is_not_answered(self):
        found = self.ask([run("a", [0.6]), Cell("b", 0, [], "why")], first="a", second="b")
        assert (found.verdict, found.text) == ("", "Cannot be answered: B finished no run.")
        found = self.ask([run("a", [0.6], seed=0), run("b", [0.6], seed=1)], first="a", second="b")
        assert found.text == "Cannot be answered: A and B share no seed."


class TestReach:
    def test_crossing(self):
        curve = np.array([[0.0, 0.0, 0.5], [0.4, 0.1, 0.0], [0.6, 0.3, 0.9]])
        assert crossing(np.array([0.0, 10.0, 20.0]), curve, 0.5).tolist() == pytest.approx([15.0, math.inf, 0.0])
        assert crossing(np.array([0.0, 10.0]), np.array([[0.0], [0.4]]), np.array([0.4])).tolist() == [10.0]

    def ask(self, cells, **target):
        return arena(cells, targets=[Target(question="When?", **target)]).reaches[0]

    def test_straight_between_snapshots(self):
        """From .4: A is at .5 after 100 evaluations; B, .5 at the end, takes 400."""
        cells = [run("a", [0.5, 0.6, 0.6, 0.6]), run("b", [0.425, 0.45, 0.475, 0.5])]
        found = self.ask(cells, of="b", reference="b", asked=["a"])
        quick, slow = found.rows
        assert (quick.evaluations, slow.evaluations) == (pytest.approx(100), pytest.approx(400))
        assert (quick.ratio, slow.ratio) == (pytest.approx(4), None)
        assert quick.ratio_interval == pytest.approx((4, 4))
        assert found.texts == [
            "The score to reach is .50, the final held-out correct of B.",
            "A reaches it after 100 network evaluations, B after 400: 4.0 times as many (95 % interval 4.0 to 4.0).",
        ]

    def test_every_seed_on_its_own(self):
        cells = [run("a", [0.5, 0.6], seed=0), run("a", [0.44, 0.46], seed=1), run("b", [0.45, 0.5], seed=0)]
        row = self.ask(cells, of="b", reference="b").rows[0]
        assert row.seeds == [pytest.approx(100), None]
        assert row.evaluations == pytest.approx(100 + 100 * (0.5 - 0.47) / (0.53 - 0.47))

    def test_never(self):
        found = self.ask([run("a", [0.45, 0.46]), run("b", [0.5, 0.6])], of="b", reference="b", asked=["a"])
        row = found.rows[0]
        assert (row.evaluations, row.seeds, row.ratio) == (None, [None], None)
        assert found.texts[1] == "A does not reach it within 200 network evaluations."

    def test_a_reference_that_may_never_arrive_has_no_upper_bound(self):
        cells = [run("a", [0.7, 0.8]), run("b", [0.5, 0.552], noise=0.2)]
        row = self.ask(cells, of=BASE, score="guided", reference="b", asked=["a"]).rows[0]
        assert row.ratio == pytest.approx((100 + 100 * 0.05 / 0.052) / 50)
        assert row.ratio_interval[0] > 1
        assert row.ratio_interval[1] is None

    def test_a_goal_below_the_start(self):
        found = self.ask([run("a", [0.3])], of="a", reference="a")
        assert found.rows == []
        assert found.texts == ["There is nothing to reach: the score is .30, the base starts at .40."]

    def test_failures(self):
        cells = [run("a", [0.5]), Cell("b", 0, [], "why")]
        assert self.ask(cells, of="b").texts == ["Cannot be answered: B finished no run."]
        assert self.ask(cells, of="a", reference="b", asked=["b"]).texts[-1] == "B finished no run."


class TestOverOptimisation:
    def peak(self, correct, graded):
        return arena([run("a", correct, graded=graded)]).entries[0].peak

    def test_seen(self):
        found = self.peak([0.5, 0.6, 0.55, 0.5], [0.5, 0.6, 0.7, 0.8])
        assert (found.best_updates, found.best_score, found.updates) == (2, pytest.approx(0.6), 3)
        assert (found.best_kl, found.kl) == (pytest.approx(0.02), pytest.approx(0.03))
        assert found.change == pytest.approx(-0.05)

    def test_from_the_start(self):
        found = self.peak([0.38, 0.3], [0.5, 0.6])
        assert (found.best_updates, found.best_kl, found.updates) == (0, 0.0, 1)

    def test_a_fall_of_both_is_none(self):
        found = self.peak([0.5, 0.6, 0.5], [0.5, 0.6, 0.5])
        assert (found.best_updates, found.updates) == (2, None)
