"""Workloads of the updates: 32 tasks' parameters take one step, forward and backward.

32 tasks of the 18 tensors of a Conv4 with batch norm (112,000 parameters): the gradients to
parameters, gradients, state and, where it is a tensor, the rate. Peers: a Python loop over the
tasks, ``torch._foreach``, TorchOpt, the stacked form (one tensor operation per parameter over all
tasks, which is what a good batched implementation writes), and one flat tensor, which is another
data layout and therefore a yardstick more than a peer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmeta as fm
from benchmarks._harness import Case, Contestant, Step
from benchmarks._peers import AbsentError, double, jax_for, jax_step, peer

CONV4 = [
    shape for channels in (1, 64, 64, 64) for shape in ((64, channels, 3, 3), (64,), (64,), (64,))
] + [(5, 64), (5,)]

RATE = 0.125
MOMENTUM = 0.875
BETA1, BETA2, EPS = 0.875, 0.984375, 1e-8  # of the first step: what corrects the bias is 1 - beta


def sgd(p: Any, g: Any, a: Any) -> tuple[Any, ...]:
    return (p - a * g,)


def momentum(p: Any, g: Any, b: Any, a: Any) -> tuple[Any, ...]:
    b = MOMENTUM * b + g
    return p - a * b, b


def adam(p: Any, g: Any, m: Any, v: Any, a: Any) -> tuple[Any, ...]:
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    return p - a * (m / (1 - BETA1)) / ((v / (1 - BETA2)) ** 0.5 + EPS), m, v


#: The formula of one tensor, parameters first and rate last: for torch, NumPy and JAX alike.
RULES: dict[str, Callable[..., tuple[Any, ...]]] = {"sgd": sgd, "momentum": momentum, "adam": adam}
#: Numbers that each parameter keeps from step to step.
STATES = {"sgd": 0, "momentum": 1, "adam": 2}


@dataclass(frozen=True)
class Work:
    """T tasks; the rate is a number, one tensor per parameter, or one of its shape ("element").

    ``shared`` parameters have no task dimension: the first step of MAML.
    """

    name: str
    rule: str
    T: int
    shapes: tuple[tuple[int, ...], ...]
    rate: str = "number"
    shared: bool = False

    @property
    def title(self) -> str:
        """What tables call it."""
        count = sum(int(np.prod(s)) for s in self.shapes)
        return f"{self.name} (T={self.T}, {len(self.shapes)} tensors, {count:,} parameters)"


def works(rule: str, quick: bool) -> list[Work]:
    """The workloads of a rule."""
    tasks, shapes = (2, ((3, 2), (3,))) if quick else (32, tuple(CONV4))
    one = Work("one rate", rule, tasks, shapes)
    element = dataclasses.replace(one, name="a rate per element", rate="element")
    if rule != "sgd":
        return [one, element]
    return [
        one,
        dataclasses.replace(one, name="one rate, shared parameters", shared=True),
        dataclasses.replace(one, name="a rate per parameter", rate="parameter"),
        element,
    ]


@dataclass
class Data:
    """Float64 NumPy lists: parameters, gradients, states, rates (empty: a number), cotangents."""

    params: list[np.ndarray]
    grads: list[np.ndarray]
    rates: list[np.ndarray]
    states: list[list[np.ndarray]] = field(default_factory=list)
    cotangents: list[list[np.ndarray]] = field(default_factory=list)

    def columns(self) -> list[list[np.ndarray]]:
        """What gradients are taken to."""
        return [self.params, self.grads, *self.states, *([self.rates] if self.rates else [])]


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
    data = Data(normal(() if work.shared else (work.T,)), normal((work.T,)), rates)
    data.states = [normal((work.T,)) for _ in range(STATES[work.rule])]
    if work.rule == "adam":
        data.states[1] = [np.square(v) + 0.125 for v in data.states[1]]
    data.cotangents = [normal((work.T,)) for _ in range(1 + STATES[work.rule])]
    return data


Lists = list[list[Any]]
#: From parameters, gradients, states and rates, a list each, to new parameters and states.
Update = Callable[..., Lists]


def stacked(work: Work) -> Update:
    """The rule for each tensor over all tasks."""

    def update(*columns: list[Any]) -> Lists:
        rows = [RULES[work.rule](*operands) for operands in zip(*columns, strict=True)]
        return [list(column) for column in zip(*rows, strict=True)]

    return update


def foreach(work: Work) -> Update:
    """The same by ``torch._foreach``; rates are numbers."""
    mul, add, sub, div = (getattr(torch, f"_foreach_{n}") for n in ("mul", "add", "sub", "div"))

    def update(p: list[Tensor], g: list[Tensor], *rest: list[Any]) -> Lists:
        if work.rule == "sgd":
            return [list(sub(p, mul(g, RATE)))]
        if work.rule == "momentum":
            b = add(mul(rest[0], MOMENTUM), g)
            return [list(sub(p, mul(b, RATE))), list(b)]
        m = add(mul(rest[0], BETA1), mul(g, 1 - BETA1))
        v = add(mul(rest[1], BETA2), mul(mul(g, g), 1 - BETA2))
        root = add(torch._foreach_sqrt(div(v, 1 - BETA2)), EPS)
        return [list(sub(p, mul(div(div(m, 1 - BETA1), root), RATE))), list(m), list(v)]

    return update


def ours(work: Work) -> Update:
    """``fastmeta``'s op for the rule."""

    def update(p: list[Tensor], g: list[Tensor], *rest: Any) -> Lists:
        *states, rates = rest
        lr = rates if isinstance(rates[0], Tensor) else rates[0]
        if work.rule == "sgd":
            return [fm.sgd_update(p, g, lr)]
        if work.rule == "momentum":
            return list(fm.momentum_update(p, g, states[0], lr, momentum=MOMENTUM))
        state = fm.AdamState(0, *states)
        new, state = fm.adam_update(p, g, state, lr, betas=(BETA1, BETA2), eps=EPS)
        return [new, state.mean, state.square]

    return update


def torchopt(work: Work) -> Update:
    """TorchOpt's transformation, starting from our state."""
    module = peer("torchopt", without=("graphviz",))
    more: dict[str, Any] = {}
    if work.rule == "momentum":
        more = {"momentum": MOMENTUM, "moment_requires_grad": True}
    elif work.rule == "adam":
        more = {"betas": (BETA1, BETA2), "eps": EPS, "moment_requires_grad": True}
    transform = getattr(module, "adam" if work.rule == "adam" else "sgd")(lr=RATE, **more)
    zero = (torch.zeros(()),)  # a transformation's first call takes the buffer without momentum
    transform.update(zero, transform.init(zero), params=zero, inplace=False)

    def update(p: list[Tensor], g: list[Tensor], *rest: list[Any]) -> Lists:
        states = [tuple(s) for s in rest[:-1]]

        def started(part: Any) -> Any:
            names = [n for n in ("trace", "mu", "nu") if hasattr(part, n)]
            return part._replace(**dict(zip(names, states, strict=True))) if names else part

        begin = tuple(started(part) for part in transform.init(tuple(p)))
        updates, after = transform.update(tuple(g), begin, params=tuple(p), inplace=False)
        new = [list(module.apply_updates(tuple(p), updates, inplace=False))]
        for part in after:
            new += [list(getattr(part, n)) for n in ("trace", "mu", "nu") if hasattr(part, n)]
        return new

    return update


def task_by_task(work: Work, one: Update) -> Update:
    """A Python loop over the tasks, results stacked at the end."""

    def update(params: list[Tensor], *rest: Any) -> Lists:
        *columns, rates = rest
        rows = [
            one(
                params if work.shared else [p[t] for p in params],
                *([x[t] for x in column] for column in columns),
                rates,
            )
            for t in range(work.T)
        ]
        return [
            [torch.stack(entry) for entry in zip(*column, strict=True)]
            for column in zip(*rows, strict=True)
        ]

    return update


def contestants(work: Work, data: Data, options: argparse.Namespace) -> Iterator[Contestant]:
    """All who can do the work."""

    def leaves(arrays: list[np.ndarray], dtype: str) -> list[Tensor]:
        kind = getattr(torch, dtype)
        return [
            torch.tensor(a, dtype=kind, device=options.device, requires_grad=True) for a in arrays
        ]

    def torch_step(update: Update, given: Data, dtype: str) -> Step:
        columns = [leaves(column, dtype) for column in given.columns()]
        wrt = [x for column in columns for x in column]
        rates = [] if given.rates else [[RATE] * len(given.params)]
        cotangents = [c.detach() for column in given.cotangents for c in leaves(column, dtype)]

        def step() -> list[Tensor]:
            new = [x for column in update(*columns, *rates) for x in column]
            return [*(n.detach() for n in new), *torch.autograd.grad(new, wrt, cotangents)]

        return step

    def by(make: Callable[[Work], Update]) -> Callable[[str], Step]:
        return lambda dtype: torch_step(make(work), data, dtype)

    def compiled(dtype: str) -> Step:
        if not options.compile:
            raise AbsentError("asked for by --compile")
        torch._dynamo.reset()
        return torch_step(torch.compile(stacked(work), fullgraph=True, dynamic=False), data, dtype)

    def torchopt_step(dtype: str) -> Step:
        if data.rates:
            raise AbsentError("one rate for all parameters only")
        return torch_step(task_by_task(work, torchopt(work)), data, dtype)

    def flat(dtype: str) -> Step:
        if work.rate == "parameter":
            raise AbsentError("a flat tensor holds no rate per parameter")

        def join(arrays: list[np.ndarray], *lead: int) -> list[np.ndarray]:
            return [np.concatenate([a.reshape(*lead, -1) for a in arrays], -1)] if arrays else []

        together = Data(
            join(data.params, *(() if work.shared else (work.T,))),
            join(data.grads, work.T),
            join(data.rates),
            [join(s, work.T) for s in data.states],
            [join(c, work.T) for c in data.cotangents],
        )
        step = torch_step(stacked(work), together, dtype)
        sizes = [int(np.prod(s)) for s in work.shapes]
        calls = 0

        def split() -> list[Tensor]:  # checked in the shapes of the others, timed without
            nonlocal calls
            calls += 1
            outputs = step()
            if calls > 1:
                return list(outputs)
            return [
                part.reshape(*whole.shape[:-1], *shape)
                for whole in outputs
                for part, shape in zip(whole.split(sizes, -1), work.shapes, strict=True)
            ]

        return split

    def by_jit(dtype: str) -> Step:
        jax = jax_for(options.device)
        update = stacked(work)

        def both(columns: Any, cotangents: Any) -> Any:
            rates = [] if data.rates else [[RATE] * len(data.params)]
            new, pullback = jax.vjp(lambda *c: update(*c, *rates), *columns)
            return new, pullback(cotangents)

        with double(jax, dtype):
            kind = getattr(jax.numpy, dtype)
            arrays = jax.tree_util.tree_map(
                lambda a: jax.numpy.asarray(a, kind), (data.columns(), data.cotangents)
            )
        return jax_step(jax, dtype, both, *arrays)

    yield Contestant("fastmeta", by(ours), "ours")
    yield Contestant("eager stacked", by(stacked), "eager")
    if not work.shared and work.rate == "number":
        yield Contestant("_foreach stacked", by(foreach), "eager")
    yield Contestant("eager per task", by(lambda w: task_by_task(w, stacked(w))), "eager")
    yield Contestant("torch flat", flat, "eager", note="one tensor [T, P], another layout")
    yield Contestant("torch.compile stacked", compiled, "compiled")
    yield Contestant("JAX jit", by_jit, "jax")
    yield Contestant("TorchOpt per task", torchopt_step)


def truth(work: Work, data: Data) -> list[np.ndarray]:
    """New parameters and states, then the gradients, by autograd on the formula in float64."""
    columns = [[torch.tensor(a, requires_grad=True) for a in c] for c in data.columns()]
    rates = [] if data.rates else [[RATE] * len(data.params)]
    new = [x for column in stacked(work)(*columns, *rates) for x in column]
    cotangents = [torch.tensor(c) for column in data.cotangents for c in column]
    found = torch.autograd.grad(new, [x for column in columns for x in column], cotangents)
    return [x.detach().numpy() for x in (*new, *found)]


def traffic(work: Work, data: Data) -> int:
    """Numbers that forward and backward have to read or write.

    Forward: parameters, gradients, states and rates are read, new parameters and states written.
    Backward: cotangents are read, the gradients to gradients, states and rates written (that to
    parameters is the cotangent itself, summed if they are shared); the gradients are read again for
    that to a rate, the gradients and states again by Adam.
    """
    size = {n: sum(a.size for a in getattr(data, n)) for n in ("params", "grads", "rates")}
    states, each = STATES[work.rule], size["grads"]
    moved = size["params"] + (2 + 2 * states) * each + size["rates"]
    moved += (2 + 2 * states) * each + size["rates"]
    if work.shared:
        moved += size["params"]
    if work.rule == "adam":
        moved += 3 * each
    elif work.rate != "number":
        moved += (1 + states) * each
    return moved


def cases(rule: str, options: argparse.Namespace, prefix: str = "") -> Iterator[Case]:
    """Forward and backward of a rule's workloads."""
    size = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    for work in works(rule, options.quick):
        data = draw(work)
        yield Case(
            name=prefix + work.title,
            contestants=list(contestants(work, data, options)),
            truth=lambda work=work, data=data: truth(work, data),  # type: ignore[misc]
            flops=2.0 * sum(a.size for a in data.grads),
            traffic=float(size * traffic(work, data)),
        )
