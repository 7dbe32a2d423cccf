"""The short way of `MAML.loss` for calls like earlier ones: nothing may slip past what it skips."""

import types

import pytest
import torch
from mamlcases import agree, batch, make
from torch import nn

import fastmeta._inner_loop as inner_loop
from fastmeta.maml import MAML


@pytest.fixture(autouse=True)
def _engine_everywhere(monkeypatch):
    """Auto takes the engine, compiled or not; the problems are tiny."""
    monkeypatch.setattr(inner_loop, "has_kernel", lambda device_type: True)
    torch.set_num_threads(1)


def loss_gradients(maml, data):
    maml.zero_grad()
    value = maml.loss(*data)
    value.backward()
    return {"value": value.detach()} | {
        n: p.grad for n, p in maml.named_parameters() if p.grad is not None
    }


def recalled(maml, monkeypatch):
    """A list that gets an entry for each call that takes the short way."""
    taken = []
    real = maml._runner.engine.recall

    def recall(*arguments):
        loss = real(*arguments)
        if loss is not None:
            taken.append(loss)
        return loss

    monkeypatch.setattr(maml._runner.engine, "recall", recall)
    return taken


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied", "body_head"])
@pytest.mark.parametrize("learn_lr", [False, "scalar", "parameter", "element"])
def test_the_short_way_gives_the_same(name, learn_lr, monkeypatch):
    model, data = make(name)
    data[0].requires_grad_()
    options = {"learn_lr": learn_lr, "adapt": "head" if name == "body_head" else None}
    maml = MAML(model, 0.1, 2, **options)
    taken = recalled(maml, monkeypatch)
    first = loss_gradients(maml, data)
    on_x, data[0].grad = data[0].grad, None
    assert not taken
    agree(loss_gradients(maml, data), first, 1e-14)
    torch.testing.assert_close(data[0].grad, on_x, rtol=1e-12, atol=1e-14)
    assert len(taken) == 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    agree(loss_gradients(maml, data), loss_gradients(MAML(model, 0.1, 2, **options), data), 1e-12)
    assert len(taken) == 2
    assert maml.plan().strategy == "engine"


def test_settings_that_change_count():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        maml.loss(*data)
    maml.lr, maml.steps, maml.first_order = 0.2, 3, True
    wanted = loss_gradients(MAML(model, 0.2, 3, first_order=True), data)
    agree(loss_gradients(maml, data), wanted, 1e-12)


def test_what_a_call_refuses_it_refuses_again():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        maml.loss(*data)
    for position, argument in ((1, "support_y"), (3, "query_y")):
        for label, wanted in ((3, r"must be in \[0, 3\)"), (-7, "must be class labels from 0 on")):
            wrong = list(data)
            wrong[position] = data[position].clone()
            wrong[position][1, 2] = label
            with pytest.raises(ValueError, match=f"MAML.*: {argument} {wanted}"):
                maml.loss(*wrong)
    with pytest.raises(TypeError, match="query_y must be a tensor, got None"):
        maml.loss(*data[:3], None)


def test_padding_and_batch_norm_go_another_way_again():
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        maml.loss(*data)
    for position in (1, 3):
        padded = list(data)
        padded[position] = data[position].clone()
        padded[position][0, 1] = -100
        wanted = loss_gradients(MAML(model, 0.1, 2, strategy="loop"), padded)
        agree(loss_gradients(maml, padded), wanted)
        assert maml.plan().strategy == "loop"
    maml.loss(*data)
    assert maml.plan().strategy == "engine"


class Configured(nn.Module):
    """A forward pass that reads options of objects and of nested containers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.config = types.SimpleNamespace(skip=False, deeper=types.SimpleNamespace(scale=False))
        self.options = {"blocks": [{"square": False}]}

    def forward(self, x):
        y = self.layer(x)
        y = torch.relu(y) if self.config.skip else y
        y = torch.tanh(y) if self.config.deeper.scale else y
        return y + y if self.options["blocks"][0]["square"] else y


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "skip", True),
        lambda model: setattr(model.config.deeper, "scale", True),
        lambda model: model.options["blocks"][0].update(square=True),
        lambda model: model.options["blocks"].__setitem__(0, {"square": True}),
    ],
)
def test_changes_of_what_the_module_holds_are_noticed(change):
    torch.manual_seed(0)
    model, data = Configured().double(), make("mlp")[1]
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        before = loss_gradients(maml, data)
    assert maml.plan().strategy == "engine"
    change(model)
    after = loss_gradients(maml, data)
    assert not torch.equal(after["value"], before["value"])
    agree(after, loss_gradients(MAML(model, 0.1, 2), data), 1e-12)


def test_targets_that_learn_are_noticed():
    model, (sx, _, qx, _) = make("mlp")
    sy, qy = torch.randn(*sx.shape[:2], 3).double(), torch.randn(*qx.shape[:2], 3).double()
    maml = MAML(model, 0.1, 2, loss="mse")
    for _ in range(2):
        maml.loss(sx, sy, qx, qy)
    assert maml.plan().strategy == "engine"
    sy.requires_grad_()
    qy.requires_grad_()
    wanted = torch.autograd.grad(
        MAML(model, 0.1, 2, loss="mse", strategy="loop").loss(sx, sy, qx, qy), (sy, qy)
    )
    found = torch.autograd.grad(maml.loss(sx, sy, qx, qy), (sy, qy))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert "targets require a gradient" in maml.plan().reason
    ((wanted),) = torch.autograd.grad(
        MAML(model, 0.1, 2, loss="mse", strategy="loop")(sx, sy, qx).sum(), sy
    )
    torch.testing.assert_close(torch.autograd.grad(maml(sx, sy, qx).sum(), sy)[0], wanted)
    with torch.no_grad():
        maml.loss(sx, sy, qx, qy)
    assert maml.plan().strategy == "engine"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: setattr(model[0], "bias", None),
        lambda model: model.__setitem__(1, nn.ReLU()),
        lambda model: setattr(model[2], "weight", nn.Parameter(model[2].weight.detach() * 2)),
    ],
)
def test_changes_of_the_module_are_noticed(change):
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        maml.loss(*data)
    change(model)
    agree(loss_gradients(maml, data), loss_gradients(MAML(model, 0.1, 2), data), 1e-12)


def _set_shapes(model, *shapes):
    for p, shape in zip(model.parameters(), shapes, strict=True):
        p.data = torch.randn(shape, dtype=p.dtype)


def test_tensors_of_other_shapes_and_dtypes_in_the_same_parameters_are_noticed():
    """What ``.data`` was set to: the parameter is the same object, and the layer does not know."""
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    for _ in range(2):
        maml.loss(*data)
    _set_shapes(model, (7, 4), (7,), (3, 7), (3,))  # another width
    agree(loss_gradients(maml, data), loss_gradients(MAML(model, 0.1, 2), data), 1e-12)
    maml.loss(*data)
    _set_shapes(model, (4, 7), (7,), (3, 7), (3,))  # as many numbers, and no layer
    for again in (maml, MAML(model, 0.1, 2, strategy="loop")):
        with pytest.raises(RuntimeError):
            again.loss(*data)
    _set_shapes(model, (7, 4), (7,), (3, 7), (3,))
    for p in model.parameters():
        p.data = p.data.float()
    single = [t.float() if t.is_floating_point() else t for t in data]
    agree(loss_gradients(maml, single), loss_gradients(MAML(model, 0.1, 2), single), 1e-6)


def test_functional_call_and_transforms_are_noticed():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    first = loss_gradients(maml, data)
    loss_gradients(maml, data)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.maml = maml

        def forward(self):
            return self.maml.loss(*data)

    values = {n: p.detach() for n, p in Loss().named_parameters()}
    found = torch.func.grad(lambda v: torch.func.functional_call(Loss(), v, ()))(values)
    del first["value"]
    agree({n.removeprefix("maml."): g for n, g in found.items()}, first)
    assert maml.plan().strategy == "vmap"
    doubled = {n: 2 * v for n, v in values.items()}
    other = torch.func.functional_call(Loss(), doubled, ())
    assert not torch.equal(other, maml.loss(*data))


def test_other_sizes_and_dtypes_go_their_own_way():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    maml.loss(*data)
    maml.loss(*batch((4,), tasks=2, support=3, query=5))
    maml.float()
    single = [d.float() if d.is_floating_point() else d for d in data]
    assert maml.loss(*single).dtype == torch.float32
    with pytest.raises(RuntimeError):
        maml.loss(*data)
