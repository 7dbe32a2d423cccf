"""Class prototypes: the mean of each task's supports by class, with the gradient to the supports.

Peers sum by a one-hot product, a scatter or ``index_add``, or class after class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from benchmarks import _harness
from benchmarks._harness import Case, Contestant, Step
from benchmarks._peers import AbsentError, double, jax_for, jax_step, peer


@dataclass(frozen=True)
class Work:
    """T tasks, C classes, S supports, D features."""

    name: str
    T: int
    C: int
    S: int
    D: int


FULL = [
    Work("A2-64", 32, 5, 25, 64),
    Work("A2-1600", 32, 5, 25, 1600),
    Work("A3", 8, 20, 100, 512),
    Work("A4", 1, 1000, 100_000, 128),
]
QUICK = [Work("quick", 2, 3, 6, 8)]


def one_hot(work: Work, values: Tensor, labels: Tensor) -> Tensor:
    hot = F.one_hot(labels, work.C).to(values.dtype)
    return (hot.mT @ values) / hot.sum(1).unsqueeze(-1)


def scatter(work: Work, values: Tensor, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(-1).expand_as(values)
    sums = values.new_zeros(work.T, work.C, work.D).scatter_add(1, index, values)
    count = values.new_zeros(work.T, work.C).scatter_add(1, labels, torch.ones_like(values[..., 0]))
    return sums / count.unsqueeze(-1)


def index_add(work: Work, values: Tensor, labels: Tensor) -> Tensor:
    """All tasks in one: class c of task t is row t * C + c."""
    row = (labels + work.C * torch.arange(work.T, device=labels.device).unsqueeze(1)).flatten()
    sums = values.new_zeros(work.T * work.C, work.D).index_add(0, row, values.flatten(0, 1))
    count = torch.bincount(row, minlength=work.T * work.C)
    return (sums / count.unsqueeze(-1)).view(work.T, work.C, work.D)


def contestants(
    work: Work, data: tuple[np.ndarray, ...], backward: bool, options: argparse.Namespace
) -> Iterator[Contestant]:
    """All who can do the work."""
    values, labels, cotangent = data

    def torch_step(function: Callable[[Tensor, Tensor], Tensor], dtype: str) -> Step:
        kind = getattr(torch, dtype)
        x = torch.tensor(values, dtype=kind, device=options.device, requires_grad=backward)
        y = torch.tensor(labels, device=options.device)
        g = torch.tensor(cotangent, dtype=kind, device=options.device)

        def step() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                mean = function(x, y)
            if not backward:
                return [mean]
            return [mean.detach(), *torch.autograd.grad(mean, x, g)]

        return step

    def by_torch(function: Callable[[Work, Tensor, Tensor], Tensor]) -> Callable[[str], Step]:
        return lambda dtype: torch_step(lambda x, y: function(work, x, y), dtype)

    def by_compile(function: Callable[[Work, Tensor, Tensor], Tensor]) -> Callable[[str], Step]:
        def build(dtype: str) -> Step:
            if not options.compile:
                raise AbsentError("asked for by --compile")
            torch._dynamo.reset()
            compiled = torch.compile(lambda x, y: function(work, x, y), dynamic=False)
            return torch_step(compiled, dtype)

        return build

    def by_jit(dtype: str) -> Step:
        jax = jax_for(options.device)
        jnp = jax.numpy

        def mean_of(x: object, y: object) -> object:
            def task(x, y):  # type: ignore[no-untyped-def]
                sums = jax.ops.segment_sum(x, y, work.C)
                return sums / jax.ops.segment_sum(jnp.ones_like(x[:, :1]), y, work.C)

            return jax.vmap(task)(x, y)

        def both(x: object, y: object, g: object) -> list[object]:
            mean, pullback = jax.vjp(lambda x: mean_of(x, y), x)
            return [mean, *pullback(g)]

        with double(jax, dtype):
            x, g = (jnp.asarray(a, getattr(jnp, dtype)) for a in (values, cotangent))
            y = jnp.asarray(labels, jnp.int32)
        if backward:
            return jax_step(jax, dtype, both, x, y, g)
        return jax_step(jax, dtype, mean_of, x, y)

    def easyfsl_step(dtype: str) -> Step:
        if work.S > 10_000:
            raise AbsentError("half a minute a call: class after class over all rows")
        compute = peer("easyfsl.methods.utils", without=("torchvision",)).compute_prototypes

        def tasks(x: Tensor, y: Tensor) -> Tensor:
            return torch.stack([compute(a, b) for a, b in zip(x, y, strict=True)])

        return torch_step(tasks, dtype)

    yield Contestant("fastmeta", by_torch(lambda w, x, y: fm.segment_mean(x, y, w.C)[0]), "ours")
    yield Contestant("eager one-hot", by_torch(one_hot), "eager")
    yield Contestant("eager scatter", by_torch(scatter), "eager")
    yield Contestant("eager index_add", by_torch(index_add), "eager")
    yield Contestant("torch.compile one-hot", by_compile(one_hot), "compiled")
    yield Contestant("torch.compile index_add", by_compile(index_add), "compiled")
    yield Contestant("JAX jit segment_sum", by_jit, "jax")
    yield Contestant("easyfsl", easyfsl_step, note="class after class, task after task")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Forward, and with the gradient to the values."""
    size = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    for work in QUICK if options.quick else FULL:
        rng = np.random.default_rng(7)
        kind = getattr(torch, options.dtype)
        values, cotangent = (
            torch.from_numpy(rng.standard_normal(shape)).to(kind).double().numpy()
            for shape in ((work.T, work.S, work.D), (work.T, work.C, work.D))
        )
        labels = rng.permuted(np.tile(np.arange(work.S) % work.C, (work.T, 1)), axis=1)

        def truth(  # the definition, in float64
            backward: bool,
            work: Work = work,
            values: np.ndarray = values,
            labels: np.ndarray = labels,
            cotangent: np.ndarray = cotangent,
        ) -> list[np.ndarray]:
            mean = np.zeros((work.T, work.C, work.D))
            count = np.zeros((work.T, work.C, 1))
            tasks = np.arange(work.T)[:, None]
            np.add.at(mean, (tasks, labels), values)
            np.add.at(count, (tasks, labels), 1.0)
            grads = [(cotangent / count)[tasks, labels]] if backward else []
            return [mean / count, *grads]

        for backward in (False, True):
            direction = "forward+backward" if backward else "forward"
            shape = f"T={work.T} C={work.C} S={work.S:,} D={work.D}"
            yield Case(
                name=f"{work.name} {direction} ({shape})",
                contestants=list(contestants(work, (values, labels, cotangent), backward, options)),
                truth=lambda truth=truth, backward=backward: truth(backward),  # type: ignore[misc]
                flops=float(values.size) * (2 if backward else 1),
                traffic=size * (values.size + cotangent.size) * (2.0 if backward else 1.0)
                + 8.0 * labels.size,
            )


if __name__ == "__main__":
    sys.exit(_harness.run("segment_mean", "class prototypes", cases))
