"""Adapted tasks: calling, indexing, saving them."""

import os
import stat

import numpy as np
import pytest
import torch
from mamlcases import agree, batch, cross_entropy, make, meta_gradients
from torch import nn
from torch.func import functional_call

from fastmeta.maml import MAML, AdaptedTask, AdaptedTasks

STRATEGIES = ("vmap", "loop")


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


def test_adapt_then_call_is_the_call(strategy):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2, strategy=strategy)
    wanted = meta_gradients(maml, data)
    maml.zero_grad()
    tasks = maml.adapt(*data[:2])
    cross_entropy(tasks(data[2]), data[3]).backward()
    agree({n: p.grad for n, p in model.named_parameters()}, wanted)


def test_parameters_are_those_of_plain_steps(strategy):
    model, data = make("mlp")
    tasks = MAML(model, 0.3, 2, strategy=strategy).adapt(*data[:2])
    assert list(tasks.parameters) == [n for n, _ in model.named_parameters()]
    for t in range(3):
        theta = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        for _ in range(2):
            loss = nn.functional.cross_entropy(
                functional_call(model, theta, (data[0][t],)), data[1][t]
            )
            grads = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                n: (p - 0.3 * g).detach().requires_grad_()
                for (n, p), g in zip(theta.items(), grads, strict=True)
            }
        for name, value in theta.items():
            torch.testing.assert_close(tasks.parameters[name][t], value, rtol=1e-11, atol=1e-13)


def test_steps_can_be_chosen(strategy):
    model, data = make("mlp")
    one, three = (MAML(model, 0.3, k, strategy=strategy) for k in (1, 3))
    torch.testing.assert_close(
        one.adapt(*data[:2], steps=3)(data[2]), three(*data[:3]), rtol=1e-12, atol=1e-12
    )
    start = one.adapt(*data[:2], steps=0).parameters["0.weight"]
    assert torch.equal(start, model[0].weight.expand(3, -1, -1))


def test_steps_past_those_that_have_rates_use_the_last():
    model, data = make("mlp")
    maml = MAML(model, 0.3, 2, learn_lr="scalar", lr_per_step=True)
    with torch.no_grad():
        maml.rates["all"].copy_(torch.tensor([0.1, 0.2]))
    halfway = maml.adapt(*data[:2], steps=2)
    further = maml.adapt(*data[:2], steps=4)
    for t in range(3):
        again = MAML(halfway[t].to_module(), 0.2, 2).adapt(*(d[t : t + 1] for d in data[:2]))
        for name, value in again.parameters.items():
            torch.testing.assert_close(further.parameters[name][t], value[0])


@pytest.mark.parametrize("name", ["conv_bn", "body_head"])
def test_indexing(name, strategy):
    model, data = make(name)
    adapt = "head" if name == "body_head" else None
    tasks = MAML(model, 0.1, 2, strategy=strategy, adapt=adapt).adapt(*data[:2])
    wanted = tasks(data[2])
    assert len(tasks) == 3
    assert [type(task) for task in tasks] == [AdaptedTask] * 3
    for t, task in enumerate(tasks):
        torch.testing.assert_close(task(data[2][t]), wanted[t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tasks[-1](data[2][2]), wanted[2], rtol=1e-12, atol=1e-12)
    part = tasks[1:]
    assert isinstance(part, AdaptedTasks)
    assert len(part) == 2
    torch.testing.assert_close(part(data[2][1:]), wanted[1:], rtol=1e-12, atol=1e-12)
    for index in ([2, 0], (2, 0), torch.tensor([2, 0])):
        torch.testing.assert_close(tasks[index](data[2][[2, 0]]), wanted[[2, 0]])
    chosen = tasks[torch.tensor([True, False, True])]
    torch.testing.assert_close(chosen(data[2][::2]), wanted[::2])
    assert isinstance(tasks[np.int64(1)], AdaptedTask)
    for none in (tasks[:0], tasks[[]]):
        assert none(data[2][:0]).shape == (0, *wanted.shape[1:])
    with pytest.raises(IndexError, match="index 3 is out of range for 3 tasks"):
        tasks[3]
    assert "3 tasks" in repr(tasks)


def test_chunks_give_the_same(strategy):
    model, data = make("conv_bn")
    tasks, chunked = (
        MAML(model, 0.1, 2, strategy=strategy, task_chunk=n).adapt(*data[:2]) for n in (None, 2)
    )
    agree(chunked.parameters, tasks.parameters)
    torch.testing.assert_close(chunked(data[2]), tasks(data[2]), rtol=1e-12, atol=1e-12)


def test_a_module_of_its_own():
    model, data = make("conv_bn")
    tasks = MAML(model, 0.1, 2).adapt(*data[:2])
    module = tasks[1].to_module()
    assert isinstance(module, nn.Sequential)
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(module(data[2][1]), tasks(data[2])[1], rtol=1e-12, atol=1e-12)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    before = tasks.parameters["0.weight"].clone()
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(tasks.parameters["0.weight"], before)
    assert model[1].running_mean is not None


def test_a_module_of_a_model_with_running_statistics_keeps_them():
    model, data = make("conv_bn")
    tasks = MAML(model, 0.1, 2, batch_norm="running").adapt(*data[:2])
    module = tasks[1].to_module().eval()
    torch.testing.assert_close(module(data[2][1]), tasks(data[2])[1], rtol=1e-12, atol=1e-12)


def test_detach():
    model, data = make("mlp")
    tasks = MAML(model, 0.1, 2).adapt(*data[:2])
    detached = tasks.detach()
    assert all(p.requires_grad for p in tasks.parameters.values())
    assert not any(p.requires_grad for p in detached.parameters.values())
    assert torch.equal(detached(data[2]), tasks(data[2]))


@pytest.mark.parametrize("name", ["conv_bn", "body_head", "tied", "functional_bn"])
def test_saved_tasks_come_back(name, tmp_path):
    model, data = make(name)
    options = {"adapt": "head"} if name == "body_head" else {}
    maml = MAML(model, 0.1, 2, task_chunk=2, **options)
    tasks = maml.adapt(*data[:2])
    path = tmp_path / "tasks.pt"
    path.write_bytes(b"what was there before")
    tasks.save(path)
    assert os.listdir(tmp_path) == ["tasks.pt"]
    assert torch.load(path, weights_only=True)["parameters"].keys() == tasks.parameters.keys()
    wanted = tasks(data[2]).detach()
    other = make(name)[0]
    with torch.no_grad():
        for p in [*other.parameters(), *model.parameters()]:
            p.add_(1.0)  # the file does not depend on what either model becomes
    loaded = AdaptedTasks.load(path, other)
    torch.testing.assert_close(loaded(data[2]), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loaded[2](data[2][2]), wanted[2], rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in loaded.parameters.values())


def test_a_part_of_the_tasks_does_not_save_all(tmp_path):
    model, data = make("mlp")
    tasks = MAML(model, 0.1, 1).adapt(*(d.repeat(40, *(1,) * (d.dim() - 1)) for d in data[:2]))
    tasks.save(tmp_path / "all.pt")
    tasks[:1].save(tmp_path / "one.pt")
    sizes = [(tmp_path / f).stat().st_size for f in ("one.pt", "all.pt")]
    assert sizes[0] < sizes[1] / 4
    assert stat.S_IMODE((tmp_path / "one.pt").stat().st_mode) & 0o400


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model, data = make("mlp")
    tasks = MAML(model, 0.1, 1).adapt(*data[:2])
    path = tmp_path / "tasks.pt"
    tasks.save(path)
    before = path.read_bytes()

    def broken(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        tasks.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tasks.pt"]


def test_loading_what_does_not_fit(tmp_path):
    model, data = make("mlp")
    path = tmp_path / "tasks.pt"
    MAML(model, 0.1, 1).adapt(*data[:2]).save(path)
    with pytest.raises(ValueError, match=r"load: model must be with the tensors.*got.*\[7, 4\]"):
        AdaptedTasks.load(path, nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)))
    with pytest.raises(ValueError, match=r"model must be with the tensors.*'0\.weight'"):
        AdaptedTasks.load(path, nn.Linear(4, 3))
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match=r"path must be a file of format fastmeta\.AdaptedTasks"):
        AdaptedTasks.load(path, model)


@pytest.mark.parametrize(
    ("query", "mask", "error", "match"),
    [
        ("none", None, TypeError, "query_x must be a tensor"),
        (torch.zeros(2, 4, 4), None, ValueError, r"query_x must be of shape \[T=3, Q, \.\.\.\]"),
        (torch.zeros(3), None, ValueError, r"query_x must be of shape \[T=3"),
        (torch.zeros(3, 4, 4), torch.ones(3, 4), TypeError, "query_mask must be a bool tensor"),
        (
            torch.zeros(3, 4, 4),
            torch.ones(3, 5).bool(),
            ValueError,
            r"query_mask must be of shape \[3, 4\]",
        ),
    ],
)
def test_bad_queries(query, mask, error, match):
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1)
    tasks = maml.adapt(*data[:2])
    with pytest.raises(error, match=match):
        tasks(query, query_mask=mask)
    with pytest.raises(error, match=match):
        maml(*data[:2], query, query_mask=mask)


def test_masked_queries_are_zero_and_do_not_enter_batch_statistics(strategy):
    model, data = make("conv_bn")
    tasks = MAML(model, 0.1, 2, strategy="auto" if strategy == "vmap" else "loop").adapt(*data[:2])
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = mask[2] = False
    out = tasks(data[2], query_mask=mask)
    assert not out[~mask].any()
    torch.testing.assert_close(out[0, :2], tasks[0](data[2][0, :2]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1], tasks[1](data[2][1]), rtol=1e-12, atol=1e-12)


def test_integer_inputs_and_other_ranks():
    model, data = make("embedding")
    assert MAML(model, 0.1, 1).adapt(*data[:2])(data[2]).shape == (3, 4, 3)
    torch.manual_seed(0)
    scalar = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2), nn.Flatten(0)).double()
    data = batch((), tasks=2)
    out = MAML(scalar, 0.1, 1, loss=lambda p, y: p.sum() * 0.1)(*data[:3])
    assert out.shape == (2, 8)
