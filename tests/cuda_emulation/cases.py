"""Problems of the matching ops for the emulated kernels: made, defined in PyTorch, run."""

from __future__ import annotations

import opcases
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SIMILARITIES = ["dot", "cosine", "sqeuclidean", "euclidean", "additive"]


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the definition -----------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > 0, x / torch.where(length > 0, length, 1), 0)


def scores(query: Tensor, support: Tensor, similarity: str, weight: Tensor | None) -> Tensor:
    """Similarities of one task's rows, [Q, D] and [S, D] -> [Q, S]."""
    q, s = query.unsqueeze(1), support.unsqueeze(0)
    if similarity == "dot":
        return (q * s).sum(-1)
    if similarity == "cosine":
        return (unit(q) * unit(s)).sum(-1)
    if similarity == "sqeuclidean":
        return -(q - s).square().sum(-1)
    if similarity == "euclidean":
        return -torch.linalg.vector_norm(q - s, dim=-1)
    return (weight * torch.tanh(q + s)).sum(-1)


class Case:
    """Random ragged tasks: labels hold padding and strays, class C - 1 has no support."""

    def __init__(self, T, Q, S, C, D, similarity, dtype, *, seed=0, shared=False, offset=0):
        generator = torch.Generator().manual_seed(seed + 1000 * T + 100 * Q + 10 * S + C + D)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.shape, self.similarity, self.dtype, self.offset = (
            (T, Q, S, C, D),
            similarity,
            dtype,
            offset,
        )
        acc = acc_of(dtype)
        self.query, self.support = draw(T, Q, D).to(dtype), draw(T, S, D).to(dtype)
        self.scale = (1 + 0.3 * draw(1 if shared else T)).to(acc)
        self.weight = None
        if similarity == "additive":
            self.weight = draw(1 if shared else T, D).to(acc)
        self.labels = torch.randint(0, max(C - 1, 1), (T, S), generator=generator)
        if C == S:
            self.labels = torch.stack([torch.randperm(S, generator=generator) for _ in range(T)])
        elif S > 4:
            self.labels[:, 1] = -100
            self.labels[:, 3] = C
            self.labels[-1, S // 2 :] = -100
        self.allow_tf32 = False
        self.targets = torch.randint(0, C, (T, Q), generator=generator)
        if Q > 2:
            self.targets[0, 0], self.targets[-1, 1], self.targets[-1, 2] = -100, C, C - 1
        self.grad_logp, self.grad_nll = draw(T, Q, C).to(acc), draw(T, Q).to(acc)

    def define(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients by the definition and autograd, in ``dtype``."""
        T, Q, _, C, D = self.shape
        inputs = [self.query, self.support, self.scale]
        inputs += [] if self.weight is None else [self.weight]
        query, support, *numbers = (x.detach().to(dtype).requires_grad_() for x in inputs)
        scale = numbers[0].expand(T)
        weight = None if self.weight is None else numbers[1].expand(T, D)
        logp, lse = [], []
        for t in range(T):
            valid = (self.labels[t] >= 0) & (self.labels[t] < C)
            y = self.labels[t][valid]
            z = scale[t] * scores(
                query[t], support[t][valid], self.similarity, None if weight is None else weight[t]
            )
            lse.append(torch.logsumexp(z, 1))
            rows = [
                torch.logsumexp(z[:, y == c], 1) - lse[t]
                if (y == c).any()
                else z.new_full((Q,), -torch.inf)
                for c in range(C)
            ]
            logp.append(torch.stack(rows, 1))
        logp, lse = torch.stack(logp), torch.stack(lse)
        counted = (self.targets >= 0) & (self.targets < C)
        index = torch.where(counted, self.targets, 0).unsqueeze(-1)
        nll = torch.where(counted, -logp.gather(2, index).squeeze(-1), 0)

        def gradients(output: Tensor, grad: Tensor) -> list[Tensor]:
            loss = torch.where(output.isfinite(), output, 0).mul(grad.to(dtype)).sum()
            loss = loss + 0 * sum(x.sum() for x in (query, support, *numbers))
            wide = [x if x.shape[0] == T else x.expand(T, *x.shape[1:]) for x in numbers]
            if all(x.shape[0] == T for x in numbers):
                return list(torch.autograd.grad(loss, [query, support, *wide], retain_graph=True))
            return list(torch.autograd.grad(loss, [query, support, *numbers], retain_graph=True))

        result = {"logp": logp.detach(), "lse": lse.detach(), "nll": nll.detach()}
        names = ["query", "support", "scale", "weight"]
        for kind, output, grad in (("logp", logp, self.grad_logp), ("nll", nll, self.grad_nll)):
            for name, value in zip(names, gradients(output, grad), strict=False):
                result[f"{kind}_grad_{name}"] = value
        return result

    @classmethod
    def of(cls, case: opcases.Case, similarity: str, dtype: torch.dtype) -> Case:
        """One of the cases that the tests of the op share."""
        sizes = (case.tasks, case.queries, case.supports, case.classes, case.dim)
        made = cls(*sizes, similarity, dtype)
        query, support, made.labels, made.targets, scale, weight = case.make(
            dtype, similarity=similarity
        )
        made.query, made.support, made.scale = query, support, scale.reshape(1)
        made.weight = None if weight is None else weight.reshape(1, -1)
        return made

    # ---- the kernels ----------------------------------------------------------------------------

    def problem(self, emulation, keep: list, nll: bool):
        T, Q, S, C, D = self.shape
        key = torch.where((self.labels >= 0) & (self.labels < C), self.labels, C)
        order = key.argsort(dim=1, stable=True)
        counts = torch.nn.functional.one_hot(key, C + 1).sum(1)[:, :C]
        class_start = torch.nn.functional.pad(counts.cumsum(1), (1, 0))

        problem = emulation.module.MatchingProblem()
        dtype = next(name for name, kind in DTYPES.items() if kind == self.dtype)
        problem.dtype, problem.similarity = dtype, self.similarity
        problem.allow_tf32 = self.allow_tf32
        problem.T, problem.Q, problem.S, problem.C, problem.D = T, Q, S, C, D
        inputs = {"scale": self.scale, "labels": self.labels, "order": order}
        inputs["class_start"] = class_start
        if nll:
            inputs["targets"] = self.targets
        if self.weight is not None:
            inputs["weight"] = self.weight
        for name, value in inputs.items():
            keep.append(emulation.input(value))
            setattr(problem, name, keep[-1].address)
        for name in ("query", "support"):
            keep.append(emulation.input(getattr(self, name), self.offset))
            setattr(problem, name, keep[-1].address)
        for name in {"targets", "weight"} - inputs.keys():
            setattr(problem, name, 0)
        problem.scale_stride = int(self.scale.shape[0] == T)
        problem.weight_stride = D if self.weight is not None and self.weight.shape[0] == T else 0
        return problem

    def forward(self, emulation, *, nll: bool) -> tuple[Tensor, Tensor]:
        """Output and lse by the kernels."""
        T, Q, _, C, _ = self.shape
        keep: list = []
        problem = self.problem(emulation, keep, nll)
        out = emulation.output(*((T, Q) if nll else (T, Q, C)), dtype=acc_of(self.dtype))
        lse = emulation.output(T, Q, dtype=acc_of(self.dtype))
        emulation.module.matching_forward(problem, out.address, lse.address)
        return out.read(), lse.read()

    def run(self, emulation, *, nll: bool, keep_scores: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients by the kernels; ``keep_scores`` hands the forward's to the backward."""
        T, Q, S, C, D = self.shape
        acc, keep = acc_of(self.dtype), []
        problem = self.problem(emulation, keep, nll)
        out = emulation.output(*((T, Q) if nll else (T, Q, C)), dtype=acc)
        lse = emulation.output(T, Q, dtype=acc)
        scores = emulation.output(T, Q, S, dtype=acc) if keep_scores else None
        kept = scores.address if scores is not None else 0
        emulation.module.matching_forward(problem, out.address, lse.address, kept)

        grad = emulation.input(self.grad_nll if nll else self.grad_logp)
        grads = {
            "query": emulation.output(T, Q, D, dtype=self.dtype, offset=self.offset),
            "support": emulation.output(T, S, D, dtype=self.dtype, offset=self.offset),
            "scale": emulation.output(T, dtype=acc),
        }
        if self.weight is not None:
            grads["weight"] = emulation.output(T, D, dtype=acc)
        addresses = [g.address for g in grads.values()] + ([0] if self.weight is None else [])
        emulation.module.matching_backward(
            problem, grad.address, out.address, lse.address, *addresses, kept
        )
        kind = "nll" if nll else "logp"
        return {
            kind: out.read(),
            "lse": lse.read(),
            **{f"{kind}_grad_{name}": value.read() for name, value in grads.items()},
        }

    # ---- the double backward --------------------------------------------------------------------

    def directions(self, parts: str = "qsaw") -> dict[str, Tensor | None]:
        """Gradients of the backward's outputs; None, which stands for zero, for parts left out."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        T = self.shape[0]
        inputs = {"query": self.query, "support": self.support}
        inputs["scale"] = self.scale.expand(T)
        if self.weight is not None:
            inputs["weight"] = self.weight.expand(T, -1)
        keys = {"query": "q", "support": "s", "scale": "a", "weight": "w"}
        drawn = {
            name: torch.randn(value.shape, generator=generator).to(value.dtype)
            for name, value in inputs.items()
        }
        return {name: value if keys[name] in parts else None for name, value in drawn.items()}

    def define_second(self, dtype: torch.dtype, nll: bool, dots: dict) -> dict[str, Tensor]:
        """Gradients of the backward along ``dots`` by autograd on the definition, in ``dtype``."""
        T, _, _, C, _ = self.shape
        inputs = [self.query, self.support, self.scale.expand(T)]
        inputs += [] if self.weight is None else [self.weight.expand(T, -1)]
        tensors = [x.detach().to(dtype).requires_grad_() for x in inputs]
        query, support, scale, *weight = tensors
        grad = (self.grad_nll if nll else self.grad_logp).detach().to(dtype).requires_grad_()
        loss = 0 * sum(x.sum() for x in tensors) + 0 * grad.sum()
        for t in range(T):
            valid = (self.labels[t] >= 0) & (self.labels[t] < C)
            y = self.labels[t][valid]
            w = weight[0][t] if weight else None
            z = scale[t] * scores(query[t], support[t][valid], self.similarity, w)
            for c in y.unique().tolist():
                logp = torch.logsumexp(z[:, y == c], 1) - torch.logsumexp(z, 1)
                if nll:
                    hit = self.targets[t] == c
                    loss = loss - (logp * grad[t])[hit].sum()
                else:
                    loss = loss + (logp * grad[t][:, c]).sum()
        firsts = torch.autograd.grad(loss, tensors, create_graph=True)
        names = ["query", "support", "scale", "weight"]
        score = sum(
            (first * dots[name].to(dtype)).sum()
            for name, first in zip(names, firsts, strict=False)
            if dots[name] is not None
        )
        score = score + 0 * sum(x.sum() for x in firsts) + 0 * grad.sum()
        seconds = torch.autograd.grad(score, [grad, *tensors])
        return dict(zip(["grad", *names], seconds, strict=False))

    def run_second(self, emulation, *, nll: bool, dots: dict) -> dict[str, Tensor]:
        """The same by the kernels, from the outputs of the emulated forward."""
        T, Q, S, C, D = self.shape
        acc, keep = acc_of(self.dtype), []
        problem = self.problem(emulation, keep, nll)
        shape = (T, Q) if nll else (T, Q, C)
        out, lse = emulation.output(*shape, dtype=acc), emulation.output(T, Q, dtype=acc)
        emulation.module.matching_forward(problem, out.address, lse.address)

        given = []
        for name in ("query", "support", "scale", "weight"):
            dot = dots.get(name)
            given.append(0)
            if dot is not None:
                offset = self.offset if name in ("query", "support") else 0
                keep.append(emulation.input(dot, offset))
                given[-1] = keep[-1].address
        grad = emulation.input(self.grad_nll if nll else self.grad_logp)
        results = {
            "grad": emulation.output(*shape, dtype=acc),
            "query": emulation.output(T, Q, D, dtype=self.dtype, offset=self.offset),
            "support": emulation.output(T, S, D, dtype=self.dtype, offset=self.offset),
            "scale": emulation.output(T, dtype=acc),
        }
        if self.weight is not None:
            results["weight"] = emulation.output(T, D, dtype=acc)
        addresses = [r.address for r in results.values()] + ([0] if self.weight is None else [])
        emulation.module.matching_double_backward(
            problem, *given, grad.address, out.address, lse.address, *addresses
        )
        return {name: value.read() for name, value in results.items()}


def check(emulation, case: Case, nll: bool) -> dict[str, Tensor]:
    """Run the kernels and hold what they give against the definition; returns it."""
    got = case.run(emulation, nll=nll)
    truth, peer = case.define(torch.float64), case.define(acc_of(case.dtype))
    for name, value in shared_sums(got, truth).items():
        size = 0.0
        if "grad" in name:  # where its terms cancel, their rounding does not
            sizes = [v.abs().max() for k, v in truth.items() if k[:4] == name[:4] and v.numel()]
            size = 8 * max(map(float, sizes), default=0.0)
        if name.endswith("scale"):  # the sum of <gradient of a query, query> / scale
            products = truth[name.replace("scale", "query")] * case.query.double()
            size = max(size, float(products.abs().sum() / case.scale.abs().min()))
            size *= max(1.0, largest_logit(case))  # its rounding is that of every weight
        emulation.check(value, truth[name], peer[name], size, name)
    return got


def check_budget(emulation, case: Case, nll: bool) -> None:
    """The same by the budget that the op's tests on the CPU have, which counts large logits."""
    got = case.run(emulation, nll=nll)
    truth, peer = case.define(torch.float64), case.define(acc_of(case.dtype))
    logit = largest_logit(case)
    for name, value in shared_sums(got, truth).items():
        size = None
        if name.endswith("scale"):
            query = [truth[name.replace("scale", "query")]]
            size = opcases.gradient_sizes(case.query, query, case.scale)[2]
        opcases.assert_within_budget(
            value, truth[name], peer[name], case.dtype, name, logit=logit, magnitude=size
        )


def largest_logit(case: Case) -> float:
    """Largest absolute logit of valid pairs."""
    weight = None if case.weight is None else case.weight[0]
    return opcases.largest_logit(
        case.query, case.support, case.labels, case.similarity, case.scale.abs().max(), weight
    )


def shared_sums(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as the truth has them: of a number that the tasks share, the sum over them."""
    return {
        name: value if value.shape == truth[name].shape else value.sum(0, keepdim=True)
        for name, value in got.items()
    }
