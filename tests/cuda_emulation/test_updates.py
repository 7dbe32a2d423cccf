"""The CUDA kernels of the updates, emulated, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation.updates import (
    DTYPES,
    LAYOUTS,
    OPS,
    Entry,
    check,
    run_backward,
    run_forward,
)

BOTH = (run_forward, run_backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_every_layout_matches_the_definition(emulation, op, lr, dtype):
    state = OPS[op].states[-1:]
    check(
        emulation,
        [
            Entry(op, *shape, lr, DTYPES[dtype], seed, **layouts)
            for seed, (shape, layouts) in enumerate(
                [
                    ((1, 1), {}),
                    ((3, 5), {"param": "shared"}),
                    ((2, 64), {"grad_out": "one"}),
                    ((4, 36), {"grad": "shared", **dict.fromkeys(state, "one")}),
                    ((2, 1028), {"param": "shared", "grad_out": "per_task"}),
                    ((1, 2053), dict.fromkeys(state, "per_task")),
                ]
            )
        ],
    )


@pytest.mark.parametrize("shape", [(1, 8193), (2, 8192 + 4), (3, 16385)], ids=str)
@pytest.mark.parametrize("lr", ["per_task", "one"])
@pytest.mark.parametrize("op", OPS)
def test_sums_of_the_rate_gradient_over_many_elements(emulation, op, lr, shape):
    check(emulation, [Entry(op, *shape, lr, torch.float32, 3)])


@pytest.mark.parametrize("shape", [(64, 5), (65, 8), (65, 258), (130, 36)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sums_of_the_rate_gradient_over_many_tasks(emulation, op, shape):
    check(emulation, [Entry(op, *shape, "shared", torch.float32, 4)])


@pytest.mark.parametrize("op", OPS)
def test_more_tensors_than_a_launch_holds(emulation, op):
    entries = [
        Entry(op, 2, 3 + k % 6, LAYOUTS[k % 4], torch.float32, k, param="shared") for k in range(70)
    ]
    check(emulation, entries)
    names = [launch.what for launch in emulation.launches()]
    assert 2 <= names.count(f"{op}_update") <= 3
    assert 2 <= names.count(f"{op}_update_backward") <= 4


def test_long_sums_of_many_tensors_are_finished_after_all_are_taken(emulation):
    # The list of totals is longer than that of sums: a total must not start before its sums.
    check(emulation, [Entry("sgd", 1, 8193, "one", torch.float32, k) for k in range(45)])
    names = [launch.what for launch in emulation.launches()]
    assert names[-2:] == ["sgd_update_backward", "sgd_update_backward: totals"]
    assert names.count("sgd_update_backward") == 2


@pytest.mark.parametrize("lr", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_the_rate_gradient_that_is_not_wanted_costs_nothing(emulation, op, lr):
    entries = [Entry(op, 2, 12, lr, torch.float32, 5)]
    (with_lr,) = run_backward(emulation, entries)
    unread = {"momentum": ("grad", "buffer"), "sgd": ("grad",), "adam": ()}[op]
    for name in unread:
        entries[0].values[name].fill_(torch.nan)
    (without,) = run_backward(emulation, entries, with_lr=False)
    assert without.pop("to lr").isnan().all()
    for name, value in without.items():
        assert torch.equal(value, with_lr[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_tensors_off_a_16_byte_boundary(emulation, op, dtype):
    entries = [
        Entry(op, 3, 8, lr, DTYPES[dtype], 1, offset=1, param="shared") for lr in LAYOUTS
    ] + [Entry(op, 3, 7, "one", DTYPES[dtype], 2, offset=k) for k in (0, 2)]
    check(emulation, entries)


@pytest.mark.parametrize("op", OPS)
def test_empty_tensors_have_gradient_zero(emulation, op):
    entries = [
        Entry(op, T, N, lr, torch.float32) for T, N in ((0, 3), (2, 0), (0, 0)) for lr in LAYOUTS
    ]
    run_forward(emulation, entries)
    assert emulation.launches() == []
    for got in run_backward(emulation, entries):
        assert (got["to lr"] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, op):
    entries = [
        Entry(op, 3, 700 + k, lr, torch.float32, k, param="shared") for k, lr in enumerate(LAYOUTS)
    ] + [Entry(op, 1, 9001, "one", torch.float32, 9), Entry(op, 70, 40, "shared", torch.float32, 8)]
    first = [run(emulation, entries) for run in BOTH]
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("random", 2, 3), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        for run, before in zip(BOTH, first, strict=True):
            for one, other in zip(before, run(emulation, entries), strict=True):
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_adam_leaves_out_the_derivative_of_a_root_that_is_0(emulation):
    e = Entry("adam", 2, 6, "one", torch.float32)
    for name in ("grad", "mean", "square"):
        e.values[name][:, ::2] = 0
    beta1, beta2, eps, _, mean_scale, square_scale = e.op.numbers
    keep = []
    outs = e.results(emulation, "grad", ("grad", "mean", "square"))
    operands = [e.operand(emulation, name, keep) for name in e.op.backward_operands]
    row = (e.T, e.N, operands, e.operand(emulation, "lr", keep), [o.address for o in outs], 0)
    numbers = (beta1, beta2, eps, 0.0, mean_scale, square_scale)
    emulation.module.adam_backward("float32", [row], list(numbers))
    to_grad, to_mean, to_square = (out.read()[:, ::2].double() for out in outs)
    wide = {name: e.values[name].double() for name in (*e.op.cotangents, "lr")}
    to_new_mean = wide["grad_out_mean"] - wide["lr"] * wide["grad_out"] * mean_scale / eps
    for got, wanted in (
        (to_grad, (1 - beta1) * to_new_mean),
        (to_mean, beta1 * to_new_mean),
        (to_square, beta2 * wide["grad_out_square"]),
    ):
        torch.testing.assert_close(got, wanted[:, ::2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_strides_that_no_layout_has_are_refused(emulation, op):
    array = emulation.input(torch.zeros(4, 4))
    good, bad = (array.address, 4, 1), (array.address, 8, 1)
    operands = [bad if name == "grad" else good for name in OPS[op].operands]
    results = [array.address] * (1 + len(OPS[op].states))
    row = (4, 4, operands, good, results, 0)
    with pytest.raises(RuntimeError, match=rf"{op}_update: strides of grad are \(8, 1\)"):
        getattr(emulation.module, op)("float32", [row], list(OPS[op].numbers))
