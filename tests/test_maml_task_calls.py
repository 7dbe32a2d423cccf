"""Layers of a mapped model run on the ops for weights of each task, and give the same numbers."""

import pytest
import torch
from mamlcases import agree, batch, meta_gradients, unroll
from torch import nn

from fastmeta import _native, _task_calls
from fastmeta.maml import MAML

LAYERS = {
    "plain": lambda: nn.Conv2d(2, 4, 3),
    "strided": lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(2, 4, 2, dilation=2, bias=False),
    "groups": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "same": lambda: nn.Conv2d(2, 4, 3, padding="same"),
    "same dilated": lambda: nn.Conv2d(2, 4, (3, 2), padding="same", dilation=(1, 2)),
    "uneven": lambda: nn.Conv2d(2, 4, 2, padding="same"),
    "valid": lambda: nn.Conv2d(2, 4, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
}
LEFT_TO_TORCH = {"uneven"}


def model_of(name):
    torch.manual_seed(0)
    layers = LAYERS[name](), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    model = nn.Sequential(*layers).double()
    model(torch.zeros(2, 2, 6, 6).double())
    return model


@pytest.fixture
def taken(monkeypatch):
    """Names of the ops that were taken."""
    seen = []
    for name in ("_conv", "norm"):
        call = getattr(_task_calls, name)
        monkeypatch.setattr(
            _task_calls, name, lambda *a, call=call, name=name: (seen.append(name), call(*a))[1]
        )
    return seen


@pytest.mark.parametrize("name", list(LAYERS))
def test_convolutions_agree_with_unrolling(name, taken):
    model, data = model_of(name), batch((2, 6, 6))
    found = meta_gradients(MAML(model, 0.2, 2, strategy="vmap"), data)
    agree(found, unroll(model, data, lr=0.2, steps=2))
    if _native.cpu_module is not None:
        assert ("_conv" in taken) == (name not in LEFT_TO_TORCH)
        assert "norm" in taken


def test_a_layer_that_the_tasks_share_is_left_to_torch(taken):
    model, data = model_of("plain"), batch((2, 6, 6))
    meta_gradients(MAML(model, 0.2, 2, strategy="vmap", adapt="4"), data)
    assert "_conv" not in taken


def test_low_precision_and_autocast_are_left_to_torch(taken):
    data = [d.bfloat16() if d.is_floating_point() else d for d in batch((2, 6, 6))]
    meta_gradients(MAML(model_of("plain").bfloat16(), 0.1, 2, strategy="vmap"), data)
    data = [d.float() if d.is_floating_point() else d for d in data]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MAML(model_of("plain").float(), 0.1, 2, strategy="vmap")(*data[:3])
    assert not taken


def test_errors_are_torchs_own():
    model, data = model_of("plain"), batch((2, 6, 6))
    with pytest.raises(RuntimeError, match=r"(?i)expected.*channels|kernel size can't be greater"):
        MAML(model, 0.1, 1, strategy="vmap")(data[0][..., :2, :2], data[1], data[2])
    alone = [d[:, :1] for d in batch((2, 3, 3))]
    single = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        MAML(single.double(), 0.1, 1, strategy="vmap")(*alone[:3])
