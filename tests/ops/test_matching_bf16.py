"""Matching attention of bfloat16 inputs: what float32 makes of them, on every instruction set.

``avx512_bf16`` takes pairs of features at a time and inputs as they are, the others convert them.
"""

import functools

import pytest
import torch
from opcases import (
    Case,
    assert_same,
    attention_definition,
    error,
    finite_weights,
    gradients,
    isas,
    largest_logit,
    leaves,
    use_isa,
)

SIMILARITIES = ("dot", "cosine", "sqeuclidean")
EPS = torch.finfo(torch.float32).eps
DIMS = (1, 2, 3, 31, 32, 33, 64, 127, 129, 257)
SHAPES = [
    *(Case(f"dim_{d}", 2, 17, 29, d, 4, absent=(1,), padded=0.3) for d in DIMS),
    Case("panels", 2, 130, 75, 65, 5),
    Case("chunks", 1, 40, 1500, 33, 2),
    Case("broad", 1, 700, 40, 127, 3),
]


def make(case):
    query, support, labels, _, _, _ = case.make(torch.bfloat16)
    return query, support, labels, torch.full((case.tasks,), 1.3)


def weights_of(case):
    return finite_weights((case.tasks, case.queries, case.classes)).float()


@functools.cache
def truth_of(case, similarity):
    """Log-probabilities and gradients in float64, and how large the logits are."""
    query, support, labels, scale = make(case)
    q, s, a = leaves(query.double(), support.double(), scale.double())
    logp = attention_definition(q, s, labels, case.classes, similarity, a)
    loss = torch.where(logp.isinf(), 0, logp * weights_of(case)).sum()
    logit = largest_logit(query, support, labels, similarity, scale[0], None)
    return logp.detach(), gradients(loss, [q, s, a]), logit


def run(case, similarity, isa):
    """What the ops give: log-probabilities in float32, gradients in the inputs' dtypes."""
    query, support, labels, scale = make(case)
    with use_isa(isa):
        logp, lse, scores = torch.ops.fastmeta.matching_attention(
            query, support, labels, scale, None, case.classes, similarity
        )
        grads = torch.ops.fastmeta.matching_attention_backward(
            weights_of(case),
            *(query, support, labels, scale, None),
            *(logp, lse, scores, case.classes, similarity),
        )
    return logp, grads[:3]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_only_what_comes_out_in_bfloat16_is_rounded_to_it(case, similarity, isa):
    truth, truth_grads, logit = truth_of(case, similarity)
    logp, grads = run(case, similarity, isa)
    assert logp.dtype == torch.float32
    assert error(logp, truth) <= 4 * EPS * (logit + 4)
    for grad, expected in zip(grads, truth_grads, strict=True):
        rounding = torch.finfo(grad.dtype).eps / 2 * expected.abs()
        slack = 32 * EPS * (logit + 4) * expected.abs().max().clamp_min(1)
        assert ((grad.double() - expected).abs() <= rounding + slack).all()


@pytest.mark.parametrize("isa", isas())
def test_numbers_below_the_normal_range_are_zero_in_dot_products_only(isa):
    query = torch.full((1, 1, 3), 1e-39, dtype=torch.bfloat16)
    support = torch.full((1, 1, 3), 1e38, dtype=torch.bfloat16)
    labels, scale = torch.zeros(1, 1, dtype=torch.long), torch.ones(1)
    with use_isa(isa):
        _, score, _ = torch.ops.fastmeta.matching_attention(
            query, support, labels, scale, None, 1, "dot"
        )
    products = (query.double() * support.double()).sum().item()
    assert score.item() == pytest.approx(0 if isa == "avx512_bf16" else products, rel=1e-6)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dim", [1, 5, 31, 33, 129])
def test_rows_do_not_look_into_their_neighbours(dim, similarity, isa):
    def logp_of(query, support, labels):
        with use_isa(isa):
            return torch.ops.fastmeta.matching_attention(
                query, support, labels, torch.ones(1), None, 3, similarity
            )[0]

    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(1, 40, dim, generator=generator).bfloat16()
    support = torch.randn(1, 30, dim, generator=generator).bfloat16()
    labels = torch.arange(30).remainder(3)[None]
    apart, among = support.new_full((1, 60, dim), torch.nan), labels.new_full((1, 60), -100)
    apart[:, ::2], among[:, ::2] = support, labels
    mixed = query.new_full((1, 80, dim), torch.inf)
    mixed[:, ::2] = query
    assert_same(logp_of(mixed, apart, among)[:, ::2], logp_of(query, support, labels))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_bit_equal_for_any_number_of_threads(similarity, isa):
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            logp, grads = run(SHAPES[-2], similarity, isa)
        finally:
            torch.set_num_threads(before)
        results.append([logp, *grads])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
