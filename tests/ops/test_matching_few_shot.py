"""Gradients of tasks that are small enough for their slopes to be kept, and of those just above."""

import pytest
import torch
from opcases import (
    Case,
    assert_same,
    attention_definition,
    error,
    gradients,
    isas,
    leaves,
    use_isa,
    weighted_sum,
)

import fastmeta as fm
from fastmeta import _native

SIMILARITIES = ("dot", "cosine", "sqeuclidean", "euclidean")
CASES = [
    Case("copied_rows", 2, 30, 40, 256, 5),
    Case("deep_for_queries", 1, 5, 300, 33, 4, absent=(1,)),
    Case("deep_for_supports", 1, 300, 7, 21, 3),
    Case("ragged", 9, 17, 50, 20, 6, padded=0.5),
    Case("kept_in_chunks", 1, 40, 800, 120, 4),
    Case("kept_ragged", 9, 17, 50, 60, 6, padded=0.5),
    Case("at_the_bound", 1, 32, 1024, 6, 5),
    Case("above_the_bound", 1, 32, 1032, 6, 5),
]


def outputs(function, query, support, labels, scale, classes, similarity, targets):
    if function is not None:
        logp = function(query, support, labels, classes, similarity, scale)
    elif targets is None:
        options = {"similarity": similarity, "scale": scale}
        return fm.matching_attention(query, support, labels, classes, **options)
    else:
        options = {"similarity": similarity, "scale": scale, "reduction": "none"}
        return fm.matching_nll(query, support, labels, targets, classes, **options)
    if targets is None:
        return logp
    losses = -logp.gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets < 0, 0, losses)


def run(case, similarity, fused, dtype, function=None):
    query, support, labels, targets, scale, _ = case.make(dtype, similarity=similarity)
    tensors = leaves(query, support, scale)
    value = outputs(
        function,
        *tensors[:2],
        labels,
        tensors[2],
        case.classes,
        similarity,
        targets if fused else None,
    )
    value = torch.where(value.isfinite(), value, 0)
    return gradients(weighted_sum(value), tensors)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_match_the_definition(case, similarity, fused, isa):
    truth = run(case, similarity, fused, torch.float64, attention_definition)
    with use_isa(isa):
        for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            for value, expected in zip(run(case, similarity, fused, dtype), truth, strict=True):
                size = max(1.0, expected.abs().max().item())
                assert error(value, expected) <= bound * size


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dim", [512, 67])
def test_a_task_alone_is_bit_equal_to_the_task_in_a_batch(similarity, dim):
    # A task alone is cut into panels and columns, a batch of nine into tasks.
    case = Case("batch", 9, 170, 120, dim, 6, padded=0.2)
    query, support, labels, _, _, _ = case.make(torch.float32, similarity=similarity)

    def grads(tasks):
        q, s, a = leaves(query[tasks], support[tasks], torch.full((len(tasks),), 0.7))
        logp = fm.matching_attention(q, s, labels[tasks], 6, similarity=similarity, scale=a)
        cotangent = torch.linspace(-1, 1, logp[0].numel()).reshape(logp[0].shape)
        return torch.autograd.grad(logp, (q, s, a), cotangent.expand_as(logp))

    batch = grads(list(range(9)))
    for t in (0, 4, 8):
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                alone = grads([t])
            finally:
                torch.set_num_threads(before)
            for one, all_ in zip(alone, batch, strict=True):
                assert_same(one[0], all_[t])


def forward_and_back(case, similarity, fused, keep, forward_isa, back_isa):
    """Result, similarities kept and gradients, by the raw ops."""
    query, support, labels, targets, scale, weight = case.make(torch.float32, similarity=similarity)
    ops = torch.ops.fastmeta
    op, back = (
        (ops.matching_nll, ops.matching_nll_backward)
        if fused
        else (ops.matching_attention, ops.matching_attention_backward)
    )
    weight = None if weight is None else weight.reshape(1, -1).float()
    ints = [labels, targets] if fused else [labels]
    tensors = (query, support, *ints, scale.reshape(1).float(), weight)
    with use_isa(forward_isa):
        out, lse, scores = op(*tensors, case.classes, similarity, keep)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    saved = (out, lse, scores)
    with use_isa(back_isa):
        grads = [back(grad, *tensors, *saved, case.classes, similarity) for _ in range(2)]
    return out, scores, *(g[:3] if weight is None else g for g in grads)


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", [*SIMILARITIES, "additive"])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 5)], ids=lambda c: c.name)
def test_kept_similarities_change_nothing(case, similarity, fused):
    for forward_isa in isas():
        for back_isa in isas():
            args = (case, similarity, fused)
            out, scores, grads, again = forward_and_back(*args, True, forward_isa, back_isa)
            if _native.cpu_module is not None:
                assert scores.shape[1] >= case.supports * case.queries
            wanted, none, recomputed, _ = forward_and_back(*args, False, forward_isa, back_isa)
            assert none.shape == (case.tasks, 0)
            assert_same(out, wanted)
            for value, second, expected in zip(grads, again, recomputed, strict=True):
                assert_same(value, second)
                # Under cosine the norms are summed in another order.
                if forward_isa == back_isa and similarity != "cosine":
                    assert_same(value, expected)
                else:
                    assert error(value, expected) <= 1e-4 * max(1, expected.abs().max().item())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("more_than_half_of_the_inputs", 2, 20, 30, 16, 4), torch.float32),
        (Case("more_than_the_cache", 1, 300, 300, 1024, 4), torch.float32),
        (Case("half", 2, 5, 6, 64, 3), torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_other_tasks_keep_no_similarities(case, dtype):
    query, support, labels, _, scale, _ = case.make(dtype, similarity="dot")
    args = (query, support, labels, scale.reshape(1).float(), None, case.classes, "dot", True)
    assert torch.ops.fastmeta.matching_attention(*args)[2].shape == (case.tasks, 0)


@pytest.mark.skipif(_native.cpu_module is None, reason="the reference keeps no similarities")
def test_similarities_of_another_task_are_refused():
    query, support, labels, _, scale, _ = CASES[0].make(torch.float32, similarity="dot")
    args = (query, support, labels, scale.reshape(1).float(), None)
    out, lse, scores = torch.ops.fastmeta.matching_attention(*args, 5, "dot", True)
    with pytest.raises(RuntimeError, match="scores"):
        torch.ops.fastmeta.matching_attention_backward(
            out, *args, out, lse, scores[:, 1:], 5, "dot"
        )


def test_batched_gradients_are_those_one_by_one():
    query, support, labels, _, scale, _ = CASES[0].make(torch.float32, similarity="cosine")
    query, support = leaves(query, support)
    logp = fm.matching_attention(query, support, labels, 5, similarity="cosine", scale=scale)
    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(3, *logp.shape, generator=generator)
    options = {"retain_graph": True}
    batched = torch.autograd.grad(
        logp, (query, support), cotangents, is_grads_batched=True, **options
    )
    for i, cotangent in enumerate(cotangents):
        single = torch.autograd.grad(logp, (query, support), cotangent, **options)
        for all_, one in zip(batched, single, strict=True):
            assert_same(all_[i], one)
