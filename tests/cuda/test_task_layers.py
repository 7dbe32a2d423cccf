"""The layers with weights for each task on a device, against one layer for each task."""

import pytest
import torch
from opcases import error
from ops import test_task_batch_norm as norm
from ops import test_task_conv2d as conv
from ops import test_task_linear as linear

import fastmeta as fm

LOW = [torch.float32, torch.bfloat16, torch.float16]
TASK_OPS = (
    "task_linear",
    "task_conv2d",
    "task_conv2d_input",
    "task_conv2d_weight",
    "task_batch_norm",
    "task_batch_norm_backward",
    "task_batch_norm_second",
)


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


@pytest.fixture
def exact_convolutions():
    """torch rounds the factors of float32 convolutions to TF32 by default, and so do the kernels."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", conv.CASES)
def test_conv2d_to_second_order(name, device):
    tensors, geometry = conv.make(name)
    found = conv.derivatives(fm.task_conv2d, on(device, tensors), geometry)
    check(found, conv.derivatives(conv.definition, tensors, geometry))


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["conv4", "groups", "crosses_blocks"])
def test_conv2d_in_low_precision(name, dtype, device):
    tensors, geometry = conv.make(name, dtype)
    found = conv.derivatives(fm.task_conv2d, on(device, tensors), geometry)[:4]
    truth = conv.derivatives(conv.definition, [t.double() for t in tensors], geometry)[:4]
    theirs = conv.derivatives(conv.definition, on(device, tensors), geometry)[:4]
    check(found, truth, theirs)


def test_conv2d_rounds_to_tf32_only_where_torch_allows_it(gpu):
    tensors, geometry = conv.make("crosses_blocks", torch.float32)
    truth = conv.definition(*(t.double() for t in tensors), *geometry)
    before, errors = torch.backends.cudnn.allow_tf32, {}
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            errors[allowed] = error(fm.task_conv2d(*on(gpu, tensors), *geometry).cpu(), truth)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert errors[False] < 1e-4
    assert errors[True] < 0.2
    if torch.cuda.get_device_capability()[0] >= 8:
        assert errors[True] > errors[False]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", norm.SHAPES, ids=str)
def test_batch_norm_to_second_order(shape, affine, device):
    tensors = norm.make(shape, affine=affine)
    found = norm.derivatives(fm.task_batch_norm, on(device, tensors))
    check(found, norm.derivatives(norm.definition, tensors))


@pytest.mark.parametrize("shape", [(3, 40, 4, 6, 6), (2, 75, 37)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_batch_norm_in_low_precision(dtype, shape, device):
    tensors = norm.make(shape, dtype)
    found = norm.derivatives(fm.task_batch_norm, on(device, tensors))[:4]
    truth = norm.derivatives(norm.definition, [t.double() for t in tensors])[:4]
    check(found, truth, norm.derivatives(norm.definition, on(device, tensors))[:4])
