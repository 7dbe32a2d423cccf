"""``fm.matching_attention`` against its definition."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opcases import (
    CASES,
    SIMILARITIES,
    SMALL,
    Case,
    assert_same,
    assert_within_budget,
    attention_definition,
    eager_attention,
    error,
    gradient_sizes,
    gradients,
    isas,
    largest_logit,
    leaves,
    use_isa,
    weighted_sum,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastmeta as fm


def run(query, support, labels, scale, weight, classes, similarity, **options):
    return fm.matching_attention(
        query,
        support,
        labels,
        classes,
        similarity=similarity,
        scale=scale,
        weight=weight,
        **options,
    )


@functools.cache
def truth_of(case, similarity, dtype, seed=0):
    """Value and gradients by float64 autograd on the definition; the same for all instruction sets."""
    query, support, labels, _, scale, weight = case.make(dtype, seed, similarity)
    tensors = leaves(*(None if t is None else t.double() for t in (query, support, scale, weight)))
    q, s, a, w = tensors
    value = attention_definition(q, s, labels, case.classes, similarity, a, w)
    return value, gradients(weighted_sum(value), tensors)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition_in_float64(case, similarity, isa):
    truth, truth_grads = truth_of(case, similarity, torch.float64)
    query, support, labels, _, scale, weight = case.make(similarity=similarity)
    tensors = leaves(query, support, scale, weight)
    with use_isa(isa):
        value = run(*tensors[:2], labels, *tensors[2:], case.classes, similarity)
        grads = gradients(weighted_sum(value), tensors)
    assert error(value.detach(), truth.detach()) < 1e-11
    for grad, expected in zip(grads, truth_grads, strict=True):
        assert error(grad, expected) < 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3], CASES[8]], ids=lambda c: c.name)
def test_error_is_within_twice_pytorchs_own(case, similarity, dtype, isa):
    truth, truth_grads = truth_of(case, similarity, dtype)
    query, support, labels, _, scale, weight = case.make(dtype, similarity=similarity)
    eager_tensors = leaves(query, support, scale.to(dtype), weight)
    q, s, a, w = eager_tensors
    eager = eager_attention(q, s, labels, case.classes, similarity, a, w)
    eager_grads = gradients(weighted_sum(eager), eager_tensors)
    tensors = leaves(query, support, scale, weight)
    with use_isa(isa):
        value = run(*tensors[:2], labels, *tensors[2:], case.classes, similarity)
        grads = gradients(weighted_sum(value), tensors)
    assert value.dtype == dtype
    assert [g.dtype for g in grads[:2]] == [dtype, dtype]
    logit = largest_logit(query, support, labels, similarity, scale, weight)
    sizes = gradient_sizes(query, truth_grads, scale)
    assert_within_budget(
        value.detach(), truth.detach(), eager.detach(), dtype, "value", logit=logit
    )
    for i, (grad, expected, own) in enumerate(zip(grads, truth_grads, eager_grads, strict=True)):
        assert_within_budget(
            grad, expected, own, dtype, f"gradient {i}", logit=logit, magnitude=sizes[i]
        )


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck_and_gradgradcheck(similarity):
    query, support, labels, _, scale, weight = SMALL.make(similarity=similarity)
    inputs = tuple(t for t in leaves(query, support, scale, weight) if t is not None)

    def probs(query, support, scale, weight=None):
        return run(query, support, labels, scale, weight, 4, similarity, output="probs")

    assert gradcheck(probs, inputs)
    assert gradgradcheck(probs, inputs)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_third_order_matches_the_definition(similarity):
    query, support, labels, _, scale, weight = SMALL.make(similarity=similarity)

    def third(function):
        q = query.clone().requires_grad_()
        first = torch.autograd.grad(weighted_sum(function(q)), q, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), q, create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), q)[0]

    ours = third(lambda q: run(q, support, labels, scale, weight, 4, similarity))
    truth = third(lambda q: attention_definition(q, support, labels, 4, similarity, scale, weight))
    assert error(ours, truth) < 1e-8 * truth.abs().max().item()


@pytest.mark.parametrize(
    ("similarity", "requires_grad"), [("cosine", True), ("additive", True), ("euclidean", False)]
)
def test_opcheck(similarity, requires_grad):
    query, support, labels, _, scale, weight = SMALL.make(torch.float64, similarity=similarity)
    scale = scale.reshape(1)
    weight = None if weight is None else weight.reshape(1, -1)
    if requires_grad:
        query, support, scale, weight = leaves(query, support, scale, weight)
    for q in (query, query.mT.contiguous().mT):
        args = (q, support, labels, scale, weight, 4, similarity)
        torch.library.opcheck(torch.ops.fastmeta.matching_attention.default, args)
        with torch.no_grad():
            logp, lse, scores = torch.ops.fastmeta.matching_attention(*args)
            grad = torch.randn_like(logp)
        back = (grad, *args[:5], logp, lse, scores, 4, similarity)
        torch.library.opcheck(torch.ops.fastmeta.matching_attention_backward.default, back)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_functorch_transforms(similarity):
    query, support, labels, _, scale, weight = SMALL.make(similarity=similarity)

    def loss(q, s):
        return weighted_sum(run(q, s, labels, scale, weight, 4, similarity))

    def truth(q, s):
        return weighted_sum(attention_definition(q, s, labels, 4, similarity, scale, weight))

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: (torch.func.jacrev(torch.func.grad(f)),),
        lambda f: (torch.func.grad(lambda q, s: torch.func.grad(f)(q, s).square().sum()),),
    ):
        ours, expected = transform(loss), transform(truth)
        if isinstance(ours, tuple):
            ours, expected = ours[0], expected[0]
        got, want = ours(query, support), expected(query, support)
        for g, w in zip(
            torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True
        ):
            assert error(g, w) < 1e-9 * max(1.0, w.abs().max().item())


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, None)], ids=str
)
def test_vmap_is_the_loop(in_dims):
    query, support, labels, _, scale, _ = SMALL.make()
    batch = 3
    stacked = []
    for i, (tensor, dim) in enumerate(zip((query, support, scale), in_dims, strict=True)):
        factors = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)
        copies = [tensor * f for f in factors]
        stacked.append(tensor if dim is None else torch.stack(copies, min(dim, tensor.dim())))
        assert i < 3

    def loss(q, s, a):
        return weighted_sum(run(q, s, labels, a, None, 4, "cosine"))

    def pick(tensor, dim, i):
        return tensor if dim is None else tensor.select(dim, i)

    for function in (loss, torch.func.grad(loss), torch.func.grad(loss, argnums=2)):
        mapped = torch.vmap(function, in_dims=in_dims)(*stacked)
        looped = torch.stack(
            [
                function(*(pick(t, d, i) for t, d in zip(stacked, in_dims, strict=True)))
                for i in range(batch)
            ]
        )
        torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    query, support, labels, _, scale, _ = SMALL.make()

    def loss(q, s):
        return weighted_sum(run(q, s, labels, scale, None, 4, "cosine"))

    q, s = leaves(query, support)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(q, s), (q, s)), torch.autograd.grad(loss(q, s), (q, s))
    )
    second = lambda q, s: torch.func.grad(lambda q: torch.func.grad(loss)(q, s).square().sum())(q)  # noqa: E731
    got = torch.compile(second, fullgraph=True, backend="aot_eager")(query, support)
    torch.testing.assert_close(got, second(query, support))


def test_exports_to_the_op():
    query, support, labels, _, _, _ = SMALL.make(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, query, support, labels):
            return fm.matching_attention(query, support, labels, 4)

    program = torch.export.export(Model(), (query, support, labels))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "fastmeta.matching_attention.default" in names
    torch.testing.assert_close(
        program.module()(query, support, labels), Model()(query, support, labels)
    )


def test_forward_mode_raises_instead_of_a_silent_zero():
    query, support, labels, _, _, _ = SMALL.make()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda q: fm.matching_attention(q, support, labels, 4), (query,), (query,))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        fm.matching_attention(forward_ad.make_dual(query, query), support, labels, 4)


def test_scale_per_task_and_its_gradient():
    query, support, labels, _, _, _ = CASES[3].make()
    scale = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = run(query, support, labels, scale, None, 4, "dot")
    truth = attention_definition(query, support, labels, 4, "dot", scale)
    assert error(value.detach(), truth.detach()) < 1e-11
    got, want = (torch.autograd.grad(weighted_sum(v), scale)[0] for v in (value, truth))
    assert error(got, want) < 1e-10


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_bit_equal_for_any_number_of_threads(similarity):
    results = []
    for case in (
        CASES[2],
        CASES[8],
        Case("tall", 1, 3, 4000, 17, 4),
        Case("broad", 1, 2000, 6, 9, 3),
    ):
        query, support, labels, _, scale, weight = case.make(torch.float32, similarity=similarity)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                tensors = leaves(query, support, scale, weight)
                value = run(*tensors[:2], labels, *tensors[2:], case.classes, similarity)
                results.append([value.detach(), *gradients(weighted_sum(value), tensors)])
            finally:
                torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_same(a, b)
        results.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_log_probabilities_in_float32(dtype):
    query, support, labels, _, _, _ = CASES[1].make(torch.float32)
    q, s = leaves(query, support)
    with torch.autocast("cpu", dtype):
        low = q @ torch.eye(16)
        assert low.dtype == dtype
        logp = fm.matching_attention(low, s, labels, 5)
    assert logp.dtype == torch.float32
    grads = torch.autograd.grad(weighted_sum(logp), (q, s))
    truth = attention_definition(
        query.to(dtype).double(), support.double(), labels, 5, "cosine", 1.0
    )
    assert error(logp.detach(), truth) < 1e-5
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 40, 60, 70, 9))),
    similarity=st.sampled_from(SIMILARITIES),
    padded=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_any_shape(sizes, similarity, padded, seed):
    tasks, queries, supports, dim, classes = sizes
    case = Case("any", tasks, queries, supports, dim, classes, padded=padded)
    truth, truth_grads = truth_of.__wrapped__(case, similarity, torch.float64, seed)
    query, support, labels, _, scale, weight = case.make(similarity=similarity, seed=seed)
    tensors = leaves(query, support, scale, weight)
    value = run(*tensors[:2], labels, *tensors[2:], classes, similarity)
    assert error(value.detach(), truth.detach()) < 1e-10
    for grad, expected in zip(gradients(weighted_sum(value), tensors), truth_grads, strict=True):
        assert error(grad, expected) < 1e-9 * max(1.0, expected.abs().max().item())
