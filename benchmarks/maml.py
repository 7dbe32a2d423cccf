"""One meta-step of MAML: all tasks adapt, query loss, exact meta-gradient.

Every contestant's meta-gradient is compared in float64 with plain ``torch.autograd`` unrolling
before its float32 form is timed (float32 meta-gradients through several ReLU steps differ by
percents between exact methods, so a bound on them proves little). ``torch.func.grad`` around
``vmap`` is there to be seen fail where batch norm is: its second-order gradient is wrong; ``vmap``
around ``grad`` is right and is the peer.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import fastmeta as fm
from benchmarks import _harness, _maml, _update
from benchmarks._harness import Case, Contestant, Step
from benchmarks._maml import Work
from benchmarks._peers import AbsentError, double, jax_for, jax_step, peer


class Meeting:
    """A workload's model and tasks, and every contestant's way to its meta-gradient."""

    def __init__(self, work: Work, options: argparse.Namespace) -> None:
        self.work = work
        self.options = options
        self.model = _maml.module(work)
        self.arrays = _maml.data(work)

    def fresh(self, dtype: str) -> tuple[nn.Module, list[Tensor]]:
        """A copy of the model, and the tasks."""
        model = copy.deepcopy(self.model).to(self.options.device, getattr(torch, dtype))
        return model, _maml.tensors(self.arrays, dtype, self.options.device)

    def truth(self) -> list[Tensor]:
        """The definition, in float64."""
        model, batch = self.fresh("float64")
        return _maml.unrolled(self.work, list(model.parameters()), batch)

    # Each of the following takes a dtype and returns the step, which returns the meta-gradient.

    def ours(self, strategy: str = "auto", *, graph: bool = False) -> Callable[[str], Step]:
        """``fm.MAML`` with its own choice of strategy, or another than that; with a CUDA graph."""

        def build(dtype: str) -> Step:
            work = self.work
            if graph and self.options.device != "cuda":
                raise AbsentError("it needs --device cuda")
            model, (xs, ys, xq, yq) = self.fresh(dtype)
            maml = fm.MAML(
                model,
                lr=work.lr,
                steps=work.K,
                first_order=not work.second_order,
                loss="mse" if work.regression else "cross_entropy",
                strategy=strategy,
                cuda_graph=graph,
            )
            wrt = list(model.parameters())
            if work.to_features:
                wrt += [xs.requires_grad_(), xq.requires_grad_()]

            def step() -> list[Tensor]:
                for tensor in wrt:
                    tensor.grad = None
                maml.backward(xs, ys, xq, yq)
                return [tensor.grad for tensor in wrt]

            if strategy != "auto":
                own = fm.MAML(model, lr=work.lr, steps=work.K).plan().strategy
                if own == strategy:
                    raise AbsentError("what fastmeta picks by itself")
            return step

        return build

    def autograd(self, dtype: str) -> Step:
        """Plain unrolling, task after task."""
        model, batch = self.fresh(dtype)
        parameters = list(model.parameters())
        return lambda: _maml.unrolled(self.work, parameters, batch)

    def functional(self, order: str, *, compiled: bool = False) -> Callable[[str], Step]:
        """torch.func, as "vmap(grad)" or "grad(vmap)"."""

        def build(dtype: str) -> Step:
            work = self.work
            if compiled and not self.options.compile:
                raise AbsentError("asked for by --compile")
            model, batch = self.fresh(dtype)
            parameters = [p.detach() for p in model.parameters()]
            f, loss = _maml.functional(work), _maml.loss_of(work)

            def task(theta: Any, xs: Tensor, xq: Tensor, ys: Tensor, yq: Tensor) -> Tensor:
                inner = grad(lambda p: loss(f(p, xs), ys))
                for _ in range(work.K):
                    grads = inner(theta)
                    if not work.second_order:
                        grads = [g.detach() for g in grads]
                    theta = [p - work.lr * g for p, g in zip(theta, grads, strict=True)]
                return loss(f(theta, xq), yq)

            wrt = (0, 1, 2) if work.to_features else (0,)
            tasks = (None, 0, 0, 0, 0)

            def outside(theta: Any, *rest: Tensor) -> Any:
                grads = vmap(grad(task, wrt), in_dims=tasks)(theta, *rest)
                return [[g.mean(0) for g in grads[0]], *(g / work.T for g in grads[1:])]

            def inside(theta: Any, *rest: Tensor) -> Any:
                return grad(lambda *a: vmap(task, in_dims=tasks)(*a).mean(), wrt)(theta, *rest)

            meta = outside if order == "vmap(grad)" else inside
            if compiled:
                torch._dynamo.reset()
                meta = torch.compile(meta, fullgraph=True, dynamic=False)
            xs, ys, xq, yq = batch

            def step() -> list[Tensor]:
                grads = meta(parameters, xs, xq, ys, yq)
                return [*grads[0], *grads[1:]]

            return step

        return build

    def _per_task(self, dtype: str) -> tuple[nn.Module, Any, Callable[[], list[Tensor]]]:
        """For libraries that take one task at a time: model, tasks as lists, gradient collector."""
        model, (xs, ys, xq, yq) = self.fresh(dtype)
        tasks = [list(x.clone().unbind()) for x in (xs, xq)]
        tasks = [[t.clone() for t in part] for part in tasks]
        parameters = list(model.parameters())
        if self.work.to_features:
            for part in tasks:
                for t in part:
                    t.requires_grad_()

        def collect() -> list[Tensor]:
            leaves = [*parameters, *(tasks[0] + tasks[1] if self.work.to_features else [])]
            grads = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            count = len(parameters)
            if not self.work.to_features:
                return grads  # type: ignore[return-value]
            return [
                *grads[:count],  # type: ignore[list-item]
                torch.stack(grads[count : count + self.work.T]),  # type: ignore[arg-type]
                torch.stack(grads[count + self.work.T :]),  # type: ignore[arg-type]
            ]

        return model, list(zip(tasks[0], ys, tasks[1], yq, strict=True)), collect

    def learn2learn(self, dtype: str) -> Step:
        """Its documented loop: clone, adapt, backward."""
        work = self.work
        library = peer("learn2learn.algorithms.maml", without=("torchvision", "gym", "tqdm"))
        model, tasks, collect = self._per_task(dtype)
        learner = library.MAML(model, lr=work.lr, first_order=not work.second_order)
        loss = _maml.loss_of(work)

        def step() -> list[Tensor]:
            for xs, ys, xq, yq in tasks:
                clone = learner.clone()
                for _ in range(work.K):
                    clone.adapt(loss(clone(xs), ys))
                (loss(clone(xq), yq) / work.T).backward()
            return collect()

        return step

    def higher(self, dtype: str) -> Step:
        """Its documented loop: innerloop_ctx, step, backward."""
        work = self.work
        library = peer("higher")
        model, tasks, collect = self._per_task(dtype)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=work.lr)
        loss = _maml.loss_of(work)

        def step() -> list[Tensor]:
            for xs, ys, xq, yq in tasks:
                with library.innerloop_ctx(
                    model,
                    optimizer,
                    copy_initial_weights=False,
                    track_higher_grads=work.second_order,
                ) as (fast, inner):
                    for _ in range(work.K):
                        inner.step(loss(fast(xs), ys))
                    outer = loss(fast(xq), yq) / work.T
                    if work.second_order:
                        outer.backward()
                        continue
                    # First order: the gradient at the adapted weights.
                    grads = torch.autograd.grad(outer, list(fast.parameters()))
                    for p, g in zip(parameters, grads, strict=True):
                        p.grad = g if p.grad is None else p.grad + g
            return collect()

        return step

    def torchopt(self, dtype: str) -> Step:
        """Its documented loop: MetaSGD, backward, recover the initial state."""
        work = self.work
        library = peer("torchopt", without=("graphviz",))
        if not work.second_order:
            raise AbsentError("MetaSGD always builds the second-order graph")
        model, tasks, collect = self._per_task(dtype)
        optimizer = library.MetaSGD(model, lr=work.lr)
        start = library.extract_state_dict(model, by="reference", detach_buffers=True)
        rested = library.extract_state_dict(optimizer, by="reference")
        loss = _maml.loss_of(work)

        def step() -> list[Tensor]:
            for xs, ys, xq, yq in tasks:
                for _ in range(work.K):
                    optimizer.step(loss(model(xs), ys))
                (loss(model(xq), yq) / work.T).backward()
                library.recover_state_dict(model, start)
                library.recover_state_dict(optimizer, rested)
            return collect()

        return step

    def jax(self, *, patches: bool = False) -> Callable[[str], Step]:
        """jit(grad(mean(vmap(task)))); with ``patches`` convolutions are gathers and products."""

        def build(dtype: str) -> Step:
            work = self.work
            jax = jax_for(self.options.device)
            jnp = jax.numpy
            f = _jax_functional(jax, work, patches)

            def loss(theta: Any, x: Any, y: Any) -> Any:
                out = f(theta, x)
                if work.regression:
                    return ((out - y) ** 2).mean()
                return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1).mean()

            def task(theta: Any, xs: Any, xq: Any, ys: Any, yq: Any) -> Any:
                for _ in range(work.K):
                    grads = jax.grad(loss)(theta, xs, ys)
                    if not work.second_order:
                        grads = jax.lax.stop_gradient(grads)
                    theta = [p - work.lr * g for p, g in zip(theta, grads, strict=True)]
                return loss(theta, xq, yq)

            def meta(*args: Any) -> Any:
                return jax.vmap(task, (None, 0, 0, 0, 0))(*args).mean()

            wrt = (0, 1, 2) if work.to_features else (0,)
            with double(jax, dtype):
                kind = getattr(jnp, dtype)
                theta = [jnp.asarray(p.detach().numpy(), kind) for p in self.model.parameters()]
                xs, ys, xq, yq = (
                    jnp.asarray(a, kind if a.dtype.kind == "f" else jnp.int32) for a in self.arrays
                )
            return jax_step(jax, dtype, jax.grad(meta, wrt), theta, xs, xq, ys, yq)

        return build

    def contestants(self) -> Iterator[Contestant]:
        """All who can do the work."""
        # With batch norm gradients have to be taken inside of vmap: the other order is wrong.
        plain = self.work.arch in ("mlp", "head")
        orders = ("vmap(grad)", "grad(vmap)") if plain else ("vmap(grad)",)
        yield Contestant("fastmeta", self.ours(), "ours")
        yield Contestant("fastmeta, vmap strategy", self.ours("vmap"), "ours")
        yield Contestant("fastmeta, CUDA graph", self.ours(graph=True), "ours")
        yield Contestant("autograd loop", self.autograd, "eager")
        yield Contestant("torch.func grad(vmap)", self.functional("grad(vmap)"), "eager")
        yield Contestant("torch.func vmap(grad)", self.functional("vmap(grad)"), "eager")
        for order in orders:
            compiled = self.functional(order, compiled=True)
            yield Contestant(f"torch.compile {order}", compiled, "compiled")
        yield Contestant("JAX jit", self.jax(), "jax")
        if self.work.arch == "conv4":
            yield Contestant("JAX jit, patches", self.jax(patches=True), "jax")
        yield Contestant("learn2learn", self.learn2learn)
        yield Contestant("higher", self.higher)
        yield Contestant("TorchOpt", self.torchopt)


def _jax_functional(jax: Any, work: Work, patches: bool) -> Callable[[Any, Any], Any]:
    """`_maml.functional` in JAX."""
    jnp, last = jax.numpy, len(work.sizes) - 2

    def norm(x: Any, weight: Any, bias: Any, axes: tuple[int, ...]) -> Any:
        mean = x.mean(axes)
        variance = ((x - mean) ** 2).mean(axes)
        return (x - mean) * jax.lax.rsqrt(variance + _maml.EPS) * weight + bias

    def mlp(theta: Any, x: Any) -> Any:
        take = iter(theta)
        for i in range(last + 1):
            x = x @ next(take).T + next(take)
            if i < last:
                if work.arch == "mlp_bn":
                    x = norm(x, next(take), next(take), (0,))
                x = jax.nn.relu(x)
        return x

    def convolve(x: Any, weight: Any) -> Any:
        if not patches:
            return jax.lax.conv_general_dilated(
                x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC")
            )
        side = -(-x.shape[1] // 2)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        end = 2 * side - 1
        columns = [x[:, i : i + end : 2, j : j + end : 2] for i in range(3) for j in range(3)]
        kernel = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
        return jnp.concatenate(columns, -1) @ kernel

    def conv(theta: Any, x: Any) -> Any:
        take = iter(theta)
        x = x.transpose(0, 2, 3, 1)
        for _ in range(last):
            x = convolve(x, next(take)) + next(take)
            x = jax.nn.relu(norm(x, next(take), next(take), (0, 1, 2)))
        return x.mean((1, 2)) @ next(take).T + next(take)

    return conv if work.arch == "conv4" else mlp


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case a workload."""
    for work in _maml.QUICK if options.quick else _maml.FULL:
        meeting = Meeting(work, options)
        numbers = sum(p.numel() for p in meeting.model.parameters()) * 2
        numbers += sum(np.size(a) for a in meeting.arrays)
        yield Case(
            name=work.title,
            contestants=list(meeting.contestants()),
            truth=meeting.truth,
            flops=_maml.flops(work),
            traffic=4.0 * numbers,
            checks={"float64": 1e-8, "float32": 0.1},
        )
    for rule, name in (("sgd", "SGD"), ("momentum", "momentum"), ("adam", "Adam")):
        yield from _update.cases(rule, options, f"update only, {name}: ")


if __name__ == "__main__":
    sys.exit(_harness.run("maml", "one meta-step: adapt, query loss, meta-gradient", cases))
