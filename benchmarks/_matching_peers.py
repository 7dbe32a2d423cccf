"""Contestants of matching attention: ours, plain PyTorch, compilers, libraries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from benchmarks import _matching as m
from benchmarks._harness import Case, Contestant, Step
from benchmarks._matching import Inputs, Tensors, Work
from benchmarks._peers import AbsentError, double, jax_for, jax_step, peer


def contestants(
    work: Work, inputs: Inputs, output: str, options: argparse.Namespace
) -> Iterator[Contestant]:
    """All who can do the work; ``output`` is "log_probs", "probs" or "nll"."""

    def by_torch(function: Callable[[Work, Tensors], Tensor], *, fused: bool = False) -> Any:
        def build(dtype: str) -> Step:
            x = m.tensors(work, inputs, dtype, options.device)
            if fused:
                return m.torch_step(x, work, lambda: function(work, x))
            return m.torch_step(x, work, lambda: m.head(output, x, function(work, x)))

        return build

    def by_compile(function: Callable[[Work, Tensors], Tensor], *, fused: bool = False) -> Any:
        def build(dtype: str) -> Step:
            if not options.compile:
                raise AbsentError("asked for by --compile")
            torch._dynamo.reset()
            x = m.tensors(work, inputs, dtype, options.device)

            def source(q: Tensor, s: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
                y = replace(x, query=q, support=s, scale=scale, weight=weight)
                return function(work, y) if fused else m.head(output, y, function(work, y))

            compiled = torch.compile(source, fullgraph=True, dynamic=False)
            return m.torch_step(x, work, lambda: compiled(x.query, x.support, x.scale, x.weight))

        return build

    def ours(dtype: str) -> Step:
        x = m.tensors(work, inputs, dtype, options.device)
        kw: dict[str, Any] = {
            "similarity": work.similarity,
            "scale": x.scale,
            "weight": x.weight,
            "lengths": x.lengths,
        }
        if output == "nll":
            call = lambda: fm.matching_nll(  # noqa: E731
                x.query, x.support, x.labels, x.targets, work.C, **kw
            )
        else:
            call = lambda: fm.matching_attention(  # noqa: E731
                x.query, x.support, x.labels, work.C, output=output, **kw
            )
        return m.torch_step(x, work, call)

    dense = work.T * work.S * max(work.Q, work.C) < 5e8  # one-hot labels or weights fit in memory
    inner = work.similarity in ("dot", "cosine", "sqeuclidean")

    def by_jax(segment: bool) -> Callable[[str], Step]:
        return lambda dtype: by_jit(work, inputs, output, options, dtype, segment)

    yield Contestant("fastmeta", ours, "ours")
    if dense:
        yield Contestant("eager one-hot", by_torch(m.one_hot), "eager")
        yield Contestant("eager scatter", by_torch(m.scatter), "eager")
        if output == "nll":
            yield Contestant("eager logsumexp", by_torch(m.masked_logsumexp, fused=True), "eager")
    if work.T == 1:
        yield Contestant(
            "eager index_add" if dense else "eager index_add, query blocks",
            by_torch(m.index_add if dense else m.chunked),
            "eager",
        )
    if inner and dense:
        yield Contestant("SDPA one-hot", by_torch(m.sdpa), "eager")
    if dense:
        yield Contestant("torch.compile one-hot", by_compile(m.one_hot), "compiled")
        yield Contestant("torch.compile scatter", by_compile(m.scatter), "compiled")
        if output == "nll":
            yield Contestant(
                "torch.compile logsumexp", by_compile(m.masked_logsumexp, fused=True), "compiled"
            )
        yield Contestant("JAX jit one-hot", by_jax(False), "jax")
    yield Contestant("JAX jit segment_sum", by_jax(True), "jax")
    if inner and work.C <= 20:
        yield Contestant("KeOps", lambda d: keops_step(work, inputs, output, options, d))
    if work.similarity == "cosine" and not work.ragged and output != "probs":
        yield Contestant(
            "easyfsl",
            lambda d: easyfsl_step(work, inputs, output, options, d),
            tolerance=0.05,
            note="log(p + 1e-6), a task at a time",
        )


def by_jit(
    work: Work, inputs: Inputs, output: str, options: argparse.Namespace, dtype: str, segment: bool
) -> Step:
    """The same arithmetic in one jitted function, value and gradients together."""
    jax = jax_for(options.device)
    jnp = jax.numpy

    def logits_of(q: Any, s: Any, scale: Any, weight: Any) -> Any:
        if work.similarity == "cosine":
            q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
            s = s / jnp.linalg.norm(s, axis=-1, keepdims=True)
        if work.similarity == "additive":
            return (jnp.tanh(q[:, :, None] + s[:, None]) @ weight) * scale
        z = jnp.einsum("tqd,tsd->tqs", q, s)
        if work.similarity in ("sqeuclidean", "euclidean"):
            z = 2 * z - (s * s).sum(-1)[:, None]
        if work.similarity == "euclidean":
            z = -jnp.sqrt(jnp.maximum((q * q).sum(-1)[:, :, None] - z, 0))
        return z * scale

    def value(leaves: Any, labels: Any, targets: Any, mask: Any) -> Any:
        z = logits_of(*leaves)
        if mask is not None:
            z = jnp.where(mask[:, None], z, -jnp.inf)
        w = jax.nn.softmax(z, axis=-1)
        if segment:
            sums = jax.vmap(lambda w, y: jax.ops.segment_sum(w.T, y, work.C).T)(w, labels)
        else:
            sums = jnp.einsum("tqs,tsc->tqc", w, jax.nn.one_hot(labels, work.C, dtype=w.dtype))
        if output == "probs":
            return sums
        if output == "log_probs":
            return jnp.log(sums)
        return -jnp.log(jnp.take_along_axis(sums, targets[:, :, None], axis=2)).mean()

    def both(leaves: Any, labels: Any, targets: Any, mask: Any, cotangent: Any) -> Any:
        out, pullback = jax.vjp(lambda leaves: value(leaves, labels, targets, mask), leaves)
        grads = pullback(cotangent if out.ndim else jnp.ones_like(out))[0]
        return [out, *(g for g in grads if g is not None)]

    def three(
        leaves: Any, labels: Any, targets: Any, mask: Any, cotangent: Any, directions: Any
    ) -> Any:
        def along(leaves: Any, directions: Any) -> Any:
            first = both(leaves, labels, targets, mask, cotangent)
            pairs = zip(first[1:], directions, strict=True)
            return sum(jnp.vdot(g, d) for g, d in pairs), first

        second, first = jax.grad(along, has_aux=True)(leaves, directions)
        return [*first, *(g for g in second if g is not None)]

    with double(jax, dtype):
        kind = getattr(jnp, dtype)
        leaves = tuple(
            None if a is None else jnp.asarray(a, kind)
            for a in (inputs.query, inputs.support, inputs.scale, inputs.weight)
        )
        rest = (
            jnp.asarray(inputs.labels, jnp.int32),
            jnp.asarray(inputs.targets, jnp.int32),
            None if inputs.mask is None else jnp.asarray(inputs.mask),
        )
        cotangent = jnp.asarray(inputs.cotangent, kind)
        directions = [jnp.asarray(direction, kind) for direction in inputs.along]
    if work.second:
        return jax_step(jax, dtype, three, leaves, *rest, cotangent, directions)
    if work.backward:
        return jax_step(jax, dtype, both, leaves, *rest, cotangent)
    return jax_step(jax, dtype, value, leaves, *rest)


def keops_step(
    work: Work, inputs: Inputs, output: str, options: argparse.Namespace, dtype: str
) -> Step:
    """KeOps' lazy softmax-weighted sum with one-hot values."""
    lazy = peer("pykeops.torch").LazyTensor
    if not options.compile:
        raise AbsentError("compiles C++ at run time: asked for by --compile")
    if work.ragged:
        raise AbsentError("no mask over a batch of tasks")
    x = m.tensors(work, inputs, dtype, options.device)

    def step() -> Tensor:
        q, s = x.query, x.support
        if work.similarity == "cosine":
            q, s = F.normalize(q, dim=-1), F.normalize(s, dim=-1)
        values = lazy(F.one_hot(x.labels, work.C).to(q.dtype).unsqueeze(1).contiguous())
        if work.similarity == "sqeuclidean":
            root = x.scale.sqrt()
            z = -((lazy((q * root).unsqueeze(2)) - lazy((s * root).unsqueeze(1))) ** 2).sum(-1)
        else:
            z = lazy((q * x.scale).unsqueeze(2)) | lazy(s.unsqueeze(1))
        return m.head(output, x, z.sumsoftmaxweight(values, dim=2))

    return m.torch_step(x, work, step)


def easyfsl_step(
    work: Work, inputs: Inputs, output: str, options: argparse.Namespace, dtype: str
) -> Step:
    """MatchingNetworks of easyfsl on embeddings: no backbone, no context encoders, task by task."""
    module = peer("easyfsl.methods.matching_networks", without=("torchvision",))

    class Matching(module.MatchingNetworks):  # type: ignore[misc, name-defined]
        def encode_support_features(self, support_features: Tensor) -> Tensor:
            return support_features

        def encode_query_features(self, query_features: Tensor) -> Tensor:
            return query_features

    identity = torch.nn.Identity
    net = Matching(
        identity(), feature_dimension=work.D, support_encoder=identity(), query_encoder=identity()
    )
    x = m.tensors(work, inputs, dtype, options.device)

    def step() -> Tensor:
        query = F.normalize(x.query, dim=-1) * x.scale  # it normalises the support alone
        rows = []
        for t in range(work.T):
            net.process_support_set(x.support[t], x.labels[t])
            rows.append(net(query[t]))
        logp = torch.stack(rows)
        if output == "log_probs":
            return logp
        return F.nll_loss(logp.flatten(0, 1), x.targets.flatten())

    return m.torch_step(x, work, step)


def cases(
    options: argparse.Namespace, output: str, works: Iterable[Work] | None = None
) -> Iterator[Case]:
    """One case a workload and direction."""
    size = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    for work in m.works(options) if works is None else works:
        inputs = m.draw(work, options.dtype)
        supports = work.T * work.S if inputs.lengths is None else int(inputs.lengths.sum())
        # Products: scores; the gradients of query and support; the scores' derivative along two
        # directions; and from two sets of coefficients, two gradients each.
        passes = 9 if work.second else 3 if work.backward else 1
        result = work.T * work.Q * (1 if output == "nll" else work.C)
        floats = work.T * work.Q * work.D + supports * work.D
        moved = floats * (1 + work.backward + work.second) + result
        yield Case(
            name=work.title,
            contestants=list(contestants(work, inputs, output, options)),
            truth=lambda work=work, inputs=inputs: m.truth(work, inputs, output),  # type: ignore[misc]
            flops=passes * 2.0 * supports * work.Q * work.D,
            traffic=size * moved + 8.0 * supports,
        )
