"""Every rule of GenEval's scoring over detections, each with a case that a careless rewrite would get wrong."""

import math

import pytest

from diffalign.geneval import CLASSES, COLORS, Found, check, complaint, graded, keep, overlap, relations, to_color


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
    assert reason == "expected dog>=1, found 0\nno target for cat to be left of"


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
    assert reason.split("\n") == [
        "expected dog>=2, found 1",
        "expected red cat>=1, found 0 red; and 1 blue",
        "expected bird<1, found 1",
    ]


# --- reasons, as the released evaluator words them ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "include", "exclude", "found", "reason"),
    [
        ("single_object", [item("dog")], [], [CAT], "expected dog>=1, found 0"),
        ("two_object", [item("dog"), item("cat")], [], [DOG], "expected cat>=1, found 0"),
        ("counting", [item("dog", 3)], [item("dog", 4)], [DOG] * 2, "expected dog>=3, found 2"),
        ("counting", [item("dog", 3)], [item("dog", 4)], [DOG] * 5, "expected dog<4, found 5"),
        (
            "colors",
            [item("dog", 3, color="red")],
            [],
            [at("dog", 0, 0, color=c) for c in ("white", "red", "blue")],
            "expected red dog>=3, found 1 red; and 1 red, 1 blue, 1 white",
        ),
        (
            "position",
            [item("dog"), item("cat", position=["left of", 0])],
            [],
            [DOG, at("cat", 100, 100)],
            "expected cat left of target, found below and right of target",
        ),
        (
            "position",
            [item("dog"), item("cat", position=["above", 0])],
            [],
            [DOG, at("cat", 0, 0)],
            "expected cat above target, found  target",
        ),
        (
            "position",
            [item("dog"), item("cat", position=["above", 0])],
            [],
            [CAT],
            "expected dog>=1, found 0\nno target for cat to be above",
        ),
        (
            "color_attr",
            [item("dog", color="red"), item("cat", color="black")],
            [],
            [at("dog", 0, 0, color="brown"), at("cat", 9, 9, color="white")],
            "expected red dog>=1, found 0 red; and 1 brown\nexpected black cat>=1, found 0 black; and 1 white",
        ),
    ],
)
def test_every_tag_fails_with_the_released_reason(tag, include, exclude, found, reason):
    assert check({"tag": tag, "include": include, "exclude": exclude}, found) == (False, reason)


def test_a_wrong_count_hides_colour_and_position():
    include = [item("dog"), item("cat", 2, color="red", position=["left of", 0])]
    assert check({"include": include}, [DOG, CAT]) == (False, "expected cat>=2, found 1")


# --- which detections count ---------------------------------------------------------------------------------------


def test_a_detection_counts_above_the_threshold_and_the_best_come_first():
    found = [at("dog", 0, 0, score=s) for s in (0.2, 0.3, 0.95, 0.31, 0.9)]
    assert [f.score for f in keep([*found, CAT], threshold=0.3)] == [0.95, 0.9, 0.31, 0.9]
    assert [f.score for f in keep(found, threshold=0.9)] == [0.95]
    assert keep([], threshold=0.3) == []


def test_a_class_has_sixteen_objects_at_most():
    found = [at("dog", i, 0, score=0.4 + i / 100) for i in range(20)] + [CAT]
    kept = keep(found, threshold=0.3)
    assert [f.label for f in kept] == ["dog"] * 16 + ["cat"]
    assert kept[0].score == 0.4 + 19 / 100
    assert kept[15].score == 0.4 + 4 / 100


def test_overlap_counts_a_pixel_more_than_the_corners():
    a, b = Found("dog", 0.9, (0, 0, 9, 9)), Found("dog", 0.8, (5, 0, 14, 9))
    assert overlap(a, b) == pytest.approx(50 / 150)  # 10 x 10 each, 5 x 10 shared
    assert overlap(a, Found("dog", 0.8, (10, 0, 19, 9))) == 0
    assert overlap(a, a) == 1


def test_suppression_is_off_until_asked_for_and_greedy():
    boxes = [(0, 0, 9, 9), (0, 0, 9, 9), (5, 0, 14, 9), (8, 0, 17, 9)]
    found = [Found("dog", 0.9 - i / 10, box) for i, box in enumerate(boxes)]
    assert keep(found, threshold=0.3) == found
    assert keep(found, threshold=0.3, max_overlap=0.99) == [found[0], found[2], found[3]]
    # the third overlaps the first by a third, the fourth (by more) only the third, which is gone by then
    assert keep(found, threshold=0.3, max_overlap=1 / 3) == [found[0], found[3]]
    assert keep([found[0], Found("cat", 0.5, boxes[0])], threshold=0.3, max_overlap=0.1)[1].label == "cat"


# --- whose colour matters -----------------------------------------------------------------------------------------


def test_colours_are_asked_for_where_the_verdict_hangs_on_them():
    found = [at("dog", 0, 0, score=0.5), CAT, at("dog", 5, 5, score=0.9), at("bird", 0, 0)]
    red, two = item("dog", color="red"), item("dog", 2, color="red")
    assert to_color({"include": [red]}, found) == [2]
    assert to_color({"include": [two]}, found) == [2, 0]
    assert to_color({"include": [two, red, item("cat", color="blue"), item("bird")]}, found) == [2, 0, 1]
    assert to_color({"include": [item("dog", 3, color="red")]}, found) == []  # too few: no colour can save it
    assert to_color({"include": [red]}, found, exact=True) == []  # too many
    assert to_color({"include": [two]}, found, exact=True) == [2, 0]


# --- rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "correct"), [(1, False), (2, True), (3, False)])
def test_exact_counts_need_no_exclude_clause(n, correct):
    assert check({"include": [item("dog", 2)]}, [DOG] * n, exact=True)[0] is correct


def test_exact_rules_judge_every_object():
    include = [item("dog"), item("cat", color="red")]
    found = [DOG, at("cat", 0, 0, score=0.9, color="red"), at("cat", 5, 5, score=0.4, color="blue")]
    assert check({"include": include}, found)[0]
    assert check({"include": include}, found, exact=True) == (False, "expected cat==1, found 2")


@pytest.mark.parametrize(("n", "value"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (6, 0), (9, 0)])
def test_a_count_is_graded_by_its_distance(n, value):
    metadata = {"include": [item("dog", 3)], "exclude": [item("dog", 4)]}
    assert graded(metadata, [DOG] * n) == pytest.approx(value)


def test_every_condition_is_one_term():
    red, blue = at("dog", 0, 0, color="red"), at("dog", 0, 0, color="blue")
    assert graded({"include": [item("dog", 2, color="red")]}, [red, blue]) == pytest.approx((1 + 1 / 2) / 2)
    assert graded({"include": [item("dog", 2, color="red")]}, [red]) == pytest.approx((1 / 2 + 0) / 2)
    include = [item("dog"), item("cat", position=["left of", 0])]
    assert graded({"include": include}, [DOG, at("cat", -100, 0)]) == 1
    assert graded({"include": include}, [DOG, CAT]) == pytest.approx((1 + 1 + 0) / 3)  # not also a 1: 3/4
    assert graded({"include": include}, [CAT]) == pytest.approx((0 + 1 + 0) / 3)
    include = [item("dog"), item("cat", color="red", position=["left of", 0])]
    assert graded({"include": include}, [DOG, at("cat", -100, 0, color="blue")]) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_an_excluded_class_that_nobody_counts_is_a_term():
    metadata = {"include": [item("dog")], "exclude": [item("cat", 1)]}
    assert graded(metadata, [DOG]) == 1
    assert graded(metadata, [DOG, CAT]) == pytest.approx(1 / 2)


# --- metadata -----------------------------------------------------------------------------------------------------


def test_the_classes_are_coco_with_geneval_names():
    assert len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[11], CLASSES[-1]) == ("person", "stop sign", "toothbrush")
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")


@pytest.mark.parametrize(
    ("metadata", "wrong"),
    [
        ({"include": [item("dog")]}, "`tag` must be"),
        ({"tag": "colors"}, "`include` must be"),
        ({"tag": "colors", "include": []}, "`include` must be"),
        ({"tag": "colors", "include": [item("mouse")]}, "include.0: `class` must be"),
        ({"tag": "colors", "include": [{"class": "dog"}]}, "include.0: `count` must be"),
        ({"tag": "colors", "include": [item("dog", 0)]}, "include.0: `count` must be"),
        ({"tag": "colors", "include": [item("dog", color="mauve")]}, "include.0: `color` must be"),
        ({"tag": "colors", "include": [item("dog"), item("cat", position=["near", 0])]}, "include.1: `position` must"),
        ({"tag": "colors", "include": [item("cat", position=["above", 0])]}, "include.0: `position` must"),
        ({"tag": "colors", "include": [item("cat")], "exclude": [3]}, "exclude.0: `class` must"),
        ({"tag": "colors", "include": [item("cat")], "exclude": 3}, "`exclude` must be"),
    ],
)
def test_metadata_that_cannot_be_read_is_complained_of(metadata, wrong):
    assert (complaint(metadata, CLASSES, COLORS) or "").startswith(wrong)


def test_sound_metadata_is_not_complained_of():
    metadata = {"tag": "x", "include": [item("dog", color="red"), item("cat", position=["above", 0])], "prompt": "p"}
    assert complaint(metadata, CLASSES, COLORS) is None
    assert complaint({**metadata, "exclude": [item("dog", 2)]}, CLASSES, COLORS) is None
