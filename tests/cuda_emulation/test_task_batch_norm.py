"""The CUDA kernels of task_batch_norm, emulated, against the formula in float64 under autograd."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation.cases import DTYPES, acc_of

# T, N, C, L: one of each; no positions, where channels lie side by side, odd, of more than a warp,
# of more rows than warps; positions, odd and in packs of four, fewer and more than a block has
# threads; empty ones.
SHAPES = [
    (1, 1, 1, 1),
    (2, 19, 37, 1),
    (2, 3, 5, 7),
    (2, 5, 3, 12),
    (1, 3, 2, 1100),
    (2, 0, 3, 4),
    (2, 3, 4, 0),
    (0, 3, 4, 2),
    (2, 3, 0, 4),
]
EPS = 1e-5


def make(T, N, C, L, dtype, *, affine=True):
    """The tensors that the ops take, by name."""
    generator = torch.Generator().manual_seed(T * 7 + N * 5 + C * 3 + L)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"x": normal(T, N, C, L) * 2 + 1, "grad": normal(T, N, C, L), "u": normal(T, N, C, L)}
    tensors |= {"v": normal(T, C), "z": normal(T, C)}
    return tensors | ({"weight": normal(T, C), "bias": normal(T, C)} if affine else {})


def define(tensors, dtype):
    """Output, gradients and their gradients, by the formula and autograd, by the kernels' names."""
    wide = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    x = wide["x"]
    weight, bias = wide.get("weight"), wide.get("bias")
    count = max(1, x.shape[1] * x.shape[3])
    ones = torch.ones_like(wide["v"])

    def column(value):
        return value[:, None, :, None]

    mean = x.sum((1, 3)) / count
    rstd = ((x - column(mean)).square().sum((1, 3)) / count + EPS).rsqrt()
    normal = (x - column(mean)) * column(rstd)
    w = ones.clone().requires_grad_() if weight is None else weight
    b = torch.zeros_like(w).requires_grad_() if bias is None else bias
    out = normal * column(w) + column(b)
    first = torch.autograd.grad(out, (x, w, b), wide["grad"], create_graph=True)
    given = (wide["u"], wide["v"], wide["z"])
    second = torch.autograd.grad(first, (wide["grad"], x, w), given, materialize_grads=True)
    return {
        "forward": {"out": out, "mean": mean, "rstd": rstd},
        "backward": dict(zip(("out", "to_weight", "to_bias"), first, strict=True)),
        "second": dict(zip(("to_grad", "out", "to_weight"), second, strict=True)),
    }


def run(emulation, dtype, tensors, offset=0):
    """What the kernels write, as `define` has it."""
    T, N, C, L = tensors["x"].shape
    acc = acc_of(DTYPES[dtype])
    takes = {
        "forward": ("x", "weight", "bias"),
        "backward": ("x", "grad", "weight", "mean", "rstd"),
        "second": ("x", "grad", "u", "v", "z", "weight", "mean", "rstd"),
    }
    writes = {
        "forward": ("out", "mean", "rstd"),
        "backward": ("out", "to_weight", "to_bias"),
        "second": ("out", "to_grad", "to_weight"),
    }
    given, results = dict(tensors), {}
    for order, names in writes.items():
        arrays = {n: emulation.input(given[n], offset) for n in takes[order] if n in given}
        for name in names:
            kind = acc if name in ("mean", "rstd") else DTYPES[dtype]
            shape = (T, N, C, L) if name in ("out", "to_grad") else (T, C)
            arrays[name] = emulation.output(*shape, dtype=kind, offset=offset)
        addresses = {name: array.address for name, array in arrays.items()}
        emulation.module.task_batch_norm(order, dtype, T, N, C, L, EPS, addresses)
        results[order] = {name: arrays[name].read() for name in names}
        given |= {name: results["forward"][name] for name in ("mean", "rstd")}
    return results


def flat(results):
    return [value for tensors in results.values() for value in tensors.values()]


def check(emulation, got, tensors):
    truth, peer = define(tensors, torch.float64), define(tensors, acc_of(tensors["x"].dtype))
    for order, values in got.items():
        for name, value in values.items():
            wanted = truth[order][name].detach()
            # Sums of a channel cancel: their rounding is that of their terms.
            size = float(
                max((t.detach().abs().max() for t in flat(truth) if t.numel()), default=0.0)
            )
            emulation.check(value, wanted, peer[order][name].detach(), size, f"{order} {name}")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition_to_second_order(emulation, shape, dtype, affine):
    tensors = make(*shape, DTYPES[dtype], affine=affine)
    check(emulation, run(emulation, dtype, tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_off_a_16_byte_boundary_are_read_one_by_one(emulation, dtype):
    tensors = make(2, 5, 3, 12, DTYPES[dtype])
    check(emulation, run(emulation, dtype, tensors, offset=1), tensors)


@pytest.mark.parametrize("shape", [(2, 19, 37, 1), (2, 5, 3, 12)], ids=str)
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, shape):
    tensors = make(*shape, torch.float32)
    first = flat(run(emulation, "float32", tensors))
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("random", 2, 3), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        assert all(map(torch.equal, first, flat(run(emulation, "float32", tensors))))


def test_far_from_zero_keeps_its_digits(emulation):
    tensors = make(1, 20, 2, 12, torch.float32)
    tensors["x"] = tensors["x"] + 1000
    truth = define(tensors, torch.float64)["forward"]["out"]
    got = run(emulation, "float32", tensors)["forward"]["out"]
    assert (got - truth).abs().max() < 1e-3


def test_nothing_is_launched_for_no_channels(emulation):
    for shape in [(0, 3, 4, 2), (2, 3, 0, 4)]:
        run(emulation, "float32", make(*shape, torch.float32))
    assert emulation.launches() == []
