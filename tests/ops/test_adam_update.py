"""``fm.adam_update`` against ``torch.optim.Adam`` and the paper's formula under autograd."""

import pytest
import torch
from opcases import assert_same, error, isas, use_isa
from torch.autograd import gradcheck, gradgradcheck
from updatecases import KINDS, SHAPES, check_large, gradients, rates, tensors

import fastmeta as fm
from fastmeta import AdamState

OPTIONS = {
    "plain": {},
    "rooted": {"betas": (0.8, 0.95), "eps": 1e-3, "eps_root": 1e-2},
    "memoryless": {"betas": (0.0, 0.0), "eps": 0.1},
}


def definition(
    params, grads, means, squares, lrs, step, betas=(0.9, 0.999), eps=1e-8, eps_root=0.0
):
    """Algorithm 1 of Kingma & Ba for each tensor; step counts from 1."""
    rows = []
    for p, g, m, v, a in zip(params, grads, means, squares, lrs, strict=True):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        rows.append((p - a * m_hat / ((v_hat + eps_root).sqrt() + eps), m, v))
    return tuple(map(list, zip(*rows, strict=True)))


def fused(params, grads, means, squares, lrs, step, **options):
    """`fm.adam_update` with the arguments of `definition`."""
    state = AdamState(step - 1, means, squares)
    updated, state = fm.adam_update(params, grads, state, lrs, **options)
    assert state.step == step
    return updated, state.mean, state.square


def columns(shapes, kind, dtype=torch.float64):
    """Parameters, gradients, means, squares (positive) and rates."""
    params, grads = tensors(shapes, dtype), tensors(shapes, dtype, seed=1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    means = tensors(shapes, acc, seed=2)
    squares = [t.square() + 0.1 for t in tensors(shapes, acc, seed=3)]
    return params, grads, means, squares, rates(kind, shapes, acc)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_the_definition(options, kind, isa):
    lists = columns(SHAPES, kind)
    lists[0][:] = tensors([s[1:] for s in SHAPES])
    weights = tensors(SHAPES * 3, seed=4)
    inputs = [t.requires_grad_() for column in lists for t in column]
    with use_isa(isa):
        outputs = [t for c in fused(*lists, 3, **options) for t in c]
        got = gradients(outputs, weights, inputs)
    truth = [t for c in definition(*lists, 3, **options) for t in c]
    want = gradients(truth, weights, inputs)
    for value, expected in zip((*outputs, *got), (*truth, *want), strict=True):
        assert value.shape == expected.shape
        scale = 1 + expected.detach().abs().max().item()
        assert error(value.detach(), expected.detach()) < 1e-12 * scale


def test_steps_as_torch_optim_does():
    (start,) = tensors([(5, 3)])
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.99))
    ours, state = start, None
    for gradient in tensors([(5, 3)] * 4, seed=1):
        theirs.grad = gradient
        optimizer.step()
        ours, state = fm.adam_update(ours, gradient, state, 0.1, betas=(0.8, 0.99))
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "per_element"])
def test_low_precision_rounds_once(kind, dtype, isa):
    lists = columns(SHAPES, kind, dtype)
    with use_isa(isa):
        got = fused(*lists, 2)
    want = definition(*([t.double() for t in column] for column in lists), 2)
    for column, truths, kept in zip(got, want, (dtype, torch.float32, torch.float32), strict=True):
        for value, truth in zip(column, truths, strict=True):
            assert value.dtype == kept
            assert error(value, truth) <= 4 * torch.finfo(kept).eps * truth.abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"eps": 1e-2}, OPTIONS["rooted"]], ids=["plain", "rooted"])
def test_gradcheck_and_gradgradcheck(kind, options):
    lists = columns([(2, 3, 2), (2, 3)], kind)
    inputs = [t.requires_grad_() for column in lists for t in column]

    def update(*flat):
        return tuple(
            t
            for c in fused(*([*flat[i : i + 2]] for i in range(0, 10, 2)), 2, **options)
            for t in c
        )

    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


@pytest.mark.parametrize("isa", isas())
def test_results_too_large_for_the_caches(isa):
    with use_isa(isa):
        check_large(
            lambda *a: [c[0] for c in fused(*([x] for x in a), 2)],
            lambda *a: [c[0] for c in definition(*([x] for x in a), 2)],
            4,
        )


def test_opcheck():
    shapes = [(2, 3, 2), (2, 4)]
    lists = columns(shapes, "per_element")
    lists[0][0] = lists[0][0].mT.contiguous().mT
    for column in lists:
        for tensor in column:
            tensor.requires_grad_()
    numbers = (0.9, 0.99, 1e-3, 1e-4, 2)
    torch.library.opcheck(torch.ops.fastmeta.adam_update.default, (*lists, *numbers))
    cotangents = [[t.requires_grad_() for t in tensors(shapes, seed=s)] for s in (5, 6, 7)]
    op = torch.ops.fastmeta.adam_update_backward.default
    for with_lr in (True, False):
        torch.library.opcheck(op, (*cotangents, *lists[1:], *numbers, with_lr))


def inner_loop(update, x, y, w, lr):
    """Meta-gradient through three steps, tasks mapped by functorch."""

    def task(w, lr, x, y):
        loss = lambda w: (x @ w - y).tanh().square().mean()  # noqa: E731
        state = None
        for _ in range(3):
            w, state = update(w, torch.func.grad(loss)(w), state, lr)
        return loss(w)

    def total(w, lr):
        return torch.vmap(task, in_dims=(None, None, 0, 0))(w, lr, x, y).sum()

    return torch.func.grad(total, argnums=(0, 1))(w, lr)


def test_three_steps_of_an_inner_loop_under_functorch():
    (x,), (y,), (w,) = tensors([(4, 6, 3)]), tensors([(4, 6)], seed=1), tensors([(3,)], seed=2)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def by_definition(w, g, state, lr):
        step, m, v = state or (0, torch.zeros_like(w), torch.zeros_like(w))
        (w,), (m,), (v,) = definition([w], [g], [m], [v], [lr], step + 1)
        return w, (step + 1, m, v)

    torch.testing.assert_close(
        inner_loop(fm.adam_update, x, y, w, lr),
        inner_loop(by_definition, x, y, w, lr),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0, None), (None, 0, 0, 0, 0), (0, 1, None, None, 0)], ids=str
)
def test_vmap_is_the_loop(in_dims):
    batch, shape = 4, (3, 5)
    plain = [c[0] for c in columns([shape], "scalar")]
    factors = torch.linspace(0.5, 2, batch, dtype=torch.float64)
    inputs = [
        t if d is None else torch.stack([t * f for f in factors], d)
        for t, d in zip(plain, in_dims, strict=True)
    ]

    def loss(update):
        return lambda *a: sum(c[0].pow(3).sum() for c in update(*([x] for x in a), 2))

    for transform in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1, 2, 3, 4))):
        got = torch.vmap(transform(loss(fused)), in_dims=in_dims)(*inputs)
        want = torch.vmap(transform(loss(definition)), in_dims=in_dims)(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", isas())
def test_the_root_at_zero_leaves_no_nan(isa):
    """At g = m = v = 0 the derivative is exactly -lr / eps, and second derivatives are finite."""
    gradient = torch.zeros(19, dtype=torch.float64)
    gradient[::3] = 0.7
    gradient.requires_grad_()
    with use_isa(isa):
        updated, state = fm.adam_update(torch.ones_like(gradient), gradient, None, 0.5, eps=1e-3)
        (first,) = torch.autograd.grad(updated.sum(), gradient, create_graph=True)
        (second,) = torch.autograd.grad(first.sum() + state.square.sum(), gradient)
    assert torch.equal(updated[1::3], torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(first.detach()[1::3], torch.full((6,), -500.0, dtype=torch.float64))
    assert second.isfinite().all()


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    shapes = [(2, 3, 2), (2, 4)]
    params, grads = [t.requires_grad_() for t in tensors(shapes)], tensors(shapes, seed=1)

    def loss(*params):
        updated, state = fm.adam_update(list(params), grads, None, 0.1)
        updated, _ = fm.adam_update(updated, grads, state, 0.1)
        return sum(u.square().sum() for u in updated)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*params), params), torch.autograd.grad(loss(*params), params)
    )


@pytest.mark.compile
def test_steps_and_rates_that_change_compile_once():
    def update(param, grad, state, lr):
        return fm.adam_update(param, grad, state, lr)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    param, state = torch.ones(3, dtype=torch.float64), None
    wanted, their_state = param, None
    for step in range(20):
        grad = torch.full((3,), 1.0 + step, dtype=torch.float64)
        param, state = compiled(param, grad, state, 0.1 + 0.01 * step)
        wanted, their_state = update(wanted, grad, their_state, 0.1 + 0.01 * step)
    torch.testing.assert_close(param, wanted)
    assert state.step == 20


@pytest.mark.parametrize("op", ["sgd", "momentum", "adam"])
def test_batched_gradients(op):
    """Through autograd's own vmap, which is not torch.func's."""
    (param,), (grad,) = tensors([(2, 3)]), tensors([(2, 3)], seed=1)
    grad.requires_grad_()
    run = {
        "sgd": lambda: fm.sgd_update(param, grad, 0.1),
        "momentum": lambda: fm.momentum_update(param, grad, None, 0.1)[0],
        "adam": lambda: fm.adam_update(param, grad, None, 0.1)[0],
    }[op]
    rows = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    (found,) = torch.autograd.grad(run(), grad, rows, is_grads_batched=True)
    for row, value in zip(rows, found, strict=True):
        torch.testing.assert_close(torch.autograd.grad(run(), grad, row)[0], value)


def test_structures_first_state_and_missing_gradients():
    params, grads = tensors([(2, 3), (2,)]), tensors([(2, 3), (2,)], seed=1)
    named, given = {"a": params[0], "b": params[1]}, {"b": grads[1], "a": None}
    updated, state = fm.adam_update(named, given, None, 0.5)
    assert updated["a"] is params[0]
    assert state.mean["a"] is state.square["a"] is None
    torch.testing.assert_close(updated["b"], params[1] - 0.5 * grads[1].sign(), rtol=1e-6, atol=0)
    updated, state = fm.adam_update(updated, {"a": grads[0], "b": grads[1]}, state, 0.5)
    assert state.step == 2
    torch.testing.assert_close(state.square["a"], 1e-3 * grads[0] ** 2)
    one, state = fm.adam_update(params[0], grads[0], None, 0.5)
    assert one.shape == state.mean.shape == params[0].shape
    assert fm.adam_update([], [], None, 0.1) == ([], AdamState(1, [], []))


def test_layouts_and_empty():
    (param,), (grad,) = tensors([(6, 4)]), tensors([(5, 6, 4)], seed=1)
    (mean,), square = tensors([(4, 6)], seed=2), torch.ones(4, dtype=torch.float64)
    grad, mean = grad[::2], mean.t()
    want = definition([param], [grad], [mean], [square], [0.1], 3)
    got = fused([param], [grad], [mean], [square], 0.1, 3)
    for value, truth in zip(got, want, strict=True):
        torch.testing.assert_close(value[0], truth[0].expand(3, 6, 4))
    updated, state = fm.adam_update(torch.ones(0, 3), torch.ones(0, 3), None, 0.1)
    assert updated.shape == state.mean.shape == (0, 3)


def test_bit_equal_for_any_number_of_threads():
    shapes = [(3, 40_000), (3, 7), (3, 300, 301)]
    lists = columns(shapes, "scalar", torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            lr = torch.tensor(0.1, requires_grad=True)
            per_element = torch.full((40_000,), 0.1, requires_grad=True)
            outputs = [t for c in fused(*lists[:4], [per_element, lr, lr], 2) for t in c]
            loss = sum(u.square().sum() for u in outputs[:3])
            results.append([*outputs, *torch.autograd.grad(loss, (lr, per_element))])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_same(value, expected)


P = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error_type", "message", "state", "options"),
    [
        (
            ValueError,
            r"betas\[0\] must be at least 0 and below 1, got 1",
            None,
            {"betas": (1.0, 0.9)},
        ),
        (TypeError, "betas must be two numbers, got float 0.9", None, {"betas": 0.9}),
        (ValueError, "eps must be at least 0 and finite, got -1", None, {"eps": -1}),
        (ValueError, "eps_root must be at least 0 and finite", None, {"eps_root": float("nan")}),
        (TypeError, "state must be an AdamState or None, got tuple", (1, P, P), {}),
        (
            ValueError,
            "state.step must be an integer of at least 0, got -1",
            AdamState(-1, [P], [P]),
            {},
        ),
        (
            ValueError,
            "state.square must be of 1 entries, like params",
            AdamState(1, [P], [P, P]),
            {},
        ),
        (TypeError, r"state.mean\[0\] must be torch.float32", AdamState(1, [P.double()], [P]), {}),
    ],
)
def test_bad_input_names_the_argument(error_type, message, state, options):
    with pytest.raises(error_type, match=f"adam_update: .*{message}"):
        fm.adam_update([P], [P], state, 0.1, **options)
