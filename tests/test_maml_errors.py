"""What MAML says to arguments that it cannot use."""

import warnings

import pytest
import torch
from mamlcases import make
from torch import nn

from fastmeta.maml import MAML


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(2, 2))


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got int 3"),
        ({"model": nn.ReLU()}, ValueError, "model must be such that a parameter of the model"),
        ({"model": nn.LazyLinear(3)}, ValueError, "model must be initialized.*'weight'"),
        ({"model": scripted()}, TypeError, "not compiled by torch.jit"),
        ({"lr": -0.1}, ValueError, r"lr must be finite and at least 0, got -0\.1"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and at least 0, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be finite and at least 0, got inf"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got str '0.1'"),
        ({"lr": True}, TypeError, "lr must be a number"),
        ({"steps": -1}, ValueError, "steps must be an integer of at least 0, got -1"),
        ({"steps": 1.5}, TypeError, r"steps must be an integer .* got float 1\.5"),
        ({"steps": True}, TypeError, "steps must be an integer"),
        ({"first_order": 1}, TypeError, "first_order must be True or False, got int 1"),
        ({"lr_per_step": 1}, TypeError, "lr_per_step must be True or False, got int 1"),
        (
            {"loss": "nll"},
            ValueError,
            "loss must be one of 'cross_entropy', 'mse', 'huber', 'bce', 'a function'",
        ),
        ({"learn_lr": True}, ValueError, "learn_lr must be False, 'scalar', 'parameter' or"),
        ({"learn_lr": "layer"}, ValueError, "learn_lr must be.*got 'layer'"),
        ({"lr_per_step": True}, ValueError, "lr_per_step must be False unless rates are learned"),
        (
            {"lr_per_step": True, "learn_lr": "scalar", "steps": 0},
            ValueError,
            "lr_per_step must be False unless",
        ),
        ({"batch_norm": "eval"}, ValueError, "batch_norm must be one of 'batch', 'running'"),
        (
            {"strategy": "turbo"},
            ValueError,
            "strategy must be one of 'auto', 'engine', 'vmap', 'loop'",
        ),
        ({"randomness": "error"}, ValueError, "randomness must be one of 'different', 'same'"),
        ({"task_chunk": 0}, ValueError, "task_chunk must be an integer of at least 1, got 0"),
        ({"task_chunk": "all"}, TypeError, "task_chunk must be an integer .* got str 'all'"),
        ({"adapt": "head"}, ValueError, r"adapt must be names or patterns.*\['bias', 'weight'\]"),
        ({"adapt": ["bias", "head*"]}, ValueError, r"adapt must be names.*got 'head\*'"),
        ({"adapt": lambda name, p: False}, ValueError, "adapt must be such that.*got no match"),
        ({"adapt": nn.Linear(4, 3)}, ValueError, "adapt must be such that.*got no match"),
        ({"adapt": []}, ValueError, "adapt must be such that.*got no match"),
        ({"adapt": 3}, TypeError, "adapt must be names, patterns, a predicate, a submodule or"),
    ],
)
def test_constructor(options, error, match):
    arguments = {"model": linear(), "lr": 0.1, "steps": 1} | options
    with pytest.raises(error, match=match) as caught:
        MAML(**arguments)
    assert str(caught.value).startswith("MAML: ")


def test_adapt_of_frozen_parameters():
    model = linear()
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"adapt must be such that.*got \['bias'\]"):
        MAML(model, 0.1, 1, adapt="bias")
    maml = MAML(model, 0.1, 1)
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="model must be with a parameter that adapts"):
        maml(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), torch.zeros(1, 2, 4))


X, Y = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ((X.tolist(), Y, X), TypeError, "support_x must be a tensor, got list"),
        ((X, Y.tolist(), X), TypeError, "support_y must be a tensor, got list"),
        ((X, Y, X.tolist()), TypeError, "query_x must be a tensor, got list"),
        ((X[0, 0], Y, X), ValueError, r"support_x must be of shape \[T, S, \.\.\.\].*\[4\]"),
        ((X[:0], Y[:0], X[:0]), ValueError, "at least one task and one support"),
        ((X[:, :0], Y[:, :0], X), ValueError, r"at least one task.*got shape \[2, 0, 4\]"),
        ((X, Y[:1], X), ValueError, r"support_y must be of shape \[2, 5\].*got shape \[1, 5\]"),
        ((X, Y[:, :4], X), ValueError, r"support_y must be of shape \[2, 5\].*got shape \[2, 4\]"),
        ((X, Y[0], X), ValueError, r"support_y must be of shape \[2, 5\].*got shape \[5\]"),
        ((X, Y, X[:1]), ValueError, r"query_x must be of shape \[T=2, Q, \.\.\.\], got.*\[1, 5, 4"),
        ((X, Y.float(), X), TypeError, "support_y must be an integer tensor of class labels"),
        ((X, Y.bool(), X), TypeError, "support_y must be an integer tensor of class labels"),
        ((X, Y + 3, X), ValueError, r"support_y must be in \[0, 3\), the outputs.*got 3"),
        ((X, Y - 1, X), ValueError, "support_y must be class labels from 0 on, or -100.*got -1"),
        ((X, Y[..., None], X), ValueError, r"module that returns \[5, C, 1\] here, got.*\[5, 3\]"),
    ],
)
def test_inputs(inputs, error, match, strategy):
    maml = MAML(linear(), 0.1, 1, strategy=strategy)
    with pytest.raises(error, match=match) as caught:
        maml(*inputs)
    assert str(caught.value).startswith("MAML: ")
    if "query" not in match:
        with pytest.raises(error, match=match):
            maml.adapt(*inputs[:2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_integer_types(dtype):
    maml = MAML(linear(), 0.1, 1)
    torch.testing.assert_close(maml(X, Y.to(dtype), X), maml(X, Y, X), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_targets_must_have_the_shape_of_predictions(strategy):
    maml = MAML(nn.Linear(4, 1), 0.1, 1, loss="mse", strategy=strategy)
    with pytest.raises(ValueError, match=r"shape of the targets, \[5\] a task, got shape \[5, 1\]"):
        maml(X, torch.zeros(2, 5), X)
    with pytest.raises(TypeError, match="support_y must be a floating tensor for loss='mse'"):
        maml(X, Y, X)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_loss_must_be_a_scalar(strategy):
    def elementwise(prediction, target):
        return (prediction - target) ** 2

    maml = MAML(nn.Linear(4, 1), 0.1, 1, loss=elementwise, strategy=strategy)
    with pytest.raises(ValueError, match=r"loss must be a function.*scalar.*got.*\[5, 1\]"):
        maml(X, torch.zeros(2, 5, 1), X)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_model_must_return_a_tensor(strategy):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="model must be a module that returns a tensor, got tuple"):
        MAML(Pair(4, 3), 0.1, 1, strategy=strategy)(X, Y, X)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_loss_that_no_parameter_moves(strategy):
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(RuntimeError, match="output depends on the adapted parameters"):
        MAML(Cut(4, 3), 0.1, 1, strategy=strategy)(X, Y, X)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_running_statistics_that_are_not_there(strategy):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="batch_norm must be 'batch' for a model whose batch norm"):
        MAML(model, 0.1, 1, batch_norm="running", strategy=strategy)(X, Y, X)


def test_steps_of_adapt():
    maml = MAML(linear(), 0.1, 1)
    with pytest.raises(
        ValueError, match=r"MAML\.adapt: steps must be an integer of at least 0, got -2"
    ):
        maml.adapt(X, Y, steps=-2)
    with pytest.raises(TypeError, match="steps must be an integer"):
        maml.adapt(X, Y, steps=2.0)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_one_task_that_is_not_finite_leaves_the_others(strategy):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2, strategy=strategy)
    wanted = maml(*data[:3])
    data[0][1, 0] = float("nan")
    out = maml(*data[:3])
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], wanted[[0, 2]], rtol=1e-12, atol=1e-12)
