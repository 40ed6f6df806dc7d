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
