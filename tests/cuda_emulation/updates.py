"""Problems of the updates for the emulated kernels: made, defined in PyTorch, run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


# ---- the definitions ----------------------------------------------------------------------------


def sgd(param, grad, lr):
    return (param - lr * grad,)


MU, DAMPENING = 0.8, 0.3


def nesterov(param, grad, buffer, lr):
    buffer = MU * buffer + (1 - DAMPENING) * grad
    return param - lr * (grad + MU * buffer), buffer


BETA1, BETA2, EPS, EPS_ROOT, STEP = 0.8, 0.95, 1e-3, 1e-4, 3
CORRECTIONS = 1 / (1 - BETA1**STEP), 1 / (1 - BETA2**STEP)


def adam(param, grad, mean, square, lr):
    mean = BETA1 * mean + (1 - BETA1) * grad
    square = BETA2 * square + (1 - BETA2) * grad**2
    root = (CORRECTIONS[1] * square + EPS_ROOT).sqrt()
    return param - lr * (CORRECTIONS[0] * mean) / (root + EPS), mean, square


@dataclass(frozen=True)
class Op:
    """An update: its formula, the tensors of its state, and the numbers that its kernels take."""

    name: str
    define: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()

    @property
    def operands(self) -> tuple[str, ...]:
        return ("param", "grad", *self.states)

    @property
    def cotangents(self) -> tuple[str, ...]:
        return ("grad_out", *(f"grad_out_{state}" for state in self.states))

    @property
    def backward_operands(self) -> tuple[str, ...]:
        return ("grad_out", "grad", *self.cotangents[1:], *self.states)


OPS = {
    op.name: op
    for op in (
        Op("sgd", sgd),
        Op(
            "momentum",
            nesterov,
            ("buffer",),
            (1 + MU * (1 - DAMPENING), MU * MU, 1 - DAMPENING, MU),
        ),
        Op("adam", adam, ("mean", "square"), (BETA1, BETA2, EPS, EPS_ROOT, *CORRECTIONS)),
    )
}


class Entry:
    """One tensor of the list: random operands, T tasks of N elements each unless ``layouts`` says.

    ``offset`` moves all of them off alignment by as many elements.
    """

    def __init__(self, op, T, N, lr, dtype, seed=0, offset=0, **layouts):
        generator = torch.Generator().manual_seed(seed)
        self.op, self.T, self.N, self.dtype, self.offset = OPS[op], T, N, dtype, offset
        self.layouts, self.values = {"lr": lr, **layouts}, {}
        for name in (*self.op.operands, *self.op.cotangents, "lr"):
            shape = shape_of(self.layouts.setdefault(name, "own"), T, N)
            value = torch.randn(shape, generator=generator)
            if name == "square":
                value = value.square() + 0.1
            own = name in ("param", "grad", "grad_out")
            self.values[name] = value.to(dtype if own else acc_of(dtype))

    def operand(self, emulation, name, keep):
        keep.append(emulation.input(self.values[name], self.offset))
        return (keep[-1].address, *strides_of(self.layouts[name], self.N))

    def results(self, emulation, first, names):
        kinds = [self.dtype if name == first else acc_of(self.dtype) for name in names]
        return [emulation.output(self.T, self.N, dtype=kind, offset=self.offset) for kind in kinds]

    def define(self, dtype):
        """Results and gradients by autograd on the formula in ``dtype``, by name."""
        wide = {name: value.to(dtype).requires_grad_() for name, value in self.values.items()}
        operands = {name: wide[name] for name in (*self.op.operands, "lr")}
        full = {n: v if n == "lr" else v.expand(self.T, self.N) for n, v in operands.items()}
        outs = self.op.define(*full.values())
        cotangents = [wide[n].detach().expand(self.T, self.N) for n in self.op.cotangents]
        del full["param"]  # whose gradient is the cotangent itself
        grads = torch.autograd.grad(outs, list(full.values()), cotangents, allow_unused=True)
        result = {f"new {n}": o for n, o in zip(("param", *self.op.states), outs, strict=True)}
        result |= {f"to {n}": g for n, g in zip(full, grads, strict=True)}
        return {name: value.detach() for name, value in result.items()}

    def terms(self):
        """Largest sum of the absolute terms of the rate's gradient: its rounding when they cancel."""
        wide = {n: v.double().expand(self.T, self.N) for n, v in self.values.items()}
        one = torch.ones((), dtype=torch.float64)
        step = wide["param"] - self.op.define(*(wide[n] for n in self.op.operands), one)[0]
        terms = (wide["grad_out"] * step).abs().sum_to_size(self.values["lr"].shape)
        return terms.max().item() if terms.numel() else 0.0


# ---- the kernels --------------------------------------------------------------------------------


def run_forward(emulation, entries):
    """New parameters and states of each entry, by name."""
    keep, rows, results = [], [], []
    for e in entries:
        names = ("param", *e.op.states)
        outs = e.results(emulation, "param", names)
        operands = [e.operand(emulation, name, keep) for name in e.op.operands]
        lr = e.operand(emulation, "lr", keep)
        rows.append((e.T, e.N, operands, lr, [o.address for o in outs], 0))
        results.append(dict(zip([f"new {n}" for n in names], outs, strict=True)))
    call(emulation, entries, "", rows)
    return [{name: out.read() for name, out in outs.items()} for outs in results]


def run_backward(emulation, entries, *, with_lr=True):
    """Gradients of each entry's gradient, states and rate, by name."""
    keep, rows, results = [], [], []
    for e in entries:
        names = ("grad", *e.op.states)
        outs = e.results(emulation, "grad", names)
        lr_out = emulation.output(*e.values["lr"].shape, dtype=acc_of(e.dtype), offset=e.offset)
        operands = [e.operand(emulation, name, keep) for name in e.op.backward_operands]
        lr = e.operand(emulation, "lr", keep)
        addresses = [o.address for o in outs]
        rows.append((e.T, e.N, operands, lr, addresses, lr_out.address if with_lr else 0))
        named = dict(zip([f"to {n}" for n in names], outs, strict=True))
        results.append({**named, "to lr": lr_out})
    call(emulation, entries, "_backward", rows)
    return [{name: out.read() for name, out in outs.items()} for outs in results]


def call(emulation, entries, suffix, rows):
    op, dtype = entries[0].op, entries[0].dtype
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    getattr(emulation.module, op.name + suffix)(name, rows, list(op.numbers))


def check(emulation, entries):
    """Run forward and backward and hold every result against the definition."""
    forward, backward = run_forward(emulation, entries), run_backward(emulation, entries)
    for e, got in zip(entries, map(dict.__or__, forward, backward), strict=True):
        truth, peer = e.define(torch.float64), e.define(acc_of(e.dtype))
        assert got.keys() == truth.keys()
        for name, value in got.items():
            size = e.terms() if name == "to lr" else 0.0
            emulation.check(value, truth[name], peer[name], size, f"{e.op.name}: {name}")
