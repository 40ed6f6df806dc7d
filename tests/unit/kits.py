"""Every row of the catalogue with what one step of it takes: a tiny network in float64, its roles, and a batch."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import estimate
from diffalign.families.base import load_family
from diffalign.methods import METHODS, modality, needs, resolve
from diffalign.records import Candidate, Record
from diffalign.registry import find_objective
from diffalign.samplers import rollout
from diffalign.schedule import Discrete, Rectified
from diffalign.textset import TextDataset
from diffalign.train.step import StepResult, loss_step
from diffalign.transitions import FLOW_STEPS, ddim
from diffalign.types import Batch, Method, SampledPath
from diffalign.weights import Weights, add_lora

from . import tiny

FLOW, DISCRETE = Rectified(shift=3.0), Discrete.scaled_linear()
F64 = torch.float64
STEPS = 6  # of a rollout

ONE = {"diffusion-kto", "ddo", "dso-dro", "text-kto", "text-dro-v", "text-oreo"}
"""Rows that read one candidate per record."""
DDIM = {"d3po", "ddpo"}
FLOWS = {"flow-grpo", "grpo-guard", "dance-grpo", "diffusion-nft"}
PATHS = {*DDIM, "flow-grpo", "grpo-guard", "dance-grpo", "diffusion-dro"}
"""Rows that read trajectories."""
GRADIENTS = {"ddpo", "flow-grpo", "grpo-guard", "dance-grpo", "awm", "awm-released"}
"""Policy gradients: minus the mean advantage on policy."""

DIFFUSION = [name for name in METHODS if modality(METHODS[name]) == "diffusion"]
TEXT = [name for name in METHODS if modality(METHODS[name]) == "text"]
CASES = [
    *((name, FLOW) for name in DIFFUSION if name not in DDIM),
    *((name, DISCRETE) for name in DIFFUSION if name not in FLOWS),
    *((name, None) for name in TEXT),
]


@dataclass
class Kit:
    """A row with everything one step of it takes."""

    method: Method
    family: Any
    weights: Weights
    batch: Batch

    def step(self, method: Method | None = None) -> StepResult:
        generator = torch.Generator().manual_seed(11)
        return loss_step(method or self.method, self.family, self.weights, self.batch, generator)

    def fixed(self) -> Method:
        """The row with its draws made once: an inversion would follow the policy."""

        def freeze(term):
            if term.draw is None:
                return term
            drawn = term.draw(self.family, self.weights, self.batch, torch.Generator().manual_seed(11))
            return replace(term, draw=lambda *_: drawn)

        return replace(self.method, main=freeze(self.method.main), extra=tuple(map(freeze, self.method.extra)))


class Images(tiny.Family):
    """The tiny transformer; the frames of a video are images to it."""

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if x_t.ndim == 4:
            return super().predict(net, x_t, t, cond)
        frames = x_t.shape[2]
        each = {name: value.repeat_interleave(frames, 0) for name, value in cond.items()}
        flat = super().predict(net, x_t.transpose(1, 2).flatten(0, 1), t.repeat_interleave(frames), each)
        return flat.unflatten(0, (len(x_t), frames)).transpose(1, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels_of(name: str, b: int, k: int) -> dict[str, Tensor]:
    """What a row reads, each value worth telling apart."""
    ranks = torch.arange(b * k, dtype=torch.float32).reshape(b, k)
    if name == "dense-dpo":
        reward = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]], [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        return {"reward": reward.repeat(b // 2, 1, 1)}
    every = {
        "reward": 0.15 + 0.01 * ((5 * ranks) % 7),  # within PickScore's range
        "desirable": (ranks + 1) % 2,
        "advantage": 1.5 * torch.sin(1 + 2 * ranks),
    }
    return {label: every[label] for label in needs(*METHODS[name].terms).labels}


def path_of(name: str, family: Images, net: nn.Module, cond: dict[str, Tensor], k: int) -> tuple[Tensor, SampledPath]:
    """Samples (B, K, ...) of a network and the trajectories that led to them."""
    schedule = family.schedule
    term = METHODS[name].main.estimate
    options = getattr(term, "keywords", {})
    if isinstance(schedule, Discrete):
        table = torch.tensor(schedule.alphas_cumprod, dtype=F64)

        def step(prediction, x, t, following):
            return ddim(prediction, x, table[schedule.native(t)], table[schedule.native(following)])
    else:
        kind = options.get("kind", "flow_sde")
        step = partial(FLOW_STEPS[kind], noise_level=options.get("noise_level", 0.7))
    flat = estimate.flatten_condition(cond, k)
    b = len(cond["states"])
    noise = iter(normal(STEPS, b * k, 2, 4, 4, seed=8))
    _, path = rollout(
        lambda x, t: family.predict(net, x, t.expand(len(x)), flat),
        normal(b * k, 2, 4, 4, seed=7),
        schedule.grid(STEPS),
        step,
        noise,
    )
    t, x, prediction = (getattr(path, part).unflatten(0, (b, k)) for part in ("t", "x", "prediction"))
    return x[:, :, -1], SampledPath(t, x, prediction)


def diffusion_kit(name: str, schedule: Rectified | Discrete) -> Kit:
    released = {"draw": {"released": True, "steps": 5}} if name == "smpo" and schedule is DISCRETE else {}
    method = resolve(name, **released)
    net = tiny.with_lora().double()
    family = Images(net)
    family.schedule = schedule
    b = 4
    k = 1 if name in ONE else find_objective(method.main.objective).k or 3
    cond = {"states": normal(b, 1, 3, 6, seed=1), "pooled": normal(b, 1, 5, seed=2)}
    x0, path = normal(b, k, 2, 4, 4, seed=3), None
    if name == "dense-dpo":
        x0 = normal(b, k, 2, 3, 4, 4, seed=3)
    if name == "condition-po":  # two conditions on one image
        x0 = x0[:, :1].expand(-1, 2, -1, -1, -1)
        cond = {"states": normal(b, 2, 3, 6, seed=1), "pooled": normal(b, 2, 5, seed=2)}
    if method.source == "online":
        x0, path = path_of(name, family, net, cond, k)
    if name == "diffusion-dro":  # the better candidate is an expert's, without a trajectory
        x0 = normal(b, k, 2, 4, 4, seed=3)
    roles = needs(*method.terms).roles
    others = {"behaviour": tiny.with_lora().double().requires_grad_(False)} if name == "diffusion-nft" else {}
    weights = Weights(net, lora=True, copies=[r for r in roles if r == "average"], others=others)
    weights.prepare([role for role in roles if role not in ("behaviour",) or role in others])
    return Kit(method, family, weights, Batch(x0, cond, labels_of(name, b, k), path=path))


ANSWERS = [("1+1", ["2", "345"]), ("close ([{", ["}])", "]"]), ("ab", ["c", "cd"]), ("b", ["bb", "ba"])]


def text_kit(name: str, folder) -> Kit:
    method = resolve(name)
    family = load_family("causal_lm", str(folder), "cpu")
    add_lora(family.net, 2, None, family.lora_targets)
    if "values" in needs(*method.terms).reads:
        family.add_value_head()
    family.net.double()
    others = {}
    if "guide" in needs(*method.terms).roles:
        others["guide"] = load_family("causal_lm", str(folder), "cpu").net.double()
        others["guide"].requires_grad_(True)
        tiny.perturb(others["guide"])
        others["guide"].requires_grad_(False)
    weights = Weights(family.net, lora=True, others=others)
    weights.prepare(needs(*method.terms).roles)
    records = []
    for i, (prompt, answers) in enumerate(ANSWERS):
        given = [
            {"reward": (i + k + 1) % 3 / 2, "desirable": (i + k) % 2, "score": 2.0 * k - i, "visits": 3.0 * k + i,
             "win_prob": 0.3 + 0.4 * k}
            for k in range(2)
        ]  # fmt: skip
        pair = [Candidate(text=text, labels=labels) for text, labels in zip(answers, given, strict=True)]
        records.append(Record(id=str(i), prompt=prompt, candidates=pair[: 1 if name in ONE else 2]))
    data = TextDataset(records, family)
    return Kit(method, family, weights, data.batch(range(4), torch.Generator(), needs(*method.terms).labels))
