"""MAML on a GPU: the CPU's numbers, and nothing that makes the host wait."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fastmeta as fm


@contextmanager
def no_waiting():
    """Anything that makes the host wait for the GPU is an error meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def sinusoid():
    return fm.nn.MLP([1, 40, 40, 1])


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def dropout():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 5)
    )


def tasks(build, device, dtype=torch.float32, seed=0, *, count=4, padded=False):
    """Supports and queries of ``count`` tasks."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in (10, 15):
        if build is sinusoid:
            x = 10 * torch.rand(count, rows, 1, generator=generator) - 5
            made += [x.to(dtype), x.sin().to(dtype)]
            continue
        x = torch.randn(count, rows, 1, 4, 4, generator=generator).to(dtype)
        y = torch.arange(count * rows).reshape(count, rows) % 5
        if padded:
            y[0, :3] = -100
        made += [x, y]
    return [t.to(device) for t in made]


def learner(build, device, dtype=torch.float32, *, steps=2, **options):
    torch.manual_seed(0)
    model = build().to(device=device, dtype=dtype)
    loss = "mse" if build is sinusoid else "cross_entropy"
    return fm.MAML(model, lr=0.05, steps=steps, loss=loss, **options)


def gradients(maml):
    return {n: p.grad.detach().cpu() for n, p in maml.named_parameters() if p.grad is not None}


def close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    largest = max(w.norm() for w in wanted.values())
    for name, w in wanted.items():
        error = (found[name] - w).norm()
        assert error <= tolerance * max(w.norm(), 1e-3 * largest), f"{name}: {error:.1e}"


OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "scalar": {"learn_lr": "scalar"},
    "parameter": {"learn_lr": "parameter", "lr_per_step": True},
    "element": {"learn_lr": "element"},
    "head": {"adapt": "*.weight"},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", [sinusoid, classifier])
def test_nothing_waits_for_the_device(build, options, steps, gpu):
    maml = learner(build, gpu, steps=steps, **options)
    data = tasks(build, gpu, padded=build is classifier)

    def calls():
        maml.backward(*data)
        maml.loss(*data).backward()
        maml(*data[:3]).square().mean().backward()
        with torch.no_grad():
            maml.adapt(*data[:2])(data[2])

    calls()
    with no_waiting():
        calls()
    assert maml.plan().strategy == "vmap"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", [sinusoid, classifier, conv_bn])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_numbers_of_the_cpu(build, options, padded, device):
    found = {}
    for place in (torch.device("cpu"), device):
        maml = learner(build, place, torch.float64, steps=3, **options)
        value = maml.backward(*tasks(build, place, torch.float64, padded=padded))
        found[place] = {**gradients(maml), "loss": value.cpu()}
    close(found[device], found[torch.device("cpu")], 1e-9)


def test_batch_norm_looks_once(gpu):
    """One look tells whether supports or queries are padded."""
    maml = learner(conv_bn, gpu)
    data = tasks(conv_bn, gpu)
    maml.backward(*data)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        maml.backward(*data)
