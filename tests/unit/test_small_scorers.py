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
