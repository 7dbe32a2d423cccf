"""The CUDA kernel of task_linear, emulated, against one product for each task in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation.cases import DTYPES, acc_of

# T, N, I, O: one of each, odd sizes, packs of four, tiles and chunks crossed, a depth that is
# split into parts (from 512 on), empty ones.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (2, 8, 20, 12),
    (1, 67, 37, 70),
    (2, 3, 1000, 5),
    (1, 2, 516, 8),
    (2, 3, 0, 4),
    (2, 0, 3, 4),
    (0, 2, 3, 4),
]
LAYOUTS = ["rows", "columns", "shared"]


def make(T: int, N: int, I: int, O: int, dtype: torch.dtype) -> list[torch.Tensor]:  # noqa: E741
    generator = torch.Generator().manual_seed(T * 7 + N * 5 + I * 3 + O)
    shapes = [(T, N, I), (T, O, I), (T, O)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def place(emulation, value, layout="rows", offset=0):
    """The array of a matrix a task in a memory layout, and its address and strides."""
    if layout == "columns":  # as weight.mT in the backward
        value = value.mT.contiguous().mT
    elif layout == "shared":  # by all tasks
        value = value[:1].expand_as(value)
    task, row, column = value.stride()
    stored = value.mT if layout == "columns" else value[:1] if layout == "shared" else value
    array = emulation.input(stored, offset)
    return array, (array.address, task, row, column)


def run(emulation, dtype, x, weight, bias, layouts=("rows", "rows"), offset=0, allow_tf32=False):
    (T, N, I), O = x.shape, weight.shape[1]  # noqa: E741
    own_x, x_at = place(emulation, x, layouts[0], offset)
    own_weight, weight_at = place(emulation, weight, layouts[1], offset)
    own_bias = None if bias is None else emulation.input(bias, offset)
    bias_at = (0, 0, 0, 0) if bias is None else (own_bias.address, O, 0, 1)
    out = emulation.output(T, N, O, dtype=x.dtype, offset=offset)
    arguments = (x_at, weight_at, bias_at, out.address, allow_tf32)
    emulation.module.task_linear(dtype, T, N, I, O, *arguments)
    del own_x, own_weight, own_bias
    return out.read()


def define(x, weight, bias, dtype):
    out = x.to(dtype) @ weight.to(dtype).mT
    return out if bias is None else out + bias.to(dtype).unsqueeze(1)


def check(emulation, got, *tensors):
    acc = acc_of(got.dtype)
    emulation.check(got, define(*tensors, torch.float64), define(*tensors, acc))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(emulation, shape, dtype):
    x, weight, bias = make(*shape, DTYPES[dtype])
    check(emulation, run(emulation, dtype, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b], ids=str)
def test_strides_and_rows_off_a_16_byte_boundary(emulation, layouts, dtype):
    x, weight, bias = make(2, 8, 36, 12, DTYPES[dtype])
    x, weight = (
        value[:1].expand_as(value) if layout == "shared" else value
        for value, layout in zip((x, weight), layouts, strict=True)
    )
    plain = run(emulation, dtype, x, weight, bias)
    assert torch.equal(run(emulation, dtype, x, weight, bias, layouts), plain)
    assert torch.equal(run(emulation, dtype, x, weight, bias, layouts, offset=1), plain)
    check(emulation, plain, x, weight, bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_tensor_cores(emulation, dtype):
    x, weight, _ = make(2, 5, 35, 6, DTYPES[dtype])
    emulation.module.tensor_cores(False)
    check(emulation, run(emulation, dtype, x, weight, None), x, weight, None)


def test_tf32_only_where_it_is_allowed(emulation):
    x, weight, bias = make(1, 20, 35, 9, torch.float32)
    truth = define(x, weight, bias, torch.float64)
    exact, rounded = (
        (run(emulation, "float32", x, weight, bias, allow_tf32=allowed) - truth).abs().max()
        for allowed in (False, True)
    )
    assert exact < 1e-5
    assert 1e-4 < rounded < 35 * 2**-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, dtype):
    given = make(2, 20, 530, 67, DTYPES[dtype])
    first = run(emulation, dtype, *given)
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("random", 2, 3), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        assert torch.equal(first, run(emulation, dtype, *given))


def test_nothing_is_launched_for_no_outputs(emulation):
    for shape in [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 4, 0)]:
        run(emulation, "float32", *make(*shape, torch.float32))
    assert emulation.launches() == []
