"""``fm.matching_attention`` at its edges: padding, empty, zero, huge, NaN, and wrong input."""

import numpy as np
import pytest
import torch
from memorycases import resident
from opcases import (
    CASES,
    NEG_INF,
    SIMILARITIES,
    assert_same,
    attention_definition,
    error,
    isas,
    layouts,
    leaves,
    use_isa,
    weighted_sum,
)

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


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_layouts_and_broadcasting(similarity):
    query, support, labels, _, scale, weight = CASES[3].make(similarity=similarity)
    expected = run(query, support, labels, scale, weight, 4, similarity)
    for (name, q), (_, s) in zip(layouts(query), layouts(support), strict=True):
        assert not q.is_contiguous(), name
        assert_same(run(q, s, labels, scale, weight, 4, similarity), expected)
    wide_labels = labels.int()[:, None].expand(-1, 2, -1)
    got = run(query[:, None], support[:, None], wide_labels, scale, weight, 4, similarity)
    assert got.shape == (3, 2, 17, 4)
    assert_same(got[:, 1], expected)
    single = run(query, support[0], labels[0], scale, weight, 4, similarity)
    assert_same(single[0], expected[0])
    assert_same(run(query[0], support[0], labels[0], scale, weight, 4, similarity), expected[0])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_scale_is_uniform_with_a_gradient(similarity):
    query, support, labels, _, _, weight = CASES[1].make(similarity=similarity)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = run(query, support, labels, scale, weight, 5, similarity, output="probs")
    torch.testing.assert_close(value, torch.full_like(value, 0.2))
    truth = attention_definition(query, support, labels, 5, similarity, scale, weight).exp()
    got, want = (torch.autograd.grad(weighted_sum(v), scale)[0] for v in (value, truth))
    assert error(got, want) < 1e-12


def test_lengths_and_mask_are_padding():
    query, support, labels, _, _, _ = CASES[3].make()
    lengths = torch.tensor([13, 0, 5])
    by_lengths = fm.matching_attention(query, support, labels, 4, lengths=lengths)
    mask = torch.arange(13) < lengths[:, None]
    assert torch.equal(by_lengths, fm.matching_attention(query, support, labels, 4, mask=mask))
    truth = attention_definition(query, support, labels.where(mask, -100), 4, "cosine", 1.0)
    assert torch.equal(by_lengths[1], torch.full_like(by_lengths[1], NEG_INF))
    assert error(by_lengths[::2], truth[::2]) < 1e-12
    trimmed = fm.matching_attention(query[2], support[2, :5], labels[2, :5], 4)
    assert_same(by_lengths[2], trimmed)


def test_what_padding_holds_is_never_seen():
    query, support, labels, _, scale, _ = CASES[5].make(torch.float32)
    q, s = leaves(query, support)
    clean = run(q, s, labels, scale, None, 3, "sqeuclidean")
    clean_grads = torch.autograd.grad(weighted_sum(clean), (q, s))
    dirty_support = torch.where((labels == -100)[..., None], torch.nan, support)
    q, s = leaves(query, dirty_support)
    dirty = run(q, s, labels, scale, None, 3, "sqeuclidean")
    grads = torch.autograd.grad(weighted_sum(dirty), (q, s))
    assert torch.equal(dirty, clean)
    assert torch.equal(grads[0], clean_grads[0])
    assert torch.equal(grads[1], clean_grads[1])
    assert (grads[1][labels == -100] == 0).all()


def test_class_without_support_is_exactly_absent():
    query, support, labels, _, _, _ = CASES[4].make()
    q = query.requires_grad_()
    logp = fm.matching_attention(q, support, labels, 6)
    probs = fm.matching_attention(q, support, labels, 6, output="probs")
    for absent in (0, 3, 5):
        assert (logp[..., absent] == NEG_INF).all()
        assert (probs[..., absent] == 0).all()
        assert (torch.autograd.grad(logp[..., absent].sum(), q, retain_graph=True)[0] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert torch.autograd.grad(weighted_sum(logp), q)[0].isfinite().all()


def test_probabilities_sum_to_one_in_float32():
    query, support, labels, _, scale, _ = CASES[8].make(torch.float32)
    for similarity in SIMILARITIES[:4]:
        probs = run(query, support, labels, scale, None, 5, similarity, output="probs")
        torch.testing.assert_close(probs.sum(-1), torch.ones(1, 130), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_vectors_under_cosine(dtype):
    query, support, labels, _, scale, _ = CASES[1].make(dtype)
    query[0, 2] = 0
    support[1, 3] = 0
    q, s = leaves(query, support)
    logp = run(q, s, labels, scale, None, 5, "cosine")
    grads = torch.autograd.grad(weighted_sum(logp), (q, s))
    uniform = torch.full((5,), 0.2, dtype=dtype).log()
    torch.testing.assert_close(logp[0, 2].detach(), uniform)
    assert (grads[0][0, 2] == 0).all()
    assert (grads[1][1, 3] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    again = torch.autograd.grad(
        torch.autograd.grad(
            weighted_sum(run(q, s, labels, scale, None, 5, "cosine")), q, create_graph=True
        )[0]
        .square()
        .sum(),
        (q, s),
    )
    assert all(g.isfinite().all() for g in again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", ["euclidean", "sqeuclidean"])
def test_coincident_points(similarity, dtype):
    support = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)
    labels = torch.tensor([[0, 1, 2, 3]])
    # Alone with its twin, a query's attention is constant; the gradient of the distance itself shows
    # in the scale: at distance 0 it must be exactly 0 for the euclidean.
    q, s = leaves(support.clone(), support)
    logp = run(q, s, labels, torch.tensor(1.0, dtype=dtype), None, 4, similarity)
    grads = torch.autograd.grad(weighted_sum(logp), (q, s), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (q, s))
    assert all(g.isfinite().all() for g in (*grads, *second))
    truth_q, truth_s = leaves(support.double(), support.double())
    truth = attention_definition(truth_q, truth_s, labels, 4, similarity, 1.0)
    truth_grads = torch.autograd.grad(weighted_sum(truth), (truth_q, truth_s))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert error(logp.detach(), truth.detach()) < tolerance
    for grad, expected in zip(grads, truth_grads, strict=True):
        assert error(grad.detach(), expected) < tolerance


@pytest.mark.parametrize("size", [1e4, 1e-30, 1e30])
def test_extreme_logits_stay_exact(size):
    support = torch.eye(4).unsqueeze(0)
    labels = torch.tensor([[0, 0, 1, 2]])
    query = torch.tensor([[[1.0, -1.0, 0.5, -0.5]]])
    logp = fm.matching_attention(query, support, labels, 3, similarity="dot", scale=size)
    truth = attention_definition(query.double(), support.double(), labels, 3, "dot", size)
    torch.testing.assert_close(logp.double(), truth, rtol=1e-6, atol=1e-6)
    assert logp.isfinite().all()


def test_nan_spoils_only_what_it_must():
    query, support, labels, _, scale, _ = CASES[3].make(torch.float32)
    spoilt = query.clone()
    spoilt[1, 4, 2] = torch.nan
    for similarity in SIMILARITIES[:4]:
        clean = run(query, support, labels, scale, None, 4, similarity)
        value = run(spoilt, support, labels, scale, None, 4, similarity)
        bad = value.isnan().all(-1)
        assert bad.nonzero().tolist() == [[1, 4]]
        assert torch.equal(value[~bad], clean[~bad])
    broken = support.clone()
    broken[2, 0, 0] = torch.nan
    value = run(query, broken, labels, scale, None, 4, "dot")
    assert value[2].isnan().all()
    assert value[:2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_empty_inputs(shape, similarity):
    tasks, queries, supports, dim = shape
    query = torch.ones(tasks, queries, dim, requires_grad=True)
    support = torch.ones(tasks, supports, dim, requires_grad=True)
    labels = torch.arange(supports).remainder(3).expand(tasks, supports)
    weight = torch.ones(dim) if similarity == "additive" else None
    logp = fm.matching_attention(query, support, labels, 3, similarity=similarity, weight=weight)
    assert logp.shape == (tasks, queries, 3)
    if supports == 0:
        assert (logp == NEG_INF).all()
    grads = torch.autograd.grad(weighted_sum(logp), (query, support))
    assert all((g == 0).all() for g in grads)


Q, S, Y = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("error_type", "message", "args", "options"),
    [
        (TypeError, "query must be a float32", (Q.long(), S, Y, 2), {}),
        (TypeError, "query must be a float32.*list", ([1.0], S, Y, 2), {}),
        (TypeError, "query must be a float32.*complex64", (Q.to(torch.complex64), S, Y, 2), {}),
        (TypeError, "query must be a dense", (Q.to_sparse(), S, Y, 2), {}),
        (ValueError, "query must be of at least 2 dimensions", (Q[0, 0], S, Y, 2), {}),
        (
            TypeError,
            "support must be torch.float32, like query, got torch.float64",
            (Q, S.double(), Y, 2),
            {},
        ),
        (
            ValueError,
            r"support must be of shape \[..., S, D=4\].*\[2, 5, 3\]",
            (Q, S[..., :3], Y, 2),
            {},
        ),
        (ValueError, "support must be on cpu", (Q, S.to("meta"), Y, 2), {}),
        (TypeError, "labels must be an integer tensor, got float32", (Q, S, Y.float(), 2), {}),
        (TypeError, "labels must be an integer tensor, got bool", (Q, S, Y.bool(), 2), {}),
        (ValueError, r"labels must be of shape \[..., S=5\]", (Q, S, Y[:, :4], 2), {}),
        (
            ValueError,
            r"labels must be in \[0, num_classes=2\) or -100, got 2",
            (Q, S, Y + 2, 2),
            {},
        ),
        (ValueError, r"labels must be in .*got -1", (Q, S, Y - 1, 2), {}),
        (ValueError, "num_classes must be an integer of at least 1, got 0", (Q, S, Y, 0), {}),
        (TypeError, "num_classes must be an integer .* got float 2.0", (Q, S, Y, 2.0), {}),
        (ValueError, "leading dimensions that broadcast", (Q, S[:1].expand(3, 5, 4), Y, 2), {}),
        (ValueError, "similarity must be one of 'dot'.*'l2'", (Q, S, Y, 2), {"similarity": "l2"}),
        (ValueError, "output must be one of", (Q, S, Y, 2), {"output": "logits"}),
        (TypeError, "scale must be a number or a tensor, got str", (Q, S, Y, 2), {"scale": "1"}),
        (
            TypeError,
            "scale must be a float32",
            (Q, S, Y, 2),
            {"scale": torch.ones((), dtype=torch.int64)},
        ),
        (ValueError, "leading dimensions that broadcast", (Q, S, Y, 2), {"scale": torch.ones(3)}),
        (
            ValueError,
            "scale must be on cpu",
            (Q, S, Y, 2),
            {"scale": torch.ones((), device="meta")},
        ),
        (
            ValueError,
            "weight must be given with similarity='additive'",
            (Q, S, Y, 2),
            {"weight": torch.ones(4)},
        ),
        (ValueError, "weight must be given with", (Q, S, Y, 2), {"similarity": "additive"}),
        (
            ValueError,
            r"weight must be of shape \[..., D=4\]",
            (Q, S, Y, 2),
            {"similarity": "additive", "weight": torch.ones(3)},
        ),
        (
            ValueError,
            "mask must be None when lengths",
            (Q, S, Y, 2),
            {"lengths": torch.ones(2, dtype=torch.long), "mask": Y.bool()},
        ),
        (
            ValueError,
            r"lengths must be in \[0, S=5\], got \[6, 6\]",
            (Q, S, Y, 2),
            {"lengths": torch.tensor([6, 6])},
        ),
        (TypeError, "lengths must be an integer tensor", (Q, S, Y, 2), {"lengths": torch.ones(2)}),
        (TypeError, "mask must be bool", (Q, S, Y, 2), {"mask": Y}),
        (
            ValueError,
            r"mask must be of shape \[..., S=5\]",
            (Q, S, Y, 2),
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
        ),
        (TypeError, "mask must be a bool tensor, got list", (Q, S, Y, 2), {"mask": [[True] * 5]}),
        (TypeError, "mask must be a dense", (Q, S, Y, 2), {"mask": Y.bool().to_sparse()}),
        (TypeError, "labels must be a dense", (Q, S, Y.to_sparse(), 2), {}),
        (
            ValueError,
            r"mask must be of a shape that broadcasts with \[2, 5\] of labels, got shape \[3, 5\]",
            (Q, S, Y, 2),
            {"mask": torch.ones(3, 5, dtype=torch.bool)},
        ),
        (
            ValueError,
            r"lengths must be of a shape that broadcasts with \[2\] of labels, got shape \[3\]",
            (Q, S, Y, 2),
            {"lengths": torch.tensor([1, 2, 3])},
        ),
    ],
)
def test_bad_input_names_the_argument(error_type, message, args, options):
    with pytest.raises(error_type, match=f"matching_attention: .*{message}"):
        fm.matching_attention(*args, **options)


def test_raw_op_is_safe_with_wild_labels():
    query, support, labels, _, scale, _ = CASES[3].make(torch.float32)
    wild = labels.clone()
    wild[0, ::3], wild[1, ::4] = 10**12, -7
    args = (scale.reshape(1), None, 4, "dot")
    logp, lse, _ = torch.ops.fastmeta.matching_attention(query, support, wild, *args)
    padded = torch.where((wild < 0) | (wild >= 4), -100, wild)
    expected = torch.ops.fastmeta.matching_attention(query, support, padded, *args)
    assert torch.equal(logp, expected[0])
    assert torch.equal(lse, expected[1])


def test_num_classes_of_any_integer_type_and_size():
    query, support, labels, targets, _, _ = CASES[3].make()
    first = fm.matching_attention(query, support, labels, 4)
    for count in (np.int64(4), np.uint8(4)):
        found = fm.matching_attention(query, support, labels, count, scale=np.float32(1))
        assert torch.equal(found, first)
    for function, rest in ((fm.matching_attention, ()), (fm.matching_nll, (targets,))):
        with pytest.raises(ValueError, match=r"num_classes must be below 2\*\*31, got 23058"):
            function(query, support, labels, *rest, 2**61)
    arguments = (query, support, labels, targets, torch.ones(1).double(), None, 2**61, "dot")
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.fastmeta.matching_nll(*arguments)


def test_no_tasks_have_a_weight_of_their_own():
    query, support = torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)
    labels = torch.zeros(0, 3, dtype=torch.long)
    weight = torch.zeros(0, 4, requires_grad=True)
    logp = fm.matching_attention(query, support, labels, 2, similarity="additive", weight=weight)
    (grad,) = torch.autograd.grad(logp.sum(), weight, create_graph=True)
    assert grad.shape == (0, 4)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("queries", [3, 16, 17])
def test_the_scale_of_huge_distances_has_a_gradient(queries, isa):
    """Vectors far from 0 and near each other: the lanes past the last query are infinitely far."""
    generator = torch.Generator().manual_seed(0)
    query = 1e20 + torch.randn(1, queries, 8, generator=generator) * 1e15
    support = 1e20 + torch.randn(1, 5, 8, generator=generator) * 1e15
    labels = torch.arange(5)[None] % 2
    grads = []
    for dtype in (torch.float32, torch.float64):
        scale = torch.tensor(1e-15, dtype=dtype, requires_grad=True)
        with use_isa(isa):
            logp = fm.matching_attention(
                query.to(dtype), support.to(dtype), labels, 2, similarity="euclidean", scale=scale
            )
            grads.append(torch.autograd.grad(weighted_sum(logp), scale)[0])
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=0)


def test_calls_leave_no_memory_behind():
    """A string that a call forgot would be 50 bytes, in 10,000 of them 0.5 MB."""
    query, support = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    labels = torch.tensor([[0, 1, 1]])
    start = 0
    for call in range(11_000):
        if call == 1000:
            start = resident()
        fm.matching_attention(query, support, labels, 2)
    assert resident() - start < 200_000
