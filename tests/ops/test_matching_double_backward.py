"""Second derivatives of ``fm.matching_attention`` and ``fm.matching_nll`` against autograd's."""

import functools

import pytest
import torch
from opcases import (
    CASES,
    SIMILARITIES,
    SMALL,
    Case,
    assert_same,
    attention_definition,
    error,
    finite_weights,
    gradients,
    isas,
    leaves,
    use_isa,
)

import fastmeta as fm

#: Chunks of one task; classes above and below the size that blocks keep whole.
LARGE = [Case("tall", 1, 3, 1500, 17, 2), Case("broad", 1, 700, 40, 9, 3)]
PARTS = {"all": (0, 1, 2, 3), "query": (0,), "support": (1,), "scale": (2,)}


def attention(query, support, labels, targets, scale, weight, classes, similarity):
    logp = fm.matching_attention(
        query, support, labels, classes, similarity=similarity, scale=scale, weight=weight
    )
    return torch.where(logp.isinf(), 0, logp)


def attention_truth(query, support, labels, targets, scale, weight, classes, similarity):
    logp = attention_definition(query, support, labels, classes, similarity, scale, weight)
    return torch.where(logp.isinf(), 0, logp)


def nll(query, support, labels, targets, scale, weight, classes, similarity):
    loss = fm.matching_nll(
        query,
        support,
        labels,
        targets,
        classes,
        similarity=similarity,
        scale=scale,
        weight=weight,
        reduction="none",
    )
    return torch.where(loss.isinf(), 0, loss)


def nll_truth(query, support, labels, targets, scale, weight, classes, similarity):
    logp = attention_truth(query, support, labels, targets, scale, weight, classes, similarity)
    counted = targets >= 0
    picked = logp.gather(2, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, -picked, 0)


def second_derivatives(function, case, similarity, tensors, ints, parts):
    """Gradients, to all inputs and to grad, of a function of the gradients named by ``parts``."""
    value = function(*tensors[:2], *ints, *tensors[2:], case.classes, similarity)
    grad = finite_weights(value.shape).to(value.dtype).requires_grad_()
    present = [t for t in tensors if t is not None]
    firsts = torch.autograd.grad(value, present, grad, create_graph=True)
    picked = [firsts[i] for i in parts if i < len(firsts)]
    score = sum((finite_weights(g.shape).to(g.dtype) * g).sum() for g in picked)
    return gradients(score, [grad, *present])


@functools.cache
def truth_of(case, similarity, dtype, fused, parts):
    query, support, labels, targets, scale, weight = case.make(dtype, similarity=similarity)
    tensors = leaves(*(None if t is None else t.double() for t in (query, support, scale, weight)))
    function = nll_truth if fused else attention_truth
    return second_derivatives(function, case, similarity, tensors, (labels, targets), parts)


def ours(case, similarity, dtype, fused, parts):
    query, support, labels, targets, scale, weight = case.make(dtype, similarity=similarity)
    tensors = leaves(query, support, scale, weight)
    function = nll if fused else attention
    return second_derivatives(function, case, similarity, tensors, (labels, targets), parts)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[7], *LARGE], ids=lambda c: c.name)
def test_matches_autograd_on_the_definition(case, similarity, fused, isa):
    truth = truth_of(case, similarity, torch.float64, fused, PARTS["all"])
    with use_isa(isa):
        found = ours(case, similarity, torch.float64, fused, PARTS["all"])
    for value, expected in zip(found, truth, strict=True):
        assert error(value, expected) < 1e-9 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("part", ["query", "support", "scale"])
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradients_that_nobody_asked_for_count_as_zero(similarity, fused, part):
    case = CASES[5]
    truth = truth_of(case, similarity, torch.float64, fused, PARTS[part])
    found = ours(case, similarity, torch.float64, fused, PARTS[part])
    for value, expected in zip(found, truth, strict=True):
        assert error(value, expected) < 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_error_is_within_twice_pytorchs_own(similarity, fused):
    case = CASES[2]
    truth = truth_of(case, similarity, torch.float32, fused, PARTS["all"])
    found = ours(case, similarity, torch.float32, fused, PARTS["all"])
    query, support, labels, targets, scale, weight = case.make(torch.float32, similarity=similarity)
    eager = second_derivatives(
        nll_truth if fused else attention_truth,
        case,
        similarity,
        leaves(query, support, scale, weight),
        (labels, targets),
        PARTS["all"],
    )
    for value, expected, own in zip(found, truth, eager, strict=True):
        size = expected.abs().max().item()
        assert error(value, expected) <= 2 * error(own, expected) + 4e-6 * size


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", [CASES[3], CASES[5], *LARGE], ids=lambda c: c.name)
def test_low_precision_rounds_its_results_only(case, similarity, dtype, isa):
    truth = truth_of(case, similarity, dtype, False, PARTS["all"])
    with use_isa(isa):
        found = ours(case, similarity, dtype, False, PARTS["all"])
    assert [g.dtype for g in found[1:3]] == [dtype, dtype]
    for value, expected in zip(found, truth, strict=True):
        # The first derivatives are rounded to dtype, and so are their weights in the score.
        size = expected.abs().max().item()
        assert error(value, expected) < 16 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_bit_equal_for_any_number_of_threads(similarity):
    for case in (CASES[2], *LARGE):
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results.append(ours(case, similarity, torch.float32, False, PARTS["all"]))
            finally:
                torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_same(a, b)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_vectors_and_coincident_points_stay_finite(similarity):
    query, support, labels, _, scale, weight = SMALL.make(similarity=similarity)
    query[0, 0] = 0
    support[0, 1] = 0
    support[1, 0] = query[1, 0]
    tensors = leaves(query, support, scale, weight)
    found = second_derivatives(attention, SMALL, similarity, tensors, (labels, None), PARTS["all"])
    truth = second_derivatives(
        attention_truth,
        SMALL,
        similarity,
        leaves(query, support, scale, weight),
        (labels, None),
        PARTS["all"],
    )
    for value, expected in zip(found, truth, strict=True):
        assert error(value, expected) < 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(("similarity", "fused"), [("cosine", True), ("additive", False)])
def test_opcheck(similarity, fused):
    query, support, labels, targets, scale, weight = SMALL.make(similarity=similarity)
    ints = (labels, targets) if fused else (labels,)
    name = "matching_nll" if fused else "matching_attention"
    scale, weight = scale.reshape(1), None if weight is None else weight.reshape(1, -1)
    with torch.no_grad():
        out, lse, scores = getattr(torch.ops.fastmeta, name)(
            query, support, *ints, scale, weight, 4, similarity
        )
        grad = torch.randn_like(out)
        given = getattr(torch.ops.fastmeta, f"{name}_backward")(
            grad, query, support, *ints, scale, weight, out, lse, scores, 4, similarity
        )
    cotangents = [torch.randn_like(g) for g in given]
    cotangents[2] = None
    args = (*cotangents, grad, query, support, *ints, scale, weight, out, lse, 4, similarity)
    op = getattr(torch.ops.fastmeta, f"{name}_double_backward").default
    torch.library.opcheck(op, args)


def test_vmap_of_second_derivatives_is_the_loop():
    query, support, labels, _, scale, _ = SMALL.make()
    stacked = torch.stack([query, 0.5 * query, -query])

    def penalty(q):
        def loss(q):
            return attention(q, support, labels, None, scale, None, 4, "cosine").square().sum()

        return torch.func.grad(loss)(q).square().sum()

    mapped = torch.vmap(torch.func.grad(penalty))(stacked)
    looped = torch.stack([torch.func.grad(penalty)(q) for q in stacked])
    torch.testing.assert_close(mapped, looped, rtol=1e-11, atol=1e-11)
