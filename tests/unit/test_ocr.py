"""The text in a picture against the text its prompt asks for, read for real from rendered pictures."""

import random
import sys

import pytest
from diffalign.scorers import ocr
from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import UserError
from diffalign.scoring import Failure, Sample, Score, load_scorer

SIZE = (448, 256)


def picture(*lines: str) -> Image.Image:
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((30, 40 + 80 * number), line, fill="black", font=ImageFont.load_default(44))
    return image


def distance(a: str, b: str) -> int:
    """Levenshtein's distance by its recursion."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("ocr")


class TestReading:
    def test_a_sign(self, scorer, capfd):
        samples = [
            Sample('a sign that says "Hello World"', picture("Hello World")),
            Sample('a sign that says "HELLO WORLD", and "more"', picture("Hello", "World")),
            Sample('a sign that says "Hello"', picture("Hello World")),
            Sample('a sign that says "Coffee 24"', picture("Hello World")),
            Sample('a sign that says "Hello"', picture()),
        ]
        scores = scorer(samples)
        assert [score.value for score in scores[:3]] == [1.0, 1.0, 1.0]
        wrong = scores[3]
        assert wrong.detail == {"read": "Hello World", "target": "coffee24"}
        assert wrong.value == pytest.approx(1 - min(distance("helloworld", "coffee24"), 8) / 8)
        assert scores[4] == Score(0.0, detail={"read": "", "target": "hello"})
        assert capfd.readouterr() == ("", ""), "the reader keeps quiet"

    def test_one_wrong_letter(self, scorer):
        [score] = scorer([Sample('"Hallo World"', picture("Hello World"))])
        assert score.value == pytest.approx(0.9)

    def test_accuracy_is_all_or_nothing(self):
        exact = load_scorer("ocr", metric="accuracy")
        texts = ("Hello World", "Hello", "Hello World!")
        scores = exact([Sample(f'"{text}"', picture("Hello World")) for text in texts])
        assert [score.value for score in scores] == [1.0, 0.0, 0.0]


class TestTarget:
    def test_meta_comes_first(self, scorer):
        [score] = scorer([Sample('"Goodbye"', picture("Hello"), meta={"text": "Hello"})])
        assert score.value == 1.0

    @pytest.mark.parametrize("prompt", ["a sign", 'a "sign', 'a "" sign', 'a " " sign', "a 'sign'"])
    def test_none(self, scorer, prompt):
        [found] = scorer([Sample(prompt, picture("sign"))])
        assert isinstance(found, Failure)
        assert found.kind == "input"
        assert "double quotes" in found.reason


def test_the_reward_is_the_formula():
    rng = random.Random(0)
    for _ in range(500):
        read, target = ("".join(rng.choices("abcd", k=rng.randint(low, 9))) for low in (0, 1))
        expected = 1.0 if target in read else 1 - min(distance(read, target), len(target)) / len(target)
        assert ocr._similarity(read, target) == pytest.approx(expected)


def test_a_reader_that_fails_is_a_failure(monkeypatch, scorer):
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(ocr._Reader, "__call__", fail)
    assert scorer([Sample('"a"', picture("a"))]) == [Failure("RuntimeError", "no memory left")]


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="choose similarity, accuracy"):
        load_scorer("ocr", metric="distance")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"diffalign\[ocr\]"):
        load_scorer("ocr")([Sample('"a"', picture("a"))])
