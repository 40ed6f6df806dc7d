"""One optimiser step is the same whatever micro-steps and ranks its batch is cut into."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.registry import find_objective
from diffalign.train.step import loss_step

from . import linear


def cut(batch, sizes: list[int]):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [batch.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def step(parts, clip: float | None = None):
    """Metrics and gradients of one step."""
    net = linear.network()
    metrics = linear.accumulate(linear.make_update(net, lambda t: t, clip), net, parts)
    return metrics, torch.cat([p.grad.flatten() for p in net.parameters()])


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=60)
@given(sizes, st.data())
def test_any_cut_gives_the_same_loss_and_gradient(sizes, data):
    n = sum(sizes)
    leads = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 1.0]), min_size=n, max_size=n))
    skip = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=n, max_size=n))
    batch = linear.data(n, rewards=leads, skip=skip)
    whole, gradient = step([batch])
    metrics, cut_gradient = step(cut(batch, sizes))
    assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-12, abs=1e-14)
    assert metrics["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-12, atol=1e-13)
    if not any(leads):
        assert whole["loss"] == 0.0
        assert not gradient.any()


def test_a_step_is_the_gradient_of_the_weighted_means():
    """Against plain autograd on ``sum of factor * Loss.reduce()``."""
    batch = linear.data(12)
    net = linear.network()
    total = torch.zeros((), dtype=torch.float64)
    weights = []
    for term in linear.METHOD.terms:
        lp = term.estimate(net, net, batch, None, ("reference",), nullcontext)
        (loss,) = find_objective(term.objective)(lp, batch.labels, **term.params)
        total = total + term.weight * loss.reduce()
        weights.append(float(loss.weight.sum()))
    assert weights == [8.0, 6.0]  # so that no common divisor would do
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    for sizes in ([12], [5, 7], [1] * 12):
        metrics, gradient = step(cut(batch, sizes))
        assert metrics["loss"] == pytest.approx(total.item(), rel=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_micro_steps_of_ties_alone_change_nothing():
    batch, ties = linear.data(6), linear.data(4, seed=1, rewards=[0.0] * 4)
    metrics, gradient = step([batch])
    for parts in ([ties, batch], [batch, ties], [ties, *cut(batch, [2, 4]), ties]):
        found, same = step(parts)
        assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
        torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-14)


def test_the_loss_of_a_step_result_is_that_of_its_batch():
    net, batch = linear.network(), linear.data(9)
    result = loss_step(linear.METHOD, net, net, batch, torch.Generator())
    metrics, _ = step([batch])
    assert result.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    assert result.loss.item() == result.metrics["loss"]


def test_parts_of_a_step_alone_take_one_backward_pass(monkeypatch):
    calls = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: calls.append(1) or backward(self, *a, **k))
    whole, gradient = step([linear.data(9)])
    assert len(calls) == 1
    metrics, same = step(cut(linear.data(9), [4, 5]))
    assert len(calls) == 1 + 2 * 2
    assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-14)


def test_clipping_scales_the_gradient_and_reports_the_norm_before():
    parts = cut(linear.data(9), [4, 5])
    free, gradient = step(parts)
    metrics, clipped = step(parts, clip=free["grad_norm"] / 4)
    assert free["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-12)
    torch.testing.assert_close(clipped, gradient / 4, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    assert torch.equal(step(parts, clip=10 * free["grad_norm"])[1], gradient)


def test_nothing_carries_over_to_the_next_step():
    first, second = linear.data(8), linear.data(8, seed=1)
    net = linear.network()
    update = linear.make_update(net, lambda t: t)
    linear.accumulate(update, net, cut(first, [3, 5]))
    start = [p.detach().clone() for p in net.parameters()]
    expected = [p.detach() - 0.2 * p.grad for p in net.parameters()]
    update.apply()
    torch.testing.assert_close([p.detach() for p in net.parameters()], expected, rtol=1e-12, atol=1e-14)
    assert not any(map(torch.equal, net.parameters(), start))
    assert all(p.grad is None for p in net.parameters())
    again = linear.network()
    again.load_state_dict(net.state_dict())
    metrics = linear.accumulate(update, net, [second])
    fresh = linear.accumulate(linear.make_update(again, lambda t: t), again, [second])
    assert metrics == {**fresh, "lr": 0.1}  # the schedule moved on
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_parameter_without_gradient_is_counted():
    net = linear.network()
    idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    update = linear.make_update(net, lambda t: t)
    update.parameters.append(idle)
    metrics = linear.accumulate(update, net, [linear.data(4)])
    assert metrics["grad_live"] == pytest.approx(2 / 3)
    assert not idle.grad.any()


# --- ranks --------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_ranks(folder: Path, world: int) -> list[dict]:
    """Train in processes that talk through gloo; what each of them wrote."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    outs = [folder / f"{rank}.json" for rank in range(world)]
    processes = []
    for rank, out in enumerate(outs):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, linear.__file__, str(out)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
    finally:
        for process in processes:
            process.kill()
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


def test_two_ranks_train_like_one(tmp_path):
    one = linear.train(0, 1, lambda t: t)
    first, second = _run_ranks(tmp_path, 2)
    assert first["run"] == [0, 2, True]
    assert second["run"] == [1, 2, False]
    assert first["sum"] == second["sum"] == [3.0, 20.0]
    assert first["parameters"] == second["parameters"]
    assert first["metrics"] == second["metrics"]
    for found, wanted in zip(first["parameters"], one["parameters"], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-12, atol=1e-14)
    for found, wanted in zip(first["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)
    alone = linear.train(0, 1, lambda t: t, micros=1)  # a micro-step per step: all parts in one backward pass
    assert first["alone"] == second["alone"]
    torch.testing.assert_close(
        [torch.tensor(p) for p in first["alone"]["parameters"]],
        [torch.tensor(p) for p in alone["parameters"]],
        rtol=1e-12,
        atol=1e-14,
    )
    assert [m["loss"] for m in first["alone"]["metrics"]] == pytest.approx([m["loss"] for m in alone["metrics"]])
    start = [p.tolist() for p in linear.network().parameters()]
    assert first["parameters"] != start
