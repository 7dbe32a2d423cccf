"""The update of an inner loop: all parameters of all tasks, one step, twice differentiable.

32 tasks of the 18 tensors of a Conv4 with batch norm (112,000 parameters), forward and backward:
the gradients to parameters, gradients and, where it is a tensor, the rate. Peers: a Python loop
over the tasks, ``torch._foreach``, TorchOpt, the stacked form (one tensor operation per parameter
over all tasks, which is what a good batched implementation writes), and one flat tensor, which is
another data layout and therefore a yardstick more than a peer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmeta as fm
from benchmarks import _harness
from benchmarks._harness import Case, Contestant, Step
from benchmarks._peers import AbsentError, double, jax_for, jax_step, peer

CONV4 = [
    shape for channels in (1, 64, 64, 64) for shape in ((64, channels, 3, 3), (64,), (64,), (64,))
] + [(5, 64), (5,)]


@dataclass(frozen=True)
class Work:
    """T tasks; the rate is a number, one tensor per parameter, or one of its shape ("element").

    ``shared`` parameters have no task dimension: the first step of MAML.
    """

    name: str
    T: int
    shapes: tuple[tuple[int, ...], ...]
    rate: str = "number"
    shared: bool = False


def works(quick: bool) -> list[Work]:
    """The workloads."""
    tasks, shapes = (2, ((3, 2), (3,))) if quick else (32, tuple(CONV4))
    return [
        Work("one rate", tasks, shapes),
        Work("one rate, shared parameters", tasks, shapes, shared=True),
        Work("a rate per parameter", tasks, shapes, "parameter"),
        Work("a rate per element", tasks, shapes, "element"),
    ]


@dataclass
class Data:
    """Float64 NumPy lists: parameters, gradients, rates (empty for a number), cotangents."""

    params: list[np.ndarray]
    grads: list[np.ndarray]
    rates: list[np.ndarray]
    cotangents: list[np.ndarray]


def draw(work: Work) -> Data:
    rng = np.random.default_rng(7)

    def normal(lead: tuple[int, ...]) -> list[np.ndarray]:
        return [
            rng.standard_normal((*lead, *s)).astype(np.float32).astype(float) for s in work.shapes
        ]

    rates: list[np.ndarray] = []
    if work.rate == "parameter":
        rates = [np.asarray(np.float32(r), float) for r in rng.uniform(0.05, 0.2, len(work.shapes))]
    elif work.rate == "element":
        rates = [rng.uniform(0.05, 0.2, s).astype(np.float32).astype(float) for s in work.shapes]
    lead = () if work.shared else (work.T,)
    return Data(normal(lead), normal((work.T,)), rates, normal((work.T,)))


RATE = 0.125


def truth(work: Work, data: Data) -> list[np.ndarray]:
    """Updated parameters, then the gradients to parameters, gradients and rates, in float64."""
    rates = data.rates or [np.asarray(RATE)] * len(work.shapes)
    new = [p - a * g for p, a, g in zip(data.params, rates, data.grads, strict=True)]
    to_params = [c.sum(0) if work.shared else c for c in data.cotangents]
    to_grads = [-a * c for a, c in zip(rates, data.cotangents, strict=True)]
    to_rates = []
    for a, g, c in zip(data.rates, data.grads, data.cotangents, strict=False):
        to_rates.append(-(g * c).sum(0) if a.ndim else np.asarray(-(g * c).sum()))
    return [*new, *to_params, *to_grads, *to_rates]


Update = Callable[[list[Tensor], list[Tensor], list[Any]], list[Tensor]]


def stacked(params: list[Tensor], grads: list[Tensor], rates: list[Any]) -> list[Tensor]:
    return [p - a * g for p, g, a in zip(params, grads, rates, strict=True)]


def foreach_stacked(params: list[Tensor], grads: list[Tensor], rates: list[Any]) -> list[Tensor]:
    steps = torch._foreach_mul(grads, rates)
    return list(torch._foreach_sub(params, steps))


def contestants(work: Work, data: Data, options: argparse.Namespace) -> Iterator[Contestant]:
    """All who can do the work."""

    def leaves(arrays: list[np.ndarray], dtype: str) -> list[Tensor]:
        kind = getattr(torch, dtype)
        return [
            torch.tensor(a, dtype=kind, device=options.device, requires_grad=True) for a in arrays
        ]

    def torch_step(update: Update, dtype: str) -> Step:
        params, grads, rates = (leaves(x, dtype) for x in (data.params, data.grads, data.rates))
        cotangents = [c.detach() for c in leaves(data.cotangents, dtype)]
        given = rates or [RATE] * len(params)
        wrt = [*params, *grads, *rates]

        def step() -> list[Tensor]:
            new = update(params, grads, given)
            return [*(n.detach() for n in new), *torch.autograd.grad(new, wrt, cotangents)]

        return step

    def ours(params: list[Tensor], grads: list[Tensor], rates: list[Any]) -> list[Tensor]:
        return list(fm.sgd_update(params, grads, rates if data.rates else RATE))

    def task_by_task(one: Update) -> Update:
        """A Python loop over the tasks, results stacked at the end."""

        def update(params: list[Tensor], grads: list[Tensor], rates: list[Any]) -> list[Tensor]:
            rows = [
                one([p if work.shared else p[t] for p in params], [g[t] for g in grads], rates)
                for t in range(work.T)
            ]
            return [torch.stack(row) for row in zip(*rows, strict=True)]

        return update

    def compiled(dtype: str) -> Step:
        if not options.compile:
            raise AbsentError("asked for by --compile")
        torch._dynamo.reset()
        return torch_step(torch.compile(stacked, fullgraph=True, dynamic=False), dtype)

    def torchopt(dtype: str) -> Step:
        module = peer("torchopt", without=("graphviz",))
        if data.rates:
            raise AbsentError("one rate for all parameters only")
        transform = module.sgd(lr=RATE)

        def one(params: list[Tensor], grads: list[Tensor], rates: list[Any]) -> list[Tensor]:
            updates, _ = transform.update(
                tuple(grads), transform.init(tuple(params)), params=tuple(params), inplace=False
            )
            return list(module.apply_updates(tuple(params), updates, inplace=False))

        return torch_step(task_by_task(one), dtype)

    def flat(dtype: str) -> Step:
        if work.rate == "parameter":
            raise AbsentError("a flat tensor holds no rate per parameter")
        lead = () if work.shared else (work.T,)
        join = [
            np.concatenate([a.reshape(*front, -1) for a in arrays], -1) if arrays else None
            for arrays, front in (
                (data.params, lead),
                (data.grads, (work.T,)),
                (data.rates, ()),
                (data.cotangents, (work.T,)),
            )
        ]
        params, grads, rate, cotangent = (
            None if a is None else leaves([a], dtype)[0] for a in join
        )
        wrt = [x for x in (params, grads, rate) if x is not None]
        sizes = [int(np.prod(s)) for s in work.shapes]

        def step() -> list[Tensor]:
            new = params - (RATE if rate is None else rate) * grads
            return [new.detach(), *torch.autograd.grad(new, wrt, cotangent.detach())]

        def split() -> list[Tensor]:  # checked in the shapes of the others, timed without
            split.calls += 1  # type: ignore[attr-defined]
            outputs = step()
            if split.calls > 1:  # type: ignore[attr-defined]
                return outputs
            return [
                part.reshape(*whole.shape[:-1], *shape)
                for whole in outputs
                for part, shape in zip(whole.split(sizes, -1), work.shapes, strict=True)
            ]

        split.calls = 0  # type: ignore[attr-defined]
        return split

    def by_jit(dtype: str) -> Step:
        jax = jax_for(options.device)
        jnp = jax.numpy

        def update(params: Any, grads: Any, rates: Any) -> Any:
            given = rates or [RATE] * len(params)
            return [p - a * g for p, g, a in zip(params, grads, given, strict=True)]

        def both(params: Any, grads: Any, rates: Any, cotangents: Any) -> Any:
            new, pullback = jax.vjp(update, params, grads, rates)
            return new, pullback(cotangents)

        with double(jax, dtype):
            kind = getattr(jnp, dtype)
            arrays = [
                [jnp.asarray(a, kind) for a in x]
                for x in (data.params, data.grads, data.rates, data.cotangents)
            ]
        return jax_step(jax, dtype, both, *arrays)

    def by_torch(update: Update) -> Callable[[str], Step]:
        return lambda dtype: torch_step(update, dtype)

    yield Contestant("fastmeta", by_torch(ours), "ours")
    yield Contestant("eager stacked", by_torch(stacked), "eager")
    if not work.shared and work.rate == "number":
        yield Contestant(
            "_foreach stacked", by_torch(lambda p, g, r: foreach_stacked(p, g, RATE)), "eager"
        )
    yield Contestant("eager per task", by_torch(task_by_task(stacked)), "eager")
    yield Contestant("torch flat", flat, note="one tensor [T, P], another layout")
    yield Contestant("torch.compile stacked", compiled, "compiled")
    yield Contestant("JAX jit", by_jit)
    yield Contestant("TorchOpt per task", torchopt)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Forward and backward."""
    size = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    for work in works(options.quick):
        data = draw(work)
        numbers = {name: sum(a.size for a in arrays) for name, arrays in vars(data).items()}
        # Read parameters, gradients and rate, write the result; backward: read the cotangent, write
        # three gradients; that to a rate reads the gradients once more.
        moved = numbers["params"] + numbers["grads"] + 2 * numbers["cotangents"]
        moved += 2 * numbers["rates"] + numbers["grads"]
        if work.shared:
            moved += numbers["params"]
        if work.rate != "number":
            moved += numbers["grads"]
        count = sum(int(np.prod(s)) for s in work.shapes)
        yield Case(
            name=f"{work.name} (T={work.T}, {len(work.shapes)} tensors, {count:,} parameters)",
            contestants=list(contestants(work, data, options)),
            truth=lambda work=work, data=data: truth(work, data),  # type: ignore[misc]
            flops=2.0 * numbers["grads"],
            traffic=float(size * moved),
        )


if __name__ == "__main__":
    sys.exit(_harness.run("sgd_update", "inner-loop update of all tasks, forward+backward", cases))
