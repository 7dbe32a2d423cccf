"""The engine's sums over many tasks: groups of several, and threads that share large parameters."""

import pytest
import torch
from mamlcases import agree, unroll
from torch import nn

from fastmeta.maml import MAML

#: Models whose first layer is factored, supports and queries.
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(300, 130), nn.Tanh(), nn.Linear(130, 5)), 4, 6),
    "head": (lambda: nn.Sequential(nn.Linear(300, 5)), 15, 40),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("tasks", [33, 70])
def test_many_tasks_of_a_large_network(tasks, net):
    """Groups of several tasks, and sums of gradients that threads share: the same bits from any."""
    build, supports, queries = NETS[net]
    torch.manual_seed(0)
    model = build().double()
    data = (
        torch.randn(tasks, supports, 300).double(),
        torch.randint(5, (tasks, supports)),
        torch.randn(tasks, queries, 300).double(),
        torch.randint(5, (tasks, queries)),
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
