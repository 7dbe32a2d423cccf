"""The CUDA kernels of segment_mean, emulated, against row loops in float64."""

from __future__ import annotations

import pytest
import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# T, S, C, D: one of each, odd sizes, several features a thread, steps of 512 labels crossed,
# slices of 512 features crossed, empty ones.
SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 25, 5, 64),
    (1, 513, 2, 3),
    (1, 1100, 3, 4),
    (1, 5, 2, 516),
    (2, 6, 2, 131),
    (2, 0, 3, 4),
    (2, 3, 4, 0),
]


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(T: int, S: int, C: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows: some labels are padding (-100), or C; the last class stays empty."""
    generator = torch.Generator().manual_seed(T * 7 + S * 5 + C * 3 + D)
    values = torch.randn(T, S, D, generator=generator).to(dtype)
    labels = torch.randint(0, max(C - 1, 1), (T, S), generator=generator)
    outside = torch.rand(T, S, generator=generator)
    labels[outside < 0.1] = -100
    labels[outside > 0.95] = C
    return values, labels


def define(values: torch.Tensor, labels: torch.Tensor, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, row by row, in the dtype of ``values``."""
    T, S, D = values.shape
    total, count = values.new_zeros(T, C, D) + 0 * values.sum(), values.new_zeros(T, C)
    for t in range(T):
        for i in range(S):
            c = int(labels[t, i])
            if 0 <= c < C:
                total[t, c] += values[t, i]
                count[t, c] += 1
    return total / count.clamp(min=1).unsqueeze(-1), count


def run_mean(emulation, values, labels, C, dtype, offset=0):
    T, S, D = values.shape
    mean = emulation.output(T, C, D, dtype=values.dtype, offset=offset)
    count = emulation.output(T, C, dtype=acc_of(values.dtype))
    inputs = emulation.input(values, offset), emulation.input(labels)
    addresses = [a.address for a in (*inputs, mean, count)]
    emulation.module.segment_mean(dtype, T, S, C, D, *addresses)
    return mean.read(), count.read()


def run_backward(emulation, grad, labels, count, dtype, offset=0):
    (T, C, D), S = grad.shape, labels.shape[1]
    out = emulation.output(T, S, D, dtype=grad.dtype, offset=offset)
    inputs = emulation.input(grad, offset), emulation.input(labels), emulation.input(count)
    addresses = [a.address for a in (*inputs, out)]
    emulation.module.segment_mean_backward(dtype, T, S, C, D, *addresses)
    return out.read()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_and_gradient_match_the_definition(emulation, shape, dtype):
    T, _, C, D = shape
    values, labels = make(*shape, DTYPES[dtype])
    mean, count = run_mean(emulation, values, labels, C, dtype)

    wide = values.double().requires_grad_()
    truth, truth_count = define(wide, labels, C)
    peer, _ = define(values.to(acc_of(values.dtype)), labels, C)
    assert torch.equal(count.double(), truth_count)
    emulation.check(mean, truth.detach(), peer)
    assert (mean[count == 0] == 0).all()

    grad = torch.randn(T, C, D, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    (truth_grad,) = torch.autograd.grad(truth, wide, grad.double(), materialize_grads=True)
    got = run_backward(emulation, grad, labels, count, dtype)
    emulation.check(got, truth_grad, truth_grad)
    assert (got[(labels < 0) | (labels >= C)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_off_a_16_byte_boundary_are_read_one_by_one(emulation, dtype):
    values, labels = make(2, 9, 3, 8, DTYPES[dtype])
    aligned, count = run_mean(emulation, values, labels, 3, dtype)
    shifted, _ = run_mean(emulation, values, labels, 3, dtype, offset=1)
    assert torch.equal(aligned, shifted)
    assert torch.equal(
        run_backward(emulation, aligned, labels, count, dtype),
        run_backward(emulation, aligned, labels, count, dtype, offset=1),
    )


def test_thread_order_and_grid_size_leave_the_bits_alone(emulation):
    values, labels = make(2, 40, 4, 12, torch.float32)
    first = run_mean(emulation, values, labels, 4, "float32")
    grad = run_backward(emulation, first[0], labels, first[1], "float32")
    schedules = [("random", 1, 2**31 - 1), ("random", 2, 3), ("forward", 0, 1), ("reverse", 0, 2)]
    for order, seed, max_grid in schedules:
        emulation.schedule(seed, order, max_grid)
        again = run_mean(emulation, values, labels, 4, "float32")
        assert all(map(torch.equal, first, again))
        assert torch.equal(grad, run_backward(emulation, first[0], labels, first[1], "float32"))


def test_no_class_and_no_task_launch_nothing(emulation):
    run_mean(emulation, *make(2, 3, 0, 4, torch.float32), 0, "float32")
    run_mean(emulation, torch.empty(0, 3, 4), torch.empty(0, 3, dtype=torch.long), 2, "float32")
    assert emulation.launches() == []


def test_a_large_class_loses_no_digits(emulation):
    values = torch.full((1, 10_000, 1), 0.1)
    labels = torch.zeros(1, 10_000, dtype=torch.long)
    mean, count = run_mean(emulation, values, labels, 1, "float32")
    assert count.item() == 10_000
    torch.testing.assert_close(mean.double(), values[:, :1].double(), rtol=1e-5, atol=0)
