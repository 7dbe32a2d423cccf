"""What changes between meta-steps, and what a CUDA graph of them must not miss. Tried on the CPU."""

import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from graphcases import stand_in
from mamlcases import make
from torch import nn

from fastmeta.maml import MAML


@pytest.fixture
def counts(monkeypatch):
    return stand_in(monkeypatch)


class Scaled:
    """A loss with an option, and no module."""

    def __init__(self):
        self.alpha = 1.0

    def __call__(self, prediction, target):
        return self.alpha * F.cross_entropy(prediction, target)


class ScaledModule(nn.Module):
    """A module whose method is the loss."""

    def __init__(self):
        super().__init__()
        self.alpha = 1.0
        self.register_buffer("weight", torch.ones(3, dtype=torch.float64))

    def forward(self, prediction, target):
        return self.alpha * F.cross_entropy(prediction, target, self.weight)


def test_the_first_replay_sees_the_inputs_that_a_model_writes_to(counts):
    """Warm-ups wrote to the graph's own inputs."""

    class Halves(nn.Module):
        def forward(self, x):
            return x.mul_(0.5)

    model, data = make("mlp")
    maml = MAML(nn.Sequential(Halves(), *model), 0.1, 1, cuda_graph=True)
    first, second = (maml.backward(*[t.clone() for t in data]) for _ in range(2))
    assert counts["capture"] == 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["callable", "partial", "method", "buffer"])
def test_options_of_a_loss_that_is_no_module_are_watched(counts, kind):
    model, data = make("mlp")
    module = ScaledModule()
    loss = {
        "callable": Scaled(),
        "partial": functools.partial(F.cross_entropy, label_smoothing=0.0),
        "method": module.forward,
        "buffer": module.forward,
    }[kind]
    maml = MAML(model, 0.1, 2, loss=loss, cuda_graph=True)
    for _ in range(2):
        maml.backward(*data)
    assert counts["capture"] == 1
    if kind == "callable":
        loss.alpha = 3.0
    elif kind == "partial":
        loss.keywords["label_smoothing"] = 0.1
    elif kind == "method":
        module.alpha = 3.0
    else:
        module.weight = 2 * module.weight
    maml.backward(*data)
    assert counts["capture"] == 2


def test_other_strides_of_a_parameter_are_noticed(counts):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    _, data = make("mlp")
    maml = MAML(model, 0.1, 2, cuda_graph=True)
    maml.backward(*data)
    maml.zero_grad()
    model[0].weight.data = model[0].weight.data.t()
    maml.backward(*data)
    assert counts["capture"] == 2


@pytest.mark.parametrize("kind", ["sparse", "inference"])
def test_buffers_that_no_graph_can_hold_run_without(counts, kind):
    class Buffered(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()
            self.register_buffer("table", table)

        def forward(self, x):
            if self.table.is_sparse:
                return self.layer(torch.sparse.mm(self.table, x.t()).t())
            return self.layer(x - self.table)

    with torch.inference_mode():
        table = torch.ones(4).double()
    if kind == "sparse":
        table = torch.eye(4).double().to_sparse()
    _, data = make("mlp")
    maml = MAML(Buffered(table), 0.1, 2, strategy="loop", cuda_graph=True)
    with pytest.warns(UserWarning, match="without a graph, because 'table' is no ordinary tensor"):
        maml.backward(*data)
    maml.backward(*data)
    assert counts["capture"] == 0


def test_a_refusal_ends_with_its_reason(counts):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(x) * (1 + random.random() if self.training else 1)

    _, data = make("mlp")
    maml = MAML(Draws(), 0.1, 1, cuda_graph=True)
    with pytest.warns(UserWarning, match="random numbers are drawn on the host"):
        maml.backward(*data)
    maml.eval()
    for _ in range(2):
        maml.backward(*data)
    assert counts["replay"] == 2
    maml.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.backward(*data)
    maml.eval()
    maml.backward(*data)
    assert (counts["capture"], counts["replay"]) == (1, 3)


def test_data_that_is_padded_from_the_start_runs_once_a_step(counts):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        return F.cross_entropy(prediction, target)

    model, data = make("mlp")
    data[1][0, 0] = -100
    maml = MAML(model, 0.1, 1, loss=loss, cuda_graph=True)
    lengths = []
    for _ in range(3):
        calls.clear()
        maml.backward(*data)
        lengths.append(len(calls))
    assert lengths[1] == lengths[2] < lengths[0]
    assert counts["capture"] == 0


def test_a_custom_loss_of_flattened_rows_needs_no_mask(counts):
    """The rows of a prediction need not be the queries, unless some are to be hidden."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).flatten(0, 1)

    def loss(prediction, target):
        return F.cross_entropy(prediction, target.flatten())

    data = [
        torch.randn(3, 6, 5, 4),
        torch.randint(3, (3, 6, 5)),
        torch.randn(3, 4, 5, 4),
        torch.randint(3, (3, 4, 5)),
    ]
    maml = MAML(Flat(), 0.1, 2, loss=loss, strategy="vmap")
    assert maml.backward(*data).isfinite()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("first_order", [False, True])
def test_hooks_of_parameters_act_on_the_outer_gradient_alone(strategy, first_order):
    model, data = make("mlp")
    options = {"strategy": strategy, "first_order": first_order}
    maml = MAML(model, 0.1, 1, **options)
    maml.backward(*data)
    plain = [p.grad.clone() for p in model.parameters()]
    maml.zero_grad()
    model[0].weight.register_hook(lambda grad: 3 * grad)
    maml.backward(*data)
    hooked = [p.grad for p in model.parameters()]
    torch.testing.assert_close(hooked[0], 3 * plain[0])
    for got, wanted in zip(hooked[1:], plain[1:], strict=True):
        assert torch.equal(got, wanted)
