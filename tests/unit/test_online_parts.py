"""Parts of a round: samples and their noise, credit, what an update trains on."""

import math
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import credit
from diffalign.errors import UserError
from diffalign.methods import resolve
from diffalign.records import Record
from diffalign.schedule import Rectified
from diffalign.train import online
from diffalign.train.job import Job, _check_ranks
from diffalign.train.rollout import Group, Roller, Rollout, assemble
from diffalign.train.round import Item, Round, share
from diffalign.types import LogProbs, SampledPath

NAN = math.nan
S = 3
PROMPTS = [Record(id=f"{n:06d}", prompt=f"prompt {n}") for n in range(8)]


class Line:
    """``v = x + t * prompt``: every sample depends on its own noise and prompt alone."""

    device = torch.device("cpu")
    guidance_interval = (0.0, 1.0)
    schedule = Rectified(shift=3.0)
    modality = "image"

    def latent_shape(self, size) -> tuple[int, ...]:
        return 2, 3

    def predict(self, net, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x_t + (t * cond["prompt"])[:, None, None]

    def condition(self, requests, size) -> dict[str, Tensor]:
        return {"prompt": torch.tensor([float(request.prompt.split()[1]) for request in requests])}

    def encode_prompt(self, prompts) -> None:
        assert len(prompts) == 1, "its last bits depend on its neighbours"


def settings(**changes: Any) -> cfg.OnlineConfig:
    return cfg.OnlineConfig(**{"prompts": {"source": "shapes:train"}, "groups": 4, "samples": S, **changes})


def roller(batch: int = 4, **changes: Any) -> Roller:
    sampling = cfg.SamplingConfig(steps=6, batch=batch, sampler=changes.pop("sampler", "euler"))
    return Roller(Line(), sampling, S, **{"key": (7,), **changes})


def groups(*positions: int, attempt: int = 0) -> list[Group]:
    return [Group(PROMPTS[n], n, attempt) for n in positions]


def rolled(make: Roller, chosen: list[Group], index: int = 0) -> Rollout:
    cond = {"prompt": torch.tensor([float(group.position) for group in chosen])}
    return assemble(chosen, S, cond, list(make(torch.nn.Identity(), index, chosen, cond)))


class TestRollout:
    def test_samples_depend_on_neither_batch_nor_process(self):
        whole = rolled(roller(keep="transitions"), groups(0, 1, 2, 3))
        assert whole.path is not None
        assert (whole.x0.shape, whole.path.x.shape) == ((4, S, 2, 3), (4, S, 7, 2, 3))
        assert torch.equal(whole.path.x[:, :, -1], whole.x0)
        for batch in (1, 5, 99):
            assert torch.equal(rolled(roller(batch, keep="transitions"), groups(0, 1, 2, 3)).x0, whole.x0)
        for rank in (0, 1):
            mine = rolled(roller(keep="transitions"), groups(0, 1, 2, 3)[rank::2])
            assert torch.equal(mine.x0, whole.x0[rank::2])

    def test_every_sample_round_and_attempt_has_noise_of_its_own(self):
        made = [rolled(roller(), groups(0, 1)).x0, rolled(roller(), groups(0, 1), 1).x0]
        made += [rolled(roller(), groups(0, 1, attempt=1)).x0, rolled(roller(key=(8,)), groups(0, 1)).x0]
        flat = torch.cat(made).flatten(0, 1)
        assert len({tuple(sample.flatten().tolist()) for sample in flat}) == len(flat) == 8 * S

    def test_one_start_for_the_samples_of_a_prompt(self):
        path = rolled(roller(keep="transitions", shared_noise=True), groups(0, 1)).path
        assert path is not None
        starts = path.x[:, :, 0]
        assert torch.equal(starts, starts[:, :1].expand_as(starts))
        assert not torch.equal(starts[0], starts[1])
        assert not torch.equal(path.x[0, 0, 1], path.x[0, 1, 1]), "the noise of later steps is their own"
        assert torch.equal(rolled(roller(2, keep="transitions", shared_noise=True), groups(0, 1)).path.x, path.x)

    def test_a_window_keeps_its_steps_and_the_others_are_euler(self):
        seen = set()
        grid = Line.schedule.grid(6)
        for index in range(40):
            made = rolled(roller(keep="transitions", window=2, window_range=(1, 5)), groups(0), index)
            path = made.path
            assert path is not None
            assert (path.x.shape[2], path.prediction.shape[2]) == (3, 2)
            first = grid.tolist().index(float(path.t[0, 0, 0]))
            seen.add(first)
            assert torch.equal(path.t[0, 0], grid[first : first + 3])
            x = path.x[0, :, 2]
            for t, following in pairwise(grid[first + 2 :]):
                x = x + (following - t) * Line().predict(None, x, t.expand(S), {"prompt": torch.zeros(S)})
            torch.testing.assert_close(x, made.x0[0])
        assert seen == {1, 2, 3}

    def test_steps_before_a_window_are_without_noise(self):
        """Starting where a trajectory of Euler steps from the same noise comes by."""
        path = rolled(roller(keep="transitions", window=1, window_range=(4, 5)), groups(0)).path
        start = rolled(roller(keep="predictions"), groups(0)).path
        assert path is not None
        assert start is not None
        torch.testing.assert_close(path.x[:, :, 0], start.x[:, :, 4])

    def test_a_solver_is_recorded(self):
        made = rolled(roller(keep="predictions", sampler="dpm2"), groups(2))
        path = made.path
        assert path is not None
        assert (path.t.shape, path.x.shape, path.prediction.shape) == ((1, S, 7), (1, S, 7, 2, 3), (1, S, 6, 2, 3))
        assert torch.equal(path.x[:, :, -1], made.x0)
        asked = path.x[:, :, :-1] + 2.0 * path.t[:, :, :-1, None, None]
        torch.testing.assert_close(path.prediction, asked)

    def test_sa_solver_takes_noise_only_with_tau(self):
        still = rolled(roller(sampler="sa_solver", shared_noise=True), groups(0)).x0
        noisy = [rolled(roller(b, sampler="sa_solver", shared_noise=True, tau=0.4), groups(0)).x0 for b in (1, 4)]
        assert torch.equal(still[:, :1].expand_as(still), still)
        assert not torch.equal(noisy[0][0, 0], noisy[0][0, 1])
        assert torch.equal(noisy[0], noisy[1])

    def test_groups_are_replaced_in_their_places(self):
        whole, others = rolled(roller(keep="transitions"), groups(0, 1, 2)), groups(5, 6, attempt=1)
        other = rolled(roller(keep="transitions"), others)
        longer = Rollout(other.groups, {"prompt": other.cond["prompt"]}, other.x0, other.path)
        made = whole.replaced([2, 0], longer)
        assert [group.record.prompt for group in made.groups] == ["prompt 6", "prompt 1", "prompt 5"]
        assert torch.equal(made.x0, torch.stack([other.x0[1], whole.x0[1], other.x0[0]]))
        assert torch.equal(made.cond["prompt"], torch.tensor([6.0, 1.0, 5.0]))
        assert made.path is not None
        assert other.path is not None
        assert torch.equal(made.path.x[0], other.path.x[1])

    def test_shorter_conditions_end_in_zeros(self):
        short = Rollout(tuple(groups(0)), {"c": torch.ones(1, 2)}, torch.zeros(1, S, 1), None)
        long = Rollout(tuple(groups(1)), {"c": torch.full((1, 3), 2.0)}, torch.zeros(1, S, 1), None)
        two = Rollout((*short.groups, *groups(2)), {"c": torch.ones(2, 2)}, torch.zeros(2, S, 1), None)
        assert two.replaced([1], long).cond["c"].tolist() == [[1, 1, 0], [2, 2, 2]]


class TestCredits:
    def test_total(self):
        rewards = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [2.0, NAN]], [[0.0, 5.0], [4.0, 5.0], [8.0, 5.0]]])
        weights = torch.tensor([2.0, 0.1])
        found = credit.total(rewards, weights, "sum")
        torch.testing.assert_close(found[~found.isnan()], torch.tensor([3.0, 8.0, 0.5, 8.5, 16.5]))
        assert found.isnan().tolist() == [[False, False, True], [False] * 3]
        each = credit.total(rewards, weights, "normalised")
        assert torch.equal(each.isnan(), found.isnan())
        one = 1 / math.sqrt(2)
        torch.testing.assert_close(each[0, :2], torch.tensor([-one, one]) * 2.1, rtol=1e-3, atol=0)
        torch.testing.assert_close(each[1], torch.tensor([-2.0, 0.0, 2.0]), rtol=1e-3, atol=1e-6)

    def test_alike(self):
        reward = torch.tensor([[0.1, 0.1 + 1e-9, 0.1], [0.1, 0.2, NAN], [NAN, NAN, 3.0], [NAN] * 3, [1.0, 1.0, NAN]])
        assert credit.alike(reward).tolist() == [True, False, True, True, True]

    @pytest.mark.parametrize("spread", ["group", "all", "none"])
    def test_advantages(self, spread):
        reward = torch.tensor([[1.0, 2.0, 4.0], [5.0, NAN, 7.0], [3.0, 3.0, 3.0]])
        found = credit.advantages(reward, spread=spread, ddof=1)
        flat = reward.flatten()[~reward.flatten().isnan()]
        expected = credit.standardised(flat, [0, 0, 0, 1, 1, 2, 2, 2], spread=spread, ddof=1)
        assert found[1, 1] == 0
        assert torch.equal(found.flatten()[~reward.flatten().isnan()], expected)
        assert found[2].tolist() == [0, 0, 0]

    def test_a_tracker_knows_prompts_by_name(self):
        buffered, reward = credit.Buffered(4, 2), torch.tensor([[1.0, 3.0], [NAN, 5.0], [2.0, 2.0]])
        found = credit.advantages(reward, prompts=["a", "b", "a"], buffered=buffered)
        assert {name: list(kept) for name, kept in buffered.history.items()} == {"a": [1, 3, 2, 2], "b": [5]}
        std = math.sqrt(0.5)
        torch.testing.assert_close(found[[0, 2]], torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / std)
        assert found[1, 0] == 0

    def test_pairs(self):
        reward = torch.tensor([[1.0, 3.0, 2.0], [NAN, 4.0, 5.0], [NAN, 4.0, NAN], [2.0, 2.0, 2.0]])
        found = credit.pairs(reward, "best_worst")
        assert found.shape == (4, 1, 2)
        assert found[:2, 0].tolist() == [[1, 0], [2, 1]]
        assert all(len(set(pair)) == 2 for pair in found[:, 0].tolist())
        assert credit.pairs(reward, "all")[2].tolist() == [[0, 1], [0, 2], [1, 2]]


def shared(method: str, rewards: Tensor, buffered=None, mine=slice(None), **changes: Any) -> Round:
    """A round of G groups with those rewards (G, S, M)."""
    g, s, m = rewards.shape
    path = SampledPath(torch.zeros(g, s, 2), torch.zeros(g, s, 2, 1), torch.zeros(g, s, 1, 1))
    rollout = Rollout(tuple(groups(*range(g))), {}, torch.arange(g * s).reshape(g, s, 1).float(), path)
    weights = changes.pop("weights", torch.ones(m))
    names = [f"prompt {n}" for n in range(g)]
    own = settings(groups=g, samples=s, **changes)
    return share(Round(0, rollout, rewards, weights), names, own, resolve(method), mine, buffered)


class TestRound:
    @pytest.mark.parametrize(
        ("method", "updates", "passes", "each"),
        [("awm", 1, 1, 12), ("ddpo", 4, 2, 6), ("ddpo", 6, 1, 2), ("diffusion-dpo", 2, 1, 2), ("rank-dpo", 4, 4, 4)],
    )
    def test_parts(self, method, updates, passes, each):
        made = shared(method, torch.rand(4, S, 1))
        parts = list(made.parts(settings(updates=updates, passes=passes), (7, 0)))
        assert [len(part) for part in parts] == [each] * updates
        items = [item for part in parts for item in part]
        for number in range(passes):
            mine = sorted((item.group, item.index) for item in items if item.key[0] == number)
            count = made.samples.shape[1]
            assert mine == [(group, index) for group in range(4) for index in range(count)]
        assert len({item.key for item in items}) == len(items)
        assert parts == list(made.parts(settings(updates=updates, passes=passes), (7, 0)))

    def test_parts_of_two_processes_are_those_of_one(self):
        chosen, rewards = settings(updates=6, passes=2), torch.rand(4, S, 1)
        whole = [{item.key for item in part} for part in shared("awm", rewards).parts(chosen, (7, 0))]
        halves = []
        for rank in (0, 1):
            made = shared("awm", rewards, mine=slice(rank, None, 2))
            made.rollout = Rollout(made.rollout.groups[rank::2], {}, made.rollout.x0[rank::2], None)
            halves.append([{item.key for item in part} for part in made.parts(chosen, (7, 0))])
        assert [one | other for one, other in zip(*halves, strict=True)] == whole
        assert all(len(part) == 4 for part in whole)

    def test_one_prompt_whose_samples_differ_teaches(self):
        alike = torch.ones(4, S, 1)
        differing = alike.clone()
        differing[2, 0] = 0.0
        assert self.teaching(shared("awm", alike)) == []
        assert self.teaching(shared("awm", differing)) == [2]
        assert self.teaching(shared("diffusion-dpo", differing)) == [2]
        assert self.teaching(shared("awm", differing, mine=slice(1, None, 2))) == []  # another process's prompt
        assert self.teaching(shared("diffusion-dro", alike)) == [0, 1, 2, 3]  # by its experts
        assert self.teaching(shared("diffusion-kto", alike, credit={"threshold": 0.5})) == [0, 1, 2, 3]
        differing[2, 1:] = NAN
        assert self.teaching(shared("awm", differing)) == []

    def teaching(self, made: Round) -> list[int]:
        """Groups whose items alone would be an update that teaches."""
        groups, items = made.decided.shape
        return [g for g in range(groups) if made.teaches([Item(g, i, (0, g, i)) for i in range(items)])]

    def test_a_batch_holds_what_its_items_say(self):
        rewards = torch.tensor([[[1.0], [3.0], [NAN]], [[5.0], [4.0], [6.0]]])
        made = shared("diffusion-dpo", rewards)
        items = [item for part in made.parts(settings(groups=2), (0, 0)) for item in part]
        batch = made.batch(sorted(items), torch.device("cpu"))
        assert batch.x0[..., 0].tolist() == [[1, 0], [5, 4]]
        assert batch.labels["reward"].tolist() == [[3, 1], [6, 4]]
        assert batch.path is not None
        assert batch.path.x.shape == (2, 2, 2, 1)
        assert batch.present is not None
        assert batch.present.tolist() == [[1, 1], [1, 1]]

    def test_what_has_no_reward_has_no_weight(self):
        made = shared("awm", torch.tensor([[[1.0], [3.0], [NAN]], [[NAN]] * 3, [[2.0]] * 3]))
        assert made.present[..., 0].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
        assert made.labels["advantage"][1:].abs().sum() == 0
        assert made.metrics["reward/best"] == pytest.approx(2.5), "of prompts that have one"
        assert made.metrics["reward/failed"] == pytest.approx(4 / 9)
        assert all(map(math.isfinite, made.metrics.values()))
        dropped = shared("awm", torch.tensor([[[1.0], [3.0]], [[2.0], [2.0]]]), keep_alike=False)
        assert dropped.present[..., 0].tolist() == [[1, 1], [0, 0]]

    def test_desirable_beside_the_mean_or_a_threshold(self):
        rewards = torch.tensor([[[1.0], [3.0], [NAN]], [[0.1]] * 3])
        made = shared("diffusion-kto", rewards)
        assert made.labels["desirable"][0, :2, 0].tolist() == [0, 1]
        assert made.present[..., 0].tolist() == [[1, 1, 0], [0, 0, 0]], "alike: neither"
        made = shared("diffusion-kto", rewards, credit={"threshold": 0.5})
        assert made.labels["desirable"][..., 0].tolist() == [[1, 1, 0], [0, 0, 0]]
        assert made.present[..., 0].tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_pareto_counts_rewards_with_a_weight(self):
        """The third only watches, of the second less is better."""
        rewards = torch.tensor([[[2.0, 1.0, 9.0], [1.0, 2.0, 0.0]], [[2.0, 3.0, 0.0], [1.0, 2.0, 0.0]]])
        made = shared("d3po", rewards, weights=torch.tensor([1.0, -0.5, 0.0]), credit={"pareto": True, "pairs": "all"})
        assert made.labels["reward"][:, 0].tolist() == [[1, -1], [0, 0]]


def job(reward, **changes: Any) -> Job:
    """A job around :class:`Line`; ``reward(record, latent)`` is what a sample is worth."""

    class Feedback:
        labels = ("reward",)

        def __init__(self) -> None:
            self.seconds, self.found = {"score": 0.0, "wait": 0.0}, []

        def begin(self, index) -> None:
            pass

        def submit(self, records, latents) -> None:
            self.found += [[reward(record, x)] for record, x in zip(records, latents, strict=True)]

        def collect(self) -> Tensor:
            found, self.found = self.found, []
            return torch.tensor(found)

    run = SimpleNamespace(
        rank=0, world=1, rollbacks=0, device=Line.device, autocast=nullcontext, kernels=lambda n: nullcontext()
    )
    weights = SimpleNamespace(use=lambda role: nullcontext(torch.nn.Identity()), copies={})
    config = SimpleNamespace(run=SimpleNamespace(seed=7, precision="fp32"))
    core: Any = SimpleNamespace(run=run, weights=weights, family=Line(), config=config, method=resolve("awm"))
    feedback: Any = Feedback()
    return Job(core, settings(**changes), {}, PROMPTS, None, roller(), feedback, None, None, None)  # type: ignore[arg-type]


class TestMakeRound:
    def test_prompts_are_distinct_while_there_are_enough(self):
        for index in range(5):
            made = online._groups(job(None, groups=8), index, 0)
            assert sorted(group.record.id for group in made) == [record.id for record in PROMPTS]
        many = [group.record.id for group in online._groups(job(None, groups=20), 0, 0)]
        assert {many.count(name) for name in many} == {2, 3}

    def test_refill_replaces_groups_that_are_alike_and_no_others(self):
        dull = {"prompt 0", "prompt 1", "prompt 2", "prompt 3"}

        def reward(record: Record, x: Tensor) -> float:
            return 1.0 if record.prompt in dull else float(x.mean())

        for index in range(6):
            plain = online.make_round(job(reward), index)
            made = online.make_round(job(reward, refill=2), index)
            for before, after, row in zip(plain.rollout.groups, made.rollout.groups, plain.rewards, strict=True):
                assert after.position == before.position
                assert (after == before) == (before.record.prompt not in dull), "what taught something stays"
                assert (after.attempt > 0) == (before.record.prompt in dull)
                assert bool(credit.alike(row[None, :, 0])) == (before.record.prompt in dull)
            assert sum(g.record.prompt in dull for g in made.rollout.groups) <= len(dull)
            counts = [[len(part) for part in r.parts(settings(updates=2), (7, 0))] for r in (plain, made)]
            assert counts[0] == counts[1] == [6, 6]
            assert [item.key for part in made.parts(settings(), (7, 0)) for item in part] == [
                item.key for part in plain.parts(settings(), (7, 0)) for item in part
            ]

    def test_the_ratio_of_fresh_samples_is_one(self):
        def check(gap: float, precision: str = "fp32") -> None:
            made = job(None)
            made.core.config.run.precision = precision
            policy = torch.zeros(2, 1, 3)
            lp = LogProbs({"policy": policy + gap, "behaviour": policy}, torch.ones(2, 1, 3))
            online._check_on_policy(made, SimpleNamespace(log_probs=lp))
            assert made.checked

        check(1e-4)
        check(1e-2, "bf16")
        for gap in (1e-2, NAN):
            with pytest.raises(UserError, match="sampling and training run the network differently"):
                check(gap)


def test_whole_items_for_every_update_and_process():
    _check_ranks(settings(groups=4, updates=6, samples=3), resolve("awm"), 2)
    for changes, world in (({"groups": 4, "updates": 5}, 1), ({"groups": 3}, 2), ({"groups": 4, "updates": 12}, 2)):
        with pytest.raises(UserError, match=r"online\.groups: \d prompts give \d+ samples or pairs"):
            _check_ranks(settings(**changes), resolve("awm"), world)
