"""The layers with weights for each task on a device, against one layer for each task."""

import pytest
import torch
from opcases import error
from ops import test_task_linear as linear

import fastmeta as fm

LOW = [torch.float32, torch.bfloat16, torch.float16]
TASK_OPS = ("task_linear",)


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def test_every_op_has_its_kernel(device):
    ops = fm.backend_info()["ops"]
    assert {op: ops[op][device.type] for op in TASK_OPS} == dict.fromkeys(TASK_OPS, "native")


def check(found, truth, theirs=None, tolerance=1e-11):
    """Within ``tolerance``, or in low precision within twice the error of torch's own layers."""
    for i, (value, wanted) in enumerate(zip(found, truth, strict=True)):
        size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        allowed = tolerance * size
        if theirs is not None:
            allowed = 2 * error(theirs[i].cpu(), wanted)
            allowed += 4 * torch.finfo(value.dtype).eps * wanted.abs().max().item()
        assert error(value.cpu(), wanted) <= allowed, i


@pytest.mark.parametrize("sizes", linear.SIZES, ids=str)
def test_linear_to_second_order(sizes, device):
    tensors = linear.make(sizes)
    found = linear.derivatives(fm.task_linear, on(device, tensors))
    check(found, linear.derivatives(linear.definition, tensors))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_linear_in_low_precision(dtype, device):
    tensors = linear.make((3, 40, 600, 33), dtype)
    found = linear.derivatives(fm.task_linear, on(device, tensors))[:4]
    truth = linear.derivatives(linear.definition, [t.double() for t in tensors])[:4]
    check(found, truth, linear.derivatives(linear.definition, on(device, tensors))[:4])
