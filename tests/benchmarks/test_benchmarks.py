"""The benchmarks run on tiny shapes, and their harness is honest: what is wrong is never timed."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed

from benchmarks import __main__, _harness, _maml, _matching, _peers, maml_memory

TORCH_PEERS = "eager|torch|autograd|SDPA|_foreach"


@pytest.fixture(autouse=True)
def _leave_the_process_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)


def quick(name, tmp_path, *more):
    """Run one benchmark on its tiny shapes; returns the exit status and the JSON it wrote."""
    module = importlib.import_module(f"benchmarks.{name}")
    arguments = ["--quick", "--threads", "1", "--seconds", "0.01", "--json", str(tmp_path), *more]
    status = _harness.run(name, "", module.cases, arguments)
    return status, json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.parametrize("name", __main__.NAMES)
def test_runs_and_agrees_with_float64(name, tmp_path, capsys):
    status, written = quick(name, tmp_path, "--peers", TORCH_PEERS)
    assert status == 0, capsys.readouterr().out
    for case in written["cases"]:
        rows = {row["name"]: row for row in case["rows"]}
        assert rows["fastmeta"]["times_ours"] == 1
        assert sum(row["kind"] == "eager" for row in case["rows"]) >= 1
        assert all(row["ms"] > 0 and row["error"] < 1e-2 for row in case["rows"])
        failed = [why for why in case["absent"].values() if why.startswith("failed")]
        assert not failed


def test_maml_lists_the_wrong_gradient_of_torch_func(tmp_path):
    _, written = quick("maml", tmp_path, "--peers", "torch.func", "--cases", "batch norm")
    (case,) = written["cases"]
    assert "torch.func vmap(grad)" in {row["name"] for row in case["rows"]}
    if torch.__version__.startswith("2.13"):
        assert case["absent"]["torch.func grad(vmap)"].startswith("WRONG")


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    quick("segment_mean", tmp_path, "--peers", "eager", "--plot", str(tmp_path))
    for name in ("segment_mean.png", "segment_mean_overview.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_memory_of_maml_is_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = ["--json", str(tmp_path), "--plot", str(tmp_path)]
    status = maml_memory.main(["--quick", "--threads", "1", "--peers", "autograd", *paths])
    assert status == 0, capsys.readouterr().out
    written = json.loads((tmp_path / "maml_memory.json").read_text())
    assert {"fastmeta", "autograd loop"} <= set(written["mib"])
    assert set(written["mib"]["fastmeta"]) == {"1", "5"}
    assert (tmp_path / "maml_memory.png").read_bytes().startswith(b"\x89PNG")


def options(**changes):
    values = _harness.parser("test", "").parse_args(["--quick", "--threads", "1"])
    _harness.configure(values)
    for name, value in changes.items():
        setattr(values, name, value)
    return values


def two_contestants(ours, peer, kind="eager"):
    truth = [np.arange(4.0)]
    contestants = [
        _harness.Contestant("fastmeta", lambda dtype: ours, "ours"),
        _harness.Contestant("peer", lambda dtype: peer, kind),
    ]
    return _harness.Case("case", contestants, lambda: truth, flops=1e3, traffic=1e3)


def right():
    return [torch.arange(4.0)]


def wrong():
    return [torch.arange(4.0) * 1.01]


def test_a_wrong_peer_is_named_and_not_timed():
    case = two_contestants(right, wrong)
    summary = _harness.summarise(options(), case, _harness.measure(options(), case))
    assert [row["name"] for row in summary["rows"]] == ["fastmeta"]
    assert summary["absent"]["peer"].startswith("WRONG: relative error 1.0e-02")
    assert not summary["ours_wrong"]
    assert "peer: WRONG" in _harness.table(summary)


def test_a_wrong_fastmeta_fails_the_run(tmp_path):
    case = two_contestants(wrong, right)
    assert _harness.run("x", "", lambda _: [case], ["--quick", "--threads", "1"]) == 1


def test_an_absent_peer_is_named():
    def build(dtype):
        return _peers.peer("surely_not_installed")

    case = two_contestants(right, right)
    case.contestants.append(_harness.Contestant("absent", build))
    summary = _harness.summarise(options(), case, _harness.measure(options(), case))
    assert summary["absent"] == {"absent": "surely_not_installed is not installed"}


def test_fail_behind_fails_where_eager_is_faster(capsys):
    def slow():
        torch.randn(300, 300) @ torch.randn(300, 300)
        return right()

    case = two_contestants(slow, right)
    arguments = ["--threads", "1", "--seconds", "0.01", "--fail-behind"]
    assert _harness.run("x", "", lambda _: [case], arguments) == 1
    assert "BEHIND eager (peer): case" in capsys.readouterr().out
    case = two_contestants(right, slow)
    assert _harness.run("x", "", lambda _: [case], arguments) == 0


def test_shapes_and_nan_count_as_wrong():
    truth = [np.zeros(3), np.ones((2, 2))]
    assert _harness.relative_error([np.zeros(3), np.ones((2, 2))], truth) == 0
    assert _harness.relative_error([np.zeros(3), np.ones(4)], truth) == float("inf")
    assert _harness.relative_error([np.zeros(3), np.full((2, 2), np.nan)], truth) == float("inf")
    assert _harness.relative_error([np.full(3, 1e-3), np.ones((2, 2))], truth) > 0.5


def test_truth_of_matching_is_the_definition():
    work = _matching.Work("w", 2, 3, 6, 4, 5, "cosine", ragged=True, backward=False)
    inputs = _matching.draw(work, "float32")
    (logp,) = _matching.truth(work, inputs, "log_probs")
    (nll,) = _matching.truth(work, inputs, "nll")
    losses = []
    for t in range(2):
        for q in range(4):
            x, sums = inputs.query[t, q], np.zeros(3)
            for i in range(inputs.lengths[t]):
                s = inputs.support[t, i]
                cosine = x @ s / np.linalg.norm(x) / np.linalg.norm(s)
                sums[inputs.labels[t, i]] += np.exp(inputs.scale * cosine)
            np.testing.assert_allclose(logp[t, q], np.log(sums / sums.sum()), rtol=1e-10)
            losses.append(-logp[t, q, inputs.targets[t, q]])
    np.testing.assert_allclose(nll, np.mean(losses), rtol=1e-12)


@pytest.mark.parametrize("work", _maml.QUICK, ids=lambda w: w.title)
def test_truth_of_maml_is_the_slope_of_the_loss(work):
    if not work.second_order:
        work = _maml.Work(**{**vars(work), "second_order": True})
    model = _maml.module(work)
    batch = _maml.tensors(_maml.data(work), "float64", "cpu")
    f, loss = _maml.functional(work), _maml.loss_of(work)

    def meta_loss(parameters):
        total = 0.0
        xs, ys, xq, yq = batch
        for t in range(work.T):
            theta = [p.detach().requires_grad_() for p in parameters]
            for _ in range(work.K):
                grads = torch.autograd.grad(loss(f(theta, xs[t]), ys[t]), theta)
                theta = [(p - work.lr * g).detach() for p, g in zip(theta, grads, strict=True)]
                theta = [p.requires_grad_() for p in theta]
            total += float(loss(f(theta, xq[t]), yq[t]).detach()) / work.T
        return total

    parameters = [p.detach().requires_grad_() for p in model.parameters()]
    grads = _maml.unrolled(work, parameters, batch)[: len(parameters)]
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    step = 1e-6
    ahead, behind = (
        meta_loss([p + sign * step * d for p, d in zip(parameters, direction, strict=True)])
        for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
def test_flops_of_maml_are_those_that_torch_counts(second_order, steps):
    from torch.utils.flop_counter import FlopCounterMode

    work = _maml.Work("w", "mlp", (7, 6, 5, 3), 2, steps, 6, 9, second_order=second_order)
    parameters = list(_maml.module(work).parameters())
    batch = _maml.tensors(_maml.data(work), "float64", "cpu")
    with FlopCounterMode(display=False) as counter:
        _maml.unrolled(work, parameters, batch)
    counted = counter.get_total_flops()
    if steps == 1:
        assert _maml.flops(work) == counted
    else:  # the first layer's steps take fewer in factored form
        assert 0.9 * counted < _maml.flops(work) < counted


def test_options_choose_cases_and_peers(capsys):
    assert _harness.run("x", "", lambda _: [two_contestants(right, right)], ["--cases", "no"]) == 2
    chosen = options(peers="other")
    results = _harness.measure(chosen, two_contestants(right, right))
    assert [r.name for r in results] == ["fastmeta"]
    assert isinstance(chosen, argparse.Namespace)
