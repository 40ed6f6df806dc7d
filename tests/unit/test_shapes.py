"""The shapes world: prompts and their split, the renderer, and a judge that is exact on what the renderer draws."""

import math
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch

from diffalign.worlds import load_prompts
from diffalign.worlds.shapes.judge import Verdict, find_regions, judge, verdict
from diffalign.worlds.shapes.prompts import COLORS, RELATIONS, SHAPES, TASKS, all_prompts, prompts
from diffalign.worlds.shapes.render import (
    AREA,
    AXIS_RATIO,
    SIZE,
    Scenes,
    coverage,
    render,
    render_prompts,
    sample_scenes,
)

PROMPTS = {m["prompt"]: m for m in all_prompts()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def metadata(text: str) -> dict:
    return PROMPTS[f"a photo of {text}"]


def scene(*objects: tuple[str, str, float, float, float]) -> torch.Tensor:
    """(1, 3, SIZE, SIZE): shapes with their colour, centre and radius."""
    shape, color = torch.full((1, 4), -1), torch.zeros(1, 4, dtype=torch.long)
    place = torch.zeros(3, 1, 4)
    for slot, (name, paint, *where) in enumerate(objects):
        shape[0, slot], color[0, slot] = SHAPES.index(name), list(COLORS).index(paint)
        place[:, 0, slot] = torch.tensor(where)
    return render(Scenes(shape, color, *place), generator())


def judged(image: torch.Tensor, text: str) -> Verdict:
    return judge(image, [metadata(text)])[0]


@pytest.fixture(scope="module")
def clean() -> tuple[list[dict], list, list[Verdict]]:
    """3,000 clean renders, the same number of every task: prompts, regions, verdicts."""
    pick, draw = generator(1), generator(2)
    batch = []
    for task in TASKS:
        pool = [m for m in PROMPTS.values() if m["tag"] == task]
        batch += [pool[i] for i in torch.randint(len(pool), (500,), generator=pick).tolist()]
    regions = [r for i in range(0, 3000, 500) for r in find_regions(render_prompts(batch[i : i + 500], draw))]
    return batch, regions, [verdict(m, r) for m, r in zip(batch, regions, strict=True)]


# --- prompts ------------------------------------------------------------------------------------------------------


def test_the_world_has_840_prompts():
    assert len(all_prompts()) == len(PROMPTS) == 840
    counts = Counter(m["tag"] for m in all_prompts())
    expected = {"single_object": 5, "two_object": 20, "counting": 105, "colors": 30, "position": 80, "color_attr": 600}
    assert counts == expected
    assert tuple(counts) == TASKS


def test_the_split_is_by_prompt_and_never_moves():
    train, heldout = prompts("train"), prompts("heldout")
    counts = Counter(m["tag"] for m in heldout)
    assert counts == {
        "single_object": 5, "two_object": 4, "counting": 18, "colors": 7, "position": 15, "color_attr": 138,
    }  # fmt: skip
    both = {m["prompt"] for m in train} & {m["prompt"] for m in heldout}
    assert both == {m["prompt"] for m in all_prompts() if m["tag"] == "single_object"}
    assert len({m["prompt"] for m in train} | {m["prompt"] for m in heldout}) == 840
    assert all("color" in m["include"][0] for m in heldout if m["tag"] == "counting")


def test_every_shape_and_colour_is_in_the_training_split():
    items = [item for m in prompts("train") for item in m["include"]]
    assert {item["class"] for item in items} == set(SHAPES)
    assert {item["color"] for item in items if "color" in item} == set(COLORS)
    assert {item["position"][0] for item in items if "position" in item} == set(RELATIONS)
    assert load_prompts("shapes", "train") == prompts("train")


def test_metadata_says_what_the_prompt_says():
    assert metadata("a ring left of a cross")["include"] == [
        {"class": "cross", "count": 1},
        {"class": "ring", "count": 1, "position": ["left of", 0]},
    ]
    counting = metadata("three green crosses")
    assert counting["include"] == [{"class": "cross", "count": 3, "color": "green"}]
    assert counting["exclude"] == [{"class": "cross", "count": 4, "color": "green"}]
    assert [item["color"] for item in metadata("a red ring and a blue circle")["include"]] == ["red", "blue"]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        prompts("test")


# --- renderer -----------------------------------------------------------------------------------------------------


def test_a_render_depends_on_its_generator_alone():
    batch = [PROMPTS[p] for p in list(PROMPTS)[::120]]
    torch.manual_seed(0)
    first = render_prompts(batch, generator(3))
    torch.manual_seed(1)
    assert torch.equal(first, render_prompts(batch, generator(3)))
    other = render_prompts(batch, generator(4))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first.shape == (7, 3, SIZE, SIZE)
    assert 0 <= float(first.min()) < float(first.max()) <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_coverage_adds_up_to_the_area(name):
    radius = torch.tensor([5.0, 8.0])
    area = coverage(name, torch.tensor([16.0, 15.3]), torch.tensor([16.0, 16.4]), radius).sum((1, 2))
    assert (area / (AREA[name] * radius.square())).tolist() == pytest.approx([1.0, 1.0], abs=0.04)


def test_scenes_obey_their_prompts():
    batch = [m for m in PROMPTS.values() if m["tag"] in ("position", "counting")] * 3
    scenes = sample_scenes(batch, generator())
    for row, m in enumerate(batch):
        used = int((scenes.shape[row] >= 0).sum())
        assert used == sum(item["count"] for item in m["include"])
        color = scenes.color[row, :used].tolist()
        if m["tag"] == "counting":
            assert len(set(color)) == 1
            assert m["include"][0].get("color", list(COLORS)[color[0]]) == list(COLORS)[color[0]]
            continue
        dx, dy = ((c[row, 1] - c[row, 0]).item() for c in (scenes.cx, scenes.cy))
        relation = m["include"][1]["position"][0]
        along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
        assert abs(along) > AXIS_RATIO * abs(across)
        assert (along > 0) == (relation in ("right of", "below"))


def test_objects_neither_touch_nor_leave_the_picture():
    batch = [m for m in PROMPTS.values() if m["tag"] == "counting"] * 4
    scenes = sample_scenes(batch, generator())
    used = scenes.shape >= 0
    for centre in (scenes.cx, scenes.cy):
        assert (((centre - scenes.r > 0) & (centre + scenes.r < SIZE)) | ~used).all()
    for i, j in combinations(range(4), 2):
        distance = torch.hypot(scenes.cx[:, i] - scenes.cx[:, j], scenes.cy[:, i] - scenes.cy[:, j])
        assert ((distance > scenes.r[:, i] + scenes.r[:, j] + 1) | ~(used[:, i] & used[:, j])).all()


def test_colours_jitter_around_their_hue_and_never_meet(clean):
    batch, regions, _ = clean
    hues: dict[str, list[float]] = {color: [] for color in COLORS}
    for m, found in zip(batch, regions, strict=True):
        if m["tag"] == "colors":
            hues[m["include"][0]["color"]].append((found[0].hue - COLORS[m["include"][0]["color"]] + 180) % 360 - 180)
    spread = {color: (min(off), max(off)) for color, off in hues.items()}
    assert all(-10 < low < -5 and 5 < high < 10 for low, high in spread.values()), spread
    order = sorted(COLORS.values())
    assert min(b - a for a, b in pairwise([*order, order[0] + 360])) > 2 * 20


# --- judge on clean renders ---------------------------------------------------------------------------------------


def test_three_thousand_clean_renders_are_all_correct(clean):
    batch, _, verdicts = clean
    wrong = [(m["prompt"], v.reason) for m, v in zip(batch, verdicts, strict=True) if not v.correct]
    assert not wrong
    assert all(v.strict for v in verdicts)
    assert min(v.graded for v in verdicts) > 0.95


def test_a_render_of_another_prompt_is_mostly_wrong(clean):
    """The floor that a score is read against: .03 to .12 correct, and less credit than for the right prompt."""
    batch, regions, right = clean
    order = torch.randperm(len(batch), generator=generator(5)).tolist()
    shown = [i for i in range(len(batch)) if batch[order[i]]["prompt"] != batch[i]["prompt"]]
    wrong = [verdict(batch[order[i]], regions[i]) for i in shown]
    assert 0.03 < sum(v.correct for v in wrong) / len(wrong) < 0.12
    assert sum(v.strict for v in wrong) <= sum(v.correct for v in wrong)
    assert all(0 <= v.graded <= 1 for v in wrong)
    assert all(right[i].graded >= v.graded for i, v in zip(shown, wrong, strict=True))
    assert sum(v.graded for v in wrong) / len(wrong) < 0.6


def test_regions_are_where_the_objects_are(clean):
    batch, regions, _ = clean
    assert [len(r) for r in regions] == [sum(item["count"] for item in m["include"]) for m in batch]
    image = scene(("ring", "blue", 8.0, 10.0, 6.0), ("square", "red", 23.0, 22.0, 6.0))
    found = {r.shape: r for r in find_regions(image)[0]}
    assert found["ring"].color == "blue"
    assert found["square"].color == "red"
    assert found["ring"].center == pytest.approx((8.0, 10.0), abs=0.6)
    assert found["square"].center == pytest.approx((23.0, 22.0), abs=0.6)
    assert found["ring"].area == pytest.approx(AREA["ring"] * 36, rel=0.1)


# --- judge on mistakes --------------------------------------------------------------------------------------------

TWO = (("circle", "red", 8.0, 8.0, 5.5), ("cross", "green", 24.0, 23.0, 5.5))


def test_an_extra_object_is_correct_but_not_strict():
    alone, more = judged(scene(TWO[0]), "a circle"), judged(scene(*TWO), "a circle")
    assert (alone.correct, alone.strict) == (True, True)
    assert (more.correct, more.strict) == (True, False)
    assert more.graded == pytest.approx(alone.graded / 1.25, rel=1e-3)


def test_a_missing_object_is_wrong():
    found = judged(scene(TWO[0]), "a circle and a cross")
    assert not found.correct
    assert found.reason == "expected cross>=1, found 0"
    assert 0.3 < found.graded < judged(scene(*TWO), "a circle and a cross").graded


def test_a_wrong_shape_is_wrong():
    assert judged(scene(TWO[1]), "a cross").correct
    for other in set(SHAPES) - {"cross"}:
        found = judged(scene(TWO[1]), f"a {other}")
        assert not found.correct
        assert found.graded < 0.75


def test_a_wrong_colour_is_wrong():
    right, wrong = (judged(scene(TWO[1]), f"a {color} cross") for color in ("green", "purple"))
    assert (right.correct, wrong.correct) == (True, False)
    assert wrong.reason == "expected purple cross>=1, found 0 purple; and 1 green"
    assert right.graded - wrong.graded > 0.4


def test_swapped_colours_are_wrong():
    image = scene(*TWO)
    right, swapped = (judged(image, f"a {a} circle and a {b} cross") for a, b in (("red", "green"), ("green", "red")))
    assert (right.correct, swapped.correct) == (True, False)
    assert swapped.graded < right.graded - 0.2


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_wrong_relation_is_wrong(relation):
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    image = scene(
        ("ring", "yellow", 16.0 + 8 * dx, 16.0 + 8 * dy, 6.0), ("triangle", "cyan", 16.0 - 8 * dx, 16.0 - 8 * dy, 6.0)
    )
    grades = {}
    for asked in RELATIONS:
        found = judged(image, f"a ring {asked} a triangle")
        assert found.correct == found.strict == (asked == relation)
        grades[asked] = found.graded
    assert max(grades, key=grades.__getitem__) == relation
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert min(grades, key=grades.__getitem__) == opposite
    assert judged(image, f"a triangle {opposite} a ring").correct


@pytest.mark.parametrize("drawn", [2, 3, 4])
def test_a_count_off_by_one_is_wrong(drawn):
    places = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]
    image = scene(*[("square", "blue", *place, 4.6) for place in places[:drawn]])
    grades = {}
    for word, n in (("two", 2), ("three", 3), ("four", 4)):
        for text in (f"{word} squares", f"{word} blue squares"):
            found = judged(image, text)
            assert found.correct == found.strict == (n == drawn), text
            grades[n] = found.graded
        assert not judged(image, f"{word} red squares").correct
    assert max(grades, key=grades.__getitem__) == drawn


def test_a_malformed_object_does_not_count():
    image = scene(("circle", "red", 16.0, 16.0, 8.0))
    assert judged(image, "a circle").correct
    bitten = image.clone()
    bitten[:, :, :, 14:19] = 0.5  # a grey bar: two slivers are left
    found = judged(bitten, "a circle")
    assert not found.correct
    assert len(find_regions(bitten)[0]) == 2
    assert not any(r.is_object for r in find_regions(bitten)[0])


def test_a_malformed_object_beside_a_good_one_is_correct_but_not_strict():
    image = scene(TWO[0])
    image[:, :, 25:27, 4:28] = torch.tensor([0.1, 0.8, 0.1])[:, None, None]  # a green stroke
    found = judged(image, "a red circle")
    assert (found.correct, found.strict) == (True, False)
    assert found.graded < 0.85


def test_a_speck_is_noise():
    image = scene(TWO[0])
    image[:, :, 28, 28] = torch.tensor([0.0, 0.9, 0.0])
    assert judged(image, "a red circle").strict


def test_nothing_is_no_object():
    blank = torch.full((2, 3, SIZE, SIZE), 0.5)
    assert find_regions(blank) == [[], []]
    found = judge(blank, [metadata("a circle"), metadata("a ring above a cross")])
    assert [(v.correct, v.strict, v.graded) for v in found] == [(False, False, 0.0)] * 2
    with pytest.raises(ValueError, match=r"reads \(B, 3, 32, 32\) images, got \(1, 3, 64, 64\)"):
        find_regions(torch.zeros(1, 3, 64, 64))


def test_an_image_is_judged_alone():
    batch = [PROMPTS[p] for p in list(PROMPTS)[5:800:53]]
    images = render_prompts(batch, generator(6))
    together = judge(images, batch)
    alone = [judge(image[None], [m])[0] for image, m in zip(images, batch, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert (a.correct, a.strict, a.reason) == (b.correct, b.strict, b.reason)
        assert math.isclose(a.graded, b.graded, abs_tol=1e-5)


def test_credit_falls_with_noise():
    batch = [m for m in PROMPTS.values() if m["tag"] == "two_object"]
    images = render_prompts(batch, generator(7))
    noise = torch.randn(images.shape, generator=generator(8))
    grades = []
    for level in (0.0, 0.15, 0.4):
        found = judge((images + level * noise).clamp(0, 1), batch)
        grades.append(sum(v.graded for v in found) / len(found))
    assert grades[0] > grades[1] > grades[2]


def test_images_saved_as_bytes_are_judged_alike(clean):
    batch, _, _ = clean
    some = batch[::100]
    images = render_prompts(some, generator(9))
    rounded = (images * 255).round() / 255
    assert all(v.strict for v in judge(rounded, some))
