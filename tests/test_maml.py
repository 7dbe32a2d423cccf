"""MAML against plain autograd unrolling, written here, in float64."""

import pytest
import torch
import torch.nn.functional as F
from mamlcases import MODELS, agree, batch, cross_entropy, make, meta_gradients, unroll
from torch import nn
from torch.func import functional_call, grad, vmap

from fastmeta.maml import MAML

STRATEGIES = ("vmap", "loop")
LOOP_ONLY = {"lstm", "gru", "branches"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", list(MODELS))
def test_second_order_agrees_with_unrolling(name, strategy):
    if strategy == "vmap" and name in LOOP_ONLY:
        strategy = "auto"
    model, data = make(name)
    wanted = unroll(model, data, lr=0.2, steps=2)
    if strategy == "auto":
        with pytest.warns(UserWarning, match="vmap failed with"):
            found = meta_gradients(MAML(model, 0.2, 2), data)
    else:
        found = meta_gradients(MAML(model, 0.2, 2, strategy=strategy), data)
    agree(found, wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_steps_and_order(steps, first_order, strategy):
    model, data = make("conv_bn")
    wanted = unroll(model, data, lr=0.1, steps=steps, first_order=first_order)
    maml = MAML(model, 0.1, steps, first_order=first_order, strategy=strategy)
    agree(meta_gradients(maml, data), wanted)


def test_first_order_differs_from_second():
    model, data = make("mlp")
    second = meta_gradients(MAML(model, 0.3, 2), data)
    first = meta_gradients(MAML(model, 0.3, 2, first_order=True), data)
    assert (first["0.weight"] - second["0.weight"]).norm() > 0.05 * second["0.weight"].norm()


def test_meta_gradient_agrees_with_finite_differences():
    model, data = make("mlp")
    maml = MAML(model, 0.3, 2)
    weight = model[0].weight
    found = meta_gradients(maml, data)["0.weight"]
    direction = torch.randn_like(weight)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(cross_entropy(maml(*data[:3]), data[3]))
            weight.sub_(step * direction)
    difference = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((found * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["conv_bn", "layer_norm"])
def test_gradients_inside_vmap_are_wrong_where_ours_are_right(name):
    model, data = make(name)
    support_x, support_y, query_x, query_y = data
    names = [n for n, _ in model.named_parameters()]
    if name == "conv_bn":
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None

    def loss(theta, x, y):
        return F.cross_entropy(functional_call(model, theta, (x,)), y)

    def task(theta, support_x, support_y, query_x, query_y):
        for _ in range(2):
            grads = grad(loss)(theta, support_x, support_y)
            theta = {n: theta[n] - 0.2 * grads[n] for n in names}
        return loss(theta, query_x, query_y)

    def torchs_own(theta):
        return vmap(task, (None, 0, 0, 0, 0))(theta, support_x, support_y, query_x, query_y).mean()

    theirs = grad(torchs_own)({n: p.detach() for n, p in model.named_parameters()})
    ours = meta_gradients(MAML(model, 0.2, 2, strategy="vmap"), data)
    wanted = unroll(model, data, lr=0.2, steps=2)
    agree(ours, wanted)
    theirs_off = max(float((theirs[n] - wanted[n]).norm() / wanted[n].norm()) for n in names[:1])
    assert theirs_off > 1e-3, "torch's own way is right now: say so in the docstrings"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("granularity", ["scalar", "parameter", "element"])
def test_learned_rates(granularity, per_step, strategy):
    model, data = make("mlp_norms")
    maml = MAML(model, 0.2, 3, learn_lr=granularity, lr_per_step=per_step, strategy=strategy)
    torch.manual_seed(3)
    with torch.no_grad():
        for rate in maml.rates.values():
            rate.mul_(1 + 0.5 * torch.rand_like(rate))
    rates = {
        name: maml.rates["all" if granularity == "scalar" else name.replace(".", "/")]
        for name, _ in model.named_parameters()
    }
    wanted = unroll(model, data, rates=rates, per_step=per_step, steps=3)
    found = meta_gradients(maml, data)
    assert set(wanted) == set(found)
    assert len(maml.rates) == (1 if granularity == "scalar" else len(rates))
    agree(found, wanted)


def test_first_order_learns_rates_too():
    model, data = make("mlp")
    maml = MAML(model, 0.2, 2, learn_lr="scalar", first_order=True)
    rates = dict.fromkeys((n for n, _ in model.named_parameters()), maml.rates["all"])
    wanted = unroll(model, data, rates=rates, steps=2, first_order=True)
    assert wanted["rates.all"].abs() > 1e-3
    agree(meta_gradients(maml, data), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "adapt",
    ["head", "head.*", ["head.weight", "head.bias"], lambda name, _: name.startswith("head")],
)
def test_only_what_adapt_names_adapts(adapt, strategy):
    model, data = make("body_head")
    maml = MAML(model, 0.3, 2, adapt=adapt, strategy=strategy)
    wanted = unroll(model, data, lr=0.3, steps=2, adapted=["head.weight", "head.bias"])
    assert maml.plan().adapted == ("head.weight", "head.bias")
    agree(meta_gradients(maml, data), wanted)


def test_adapt_takes_a_submodule():
    model, _ = make("body_head")
    assert MAML(model, 0.3, 2, adapt=model.body[0]).plan().adapted == (
        "body.0.weight",
        "body.0.bias",
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_stay(strategy):
    model, data = make("body_head")
    model.body[0].requires_grad_(False)
    maml = MAML(model, 0.3, 2, strategy=strategy)
    wanted = unroll(model, data, lr=0.3, steps=2, adapted=["head.weight", "head.bias"])
    agree(meta_gradients(maml, data), {n: wanted[n] for n in ("head.weight", "head.bias")})
    assert model.body[0].weight.grad is None
    model.body[0].requires_grad_(True)
    agree(meta_gradients(maml, data), unroll(model, data, lr=0.3, steps=2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_that_the_supports_do_not_use_stay(strategy):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.other = nn.Linear(4, 3)
            self.never = nn.Linear(4, 3)

        def forward(self, x):
            # Rows of queries alone pass through `other`: their first number is large.
            return self.used(x) if x.shape[0] == 6 else self.used(x) + self.other(x)

    torch.manual_seed(0)
    model = Half().double()
    data = batch((4,), support=6, query=5)
    maml = MAML(model, 0.3, 2, strategy=strategy)
    wanted = unroll(model, data, lr=0.3, steps=2)
    found = meta_gradients(maml, data)
    assert model.never.weight.grad is None
    agree(found, {n: g for n, g in wanted.items() if not n.startswith("never")})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("first_order", [False, True])
def test_task_chunk_gives_the_same_numbers(strategy, first_order):
    model, data = make("conv_bn")
    data = [d.requires_grad_() if d.is_floating_point() else d for d in data]
    options = {"first_order": first_order, "strategy": strategy, "learn_lr": "element"}
    found = []
    for chunk in (None, 2):
        maml = MAML(model, 0.1, 2, task_chunk=chunk, **options)
        inputs = torch.autograd.grad(
            cross_entropy(maml(*data[:3]), data[3]), [data[0], data[2]], materialize_grads=True
        )
        found.append(meta_gradients(maml, data) | {"x": inputs[0], "query": inputs[1]})
    agree(found[1], found[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_to_the_inputs(strategy):
    model, data = make("mlp")
    support_x, query_x = data[0].requires_grad_(), data[2].requires_grad_()
    loss = cross_entropy(MAML(model, 0.3, 2, strategy=strategy)(*data[:3]), data[3])
    found = torch.autograd.grad(loss, [support_x, query_x])
    wanted = torch.autograd.grad(
        unroll(model, data, lr=0.3, steps=2, value=True), [support_x, query_x]
    )
    agree(dict(enumerate(found)), dict(enumerate(wanted)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_under_torch_func_grad(strategy, chunk):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2, strategy=strategy, task_chunk=chunk, learn_lr="parameter")
    wanted = meta_gradients(maml, data)

    def meta_loss(parameters):
        return cross_entropy(functional_call(maml, parameters, tuple(data[:3])), data[3])

    found = grad(meta_loss)({n: p.detach() for n, p in maml.named_parameters()})
    agree({n.removeprefix("model."): g for n, g in found.items()}, wanted)


def test_first_order_under_torch_func_grad():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2, first_order=True)

    def meta_loss(parameters):
        return cross_entropy(functional_call(maml, parameters, tuple(data[:3])), data[3])

    found = grad(meta_loss)({n: p.detach() for n, p in maml.named_parameters()})
    agree({n.removeprefix("model."): g for n, g in found.items()}, meta_gradients(maml, data))


def test_inside_vmap_is_refused():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1)
    with pytest.raises(RuntimeError, match=r"the call must be outside of torch\.func\.vmap"):
        vmap(lambda x: maml(x, data[1], data[2]))(torch.stack([data[0], data[0]]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_regression_and_a_loss_of_ones_own(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    data = [torch.randn(3, n, 1).double() for n in (6, 6, 5, 5)]

    def smooth_l1(prediction, target):
        return F.smooth_l1_loss(prediction, target, beta=0.5)

    for loss, inner in (("mse", F.mse_loss), (smooth_l1, smooth_l1)):
        maml = MAML(model, 0.1, 3, loss=loss, strategy=strategy)
        wanted = unroll(model, data, lr=0.1, steps=3, inner=inner, outer=F.mse_loss)
        agree(meta_gradients(maml, data, outer=F.mse_loss), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dense_labels(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    support_x, query_x = torch.randn(2, 3, 2, 4, 4).double(), torch.randn(2, 2, 2, 4, 4).double()
    support_y, query_y = torch.randint(3, (2, 3, 4, 4)), torch.randint(3, (2, 2, 4, 4))
    support_y[1, 0, :2] = -100  # part of a picture without labels
    data = [support_x, support_y, query_x, query_y]
    found = meta_gradients(MAML(model, 0.3, 2, strategy=strategy), data)
    agree(found, unroll(model, data, lr=0.3, steps=2))
