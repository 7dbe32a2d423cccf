"""What losses MAML takes, and what they are to it: known formulas, functions, modules."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mamlcases import make
from torch import nn

from fastmeta.maml import MAML


class Tempered(nn.Module):
    """A loss with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.1, dtype=torch.float64))

    def forward(self, prediction, target):
        return F.cross_entropy(prediction / self.temperature + self.shift, target)


def test_a_loss_that_is_a_module_is_part_of_it():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2, loss=Tempered())
    assert {"criterion.temperature", "criterion.shift"} <= set(maml.state_dict())
    maml.loss(*data).backward()
    assert dict(maml.named_parameters())["criterion.temperature"].grad.abs() > 0
    twin = copy.deepcopy(maml)
    with torch.no_grad():
        maml.criterion.temperature.fill_(5.0)
    assert not torch.equal(twin.loss(*data), maml.loss(*data))


@pytest.mark.parametrize("strategy", ["engine", "loop"])
def test_a_copy_has_its_own_class_weights(strategy):
    model, data = make("mlp")
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    maml = MAML(model, 0.1, 2, loss=nn.CrossEntropyLoss(weight), strategy=strategy)
    wanted = maml.loss(*data)
    twin = copy.deepcopy(maml)
    maml.criterion.weight[0] = 9.0
    assert not torch.equal(maml.loss(*data), wanted)
    torch.testing.assert_close(twin.loss(*data), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.cross_entropy, "cross_entropy"),
        (F.mse_loss, "mse"),
        (F.huber_loss, "huber"),
        (F.binary_cross_entropy_with_logits, "bce"),
    ],
)
def test_torchs_functions_are_losses_that_are_known(function, name):
    model, (sx, sy, qx, qy) = make("mlp")
    if name != "cross_entropy":
        sy, qy = (F.one_hot(y, 3).double() for y in (sy, qy))
    maml = MAML(model, 0.1, 2, loss=function)
    assert torch.equal(
        maml.loss(sx, sy, qx, qy), MAML(model, 0.1, 2, loss=name).loss(sx, sy, qx, qy)
    )
    own = MAML(model, 0.1, 2, loss=lambda p, y: function(p, y)).loss(sx, sy, qx, qy)
    torch.testing.assert_close(maml.loss(sx, sy, qx, qy), own, rtol=1e-12, atol=0)


def test_queries_that_are_all_padding_count_as_0_for_a_loss_of_ones_own():
    model, data = make("mlp")
    data[3][0] = -100
    wanted = MAML(model, 0.1, 2).loss(*data)
    found = MAML(model, 0.1, 2, loss=lambda p, y: F.cross_entropy(p, y)).loss(*data)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_numpys_numbers_are_numbers():
    model, data = make("mlp")
    maml = MAML(model, np.float32(0.125), np.int64(2), task_chunk=np.int32(2))
    torch.testing.assert_close(maml(*data[:3]), MAML(model, 0.125, 2)(*data[:3]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tasks_whose_labels_have_no_weight_are_no_loss(smoothing):
    """Neither the inner loop nor the query loss divides by their weight of 0, on any strategy."""
    model, (support_x, support_y, query_x, query_y) = make("mlp")
    support_y[1], query_y[2] = 0, 0
    weight = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    found = {}
    for strategy in ("engine", "vmap", "loop"):
        maml = MAML(model, 0.3, 2, loss=loss, strategy=strategy)
        torch.testing.assert_close(maml(support_x, support_y, query_x)[1], model(query_x[1]))
        value = maml.loss(support_x, support_y, query_x, query_y)
        alone = maml.loss(support_x[2:], support_y[2:], query_x[2:], query_y[2:])
        assert alone == 0
        found[strategy] = [value, *torch.autograd.grad(value, list(model.parameters()))]
    torch.testing.assert_close(found["engine"], found["loop"])
    torch.testing.assert_close(found["vmap"], found["loop"])
