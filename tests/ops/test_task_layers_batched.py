"""That layers of many tasks, and their first and second derivatives, take as many calls as of two."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta as fm


class Calls(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def linear(tasks):
    x, weight = torch.randn(tasks, 5, 4), torch.randn(tasks, 3, 4)
    return fm.task_linear, (x, weight, torch.randn(tasks, 3))


def conv2d(tasks):
    x, weight = torch.randn(tasks, 5, 2, 6, 6), torch.randn(tasks, 4, 2, 3, 3)
    return fm.task_conv2d, (x, weight, torch.randn(tasks, 4))


def batch_norm(tasks):
    x = torch.randn(tasks, 5, 3, 4, 4)
    return fm.task_batch_norm, (x, torch.randn(tasks, 3), torch.randn(tasks, 3))


@pytest.mark.parametrize("layer", [linear, conv2d, batch_norm], ids=lambda f: f.__name__)
def test_second_derivatives_stay_batched(layer):
    found = []
    for tasks in (2, 9):
        function, inputs = layer(tasks)
        inputs = [t.requires_grad_() for t in inputs]
        with Calls() as calls:
            first = torch.autograd.grad(
                function(*inputs).sin().sum(), inputs, create_graph=True, materialize_grads=True
            )
            torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append(calls.names)
    assert found[0] == found[1]
    assert len(found[0]) > 5
