"""Rewards from labels against hand-computed answers."""

import math

import pytest

from diffalign.errors import UserError
from diffalign.rewards import Spread, combine, pool_spread, vetoes

from .labelled import record


class TestCombine:
    def test_weighted_sum(self):
        row = record(clip=[1.0, 2.0], hps=[10.0, 0.0])
        assert combine(row, {"clip": 2.0, "hps": 0.5}, "sum") == [7.0, 4.0]
        assert combine(row, {"clip": 1.0, "hps": -1.0}, "sum") == [-9.0, 2.0]

    def test_wins_by_hand(self):
        row = record(a=[0.3, 0.1, 0.2, 0.4], b=[5.0, 5.0, 1.0, 2.0], c=[1.0, 2.0, 3.0, 4.0])
        # wins per label: a 2 0 1 3, b 2 2 0 1 (one comparison ties), c 0 1 2 3; over 3 labels and 3 rivals
        assert combine(row, {"a": 1, "b": 1, "c": 1}, "wins") == pytest.approx([4 / 9, 3 / 9, 3 / 9, 7 / 9])
        # weights 2, 1, 1: (4 + 2 + 0, 0 + 2 + 1, 2 + 0 + 2, 6 + 1 + 3) over 4 * 3
        assert combine(row, {"a": 2, "b": 1, "c": 1}, "wins") == pytest.approx([6 / 12, 3 / 12, 4 / 12, 10 / 12])

    @pytest.mark.parametrize("k", [2, 3, 4, 7])
    def test_wins_without_ties_sum_to_half_of_k(self, k):
        row = record(a=[float(i * 3 % 7) for i in range(k)], b=[-float(i) for i in range(k)])
        rewards = combine(row, {"a": 0.3, "b": 1.7}, "wins")
        assert sum(rewards) == pytest.approx(k / 2)
        assert min(rewards) >= 0
        assert max(rewards) <= 1

    def test_a_tie_wins_for_nobody(self):
        assert combine(record(a=[1.0, 1.0, 0.0]), {"a": 1}, "wins") == [0.5, 0.5, 0.0]

    def test_negative_weight_turns_wins_around(self):
        row = record(error=[0.1, 0.2, 0.3])
        assert combine(row, {"error": -2.0}, "wins") == [1.0, 0.5, 0.0]

    def test_wins_ignore_scale(self):
        small, large = record(a=[1e-300, 2e-300]), record(a=[1.0, 2e300])
        assert combine(small, {"a": 1e-30}, "wins") == combine(large, {"a": 1e-30}, "wins") == [0.0, 1.0]

    def test_per_unit(self):
        row = record(vq=[[1.0, 4.0], [2.0, 2.0]], mq=[[0.0, 1.0], [0.0, 3.0]])
        assert combine(row, {"vq": 1.0, "mq": 2.0}, "sum") == [[1.0, 6.0], [2.0, 8.0]]
        # unit 0: vq 0 1, mq tie; unit 1: vq 1 0, mq 0 1
        assert combine(row, {"vq": 1.0, "mq": 3.0}, "wins") == [[0.0, 0.25], [0.25, 0.75]]

    @pytest.mark.parametrize(
        ("row", "weights", "message"),
        [
            (record(clip=[1.0, 2.0]), {"hps": 1.0}, "record 'a', candidate 0: no label 'hps'; it has: clip"),
            (record(a=[1.0, [1.0, 2.0]]), {"a": 1.0}, "record 'a': a: numbers mixed with lists"),
            (record(a=[[1.0], [1.0, 2.0]]), {"a": 1.0}, "lists of different lengths"),
            (record(a=[1.0, 2.0], b=[[1.0], [2.0]]), {"a": 1.0, "b": 1.0}, "a, b: numbers mixed"),
            (record(a=[1.0, 2.0]), {"a": math.nan}, "must be finite"),
            (record(a=[1.0, 2.0]), {"a": 0.0}, "not all zero"),
            (record(a=[1e308, 2.0]), {"a": 10.0}, "record 'a': the reward is not finite"),
        ],
    )
    @pytest.mark.parametrize("how", ["sum", "wins"])
    def test_refusals(self, row, weights, message, how):
        if how == "wins" and "reward is not finite" in message:
            assert combine(row, weights, how) == [1.0, 0.0]
            return
        with pytest.raises(UserError, match=message):
            combine(row, weights, how)

    def test_ranks_give_half_a_win_for_a_tie(self):
        row = record(a=[1.0, 1.0, 0.0], b=[3.0, 2.0, 1.0])
        assert combine(row, {"a": 1}, "ranks") == [0.75, 0.75, 0.0]
        assert combine(row, {"a": 1, "b": 1}, "ranks") == [0.875, 0.625, 0.0]
        assert combine(row, {"b": 1}, "ranks") == combine(row, {"b": 1}, "wins")

    def test_majority(self):
        # a and b put 0 over 1, c not; all put 2 last but b, which is outvoted; weights can turn a vote
        row = record(a=[3.0, 2.0, 1.0], b=[2.0, 1.0, 3.0], c=[2.0, 3.0, 1.0])
        assert combine(row, {"a": 1, "b": 1, "c": 1}, "majority") == [1.0, 0.5, 0.0]
        assert combine(row, {"a": 1, "b": 1, "c": 3}, "majority") == [0.5, 1.0, 0.0]
        assert combine(row, {"a": 1, "b": -1}, "majority") == [0.75, 0.75, 0.0]

    def test_a_circle_of_majorities_is_a_tie(self):
        row = record(a=[3.0, 2.0, 1.0], b=[1.0, 3.0, 2.0], c=[2.0, 1.0, 3.0])
        assert combine(row, {"a": 1, "b": 1, "c": 1}, "majority") == [0.5] * 3

    def test_pareto_fronts(self):
        row = record(a=[3.0, 1.0, 2.0, 0.0], b=[1.0, 3.0, 0.5, 0.0])
        assert combine(row, {"a": 1, "b": 1}, "pareto") == [1.0, 1.0, 0.5, 0.0]
        assert combine(row, {"a": 1, "b": -1}, "pareto") == [1.0, 0.0, 1.0, 1.0]
        assert combine(row, {"a": 1, "b": 0}, "pareto") == pytest.approx([1.0, 1 / 3, 2 / 3, 0.0])
        assert combine(record(a=[1.0, 1.0]), {"a": 1}, "pareto") == [1.0, 1.0]

    def test_zscore_is_a_sum_of_standard_deviations(self):
        rows = [record(small=[0.1, 0.3], large=[0.0, 100.0]), record(small=[0.5, 0.7], large=[300.0, 200.0])]
        pool = pool_spread(rows, ["small", "large"])
        assert pool["small"] == pytest.approx(Spread(0.4, math.sqrt(0.05)))
        assert pool["large"] == pytest.approx(Spread(150.0, math.sqrt(12500)))
        rewards = combine(rows[0], {"small": 1.0, "large": 2.0}, "zscore", pool)
        assert rewards == pytest.approx(
            [-0.3 / math.sqrt(0.05) - 300 / math.sqrt(12500), -0.1 / math.sqrt(0.05) - 100 / math.sqrt(12500)]
        )

    def test_a_label_that_never_differs_counts_nothing(self):
        row = record(same=[7.0, 7.0], other=[0.0, 2.0])
        pool = pool_spread([row], ["same", "other"])
        assert combine(row, {"same": 5.0, "other": 1.0}, "zscore", pool) == [-1.0, 1.0]

    def test_one_candidate(self):
        for how, reward in (("sum", 2.0), ("wins", 0.0), ("ranks", 0.0), ("majority", 0.0), ("pareto", 1.0)):
            assert combine(record(a=[2.0]), {"a": 1.0}, how) == [reward]


class TestVetoes:
    def test_by_hand(self):
        row = record(a=[1.0, 2.0, 3.0], safe=[0.0, -1.0, -3.0])
        assert vetoes(row, {"a": 1.0}, {"safe": 1.0}) == {(2, 0), (2, 1)}
        assert vetoes(row, {"a": 1.0}, {"safe": 0.0}) == {(1, 0), (2, 0), (2, 1)}

    def test_a_negative_weight_turns_the_limit_around(self):
        row = record(a=[1.0, 2.0], error=[0.1, 0.5])
        assert vetoes(row, {"a": 1.0, "error": -1.0}, {"error": 0.3}) == {(1, 0)}

    def test_units_count_by_their_mean(self):
        assert vetoes(record(a=[[0.0, 4.0], [1.0, 1.0]]), {"a": 1.0}, {"a": 0.5}) == {(1, 0)}

    def test_a_label_that_is_not_there(self):
        with pytest.raises(UserError, match="no label 'safe'"):
            vetoes(record(a=[1.0, 2.0]), {"a": 1.0}, {"safe": 0.0})
