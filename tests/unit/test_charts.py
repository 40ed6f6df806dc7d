"""Chart geometry against hand-computed answers."""

import pytest

from diffalign import charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 300, [0, 100, 200, 300]),
        (0.38, 0.81, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (-3e-4, 8e-4, [0, 5e-4]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_thin_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert charts.thin(points[:400]) == points[:400]
    assert thinned[0] == (1.0, 1.0)


def test_running_mean():
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 6.0), (3.0, 0.0)]
    assert charts.running_mean(points, 3) == [(0.0, 1.5), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0)]
    assert charts.running_mean(points, 1) == points


def test_histogram():
    shape = charts.histogram([0.0, 0.0, 0.5, 1.0], bins=2)
    assert (shape.low, shape.high, shape.mean, shape.count) == (0.0, 1.0, 0.375, 4)
    assert shape.heights == [1.0, 1.0]
    assert charts.histogram([3.0, 3.0], bins=2).heights == [1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (950, "950"), (999.6, "1 k"), (12_500, "12.5 k"), (1_234_567, "1.23 M"), (2e9, "2 G")],
)
def test_large_numbers_are_short(value, text):
    assert charts.count(value) == text


def test_a_panel_lays_out_lines_guides_and_legend():
    found = charts.panel(
        "score",
        {"a": [(0, 0.0), (10, 1.0)], "b": [(0, 0.0), (5, 0.5)]},
        "cost",
        (0.0, 1.0),
        [(10, "ten")],
        [(0.5, "half")],
    )
    first, second = found.traces
    assert first.dots == [(charts.LEFT, charts.BOTTOM), (charts.RIGHT, charts.TOP)]
    assert second.dots[1] == ((charts.LEFT + charts.RIGHT) / 2, (charts.BOTTOM + charts.TOP) / 2)
    assert (found.guides[0].at, found.x_ticks) == (second.dots[1][1], [(charts.RIGHT, "ten")])
    keys = [first.key, second.key, found.guides[0].key]
    assert keys[0][1] == keys[1][1] < keys[2][1] < found.height
    wide = charts.panel("score", {"a" * 40: [(0, 0.0)], "b": [(0, 0.0)]}, "cost", (0.0, 1.0), [])
    assert wide.traces[0].key[0] == wide.traces[1].key[0]


def test_a_forest_is_drawn_around_zero():
    found = charts.forest(
        "gain", [("a", "better", (0.1, 0.2, 0.3), "+.20"), ("b", "worse", (-0.3, -0.2, -0.1), "−.20")]
    )
    above, below = found.rows
    assert found.zero == pytest.approx((charts.FOREST_LEFT + charts.FOREST_RIGHT) / 2)
    assert below.high < found.zero < above.low < above.middle < above.high
    assert above.at < below.at < found.bottom
