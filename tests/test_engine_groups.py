"""The engine's sums over many tasks: groups of several, and threads that share large parameters."""

import pytest
import torch
from mamlcases import agree, unroll
from torch import nn

from fastmeta.maml import MAML


@pytest.mark.parametrize("tasks", [33, 70])
def test_many_tasks_of_a_large_network(tasks):
    """Groups of several tasks, and sums of gradients that threads share: the same bits from any."""
    sizes = (300, 130, 5)  # the first layer is factored
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()
    data = (
        torch.randn(tasks, 4, sizes[0]).double(),
        torch.randint(5, (tasks, 4)),
        torch.randn(tasks, 6, sizes[0]).double(),
        torch.randint(5, (tasks, 6)),
    )
    maml = MAML(model, 0.1, 2, strategy="engine")

    def gradients(threads):
        torch.set_num_threads(threads)
        maml.zero_grad()
        maml.backward(*data)
        return {name: p.grad for name, p in model.named_parameters()}

    one, two = gradients(1), gradients(2)
    agree(one, unroll(model, data, lr=0.1, steps=2))
    assert all(torch.equal(one[name], two[name]) for name in one)
