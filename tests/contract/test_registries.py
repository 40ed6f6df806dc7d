"""Every entry of a registry keeps its contract: objectives, methods, families, scorers."""

import inspect
import re

import pytest

from diffalign.errors import UserError
from diffalign.families._pipeline import DiffusersFamily
from diffalign.families.base import LatentFamily, family_class, family_names
from diffalign.methods import METHODS, resolve
from diffalign.registry import OBJECTIVES, SHAPINGS, find_objective, keyword_parameters
from diffalign.scoring import load_scorer, scorer_names

find_objective("sigmoid")  # fills the registry
PAPER = re.compile(r"arXiv:\d{4}\.\d{5}")


@pytest.mark.parametrize("entry", [*OBJECTIVES.values(), *SHAPINGS.values()], ids=lambda entry: entry.name)
def test_an_objective_or_shaping_says_what_it_is(entry):
    described = inspect.getdoc(entry.fn) or ""
    assert entry.name == entry.fn.__name__
    assert PAPER.search(entry.paper)
    assert re.search(r"eq|sec|table|release|code", entry.paper)
    assert described.count("\n") > 2
    assert entry.fn.__module__.startswith("diffalign.objectives.")
    parameters = list(inspect.signature(entry.fn).parameters.values())
    assert [p.name for p in parameters[:2]] == ["lp", "labels"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    assert all(p.annotation is not p.empty for p in parameters)
    assert not [p.name for p in parameters[2:] if f"{p.name}:" not in described]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda objective: objective.name)
def test_an_objective_says_what_it_needs(objective):
    assert objective.k is None or objective.k > 0
    assert set(objective.fits) <= {"diffusion", "text"}
    assert objective.fits
    assert len(set(objective.roles)) == len(objective.roles)
    assert "policy" not in objective.roles
    for entry in objective.reads:  # a gap is to a role that runs
        assert not entry.startswith("gap.") or entry.removeprefix("gap.") in objective.roles


@pytest.mark.parametrize("name", METHODS)
def test_a_method_resolves_and_its_terms_fit(name):
    method = resolve(name)
    assert method.name == name
    assert PAPER.search(method.paper)
    for term in method.terms:
        objective = find_objective(term.objective)
        assert set(term.params) <= set(keyword_parameters(objective.fn))
        needed = {n for n, p in keyword_parameters(objective.fn).items() if p.default is p.empty}
        assert needed <= set(term.params)
        assert term.weight > 0


@pytest.mark.parametrize("name", family_names())
def test_a_family_is_named_like_its_file(name):
    family = family_class(name)
    assert family.name == name
    assert family.modality in ("image", "video", "mesh", "text")
    assert all(callable(getattr(family, part)) for part in ("load", "save_lora", "save_net", "load_lora"))
    if issubclass(family, DiffusersFamily):
        assert hasattr(family.pipeline_class(), "from_pretrained")
    if issubclass(family, LatentFamily):
        for own in ("_encode", "predict"):
            assert getattr(family, own) is not getattr(LatentFamily, own)


def built(name):
    """A scorer with its defaults, or the complaint that there is none."""
    try:
        return load_scorer(name)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", scorer_names())
def test_a_scorer_builds_with_its_defaults_or_says_what_it_needs(name):
    """What it needs is files: no test reaches the network."""
    scorer = built(name)
    if isinstance(scorer, str):
        assert "\n" not in scorer
    else:
        assert scorer.accepts
        assert scorer.accepts <= {"image", "video", "mesh", "text"}


def test_the_registries_are_not_empty():
    assert "sigmoid" in OBJECTIVES
    assert "diffusion-dpo" in METHODS
    assert "sd3" in family_names()
    assert "shapes" in scorer_names()
