"""Definitions, cases and checks that the tests of the ops share.

The definitions follow the papers' formulas literally, task by task and class by class, in whatever
dtype they are given; in float64 under plain autograd they are the truth that ops are held against.
"""

import contextlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmeta import _native

SIMILARITIES = ("dot", "cosine", "sqeuclidean", "euclidean", "additive")
NEG_INF = float("-inf")


def similarity_definition(query, support, similarity, weight=None):
    """Similarity of one task's pairs [Q, S], by the textbook."""
    if similarity == "dot":
        return query @ support.T
    if similarity == "cosine":
        products = query @ support.T
        norms = query.square().sum(-1)[:, None] * support.square().sum(-1)[None]
        return torch.where(norms > 0, products / torch.where(norms > 0, norms, 1).sqrt(), 0)
    difference = query[:, None] - support[None]
    squares = difference.square().sum(-1)
    if similarity == "sqeuclidean":
        return -squares
    if similarity == "euclidean":
        apart = squares > 0
        return -torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    return torch.tanh(query[:, None] + support[None]) @ weight


def attention_definition(query, support, labels, num_classes, similarity, scale, weight=None):
    """Log-probabilities [T, Q, C] by explicit loops over tasks and classes."""
    rows = []
    for t in range(query.shape[0]):
        valid = (labels[t] >= 0) & (labels[t] < num_classes)
        alpha = scale if torch.as_tensor(scale).dim() == 0 else scale[t]
        z = alpha * similarity_definition(query[t], support[t][valid], similarity, weight)
        columns = []
        for c in range(num_classes):
            own = labels[t][valid] == c
            if own.any():
                columns.append(torch.logsumexp(z[:, own], 1) - torch.logsumexp(z, 1))
            else:
                columns.append(query.new_full((query.shape[1],), NEG_INF))
        rows.append(torch.stack(columns, 1))
    return torch.stack(rows) if rows else query.new_zeros(0, query.shape[1], num_classes)


def eager_attention(query, support, labels, num_classes, similarity, scale, weight=None):
    """The usual eager code, batched and one-hot: PyTorch's own error in a dtype is measured on it."""
    if similarity == "cosine":
        query = torch.nn.functional.normalize(query, dim=-1)
        support = torch.nn.functional.normalize(support, dim=-1)
    if similarity in ("dot", "cosine"):
        sims = query @ support.mT
    elif similarity == "additive":
        sims = torch.tanh(query[:, :, None] + support[:, None]) @ weight.to(query.dtype)
    else:
        squares = query.square().sum(-1)[:, :, None] + support.square().sum(-1)[:, None]
        squares = squares - 2 * query @ support.mT
        sims = -squares if similarity == "sqeuclidean" else -squares.clamp(min=1e-12).sqrt()
    z = sims * (scale if torch.as_tensor(scale).dim() == 0 else scale[:, None, None])
    own = torch.nn.functional.one_hot(labels, num_classes).bool().mT[:, None]
    per_class = torch.where(own, z[:, :, None], NEG_INF).logsumexp(-1)
    return per_class - z.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; labels cycle through the classes that are present, unsorted."""

    name: str
    tasks: int
    queries: int
    supports: int
    dim: int
    classes: int
    absent: tuple = ()
    padded: float = 0.0

    def make(self, dtype=torch.float64, seed=0, similarity="dot"):
        """query, support, labels, targets, scale, weight."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        query, support = normal(self.tasks, self.queries, self.dim), None
        support = normal(self.tasks, self.supports, self.dim)
        present = [c for c in range(self.classes) if c not in self.absent]
        labels = torch.tensor(present)[torch.arange(self.supports) % len(present)]
        labels = (
            torch.stack(
                [
                    labels[torch.randperm(self.supports, generator=generator)]
                    for _ in range(self.tasks)
                ]
            )
            if self.tasks
            else torch.zeros(0, self.supports, dtype=torch.long)
        )
        if self.padded:
            drop = torch.rand(labels.shape, generator=generator) < self.padded
            labels = torch.where(drop, -100, labels)
        targets = torch.randint(0, self.classes, (self.tasks, self.queries), generator=generator)
        if self.padded:
            skip = torch.rand(targets.shape, generator=generator) < self.padded
            targets = torch.where(skip, -100, targets)
        scale = torch.tensor(1.3, dtype=torch.float64)
        weight = normal(self.dim) if similarity == "additive" else None
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        cast = None if weight is None else weight.to(acc)
        return query.to(dtype), support.to(dtype), labels, targets, scale.to(acc), cast


CASES = [
    Case("one_of_each", 1, 1, 1, 1, 1),
    Case("five_way_one_shot", 3, 7, 5, 16, 5),
    Case("five_way_five_shot", 2, 75, 25, 64, 5),
    Case("odd_sizes", 3, 17, 13, 37, 4),
    Case("absent_classes", 2, 5, 9, 8, 6, absent=(0, 3, 5)),
    Case("padded", 4, 19, 21, 33, 3, padded=0.4),
    Case("one_class", 2, 6, 11, 5, 1),
    Case("many_classes", 1, 33, 150, 20, 67),
    Case("crosses_tiles", 1, 130, 515, 70, 5),
    Case("one_query", 2, 1, 300, 129, 7),
    Case("wide", 1, 4, 3, 1025, 3),
]
SMALL = Case("small", 2, 3, 6, 4, 4, absent=(2,), padded=0.2)


def compiled_ops():
    """Names of the ops that the bridges in csrc register kernels for."""
    bridges = (Path(__file__).parents[1] / "csrc").rglob("*_torch.cpp")
    return {op for p in bridges for op in re.findall(r'm\.impl\("(\w+)"', p.read_text())}


def isas():
    """Instruction sets to walk; one entry that does nothing without compiled kernels."""
    return _native.cpu_module.available_isas() if _native.cpu_module else ["reference"]


@contextlib.contextmanager
def use_isa(name):
    """Run CPU kernels of one instruction set."""
    if _native.cpu_module is None:
        yield
        return
    before = _native.cpu_module.current_isa()
    _native.cpu_module.set_isa(name)
    try:
        yield
    finally:
        _native.cpu_module.set_isa(before)


def leaves(*tensors):
    """Copies that require grad; None stays None."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(loss, tensors):
    """Gradients of the tensors that are there, zero where the graph does not reach them."""
    present = [t for t in tensors if t is not None]
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in present]
    found = torch.autograd.grad(loss, present, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, present, strict=True)]


def finite_weights(shape):
    """Fixed weights without pattern that turn an output into a scalar (no generator: vmap, compile)."""
    count = torch.Size(shape).numel()
    return torch.cos(1.7 * torch.arange(count, dtype=torch.float64) + 0.3).reshape(shape)


def assert_same(value, expected):
    """Bit-equal from the kernels; the reference calls torch, whose results depend on layout and threads."""
    if _native.cpu_module is None:
        torch.testing.assert_close(value, expected)
    else:
        assert torch.equal(value, expected)


def weighted_sum(output):
    """Scalar of an output: random weights, -inf entries left out (their gradient is 0 by definition)."""
    weights = finite_weights(output.shape).to(output.dtype)
    return (torch.where(output == NEG_INF, 0, output) * weights).sum()


def error(value, truth):
    """Largest absolute error where the truth is finite; infinities must agree."""
    value, truth = value.double(), truth.double()
    finite = truth.isfinite()
    assert torch.equal(value.isfinite(), finite), "infinities or NaN differ from the truth's"
    assert torch.equal(value[~finite], truth[~finite])
    difference = (value - truth)[finite]
    return difference.abs().max().item() if difference.numel() else 0.0


def assert_within_budget(value, truth, eager, dtype, what, *, logit, magnitude=None):
    """Error at most twice that of PyTorch's own path in the same dtype, plus a few roundings.

    A logit of size z is rounded by eps * z, which the exponential turns into a relative error of that
    size in every weight; PyTorch's path may come out better by luck, so that much is allowed on top.

    Args:
        value: What is judged.
        truth: Float64.
        eager: PyTorch's result in `dtype`.
        dtype: Whose roundings count.
        what: For the message.
        logit: Largest absolute logit of the problem.
        magnitude: Size of the terms that `value` is summed from, where they cancel; the largest
            absolute value otherwise.
    """
    finite = truth[truth.isfinite()]
    if magnitude is None:
        magnitude = finite.abs().max().item() if finite.numel() else 0.0
    eps = (
        torch.finfo(dtype).eps if torch.finfo(dtype).bits == 32 else torch.finfo(torch.float32).eps
    )
    slack = (16 * torch.finfo(dtype).eps + eps * logit) * max(magnitude, 1e-3)
    allowed = 2 * error(eager, truth) + slack
    assert error(value, truth) <= allowed, f"{what}: {error(value, truth):.3e} > {allowed:.3e}"


def largest_logit(query, support, labels, similarity, scale, weight):
    """Largest absolute logit of valid pairs, in float64."""
    sizes = [0.0]
    for q, s, y in zip(query.double(), support.double(), labels, strict=True):
        w = None if weight is None else weight.double()
        sims = similarity_definition(q, s[y >= 0], similarity, w)
        sizes.append((scale.double() * sims).abs().max().item() if sims.numel() else 0.0)
    return max(sizes)


def gradient_sizes(query, truth_grads, scale):
    """Sizes of the terms of the gradients of query, support, scale, weight; None: as the result.

    The scale's is a sum over the queries of <gradient, query> / scale, terms that cancel.
    """
    terms = (truth_grads[0] * query.double()).abs().sum().item() / abs(scale.item())
    return [None, None, terms, None]


def layouts(tensor):
    """The same values in other memory layouts."""
    yield "transposed", tensor.mT.contiguous().mT
    yield "sliced", torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
    yield "task_last", tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def product_ids(*lists):
    """Parametrisation ids for a product."""
    return ["-".join(map(str, values)) for values in itertools.product(*lists)]
