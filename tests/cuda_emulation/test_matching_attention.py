"""The CUDA kernels of matching_attention and matching_nll, emulated, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SIMILARITIES = ["dot", "cosine", "sqeuclidean", "euclidean", "additive"]

# T, Q, S, C, D: ones; odd sizes; one tile exactly; tiles crossed on both sides; a class a support
# over several tiles; one class; slices of features crossed, in packs and one by one.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 3, 5, 4, 7),
    (1, 64, 64, 5, 16),
    (2, 67, 131, 4, 5),
    (1, 2, 70, 70, 8),
    (2, 4, 9, 1, 36),
    (1, 3, 7, 3, 132),
    (1, 2, 5, 2, 67),
]


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
        self.targets = torch.randint(0, C, (T, Q), generator=generator)
        if Q > 2:
            self.targets[0, 0], self.targets[-1, 1], self.targets[-1, 2] = -100, C, C - 1
        self.grad_logp, self.grad_nll = draw(T, Q, C).to(acc), draw(T, Q).to(acc)

    def define(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients by the definition and autograd, in ``dtype``."""
        T, Q, _, C, D = self.shape
        inputs = [self.query, self.support, self.scale]
        inputs += [] if self.weight is None else [self.weight]
        query, support, *numbers = (x.to(dtype).requires_grad_() for x in inputs)
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

    def run(self, emulation, *, nll: bool) -> dict[str, Tensor]:
        """Outputs and gradients by the kernels."""
        T, Q, S, C, D = self.shape
        acc, keep = acc_of(self.dtype), []
        problem = self.problem(emulation, keep, nll)
        out = emulation.output(*((T, Q) if nll else (T, Q, C)), dtype=acc)
        lse = emulation.output(T, Q, dtype=acc)
        emulation.module.matching_forward(problem, out.address, lse.address)

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
            problem, grad.address, out.address, lse.address, *addresses
        )
        kind = "nll" if nll else "logp"
        return {
            kind: out.read(),
            "lse": lse.read(),
            **{f"{kind}_grad_{name}": value.read() for name, value in grads.items()},
        }


def check(emulation, case: Case, nll: bool) -> dict[str, Tensor]:
    got = case.run(emulation, nll=nll)
    truth, peer = case.define(torch.float64), case.define(acc_of(case.dtype))
    for name, value in got.items():
        if (
            value.shape != truth[name].shape
        ):  # a number shared by the tasks: its gradient is their sum
            value = value.sum(0, keepdim=True)
        emulation.check(value, truth[name], peer[name], magnitude=magnitude(truth, name))
    return got


def magnitude(truth: dict[str, Tensor], name: str) -> float:
    """Size of the terms that a gradient sums: where they cancel, their rounding does not."""
    rows = [v.abs().max().item() for k, v in truth.items() if k.startswith(name[:4]) and v.numel()]
    return 8 * max(rows, default=0.0) if "grad" in name else 0.0


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_the_definition(emulation, shape, similarity, dtype, nll):
    if dtype in ("bfloat16", "float16") and shape[0] * shape[1] * shape[2] > 2000:
        shape = (1, 5, 66, 3, 12)  # storage is all that differs from float32
    check(emulation, Case(*shape, similarity, DTYPES[dtype]), nll)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["dot", "additive"])
def test_scale_and_weight_shared_by_the_tasks(emulation, similarity, nll):
    check(emulation, Case(3, 4, 6, 3, 8, similarity, torch.float32, shared=True), nll)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["dot", "additive"])
def test_rows_off_a_16_byte_boundary_are_read_one_by_one(emulation, similarity, dtype):
    aligned = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype])
    shifted = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype], offset=1)
    for name, value in check(emulation, aligned, False).items():
        assert torch.equal(value, shifted.run(emulation, nll=False)[name])


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "additive"])
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, similarity, nll):
    case = Case(2, 70, 67, 5, 20, similarity, torch.float32)
    first = case.run(emulation, nll=nll)
    schedules = [("random", 1, 2**31 - 1), ("random", 2, 3), ("forward", 0, 1), ("reverse", 0, 2)]
    for order, seed, max_grid in schedules:
        emulation.schedule(seed, order, max_grid)
        again = case.run(emulation, nll=nll)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_vectors_and_coincident_points(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 12, similarity, torch.float32)
    case.query[0, 1] = 0
    case.support[0, 2] = 0
    case.support[1, 0] = case.query[1, 0]
    got = check(emulation, case, nll)
    assert all(not value.isnan().any() for value in got.values())
    if similarity == "cosine":
        kind = "nll" if nll else "logp"
        assert (got[f"{kind}_grad_query"][0, 1] == 0).all()
        assert (got[f"{kind}_grad_support"][0, 2] == 0).all()


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_task_without_support_has_no_gradient(emulation, similarity, nll):
    case = Case(2, 4, 6, 3, 8, similarity, torch.float32)
    case.labels[1] = -100
    case.targets[:, :] = torch.tensor([0, 1, -100, 2])
    got = check(emulation, case, nll)
    kind = "nll" if nll else "logp"
    infinite = got[kind][1] == (torch.inf if nll else -torch.inf)
    assert infinite.equal(case.targets[1] >= 0) if nll else infinite.all()
    assert (got["lse"][1] == -torch.inf).all()
    for name, value in got.items():
        if "grad" in name:
            assert (value[1] == 0).all(), name


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_what_padding_and_ignored_queries_hold_is_never_read(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 8, similarity, torch.float32)
    clean = case.run(emulation, nll=nll)
    outside = (case.labels < 0) | (case.labels >= 3)
    case.support[outside] = torch.nan
    ignored = torch.zeros_like(case.targets, dtype=torch.bool)
    if nll:
        ignored = (case.targets < 0) | (case.targets >= 3)
        assert ignored.any()
        case.query[ignored] = torch.nan
    again = case.run(emulation, nll=nll)
    for name in clean:
        if name == "lse":  # of an ignored query: nobody's business
            assert torch.equal(clean[name][~ignored], again[name][~ignored])
        else:
            assert torch.equal(clean[name], again[name]), name
    assert (again[f"{'nll' if nll else 'logp'}_grad_support"][outside] == 0).all()


def test_not_a_number_is_passed_on(emulation):
    case = Case(1, 3, 6, 2, 4, "dot", torch.float32)
    case.labels[:] = torch.tensor([0, 0, 0, 1, 1, 1])
    case.query[0, 1] = torch.nan
    got = case.run(emulation, nll=False)
    assert got["logp"][0, 1].isnan().all()
    assert not got["logp"][0, [0, 2]].isnan().any()


def test_large_scores_neither_overflow_nor_vanish(emulation):
    case = Case(1, 4, 12, 3, 8, "dot", torch.float32)
    case.scale[:] = 1e4
    for nll in (False, True):
        got = check(emulation, case, nll)
        assert all(not value.isnan().any() for value in got.values())


def test_lengths_of_rows_neither_overflow_nor_vanish(emulation):
    case = Case(1, 3, 6, 3, 8, "cosine", torch.float32)
    small = case.run(emulation, nll=False)["logp"]
    case.query *= 2.0**70
    case.support *= 2.0**-80
    emulation.check(case.run(emulation, nll=False)["logp"], small.double(), small)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 4, 2, 0)], ids=str
)
def test_empty_sizes(emulation, shape, similarity):
    case = Case(*shape, similarity, torch.float32)
    for nll in (False, True):
        got = case.run(emulation, nll=nll)
        for name, value in got.items():
            if "grad" in name and shape[4]:
                assert (value == 0).all(), name
        if not shape[2]:
            assert (got["lse"] == -torch.inf).all()
        elif shape[0] and shape[1]:
            emulation.check(got["lse"], *[case.define(torch.float64)["lse"]] * 2)


def test_launches_fit_every_architecture(emulation):
    """Block and shared memory against what sm_75 gives; grids have one dimension, so any T fits."""
    for similarity in SIMILARITIES:
        for dtype, kind in DTYPES.items():
            Case(1, 2, 3, 2, 4, similarity, kind).run(emulation, nll=False)
            for launch in emulation.launches():
                shared = launch.shared_bytes + launch.static_shared_bytes
                assert launch.block <= 1024
                assert launch.grid <= 2**31 - 1
                assert shared <= 64 * 1024, (
                    launch.what,
                    dtype,
                )  # sm_75's opt-in limit, the smallest
                if (
                    kind != torch.float64
                ):  # two blocks a multiprocessor, with 1 KB each for the system
                    assert 2 * (shared + 1024) <= 64 * 1024, (launch.what, dtype)
