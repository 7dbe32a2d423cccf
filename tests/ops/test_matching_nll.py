"""``fm.matching_nll`` against its definition: the loss of the attention's definition."""

import functools

import pytest
import torch
from opcases import (
    CASES,
    NEG_INF,
    SIMILARITIES,
    SMALL,
    assert_same,
    assert_within_budget,
    attention_definition,
    eager_attention,
    error,
    finite_weights,
    gradient_sizes,
    gradients,
    isas,
    largest_logit,
    leaves,
    use_isa,
)
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm


def nll_definition(logp, targets):
    """Loss of each query [T, Q]: -log p at the target, 0 where it is ignored."""
    rows = [
        [(-logp[t, i, c] if c >= 0 else logp.new_zeros(())) for i, c in enumerate(row)]
        for t, row in enumerate(targets.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


def summed(losses):
    """Scalar by random weights, leaving out infinite losses (their gradient is 0 by definition)."""
    finite = torch.where(losses == float("inf"), 0, losses)
    return (finite * finite_weights(losses.shape).to(losses.dtype)).sum()


@functools.cache
def truth_of(case, similarity, dtype):
    query, support, labels, targets, scale, weight = case.make(dtype, similarity=similarity)
    tensors = leaves(*(None if t is None else t.double() for t in (query, support, scale, weight)))
    q, s, a, w = tensors
    logp = attention_definition(q, s, labels, case.classes, similarity, a, w)
    losses = nll_definition(logp, targets)
    return losses, gradients(summed(losses), tensors)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition_in_float64(case, similarity, isa):
    truth, truth_grads = truth_of(case, similarity, torch.float64)
    query, support, labels, targets, scale, weight = case.make(similarity=similarity)
    tensors = leaves(query, support, scale, weight)
    q, s, a, w = tensors
    with use_isa(isa):
        losses = fm.matching_nll(
            q, s, labels, targets, case.classes,
            similarity=similarity, scale=a, weight=w, reduction="none",
        )  # fmt: skip
        grads = gradients(summed(losses), tensors)
    assert error(losses.detach(), truth.detach()) < 1e-11
    for grad, expected in zip(grads, truth_grads, strict=True):
        assert error(grad, expected) < 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_error_is_within_twice_pytorchs_own(similarity, dtype):
    case = CASES[2]
    truth, truth_grads = truth_of(case, similarity, dtype)
    query, support, labels, targets, scale, weight = case.make(dtype, similarity=similarity)
    eager_tensors = leaves(query, support, scale.to(dtype), weight)
    q, s, a, w = eager_tensors
    logp = eager_attention(q, s, labels, case.classes, similarity, a, w)
    eager = torch.nn.functional.nll_loss(logp.flatten(0, 1), targets.flatten(), reduction="none")
    eager = eager.reshape(targets.shape)
    eager_grads = gradients(summed(eager), eager_tensors)
    tensors = leaves(query, support, scale, weight)
    q, s, a, w = tensors
    losses = fm.matching_nll(
        q, s, labels, targets, case.classes,
        similarity=similarity, scale=a, weight=w, reduction="none",
    )  # fmt: skip
    assert losses.dtype == dtype
    logit = largest_logit(query, support, labels, similarity, scale, weight)
    sizes = gradient_sizes(query, truth_grads, scale)
    assert_within_budget(
        losses.detach(), truth.detach(), eager.detach(), dtype, "loss", logit=logit
    )
    grads = gradients(summed(losses), tensors)
    for i, (grad, expected, own) in enumerate(zip(grads, truth_grads, eager_grads, strict=True)):
        assert_within_budget(
            grad, expected, own, dtype, f"gradient {i}", logit=logit, magnitude=sizes[i]
        )


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck_and_gradgradcheck(similarity):
    query, support, labels, targets, scale, weight = SMALL.make(similarity=similarity)
    targets = torch.where(targets == 2, 1, targets)  # class 2 is absent: its loss is infinite
    inputs = tuple(t for t in leaves(query, support, scale, weight) if t is not None)

    def losses(query, support, scale, weight=None):
        return fm.matching_nll(
            query, support, labels, targets, 4,
            similarity=similarity, scale=scale, weight=weight, reduction="none",
        )  # fmt: skip

    assert gradcheck(losses, inputs)
    assert gradgradcheck(losses, inputs)


@pytest.mark.parametrize("similarity", ["additive"])
def test_opcheck(similarity):
    query, support, labels, targets, scale, weight = SMALL.make(similarity=similarity)
    weight = None if weight is None else weight.reshape(1, -1)
    query, support, scale, weight = leaves(query, support, scale.reshape(1), weight)
    args = (query, support, labels, targets, scale, weight, 4, similarity)
    torch.library.opcheck(torch.ops.fastmeta.matching_nll.default, args)
    with torch.no_grad():
        losses, lse, scores = torch.ops.fastmeta.matching_nll(*args)
    back = (torch.randn_like(losses), *args[:6], losses, lse, scores, 4, similarity)
    torch.library.opcheck(torch.ops.fastmeta.matching_nll_backward.default, back)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_functorch_and_second_order(similarity):
    query, support, labels, targets, scale, weight = SMALL.make(similarity=similarity)

    def ours(q):
        return summed(
            fm.matching_nll(
                q, support, labels, targets, 4,
                similarity=similarity, scale=scale, weight=weight, reduction="none",
            )
        )  # fmt: skip

    def truth(q):
        logp = attention_definition(q, support, labels, 4, similarity, scale, weight)
        return summed(nll_definition(logp, targets))

    for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))):
        assert error(transform(ours)(query), transform(truth)(query)) < 1e-9
    stacked = torch.stack([query, 2 * query])
    mapped = torch.vmap(torch.func.grad(ours))(stacked)
    torch.testing.assert_close(mapped[1], torch.func.grad(ours)(2 * query), rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    query, support, labels, targets, _, _ = SMALL.make()
    targets = torch.where(targets == 2, 1, targets)

    def loss(q, s):
        return fm.matching_nll(q, s, labels, targets, 4)

    q, s = leaves(query, support)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(q, s), (q, s)), torch.autograd.grad(loss(q, s), (q, s))
    )


def test_reductions_and_ignore_index():
    query, support, labels, targets, _, _ = CASES[5].make()
    none = fm.matching_nll(query, support, labels, targets, 3, reduction="none")
    counted = targets != -100
    assert (none[~counted] == 0).all()
    assert counted.sum() < counted.numel()
    total = fm.matching_nll(query, support, labels, targets, 3, reduction="sum")
    torch.testing.assert_close(total, none.sum())
    mean = fm.matching_nll(query, support, labels, targets, 3)
    torch.testing.assert_close(mean, none[counted].mean())
    other = torch.where(counted, targets, 77)
    assert torch.equal(fm.matching_nll(query, support, labels, other, 3, ignore_index=77), mean)
    like_torch = torch.nn.functional.nll_loss(
        fm.matching_attention(query, support, labels, 3).flatten(0, 1), targets.flatten()
    )
    torch.testing.assert_close(mean, like_torch)
    nothing = torch.full_like(targets, -100)
    assert fm.matching_nll(query, support, labels, nothing, 3).isnan()
    one = fm.matching_nll(query[0], support[0], labels[0], targets[0], 3, reduction="none")
    torch.testing.assert_close(one, none[0])


def test_target_without_support_is_infinite_and_sends_no_gradient():
    query, support, labels, targets, _, _ = CASES[4].make()
    targets = torch.where(targets == 0, 1, targets)
    targets[0, 1] = 0  # class 0 has no support
    q, s = leaves(query, support)
    losses = fm.matching_nll(q, s, labels, targets, 6, reduction="none")
    expected = torch.tensor([c in (0, 3, 5) for c in targets.flatten().tolist()]).reshape(2, 5)
    assert torch.equal(losses == float("inf"), expected)
    grad = torch.autograd.grad(losses[0, 1], q)[0]
    assert (grad == 0).all()
    logp = fm.matching_attention(q, s, labels, 6)
    assert (logp[0, 1, 0] == NEG_INF).item()


def test_bit_equal_for_any_number_of_threads():
    query, support, labels, targets, scale, _ = CASES[8].make(torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            q, s, a = leaves(query, support, scale)
            losses = fm.matching_nll(q, s, labels, targets, 5, scale=a, reduction="none")
            results.append([losses.detach(), *gradients(losses.sum(), (q, s, a))])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty_inputs(shape):
    tasks, queries, supports, dim = shape
    query = torch.ones(tasks, queries, dim, requires_grad=True)
    support = torch.ones(tasks, supports, dim, requires_grad=True)
    labels = torch.zeros(tasks, supports, dtype=torch.long)
    targets = torch.zeros(tasks, queries, dtype=torch.long)
    losses = fm.matching_nll(query, support, labels, targets, 2, reduction="none")
    assert losses.shape == (tasks, queries)
    if supports == 0:
        assert (losses == float("inf")).all()
    grads = torch.autograd.grad(losses.sum(), (query, support))
    assert all((g == 0).all() for g in grads)


Q, S = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
Y, Z = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("error_type", "message", "targets", "options"),
    [
        (TypeError, "targets must be an integer tensor, got float32", Z.float(), {}),
        (ValueError, r"targets must be of shape \[..., Q=3\]", Z[:, :2], {}),
        (ValueError, r"targets must be of leading shape \[2\]", Z[:1].expand(3, 3), {}),
        (ValueError, r"targets must be in \[0, num_classes=2\) or -100, got 5", Z + 5, {}),
        (ValueError, "targets must be in .* or 9, got -100", Z - 100, {"ignore_index": 9}),
        (ValueError, "targets must be on cpu", Z.to("meta"), {}),
        (
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'max'",
            Z,
            {"reduction": "max"},
        ),
        (ValueError, "similarity must be one of", Z, {"similarity": "l1"}),
    ],
)
def test_bad_input_names_the_argument(error_type, message, targets, options):
    with pytest.raises(error_type, match=f"matching_nll: .*{message}"):
        fm.matching_nll(Q, S, Y, targets, 2, **options)
