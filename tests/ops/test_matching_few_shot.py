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

SIMILARITIES = ("dot", "cosine", "sqeuclidean", "euclidean")
CASES = [
    Case("copied_rows", 2, 30, 40, 256, 5),
    Case("deep_for_queries", 1, 5, 300, 33, 4, absent=(1,)),
    Case("deep_for_supports", 1, 300, 7, 21, 3),
    Case("ragged", 9, 17, 50, 20, 6, padded=0.5),
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
