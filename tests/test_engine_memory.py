"""The engine's memory: against the number of steps, of tasks, and over a long run."""

from pathlib import Path

import fresh
import pytest
import torch
from mamlcases import agree, batch, make, unroll
from memorycases import resident
from torch import nn

import fastmeta as fm
from fastmeta.maml import MAML

PACKAGE = Path(fm.__file__).parents[1]
#: Its parameters take 1.2 MiB, and the values of a step on 1,000 supports 8 MiB.
PEAK = """
import sys

import torch
import fastmeta as fm

sys.path.insert(0, {tests!r})
from memorycases import extra

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(100, 500), torch.nn.Tanh(), torch.nn.Linear(500, 500), torch.nn.Tanh(),
    torch.nn.Linear(500, 5),
)
maml = fm.MAML(model, 0.01, {steps}, strategy="engine", task_chunk={chunk})
x, y = torch.randn({tasks}, {rows}, 100), torch.randint(5, ({tasks}, {rows}))
print(extra(lambda: maml.backward(x, y, x[:, :5], y[:, :5])) / 2**20)
"""


def peak(**options):
    """MiB of the first meta-step of a process."""
    options = {"steps": 1, "tasks": 1, "rows": 5, "chunk": None} | options
    options["tests"] = str(Path(__file__).parent)
    done = fresh.run(PEAK.format(**options), PACKAGE, {})
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


native = pytest.mark.skipif(
    fm.backend_info()["ops"]["adapt"]["cpu"] != "native", reason="of the kernels"
)


@native
def test_steps_cost_their_parameters_and_nothing_else():
    few, many = (peak(steps=steps, rows=1000) for steps in (2, 22))
    trajectory = 20 * 1.17
    assert few > 8  # the values of a step are there
    assert many - few < trajectory + 12  # and of the last ones, up to 8 MiB


@native
def test_chunks_make_memory_flat_in_the_number_of_tasks():
    few, many = (peak(tasks=tasks, chunk=1) for tasks in (4, 32))
    assert many < few + 1
    assert many < peak(tasks=32) - 4  # which has up to eight sums of gradients


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_give_the_same_gradients(chunk):
    model, data = make("conv_bn")
    xs, xq = data[0].requires_grad_(), data[2].requires_grad_()
    wanted = unroll(model, data, lr=0.2, steps=2)
    found = []
    for options in ({}, {"task_chunk": chunk}):
        maml = MAML(model, 0.2, 2, strategy="engine", learn_lr="parameter", **options)
        for _ in range(2):  # the second is recalled
            maml.zero_grad()
            xs.grad = xq.grad = None
            loss = maml.backward(*data)
        tensors = [loss, xs.grad, xq.grad, *(p.grad for p in maml.parameters())]
        found.append([t.clone() for t in tensors])
    agree({n: p.grad for n, p in model.named_parameters()}, wanted)
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-13)


def test_chunks_have_dropout_of_their_own():
    """Of equal tasks, the loss of two is not that of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    xs, ys, xq, yq = (d[:1].expand(2, *d.shape[1:]) for d in batch((4,)))
    losses = []
    for tasks in (1, 2):
        torch.manual_seed(1)
        maml = MAML(model, 0.1, 1, strategy="engine", task_chunk=1)
        losses.append(maml.loss(xs[:tasks], ys[:tasks], xq[:tasks], yq[:tasks]).item())
    assert abs(losses[0] - losses[1]) > 1e-6


@pytest.mark.parametrize("how", ["backward", "loss", "call"])
def test_memory_does_not_grow_over_a_thousand_meta_steps(how):
    """A leak of the gradients or the trajectory, about a KiB, would show, and of a rate's tensor."""
    torch.set_num_threads(1)
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1, strategy="engine")
    start = 0
    for step in range(2000):
        if step == 1000:
            start = resident()
        maml.lr = 0.1 + step * 1e-5
        maml.zero_grad()
        if how == "backward":
            maml.backward(*data)
        elif how == "loss":
            maml.loss(*data).backward()
        else:
            maml(*data[:3]).sum().backward()
    assert resident() - start < 400_000
