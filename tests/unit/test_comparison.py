"""Means per task, bootstrap over prompts, and paired differences, on numbers with a known truth."""

import numpy as np
import pytest

from diffalign import comparison, records
from diffalign.comparison import bootstrap, compare, outcomes
from diffalign.errors import UserError
from diffalign.records import Candidate, Record


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples, for tests that repeat."""
    monkeypatch.setattr(comparison, "RESAMPLES", 1000)


def simulate(rng: np.random.Generator, tasks: dict[str, int], images: int = 4, lift: float = 0.0):
    """Two models on the same prompts: a prompt's difficulty is shared, and varies more than its images do."""
    policy: dict[str, dict[str, list[float]]] = {}
    base: dict[str, dict[str, list[float]]] = {}
    for task, prompts in tasks.items():
        rate = rng.beta(0.6, 0.6, prompts)
        draws = rng.random((2, prompts, images))
        better = rate + lift * (1 - rate)
        policy[task] = {f"{task} {i}": (draws[0, i] < better[i]).astype(float).tolist() for i in range(prompts)}
        base[task] = {f"{task} {i}": (draws[1, i] < rate[i]).astype(float).tolist() for i in range(prompts)}
    return policy, base


# --- means --------------------------------------------------------------------------------------------------------


def test_overall_is_the_unweighted_mean_over_tasks():
    found = {"big": {f"p{i}": [1.0] for i in range(90)}, "small": {"a": [0.0, 1.0], "b": [0.0, 0.0]}}
    rows = compare(found)
    assert rows["big"].policy == 1.0
    assert rows["small"].policy == 0.25
    assert rows["overall"].policy == 0.625
    assert (rows["big"].n, rows["small"].n, rows["overall"].n) == (90, 4, None)
    assert list(rows) == ["big", "small", "overall"]


def test_a_task_is_the_mean_over_its_images():
    rows = compare({"t": {"a": [1.0, 1.0, 1.0], "b": [0.0]}})
    assert rows["t"].policy == 0.75


def test_a_constant_has_no_interval():
    rows = compare({"t": {"a": [0.5, 0.5], "b": [0.5, 0.5]}})
    assert rows["t"].interval == (0.5, 0.5)


def test_without_a_baseline_nothing_is_compared():
    row = compare({"t": {"a": [1.0]}})["overall"]
    assert row.against is None
    assert row.difference is None
    assert row.difference_interval is None


# --- intervals ----------------------------------------------------------------------------------------------------


def test_prompts_are_the_unit_not_images():
    """Images of a prompt that always agree are one observation: repeating them narrows nothing."""
    rng = np.random.default_rng(0)
    flips = rng.integers(2, size=40).astype(float)
    once = compare({"t": {str(i): [v] for i, v in enumerate(flips)}})["t"]
    many = compare({"t": {str(i): [v] * 25 for i, v in enumerate(flips)}})["t"]
    assert many.interval == once.interval
    width = once.interval[1] - once.interval[0]
    assert width == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)


def test_a_prompt_brings_all_its_images():
    """One prompt of 9 images at 1, one of 1 image at 0: the means of a resample are 0, .9 or 1."""
    draws = bootstrap({"t": {"a": [1.0] * 9, "b": [0.0]}})["t"][0]
    levels, counts = np.unique(draws, return_counts=True)
    assert levels.tolist() == [0.0, 0.9, 1.0]
    assert counts / len(draws) == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_intervals_cover_the_truth(quick):
    """In .885 to .99 of 200 simulations with 30 prompts per task.

    That is .95 with three standard errors of 200 simulations below it, less .02 that a percentile bootstrap falls
    short at 30 prompts. Resampling images instead of prompts would cover about .72.
    """
    rng = np.random.default_rng(7)
    tasks = {"a": 30, "b": 30}
    hits = {"score": 0, "overall": 0, "difference": 0}
    for _ in range(200):
        policy, base = simulate(rng, tasks, images=8, lift=0.2)
        rows = compare(policy, base)
        low, high = rows["a"].interval
        hits["score"] += low <= 0.6 <= high  # mean rate .5, lifted by .2 of the rest
        low, high = rows["overall"].interval
        hits["overall"] += low <= 0.6 <= high
        low, high = rows["overall"].difference_interval
        hits["difference"] += low <= 0.1 <= high
    assert all(0.885 <= hit / 200 <= 0.99 for hit in hits.values()), hits


def test_differences_are_paired(quick):
    """Shared difficulty cancels: the interval of the difference is narrower than independent draws would give."""
    policy, base = simulate(np.random.default_rng(1), {"a": 60, "b": 60}, images=16, lift=0.05)
    row = compare(policy, base)["overall"]

    def width(interval) -> float:
        return interval[1] - interval[0]

    independent = np.hypot(width(row.interval), width(row.against_interval))
    assert width(row.difference_interval) < 0.4 * independent
    assert row.difference == pytest.approx(row.policy - row.against)
    assert row.difference_interval[0] < row.difference < row.difference_interval[1]


def test_a_model_against_itself_differs_by_exactly_zero():
    policy, _ = simulate(np.random.default_rng(2), {"a": 20, "b": 7})
    shuffled = {task: dict(reversed(prompts.items())) for task, prompts in reversed(policy.items())}
    for against in (policy, shuffled):
        for row in compare(policy, against).values():
            assert row.difference == 0.0
            assert row.difference_interval == pytest.approx((0.0, 0.0), abs=1e-12)


def test_a_constant_lift_is_certain():
    _, base = simulate(np.random.default_rng(3), {"a": 20, "b": 7})
    policy = {task: {p: [v + 0.25 for v in values] for p, values in prompts.items()} for task, prompts in base.items()}
    for row in compare(policy, base).values():
        assert row.difference_interval == pytest.approx((0.25, 0.25), abs=1e-12)


def test_draws_repeat_and_tasks_are_drawn_apart():
    policy, _ = simulate(np.random.default_rng(4), {"a": 12})
    policy["b"] = policy["a"]
    first, again, other = bootstrap(policy), bootstrap(policy), bootstrap(policy, seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in ("a", "b", "overall"))
    assert not np.array_equal(first["a"], other["a"])
    assert abs(np.corrcoef(first["a"][0], first["b"][0])[0, 1]) < 0.05
    assert first["overall"] == pytest.approx((first["a"] + first["b"]) / 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["a"].pop("a 0"),
        lambda found: found["a"].update({"new": [1.0]}),
        lambda found: found["a"]["a 1"].append(1.0),
        lambda found: found.pop("b"),
    ],
    ids=["a prompt less", "a prompt more", "an image more", "a task less"],
)
def test_models_judged_on_other_prompts_are_not_compared(change):
    policy, base = simulate(np.random.default_rng(5), {"a": 5, "b": 5})
    change(base)
    with pytest.raises(UserError, match="not judged on the same prompts"):
        compare(policy, base)


# --- reading ------------------------------------------------------------------------------------------------------


def write(path, rows):
    """(task, prompt, values) -> a scored records file."""
    records.write(
        path,
        (
            Record(
                id=str(i),
                prompt=prompt,
                candidates=[Candidate(sample=f"media/{i}-{k}.png", labels={"judge": v}) for k, v in enumerate(values)],
                meta={} if task is None else {"tag": task},
            )
            for i, (task, prompt, values) in enumerate(rows)
        ),
    )
    return path


def test_records_of_one_prompt_are_one_unit(tmp_path):
    rows = [("a", "x", [1.0, 0.0]), ("b", "x", [0.0]), ("a", "y", [1.0]), ("a", "x", [0.5])]
    found = outcomes(write(tmp_path / "scored.jsonl", rows), "judge")
    assert found == {"a": {"x": [1.0, 0.0, 0.5], "y": [1.0]}, "b": {"x": [0.0]}}


def test_untagged_records_are_one_task(tmp_path):
    found = outcomes(write(tmp_path / "scored.jsonl", [(None, "x", [1.0]), (None, "y", [0.0])]), "judge")
    assert found == {"all": {"x": [1.0], "y": [0.0]}}


def test_a_label_per_unit_is_refused(tmp_path):
    path = write(tmp_path / "scored.jsonl", [("a", "x", [[0.1, 0.2]])])
    with pytest.raises(UserError, match="a value per unit, expected one per sample"):
        outcomes(path, "judge")
