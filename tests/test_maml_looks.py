"""Labels on a GPU: looked at only where somebody has to know, and once. Tried on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from mamlcases import agree, make
from torch import nn

import fastmeta._inner_loop as inner_loop
import fastmeta._inner_losses as inner_losses
import fastmeta._padding as padding
from fastmeta.maml import MAML


@pytest.fixture
def looks(monkeypatch):
    """As on a GPU: nobody is free to look, and the engine has no kernel. Returns the looks taken."""
    taken = []
    stack = torch.stack

    class Counted:
        def __init__(self, tensors):
            self.tensors = tensors

        def tolist(self):
            taken.append(len(self.tensors))
            return stack(self.tensors).tolist()

    def forbidden(tensor):
        raise AssertionError("a look of one's own")

    class Torch:
        def __getattr__(self, name):
            return Counted if name == "stack" else getattr(torch, name)

    monkeypatch.setattr(padding, "torch", Torch())
    monkeypatch.setattr(padding, "bool", forbidden, raising=False)
    for module in (padding, inner_losses):
        monkeypatch.setattr(module, "free_to_look", lambda tensor: False)
    monkeypatch.setattr(inner_loop, "has_kernel", lambda device_type: False)
    return taken


def padded(data, *, rows=2):
    support_x, support_y, query_x, query_y = (t.clone() for t in data)
    support_y[0, :rows] = query_y[1, :rows] = -100
    return [support_x, support_y, query_x, query_y]


def all_calls(maml, data):
    """Values and gradients of everything that takes labels, by name."""
    found = {}

    def gradients(name, value):
        wanted = [p for p in maml.parameters() if p.requires_grad]
        for i, g in enumerate(torch.autograd.grad(value, wanted, allow_unused=True)):
            if g is not None:
                found[f"{name} {i}"] = g
        found[name] = value.detach()

    gradients("loss", maml.loss(*data))
    logits = maml(*data[:3])
    gradients("call", F.cross_entropy(logits.flatten(0, 1), data[3].flatten()))
    tasks = maml.adapt(*data[:2])
    gradients("adapt", tasks(data[2]).square().sum())
    maml.zero_grad()
    found["backward"] = maml.backward(*data)
    found |= {f"grad {i}": p.grad for i, p in enumerate(maml.parameters()) if p.grad is not None}
    return found


OPTIONS = {
    "second order": {},
    "first order": {"first_order": True},
    "learned rates": {"learn_lr": "parameter"},
    "chunks": {"task_chunk": 2},
    "smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "weights": {"loss": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))},
}


@pytest.mark.parametrize("make_data", [lambda data: data, padded], ids=["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nobody_looks_where_rows_stand_alone(options, make_data, looks, monkeypatch):
    model, data = make("mlp")
    data = make_data(data)
    maml = MAML(model, 0.1, 2, **options)
    found = all_calls(maml, data)
    assert maml.plan().strategy == "vmap"
    assert not looks
    monkeypatch.undo()
    agree(found, all_calls(MAML(model, 0.1, 2, strategy="vmap", **options), data), 1e-12)


@pytest.mark.parametrize("make_data", [lambda data: data, padded], ids=["whole", "padded"])
@pytest.mark.parametrize("task_chunk", [None, 2])
def test_batch_norm_looks_once_a_call(task_chunk, make_data, looks, monkeypatch):
    model, data = make("conv_bn")
    data = make_data(data)
    maml = MAML(model, 0.1, 2, task_chunk=task_chunk)
    found = all_calls(maml, data)
    assert maml.plan().strategy == ("loop" if make_data is padded else "vmap")
    # loss, the call and adapt, and backward; the call and adapt have no labels of queries.
    assert looks == [2, 1, 1, 2]
    monkeypatch.undo()
    agree(found, all_calls(MAML(model, 0.1, 2, strategy="loop"), data), 1e-10)


def test_batch_norm_by_running_statistics_does_not_look(looks):
    model, data = make("conv_bn")
    all_calls(MAML(model, 0.1, 2, batch_norm="running"), padded(data))
    assert not looks


def test_targets_that_are_no_labels_are_not_looked_at(looks):
    model, data = make("conv_bn")
    targets = [F.one_hot(y, 3).double() for y in (data[1], data[3])]
    MAML(model, 0.1, 2, loss="mse").backward(data[0], targets[0], data[2], targets[1])
    assert not looks


def test_a_mask_of_queries_is_looked_at_once(looks, monkeypatch):
    model, data = make("conv_bn")
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1:] = False
    maml = MAML(model, 0.1, 2)
    found = maml(*data[:3], query_mask=mask)
    assert looks == [2]
    monkeypatch.undo()
    wanted = MAML(model, 0.1, 2, strategy="loop")(*data[:3], query_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_loss_of_ones_own_looks_once_a_call(looks, monkeypatch):
    def own(prediction, target):
        return F.cross_entropy(prediction, target)

    for make_data in (lambda data: data, padded):
        model, data = make("mlp")
        data = make_data(data)
        found = MAML(model, 0.1, 2, loss=own).loss(*data)
        assert looks == [2]
        looks.clear()
        with monkeypatch.context() as free:
            free.setattr(padding, "free_to_look", lambda tensor: True)
            free.setattr(inner_losses, "free_to_look", lambda tensor: True)
            wanted = MAML(model, 0.1, 2, loss=own).loss(*data)
        assert not looks
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
