"""What a picture keeps of its condition: each metric by hand, and with real extractors from file to label."""

import numpy as np
import pytest
import torch
from diffalign.scorers import controllability
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from diffalign.errors import UserError
from diffalign.extractors import load_extractor
from diffalign.extractors.segmentation import PALETTE
from diffalign.records import Candidate, Record
from diffalign.scoring import Failure, Outcome, Sample, Score, load_scorer, score_records


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Scores a condition against a picture that is its own condition."""
    monkeypatch.setattr(controllability, "load_extractor", lambda name, **params: list)

    def run(metric: str, condition: Image.Image, picture: Image.Image, **params) -> Outcome:
        condition.save(tmp_path / "condition.png")
        sample = Sample("", picture, condition=tmp_path / "condition.png")
        [outcome] = load_scorer("controllability", metric=metric, **params)([sample])
        return outcome

    return run


def value(outcome: Outcome) -> float:
    assert isinstance(outcome, Score), outcome
    return outcome.value


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def colored(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([PALETTE, np.zeros((1, 3), np.uint8)])[ids])


def texture(side: int, seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((side, side)), 3)
    return np.round(255 * (noise - noise.min()) / np.ptp(noise))


class TestF1:
    def test_by_hand(self, compare):
        condition, picture = np.zeros((8, 8)), np.zeros((8, 8))
        condition[2, :6] = 255
        picture[2, 2:] = 255  # 4 of 6 and 6
        picture[5, :4] = 255  # 4 more
        found = value(compare("f1", grey(condition), grey(picture)))
        precision, recall = 4 / 10, 4 / 6
        assert found == pytest.approx(2 * precision * recall / (precision + recall))
        assert value(compare("f1", grey(condition), grey(condition))) == 1
        assert value(compare("f1", grey(0 * condition), grey(0 * condition))) == 0


class TestMIoU:
    def test_by_hand(self, compare):
        truth = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [-1, -1, -1, -1]])
        read = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [2, 2, 9, 9], [0, 1, 2, 3]])
        outcome = compare("miou", colored(truth), colored(read))
        assert value(outcome) == pytest.approx((2 / 4 + 4 / 6 + 2 / 4 + 0 / 2) / 4)
        both = {"0": [2, 4], "1": [4, 6], "2": [2, 4], "9": [0, 2]}
        assert outcome.detail == {"intersection_and_union": both}

    def test_the_same_is_1(self, compare):
        ids = np.random.default_rng(0).integers(0, 150, (20, 20))
        assert value(compare("miou", colored(ids), colored(ids))) == 1

    def test_a_condition_without_classes(self, compare):
        empty = compare("miou", colored(np.full((4, 4), -1)), colored(np.zeros((4, 4), int)))
        assert empty == Failure("input", "the condition has no pixel with a class")


class TestRMSE:
    def test_is_negative_in_grey_levels(self, compare):
        rng = np.random.default_rng(0)
        one, other = rng.integers(0, 256, (2, 16, 24))
        expected = -np.sqrt(((one - other) ** 2).mean())
        assert value(compare("rmse", grey(one), grey(other))) == pytest.approx(expected)
        assert value(compare("rmse", grey(np.zeros((4, 4))), grey(np.full((4, 4), 255)))) == -255


def multi_scale(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2003) on scipy's filters; the last scale is scikit-image's SSIM."""
    total = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))

        def blur(x):
            return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

        covariance = blur(a * b) - blur(a) * blur(b)
        variances = blur(a * a) - blur(a) ** 2 + blur(b * b) - blur(b) ** 2
        term = ((2 * covariance + 9e-4) / (variances + 9e-4)).mean()
        if scale == 4:
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
            term = structural_similarity(a, b, **options)
        total *= max(term, 0) ** weight
    return total


class TestSSIM:
    def test_is_multi_scale(self, compare):
        one = texture(192, 0)
        for other in (texture(192, 1), np.clip(one + 20 * texture(192, 2) / 255, 0, 255).round(), one[::-1]):
            expected = multi_scale(one / 255, other / 255)
            assert value(compare("ssim", grey(one), grey(other))) == pytest.approx(expected, abs=1e-9)
        assert value(compare("ssim", grey(one), grey(one))) == pytest.approx(1)

    def test_the_negative_has_none_left(self, compare):
        one = texture(176, 0)
        assert value(compare("ssim", grey(one), grey(255 - one))) == 0

    def test_small_pictures_are_failures(self, compare):
        outcome = compare("ssim", grey(texture(175, 0)), grey(texture(175, 0)), extractor="lineart")
        assert isinstance(outcome, Failure)
        assert "176 pixels a side" in outcome.reason


class TestConditions:
    def test_are_scaled_to_the_picture(self, compare):
        condition = np.zeros((16, 16))
        condition[4:8] = 255
        assert value(compare("f1", grey(condition), grey(np.repeat(np.repeat(condition, 2, 0), 2, 1)))) == 1
        assert value(compare("f1", grey(condition), grey(condition[::2, ::2]))) == 1

    def test_of_another_shape_are_failures(self, compare):
        outcome = compare("f1", grey(np.zeros((16, 16))), grey(np.zeros((16, 24))))
        assert outcome == Failure("input", "a condition of 16x16 for a picture of 24x16")

    def test_that_are_missing_are_failures(self, tmp_path):
        (tmp_path / "broken.png").write_text("no picture")
        image = Image.new("RGB", (32, 32))
        samples = [Sample("", image), *(Sample("", image, condition=tmp_path / n) for n in ("broken.png", "gone.png"))]
        reasons = [str(outcome) for outcome in load_scorer("controllability")(samples)]
        assert "no condition" in reasons[0]
        assert "not an image" in reasons[1]
        assert "no such image" in reasons[2]


def test_a_record_from_file_to_label(tmp_path):
    """A picture of the edges it was made from beats another one, and is perfect if they were read off itself."""
    pictures = []
    for seed in range(2):
        canvas = np.full((64, 64), 60.0)
        x, y = np.random.default_rng(seed).integers(8, 30, 2)
        canvas[x : x + 24, y : y + 24] = 200
        pictures.append(grey(canvas))
        pictures[-1].save(tmp_path / f"{seed}.png")
    load_extractor("canny")(pictures)[0].save(tmp_path / "edges.png")
    candidates = [Candidate(sample=f"{seed}.png") for seed in range(2)]
    record = Record(id="a", prompt="a square", condition="edges.png", candidates=candidates)
    [scored] = score_records([record], tmp_path, {"keeps": load_scorer("controllability")}, batch=4)
    first, second = (candidate.labels["keeps"] for candidate in scored.candidates)
    assert first == 1.0
    assert isinstance(second, float)
    assert second < 0.5


def test_with_a_network(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    torch.manual_seed(0)
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    net = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=150))
    net.save_pretrained(tmp_path / "net")
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "net")
    params = {"path": str(tmp_path / "net"), "device": "cpu"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    load_extractor("segmentation", **params)([image])[0].save(tmp_path / "condition.png")
    scorer = load_scorer("controllability", metric="miou", params=params)
    blank = Sample("", Image.new("RGB", (48, 48)), condition=tmp_path / "condition.png")
    same, other = scorer([Sample("", image, condition=tmp_path / "condition.png"), blank])
    assert value(same) == 1
    assert value(other) < 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"metric": "psnr"}, "choose f1, miou, rmse, ssim"),
        ({"metric": "ssim", "extractor": "canny"}, "is for hed and lineart, not for 'canny'"),
        ({"metric": "rmse"}, "missing parameter 'path'"),
        ({"params": {"lo": 1}}, "unknown parameter 'lo'"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(UserError, match=message):
        load_scorer("controllability", **params)
