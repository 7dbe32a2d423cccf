"""Linear layers that the engine keeps factored (csrc/engine/factored.h), against autograd.

Large layers on inputs that no step changes, which the plan keeps so: with few supports and queries
by products of their inputs, with few outputs and many queries through the whole last weight; as the
prediction, before another layer, and on the features of a body that no step changes.
"""

import itertools

import pytest
import torch
from enginecases import relative_error
from mamlcases import unroll
from torch import nn
from torch.nn.functional import cross_entropy

from fastmeta.maml import MAML

#: Widths, supports, queries, steps.
LAYERS = {
    "whole_prediction": ((208, 5), 25, 75, 6),
    "whole_wide_prediction": ((160, 20), 20, 75, 6),
    "whole_before_another": ((176, 4, 3), 12, 40, 6),
    "products_prediction": ((131, 5), 6, 3, 8),
    "products_wide": ((304, 40, 3), 4, 6, 3),
}


def _net(sizes):
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return layers[:-1]


def _data(width, ways, supports, queries):
    return [
        torch.randn(3, supports, width).double().requires_grad_(),
        torch.randint(ways, (3, supports)),
        torch.randn(3, queries, width).double().requires_grad_(),
        torch.randint(ways, (3, queries)),
    ]


def _agree(model, data, **options):
    """`MAML.loss`, and the call with a loss after it, have autograd's gradients."""
    leaves = [*model.parameters(), data[0], data[2]]
    truth = unroll(model, data, value=True, lr=0.2, **options)
    wanted = torch.autograd.grad(truth, leaves, materialize_grads=True)
    options["adapt"] = options.pop("adapted", None)
    maml = MAML(model, 0.2, strategy="engine", **options)
    called = cross_entropy(maml(*data[:3]).flatten(0, 1), data[3].flatten())
    for loss in (maml.loss(*data), called):
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        assert relative_error(found, wanted, 1e-3) < 1e-9
    assert maml.plan().strategy == "engine"


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_unrolling(name, first_order):
    sizes, supports, queries, steps = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(*_net(sizes)).double()
    data = _data(sizes[0], sizes[-1], supports, queries)
    _agree(model, data, steps=steps, first_order=first_order)


@pytest.mark.parametrize("name", LAYERS)
def test_the_body_learns(name):
    """The layer's input is the body's features, whose gradient comes from both passes."""
    sizes, supports, queries, steps = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, sizes[0]), nn.Tanh(), *_net(sizes)).double()
    names = [n for n, _ in model.named_parameters()]
    data = _data(9, sizes[-1], supports, queries)
    _agree(model, data, steps=steps, adapted=names[2:])


@pytest.mark.parametrize("name", LAYERS)
def test_adapted_weights_and_learned_rates(name):
    """What leaves as whole weights, and comes back as their gradients; rates of each step."""
    sizes, supports, queries, steps = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(*_net(sizes)).double()
    data = _data(sizes[0], sizes[-1], supports, queries)
    results = []
    for strategy in ("engine", "loop"):
        options = {"learn_lr": "parameter", "lr_per_step": True, "strategy": strategy}
        maml = MAML(model, 0.2, steps, **options)
        leaves = [*maml.parameters(), data[0]]
        adapted = list(maml.adapt(*data[:2]).parameters.values())
        value = sum(
            (p.square() * torch.linspace(0, 1, p.numel()).view_as(p)).sum() for p in adapted
        )
        results.append([*adapted, *torch.autograd.grad(value, leaves, materialize_grads=True)])
        results[-1] += torch.autograd.grad(maml.loss(*data), [*leaves, data[2]])
    assert relative_error(*results, 1e-3) < 1e-9
