"""A layer with weights for each task: output, gradients, and the second derivative of them.

What a second-order inner step asks of a layer: y = f(x, w), the gradients of <y, g> to x and w, and
those of <gradients, (u, v)> to x, w and g. Peers: the grouped convolution (or batched product) that
``torch.vmap`` makes, written by hand; ``torch.vmap`` itself; and a Python loop over the tasks.
Batch norm is compared with the formula in tensor operations too, for torch's own kernel under
``torch.vmap`` is right only while derivatives are taken outside of it.
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

Layer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """T tasks of N rows: ``kind`` is "linear", "conv2d" or "batch_norm"."""

    kind: str
    T: int
    N: int
    inputs: int
    outputs: int
    side: int = 1
    stride: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        form = f"{self.inputs} to {self.outputs}" if self.kind != "batch_norm" else f"{self.inputs}"
        place = "" if self.kind == "linear" else f", {self.side} x {self.side}"
        stride = f", stride {self.stride}" if self.kind == "conv2d" else ""
        return f"{self.kind} {form}{place}{stride} (T={self.T}, N={self.N})"

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of x, w and y."""
        lead = (self.T, self.N)
        if self.kind == "linear":
            weight = (self.T, self.outputs, self.inputs)
            return (*lead, self.inputs), weight, (*lead, self.outputs)
        x = (*lead, self.inputs, self.side, self.side)
        if self.kind == "batch_norm":
            return x, (self.T, self.inputs), x
        end = -(-self.side // self.stride)
        return x, (self.T, self.outputs, self.inputs, 3, 3), (*lead, self.outputs, end, end)


FULL = [
    Work("conv2d", 16, 5, 64, 64, 14, 2),
    Work("conv2d", 16, 5, 64, 64, 7, 2),
    Work("conv2d", 8, 25, 48, 48, 21),
    Work("conv2d", 32, 5, 1, 32, 28, 2),
    Work("linear", 32, 5, 784, 256),
    Work("linear", 32, 75, 256, 128),
    Work("linear", 32, 25, 1600, 5),
    Work("batch_norm", 16, 5, 64, 64, 14),
    Work("batch_norm", 32, 25, 128, 128, 1),
]
QUICK = [
    Work("conv2d", 2, 2, 3, 4, 5, 2),
    Work("linear", 2, 3, 5, 4),
    Work("batch_norm", 2, 3, 4, 4, 3),
]


def formula(x: Tensor, w: Tensor, over: tuple[int, ...]) -> Tensor:
    """Batch norm in tensor operations."""
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(over, keepdim=True)
    return centred * (variance + 1e-5).rsqrt() * w


def layers(work: Work) -> Iterator[tuple[str, str, Layer]]:
    """Name, kind and function of all who can do the work; x and w lead with the tasks."""
    if work.kind == "linear":
        yield "fastmeta", "ours", fm.task_linear
        yield "bmm", "eager", lambda x, w: torch.bmm(x, w.mT)
        one: Layer = F.linear
    elif work.kind == "conv2d":
        geometry = {"stride": work.stride, "padding": 1}

        def grouped(x: Tensor, w: Tensor) -> Tensor:
            flat = x.transpose(0, 1).flatten(1, 2)
            out = F.conv2d(flat, w.flatten(0, 1), None, **geometry, groups=work.T)
            return out.unflatten(1, (work.T, -1)).transpose(0, 1)

        yield "fastmeta", "ours", lambda x, w: fm.task_conv2d(x, w, **geometry)
        yield "grouped convolution", "eager", grouped

        def one(x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(x, w, None, **geometry)
    else:

        def one(x: Tensor, w: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, w, None, True)

        yield "fastmeta", "ours", lambda x, w: fm.task_batch_norm(x, w)
        yield "formula", "eager", lambda x, w: formula(x, w[:, None, :, None, None], (1, 3, 4))
    yield "torch.vmap", "eager", torch.vmap(one)
    yield (
        "loop",
        "eager",
        lambda x, w: torch.stack([one(a, b) for a, b in zip(x, w, strict=True)]),
    )


def definition(work: Work) -> Layer:
    """The truth, task by task, without any kernel whose second derivative could be in doubt."""

    def one(x: Tensor, w: Tensor) -> Tensor:
        if work.kind == "linear":
            return x @ w.T
        if work.kind == "batch_norm":
            return formula(x, w[:, None, None], (0, 2, 3))
        patches = F.unfold(x, 3, padding=1, stride=work.stride)
        return (w.flatten(1) @ patches).reshape(len(x), work.outputs, *work.shapes()[2][3:])

    return lambda x, w: torch.stack([one(a, b) for a, b in zip(x, w, strict=True)])


def derivatives(layer: Layer, tensors: list[Tensor]) -> list[Tensor]:
    """Everything, as the first lines of this file say."""
    x, w, g, u, v = tensors
    y = layer(x, w)
    first = torch.autograd.grad(y, [x, w], g, create_graph=True)
    second = torch.autograd.grad(first, [x, w, g], [u, v])
    return [y.detach(), *(f.detach() for f in first), *second]


def draw(work: Work, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, w, g that require gradients; u, v."""
    rng = np.random.default_rng(3)
    x, w, y = work.shapes()
    values = [
        torch.tensor(rng.standard_normal(s), dtype=dtype, device=device) for s in (x, w, y, x, w)
    ]
    return [t.requires_grad_(i < 3) for i, t in enumerate(values)]


def contestants(work: Work, options: argparse.Namespace) -> Iterator[Contestant]:
    """All who can do the work."""

    def build(layer: Layer) -> Callable[[str], Step]:
        def step_of(dtype: str) -> Step:
            tensors = draw(work, getattr(torch, dtype), options.device)
            return lambda: derivatives(layer, tensors)

        return step_of

    for name, kind, layer in layers(work):
        yield Contestant(name, build(layer), kind)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case a workload."""
    for work in QUICK if options.quick else FULL:
        x, w, y = (float(np.prod(s)) for s in work.shapes())
        # Products: one for y, two for the gradients, and two for the derivatives of each of those.
        products = 0.0 if work.kind == "batch_norm" else 2 * y * w / (work.T * work.outputs)
        yield Case(
            name=work.name,
            contestants=list(contestants(work, options)),
            truth=lambda work=work: derivatives(  # type: ignore[misc]
                definition(work), draw(work, torch.float64, "cpu")
            ),
            flops=7 * products,
            traffic=4.0 * (3 * x + 3 * w + 2 * y),
        )


if __name__ == "__main__":
    sys.exit(
        _harness.run("task_layers", "a layer with weights for each task, to second order", cases)
    )
