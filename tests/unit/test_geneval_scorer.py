"""The GenEval judge as a whole: two stand-in networks that see plain colours, everything between them real."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffalign.scorers import _clip, _mask2former
from diffalign.scorers._clip import open_clip_encoder
from diffalign.scorers._colors import Colors, Cutout
from diffalign.scorers._loading import place
from diffalign.scorers._mask2former_images import MEAN, STD
from PIL import Image, ImageDraw

from diffalign import records as store
from diffalign.errors import UserError
from diffalign.geneval import CLASSES, COLORS
from diffalign.geneval_layout import read_layout, summary, write_layout
from diffalign.scoring import Failure, Sample, Score, load_scorer, score_records

RGB = {"red": (255, 0, 0), "yellow": (255, 255, 0), "blue": (0, 0, 255)}


class Painter(torch.nn.Module):
    """A dog wherever there is red, a second dog in the right half of it, a cat wherever there is blue."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        b, w = len(images), images.shape[3]
        pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        small = torch.nn.functional.avg_pool2d(pixels, 4)
        red, blue = small[:, 0] > 200, small[:, 2] > 200
        right = red & (torch.arange(w // 4) >= w // 8)
        masks = torch.stack([red & ~right, right, blue], 1) * 60.0 - 30
        classes = torch.full((b, 3, 81), -20.0)
        for query, (name, logit) in enumerate((("dog", 9.0), ("dog", 0.5), ("cat", 9.0))):
            classes[:, query, CLASSES.index(name)] = logit  # with the no-object logit 0: nearly 1, .62, nearly 1
            classes[:, query, 80] = 0
        return classes, masks


class Words:
    """An encoder whose space is RGB: a text lies at its colour word, a picture at the mean of what is not grey."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def texts(self, prompts, batch):
        self.seen += prompts
        names = [next(c for c in COLORS if f" {c}" in prompt) for prompt in prompts]
        return F.normalize(torch.tensor([RGB.get(name, (1, 1, 1)) for name in names]).float(), dim=-1)

    def images(self, images, batch):
        pixels = (np.asarray(picture, dtype=np.float32).reshape(-1, 3) for picture in images)
        return F.normalize(torch.stack([torch.from_numpy(p[(p != 0x99).any(1)].mean(0)) for p in pixels]), dim=-1)


@pytest.fixture
def words(monkeypatch, tmp_path) -> Words:
    words = Words()
    monkeypatch.setattr(_mask2former, "load", lambda path: Painter())
    monkeypatch.setattr(_clip, "open_clip_encoder", lambda model, weights, where: words)
    return words


@pytest.fixture
def judge(words, tmp_path):
    (tmp_path / "net.pth").touch()
    return lambda **params: load_scorer("geneval", checkpoint=str(tmp_path / "net.pth"), device="cpu", **params)


def drawn(*patches: tuple[str, int, int], size=(64, 64)) -> Image.Image:
    """Squares of 16 pixels on black: colour, left, top."""
    image = Image.new("RGB", size)
    for color, x, y in patches:
        ImageDraw.Draw(image).rectangle((x, y, x + 15, y + 15), RGB[color])
    return image


def sample(image: Image.Image, tag: str, *include: dict, **more) -> Sample:
    return Sample("a photo", image, meta={"tag": tag, "include": list(include), "prompt": "a photo", **more})


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
LEFT, RIGHT, BLUE = ("red", 8, 8), ("red", 40, 8), ("blue", 8, 40)


def test_scores_come_with_reasons_and_detections(judge):
    right, wrong = judge()(
        [sample(drawn(LEFT, BLUE), "two_object", DOG, CAT), sample(drawn(LEFT), "two_object", DOG, CAT)]
    )
    assert right.value == 1.0
    assert right.detail["reason"] == ""
    assert list(right.detail["detections"]) == ["cat", "dog"]  # COCO's order
    x1, y1, x2, y2, score = right.detail["detections"]["dog"][0]
    assert (x1, y1, x2, y2) == (8, 8, 24, 24)
    assert score == pytest.approx(1.0, abs=1e-3)
    assert wrong == Score(0.0, detail={"reason": "expected cat>=1, found 0", "detections": wrong.detail["detections"]})
    assert list(wrong.detail["detections"]) == ["dog"]
    json.dumps(right.detail)


def test_counting_has_a_threshold_of_its_own(judge):
    """The second dog has a score of .62."""
    image, two = drawn(LEFT, RIGHT), {"class": "dog", "count": 2}
    samples = [sample(image, "two_object", two), sample(image, "counting", two)]
    assert [score.value for score in judge()(samples)] == [1.0, 0.0]
    assert [score.value for score in judge(counting_threshold=0.5)(samples)] == [1.0, 1.0]
    assert [score.value for score in judge(threshold=0.7)(samples)] == [0.0, 0.0]


def test_colours_are_asked_only_of_the_objects_that_matter(judge, words):
    scorer = judge()
    image = drawn(("yellow", 8, 8), RIGHT, BLUE)
    scorer([sample(image, "two_object", DOG, CAT), sample(drawn(BLUE), "colors", {**DOG, "color": "red"})])
    assert words.seen == []
    red, yellow = (sample(image, "colors", {**DOG, "color": color}) for color in ("red", "yellow"))
    found = scorer([red, yellow])
    assert [score.value for score in found] == [0.0, 1.0]
    assert found[0].detail["reason"] == "expected red dog>=1, found 0 red; and 1 yellow"
    assert len(words.seen) == 30
    scorer([red, sample(image, "color_attr", {**DOG, "color": "yellow"}, {**CAT, "color": "blue"})])
    assert len(words.seen) == 60  # the words of a class are encoded once


def test_the_rules_are_three(judge):
    image = drawn(LEFT, RIGHT, BLUE)
    below = {"class": "cat", "count": 1, "position": ["below", 0]}
    samples = [sample(image, "position", DOG, below), sample(image, "colors", {**DOG, "color": "red"})]
    assert [score.value for score in judge()(samples)] == [1.0, 1.0]
    strict = judge(rules="strict")(samples)
    assert [score.value for score in strict] == [0.0, 0.0]
    assert strict[0].detail["reason"] == "expected dog==1, found 2\nno target for cat to be below"
    assert [score.value for score in judge(rules="soft")(samples)] == pytest.approx([(0 + 1 + 0) / 3, 0.0])
    two = sample(image, "colors", {"class": "dog", "count": 2, "color": "red"})
    assert [judge(rules=rules)([two])[0].value for rules in ("strict", "soft")] == [1.0, 1.0]


def test_sizes_and_orders_do_not_mix(judge):
    images = [drawn(LEFT), drawn(BLUE, size=(96, 64)), drawn(BLUE), drawn(LEFT, size=(96, 64)), drawn(LEFT)]
    scores = judge(batch=2)([sample(image, "single_object", DOG) for image in images])
    assert [score.value for score in scores] == [1, 0, 0, 1, 1]


def test_an_item_without_sound_metadata_fails_alone(judge):
    good = sample(drawn(LEFT), "single_object", DOG)
    bad = sample(drawn(LEFT), "single_object", {"class": "mouse", "count": 1})
    found = judge()([bad, good, Sample("a photo", drawn(LEFT))])
    assert found[1].value == 1.0
    assert [type(outcome) for outcome in found] == [Failure, Score, Failure]
    assert str(found[2]) == "input: the record's meta is not GenEval's: `tag` must be a text such as counting"
    assert "include.0: `class` must be one of person, bicycle" in found[0].reason


def test_scored_records_become_the_benchmarks_results(judge, tmp_path):
    """From a folder of GenEval's images through the judge back to one, and its summary."""
    for name, image in (("a", drawn(LEFT)), ("b", drawn(BLUE)), ("c", drawn(LEFT, BLUE))):
        image.save(tmp_path / f"{name}.png")
    one, two = (
        sample(drawn(), tag, *include).meta for tag, include in (("single_object", [DOG]), ("two_object", [DOG, CAT]))
    )
    records = [
        store.Record(
            id=str(i), prompt="a photo", meta=dict(meta), candidates=[store.Candidate(sample=f"{n}.png") for n in names]
        )
        for i, (meta, names) in enumerate(((one, "ab"), (two, "bac")))
    ]
    scored = score_records(records, tmp_path, {"geneval": judge()}, batch=2)
    store.write(tmp_path / "scored.jsonl", scored)
    write_layout(tmp_path / "scored.jsonl", tmp_path / "out", "geneval")
    found = summary(tmp_path / "out/results.jsonl")
    assert {tag: task["correct"] for tag, task in found["tasks"].items()} == {"single_object": 1, "two_object": 1}
    assert found["overall"] == round((1 / 2 + 1 / 3) / 2, 5)
    last = json.loads((tmp_path / "out/results.jsonl").read_text("utf-8").splitlines()[3])
    assert last["reason"] == "expected cat>=1, found 0"
    assert json.loads(last["details"])["dog"][0][:4] == [8.0, 8.0, 24.0, 24.0]
    again = list(score_records(read_layout(tmp_path / "out"), tmp_path / "out", {"geneval": judge()}, batch=4))
    before = list(store.read(tmp_path / "scored.jsonl"))
    assert [[c.labels for c in r.candidates] for r in again] == [[c.labels for c in r.candidates] for r in before]
    assert [r.meta for r in again] == [r.meta for r in before]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"rules": "lenient"}, "rules 'lenient': choose official, soft, strict"),
        ({"dtype": "int8"}, "dtype 'int8': choose fp32"),
        ({"threshold": 1.0}, r"threshold 1\.0: must be in \[0, 1\)"),
        ({"batch": 0}, "batch 0: expected a positive integer"),
        ({"checkpoint": "missing.pth"}, r"checkpoint: no file missing\.pth"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_loaded(tmp_path, params, error):
    (tmp_path / "net.pth").touch()
    with pytest.raises(UserError, match=error):
        load_scorer("geneval", **{"checkpoint": str(tmp_path / "net.pth"), **params})


# --- colours ------------------------------------------------------------------------------------------------------


def test_a_cutout_is_the_object_alone_on_grey():
    image = Image.new("RGB", (8, 6), (10, 20, 30))
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:6] = True
    mask[2, 4] = False
    picture = np.asarray(Cutout(image, mask, (3.0, 2.0, 6.0, 5.0), "dog").picture())
    assert picture.shape == (3, 3, 3)
    expected = np.full((3, 3, 3), 0x99)
    expected[:2] = (10, 20, 30)
    expected[0, 1] = 0x99
    assert np.array_equal(picture, expected)


def test_the_templates_are_averaged_after_normalising(words):
    colors = Colors(words)
    rows = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    asked = []
    words.texts = lambda prompts, batch: asked.extend(prompts) or rows
    weights = colors._classifier("dog")
    assert asked[3:6] == ["a photo of a orange dog", "a photo of a orange-colored dog", "a photo of a orange object"]
    mean = rows.reshape(10, 3, 5).mean(1)
    torch.testing.assert_close(weights, mean / mean.norm(dim=1, keepdim=True))


TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def test_colours_come_from_an_open_clip_model(tmp_path):
    import open_clip

    (tmp_path / "tiny-for-colors.json").write_text(json.dumps(TINY_CLIP), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-for-colors.json")
    made = open_clip.create_model("tiny-for-colors", pretrained=None)
    torch.save(made.state_dict(), tmp_path / "clip.pt")
    encoder = open_clip_encoder("tiny-for-colors", str(tmp_path / "clip.pt"), place("cpu", "fp32", 4))
    mask = np.zeros((40, 40), dtype=bool)
    mask[5:30, 5:30] = True
    cutouts = [Cutout(Image.new("RGB", (40, 40), rgb), mask, (5, 5, 30, 30), "dog") for rgb in RGB.values()]
    found = Colors(encoder)(cutouts * 7)  # more than one batch
    assert found == found[:3] * 7
    assert set(found) <= set(COLORS)
    assert Colors(encoder)([]) == []
