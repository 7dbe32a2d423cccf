"""``fm.momentum_update`` against ``torch.optim.SGD`` and the formula under autograd."""

import pytest
import torch
from opcases import assert_same, error, isas, use_isa
from torch.autograd import gradcheck, gradgradcheck
from updatecases import KINDS, SHAPES, check_large, gradients, rates, tensors

import fastmeta as fm

OPTIONS = {
    "plain": {"momentum": 0.9},
    "dampened": {"momentum": 0.7, "dampening": 0.4},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "none": {"momentum": 0.0},
}


def definition(params, grads, buffers, lrs, momentum=0.9, dampening=0.0, nesterov=False):
    """The textbook's two lines for each tensor."""
    updated, new = [], []
    for p, g, b, a in zip(params, grads, buffers, lrs, strict=True):
        new.append(momentum * b + (1 - dampening) * g)
        updated.append(p - a * (g + momentum * new[-1] if nesterov else new[-1]))
    return updated, new


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_the_definition(options, kind, isa):
    params, grads = tensors([s[1:] for s in SHAPES]), tensors(SHAPES, seed=1)
    buffers, lrs = tensors(SHAPES, seed=2), rates(kind, SHAPES)
    weights = tensors(SHAPES * 2, seed=3)
    inputs = [t.requires_grad_() for t in (*params, *grads, *buffers, *lrs)]
    with use_isa(isa):
        updated, new = fm.momentum_update(params, grads, buffers, lrs, **options)
        got = gradients([*updated, *new], weights, inputs)
    truth, truth_new = definition(params, grads, buffers, lrs, **options)
    want = gradients([*truth, *truth_new], weights, inputs)
    for value, expected in zip((*updated, *new, *got), (*truth, *truth_new, *want), strict=True):
        assert value.shape == expected.shape
        assert error(value.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_as_torch_optim_does(nesterov):
    (start,) = tensors([(5, 3)])
    gradient_steps = tensors([(5, 3)] * 4, seed=1)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov)
    ours, buffer = start, None
    for gradient in gradient_steps:
        theirs.grad = gradient
        optimizer.step()
        ours, buffer = fm.momentum_update(ours, gradient, buffer, 0.1, nesterov=nesterov)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "per_element"])
def test_low_precision_rounds_once(kind, dtype, isa):
    params, grads = tensors(SHAPES, dtype), tensors(SHAPES, dtype, seed=1)
    buffers, lrs = tensors(SHAPES, torch.float32, seed=2), rates(kind, SHAPES, torch.float32)
    with use_isa(isa):
        updated, new = fm.momentum_update(params, grads, buffers, lrs)
    columns = ([t.double() for t in column] for column in (params, grads, buffers, lrs))
    truth, truth_new = definition(*columns)
    for got, want, kept in zip(
        (*updated, *new), (*truth, *truth_new), [dtype] * 6 + [torch.float32] * 6, strict=True
    ):
        assert got.dtype == kept
        assert error(got, want) <= 2 * torch.finfo(kept).eps * want.abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_gradcheck_and_gradgradcheck(kind, nesterov):
    shapes = [(2, 3, 2), (2, 3)]
    columns = [tensors(shapes, seed=s) for s in range(3)]
    columns.append(rates(kind, shapes))
    inputs = [t.requires_grad_() for column in columns for t in column]

    def update(*flat):
        lists = [list(flat[i : i + 2]) for i in range(0, 8, 2)]
        updated, new = fm.momentum_update(*lists, momentum=0.6, nesterov=nesterov)
        return *updated, *new

    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


@pytest.mark.parametrize("isa", isas())
def test_results_too_large_for_the_caches(isa):
    with use_isa(isa):
        check_large(fm.momentum_update, lambda *a: [c[0] for c in definition(*([x] for x in a))], 3)


def test_opcheck():
    shapes = [(2, 3, 2), (2, 4)]
    params, grads, buffers, outs, out_buffers = (
        [t.requires_grad_() for t in tensors(shapes, seed=s)] for s in range(5)
    )
    params[0] = params[0].detach().mT.contiguous().mT.requires_grad_()
    lrs = [t.requires_grad_() for t in rates("per_element", shapes)]
    numbers = (0.9, 0.1, False)
    op = torch.ops.fastmeta.momentum_update.default
    torch.library.opcheck(op, (params, grads, buffers, lrs, *numbers))
    op = torch.ops.fastmeta.momentum_update_backward.default
    for with_lr in (True, False):
        torch.library.opcheck(op, (outs, out_buffers, grads, buffers, lrs, *numbers, with_lr))


def test_three_steps_of_an_inner_loop_under_functorch():
    (x,), (y,), (w,) = tensors([(4, 6, 3)]), tensors([(4, 6)], seed=1), tensors([(3,)], seed=2)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def meta(update):
        def task(w, lr, x, y):
            loss = lambda w: (x @ w - y).tanh().square().mean()  # noqa: E731
            buffer = torch.zeros_like(w)
            for _ in range(3):
                w, buffer = update(w, torch.func.grad(loss)(w), buffer, lr)
            return loss(w)

        def total(w, lr):
            return torch.vmap(task, in_dims=(None, None, 0, 0))(w, lr, x, y).sum()

        return torch.func.grad(total, argnums=(0, 1))(w, lr)

    got = meta(fm.momentum_update)
    want = meta(lambda *args: tuple(c[0] for c in definition(*([a] for a in args))))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None), (None, 0, 0, 0), (0, 1, None, 0)], ids=str)
def test_vmap_is_the_loop(in_dims):
    batch, shape = 4, (3, 5)
    plain = [
        *(tensors([shape], seed=s)[0] for s in range(3)),
        rates("per_element", [(1, *shape)])[0],
    ]
    factors = torch.linspace(0.5, 2, batch, dtype=torch.float64)
    inputs = [
        t if d is None else torch.stack([t * f for f in factors], d)
        for t, d in zip(plain, in_dims, strict=True)
    ]

    def loss(update):
        def of(*args):
            updated, new = update(*([a] for a in args))
            return updated[0].pow(3).sum() + new[0].pow(3).sum()

        return of

    for transform in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1, 2, 3))):
        got = torch.vmap(transform(loss(fm.momentum_update)), in_dims=in_dims)(*inputs)
        want = torch.vmap(transform(loss(definition)), in_dims=in_dims)(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    shapes = [(2, 3, 2), (2, 4)]
    params, grads = [t.requires_grad_() for t in tensors(shapes)], tensors(shapes, seed=1)

    def loss(*params):
        updated, buffers = fm.momentum_update(list(params), grads, None, 0.1)
        updated, _ = fm.momentum_update(updated, grads, buffers, 0.1)
        return sum(u.square().sum() for u in updated)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*params), params), torch.autograd.grad(loss(*params), params)
    )


def test_structures_first_state_and_missing_gradients():
    params, grads = tensors([(2, 3), (2,)]), tensors([(2, 3), (2,)], seed=1)
    updated, buffers = fm.momentum_update(
        {"a": params[0], "b": params[1]}, {"b": grads[1], "a": None}, None, 0.5
    )
    assert list(updated) == list(buffers) == ["a", "b"]
    assert updated["a"] is params[0]
    assert buffers["a"] is None
    torch.testing.assert_close(updated["b"], params[1] - 0.5 * grads[1])
    torch.testing.assert_close(buffers["b"], grads[1])
    again, buffers = fm.momentum_update(
        updated, {"a": grads[0], "b": grads[1]}, buffers, {"a": 0.5, "b": 0.1}
    )
    torch.testing.assert_close(again["a"], params[0] - 0.5 * grads[0])
    torch.testing.assert_close(again["b"], updated["b"] - 0.1 * 1.9 * grads[1])
    updated, buffers = fm.momentum_update(tuple(params), tuple(grads), (None, None), 0.5)
    assert isinstance(updated, tuple)
    assert isinstance(buffers, tuple)
    assert fm.momentum_update([], [], None, 0.1) == ([], [])


def test_layouts_and_empty():
    (param,), (grad,), (buffer,) = (
        tensors([(6, 4)]),
        tensors([(5, 6, 4)], seed=1),
        tensors([(4, 6)], seed=2),
    )
    grad, buffer = grad[::2], buffer.t()
    updated, new = fm.momentum_update(param, grad, buffer, 0.1)
    torch.testing.assert_close(new, 0.9 * buffer + grad)
    torch.testing.assert_close(updated, param - 0.1 * new)
    updated, new = fm.momentum_update(torch.ones(0, 3), torch.ones(0, 3), None, 0.1)
    assert updated.shape == new.shape == (0, 3)


def test_bit_equal_for_any_number_of_threads():
    shapes = [(3, 40_000), (3, 7), (3, 300, 301)]
    params, grads, buffers = (tensors(shapes, torch.float32, seed=s) for s in range(3))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            lr = torch.tensor(0.1, requires_grad=True)
            per_element = torch.full((40_000,), 0.1, requires_grad=True)
            updated, new = fm.momentum_update(params, grads, buffers, [per_element, lr, lr])
            loss = sum(u.square().sum() for u in updated)
            results.append([*updated, *new, *torch.autograd.grad(loss, (lr, per_element))])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_same(value, expected)


P = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error_type", "message", "args", "options"),
    [
        (
            ValueError,
            "momentum must be at least 0 and finite, got -1",
            ([P], [P], None, 0.1),
            {"momentum": -1},
        ),
        (TypeError, "momentum must be a number, got", ([P], [P], None, 0.1), {"momentum": P}),
        (
            ValueError,
            "nesterov must be False unless",
            ([P], [P], None, 0.1),
            {"nesterov": True, "momentum": 0},
        ),
        (TypeError, "nesterov must be True or False", ([P], [P], None, 0.1), {"nesterov": 1}),
        (
            ValueError,
            "buffers must be of 1 entries, like params, got 2",
            ([P], [P], [P, P], 0.1),
            {},
        ),
        (
            TypeError,
            r"buffers\[0\] must be torch.float32, as the state",
            ([P], [P], [P.double()], 0.1),
            {},
        ),
        (
            ValueError,
            r"buffers\[0\] must be of a shape that broadcasts to \[2, 3\]",
            ([P], [P], [torch.ones(2)], 0.1),
            {},
        ),
        (ValueError, "buffers must be a mapping with the keys", ({"w": P}, {"w": P}, [P], 0.1), {}),
        (TypeError, r"lr\[0\] must be a number or a tensor, got str", ([P], [P], None, "0.1"), {}),
    ],
)
def test_bad_input_names_the_argument(error_type, message, args, options):
    with pytest.raises(error_type, match=f"momentum_update: .*{message}"):
        fm.momentum_update(*args, **options)
