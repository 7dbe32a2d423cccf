"""Matching attention of bfloat16 inputs, on every instruction set.

Scores are what float32 makes of them. ``avx512_bf16`` multiplies inputs as they are, two at a time,
and rounds the slopes of the scores to bfloat16 for the gradients; the others convert to float32.
"""

import functools

import pytest
import torch
from opcases import (
    Case,
    assert_same,
    attention_definition,
    eager_attention,
    error,
    finite_weights,
    gradients,
    isas,
    largest_logit,
    leaves,
    similarity_definition,
    use_isa,
)

SIMILARITIES = ("dot", "cosine", "sqeuclidean")
EPS = torch.finfo(torch.float32).eps
DIMS = (1, 2, 3, 31, 32, 33, 64, 127, 129, 257)
LARGE = [
    Case("panels", 2, 130, 75, 65, 5),
    Case("chunks", 1, 40, 1500, 33, 2),
    Case("broad", 1, 700, 40, 127, 3),
]
SHAPES = [
    *(Case(f"dim_{d}", 2, 17, 29, d, 4, absent=(1,), padded=0.3) for d in DIMS),
    *LARGE,
]


def make(case, scale=1.3, offset=0.0):
    query, support, labels, _, _, _ = case.make()
    query, support = ((x + offset).bfloat16() for x in (query, support))
    return query, support, labels, torch.full((case.tasks,), scale)


def weights_of(case):
    return finite_weights((case.tasks, case.queries, case.classes)).bfloat16().float()


def loss_of(logp, case):
    return torch.where(logp.isinf(), 0, logp * weights_of(case).to(logp.dtype)).sum()


@functools.cache
def truth_of(case, similarity, **options):
    """Log-probabilities and gradients in float64, and how large the logits are."""
    query, support, labels, scale = make(case, **options)
    q, s, a = leaves(query.double(), support.double(), scale.double())
    logp = attention_definition(q, s, labels, case.classes, similarity, a)
    logit = largest_logit(query, support, labels, similarity, scale[0], None)
    return logp.detach(), gradients(loss_of(logp, case), [q, s, a]), logit


@functools.cache
def gradient_terms(case, similarity):
    """Sums of the sizes of what the gradients of query and support are summed from, in float64."""
    query, support, labels, scale = make(case)
    sizes = torch.zeros(query.shape).double(), torch.zeros(support.shape).double()
    for t in range(case.tasks):
        valid = labels[t] >= 0
        q, s = query[t].double(), support[t][valid].double()
        sims = similarity_definition(q, s, similarity).requires_grad_()
        z, weights, loss = sims * scale[t].double(), weights_of(case)[t].double(), 0
        for c in labels[t][valid].unique():
            own = z[:, labels[t][valid] == c].logsumexp(1) - z.logsumexp(1)
            loss = loss + (own * weights[:, c]).sum()
        slopes = torch.autograd.grad(loss, sims)[0].abs()
        norms = [x.square().sum(-1, keepdim=True) for x in (q, s)]
        along = [torch.zeros(len(x), 1) for x in (q, s)]
        if similarity == "cosine":
            along = [(slopes * sims.abs()).sum(1 - i)[:, None] / norms[i] for i in (0, 1)]
            slopes = slopes / (norms[0] * norms[1].T).sqrt()
        if similarity == "sqeuclidean":
            slopes = 2 * slopes
            along = [slopes.sum(1 - i)[:, None] for i in (0, 1)]
        sizes[0][t] = slopes @ s.abs() + along[0] * q.abs()
        sizes[1][t, valid] = (slopes.T @ q.abs() + along[1] * s.abs()).detach()
    return [size.detach() for size in sizes]


def run(case, similarity, isa, **options):
    """What the ops give: log-probabilities in float32, gradients in the inputs' dtypes."""
    query, support, labels, scale = make(case, **options)
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
    sizes = [*gradient_terms(case, similarity), 0] if isa == "avx512_bf16" else [0, 0, 0]
    for grad, expected, size in zip(grads, truth_grads, sizes, strict=True):
        rounding = torch.finfo(grad.dtype).eps / 2 * (expected.abs() + size)
        slack = 32 * EPS * (logit + 4) * expected.abs().max().clamp_min(1)
        assert ((grad.double() - expected).abs() <= rounding + slack).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
def test_gradients_are_nearer_than_pytorchs_own(case, similarity, scale, offset, isa):
    """Also where all vectors have a direction in common, along which errors do not average out."""
    options = {"scale": scale, "offset": offset}
    _, truth, _ = truth_of(case, similarity, **options)
    query, support, labels, alpha = make(case, **options)
    q, s = leaves(query, support)
    logp = eager_attention(q, s, labels, case.classes, similarity, alpha.bfloat16())
    eager = gradients(loss_of(logp, case), [q, s])
    _, grads = run(case, similarity, isa, **options)
    for grad, own, expected in zip(grads[:2], eager, truth[:2], strict=True):
        ours, theirs = ((x.double() - expected).norm() for x in (grad, own))
        assert ours < theirs


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

    query, support = torch.zeros_like(query), torch.cat([support, -support], 1) * 1e-38 * 1e-39
    labels, grad = torch.tensor([[0, 1]]), torch.tensor([[[1.0, -1.0]]])
    with use_isa(isa):
        saved = torch.ops.fastmeta.matching_attention(query, support, labels, scale, None, 2, "dot")
        found = torch.ops.fastmeta.matching_attention_backward(
            grad, query, support, labels, scale, None, *saved, 2, "dot"
        )[0]
    assert (support != 0).all()
    assert_same(found, torch.zeros_like(found) if isa == "avx512_bf16" else 2 * support[:, :1])


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
