"""Every rule of GenEval's scoring, each with a case that a careless rewrite would get wrong."""

import math

import pytest

from diffalign.geneval import Found, check, relations


def at(label: str, x: float, y: float, *, size: float = 10.0, score: float = 0.9, color: str | None = None) -> Found:
    """An object centred at (x, y)."""
    half = size / 2
    return Found(label, score, (x - half, y - half, x + half, y + half), color)


def verdict(found, include, exclude=None) -> bool:
    correct, reason = check({"include": include, **({"exclude": exclude} if exclude else {})}, found)
    assert correct == (reason == "")
    return correct


def item(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


DOG, CAT = at("dog", 0, 0), at("cat", 100, 0)


# --- presence and count -------------------------------------------------------------------------------------------


def test_presence():
    assert verdict([DOG], [item("dog")])
    assert not verdict([DOG], [item("cat")])
    assert not verdict([], [item("dog")])
    assert verdict([DOG, CAT], [item("dog"), item("cat")])
    assert not verdict([DOG], [item("dog"), item("cat")])


@pytest.mark.parametrize(("n", "correct"), [(1, False), (2, True), (3, True), (9, True)])
def test_a_count_is_a_lower_bound(n, correct):
    assert verdict([DOG] * n, [item("dog", 2)]) is correct


@pytest.mark.parametrize(("n", "correct"), [(1, False), (2, True), (3, False), (4, False)])
def test_the_exclude_clause_makes_it_exact(n, correct):
    assert verdict([DOG] * n, [item("dog", 2)], [item("dog", 3)]) is correct


def test_exclude_counts_its_own_class():
    assert verdict([DOG, CAT, CAT], [item("dog")], [item("dog", 2)])
    assert not verdict([DOG, CAT], [item("dog")], [item("cat", 1)])


def test_other_objects_do_not_matter():
    assert verdict([DOG, CAT, at("bird", 5, 5)], [item("dog")])


# --- colour -------------------------------------------------------------------------------------------------------


def test_colour_is_judged_on_the_most_confident():
    red, blue = at("dog", 0, 0, score=0.9, color="red"), at("dog", 50, 0, score=0.5, color="blue")
    for found in ([red, blue], [blue, red]):
        assert verdict(found, [item("dog", color="red")])
        assert not verdict(found, [item("dog", color="blue")])


def test_all_the_counted_objects_need_the_colour():
    found = [at("dog", 50 * i, 0, score=1 - 0.1 * i, color=c) for i, c in enumerate(["red", "red", "blue"])]
    assert verdict(found, [item("dog", 2, color="red")])
    assert not verdict(found, [item("dog", 3, color="red")])
    assert not verdict(found[1:], [item("dog", 2, color="red")])


def test_an_object_of_no_colour_is_not_of_the_colour():
    assert not verdict([DOG], [item("dog", color="red")])


# --- position -----------------------------------------------------------------------------------------------------

SIDES = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}  # y points down


@pytest.mark.parametrize("relation", SIDES)
def test_relations_point_where_they_say(relation):
    found = [DOG, at("cat", *SIDES[relation])]
    for other in SIDES:
        correct = verdict(found, [item("dog"), item("cat", position=[other, 0])])
        assert correct == (other == relation)


def test_a_diagonal_is_two_relations_and_sixty_degrees_is_the_limit():
    assert relations(at("a", -100, -100), at("b", 0, 0)) == {"left of", "above"}
    for degrees, holds in ((50, True), (70, False)):
        dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        found = relations(at("a", 1e4 * dx, 1e4 * dy, size=1), at("b", 0, 0, size=1))
        assert ("right of" in found) == holds
        assert "below" in found


@pytest.mark.parametrize("relation", SIDES)
def test_the_cosine_bound_is_strict(relation):
    """Offset 10, sizes 25 + 25: shrunk by 5, so that the cosine is exactly .5."""
    dx, dy = (side / 100 for side in SIDES[relation])
    target = at("b", 0, 0, size=25)
    assert relations(at("a", 10 * dx, 10 * dy, size=25), target) == set()
    assert relations(at("a", 10.1 * dx, 10.1 * dy, size=25), target) == {relation}


def test_each_axis_shrinks_by_a_tenth_of_both_sizes_and_the_norm_does_not():
    wide = Found("a", 1.0, (-40.0, 50.0, 60.0, 60.0))  # centre (10, 55), 100 x 10
    target = at("b", 0, 0, size=10)
    # dx = 10 - .1 (100 + 10) < 0 -> 0; dy = 55 - .1 (10 + 10) = 53, over hypot(10, 55) = 55.9
    assert relations(wide, target) == {"below"}
    # with the norm of the shrunk offset both of these would be "right of"
    assert relations(at("a", 20, 30, size=50), at("b", 0, 0, size=50)) == {"below"}  # (10, 20) / 36.06
    near = at("a", 9.9, 9.9, size=50)  # shrunk to nothing on both axes
    assert relations(near, at("b", 0, 0, size=50)) == set()
    assert relations(at("a", 0, 0), at("b", 0, 0)) == set()


def test_every_object_must_stand_so_to_every_target():
    left, right = at("cat", -100, 0, score=0.8), at("cat", 100, 0, score=0.7)
    position = [item("dog"), item("cat", 2, position=["left of", 0])]
    assert not verdict([DOG, left, right], position)
    assert verdict([DOG, left, at("cat", -60, 0, score=0.7)], position)
    targets = [item("dog", 2), item("cat", position=["left of", 0])]
    far = at("dog", -200, 0, score=0.5)
    assert not verdict([DOG, far, left], targets)
    assert verdict([DOG, at("dog", 60, 0), left], targets)


def test_position_counts_only_the_most_confident_objects():
    left, right = at("cat", -100, 0, score=0.8), at("cat", 100, 0, score=0.7)
    for found in ([DOG, left, right], [right, left, DOG]):
        assert verdict(found, [item("dog"), item("cat", position=["left of", 0])])
        assert not verdict(found, [item("dog"), item("cat", position=["right of", 0])])


def test_a_missing_target_is_wrong_and_said_so():
    metadata = {"include": [item("dog"), item("cat", position=["left of", 0])]}
    correct, reason = check(metadata, [CAT])
    assert not correct
    assert reason == "expected dog>=1, found 0; no target for cat to be left of"


def test_a_target_of_the_wrong_colour_is_no_target():
    include = [item("dog", color="red"), item("cat", position=["right of", 0])]
    correct, reason = check({"include": include}, [at("dog", 0, 0, color="blue"), CAT])
    assert not correct
    assert "no target for cat to be right of" in reason
    assert verdict([at("dog", 0, 0, color="red"), CAT], include)


def test_the_position_index_names_its_clause():
    include = [item("dog"), item("bird"), item("cat", position=["right of", 1])]
    found = [at("dog", 200, 0), at("bird", 0, 0), CAT]
    assert verdict(found, include)
    include[2]["position"] = ["right of", 0]
    assert not verdict(found, include)


def test_position_and_colour_of_one_clause_are_both_needed():
    include = [item("dog"), item("cat", color="red", position=["right of", 0])]
    assert verdict([DOG, at("cat", 100, 0, color="red")], include)
    assert not verdict([DOG, at("cat", 100, 0, color="blue")], include)
    assert not verdict([DOG, at("cat", -100, 0, color="red")], include)


def test_all_reasons_are_given():
    metadata = {"include": [item("dog", 2), item("cat", color="red")], "exclude": [item("bird", 1)]}
    _, reason = check(metadata, [DOG, at("cat", 0, 0, color="blue"), at("bird", 0, 0)])
    assert reason.split("; ") == [
        "expected dog>=2, found 1",
        "expected red cat>=1, found colours blue",
        "expected bird<1, found 1",
    ]
