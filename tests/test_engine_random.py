"""The engine beside the loop strategy on random networks, sizes and options, in float64.

Cases chosen by hand have the widths one thinks of. These have widths, strides and row counts that
fall anywhere in a vector, and layers in any order. Activations are smooth: at a kink two exact
methods differ by rounding's choice of side.
"""

import itertools
import random

import pytest
import torch
from torch import nn

import fastmeta as fm

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 40, 65]


def _activation(chance):
    return chance.choice([nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus])()


def _mlp(chance):
    sizes = chance.choices(WIDTHS, k=chance.randint(2, 4))
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers.append(nn.Linear(before, after, bias=chance.random() < 0.8))
        norm = chance.random()
        if norm < 0.2:
            layers.append(nn.LayerNorm(after))
        elif norm < 0.35:
            layers.append(nn.BatchNorm1d(after, track_running_stats=False))
        layers.append(_activation(chance))
    if chance.random() < 0.3:  # before anything that has weights
        first = nn.BatchNorm1d(sizes[0], track_running_stats=False)
        layers.insert(0, chance.choice([first, _activation(chance), nn.LayerNorm(sizes[0])]))
    return layers, (sizes[0],), sizes[-1]


def _convolutions(chance):
    channels = chance.choice([1, 2, 3, 4, 8, 9])
    shape = channels, chance.randint(6, 11), chance.randint(6, 11)
    layers = []
    for _ in range(chance.randint(1, 3)):
        groups = chance.choice([1, 1, 1, channels])
        outputs = chance.choice([1, 2, 3, 5, 8, 9, 16, 17]) * groups
        kernel = chance.choice([1, 2, 3])
        layers.append(
            nn.Conv2d(
                channels,
                outputs,
                kernel,
                stride=chance.choice([1, 1, 2]),
                padding=kernel // 2,
                dilation=chance.choice([1, 1, 2]),
                groups=groups,
                bias=chance.random() < 0.7,
            )
        )
        channels = outputs
        norm = chance.random()
        if norm < 0.35:
            layers.append(nn.BatchNorm2d(channels, track_running_stats=False))
        elif norm < 0.5:
            groups = chance.choice([g for g in (1, 2, 4) if channels % g == 0])
            layers.append(nn.GroupNorm(groups, channels))
        layers.append(_activation(chance))
        if chance.random() < 0.3:
            layers.append(nn.AvgPool2d(2, chance.choice([1, 2])))
    layers += [nn.AdaptiveAvgPool2d(1)] if chance.random() < 0.5 else []
    layers.append(nn.Flatten())
    try:
        features = nn.Sequential(*layers)(torch.randn(2, *shape)).shape[1]
    except (RuntimeError, ValueError):  # pooled away, or a norm of single numbers
        return _convolutions(chance)
    return layers, shape, features


def _error(found, wanted):
    """Worst relative error; a gradient of zero but for rounding is held to the others' size."""
    floor = 1e-3 * max(float(w.norm()) for w in wanted)
    return max(
        float((f - w).norm() / (w.norm() + floor)) for f, w in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "seed", [*range(60), *(pytest.param(s, marks=pytest.mark.slow) for s in range(60, 600))]
)
def test_engine_agrees_with_the_loop(seed):
    """Loss and every gradient: parameters, rates, supports and queries."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layers, shape, features = chance.choice([_mlp, _mlp, _convolutions])(chance)
    outputs = chance.choice([1, 2, 3, 5, 8, 9, 17])
    model = nn.Sequential(*layers, nn.Linear(features, outputs)).double()
    least = 4 if any("BatchNorm" in type(m).__name__ for m in model) else 1
    tasks, steps = chance.randint(1, 4), chance.randint(0, 3)
    supports, queries = (max(least, chance.choice([1, 2, 3, 5, 8, 10, 17])) for _ in range(2))
    losses = ["mse", "huber"] + ["cross_entropy"] * (outputs > 1)
    loss = chance.choice(losses)
    names = [name for name, _ in model.named_parameters()]
    options = {
        "lr": 0.1,
        "steps": steps,
        "loss": loss,
        "first_order": chance.random() < 0.2,
        "learn_lr": chance.choice([False, "scalar", "parameter", "element"]),
        "adapt": None
        if chance.random() < 0.7
        else chance.sample(names, chance.randint(1, len(names))),
    }
    options["lr_per_step"] = bool(options["learn_lr"] and steps and chance.random() < 0.5)
    inputs = [torch.randn(tasks, rows, *shape).double() for rows in (supports, queries)]
    if loss == "cross_entropy":
        targets = [torch.randint(outputs, (tasks, rows)) for rows in (supports, queries)]
    else:
        targets = [torch.randn(tasks, rows, outputs).double() for rows in (supports, queries)]
    results = []
    for strategy in ("engine", "loop"):
        maml = fm.MAML(model, strategy=strategy, **options)
        if options["learn_lr"]:
            torch.manual_seed(seed)
            for rate in maml.rates.values():
                rate.data.mul_(0.5 + torch.rand_like(rate))
        x = [i.clone().requires_grad_() for i in inputs]
        leaves = [*maml.parameters(), *x]
        value = maml.loss(x[0], targets[0], x[1], targets[1])
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        results.append([value.detach(), *grads])
    assert _error(*results) < 1e-8


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("first", [lambda width: nn.Tanh(), nn.BatchNorm1d, nn.LayerNorm])
def test_activations_and_norms_come_first(first, width):
    """Inputs of whole vectors, and their gradients, stay where the caller has them."""
    torch.manual_seed(0)
    model = nn.Sequential(first(width), nn.Sigmoid(), nn.Linear(width, 3)).double()
    inputs = [torch.randn(2, 5, width).double() for _ in range(2)]
    targets = [torch.randn(2, 5, 3).double() for _ in range(2)]
    results = []
    for strategy in ("engine", "loop"):
        x = [i.clone().requires_grad_() for i in inputs]
        stale = [torch.full((2, 5, width), 123.0).double() for _ in range(50)]
        del stale  # what new tensors are made of
        maml = fm.MAML(model, lr=0.1, steps=2, loss="mse", strategy=strategy)
        value = maml.loss(x[0], targets[0], x[1], targets[1])
        grads = torch.autograd.grad(value, [*model.parameters(), *x])
        results.append([value.detach(), *grads])
    assert _error(*results) < 1e-10
