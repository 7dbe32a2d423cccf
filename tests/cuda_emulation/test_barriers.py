"""Every barrier of the kernels, taken away one at a time: the tests must see that it is gone."""

from __future__ import annotations

import faulthandler
import os
import signal

import pytest
import torch
from cuda_emulation.cases import Case
from cuda_emulation.test_segment_mean import make, run_backward, run_mean
from cuda_emulation.test_task_batch_norm import flat
from cuda_emulation.test_task_batch_norm import make as make_norm
from cuda_emulation.test_task_batch_norm import run as run_norm
from cuda_emulation.test_task_conv2d import CASES as CONVOLUTIONS
from cuda_emulation.test_task_conv2d import make as make_conv2d
from cuda_emulation.test_task_conv2d import run as run_conv2d
from cuda_emulation.test_task_linear import make as make_linear
from cuda_emulation.test_task_linear import run as run_linear
from cuda_emulation.updates import Entry
from cuda_emulation.updates import run_backward as run_update_backward

ONE_BLOCK = 1  # takes all the work, so that shared memory is used again and again
SCHEDULES = [("random", seed) for seed in range(6)] + [("forward", 0), ("reverse", 0)]


def segment_mean(emulation):
    values, labels = make(2, 700, 3, 4, torch.float32)
    mean, count = run_mean(emulation, values, labels, 3, "float32")
    return [mean, count, run_backward(emulation, mean, labels, count, "float32")]


def update(op):
    def run(emulation):
        entries = [Entry(op, 3, 9000, lr, torch.float32, 1) for lr in ("one", "per_task")]
        grads = run_update_backward(emulation, entries)
        return [value for named in grads for value in named.values()]

    return run


def matching(similarity, nll, dtype=torch.float32):
    def run(emulation):
        case = Case(2, 70, 67, 3, 132, similarity, dtype)
        return list(case.run(emulation, nll=nll).values())

    return run


def double_backward(similarity, nll, dtype):
    """Work items, tiles on both sides, and slices that wait in memory between tiles."""

    def run(emulation):
        case = Case(3, 66, 67, 3, 68, similarity, dtype)
        case.labels[0] = -100  # work without tiles
        emulation.module.multiprocessors(1)
        return list(case.run_second(emulation, nll=nll, dots=case.directions()).values())

    return run


def task_linear(emulation):
    return [run_linear(emulation, "float32", *make_linear(2, 20, 100, 30, torch.float32))]


def task_conv2d(emulation):
    case = CONVOLUTIONS["conv4"]
    return list(run_conv2d(emulation, "bfloat16", case, make_conv2d(case, torch.bfloat16)).values())


def task_batch_norm(emulation):
    return flat(run_norm(emulation, "float32", make_norm(1, 3, 2, 400, torch.float32)))


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(segment_mean, id="segment_mean"),
        pytest.param(task_linear, id="task_linear"),
        pytest.param(task_conv2d, id="task_conv2d on tensor cores"),
        pytest.param(task_batch_norm, id="task_batch_norm"),
        pytest.param(update("sgd"), id="sgd_update"),
        pytest.param(update("adam"), id="adam_update"),
        pytest.param(matching("cosine", False), id="matching_attention", marks=pytest.mark.slow),
        pytest.param(matching("cosine", False, torch.bfloat16), id="on tensor cores"),
        pytest.param(matching("additive", True), id="matching_nll", marks=pytest.mark.slow),
        pytest.param(
            double_backward("cosine", False, torch.bfloat16),
            id="matching_attention_double_backward",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            double_backward("additive", True, torch.float32),
            id="matching_nll_double_backward",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_barrier_is_seen(emulation, run):
    emulation.schedule(max_grid=ONE_BLOCK)
    emulation.module.take_barriers()
    right = run(emulation)
    sites = emulation.module.take_barriers()
    assert sites
    unseen = {site for site in sites if not is_seen(emulation, run, site, right)}
    assert not unseen


def is_seen(emulation, run, site, right):
    """Whether some thread order gives other numbers, or none, without the barrier at ``site``."""
    return any(differs(emulation, run, site, right, *schedule) for schedule in SCHEDULES)


def differs(emulation, run, site, right, order, seed):
    child = os.fork()  # what has not been written may serve as an address, or bound a loop
    if child == 0:
        same = False
        try:
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            torch.set_num_threads(1)  # the pool of threads stays with the parent
            emulation.schedule(seed, order, ONE_BLOCK)
            emulation.module.skip_barrier(site)
            same = all(map(torch.equal, right, run(emulation)))
        finally:
            os._exit(0 if same else 1)
    return os.waitpid(child, 0)[1] != 0
