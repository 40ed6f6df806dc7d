"""Alarms begin once, say what to do, and stay silent in a healthy run."""

import math

import pytest

from diffalign.errors import UserError
from diffalign.train import health
from diffalign.train.health import ENOUGH, WINDOW, Diverged, Health

GOOD = {
    "loss": 0.6, "grad_norm": 1.0, "grad_live": 1.0, "drift/chosen": 0.001, "err/reference": 0.5, "reward/margin": 0.5,
}  # fmt: skip


def run(rows: list[dict[str, float]], watcher: Health | None = None) -> list[tuple[int, str]]:
    watcher = watcher or Health()
    return [(step, name) for step, row in enumerate(rows, 1) for name in watcher.watch(row)]


def test_a_healthy_run_is_quiet():
    assert run([GOOD] * 200) == []
    assert run([{"loss": 1.0, "grad_norm": 0.0, "grad_live": 1.0}] * 200) == []  # nothing to read, nothing to say


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"drift/chosen": 0.1}, "winner-error"), ({"reward/margin": 20.0}, "margin-saturated")],
)
def test_an_alarm_sounds_once_and_again_after_it_was_over(changed, name):
    bad = {**GOOD, **changed}
    found = run([bad] * 100)
    assert found == [(ENOUGH + 1, name)]
    twice = run([GOOD] * WINDOW + [bad] * WINDOW + [GOOD] * 2 * WINDOW + [bad] * WINDOW)
    assert [entry for _, entry in twice] == [name, name]
    text = Health([bad] * ENOUGH).watch(bad)[name]
    assert "beta" in text


def test_a_spike_is_against_the_usual_gradient():
    spike = {**GOOD, "grad_norm": 11.0}
    assert run([GOOD] * 60 + [spike] + [GOOD] * 5 + [spike]) == [(61, "gradient-spike"), (67, "gradient-spike")]
    assert run([GOOD] * 60 + [{**GOOD, "grad_norm": 9.0}]) == []
    assert run([GOOD] * 5 + [spike]) == []  # too early to know


def test_a_continued_run_sounds_as_an_uninterrupted_one():
    rows = [{**GOOD, "drift/chosen": 0.002 * step} for step in range(60)]
    whole = run(rows)
    assert whole
    resumed = run(rows[22:], Health(rows[:22]))
    assert [(step + 22, name) for step, name in resumed] == whole


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run(name, value):
    with pytest.raises(Diverged, match=r"step 7: loss .*; lower optim\.lr") as caught:
        health.check(7, {**GOOD, name: value})
    assert caught.value.step == 7
    health.check(7, GOOD)


def test_what_teaches_nothing_may_move_nothing():
    still = {**GOOD, "grad_live": 0.0}
    with pytest.raises(UserError, match=r"step 2: no trainable parameter received a gradient"):
        health.check_moves(2, still)
    health.check(2, still)
