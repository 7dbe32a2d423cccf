"""The inner loop that runs its steps again in the backward pass: same numbers, flat memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from mamlcases import agree, batch, cross_entropy, make, meta_gradients, unroll
from memorycases import resident
from torch import nn

from fastmeta.maml import MAML

STRATEGIES = ("vmap", "loop")


def kept(maml, data):
    """Bytes that the graph of a prediction keeps, each storage once."""
    seen = []

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach()

    def pack(tensor):
        box = Box(tensor)
        seen.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        out = maml(*data[:3])
    storages = [box.tensor.untyped_storage() for box in (ref() for ref in seen) if box]
    assert out.requires_grad
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("name", ["mlp_norms", "conv_bn"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_further_step_keeps_its_parameters_alone(strategy, name):
    model, data = make(name)
    few, many = (kept(MAML(model, 0.1, steps, strategy=strategy), data) for steps in (2, 9))
    tasks = data[0].shape[0]
    trajectory = 7 * tasks * sum(p.nbytes for p in model.parameters())
    # Each state of the random numbers is a few thousand bytes more, which are no tensors of ours.
    assert many - few == trajectory


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [4, 12])
def test_many_steps_agree_with_unrolling(steps, strategy):
    model, data = make("mlp_norms")
    found = meta_gradients(MAML(model, 0.05, steps, strategy=strategy), data)
    agree(found, unroll(model, data, lr=0.05, steps=steps), 1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_is_drawn_again(randomness, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    data = batch((4,))
    maml = MAML(model, 0.5, 3, strategy=strategy, randomness=randomness)
    weight = model[0].weight
    direction = torch.randn_like(weight)

    def value(step):
        torch.manual_seed(7)
        with torch.no_grad():
            weight.add_(step * direction)
            loss = cross_entropy(maml(*data[:3]), data[3])
            weight.sub_(step * direction)
        return loss

    torch.manual_seed(7)
    out = maml(*data[:3])
    after = torch.rand(3)
    torch.rand(5)  # what others draw in between changes nothing
    cross_entropy(out, data[3]).backward()
    found = (weight.grad * direction).sum()
    torch.testing.assert_close(found, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    torch.manual_seed(7)
    maml(*data[:3])
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_derivatives_of_the_meta_gradient(chunk, strategy):
    model, data = make("mlp")
    parameters = list(model.parameters())
    found = []
    for loss in (
        cross_entropy(MAML(model, 0.3, 3, strategy=strategy, task_chunk=chunk)(*data[:3]), data[3]),
        unroll(model, data, lr=0.3, steps=3, value=True),
    ):
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        norm = sum(g.square().sum() for g in grads)
        found.append(dict(enumerate(torch.autograd.grad(norm, parameters))))
    agree(*found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_graph_can_be_used_twice(strategy):
    model, data = make("mlp")
    loss = cross_entropy(MAML(model, 0.3, 3, strategy=strategy)(*data[:3]), data[3])
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapted_parameters_have_their_gradients(strategy):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 1, strategy=strategy)
    cross_entropy(maml.adapt(*data[:2], steps=4)(data[2]), data[3]).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    agree(found, unroll(model, data, lr=0.1, steps=4))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradient_to_the_targets(chunk, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    data = [torch.randn(3, n, 1).double() for n in (6, 6, 5, 5)]
    target = data[1].requires_grad_()
    maml = MAML(model, 0.1, 3, loss="mse", strategy=strategy, task_chunk=chunk)
    found = torch.autograd.grad(F.mse_loss(maml(*data[:3]), data[3]), target)[0]
    loss = unroll(model, data, lr=0.1, steps=3, inner=F.mse_loss, outer=F.mse_loss, value=True)
    torch.testing.assert_close(found, torch.autograd.grad(loss, target)[0], rtol=1e-9, atol=1e-12)


class LearnedLoss(nn.Module):
    """A loss with a parameter that no model holds, as its leaf or as what is made of it."""

    def __init__(self, *, made):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.made = self.log_scale.exp() if made else None

    def forward(self, prediction, target):
        scale = self.log_scale.exp() if self.made is None else self.made
        return F.cross_entropy(prediction * scale, target)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("made", [False, True])
def test_a_loss_that_learns_gets_its_gradient(made, strategy):
    model, data = make("mlp")
    loss = LearnedLoss(made=made)
    maml = MAML(model, 0.3, 3, loss=loss, strategy=strategy)
    found = meta_gradients(maml, data)
    grad = found.pop("criterion.log_scale")
    loss = LearnedLoss(made=False)
    agree(found, unroll(model, data, lr=0.3, steps=3, inner=loss))
    value = unroll(model, data, lr=0.3, steps=3, inner=loss, value=True)
    wanted = torch.autograd.grad(value, loss.log_scale)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_chunks_refuse_a_loss_that_learns():
    model, data = make("mlp")
    maml = MAML(model, 0.3, 3, loss=LearnedLoss(made=False), task_chunk=2)
    with pytest.raises(RuntimeError, match="task_chunk must be None for a model or loss that"):
        meta_gradients(maml, data)


class Counts(nn.Module):
    """Output that depends on how often the module has run: by a buffer, or behind torch's back."""

    def __init__(self, *, buffer):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.runs = 0
        self.buffer = buffer
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.buffer:
            self.seen += 1
        self.runs += 1
        return torch.tanh(self.layer(x)) * (1 + 0.1 * (self.seen if self.buffer else self.runs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_writes_buffers_is_taped(strategy):
    torch.manual_seed(0)
    model, data = Counts(buffer=True).double(), batch((4,))
    found = meta_gradients(MAML(model, 0.3, 3, strategy=strategy), data)

    start, outputs = list(model.layer.parameters()), []
    for x, y, query in zip(*data[:3], strict=True):
        theta = start
        for step in range(3):
            out = torch.tanh(F.linear(x, *theta)) * (1.1 + 0.1 * step)
            grads = torch.autograd.grad(F.cross_entropy(out, y), theta, create_graph=True)
            theta = [p - 0.3 * g for p, g in zip(theta, grads, strict=True)]
        outputs.append(torch.tanh(F.linear(query, *theta)) * 1.4)
    wanted = torch.autograd.grad(cross_entropy(torch.stack(outputs), data[3]), start)
    agree(found, dict(zip(("layer.weight", "layer.bias"), wanted, strict=True)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_hides_its_state_is_found_out(strategy):
    model, data = Counts(buffer=False).double(), batch((4,))
    out = MAML(model, 0.3, 3, strategy=strategy)(*data[:3])
    with pytest.raises(RuntimeError, match=r"state in buffers.*a support loss of .* again"):
        cross_entropy(out, data[3]).backward()


def test_the_backward_pass_runs_in_the_mode_of_the_forward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    data = batch((4,))
    maml = MAML(model, 0.5, 3)
    grads = []
    for other in (False, True):
        torch.manual_seed(3)
        out = maml.train()(*data[:3])
        maml.train(not other)
        model.zero_grad()
        cross_entropy(out, data[3]).backward()
        assert model[1].training is not other
        grads.append(model[0].weight.grad)
    assert torch.equal(*grads)


def test_what_the_backward_pass_needs_may_not_be_overwritten():
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 3, batch_norm="running")
    for tensor in (model[1].running_var, model[0].weight):
        loss = cross_entropy(maml(*data[:3]), data[3])
        with torch.no_grad():
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"task_chunk": 4}, {"learn_lr": "element"}])
def test_memory_does_not_grow_over_a_thousand_meta_steps(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.BatchNorm1d(200), nn.Tanh(), nn.Linear(200, 3))
    data = [d.float() if d.is_floating_point() else d for d in batch((4,), tasks=8)]
    maml = MAML(model, 0.01, 3, **options)
    for step in range(1000):
        meta_gradients(maml, data)
        if step == 99:
            gc.collect()
            start = resident()
    gc.collect()
    grown = resident() - start
    trajectory = 3 * 8 * sum(p.nbytes for p in model.parameters())
    assert grown < 0.05 * 900 * trajectory, f"{grown} bytes in 900 meta-steps"
