"""Every entry of a registry keeps its contract: objectives, methods, families, scorers."""

import inspect
import math
import re

import pytest
import torch

from diffalign.families.base import DiffusersFamily, family_names
from diffalign.methods import METHODS, resolve
from diffalign.registry import OBJECTIVES, Objective, find_objective, keyword_parameters
from diffalign.scoring import load_scorer, scorer_names
from diffalign.types import LogProbs

find_objective("sigmoid")  # fills the registry
VALUES = {"beta": 2.5, "label_smoothing": 0.1}
"""A value for every parameter without default, and for optional ones that must not move an identity."""

PAPER = re.compile(r"arXiv:\d{4}\.\d{5}")


def log_probs(objective: Objective, b: int = 3, u: int = 2, equal: bool = False) -> LogProbs:
    generator = torch.Generator().manual_seed(0)
    shape = (b, objective.k or 3, u)
    policy = torch.randn(shape, generator=generator, dtype=torch.float64)
    others = {role: policy.clone() if equal else torch.randn_like(policy) for role in objective.roles}
    return LogProbs({"policy": policy.requires_grad_(), **others}, torch.ones_like(others[objective.roles[0]]))


def labels_of(objective: Objective, b: int = 3) -> dict[str, torch.Tensor]:
    k = objective.k or 3
    return {name: torch.arange(b * k, dtype=torch.float64).reshape(b, k) for name in objective.labels}


def required(objective: Objective) -> dict[str, float]:
    schema = keyword_parameters(objective.fn)
    return {name: VALUES[name] for name, p in schema.items() if p.default is p.empty}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_what_it_is(name):
    objective = OBJECTIVES[name]
    assert objective.name == objective.fn.__name__ == name
    assert PAPER.search(objective.paper)
    assert "eq" in objective.paper
    assert (inspect.getdoc(objective.fn) or "").count("\n") > 2
    assert objective.fn.__module__.startswith("diffalign.objectives.")
    assert re.search(r"objectives/\w+\.py:\d+$", objective.origin)
    parameters = list(inspect.signature(objective.fn).parameters.values())
    assert [p.name for p in parameters[:2]] == ["lp", "labels"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    assert all(p.annotation is not p.empty for p in parameters)
    described = inspect.getdoc(objective.fn) or ""
    assert not [p.name for p in parameters[2:] if f"{p.name}:" not in described]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_returns_a_value_and_a_weight_per_record(name):
    objective = OBJECTIVES[name]
    lp = log_probs(objective)
    loss = objective(lp, labels_of(objective), **required(objective))
    assert loss.value.shape == loss.weight.shape == (3,)
    assert loss.value.dtype == torch.float64
    assert not loss.weight.requires_grad
    (gradient,) = torch.autograd.grad(loss.reduce(), lp.by_role["policy"])
    assert gradient.flatten(1).any(1).all()


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.identity is not None])
@pytest.mark.parametrize("optional", [False, True])
def test_the_identity_is_the_value_at_policy_equals_reference(name, optional):
    objective = OBJECTIVES[name]
    extra = {n: VALUES[n] for n in keyword_parameters(objective.fn)} if optional else required(objective)
    lp = log_probs(objective, equal=True)
    loss = objective(lp, labels_of(objective), **extra)
    assert loss.value.tolist() == pytest.approx([objective.identity] * 3, rel=1e-12)
    assert math.isfinite(objective.identity)
    if objective.k == 2:  # and nowhere else, or the check at step 0 would be blind
        moved = objective(log_probs(objective), labels_of(objective), **extra)
        assert (moved.value - objective.identity).abs().min() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_resolves_and_its_terms_fit(name):
    method = resolve(name)
    assert method.name == name
    assert PAPER.search(method.paper)
    for term in method.terms:
        objective = find_objective(term.objective)
        assert set(term.params) <= set(keyword_parameters(objective.fn))
        assert set(required(objective)) <= set(term.params)
        assert {"scale"} <= set(keyword_parameters(term.estimate))
        assert term.weight > 0


@pytest.mark.parametrize("name", family_names())
def test_a_family_is_named_like_its_file(name):
    module = __import__(f"diffalign.families.{name}", fromlist=["Family"])
    assert module.Family.name == name
    assert issubclass(module.Family, DiffusersFamily)
    assert module.Family.modality in ("image", "video", "mesh")
    assert hasattr(module.Family.pipeline_class(), "from_pretrained")
    for own in ("_encode", "predict"):
        assert getattr(module.Family, own) is not getattr(DiffusersFamily, own)


@pytest.mark.parametrize("name", scorer_names())
def test_a_scorer_builds_with_its_defaults(name):
    scorer = load_scorer(name)
    assert scorer.accepts <= {"image", "video", "mesh", "text"}
    assert scorer.accepts


def test_the_registries_are_not_empty():
    assert "sigmoid" in OBJECTIVES
    assert "diffusion-dpo" in METHODS
    assert "sd3" in family_names()
    assert "shapes" in scorer_names()
