"""The library reproduces the reference numbers of every method, values and gradients, in float64."""

import copy
import json
from pathlib import Path

import pytest
import torch

from diffalign.registry import OBJECTIVES, SHAPINGS, find_objective

from .adapters import ADAPTERS, OBJECTIVES_OF, REQUIRED, Given

VOCABULARY = json.loads((Path(__file__).parent / "vocabulary.json").read_text(encoding="utf-8"))
"""The names of parameters and inputs that a method's files may use."""
LOSS_RTOL = 1e-8
GRADIENT_RTOL = 1e-7  # relative to the largest entry
CROSS_CHECKED = {"apo_down", "apo_zero", "bco_pair", "discopop", "exo_pair", "nca_pair"}
"""Losses that tests/crosscheck compares with the code of trl instead."""
VALUELESS = {"winner_guard"}
"""Shapings that change gradients alone, which tests/property checks."""
FLOOR = 1e-12  # for expectations that are exactly zero


def check_case(method: str, case: dict) -> None:
    """Compute a case and compare every expectation; anything the adapter does not know is a failure."""
    assert method in ADAPTERS, f"no adapter for {method!r}"
    assert {"params", "inputs", "expected"} <= set(case), "not a case"
    params, inputs = Given(case["params"]), Given(case["inputs"])
    found = ADAPTERS[method](params, inputs)
    known = VOCABULARY[method]  # a case may state what its variant of the method does not read
    assert not params.unread - set(known["params"]), f"unknown parameters {sorted(params.unread)}"
    assert not inputs.unread - set(known["inputs"]), f"unknown inputs {sorted(inputs.unread)}"
    expected = case["expected"]
    absent = set(REQUIRED[method]) - set(expected)
    assert not absent, f"the case expects no {sorted(absent)}"
    assert not set(expected) - set(found), f"unknown expectations {sorted(set(expected) - set(found))}"
    kept = found.get("kept")
    for name, value in expected.items():
        if name == "kept":
            assert is_kept(value, kept.tolist()), f"kept: expected {value}, found {kept.tolist()}"
        elif isinstance(value, dict):  # gradients by input
            assert set(value) == set(found[name]), f"{name} of {sorted(value)}, found {sorted(found[name])}"
            for side, gradient in value.items():
                close(f"{name} of {side}", found[name][side], gradient, GRADIENT_RTOL)
        else:
            close(name, found[name], value, GRADIENT_RTOL if name.startswith("grad") else LOSS_RTOL, kept)


def close(name: str, found, expected, rtol: float, kept: torch.Tensor | None = None) -> None:
    """Equal up to ``rtol`` of the largest expected entry; values per row count in the rows that are kept."""
    if not is_rectangular(expected):
        assert len(found) == len(expected), f"{name}: {len(found)} entries, expected {len(expected)}"
        for index, pair in enumerate(zip(found, expected, strict=True)):
            close(f"{name}[{index}]", *pair, rtol)
        return
    expected = torch.tensor(expected, dtype=torch.float64)
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    if kept is not None and found.ndim and not kept.all():
        found = found[kept]
        expected = expected[kept] if len(expected) == len(kept) else expected
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    largest, off = float(expected.abs().max()), float((found - expected).abs().max())
    assert off <= rtol * largest + FLOOR, f"{name}: off by {off:.3g}, largest expected {largest:.3g}"


def is_rectangular(value) -> bool:
    """Whether nested lists make a tensor; stages of a curriculum, for example, have their own lengths."""
    try:
        torch.tensor(value, dtype=torch.float64)
    except (ValueError, TypeError):
        return False
    return True


def is_kept(expected, kept: list[bool]) -> bool:
    """Rows kept, written as their number, their indices or a flag each."""
    return expected in (sum(kept), [row for row, flag in enumerate(kept) if flag], kept)


def test_case(method, case):
    check_case(method, case)


def test_every_adapter_and_objective_has_numbers(golden_data):
    find_objective("sigmoid")  # fills the registry
    elsewhere = CROSS_CHECKED | VALUELESS
    assert {path.stem for path in golden_data.glob("*.json")} == set(ADAPTERS)
    assert {name for names in OBJECTIVES_OF.values() for name in names} == {*OBJECTIVES, *SHAPINGS} - elsewhere


@pytest.fixture
def good(golden_data) -> dict:
    content = json.loads((golden_data / "diffusion_dpo.json").read_text(encoding="utf-8"))
    return copy.deepcopy(content["cases"][0])


def _scaled(case: dict, factor: float) -> None:
    rows = case["expected"]["grad_model_pred"]["model_pred_l"]
    rows[1][0][2][1] *= factor


BROKEN = {
    "unknown parameter": lambda case: case["params"].update(gamma=1.0),
    "unknown value": lambda case: case["params"].update(err_reduction="sum"),
    "missing parameter": lambda case: case["params"].pop("beta"),
    "unknown input": lambda case: case["inputs"].update(sigma=[0.5] * 4),
    "missing input": lambda case: case["inputs"].pop("ref_pred_l"),
    "unknown expectation": lambda case: case["expected"].update(logits=[0.0] * 4),
    "no loss expected": lambda case: case["expected"].pop("loss"),
    "no gradient expected": lambda case: case["expected"].pop("grad_model_pred"),
    "no gradient of one side": lambda case: case["expected"]["grad_model_pred"].pop("model_pred_w"),
    "loss off": lambda case: case["expected"].update(loss=case["expected"]["loss"] * (1 + 1e-7)),
    "sign of one gradient entry": lambda case: _scaled(case, -1.0),
    "pair the other way round": lambda case: case["inputs"].update(
        model_pred_w=case["inputs"]["model_pred_l"], model_pred_l=case["inputs"]["model_pred_w"]
    ),
    "the half forgotten": lambda case: case["params"].update(half=False),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_case_fails(good, how):
    check_case("diffusion_dpo", good)
    BROKEN[how](good)
    with pytest.raises(AssertionError):
        check_case("diffusion_dpo", good)


def test_a_file_without_adapter_fails(good):
    with pytest.raises(AssertionError, match="no adapter"):
        check_case("diffusion_dpx", good)


def in_raw_order(case: dict) -> dict:
    """The same pairs in dataset order with ``label_0``, every other row swapped, and two rows more that are ties."""
    inputs, rows = case["inputs"], len(case["inputs"]["model_pred_w"])
    out = {"label_0": [float(row % 2) for row in range(rows)] + [0.5, 0.7]}
    gradients = {}
    for name in ("model_pred", "ref_pred", "target"):
        w, l = inputs[f"{name}_w"], inputs[f"{name}_l"]  # noqa: E741 - the files call it so
        sides = [(w[i], l[i]) if i % 2 else (l[i], w[i]) for i in range(rows)] + [(w[0], l[1])] * 2
        out |= {f"{name}_{side}": [row[side] for row in sides] for side in (0, 1)}
    for side in (0, 1):
        pair = [case["expected"]["grad_model_pred"][f"model_pred_{s}"] for s in ("l", "w")]
        chosen = [pair[(i + side) % 2][i] for i in range(rows)]
        gradients[f"model_pred_{side}"] = chosen + torch.zeros_like(torch.tensor(chosen[:2])).tolist()
    expected = {name: case["expected"][name] for name in ("loss", "inside_term", "err_model_w", "err_ref_l")}
    policy = "drop rows whose label_0 is neither 0 nor 1; mean over the rows kept"
    return {
        "params": {**case["params"], "tie_policy": policy},
        "inputs": out,
        "expected": {**expected, "grad_model_pred": gradients, "kept": list(range(rows))},
    }


def test_raw_order_with_ties_has_the_same_loss(good):
    check_case("diffusion_dpo", in_raw_order(good))
