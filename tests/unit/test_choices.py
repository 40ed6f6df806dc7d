"""Which candidates are trained on against each other, against hand-computed answers."""

import pytest

from diffalign.choices import Choice, all_pairs, best_worst, ranked, segment_verdicts, segments, unpaired


class TestRules:
    def test_best_worst(self):
        assert best_worst([1.0, 3.0, 2.0, 0.0], 0.0) == Choice([(1, 3)], [])
        assert best_worst([1.0, 3.0, 3.0, 1.0], 0.0) == Choice([(1, 0)], [])
        assert best_worst([1.0, 1.0], 0.0) == Choice([], [(0, 1)])

    @pytest.mark.parametrize(("margin", "kept"), [(1.9, 1), (2.0, 0), (2.1, 0)])
    def test_a_difference_equal_to_the_margin_is_a_tie(self, margin, kept):
        assert len(best_worst([1.0, 3.0], margin).groups) == kept
        assert len(all_pairs([1.0, 3.0], margin).groups) == kept
        assert len(ranked([1.0, 3.0], margin).groups) == kept

    def test_all_pairs_widest_first(self):
        rewards = [1.0, 4.0, 1.0, 2.0]
        assert all_pairs(rewards, 0.0) == Choice([(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)], [(2, 0)])
        assert all_pairs(rewards, 1.0) == Choice([(1, 0), (1, 2), (1, 3)], [(2, 0), (3, 0), (3, 2)])
        assert all_pairs(rewards, 0.0, per_prompt=2) == Choice([(1, 0), (1, 2)], [(2, 0)])

    def test_ranked(self):
        rewards = [1.0, 4.0, 1.0, 2.0]
        assert ranked(rewards, 0.0) == Choice([(1, 3, 0, 2)], [])
        assert ranked(rewards, 0.0, top=2) == Choice([(1, 3)], [])
        assert ranked([4.0, 4.0, 1.0], 0.0, top=2) == Choice([], [(0, 1)])
        assert ranked([1.0] * 3, 0.0) == Choice([], [(0, 1, 2)])

    def test_units_compare_by_their_mean(self):
        rewards = [[0.0, 0.0], [3.0, -1.0], [1.0, 1.0]]
        assert best_worst(rewards, 0.5).groups == [(1, 0)]
        assert best_worst(rewards, 1.0).groups == []
        assert all_pairs(rewards, 0.0) == Choice([(1, 0), (2, 0)], [(2, 1)])

    def test_vetoed_pairs(self):
        rewards = [0.0, 1.0, 3.0]
        assert best_worst(rewards, 0.0, {(2, 0)}) == Choice([(2, 1)], [], 0)
        assert best_worst(rewards, 0.0, {(2, 0), (2, 1), (1, 0)}) == Choice([], [], 1)
        assert all_pairs(rewards, 0.0, veto={(2, 0), (0, 2)}) == Choice([(2, 1), (1, 0)], [], 1)

    def test_unpaired(self):
        assert unpaired([0.2, 0.5, 0.9], 0.0, 0.5) == Choice([(0,), (2,)], [(1,)])
        assert unpaired([0.2, 0.45, 0.9], 0.1, 0.5) == Choice([(0,), (2,)], [(1,)])

    @pytest.mark.parametrize(("decided", "kept"), [(0.0, 2), (0.2, 2), (0.4, 2), (0.5, 1), (0.75, 0)])
    def test_segments(self, decided, kept):
        rewards = [[1.0, 1.0, 0.0, 5.0], [1.0, 1.0, 0.0, 5.0], [0.0, 1.0, 1.0, 4.0]]
        choice = segments(rewards, 0.0, decided)
        assert (len(choice.groups), len(choice.tied)) == ((2, 1) if decided < 0.75 else (0, 3)), kept

    def test_segment_verdicts(self):
        assert segment_verdicts([1.0, 2.0, 3.0], [1.05, 0.0, 4.0], 0.1) == ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
