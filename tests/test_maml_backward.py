"""`MAML.backward` against ``loss(...).backward()``, by every strategy."""

import pytest
import torch
from mamlcases import make
from torch import nn

import fastmeta._inner_loop as inner_loop
from fastmeta.maml import MAML


@pytest.fixture(autouse=True)
def _engine_everywhere(monkeypatch):
    """Auto takes the engine, compiled or not; the problems are tiny."""
    monkeypatch.setattr(inner_loop, "has_kernel", lambda device_type: True)


def gradients(maml, data, *, at_once, calls=1):
    for tensor in (*maml.parameters(), *data):
        tensor.grad = None
    for _ in range(calls):
        if at_once:
            value = maml.backward(*data)
            assert not value.requires_grad
        else:
            value = maml.loss(*data)
            value.backward()
    return [value.detach(), *(t.grad for t in (*maml.parameters(), *data))]


def check(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", ["engine", "vmap", "loop"])
@pytest.mark.parametrize("learn_lr", [False, "scalar", "parameter", "element"])
def test_the_same_gradients(strategy, learn_lr):
    model, data = make("mlp")
    data[0].requires_grad_()
    maml = MAML(model, 0.1, 2, learn_lr=learn_lr, strategy=strategy)
    wanted = gradients(maml, data, at_once=False, calls=2)
    assert sum(g is not None for g in wanted) > len(list(maml.parameters()))
    check(gradients(maml, data, at_once=True, calls=2), wanted)  # the second call adds


@pytest.mark.parametrize("first_order", [False, True])
def test_batch_norm_and_first_order(first_order):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2, first_order=first_order)
    wanted = gradients(maml, data, at_once=False)
    check(gradients(maml, data, at_once=True), wanted)
    assert maml.plan().strategy == "engine"


def test_goes_on_into_a_graph():
    model, (sx, sy, qx, qy) = make("mlp")
    scale = torch.tensor(0.7, dtype=sx.dtype, requires_grad=True)
    maml = MAML(model, 0.1, 2)

    def run(call):
        maml.zero_grad()
        scale.grad = None
        call(scale * sx, sy, scale * qx, qy)
        return [scale.grad, *(p.grad for p in maml.parameters())]

    check(run(maml.backward), run(lambda *data: maml.loss(*data).backward()))


def test_hooks_run():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1)
    wanted = gradients(maml, data, at_once=False)
    parameter = next(maml.parameters())
    seen = []
    handles = [
        parameter.register_hook(lambda g: 2 * g),
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    found = gradients(maml, data, at_once=True)
    wanted[1] = 2 * wanted[1]
    check(found, wanted)
    torch.testing.assert_close(seen, [wanted[1]])
    for handle in handles:
        handle.remove()


def test_gradient_modes():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1, learn_lr="parameter")
    wanted = gradients(maml, data, at_once=True)
    with torch.no_grad():
        check(gradients(maml, data, at_once=True), wanted)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"MAML\.backward.*inference"):
        maml.backward(*data)


def test_refuses_what_has_nothing_to_learn():
    class Step(nn.Module):
        def __init__(self, maml):
            super().__init__()
            self.maml = maml

        def forward(self, *data):
            return self.maml.backward(*data)

    model, data = make("mlp")
    step = Step(MAML(model, 0.1, 1))
    values = {name: p.detach() for name, p in step.named_parameters()}
    with pytest.raises(RuntimeError, match="neither parameters, rates nor inputs require"):
        torch.func.functional_call(step, values, tuple(data))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        step(*data)


def test_names_itself_in_errors():
    maml = MAML(nn.Linear(2, 1), 0.1, 1, loss="mse")
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
    with pytest.raises(ValueError, match=r"MAML\.backward"):
        maml.backward(x, y, torch.randn(2, 4, 2), y)
