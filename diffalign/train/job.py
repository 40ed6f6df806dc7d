"""Everything an online run is made of, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffalign import config as cfg
from diffalign import score
from diffalign.credit import Buffered
from diffalign.errors import UserError
from diffalign.estimate import step_of, transition
from diffalign.families.base import family_class
from diffalign.methods import needs, reads_paths, resolve, unwrapped
from diffalign.prompts import read_prompts
from diffalign.records import Record
from diffalign.samplers import find_sampler
from diffalign.train import core as shared
from diffalign.train import human
from diffalign.train.experts import Experts, is_replayed
from diffalign.train.feedback import Feedback, Scorers
from diffalign.train.rollout import Roller
from diffalign.train.run import find_checkpoint
from diffalign.train.watch import Watch
from diffalign.types import Method, Role

ANCHORS = {
    "behaviour": cfg.AnchorConfig(rate=0.001, cap=0.5),  # DiffusionNFT's old policy
    "average": cfg.AnchorConfig(rate=0.001, cap=0.3),  # AWM's
}
"""What follows the policy, and how, where a method reads the role and the config says nothing."""


@dataclass
class Job:
    """Everything one online run is made of."""

    core: shared.Core
    settings: cfg.OnlineConfig
    anchors: dict[Role, cfg.AnchorConfig]
    prompts: list[Record]
    root: Path
    """Folder of the prompts' files."""
    roller: Roller
    feedback: Feedback | None
    """None where every own sample is a loser."""
    experts: Experts | None
    watch: Watch | None
    buffered: Buffered | None
    checked: bool = field(default=False)
    """Whether the ratio was seen to be 1."""

    @property
    def rounds(self) -> int:
        """How many there are."""
        return self.core.config.run.steps // self.settings.updates


def prepare(config: cfg.TrainConfig) -> Job:
    """Check everything that needs no model first, then load it.

    Raises:
        UserError: settings that do not go together, that nothing reads, or that do not share evenly.
    """
    settings = config.online
    assert settings is not None
    find_checkpoint(Path(config.run.dir), config.run.resume)
    method, window = check(config)
    if settings.window is not None:  # all of it is trained on
        method = replace(method, main=replace(method.main, draw=partial(method.main.draw, fraction=1.0)))  # type: ignore[arg-type]
    shared.check_model(config)
    roles, anchors = _roles(method, settings)
    copies = (*(role for role in anchors if role != "policy"), *(("evaluation",) if config.run.ema else ()))
    core = shared.build(config, method, roles, copies, settings.sampling.size)
    if len(core.family.networks) > 1 and core.run.world > 1:
        raise UserError("online: models of several networks train on one process")
    _check_ranks(settings, method, core.run.world)
    experts = Experts.load(config, core) if config.data is not None else None
    found = experts.prompts if experts else read_prompts(settings.prompts, config.run.seed)  # type: ignore[arg-type]
    root = Path(config.data.records if config.data else settings.prompts.source).parent  # type: ignore[union-attr]
    feedback = _feedback(core, settings, root)
    trained = feedback.scorers if isinstance(feedback, Scorers) else {}
    return Job(
        core,
        settings,
        anchors,
        found,
        root,
        _roller(core, settings, window),
        feedback,
        experts,
        Watch(core, settings.stop, settings, trained) if settings.stop else None,
        Buffered(settings.credit.buffer, settings.credit.min_count) if settings.credit.buffer else None,
    )


def check(config: cfg.TrainConfig) -> tuple[Method, tuple[int, int]]:
    """The method of an online run and the steps that a window lies in, everything checked that needs no model.

    Raises:
        UserError: settings that do not go together, or that nothing reads.
    """
    settings = config.online
    assert settings is not None
    method = resolve(**config.method.model_dump())
    _check(config, settings, method)
    _check_credit(settings, method)
    _check_samples(settings, method)
    shared.check_family(method, config.model.family)
    return method, window_range(settings, method)


def _check(config: cfg.TrainConfig, settings: cfg.OnlineConfig, method: Method) -> None:
    """Refuse what does not go together."""
    run, replayed = config.run, is_replayed(method)
    if config.model.family == "causal_lm":
        raise UserError("online: trains diffusion and flow models; language models train on records")
    if replayed != (config.data is not None):
        need = "needs `data`: records of experts" if replayed else "reads no experts: remove `data`"
        raise UserError(f"{method.name} {need}")
    if replayed == (settings.prompts is not None):
        raise UserError("online.prompts: are those of `data` here" if replayed else "online: give `prompts`")
    if not replayed and settings.source == "scorers" and not settings.scorers:
        raise UserError("online.scorers: name at least one, or set online.source=human")
    if settings.source == "human" and replayed:
        raise UserError(f"online.source: {method.name} compares samples with experts alone; remove it")
    if settings.source == "human":
        human.check(config, settings, family_class(config.model.family).modality)
    if settings.stop is not None and replayed:
        raise UserError("online.stop: compares rewards that scorers give in training with others; remove it")
    if settings.source == "scorers" and (unknown := sorted(settings.reward.keys() - score.by_label(settings.scorers))):
        raise UserError(f"online.reward: {unknown[0]!r} is the label of none of the scorers")
    if run.accumulate != 1:
        raise UserError("run.accumulate: online, a round is cut by online.updates; run.batch is the micro-step")
    if run.steps % settings.updates:
        raise UserError(f"run.steps: {run.steps} updates are not whole rounds of online.updates={settings.updates}")
    if settings.updates % settings.passes:
        raise UserError(f"online.updates: {settings.updates} do not share {settings.passes} passes evenly")
    if run.shard:
        raise UserError("run.shard: the online loop trains on whole networks")
    guidance = _keywords(method.main.estimate).get("guidance", 1.0)
    if reads_paths(method) and not replayed and guidance != settings.sampling.guidance:
        raise UserError(
            f"online.sampling.guidance {settings.sampling.guidance:g} is what samples, method.estimate.guidance "
            f"{guidance:g} what trains: ratios would not be 1; set both alike"
        )
    if replayed and settings.refill:
        raise UserError(f"online.refill: {method.name} learns from experts, not from rewards; remove it")
    if settings.tau and settings.sampling.sampler != "sa_solver":
        raise UserError("online.tau: is for the sampler sa_solver")


def _check_samples(settings: cfg.OnlineConfig, method: Method) -> None:
    """Refuse groups that are too small to teach."""
    needed, credit = needs(*method.terms), settings.credit
    if is_replayed(method):
        if settings.samples != 1:
            raise UserError(f"online.samples: {method.name} makes one sample per expert")
        return
    alone = credit.buffer is not None if "advantage" in needed.labels else credit.threshold is not None
    least = 3 if needed.listwise else 2 if needed.k == 2 or not alone else 1
    if settings.samples < least:
        raise UserError(
            f"online.samples: {method.name} compares samples of a prompt, at least {least} with this credit"
        )


READ_BY = {
    "spread": "advantage",
    "ddof": "advantage",
    "eps": "advantage",
    "buffer": "advantage",
    "min_count": "advantage",
    "threshold": "desirable",
}
"""Settings of credit, and the label that they make."""


def _check_credit(settings: cfg.OnlineConfig, method: Method) -> None:
    """Refuse settings of credit that nothing would read."""
    credit, needed = settings.credit, needs(*method.terms)
    given = credit.model_fields_set
    if is_replayed(method) and given:
        raise UserError(f"online.credit: {method.name} learns from experts, not from rewards; remove it")
    for name in sorted(given):
        if name in ("pairs", "pareto") and getattr(credit, name) and needed.k != 2:
            raise UserError(f"online.credit.{name}: is for methods that compare two samples; {method.name} does not")
        if name in READ_BY and READ_BY[name] not in needed.labels:
            raise UserError(f"online.credit.{name}: {method.name} reads no {READ_BY[name]}; remove it")
    for name in ("spread", "ddof", "eps"):
        if credit.buffer is not None and name in given:
            raise UserError(f"online.credit.{name}: credit.buffer has DDPO's own; remove one of the two")
    if credit.buffer is None and "min_count" in given:
        raise UserError("online.credit.min_count: belongs to credit.buffer; set that too")
    if credit.buffer is not None and credit.min_count > credit.buffer:
        raise UserError(
            f"online.credit.min_count: a buffer of {credit.buffer} rewards never holds {credit.min_count} of a prompt"
        )
    own = next((name for name in ("buffer", "threshold") if getattr(credit, name) is not None), None)
    if own and (settings.refill or not settings.keep_alike):
        name = "refill" if settings.refill else "keep_alike"
        raise UserError(f"online.{name}: with credit.{own} samples that are alike teach, too; remove one of the two")


def window_range(settings: cfg.OnlineConfig, method: Method) -> tuple[int, int]:
    """The steps that a window lies in: by default those of the trajectory that the method's draw is from.

    Raises:
        UserError: the method keeps no path, or the window does not fit.
    """
    steps, window = settings.sampling.steps, settings.window
    usable = int(steps * _keywords(method.main.draw).get("fraction", 1.0))
    low, high = settings.window_range or (0, usable)
    if window is None:
        if settings.window_range is not None:
            raise UserError("online.window_range: is where online.window lies; set that too")
        return low, high
    if not reads_paths(method) or is_replayed(method):
        raise UserError(f"online.window: {method.name} keeps no path")
    if not 0 <= low <= high - window <= steps - window:
        raise UserError(f"online.window: {window} of {steps} steps do not fit into {low} to {high}")
    return low, high


def _check_ranks(settings: cfg.OnlineConfig, method: Method, world: int) -> None:
    """Every update is a whole number of samples, the same on every process."""
    each = settings.groups * items_per_group(method, settings) * settings.passes
    if settings.groups % world or each % (settings.updates * world):
        raise UserError(
            f"online.groups: {settings.groups} prompts give {each} samples or pairs, which {settings.updates} updates "
            f"on {world} processes do not share evenly"
        )


def items_per_group(method: Method, settings: cfg.OnlineConfig) -> int:
    """How many things a group gives to train on: samples, pairs, or itself as a ranking."""
    if is_replayed(method):
        return 1
    needed = needs(*method.terms)
    if needed.k == 2:
        return settings.samples * (settings.samples - 1) // 2 if settings.credit.pairs == "all" else 1
    return 1 if needed.listwise else settings.samples


def _keywords(part: Any) -> dict[str, Any]:
    """What is set of a draw or an estimate."""
    found = {}
    while hasattr(part, "keywords"):
        found, part = {**part.keywords, **found}, part.func
    return found


def _roles(method: Method, settings: cfg.OnlineConfig) -> tuple[list[Role], dict[Role, cfg.AnchorConfig]]:
    """The roles that weights play, and those of them that follow the policy."""
    kept = unwrapped(method.main.estimate) is transition  # then the sampler's own outputs are the behaviour's
    roles = [role for role in needs(*method.terms).roles if not (kept and role == "behaviour")]
    anchors: dict[Role, cfg.AnchorConfig] = {role: ANCHORS[role] for role in roles if role in ANCHORS}
    for role, how in settings.anchors.items():
        if role not in roles and role != "behaviour":
            raise UserError(f"online.anchors: {method.name} reads no role {role!r}")
        anchors[role] = how
    return roles, anchors


def _roller(core: shared.Core, settings: cfg.OnlineConfig, window: tuple[int, int]) -> Roller:
    method, run = core.method, core.config.run
    found = _keywords(method.main.estimate)
    step = found.get("kind", "flow_sde"), found.get("noise_level")
    keep = "predictions" if is_replayed(method) else "transitions" if reads_paths(method) else "nothing"
    if keep == "transitions":
        step_of(core.family.schedule, *step)  # refuses what does not fit
    else:
        find_sampler(settings.sampling.sampler, core.family.schedule)
    return Roller(
        core.family,
        settings.sampling,
        settings.samples,
        keep,  # type: ignore[arg-type]
        step,
        settings.window,
        window,
        settings.shared_noise,
        settings.tau,
        (run.seed,),
    )


def _feedback(core: shared.Core, settings: cfg.OnlineConfig, root: Path) -> Feedback | None:
    if settings.source == "human":
        if core.run.world > 1:
            raise UserError(f"online.source: people answer one process, and this run has {core.run.world}")
        return human.Human(core.family, core.run.folder / "rounds", root, settings.samples)
    scorers = score.load_scorers(score.by_label(settings.scorers))
    if not scorers:
        return None
    return Scorers(core.family, scorers, root, settings.failures)
