"""Workloads of MAML: models, tasks, the exact meta-gradient, and the least work that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of batch norm


@dataclass(frozen=True)
class Work:
    """T tasks take K inner steps on ``support`` rows each, then predict ``query`` rows.

    ``arch`` is "mlp", "mlp_bn" (batch norm), "conv4" (stride 2, batch norm, mean over positions) or
    "head" (one linear layer, gradients to the features as well); ``sizes`` are features, or for
    "conv4" channels. One output: regression with the mean squared error; else cross-entropy.
    """

    name: str
    arch: str
    sizes: tuple[int, ...]
    T: int
    K: int
    support: int
    query: int
    lr: float = 0.1
    second_order: bool = True
    side: int = 28

    @property
    def regression(self) -> bool:
        """Whether targets are numbers."""
        return self.sizes[-1] == 1

    @property
    def to_features(self) -> bool:
        """Whether gradients to the inputs are asked for."""
        return self.arch == "head"

    @property
    def title(self) -> str:
        """What tables call it."""
        order = "second" if self.second_order else "first"
        shape = f"T={self.T}, {self.support} supports, {self.query} queries"
        return f"{self.name}, K={self.K}, {order} order ({shape})"


def _sinusoid(rows: int, steps: int, second_order: bool = True) -> Work:
    sizes = (1, 40, 40, 1)
    return Work("sinusoid 1-40-40-1", "mlp", sizes, 25, steps, rows, rows, 0.01, second_order)


def _mlp(steps: int, arch: str = "mlp") -> Work:
    name = "MLP 784-256-128-64-64-5" + (", batch norm" if arch == "mlp_bn" else "")
    return Work(name, arch, (784, 256, 128, 64, 64, 5), 32, steps, 5, 75)


def _conv(steps: int, tasks: int = 16, queries: int = 75, second_order: bool = True) -> Work:
    sizes = (1, 64, 64, 64, 64, 5)
    return Work("Conv4-64 28x28", "conv4", sizes, tasks, steps, 5, queries, 0.1, second_order)


FULL = [
    _sinusoid(10, 1),
    _sinusoid(10, 5),
    _sinusoid(10, 5, second_order=False),
    _sinusoid(25, 5),
    _mlp(1),
    _mlp(5),
    _mlp(1, "mlp_bn"),
    Work("head 64-5", "head", (64, 5), 32, 5, 25, 75),
    Work("head 1600-5", "head", (1600, 5), 32, 10, 25, 75),
    _conv(1),
    _conv(5),
    _conv(5, second_order=False),
    _conv(5, tasks=4, queries=25),
]
QUICK = [
    Work("sinusoid", "mlp", (1, 6, 1), 3, 2, 4, 4, 0.01),
    Work("MLP, batch norm", "mlp_bn", (6, 5, 3), 3, 2, 6, 6),
    Work("MLP", "mlp", (6, 5, 3), 3, 2, 6, 6, second_order=False),
    Work("head", "head", (6, 3), 3, 2, 6, 6),
    Work("Conv4", "conv4", (1, 3, 3, 3, 3, 3), 2, 1, 3, 6, side=16),
]


def memory_work() -> Work:
    """What memory is measured on, at several numbers of steps."""
    return _conv(1, tasks=4, queries=25)


def module(work: Work) -> nn.Module:
    """The model, in float64, with seeded weights; norms and biases off their trivial start."""
    layers: list[nn.Module] = []
    if work.arch == "conv4":
        for inputs, outputs in zip(work.sizes[:-2], work.sizes[1:-1], strict=True):
            layers.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
            layers.append(nn.BatchNorm2d(outputs, EPS, track_running_stats=False))
            layers.append(nn.ReLU())
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(*work.sizes[-2:])]
    else:
        for i, (inputs, outputs) in enumerate(zip(work.sizes[:-1], work.sizes[1:], strict=True)):
            layers.append(nn.Linear(inputs, outputs))
            if i < len(work.sizes) - 2:
                if work.arch == "mlp_bn":
                    layers.append(nn.BatchNorm1d(outputs, EPS, track_running_stats=False))
                layers.append(nn.ReLU())
    model = nn.Sequential(*layers).double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = layer.weight[0].numel() ** -0.5
                gain = 1.7 if layer is not model[-1] else 1.0
                layer.weight.copy_(
                    torch.tensor(rng.uniform(-gain * bound, gain * bound, layer.weight.shape))
                )
                layer.bias.copy_(torch.tensor(rng.uniform(-bound, bound, layer.bias.shape)))
            elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.copy_(torch.tensor(rng.uniform(0.5, 1.5, layer.weight.shape)))
                layer.bias.copy_(torch.tensor(rng.normal(0, 0.1, layer.bias.shape)))
    return model


def data(work: Work) -> tuple[np.ndarray, ...]:
    """support_x, support_y, query_x, query_y: float64 (labels int64), tasks first."""
    rng = np.random.default_rng(1)
    if work.regression:
        amplitude = rng.uniform(0.1, 5, (work.T, 1, 1))
        phase = rng.uniform(0, np.pi, (work.T, 1, 1))
        xs = rng.uniform(-5, 5, (work.T, work.support, work.sizes[0]))
        xq = rng.uniform(-5, 5, (work.T, work.query, work.sizes[0]))
        return xs, amplitude * np.sin(xs - phase), xq, amplitude * np.sin(xq - phase)
    ways = work.sizes[-1]
    shape = (1, work.side, work.side) if work.arch == "conv4" else (work.sizes[0],)
    centres = (rng.uniform(size=(work.T, ways, *shape)) < 0.3).astype(float)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.tile(np.arange(ways), (work.T, -(-count // ways)))[:, :count]
        return centres[np.arange(work.T)[:, None], y] + 0.3 * rng.normal(size=(*y.shape, *shape)), y

    (xs, ys), (xq, yq) = rows(work.support), rows(work.query)
    return xs, ys, xq, yq


def tensors(arrays: tuple[np.ndarray, ...], dtype: str, device: str) -> list[Tensor]:
    """`data` as tensors; numbers in ``dtype``, labels as integers."""
    kind = getattr(torch, dtype)
    floats = [torch.tensor(a, device=device) for a in arrays]
    return [t.to(kind) if t.is_floating_point() else t for t in floats]


def loss_of(work: Work) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if work.regression else F.cross_entropy


def functional(work: Work) -> Callable[[list[Tensor], Tensor], Tensor]:
    """f(parameters, x), in the order of ``model.parameters()``; leaner than functional_call."""
    last = len(work.sizes) - 2

    def mlp(parameters: list[Tensor], x: Tensor) -> Tensor:
        take = iter(parameters)
        for i in range(last + 1):
            x = F.linear(x, next(take), next(take))
            if i < last:
                if work.arch == "mlp_bn":
                    x = F.batch_norm(x, None, None, next(take), next(take), True, eps=EPS)
                x = F.relu(x)
        return x

    def conv(parameters: list[Tensor], x: Tensor) -> Tensor:
        take = iter(parameters)
        for _ in range(last):
            x = F.conv2d(x, next(take), next(take), stride=2, padding=1)
            x = F.relu(F.batch_norm(x, None, None, next(take), next(take), True, eps=EPS))
        return F.linear(x.mean((2, 3)), next(take), next(take))

    return conv if work.arch == "conv4" else mlp


def unrolled(work: Work, parameters: list[Tensor], batch: list[Tensor]) -> list[Tensor]:
    """The meta-gradient by plain ``torch.autograd``, task after task: the definition.

    Gradient of the mean over the tasks of the query loss, to the parameters and, for "head", to the
    support and query features.
    """
    f, loss = functional(work), loss_of(work)
    xs, ys, xq, yq = batch
    leaves: list[Tensor] = []
    losses = []
    total: list[Tensor] | None = None
    for t in range(work.T):
        support, query = xs[t], xq[t]
        if work.to_features:
            support, query = support.detach().requires_grad_(), query.detach().requires_grad_()
            leaves += [support, query]
        theta = parameters
        for _ in range(work.K):
            inner = loss(f(theta, support), ys[t])
            grads = torch.autograd.grad(inner, theta, create_graph=work.second_order)
            theta = [p - work.lr * g for p, g in zip(theta, grads, strict=True)]
        outer = loss(f(theta, query), yq[t]) / work.T
        if work.to_features:
            losses.append(outer)
            continue
        grads = torch.autograd.grad(outer, parameters)
        total = list(grads) if total is None else list(torch._foreach_add(total, grads))
    if total is not None:
        return total
    grads = torch.autograd.grad(torch.stack(losses).sum(), [*parameters, *leaves])
    count = len(parameters)
    rest = grads[count:]
    return [*grads[:count], torch.stack(rest[0::2]), torch.stack(rest[1::2])]


def _factored(work: Work, s: float) -> float:
    """What a linear layer takes on inputs that no step changes, but for u or 2u of the queries.

    Its fast weight is the initial one and products of the n supports with a cotangent for each
    (csrc/engine/factored.h). A pass over the supports with a whole weight takes ``s``.
    """
    n, q, a, b = work.support, work.query, *work.sizes[:2]
    second = int(work.second_order)
    total = n * (n + 1.0) * a + (1 + second) * s  # X X^T; X W_0^T and what comes back from it
    total += 2.0 * n * n * b * (work.K - 1) * (1 + second + work.to_features)
    if work.to_features:  # through W_K, and X's gradient by W_0, by W_K and by X X^T
        return total + 4 * s + 2.0 * n * n * a
    return total + min((1 + second) * s, 2.0 * q * n * a + (1 + second) * 2.0 * q * n * b)


def flops(work: Work) -> float:
    """Operations of the matrix products and convolutions that the exact result takes.

    A layer of n rows, a inputs and b outputs has unit u = 2 n a b. A pass forward takes u, backward
    2u (u in the first layer, whose inputs need no gradient); the reverse of an inner step is one
    Hessian-vector product, another 6u (2u in the first layer, 4u with gradients to the features).
    The steps of a first layer that is linear count in factored form (`_factored`) where that is
    less.
    """

    def units(rows: int) -> list[float]:
        if work.arch != "conv4":
            pairs = zip(work.sizes[:-1], work.sizes[1:], strict=True)
            return [2.0 * rows * a * b for a, b in pairs]
        found, side = [], work.side
        for a, b in zip(work.sizes[:-2], work.sizes[1:-1], strict=True):
            side = -(-side // 2)
            found.append(2.0 * rows * side * side * 9 * a * b)
        return [*found, 2.0 * rows * work.sizes[-2] * work.sizes[-1]]

    total = 0.0
    for i, (s, q) in enumerate(zip(units(work.support), units(work.query), strict=True)):
        pass_ = 2 if i == 0 else 3
        product = 6 if i else (4 if work.to_features else 2)
        steps = work.K * s * (pass_ + (product if work.second_order else 0))
        if i == 0 and work.arch != "conv4":
            steps = min(steps, _factored(work, s))
        total += steps
        total += q * (3 if i or work.to_features else 2)
    return work.T * total
