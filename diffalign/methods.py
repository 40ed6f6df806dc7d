"""The catalogue: one row per named method, with its paper's parameters as defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from diffalign import draws, estimate
from diffalign.errors import UserError, nearest
from diffalign.registry import Objective, check_parameters, find_objective, find_shaping
from diffalign.types import Method, Term

pair = draws.forward  # one time and one noise for the candidates of a record
single = partial(draws.forward, share_t=False, share_noise=False)
apart = partial(draws.forward, share_noise=False, density={"mean": 1.0})  # one time, two noises; t = sigmoid(1 + z)
steps = partial(draws.transition, fraction=0.99)  # of a trajectory without its last step
half = estimate.denoising  # scale 1/2, the "half" of the published code
whole = partial(estimate.denoising, scale=1.0)
ddim = partial(estimate.transition, kind="ddim", noise_level=1.0)
flow_sde = partial(estimate.transition, kind="flow_sde", noise_level=0.7)
PPO = "clipped_policy_gradient"


def _text(objective: str, *shaping: tuple[str, Mapping[str, Any]], **params: float) -> Term:
    return Term(draws.none, estimate.tokens, objective, params=params, shaping=shaping)


OFFLINE = (
    Method("diffusion-dpo", "arXiv:2311.12908", Term(pair, half, "sigmoid", params={"beta": 5000.0})),
    # the released example trains at 1000
    Method("diffusion-kto", "arXiv:2404.04465", Term(single, whole, "kto", params={"beta": 5000.0})),
    # a script of diffusers without a paper of its own, its sign corrected
    Method("diffusion-orpo", "arXiv:2403.07691", Term(pair, whole, "error_ratio")),
    Method("mapo", "arXiv:2406.06424", Term(pair, whole, "mapo")),
    # 2000 for SD1.5, 5000 for SDXL
    Method("smpo", "arXiv:2506.02698", Term(draws.inversion, half, "smoothed", params={"beta": 2000.0})),
    # the paper gives no beta: Diffusion-DPO's coefficient; its noise is independent per image
    Method("rank-dpo", "arXiv:2410.18013", Term(pair, whole, "dcg", params={"beta": 2500.0})),
    Method("dense-dpo", "arXiv:2506.03517", Term(pair, partial(whole, frames=True), "dense", params={"beta": 500.0})),
    # the weight of the pre-training loss is 0.02 to 0.1 by task
    Method(
        "condition-po",
        "arXiv:2511.04753",
        Term(pair, half, "condition", params={"beta": 5000.0}),
        extra=(Term(single, whole, "sft", 0.05),),
    ),
    # both swept per model: alpha in 0.5 to 50, beta in 0.01 to 0.1 per summed squared error
    Method(
        "ddo",
        "arXiv:2503.01103",
        Term(single, partial(whole, summed=True), "ddo", params={"alpha": 4.0, "beta": 0.05}),
    ),
)

ONLINE = (
    # the release counts ties (keep_ties) and trains with guidance 5, as ddpo's does (estimate: {guidance: 5})
    Method("d3po", "arXiv:2311.13231", Term(draws.transition, ddim, "clipped_ratio"), source="online"),
    Method("ddpo", "arXiv:2305.13301", Term(partial(draws.transition, share=False), ddim, PPO), source="online"),
    # KL 0.04 for GenEval and OCR, 0.01 for PickScore, 0 for FLUX; guidance 4.5 for SD3.5 (estimate: {guidance: 4.5})
    Method(
        "flow-grpo",
        "arXiv:2505.05470",
        Term(steps, flow_sde, PPO),
        extra=(Term(None, None, "gaussian_kl", 0.04),),
        source="online",
    ),
    # the release averages the bias over the micro-batch (bias: batch)
    Method("grpo-guard", "arXiv:2510.22319", Term(steps, flow_sde, "guarded_policy_gradient"), source="online"),
    # 60 % of 15 steps of 16, other ones for each sample
    Method(
        "dance-grpo",
        "arXiv:2505.07818",
        Term(
            partial(steps, count=9, share=False),
            partial(estimate.transition, kind="dance", noise_level=0.3),
            PPO,
        ),
        source="online",
    ),
    Method(
        "awm",
        "arXiv:2509.25050",
        Term(partial(draws.repeated, count=4), whole, "advantage_weighted", params={"advantage_max": None}),
        extra=(Term(None, None, "velocity_kl", 0.4),),
        source="online",
    ),
    # the release: another weighting, more times, advantages within 1, a second anchor; 0.001 to 0.003 is its GenEval KL
    Method(
        "awm-released",
        "arXiv:2509.25050",
        Term(
            draws.repeated,
            whole,
            "advantage_weighted",
            shaping=(("matching_score", {"weighting": "ghuber", "power": 0.25}),),
        ),
        extra=(Term(None, None, "velocity_kl", 0.003), Term(None, None, "velocity_kl_average", 1.0)),
        source="online",
    ),
    # mix 0.1 for OCR and several rewards
    Method(
        "diffusion-nft",
        "arXiv:2509.16117",
        Term(partial(draws.repeated, kind="permuted", count=9, steps=10), estimate.branches, "nft"),
        extra=(Term(None, None, "velocity_kl", 1e-4),),
        source="online",
    ),
    Method(
        "diffusion-dro",
        "arXiv:2510.18353",
        Term(draws.replay, whole, "hinge", params={"beta": 1.0, "margin": 1e-3}),
        source="online",
    ),
    Method("dso-dpo", "arXiv:2503.22677", Term(apart, half, "sigmoid", params={"beta": 500.0})),
    # the release sums the two samples of a pair (per: record), twice the size
    Method("dso-dro", "arXiv:2503.22677", Term(apart, whole, "difference"), source="either"),
)

# any other objective by name: `objective: {name: ...}` of text-dpo
TEXT = (
    Method("text-dpo", "arXiv:2305.18290", _text("sigmoid", beta=0.1), source="either"),
    Method("text-ipo", "arXiv:2310.12036", _text("ipo"), source="either"),
    Method("text-simpo", "arXiv:2405.14734", _text("simpo")),
    Method("text-orpo", "arXiv:2403.07691", _text("orpo")),
    Method(
        "text-kto",
        "arXiv:2402.01306",
        Term(draws.none, partial(estimate.tokens, mismatched=True), "kto", params={"beta": 0.1}),
    ),
    # the value network is a head on the policy; the paper's second network does better
    Method("text-dro-v", "arXiv:2405.19107", Term(draws.none, partial(estimate.tokens, values=True), "dro_v")),
    Method(
        "text-oreo",
        "arXiv:2412.16145",
        Term(draws.none, partial(estimate.tokens, values=True, exact_kl=True), "oreo"),
        source="either",
    ),
    Method("text-ld-dpo", "arXiv:2409.06411", _text("sigmoid", ("length_desensitised", {}), beta=0.1)),
    # the guide is a model that DPO or SimPO trained on the same data: model.others.guide
    Method("text-tgdpo", "arXiv:2506.14574", _text("sigmoid", ("token_guided", {"beta": 0.1}), beta=0.1)),
    Method("text-mcts-dpo", "arXiv:2405.00451", _text("visit_smoothed", ("first_difference", {})), source="either"),
    Method("text-madpo", "arXiv:2510.05342", _text("madpo")),
    # reference: the iterate that wrote the data
    Method("text-sppo", "arXiv:2405.00675", _text("sppo"), source="either"),
)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        *OFFLINE,
        *ONLINE,
        *TEXT,
    )
}


class Needs(NamedTuple):
    """What terms ask of the data and of the weights."""

    k: int | None
    roles: tuple[str, ...]
    labels: tuple[str, ...]
    optional: tuple[str, ...]
    """Labels that are read where the records have them."""
    reads: tuple[str, ...]
    listwise: bool
    """Whether pairs are not enough."""


def needs(*terms: Term) -> Needs:
    """The union of what the objectives and shapings of some terms read; ``k`` is None if any number will do."""
    objectives = [find_objective(term.objective) for term in terms]
    readers = [*objectives, *(find_shaping(name) for term in terms for name, _ in term.shaping)]
    roles = dict.fromkeys(role for reader in readers for role in reader.roles)
    labels = dict.fromkeys(label for reader in readers for label in reader.labels)
    optional = dict.fromkeys(label for objective in objectives for label in objective.optional)
    reads = dict.fromkeys(entry for objective in objectives for entry in objective.reads)
    k = next((objective.k for objective in objectives if objective.k is not None), None)
    listwise = any(objective.listwise for objective in objectives)
    return Needs(k, tuple(roles), tuple(labels), tuple(optional), tuple(reads), listwise)


def modality(method: Method) -> str:
    """``"text"`` or ``"diffusion"``: what the main term's estimate runs on."""
    return "text" if unwrapped(method.main.estimate) is estimate.tokens else "diffusion"


def reads_paths(method: Method) -> bool:
    """Whether it learns from sampling trajectories, which records do not hold."""
    return any(unwrapped(term.draw) in (draws.transition, draws.replay) for term in method.terms)


def resolve(
    name: str,
    *,
    draw: Mapping[str, Any] | None = None,
    estimate: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    shaping: Sequence[Mapping[str, Any]] | None = None,
    extra: Sequence[Mapping[str, Any]] = (),
) -> Method:
    """A row with changes to its main term, every parameter checked against the part that takes it.

    Args:
        objective: ``name`` swaps the objective; the row's objective parameters then no longer apply.
        shaping: replaces the row's shapings; each has a ``name``, the rest are its parameters.
        extra: objectives to add on the main term's log-probs, or changes to the row's own extra terms of those names;
            each has a ``name``, a ``weight`` and parameters. A weight of 0 leaves the term out.

    Raises:
        UserError: unknown method, objective, shaping or parameter, a parameter without a value, or parts that do not
            go together.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    row = METHODS[name]
    main = row.main
    changes = dict(objective or {})
    swapped = changes.pop("name", main.objective)
    kept = main.params if swapped == main.objective else {}
    main = replace(
        main,
        draw=_with(main.draw, draw or {}, f"the draw of {name}"),
        estimate=_with(main.estimate, estimate or {}, f"the estimate of {name}"),
        objective=swapped,
        params={**kept, **changes},
        shaping=main.shaping if shaping is None else tuple(_shaping(item) for item in shaping),
    )
    method = replace(row, main=main, extra=_extras(row.extra, extra))
    for term in method.terms:
        _check(term, method)
    return method


def _with(part: Callable[..., Any] | None, params: Mapping[str, Any], where: str) -> Callable[..., Any]:
    assert part is not None  # a main term draws and estimates
    check_parameters(part, params, where)
    return partial(part, **params) if params else part


def _named(item: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    params = dict(item)
    if not isinstance(params.get("name"), str):
        raise UserError(f"method.{what}: every entry needs a name, got {dict(item)!r}")
    return params.pop("name"), params


def _shaping(item: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name, params = _named(item, "shaping")
    check_parameters(find_shaping(name).fn, params, f"shaping {name!r}", complete=True)
    return name, params


def _extras(row: Sequence[Term], changes: Sequence[Mapping[str, Any]]) -> tuple[Term, ...]:
    """The extra terms of a row with changes; what has weight 0 would cost a forward for nothing."""
    terms = {term.objective: term for term in row}
    for item in changes:
        name, params = _named(item, "extra")
        term = terms.get(name, Term(None, None, name))
        weight = params.pop("weight", term.weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"method.extra: the weight of {name!r} must be a number, got {weight!r}")
        terms[name] = replace(term, weight=float(weight), params={**term.params, **params})
    return tuple(term for term in terms.values() if term.weight)


def _check(term: Term, method: Method) -> None:
    """Refuse a term whose parts do not go together, before anything is loaded."""
    objective = find_objective(term.objective)
    check_parameters(objective.fn, term.params, f"objective {term.objective!r}", complete=True)
    shapings = [find_shaping(name) for name, _ in term.shaping]
    for what, part in (("objective", objective), *(("shaping", shaping) for shaping in shapings)):
        if modality(method) not in part.fits:
            raise UserError(f"{what} {part.name!r} is not for {modality(method)} models, so not for {method.name}")
    for shaping in shapings:
        if shaping.over != "any" and objective.k != 2:
            raise UserError(f"shaping {shaping.name!r} is for objectives over pairs; {objective.name!r} is none")
        if shaping.over == "differences" and not objective.differences:
            only = f"shaping {shaping.name!r} is for objectives that read nothing but differences of log-ratios"
            raise UserError(f"{only}; {objective.name!r} reads more")
    _check_reads(objective, term.estimate or method.main.estimate, method)
    sizes = {k for t in method.terms if (k := find_objective(t.objective).k) is not None}
    if len(sizes) > 1:
        raise UserError(f"{method.name}: its objectives want different numbers of candidates: {sorted(sizes)}")


def _check_reads(objective: Objective, part: Callable[..., Any] | None, method: Method) -> None:
    """Refuse an objective that reads what the estimate does not give, or gives only on demand."""
    given = estimate.GIVES.get(unwrapped(part))
    if given is None:  # somebody else's estimate
        return
    asked = part.keywords if isinstance(part, partial) else {}
    for entry in objective.reads:
        kind, _, entry = entry.rpartition(":")  # "text:..." is for text alone
        if kind and kind != modality(method):
            continue
        name = entry.split(".")[0]
        if name not in given:
            raise UserError(f"objective {objective.name!r} reads {entry!r}, which the estimate of {method.name} lacks")
        switch = given[name]
        if switch is not None and not asked.get(switch):
            raise UserError(f"objective {objective.name!r} reads {entry!r}: set method.estimate.{switch}=true")


def unwrapped(part: Callable[..., Any] | None) -> Any:
    """A function without the partials around it."""
    while isinstance(part, partial):
        part = part.func
    return part
