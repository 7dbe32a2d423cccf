"""The CUDA kernels of sgd_update, emulated, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ["own", "shared", "per_task", "one"]


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(layout: str, T: int, N: int) -> tuple[int, ...]:
    return {"own": (T, N), "shared": (1, N), "per_task": (T, 1), "one": (1, 1)}[layout]


def strides_of(layout: str, N: int) -> tuple[int, int]:
    return {"own": (N, 1), "shared": (0, 1), "per_task": (1, 0), "one": (0, 0)}[layout]


class Tensors:
    """One entry of the list: random operands of the wanted layouts."""

    def __init__(self, T, N, param, grad, lr, dtype, seed, offset=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(layout, kind):
            return torch.randn(shape_of(layout, T, N), generator=generator).to(kind)

        self.T, self.N, self.offset = T, N, offset
        self.layouts = {"param": param, "grad": grad, "lr": lr, "grad_out": "own"}
        self.param, self.grad = draw(param, dtype), draw(grad, dtype)
        self.lr = draw(lr, acc_of(dtype))
        self.grad_out = draw("own", dtype)

    def wide(self, *names: str) -> list[torch.Tensor]:
        return [getattr(self, name).double() for name in names]

    def operand(self, emulation, name, keep):
        array = emulation.input(getattr(self, name), self.offset)
        keep.append(array)
        return (array.address, *strides_of(self.layouts[name], self.N))


def run_forward(emulation, dtype, entries):
    keep, outs, rows = [], [], []
    for e in entries:
        outs.append(emulation.output(e.T, e.N, dtype=DTYPES[dtype], offset=e.offset))
        operands = [e.operand(emulation, name, keep) for name in ("param", "grad", "lr")]
        rows.append((e.T, e.N, *operands, outs[-1].address))
    emulation.module.sgd(dtype, rows)
    return [out.read() for out in outs]


def run_backward(emulation, dtype, entries, wanted=("grad_grad", "grad_lr")):
    keep, results, rows = [], [], []
    for e in entries:
        grad_grad = emulation.output(e.T, e.N, dtype=DTYPES[dtype], offset=e.offset)
        grad_lr = emulation.output(*e.lr.shape, dtype=acc_of(DTYPES[dtype]))
        operands = [e.operand(emulation, name, keep) for name in ("grad_out", "grad", "lr")]
        rows.append(
            (
                e.T,
                e.N,
                *operands,
                grad_grad.address if "grad_grad" in wanted else 0,
                grad_lr.address if "grad_lr" in wanted else 0,
            )
        )
        results.append((grad_grad, grad_lr))
    emulation.module.sgd_backward(dtype, rows)
    return [(a.read(), b.read()) for a, b in results]


def check_forward(emulation, e, out):
    param, grad, lr = e.wide("param", "grad", "lr")
    truth = (param - lr * grad).expand(e.T, e.N)
    acc = acc_of(out.dtype)
    peer = (e.param.to(acc) - e.lr * e.grad.to(acc)).expand(e.T, e.N)
    emulation.check(out, truth, peer)


def check_backward(emulation, e, grad_grad, grad_lr):
    grad_out, grad, lr = e.wide("grad_out", "grad", "lr")
    acc = acc_of(e.grad.dtype)
    truth = -lr * grad_out
    emulation.check(grad_grad, truth, -e.lr * e.grad_out.to(acc))
    truth = (-grad_out * grad).sum_to_size(e.lr.shape)
    peer = (-e.grad_out.to(acc) * e.grad.to(acc)).sum_to_size(e.lr.shape)
    magnitude = (grad_out * grad).abs().sum_to_size(e.lr.shape).max().item()
    emulation.check(grad_lr, truth, peer, magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", LAYOUTS)
def test_every_layout_matches_the_definition(emulation, lr, dtype):
    entries = [
        Tensors(T, N, param, grad, lr, DTYPES[dtype], seed)
        for seed, (T, N, param, grad) in enumerate(
            [
                (1, 1, "own", "own"),
                (3, 5, "shared", "own"),
                (2, 64, "own", "own"),
                (4, 36, "own", "shared"),
                (2, 1030, "shared", "own"),
                (1, 4100, "own", "own"),
            ]
        )
    ]
    for e, out in zip(entries, run_forward(emulation, dtype, entries), strict=True):
        check_forward(emulation, e, out)
    for e, grads in zip(entries, run_backward(emulation, dtype, entries), strict=True):
        check_backward(emulation, e, *grads)


@pytest.mark.parametrize("lr", ["per_task", "one"])
@pytest.mark.parametrize("N", [16384 + 4, 33001])
def test_long_sums_of_the_learning_rate_gradient(emulation, lr, N):
    e = Tensors(2, N, "own", "own", lr, torch.float32, 3)
    ((grad_grad, grad_lr),) = run_backward(emulation, "float32", [e])
    check_backward(emulation, e, grad_grad, grad_lr)


def test_more_tensors_than_a_launch_holds(emulation):
    entries = [
        Tensors(2, 3 + k % 6, "shared", "own", LAYOUTS[k % 4], torch.float32, k) for k in range(150)
    ]
    for e, out in zip(entries, run_forward(emulation, "float32", entries), strict=True):
        check_forward(emulation, e, out)
    launches = emulation.launches()
    assert 2 <= len(launches) <= 4
    for e, grads in zip(entries, run_backward(emulation, "float32", entries), strict=True):
        check_backward(emulation, e, *grads)


def test_long_sums_of_many_tensors_are_finished_after_all_are_taken(emulation):
    # The list of sums is shorter than that of totals: a total must not start before its sums.
    entries = [Tensors(1, 16385, "own", "own", "one", torch.float32, k) for k in range(125)]
    for e, grads in zip(entries, run_backward(emulation, "float32", entries), strict=True):
        check_backward(emulation, e, *grads)


@pytest.mark.parametrize("wanted", [("grad_grad",), ("grad_lr",)])
@pytest.mark.parametrize("lr", LAYOUTS)
def test_a_gradient_that_is_not_wanted_is_not_written(emulation, lr, wanted):
    e = Tensors(2, 12, "own", "own", lr, torch.float32, 5)
    (both,) = run_backward(emulation, "float32", [e])
    (one,) = run_backward(emulation, "float32", [e], wanted)
    for name, full, alone in zip(("grad_grad", "grad_lr"), both, one, strict=True):
        assert torch.equal(full, alone) if name in wanted else alone.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_off_a_16_byte_boundary(emulation, dtype):
    entries = [Tensors(3, 8, "shared", "own", lr, DTYPES[dtype], 1, offset=1) for lr in LAYOUTS]
    for e, out in zip(entries, run_forward(emulation, dtype, entries), strict=True):
        check_forward(emulation, e, out)
    for e, grads in zip(entries, run_backward(emulation, dtype, entries), strict=True):
        check_backward(emulation, e, *grads)


def test_empty_tensors_have_gradient_zero(emulation):
    entries = [
        Tensors(T, N, "own", "own", lr, torch.float32, 0)
        for T, N in ((0, 3), (2, 0), (0, 0))
        for lr in LAYOUTS
    ]
    run_forward(emulation, "float32", entries)
    assert emulation.launches() == []
    for e, (grad_grad, grad_lr) in zip(
        entries, run_backward(emulation, "float32", entries), strict=True
    ):
        assert grad_grad.shape == (e.T, e.N)
        assert (grad_lr == 0).all()


def test_thread_order_and_grid_size_leave_the_bits_alone(emulation):
    entries = [
        Tensors(3, 700 + k, "shared", "own", lr, torch.float32, k) for k, lr in enumerate(LAYOUTS)
    ] + [Tensors(1, 20000, "own", "own", "one", torch.float32, 9)]
    first = run_forward(emulation, "float32", entries), run_backward(emulation, "float32", entries)
    schedules = [("random", 1, 2**31 - 1), ("random", 2, 3), ("forward", 0, 1), ("reverse", 0, 2)]
    for order, seed, max_grid in schedules:
        emulation.schedule(seed, order, max_grid)
        assert all(map(torch.equal, first[0], run_forward(emulation, "float32", entries)))
        for one, other in zip(first[1], run_backward(emulation, "float32", entries), strict=True):
            assert all(map(torch.equal, one, other))


def test_strides_that_no_layout_has_are_refused(emulation):
    array = emulation.input(torch.zeros(4, 4))
    bad = (array.address, 8, 1)
    good = (array.address, 4, 1)
    with pytest.raises(RuntimeError, match=r"strides of grad are \(8, 1\)"):
        emulation.module.sgd("float32", [(4, 4, good, bad, good, array.address)])
