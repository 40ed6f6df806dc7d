"""Scores that are made while the next samples are, and held-out rewards that stop a run."""

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign.errors import UserError
from diffalign.records import Record
from diffalign.scoring import Failure, Score
from diffalign.train.feedback import DEPTH, Scorers
from diffalign.train.watch import Watch
from diffalign.weights import Weights

RECORDS = [Record(id=f"{n:06d}", prompt=f"prompt {n}", meta={"n": n}) for n in range(8)]


class Pixels:
    """A family whose latents are pictures of one colour."""

    modality = "image"

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, None, None, None].expand(-1, 3, 2, 2) / 255


class Seen:
    """Scores a picture by its colour; waits for leave where it was given a gate; fails on some colours."""

    accepts = frozenset({"image"})

    def __init__(self, fails: tuple[int, ...] = (), gate: threading.Semaphore | None = None) -> None:
        self.fails, self.gate = fails, gate
        self.calls: list[list[tuple[str, int]]] = []
        self.threads: set[str] = set()

    def __call__(self, samples) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        self.calls.append([(s.prompt, s.meta["n"]) for s in samples])
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        values = [s.image.getpixel((0, 0))[0] for s in samples]
        return [Failure("input", "bad") if v in self.fails else Score(float(v)) for v in values]


def scorers(**by_label: Any) -> Scorers:
    failures = by_label.pop("failures", 0.05)
    return Scorers(Pixels(), by_label, Path("."), failures)


class TestScorers:
    def test_scores_of_all_batches_in_order(self):
        one, two = Seen(), Seen(fails=(30,))
        feedback = scorers(one=one, two=two)
        for start in range(0, 6, 2):
            feedback.submit(RECORDS[start : start + 2], torch.tensor([10.0 * start, 10.0 * start + 10]))
        found = feedback.collect()
        assert found[:, 0].tolist() == [0, 10, 20, 30, 40, 50]
        assert found[:, 1].isnan().tolist() == [False, False, False, True, False, False]
        assert one.calls == [[(f"prompt {n}", n), (f"prompt {n + 1}", n + 1)] for n in range(0, 6, 2)]
        assert all(name.startswith("score") for name in one.threads)
        assert feedback.seconds["score"] > 0
        assert feedback.collect().shape == (0, 2), "nothing is told twice"

    def test_sampling_goes_on_while_scores_are_made_but_not_far_ahead(self):
        gate = threading.Semaphore(0)
        slow = Seen(gate=gate)
        feedback = scorers(slow=slow)
        submitted: list[int] = []

        def sample() -> None:
            for n in range(5):
                feedback.submit(RECORDS[n : n + 1], torch.tensor([float(n)]))
                submitted.append(n)

        sampler = threading.Thread(target=sample)
        sampler.start()
        deadline = time.monotonic() + 30
        for allowed in range(5 - DEPTH):
            while len(submitted) < DEPTH + allowed:  # without any score of these
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(submitted) == DEPTH + allowed, "the next one has to wait"
            assert len(slow.calls) == allowed + 1
            gate.release()
        for _ in range(DEPTH):
            gate.release()
        sampler.join(30)
        assert feedback.collect()[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert feedback.seconds["wait"] > 0

    def test_too_many_failures_stop_the_run(self):
        few, many = scorers(one=Seen(), two=Seen(fails=(0, 1))), scorers(one=Seen(), two=Seen(fails=(0, 1, 2)))
        for feedback in (few, many):
            feedback.submit(RECORDS, torch.arange(8.0))
        assert int(few.collect().isnan().sum()) == 2
        with pytest.raises(UserError, match=r"failed on 3 of 16 scores \(`failures: 0\.05`\): input: bad"):
            many.collect()
        every = scorers(one=Seen(fails=tuple(range(8))), failures=1.0)
        every.submit(RECORDS, torch.arange(8.0))
        assert every.collect().isnan().all()

    def test_a_scorer_that_cannot_read_pictures_stops_the_run(self):
        text = Seen()
        text.accepts = frozenset({"text"})
        feedback = scorers(words=text)
        feedback.submit(RECORDS[:1], torch.zeros(1))
        with pytest.raises(UserError, match="scorer 'words' reads text"):
            feedback.collect()

    def test_a_scorer_that_compares_is_refused(self):
        together: Any = Seen()
        together.together = True
        with pytest.raises(UserError, match="'ranks' compares all samples of a prompt"):
            scorers(ranks=together)


def outcomes(value: float) -> dict[str, dict[str, list[float]]]:
    """Twenty prompts with small differences of their own."""
    return {"all": {f"prompt {n}": [value + 0.01 * math.sin(n)] for n in range(20)}}


class Measured(Watch):
    """Told what it measures: (trained, held out) at every step."""

    def __init__(self, folder: Path, curve: dict[int, tuple[float, float]]) -> None:
        net = torch.nn.Linear(2, 1)
        self.weights = Weights(net, lora=False, copies=("evaluation",))
        run = SimpleNamespace(folder=folder, is_main=True, device=torch.device("cpu"))
        core: Any = SimpleNamespace(run=run, weights=self.weights)
        stop = cfg.StopConfig(
            prompts=cfg.PromptsConfig(source="shapes:heldout"), scorers=[cfg.ScorerConfig(name="picture")], every=2
        )
        online = cfg.OnlineConfig(groups=1, samples=2, scorers=[cfg.ScorerConfig(name="jpeg")])
        super().__init__(core, stop, online, {"jpeg": Seen()})
        self.curve, self.step = curve, 0

    def _measure(self) -> dict[str, Any]:
        trained, held_out = self.curve[self.step]
        return {"trained": outcomes(trained), "jpeg": outcomes(trained), "picture": outcomes(held_out)}

    def at(self, step: int) -> bool:
        """Train until a step, which the weights say, and measure."""
        self.step = step
        for parameter in self.weights.trainable():
            torch.nn.init.constant_(parameter, step)
        self.weights.refresh("evaluation", 0.0)
        return self.says_stop(step)

    def weight(self) -> float:
        (value,) = {float(v.max()) for v in self.weights.state_dict().values()}
        return value


CURVE = {0: (0.0, 0.0), 2: (1.0, 1.0), 4: (2.0, 2.0), 6: (3.0, 1.0), 8: (4.0, 3.0)}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "held_out.jsonl").read_text().splitlines()]


class TestWatch:
    def test_stops_where_held_out_rewards_fall_and_goes_back_to_the_best(self, tmp_path):
        watch = Measured(tmp_path, CURVE)
        assert [index for index in range(5) if watch.due(index)] == [0, 2, 4]
        assert [watch.at(step) for step in (0, 2, 4)] == [False] * 3
        assert watch.weight() == 4.0
        assert watch.at(6)
        assert watch.weight() == 4.0, "the policy and its averages are those of the best measurement"
        assert steps(tmp_path) == [0, 2, 4, 6]
        assert [path.name for path in tmp_path.glob("best-*")] == ["best-000004.safetensors"]

    def test_both_falling_is_no_reason(self, tmp_path):
        watch = Measured(tmp_path, {0: (1.0, 1.0), 2: (0.5, 0.5)})
        assert not watch.at(0)
        assert not watch.at(2)
        assert watch.weight() == 2.0

    def test_goes_on_from_a_checkpoint_with_what_was_known_there(self, tmp_path):
        (tmp_path / "checkpoint-000002").mkdir()
        watch = Measured(tmp_path, CURVE)
        for step in (0, 2, 4):
            watch.at(step)
        again = Measured(tmp_path, {**CURVE, 2: (1.0, -1.0)})  # other noise: now it falls there
        again.restore(2)
        assert steps(tmp_path) == [0]
        assert [path.name for path in tmp_path.glob("best-*")] == ["best-000000.safetensors"]
        assert again.at(2)
        assert again.weight() == 0.0, "not the best of what never was"
        assert steps(tmp_path) == [0, 2]

    def test_labels_that_clash_are_refused(self, tmp_path):
        watch = Measured(tmp_path, CURVE)
        for label in ("jpeg", "trained"):
            held_out = [cfg.ScorerConfig(name="picture", label=label)]
            stop = cfg.StopConfig(prompts=cfg.PromptsConfig(source="shapes:heldout"), scorers=held_out)
            with pytest.raises(UserError, match=f"online.stop: '{label}' is trained on"):
                Watch(watch._core, stop, cfg.OnlineConfig(groups=1, samples=2), {"jpeg": Seen()})
