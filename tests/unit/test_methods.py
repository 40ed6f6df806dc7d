"""Resolving a row of the catalogue with overrides: what applies, and what is refused in one line."""

import inspect
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from diffalign import draws, estimate, methods
from diffalign.errors import UserError
from diffalign.methods import METHODS, resolve
from diffalign.registry import OBJECTIVES, check_parameters, find_objective, objective
from diffalign.types import LogProbs, Loss, Term


def keywords(part) -> dict:
    """The keyword arguments bound to a part."""
    return getattr(part, "keywords", {})


@pytest.fixture
def flat(monkeypatch):
    """Another objective, registered for one test: no beta, an optional and a required parameter."""

    def flat(lp: LogProbs, labels, *, floor: float, slope: float = 2.0) -> Loss:
        """Constant."""
        return Loss(torch.full(lp.mask.shape[:1], floor * slope), torch.ones(lp.mask.shape[:1]))

    monkeypatch.setattr("diffalign.registry.OBJECTIVES", OBJECTIVES.copy())
    objective(k=2, paper="none", roles=("reference",))(flat)
    return flat


@pytest.fixture
def foreign(monkeypatch):
    """A module outside the project with a registered and an unregistered loss."""
    module = ModuleType("somewhere_losses")
    monkeypatch.setitem(sys.modules, "somewhere_losses", module)
    monkeypatch.setattr("diffalign.registry.OBJECTIVES", OBJECTIVES.copy())

    def fancy(lp: LogProbs, labels, *, gamma: float) -> Loss:
        """Nothing."""
        raise NotImplementedError

    module.fancy = objective(k=None, paper="none")(fancy)
    module.bare = lambda lp, labels: None
    return module


def test_a_row_without_changes_is_the_paper():
    method = resolve("diffusion-dpo")
    assert (method.name, method.paper) == ("diffusion-dpo", "arXiv:2311.12908")
    assert method.main.objective == "sigmoid"
    assert method.main.params == {"beta": 5000.0}
    assert method.main.draw is draws.forward
    assert method.main.estimate is estimate.denoising
    assert (
        keywords(method.main.estimate).get("scale", inspect.signature(estimate.denoising).parameters["scale"].default)
        == 0.5
    )
    assert [term.weight for term in method.terms] == [1.0]


def test_an_extra_term_of_the_row_is_changed_not_added_twice():
    released = {term.objective: term.weight for term in resolve("awm-released").extra}
    assert released == {"velocity_kl": 0.003, "velocity_kl_average": 1.0}
    changes = [{"name": "velocity_kl", "weight": 0.001, "weight_kind": "ELBO"}]
    with pytest.raises(UserError, match="weight_kind"):
        resolve("awm-released", extra=changes)
    method = resolve("awm-released", extra=[{"name": "velocity_kl", "weight": 0.001}])
    assert {term.objective: term.weight for term in method.extra} == {**released, "velocity_kl": 0.001}
    only = resolve("flow-grpo", extra=[{"name": "gaussian_kl", "exact": True}]).extra
    assert [(term.weight, term.params) for term in only] == [(0.04, {"exact": True})]
    assert [term.weight for term in METHODS["awm-released"].extra] == [0.003, 1.0]


def test_an_extra_term_keeps_its_own_draw():
    [imitation] = resolve("condition-po", extra=[{"name": "sft", "weight": 0.1}]).extra
    [own] = METHODS["condition-po"].extra
    assert (imitation.weight, imitation.draw, imitation.estimate) == (0.1, own.draw, own.estimate)


def test_weight_0_spares_the_forward_of_a_reference():
    method = resolve("flow-grpo", extra=[{"name": "gaussian_kl", "weight": 0}])
    assert method.extra == ()
    assert methods.needs(*method.terms).roles == ("behaviour",)


def test_overrides_reach_their_part_and_leave_the_catalogue_alone():
    before = METHODS["diffusion-dpo"]
    method = resolve(
        "diffusion-dpo",
        draw={"share_noise": False},
        estimate={"scale": 1.0},
        objective={"beta": 100.0, "label_smoothing": 0.1},
    )
    assert keywords(method.main.draw) == {"share_noise": False}
    assert keywords(method.main.estimate) == {"scale": 1.0}
    assert method.main.params == {"beta": 100.0, "label_smoothing": 0.1}
    assert METHODS["diffusion-dpo"] is before
    assert before.main.params == {"beta": 5000.0}
    assert resolve("diffusion-dpo").main.draw is draws.forward


@pytest.mark.parametrize("given", [{"label_smoothing": 0.1}, {"name": "sigmoid", "label_smoothing": 0.1}])
def test_a_change_of_one_parameter_keeps_the_others_of_the_row(given):
    assert resolve("diffusion-dpo", objective=given).main.params == {"beta": 5000.0, "label_smoothing": 0.1}


def test_a_swapped_objective_drops_the_parameters_of_the_row(flat):
    method = resolve("diffusion-dpo", objective={"name": "flat", "floor": 1.5})
    assert method.main.objective == "flat"
    assert method.main.params == {"floor": 1.5}
    assert find_objective("flat").fn is flat


def test_extra_terms_stay(monkeypatch):
    row = METHODS["diffusion-dpo"]
    extra = Term(row.main.draw, row.main.estimate, "sigmoid", 0.05, {"beta": 1.0})
    monkeypatch.setitem(methods.METHODS, "two", replace(row, name="two", extra=(extra,)))
    method = resolve("two", objective={"beta": 3.0})
    assert method.extra == (extra,)
    assert [term.weight for term in method.terms] == [1.0, 0.05]
    assert method.main.params == {"beta": 3.0}


def test_a_foreign_objective_by_module_path(foreign):
    method = resolve("diffusion-dpo", objective={"name": "somewhere_losses:fancy", "gamma": 2.0})
    assert find_objective(method.main.objective).fn is foreign.fancy
    assert method.main.params == {"gamma": 2.0}


REFUSED = {
    "unknown method": (
        ("diffusion-dop", {}),
        "unknown method 'diffusion-dop'; did you mean 'diffusion-dro' or 'diffusion-dpo'",
    ),
    "unknown objective": (
        ("diffusion-dpo", {"objective": {"name": "sigmoyd"}}),
        "unknown objective 'sigmoyd'; did you mean 'sigmoid'",
    ),
    "unknown parameter of the objective": (
        ("diffusion-dpo", {"objective": {"betta": 1.0}}),
        "objective 'sigmoid' has no parameter 'betta'; did you mean 'beta'?",
    ),
    "unknown parameter of the draw": (
        ("diffusion-dpo", {"draw": {"share_noize": False}}),
        "the draw of diffusion-dpo has no parameter 'share_noize'; did you mean 'share_noise'",
    ),
    "unknown parameter of the estimate": (
        ("diffusion-dpo", {"estimate": {"scales": 1.0}}),
        "the estimate of diffusion-dpo has no parameter 'scales'; did you mean 'scale'",
    ),
    "text for a number": (
        ("diffusion-dpo", {"objective": {"beta": "5000"}}),
        "objective 'sigmoid': beta must be float, got '5000'",
    ),
    "not a finite number": (
        ("diffusion-dpo", {"objective": {"beta": math.nan}}),
        "objective 'sigmoid': beta must be float, got nan",
    ),
    "a number for a switch": (
        ("diffusion-dpo", {"draw": {"share_t": 1}}),
        "the draw of diffusion-dpo: share_t must be bool, got 1",
    ),
    "a switch for a number": (
        ("diffusion-dpo", {"estimate": {"scale": True}}),
        "the estimate of diffusion-dpo: scale must be float, got True",
    ),
    "positional parameter": (
        ("diffusion-dpo", {"objective": {"labels": 1.0}}),
        "objective 'sigmoid' has no parameter 'labels'; did you mean 'label_smoothing'?",
    ),
    "no such module": (
        ("diffusion-dpo", {"objective": {"name": "no_such_package:loss"}}),
        "cannot load 'no_such_package:loss': No module named 'no_such_package'",
    ),
    "no such attribute": (
        ("diffusion-dpo", {"objective": {"name": "diffalign.objectives.pair:sigmoyd"}}),
        "cannot load 'diffalign.objectives.pair:sigmoyd'",
    ),
    "parameters of the row do not follow a swap": (
        ("diffusion-dpo", {"objective": {"name": "diffalign.objectives.pair:sigmoid"}}),
        "objective 'diffalign.objectives.pair:sigmoid' needs beta",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_are_one_line_with_a_suggestion(why):
    (name, changes), message = REFUSED[why]
    with pytest.raises(UserError) as caught:
        resolve(name, **changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_swap_without_the_required_parameter_is_refused(flat):
    with pytest.raises(UserError, match=r"^objective 'flat' needs floor$"):
        resolve("diffusion-dpo", objective={"name": "flat"})
    with pytest.raises(UserError, match=r"^objective 'flat' has no parameter 'beta'"):
        resolve("diffusion-dpo", objective={"name": "flat", "floor": 1.0, "beta": 1.0})


def test_a_row_without_beta_is_refused(monkeypatch):
    row = METHODS["diffusion-dpo"]
    monkeypatch.setitem(methods.METHODS, "bare", replace(row, main=replace(row.main, params={})))
    with pytest.raises(UserError, match=r"^objective 'sigmoid' needs beta$"):
        resolve("bare")
    assert resolve("bare", objective={"beta": 2.0}).main.params == {"beta": 2.0}


def test_an_undecorated_function_is_no_objective(foreign):
    with pytest.raises(UserError, match="somewhere_losses:bare is no objective: decorate it"):
        resolve("diffusion-dpo", objective={"name": "somewhere_losses:bare"})


def test_a_name_is_registered_once(flat):
    with pytest.raises(ValueError, match=r"objective 'flat' is already registered by tests.unit.test_methods"):
        objective(k=2, paper="none")(flat)


def test_only_missing_parameters_without_default_are_named():
    def part(*, a: float, b: float, c: float = 1.0) -> None: ...

    check_parameters(part, {"a": 1}, "part")
    check_parameters(part, {"a": 1, "b": 2}, "part", complete=True)
    with pytest.raises(UserError, match=r"^part needs a, b$"):
        check_parameters(part, {"c": 1}, "part", complete=True)
