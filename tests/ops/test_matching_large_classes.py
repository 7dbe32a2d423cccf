"""Gradients where a class has more supports than a block of the kernels has rows."""

import pytest
import torch
from opcases import (
    eager_attention,
    error,
    gradient_sizes,
    gradients,
    isas,
    leaves,
    use_isa,
    weighted_sum,
)

import fastmeta as fm

CLASSES, QUERIES, DIM = 3, 20, 24


def problem(supports):
    query, support = torch.randn(1, QUERIES, DIM), torch.randn(1, supports, DIM)
    labels = torch.arange(supports) % CLASSES  # two large classes ...
    labels[labels == 2] = 1
    labels[:50] = 2  # ... and a small one
    labels[100:140] = -100
    targets = torch.arange(QUERIES) % CLASSES
    return query, support, labels[None], targets[None]


def logp_of(function, query, support, labels, targets, scale, similarity, fused):
    if function is not None:
        valid = labels[0] >= 0
        logp = function(query, support[:, valid], labels[:, valid], CLASSES, similarity, scale)
        return logp.gather(2, targets.unsqueeze(-1)).squeeze(-1).neg() if fused else logp
    options = {"similarity": similarity, "scale": scale}
    if fused:
        return fm.matching_nll(
            query, support, labels, targets, CLASSES, reduction="none", **options
        )
    return fm.matching_attention(query, support, labels, CLASSES, **options)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize(
    ("similarity", "scale"),
    [("cosine", 10.0), ("cosine", 1000.0), ("sqeuclidean", 5.0), ("euclidean", 5.0)],
)
# The backward takes classes of up to 1280 supports whole, and measures larger ones before.
@pytest.mark.parametrize("supports", [1800, 6000])
def test_error_is_within_twice_pytorchs_own(supports, similarity, scale, fused, isa):
    query, support, labels, targets = problem(supports)

    def run(function, dtype):
        tensors = leaves(query.to(dtype), support.to(dtype), torch.tensor(scale, dtype=dtype))
        q, s, a = tensors
        value = logp_of(function, q, s, labels, targets, a, similarity, fused)
        return gradients(weighted_sum(value), tensors)

    truth, eager = run(eager_attention, torch.float64), run(eager_attention, torch.float32)
    with use_isa(isa):
        ours = run(None, torch.float32)
    sizes = gradient_sizes(query, truth, torch.tensor(scale))
    for value, expected, own, size in zip(ours, truth, eager, sizes, strict=False):
        size = expected.abs().max().item() if size is None else size
        assert error(value, expected) <= 2 * error(own, expected) + 1e-6 * size
