"""Scorers that need no network: JPEG size and length."""

import io

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import UserError
from diffalign.scoring import Sample, Score, load_scorer


def picture(noise: float) -> Image.Image:
    pixels = 128 + noise * np.random.default_rng(0).standard_normal((64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class TestJpeg:
    def test_noise_compresses_badly(self):
        plain, noisy = load_scorer("jpeg")([Sample("", picture(0.0)), Sample("", picture(60.0))])
        assert noisy.value < plain.value < 0

    def test_is_the_size_of_the_file_in_kb(self):
        for quality in (30, 95):
            buffer = io.BytesIO()
            picture(20.0).save(buffer, format="JPEG", quality=quality)
            scorer = load_scorer("jpeg", metric="incompressibility", quality=quality)
            assert scorer([Sample("", picture(20.0))]) == [Score(len(buffer.getvalue()) / 1000)]

    @pytest.mark.parametrize("params", [{"metric": "size"}, {"quality": 0}, {"quality": 100}])
    def test_refusals(self, params):
        with pytest.raises(UserError, match="choose"):
            load_scorer("jpeg", **params)


class TestLength:
    def test_counts(self):
        samples = [Sample("", text="one two  three\n"), Sample("", text="")]
        assert load_scorer("length")(samples) == [Score(3.0), Score(0.0)]
        assert load_scorer("length", unit="characters")(samples) == [Score(15.0), Score(0.0)]
        assert load_scorer("length", target=2)(samples) == [Score(-1.0), Score(-2.0)]

    @pytest.mark.parametrize(
        ("params", "message"), [({"unit": "tokens"}, "choose words"), ({"target": -1}, "negative")]
    )
    def test_refusals(self, params, message):
        with pytest.raises(UserError, match=message):
            load_scorer("length", **params)


class TestPicture:
    def test_by_hand(self):
        half = np.zeros((4, 8, 3), np.uint8)
        half[:, 4:] = (255, 255, 255)
        grey, red = np.full((4, 4, 3), 51, np.uint8), np.tile(np.uint8([255, 51, 51]), (4, 4, 1))
        for metric, pixels, value in (
            ("brightness", half, 0.5),
            ("contrast", half, 0.5),
            ("brightness", grey, 0.2),
            ("saturation", grey, 0.0),
            ("saturation", red, 0.8),
            ("sharpness", grey, 0.0),
            ("high_frequency", grey, 0.0),
        ):
            (score,) = load_scorer("picture", metric=metric)([Sample("", Image.fromarray(pixels))])
            assert score.value == pytest.approx(value, abs=1e-12), metric

    def test_sharpness_is_the_variance_of_the_laplacian(self):
        step = np.zeros((5, 6, 3), np.uint8)
        step[:, 3:] = 10  # the Laplacian of a step is 10 on one side and -10 on the other, 0 elsewhere
        (score,) = load_scorer("picture")([Sample("", Image.fromarray(step))])
        assert score.value == pytest.approx(np.var([0, 10, -10, 0]))

    def test_a_fine_grid_is_all_high_frequency(self):
        grid = np.uint8(255 * (np.indices((8, 8)).sum(0) % 2))[..., None].repeat(3, -1)
        (score,) = load_scorer("picture", metric="high_frequency")([Sample("", Image.fromarray(grid))])
        assert score.value == pytest.approx(1.0)

    def test_refusals(self):
        with pytest.raises(UserError, match="choose brightness"):
            load_scorer("picture", metric="beauty")


class TestDiversity:
    PICTURES = tuple(Sample("", Image.fromarray(np.full((8, 8, 3), v, np.uint8))) for v in (0, 0, 51))

    def test_by_hand(self):
        scorer = load_scorer("diversity", side=2)
        assert scorer.together
        assert [s.value for s in scorer(self.PICTURES)] == pytest.approx([0.1, 0.1, 0.2])

    def test_variance_is_unbiased_in_the_mean(self):
        found = [s.value for s in load_scorer("diversity", metric="variance")(self.PICTURES)]
        assert np.mean(found) == pytest.approx(np.var([0, 0, 0.2], ddof=1))

    def test_a_single_sample_has_none(self):
        (failure,) = load_scorer("diversity")(self.PICTURES[:1])
        assert failure.kind == "input"
