"""The adaptation engine in plain PyTorch: task after task, unrolled through autograd.

The fallback on every device and the oracle of the kernels. It computes derivatives by
``torch.autograd`` alone and keeps nothing for the backward pass but the inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.ops._engine_program import Loss, Node, Program, parse

__all__ = ["WANTED", "adapt", "adapt_backward", "meta_step", "per_parameter_rates"]

#: The bits of ``wanted``: gradients that are asked for.
WANTED = {"fast": 1, "shared": 2, "rates": 4, "support_x": 8, "query_x": 16}


class Inputs(NamedTuple):
    """The differentiable inputs of the engine."""

    fast: list[Tensor]
    shared: list[Tensor]
    rates: Tensor
    support_x: Tensor
    query_x: Tensor


class Pass(NamedTuple):
    """Which random numbers a forward pass draws: those of this step (-1: queries) of this task."""

    seed: int
    step: int
    task: int


def adapt(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    weights: bool,
    record: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """See `fastmeta.ops.engine`."""
    plan = parse(program)
    inputs = _plain(Inputs(fast, shared, rates, support_x, query_x))
    predictions: list[Tensor] = []
    adapted: list[list[Tensor]] = []
    visited: list[Tensor] = []
    for task in range(support_x.shape[0]):
        with _autograd():
            path = _descend(plan, inputs, support_y, steps, seed, task, order=0)
        predictions.append(_predict(plan, inputs, path[-1], seed, task))
        adapted.append(path[-1])
        flat = [torch.cat([p.flatten() for p in theta]) for theta in path[1:]]
        visited.append(torch.stack(flat) if flat else rates.new_empty(0, _count(fast)))
    tasks, empty = len(predictions), rates.new_empty(0)
    return (
        _stack(predictions, query_x.new_empty(0, query_x.shape[1], *plan.output)),
        [
            _stack([a[i] for a in adapted], p.new_empty(0, *p.shape)) if weights else p.new_empty(0)
            for i, p in enumerate(fast)
        ],
        _stack(visited, empty).reshape(tasks, steps, _count(fast)) if record else empty,
    )


def adapt_backward(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    wanted: int,
    trajectory: Tensor,
    grad_prediction: Tensor,
    grad_adapted: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """See `fastmeta.ops.engine`."""
    plan = parse(program)
    inputs = _leaves(Inputs(fast, shared, rates, support_x, query_x), wanted)
    total = _Total(inputs)
    predicted = grad_prediction.dim() > 1
    for task in range(support_x.shape[0]):
        with _autograd():
            path = _descend(
                plan, inputs, support_y, steps, seed, task, order=1 if first_order else 2
            )
            outputs, cotangents = [], []
            if predicted:
                outputs.append(_predict(plan, inputs, path[-1], seed, task))
                cotangents.append(grad_prediction[task])
            for theta, grad in zip(path[-1], grad_adapted, strict=True):
                if grad.shape == (support_x.shape[0], *theta.shape):
                    outputs.append(theta)
                    cotangents.append(grad[task])
            total.add(outputs, cotangents)
    return total.gradients()


def meta_step(
    program: str,
    fast: list[Tensor],
    shared: list[Tensor],
    rates: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    steps: int,
    seed: int,
    first_order: bool,
    wanted: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """See `fastmeta.ops.engine`."""
    plan = parse(program)
    inputs = _leaves(Inputs(fast, shared, rates, support_x, query_x), wanted)
    total = _Total(inputs)
    losses = []
    order = 0 if not wanted else 1 if first_order else 2
    for task in range(support_x.shape[0]):
        with _autograd():
            path = _descend(plan, inputs, support_y, steps, seed, task, order=order)
            prediction = _predict(plan, inputs, path[-1], seed, task)
            loss = task_loss(plan.loss, inputs.shared, prediction, query_y[task])
            total.add([loss], [torch.full_like(loss, 1 / support_x.shape[0])])
        losses.append(loss.detach())
    return _stack(losses, rates.new_empty(0)).mean(), *total.gradients()


def per_parameter_rates(rates: Tensor, fast: Sequence[Tensor], step: int) -> list[Tensor]:
    """The rates of one step, one for each parameter that broadcasts to it: rates Tensor[R, E]."""
    row = rates[min(step, rates.shape[0] - 1)]
    if row.numel() == 1:
        return [row[0]] * len(fast)
    if row.numel() == len(fast):
        return list(row)
    parts = row.split([p.numel() for p in fast])
    return [part.reshape(p.shape) for part, p in zip(parts, fast, strict=True)]


def predict(
    program: Program, theta: Sequence[Tensor], shared: Sequence[Tensor], x: Tensor, draw: Pass
) -> Tensor:
    """The prediction for rows x Tensor[N, ...] of one task with the weights ``theta``."""
    values = [x.reshape(x.shape[0], *program.input)]
    for node in program.nodes:
        tensors = {
            key: _tensor(value, theta, shared)
            for key, value in node.options.items()
            if key in ("w", "b", "mean", "var")
        }
        values.append(_apply(node, [values[i] for i in node.inputs], tensors, draw))
    return values[-1]


def task_loss(loss: Loss, shared: Sequence[Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of one task; 0 where no row counts."""
    options = loss.options
    if loss.kind == "mse":
        return F.mse_loss(prediction, target)
    if loss.kind == "huber":
        return F.huber_loss(prediction, target, delta=options["delta"])
    if loss.kind == "bce":
        return F.binary_cross_entropy_with_logits(prediction, target)
    ignore = options.get("ignore", -100)
    weight = _tensor(options["weight"], (), shared).detach() if "weight" in options else None
    total = F.cross_entropy(
        prediction,
        target,
        weight,
        ignore_index=ignore,
        reduction="sum",
        label_smoothing=options["smoothing"],
    )
    valid = target != ignore
    if weight is None:
        return total / valid.sum().clamp(min=1)
    mass = torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()
    return torch.where(mass == 0, 0, total / torch.where(mass == 0, 1, mass))


def _predict(plan: Program, inputs: Inputs, theta: list[Tensor], seed: int, task: int) -> Tensor:
    x = inputs.query_x[task]
    if x.shape[0] == 0:  # torch's batch norm refuses no rows
        return x.new_empty(0, *plan.output)
    return predict(plan, theta, inputs.shared, x, Pass(seed, -1, task))


def _descend(
    plan: Program,
    inputs: Inputs,
    support_y: Tensor,
    steps: int,
    seed: int,
    task: int,
    *,
    order: int,
) -> list[list[Tensor]]:
    """theta_0 ... theta_K of one task, to be differentiated ``order`` times (0: not at all)."""
    path = [list(inputs.fast)]
    for step in range(steps):
        theta = path[-1]
        held = inputs
        if order < 2:
            theta = [p.detach().requires_grad_() for p in theta]
            held = _plain(inputs)
        theta = [p if p.requires_grad else p.detach().requires_grad_() for p in theta]
        prediction = predict(plan, theta, held.shared, held.support_x[task], Pass(seed, step, task))
        loss = task_loss(plan.loss, held.shared, prediction, support_y[task])
        grads = torch.autograd.grad(loss, theta, create_graph=order == 2, materialize_grads=True)
        rates = per_parameter_rates(inputs.rates if order else held.rates, theta, step)
        path.append([p - rate * g for p, rate, g in zip(path[-1], rates, grads, strict=True)])
    return path if order else [[p.detach() for p in theta] for theta in path]


def _apply(node: Node, values: list[Tensor], tensors: dict[str, Tensor], draw: Pass) -> Tensor:
    x, options = values[0], node.options
    weight, bias = tensors.get("w"), tensors.get("b")
    if node.kind == "linear":
        assert weight is not None
        return F.linear(x, weight, bias)
    if node.kind == "conv2d":
        assert weight is not None
        return F.conv2d(x, weight, bias, options["s"], options["p"], options["d"], options["g"])
    if node.kind == "batch_norm":
        return _batch_norm(x, weight, bias, tensors.get("mean"), tensors.get("var"), options["eps"])
    if node.kind == "layer_norm":
        return F.layer_norm(x, x.shape[1:], weight, bias, options["eps"])
    if node.kind == "group_norm":
        return F.group_norm(x, options["groups"], weight, bias, options["eps"])
    if node.kind == "max_pool":
        return F.max_pool2d(
            x, options["k"], options["s"], options["p"], options["d"], options["ceil"]
        )
    if node.kind == "avg_pool":
        return F.avg_pool2d(
            x, options["k"], options["s"], options["p"], options["ceil"], options["include_pad"]
        )
    if node.kind == "mean_pool":
        return x.mean((2, 3), keepdim=True)
    if node.kind == "flatten":
        return x.flatten(1)
    if node.kind == "dropout":
        return _dropout(x, options["p"], options["id"], draw)
    if node.kind == "add":
        return values[0] + values[1]
    return _activation(node.kind, options, x)


def _activation(kind: str, options: Any, x: Tensor) -> Tensor:
    if kind == "leaky_relu":
        return F.leaky_relu(x, options["slope"])
    if kind == "elu":
        return F.elu(x, options["alpha"])
    if kind == "gelu":
        return F.gelu(x, approximate=options["approximate"])
    if kind == "softplus":
        return F.softplus(x, options["beta"], options["threshold"])
    return _ACTIVATIONS[kind](x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> Tensor:
    """By hand: torch's refuses a single value a channel, and adaptation may well meet one."""
    column = (1, x.shape[1], *(1,) * (x.dim() - 2))
    if mean is None or var is None:
        over = [d for d in range(x.dim()) if d != 1]
        centred = x - x.mean(over, keepdim=True)
        variance = centred.square().mean(over, keepdim=True)
    else:
        centred = x - mean.detach().reshape(column)
        variance = var.detach().reshape(column)
    y = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * weight.reshape(column)
    return y if bias is None else y + bias.reshape(column)


_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _dropout(x: Tensor, p: float, node: int, draw: Pass) -> Tensor:
    """Inverted dropout; its mask is a hash of what it is for, so that none is ever stored."""
    if p == 1:
        return x * 0
    return x * (keep_mask(x.shape, p, node, draw, x.device).to(x.dtype) / (1 - p))


def keep_mask(
    shape: Sequence[int], p: float, node: int, draw: Pass, device: torch.device
) -> Tensor:
    """Which elements dropout keeps: those whose hash of 24 bits reaches p * 2^24."""
    key = _mix_number(draw.seed + _GOLDEN)
    for part in (node, draw.step, draw.task):
        key = _mix_number(key ^ ((part + _GOLDEN) & (2**64 - 1)))
    element = torch.arange(1, math.prod(shape) + 1, device=device)
    bits = _shift(_mix(element * _signed(_GOLDEN) + _signed(key)), 40)
    return (bits >= round(p * 2**24)).reshape(tuple(shape))


def _mix_number(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014), of one number of 64 bits."""
    value &= 2**64 - 1
    for shift, factor in _MIX:
        value = ((value ^ (value >> shift)) * factor) & (2**64 - 1)
    return value


def _mix(values: Tensor) -> Tensor:
    """The same of a tensor, whose int64 wrap around as unsigned ones do."""
    for shift, factor in _MIX:
        values = (values ^ _shift(values, shift)) * _signed(factor)
    return values


def _shift(values: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (values >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _tensor(ref: str, theta: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    return (theta if ref[0] == "f" else shared)[int(ref[1:])]


def _count(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _stack(tensors: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack(tensors) if tensors else empty


def _plain(inputs: Inputs) -> Inputs:
    """The inputs without their graphs, and none of ``torch.inference_mode``."""
    return _map(inputs, lambda t, _: t.clone() if t.is_inference() else t.detach())


def _leaves(inputs: Inputs, wanted: int) -> Inputs:
    """The inputs as leaves of a graph, those that are wanted with a gradient."""
    return _map(_plain(inputs), lambda t, bit: t.requires_grad_(bool(wanted & bit)))


def _map(inputs: Inputs, change: Callable[[Tensor, int], Tensor]) -> Inputs:
    """``change`` of each tensor and the bit of ``wanted`` that it has."""
    fast, shared, *others = WANTED.values()
    return Inputs(
        [change(t, fast) for t in inputs.fast],
        [change(t, shared) for t in inputs.shared],
        *(change(t, bit) for t, bit in zip(inputs[2:], others, strict=True)),
    )


class _Total:
    """Gradients summed over the tasks."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._flat = [t for t in (*inputs.fast, *inputs.shared, *inputs[2:]) if t.requires_grad]
        self._sums = {id(t): torch.zeros_like(t) for t in self._flat}

    def add(self, outputs: list[Tensor], cotangents: list[Tensor]) -> None:
        """Add the gradients of one task."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not (pairs and self._flat):
            return
        reached, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(reached, self._flat, given, allow_unused=True)
        for tensor, grad in zip(self._flat, found, strict=True):
            if grad is not None:
                self._sums[id(tensor)] += grad

    def gradients(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """In the order of the inputs; of shape [0] what is not wanted."""
        found = _map(self._inputs, lambda t, _: self._sums.get(id(t), t.new_empty(0)))
        return found.fast, found.shared, found.rates, found.support_x, found.query_x


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd on, although a kernel runs below it and may run under ``torch.inference_mode``."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for below in (key.AutogradFunctionality, key.ADInplaceOrView):
        excluded = excluded.remove(below)
    included = torch._C._dispatch_tls_local_include_set()
    with (
        torch.inference_mode(False),
        torch._C._ForceDispatchKeyGuard(included, excluded),
        torch.enable_grad(),
    ):
        yield
