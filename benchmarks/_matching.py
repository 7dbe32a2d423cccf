"""Workloads of matching attention and its loss, and the formulas in plain PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import Step


@dataclass(frozen=True)
class Work:
    """A workload: T tasks, C classes, S supports, Q queries, D features.

    ``ragged`` draws the number of supports of each task from S/5 to S; ``backward`` asks for the
    gradients to query, support, scale (and weight) as well; ``second`` also for those of their
    product with fixed directions.
    """

    name: str
    T: int
    C: int
    S: int
    Q: int
    D: int
    similarity: str = "dot"
    ragged: bool = False
    backward: bool = True
    second: bool = False

    @property
    def title(self) -> str:
        """What tables call it."""
        shape = f"T={self.T} C={self.C} S={self.S:,} Q={self.Q} D={self.D}"
        kind = self.similarity + (", ragged" if self.ragged else "")
        passes = "forward+backward" if self.backward else "forward"
        passes += "+double backward" if self.second else ""
        return f"{self.name} {kind}, {passes} ({shape})"


A1 = Work("A1", 32, 5, 5, 75, 64)
A2_64 = Work("A2-64", 32, 5, 25, 75, 64)
A2_512 = Work("A2-512", 32, 5, 25, 75, 512)
A2_1600 = Work("A2-1600", 32, 5, 25, 75, 1600)
A3 = Work("A3", 8, 20, 100, 300, 512)
A4 = Work("A4", 1, 1000, 100_000, 256, 128)
ONE = Work("one", 1, 5, 5, 1, 64)

FULL = [
    ONE,
    A1,
    A2_64,
    replace(A2_64, similarity="cosine"),
    replace(A2_64, similarity="sqeuclidean"),
    replace(A2_64, similarity="euclidean"),
    replace(A2_64, similarity="additive"),
    A2_512,
    replace(A2_512, similarity="sqeuclidean"),
    replace(A2_512, ragged=True),
    A2_1600,
    A3,
    replace(A3, similarity="cosine"),
    A4,
    replace(A4, similarity="sqeuclidean"),
]
MILLION = replace(A4, name="A4-1M", S=1_000_000, backward=False)
QUICK = [
    Work("quick", 2, 3, 6, 4, 8, "cosine"),
    Work("quick", 2, 3, 6, 4, 8, "sqeuclidean", ragged=True),
    Work("quick", 1, 3, 60, 4, 8, "additive"),
]


def works(options: argparse.Namespace) -> Iterator[Work]:
    """The workloads asked for, forward and forward+backward."""
    for work in QUICK if options.quick else FULL:
        yield replace(work, backward=False)
        yield work
    if not options.quick:
        yield MILLION


@dataclass
class Inputs:
    """Float64 NumPy data of a workload; the same for all contestants."""

    query: np.ndarray
    support: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray | None
    mask: np.ndarray | None
    weight: np.ndarray | None
    scale: float
    cotangent: np.ndarray
    along: list[np.ndarray]  # directions in query, support, scale (and weight)


def draw(work: Work, dtype: str) -> Inputs:
    """Normal features, shuffled labels; rounded to ``dtype``, so that the truth sees the same."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return values.to(getattr(torch, dtype)).double().numpy()

    labels = np.tile(np.arange(work.S) % work.C, (work.T, 1))
    lengths = mask = None
    if work.ragged:
        lengths = rng.integers(max(work.C, work.S // 5), work.S + 1, work.T)
        mask = np.arange(work.S) < lengths[:, None]
    else:
        labels = rng.permuted(labels, axis=1)
    root = work.D**-0.5
    scale = {
        "dot": root,
        "cosine": 10.0,
        "sqeuclidean": 0.5 * root,
        "euclidean": root,
        "additive": 4.0,
    }
    return Inputs(
        query=normal(work.T, work.Q, work.D),
        support=normal(work.T, work.S, work.D),
        labels=labels,
        targets=rng.integers(0, work.C, (work.T, work.Q)),
        lengths=lengths,
        mask=mask,
        weight=normal(work.D) * root if work.similarity == "additive" else None,
        scale=scale[work.similarity],
        cotangent=normal(work.T, work.Q, work.C),
        along=[
            normal(*shape)
            for shape in [
                (work.T, work.Q, work.D),
                (work.T, work.S, work.D),
                (),
                *([(work.D,)] if work.similarity == "additive" else []),
            ]
        ],
    )


# --- Arithmetic in PyTorch: what a user writes without fastmeta -----------------------------------


@dataclass
class Tensors:
    """`Inputs` as tensors of one dtype and device."""

    query: Tensor
    support: Tensor
    labels: Tensor
    targets: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    scale: Tensor
    cotangent: Tensor
    along: list[Tensor]

    @property
    def wrt(self) -> list[Tensor]:
        """What gradients are taken to."""
        leaves = [self.query, self.support, self.scale]
        return leaves if self.weight is None else [*leaves, self.weight]


def tensors(work: Work, inputs: Inputs, dtype: str, device: str) -> Tensors:
    def make(value: Any, *, float_: bool = True) -> Any:
        if value is None:
            return None
        kind = getattr(torch, dtype) if float_ else None
        tensor = torch.tensor(value, dtype=kind, device=device)
        return tensor.requires_grad_() if float_ and work.backward else tensor

    return Tensors(
        make(inputs.query),
        make(inputs.support),
        make(inputs.labels, float_=False),
        make(inputs.targets, float_=False),
        make(inputs.lengths, float_=False),
        make(inputs.mask, float_=False),
        make(inputs.weight),
        make(inputs.scale),
        make(inputs.cotangent).detach(),
        [make(direction).detach() for direction in inputs.along],
    )


def logits(similarity: str, q: Tensor, s: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """Scaled similarities [T, Q, S], up to a constant per query, which the softmax cancels."""
    if similarity == "dot":
        return (q * scale) @ s.mT
    if similarity == "cosine":
        return (F.normalize(q, dim=-1) * scale) @ F.normalize(s, dim=-1).mT
    if similarity == "sqeuclidean":
        return (2 * (q @ s.mT) - s.square().sum(-1).unsqueeze(1)) * scale
    if similarity == "euclidean":
        return -torch.cdist(q, s) * scale
    assert weight is not None
    return (torch.tanh(q.unsqueeze(2) + s.unsqueeze(1)) @ weight) * scale


def masked_logits(work: Work, x: Tensors, q: Tensor) -> Tensor:
    z = logits(work.similarity, q, x.support, x.scale, x.weight)
    return z if x.mask is None else z.masked_fill(~x.mask.unsqueeze(1), float("-inf"))


def one_hot(work: Work, x: Tensors) -> Tensor:
    """Class probabilities [T, Q, C] by a product with one-hot labels, the usual way."""
    weights = masked_logits(work, x, x.query).softmax(-1)
    return weights @ F.one_hot(x.labels, work.C).to(weights.dtype)


def scatter(work: Work, x: Tensors) -> Tensor:
    """The same by integer labels."""
    weights = masked_logits(work, x, x.query).softmax(-1)
    zeros = weights.new_zeros(work.T, work.Q, work.C)
    return zeros.scatter_add(2, x.labels.unsqueeze(1).expand_as(weights), weights)


def index_add(work: Work, x: Tensors) -> Tensor:
    """For one task: supports first, so that class sums add whole rows."""
    weights = masked_logits(work, x, x.query)[0].softmax(-1).T
    return weights.new_zeros(work.C, work.Q).index_add(0, x.labels[0], weights).T.unsqueeze(0)


def chunked(work: Work, x: Tensors) -> Tensor:
    """`index_add` over blocks of 32 queries: for support sets whose [Q, S] does not fit."""
    rows = []
    for block in x.query.split(32, dim=1):
        weights = masked_logits(work, x, block)[0].softmax(-1).T
        sums = weights.new_zeros(work.C, block.shape[1]).index_add(0, x.labels[0], weights)
        rows.append(sums.T)
    return torch.cat(rows).unsqueeze(0)


def sdpa(work: Work, x: Tensors) -> Tensor:
    """Fused attention of torch with one-hot values; distances through one more feature."""
    q, s = x.query, x.support
    if work.similarity == "cosine":
        q, s = F.normalize(q, dim=-1) * x.scale, F.normalize(s, dim=-1)
    elif work.similarity == "sqeuclidean":
        q = torch.cat([q * (2 * x.scale), x.scale.expand(*q.shape[:-1], 1)], -1)
        s = torch.cat([s, -s.square().sum(-1, keepdim=True)], -1)
    else:
        q = q * x.scale
    values = F.one_hot(x.labels, work.C).to(q.dtype)
    mask = None if x.mask is None else x.mask[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        q.unsqueeze(1), s.unsqueeze(1), values.unsqueeze(1), attn_mask=mask, scale=1.0
    )
    return attended.squeeze(1)


def head(output: str, x: Tensors, probabilities: Tensor) -> Tensor:
    """From probabilities to what is asked for."""
    if output == "probs":
        return probabilities
    logp = probabilities.log()
    return logp if output == "log_probs" else F.nll_loss(logp.flatten(0, 1), x.targets.flatten())


def masked_logsumexp(work: Work, x: Tensors) -> Tensor:
    """The loss without class sums: two log-sum-exps over the supports."""
    z = masked_logits(work, x, x.query)
    same = x.labels.unsqueeze(1) == x.targets.unsqueeze(2)
    return (z.logsumexp(-1) - z.masked_fill(~same, float("-inf")).logsumexp(-1)).mean()


def torch_step(x: Tensors, work: Work, output: Callable[[], Tensor]) -> Step:
    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [output()]

    def both() -> list[Tensor]:
        value = output()
        cotangent = x.cotangent if value.dim() else None
        return [value.detach(), *torch.autograd.grad(value, x.wrt, cotangent)]

    def three() -> list[Tensor]:
        value = output()
        cotangent = x.cotangent if value.dim() else None
        grads = torch.autograd.grad(value, x.wrt, cotangent, create_graph=True)
        second = torch.autograd.grad(grads, x.wrt, x.along)
        return [value.detach(), *(g.detach() for g in grads), *second]

    if work.second:
        return three
    return both if work.backward else forward


def truth(work: Work, inputs: Inputs, output: str) -> list[np.ndarray]:
    """Outputs and gradients in float64, from the definition, in blocks of queries."""
    x = tensors(work, inputs, "float64", "cpu")
    if work.second:
        step = torch_step(x, work, lambda: head(output, x, scatter(work, x)))
        return [tensor.numpy() for tensor in step()]
    block = work.Q if work.S < 10_000 else 32
    values: list[Tensor] = []
    grads: list[Tensor] | None = None
    for start in range(0, work.Q, block):
        rows = slice(start, start + block)
        q = x.query[:, rows]
        with torch.set_grad_enabled(work.backward):
            z = masked_logits(work, x, q)
            value = z.new_zeros(work.T, z.shape[1], work.C)
            index = x.labels.unsqueeze(1).expand_as(z)
            value = value.scatter_add(2, index, z.softmax(-1))
            cotangent = x.cotangent[:, rows]
            if output != "probs":
                value = value.log()
            if output == "nll":
                targets = x.targets[:, rows].unsqueeze(2)
                value = -value.gather(2, targets).sum() / (work.T * work.Q)
                cotangent = torch.ones_like(value)
        if work.backward:
            new = torch.autograd.grad(value, x.wrt, cotangent)
            grads = list(new) if grads is None else [a + b for a, b in zip(grads, new, strict=True)]
        values.append(value.detach())
    total = torch.stack(values).sum() if output == "nll" else torch.cat(values, 1)
    return [total.numpy(), *[g.numpy() for g in grads or []]]
