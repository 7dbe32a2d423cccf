"""The CUDA kernels of task_conv2d, emulated, against one convolution for each task in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.cases import DTYPES, acc_of

# T, N, C, (H, W), O, (kh, kw), stride, padding, dilation, groups
CASES = {
    "one": (1, 1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "conv4": (2, 3, 5, (8, 8), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": (2, 3, 4, (7, 7), 6, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "pairs": (2, 2, 2, (8, 9), 3, (2, 3), (2, 3), (0, 2), (3, 1), 1),
    "dilated": (1, 2, 2, (9, 9), 4, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "groups": (2, 2, 6, (5, 6), 9, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": (1, 2, 4, (6, 6), 4, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    "pointwise": (2, 3, 9, (4, 4), 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "unused_border": (1, 2, 2, (8, 8), 3, (2, 2), (3, 3), (0, 0), (1, 1), 1),
    "wide_padding": (1, 2, 2, (3, 3), 3, (2, 2), (1, 1), (3, 3), (1, 1), 1),
    "parts": (1, 10, 3, (8, 8), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),  # of the sum over positions
    "no_rows": (2, 0, 3, (4, 4), 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no_tasks": (0, 2, 3, (4, 4), 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}
# More than a tile of channels, outputs and positions, and a depth of several chunks.
TILES = (1, 2, 66, (7, 7), 68, (2, 2), (1, 1), (1, 1), (1, 1), 1)
ORDERS = ("forward", "input", "weight")


def make(case, dtype):
    """x, weight, bias, grad."""
    tasks, rows, channels, size, outputs, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(channels + outputs)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    return {
        "x": normal(tasks, rows, channels, *size),
        "weight": normal(tasks, outputs, channels // groups, *kernel),
        "bias": normal(tasks, outputs),
        "grad": normal(tasks, rows, outputs, *out),
    }


def define(case, tensors, dtype):
    """Output and gradients by torch's convolution of each task."""
    x, weight, bias, grad = (t.to(dtype).requires_grad_() for t in tensors.values())
    geometry = case[6:]
    outputs = [F.conv2d(*own, *geometry) for own in zip(x, weight, bias, strict=True)]
    out = torch.stack(outputs) if outputs else torch.zeros_like(grad) + 0 * (x.sum() + weight.sum())
    grads = torch.autograd.grad(out, (x, weight), grad, materialize_grads=True)
    return dict(zip(ORDERS, (out.detach(), *grads), strict=True))


def run(emulation, dtype, case, tensors, *, offset=0, allow_tf32=False, shared=()):
    """What the three kernels write, by order; ``shared`` tensors are one for all tasks."""
    tasks, rows, channels, size, outputs, kernel, *geometry, groups = case
    sizes = [tasks, rows, channels, *size, outputs, *kernel, *tensors["grad"].shape[3:]]
    sizes += [value for pair in geometry for value in pair] + [groups]
    takes = {"forward": ("x", "weight", "bias"), "input": ("grad", "weight")}
    takes["weight"] = ("grad", "x")
    results = {}
    for order, likes in zip(ORDERS, ("grad", "x", "weight"), strict=True):
        arrays = {name: emulation.input(tensors[name], offset) for name in takes[order]}
        given = {
            name: (array.address, 0 if name in shared else tensors[name][:1].numel())
            for name, array in arrays.items()
        }
        out = emulation.output(*tensors[likes].shape, dtype=DTYPES[dtype], offset=offset)
        emulation.module.task_conv2d(order, dtype, sizes, given, out.address, allow_tf32)
        results[order] = out.read()
    return results


def check(emulation, got, case, tensors):
    truth = define(case, tensors, torch.float64)
    peer = define(case, tensors, acc_of(tensors["x"].dtype))
    for order, value in got.items():
        emulation.check(value, truth[order], peer[order], what=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(emulation, name, dtype):
    tensors = make(CASES[name], DTYPES[dtype])
    check(emulation, run(emulation, dtype, CASES[name], tensors), CASES[name], tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_than_a_tile(emulation, dtype):
    tensors = make(TILES, DTYPES[dtype])
    check(emulation, run(emulation, dtype, TILES, tensors), TILES, tensors)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["conv4", "pointwise"])
def test_tensors_off_a_16_byte_boundary_are_read_one_by_one(emulation, name, dtype):
    tensors = make(CASES[name], DTYPES[dtype])
    aligned = run(emulation, dtype, CASES[name], tensors)
    shifted = run(emulation, dtype, CASES[name], tensors, offset=1)
    assert all(map(torch.equal, aligned.values(), shifted.values()))


def test_tensors_that_the_tasks_share(emulation):
    case = CASES["conv4"]
    tensors = make(case, torch.float32)
    for name in ("x", "weight"):
        tensors[name] = tensors[name][:1].expand_as(tensors[name]).contiguous()
    shared = run(emulation, "float32", case, tensors, shared=("x", "weight"))
    check(emulation, shared, case, tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_tensor_cores(emulation, dtype):
    case = CASES["strided"]
    tensors = make(case, DTYPES[dtype])
    emulation.module.tensor_cores(False)
    check(emulation, run(emulation, dtype, case, tensors), case, tensors)


def test_tf32_only_where_it_is_allowed(emulation):
    case = CASES["conv4"]
    tensors = make(case, torch.float32)
    truth = define(case, tensors, torch.float64)
    exact, rounded = (
        run(emulation, "float32", case, tensors, allow_tf32=allowed) for allowed in (False, True)
    )
    for order, wanted in truth.items():
        assert (exact[order] - wanted).abs().max() < 2e-5, order
        assert 1e-4 < (rounded[order] - wanted).abs().max() < 192 * 2**-9, order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, dtype):
    case = CASES["parts"]
    tensors = make(case, DTYPES[dtype])
    first = run(emulation, dtype, case, tensors)
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("random", 2, 3), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        again = run(emulation, dtype, case, tensors)
        assert all(map(torch.equal, first.values(), again.values()))


def test_an_image_beyond_32_bits_is_refused(emulation):
    sizes = [1, 1, 1, 1, 2**30, 1, 1, 1, 1, 2**30, 1, 1, 0, 0, 1, 1, 1]
    for order in ORDERS:
        with pytest.raises(RuntimeError, match="must be below 2\\^30, got 1073741824"):
            emulation.module.task_conv2d(order, "float32", sizes, {}, 0, False)
    assert emulation.launches() == []
