"""Scorers that ask a vision language model, against an endpoint that checks what it is asked."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import media
from diffalign.errors import UserError
from diffalign.records import Candidate, Record
from diffalign.scoring import Failure, Sample, Score, load_scorer, score_records

from .fake_endpoint import KEY, Asked, likely, says, serving


def shade(red: int) -> Image.Image:
    return Image.new("RGB", (16, 12), (red, 0, 0))


def brighter(asked: Asked) -> dict:
    """Prefers the redder of two pictures, or of two runs of frames."""
    half = len(asked.colors) // 2
    first, second = np.mean(asked.colors[:half]), np.mean(asked.colors[half:])
    near = abs(first - second) < 10
    return says(f"I see.\n**Verdict: {'tie' if near else 'first' if first > second else 'second'}**")


def clip(path, shades: list[int]):
    """A clip at 16 frames per second, one shade per frame."""
    frames = torch.tensor(shades).float().div(255)[None, :, None, None].expand(3, -1, 32, 32)
    media.write("video", path, frames)
    return path


class TestVqaScore:
    def build(self, endpoint, **params):
        return load_scorer("vqascore", base_url=endpoint.url, model="a-model", **params)

    def test_probability_of_yes(self, monkeypatch):
        monkeypatch.setenv("MY_KEY", KEY)
        with serving(lambda _: likely(Yes=-0.5, yes=-2.0, _YES=-3.0, No=-1.5, Maybe=-0.1)) as endpoint:
            scorer = self.build(endpoint, key_env="MY_KEY")
            [found] = scorer([Sample('a {red} "cat"', shade(200))])
        yes, no = math.exp(-0.5) + math.exp(-2.0) + math.exp(-3.0), math.exp(-1.5)
        assert found.value == pytest.approx(yes / (yes + no))
        [asked] = endpoint.asked
        assert asked.texts == ['Does this figure show "a {red} "cat""? Please answer yes or no.']
        assert asked.colors == [200]
        assert {key: asked.body[key] for key in ("max_tokens", "logprobs", "top_logprobs", "temperature")} == {
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "temperature": 0,
        }
        assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"

    def test_options_add_and_take_out(self):
        with serving(lambda _: likely(yes=-0.1, no=-3.0)) as endpoint:
            scorer = self.build(endpoint, options={"max_tokens": None, "max_completion_tokens": 4, "seed": 1})
            scorer([Sample("a", shade(0))])
        body = endpoint.asked[0].body
        assert (body["max_completion_tokens"], body["seed"], "max_tokens" in body) == (4, 1, False)

    def test_order_is_kept_by_many_workers(self):
        def reply(asked):
            time.sleep(0.02 if asked.colors[0] % 2 else 0)
            return likely(yes=math.log(asked.colors[0] / 100), no=math.log(1 - asked.colors[0] / 100))

        with serving(reply) as endpoint:
            found = self.build(endpoint)([Sample("a", shade(n)) for n in range(1, 40)])
        assert [one.value for one in found] == pytest.approx([n / 100 for n in range(1, 40)])

    def test_product_of_questions(self):
        values = {"a cat?": 0.9, "a dog?": 0.5}

        def reply(asked):
            [text] = asked.texts
            yes = values[text.removesuffix(" Please answer yes or no.")]
            return likely(yes=math.log(yes), no=math.log(1 - yes))

        with serving(reply) as endpoint:
            scorer = self.build(endpoint, metric="product")
            found = scorer([Sample("p", shade(0), meta={"questions": list(values)}), Sample("p", shade(0))])
        assert found[0].value == pytest.approx(0.45)
        assert found[0].detail["yes"] == pytest.approx([0.9, 0.5])
        assert found[1] == Failure("input", "meta.questions: metric 'product' needs a list of questions")

    @pytest.mark.parametrize(
        ("answers", "counted"),
        [
            ([1, 1, 1, 1], [1, 1, 1, 1]),
            ([0, 1, 1, 1], [0, 0, 0, 1]),  # what depends on a no is no, and what depends on that
            ([1, 0, 1, 0], [1, 0, 0, 0]),
            ([1, 1, 0, 1], [1, 1, 0, 1]),
        ],
    )
    def test_dpg(self, answers, counted):
        questions = ["q0", "q1", "q2", "q3"]
        meta = {"questions": questions, "dependency": [[], [0], [1], []]}

        def reply(asked):
            yes = answers[questions.index(asked.texts[0].split()[0])]
            return likely(yes=-0.1, no=-2.0) if yes else likely(yes=-2.0, no=-0.1)

        with serving(reply) as endpoint:
            [found] = self.build(endpoint, metric="dpg")([Sample("p", shade(0), meta=meta)])
        assert found.value == sum(counted) / 4
        assert found.detail["counted"] == [bool(one) for one in counted]

    @pytest.mark.parametrize("dependency", [None, [[]], [[], [2]], [[], ["0"]], [[], 0]])
    def test_dpg_without_its_dependencies(self, dependency):
        with serving(lambda _: likely(yes=0.0)) as endpoint:
            meta = {"questions": ["a", "b"], "dependency": dependency}
            [found] = self.build(endpoint, metric="dpg")([Sample("p", shade(0), meta=meta)])
        assert (found.kind, "meta.dependency" in found.reason) == ("input", True)
        assert not endpoint.asked

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            (says("Yes"), "top_logprobs"),
            (likely(Maybe=-0.1, Sure=-2.0), "neither yes nor no among the most likely tokens ['Maybe', 'Sure']"),
            (likely(yes=float("nan")), "neither yes nor no"),
            (b"{}", "not an answer"),
            (b"<html>", "not an answer"),
            (b'{"choices": []}', "not an answer"),
            (400, "400 Bad Request"),
        ],
    )
    def test_what_is_no_answer_is_no_score(self, reply, reason):
        with serving(lambda asked: reply if asked.colors == [1] else likely(yes=-1.0, no=-1.0)) as endpoint:
            found = self.build(endpoint)([Sample("a", shade(0)), Sample("a", shade(1))])
        assert found[0] == Score(0.5)
        assert found[1].kind == "remote"
        assert reason in found[1].reason

    def test_busy_servers_are_asked_again(self):
        replies = iter([429, 503, 500])

        with serving(lambda _: next(replies, likely(yes=-1.0, no=-1.0))) as endpoint:
            assert self.build(endpoint, workers=1)([Sample("a", shade(0))]) == [Score(0.5)]
        assert len(endpoint.asked) == 4

    def test_a_dead_server_costs_the_budget_once(self):
        with serving(lambda _: 503) as endpoint:
            started = time.monotonic()
            found = self.build(endpoint, budget=0.6, workers=2)([Sample("a", shade(0))] * 12)
        assert time.monotonic() - started < 2
        assert [one.kind for one in found] == ["remote"] * 12

    def test_a_refused_key_is_said(self):
        with serving(lambda _: 401) as endpoint, pytest.raises(UserError, match="refused: 401 Unauthorized"):
            self.build(endpoint)([Sample("a", shade(0))])

    @pytest.mark.parametrize(
        ("params", "reason"),
        [
            ({"metric": "mean"}, "choose prompt, product, dpg"),
            ({"instruction": "Is it good?"}, "needs {prompt} in it"),
            ({"metric": "dpg", "instruction": "{prompt}"}, "needs {question} in it"),
            ({"key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
            ({"base_url": "localhost:8000"}, "expected http"),
            ({"workers": 0}, "at least 1"),
            ({"budget": 0}, "above 0"),
        ],
    )
    def test_refusals(self, params, reason):
        with pytest.raises(UserError) as caught:
            load_scorer("vqascore", **{"base_url": "http://x/v1", "model": "a-model", **params})
        assert reason in str(caught.value)


class TestRating:
    def build(self, endpoint, **params):
        return load_scorer("vlm", base_url=endpoint.url, model="a-model", **params)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("Good.\nScore: 4", 0.75),
            ("Score: 2\nOn second thought:\n**Score:** 3.5/5", 0.625),
            ("5", 1.0),
            ("score 1.", 0.0),
        ],
    )
    def test_numbers(self, text, value):
        with serving(lambda _: says(text)) as endpoint:
            [found] = self.build(endpoint)([Sample("a {low} cat", shade(90))])
        assert found.value == value
        [asked] = endpoint.asked
        assert 'for this prompt: "a' in asked.texts[0]
        assert "from 1 to 5" in asked.texts[0]
        assert asked.colors == [90]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("Lovely.", "not an answer: 'Lovely.'"),
            ("Score: 7", "7 is not between 1 and 5"),
            ("The 3 cats are fine", "not an answer"),
            ("  ", "no text"),
        ],
    )
    def test_no_number_is_no_score(self, text, reason):
        with serving(lambda _: says(text)) as endpoint:
            [found] = self.build(endpoint)([Sample("a", text="hello")])
        assert found.kind == "remote"
        assert reason in found.reason
        assert endpoint.asked[0].texts[1] == "hello"

    def test_own_instruction_scale_and_pattern(self):
        with serving(lambda _: says("<s>30</s>")) as endpoint:
            scorer = self.build(endpoint, instruction="Rate {prompt}", scale=(0, 100), pattern=r"<s>(.*?)</s>")
            assert scorer([Sample("it", shade(0))]) == [Score(0.3, detail={"rating": 30.0})]
            endpoint.reply = lambda _: says("<s>many</s>")
            assert scorer([Sample("it", shade(0))]) == [Failure("remote", "not a number: 'many'")]
        assert endpoint.asked[0].texts == ["Rate it"]

    @pytest.mark.parametrize("params", [{"mode": "best"}, {"scale": (5, 1)}, {"pattern": "("}, {"pattern": "x"}])
    def test_refusals(self, params):
        with pytest.raises(UserError, match=r"choose|scale|pattern"):
            load_scorer("vlm", base_url="http://x/v1", model="a-model", **params)


class TestPairwise:
    def build(self, endpoint, **params):
        return load_scorer("vlm", base_url=endpoint.url, model="a-model", mode="pairwise", **params)

    def test_round_robin(self):
        with serving(brighter) as endpoint:
            found = self.build(endpoint)([Sample("p", shade(red)) for red in (100, 200, 105, 10)])
        assert [one.value for one in found] == pytest.approx([1.5 / 3, 1.0, 1.5 / 3, 0.0])
        orders = sorted(tuple(asked.colors) for asked in endpoint.asked)
        assert len(orders) == 12
        assert orders == sorted((b, a) for a, b in orders)  # every pair in both orders
        assert endpoint.asked[0].texts[1:] == ["First:", "Second:"]

    @pytest.mark.parametrize("side", ["first", "second"])
    def test_a_liking_for_a_place_gives_ties(self, side):
        with serving(lambda _: says(f"Verdict: {side}")) as endpoint:
            found = self.build(endpoint)([Sample("p", shade(red)) for red in (0, 100, 200)])
        assert found == [Score(0.5)] * 3

    def test_a_tie_in_one_order_is_a_tie(self):
        def reply(asked):
            return says("first" if asked.colors == [200, 100] else "tie")

        with serving(reply) as endpoint:
            assert self.build(endpoint)([Sample("p", shade(200)), Sample("p", shade(100))]) == [Score(0.5)] * 2

    def test_a_lost_comparison_costs_both_their_score(self):
        def reply(asked):
            return says("I cannot say") if 10 in asked.colors and 200 in asked.colors else brighter(asked)

        with serving(reply) as endpoint:
            found = self.build(endpoint)([Sample("p", shade(red)) for red in (10, 100, 200)])
        assert [one.kind if isinstance(one, Failure) else one.value for one in found] == ["remote", 0.5, "remote"]

    def test_records_are_compared_within(self, tmp_path):
        rows = []
        for n in range(3):
            for red in (50, 150):
                shade(red + n).save(tmp_path / f"{n}-{red}.png")
            made = [Candidate(sample=f"{n}-{red}.png") for red in (150, 50)]
            rows.append(Record(id=str(n), prompt="p", candidates=made))
        with serving(brighter) as endpoint:
            found = list(score_records(rows, tmp_path, {"win": self.build(endpoint)}, batch=64))
        assert [[c.labels["win"] for c in record.candidates] for record in found] == [[1.0, 0.0]] * 3

    def test_one_candidate(self):
        with serving(brighter) as endpoint:
            [found] = self.build(endpoint)([Sample("p", shade(0))])
        assert found.kind == "input"


class TestSegments:
    def build(self, endpoint, **params):
        return load_scorer("vlm", base_url=endpoint.url, model="a-model", mode="segments", **params)

    def test_a_verdict_per_second(self, tmp_path):
        first = clip(tmp_path / "a.mp4", [200] * 16 + [100] * 16 + [50] * 8)
        second = clip(tmp_path / "b.mp4", [100] * 16 + [100] * 16 + [150] * 8)
        with serving(brighter) as endpoint:
            found = self.build(endpoint)([Sample("p", video=first), Sample("p", video=second)])
        assert [one.units for one in found] == [(1.0, 0.5, 0.0), (0.0, 0.5, 1.0)]
        assert [one.value for one in found] == [0.5, 0.5]
        assert sorted(len(asked.pictures) for asked in endpoint.asked) == [8, 8, 16, 16, 16, 16]  # 8 fps of both
        assert all("same second of two clips" in asked.texts[0] for asked in endpoint.asked)

    @pytest.mark.parametrize("side", ["first", "second"])
    def test_a_liking_for_a_place_gives_ties(self, tmp_path, side):
        clips = [clip(tmp_path / f"{red}.mp4", [red] * 20) for red in (50, 200)]
        with serving(lambda _: says(f"Verdict: {side}")) as endpoint:
            found = self.build(endpoint, segment_seconds=0.5)([Sample("p", video=path) for path in clips])
        assert [one.units for one in found] == [(0.5, 0.5, 0.5)] * 2

    def test_clips_must_be_equally_long(self, tmp_path):
        clips = [clip(tmp_path / f"{frames}.mp4", [9] * frames) for frames in (16, 20)]
        with serving(brighter) as endpoint:
            found = self.build(endpoint)([Sample("p", video=path) for path in clips])
        assert [one.kind for one in found] == ["input"] * 2
        assert "[1, 2] segments" in found[0].reason


def test_frames_of_a_clip(tmp_path):
    clip(tmp_path / "a.mp4", [8 * n for n in range(24)])
    times = [time for time, _ in media.frames_at(tmp_path, "a.mp4", 8)]
    assert times == pytest.approx([n / 8 for n in range(12)])
    assert len(list(media.frames_at(tmp_path, "a.mp4", 100))) == 24
    odd = [(time, np.asarray(frame).mean()) for time, frame in media.frames_at(tmp_path, "a.mp4", 5)]
    assert [time for time, _ in odd] == pytest.approx([0, 4 / 16, 7 / 16, 10 / 16, 13 / 16, 16 / 16, 20 / 16, 23 / 16])
    assert [value for _, value in odd] == pytest.approx([8 * 16 * time for time, _ in odd], abs=4)
