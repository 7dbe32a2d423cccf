"""``fm.sgd_update`` against its definition ``param - lr * grad``."""

from collections import namedtuple

import pytest
import torch
from opcases import assert_same, error, isas, use_isa
from torch.autograd import gradcheck, gradgradcheck
from updatecases import KINDS, SHAPES, check_large, rates, tensors

import fastmeta as fm


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_matches_the_definition(kind, shared, isa):
    params = tensors([s[1:] if shared else s for s in SHAPES])
    grads, lrs = tensors(SHAPES, seed=1), rates(kind, SHAPES)
    weights = tensors(SHAPES, seed=2)
    inputs = [t.requires_grad_() for t in (*params, *grads, *lrs)]
    with use_isa(isa):
        updated = fm.sgd_update(params, grads, lrs)
        loss = sum((u * w).sum() for u, w in zip(updated, weights, strict=True))
        got = torch.autograd.grad(loss, inputs)
    truth = [p - a * g for p, g, a in zip(params, grads, lrs, strict=True)]
    want = torch.autograd.grad(
        sum((u * w).sum() for u, w in zip(truth, weights, strict=True)), inputs
    )
    for value, expected in zip((*updated, *got), (*truth, *want), strict=True):
        assert value.shape == expected.shape
        assert error(value.detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "per_element", "per_task", "full"])
def test_low_precision_rounds_once(kind, dtype, isa):
    params, grads = tensors(SHAPES, dtype), tensors(SHAPES, dtype, seed=1)
    lrs = rates(kind, SHAPES, torch.float32)
    with use_isa(isa):
        updated = fm.sgd_update(params, grads, lrs)
    for p, g, a, u in zip(params, grads, lrs, updated, strict=True):
        assert u.dtype == dtype
        truth = p.double() - a.double() * g.double()
        assert error(u, truth) <= torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize("isa", isas())
def test_results_too_large_for_the_caches(isa):
    with use_isa(isa):
        check_large(lambda *a: [fm.sgd_update(*a)], lambda p, g, a: [p - a * g], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind):
    shapes = [(2, 3, 2), (2, 3)]
    params = [t.requires_grad_() for t in tensors(shapes)]
    grads = [t.requires_grad_() for t in tensors(shapes, seed=1)]
    lrs = [t.requires_grad_() for t in rates(kind, shapes)]

    def update(*flat):
        return tuple(fm.sgd_update(list(flat[:2]), list(flat[2:4]), list(flat[4:])))

    assert gradcheck(update, (*params, *grads, *lrs))
    assert gradgradcheck(update, (*params, *grads, *lrs))


def test_opcheck():
    shapes = [(2, 3, 2), (2, 4)]
    params, grads = tensors(shapes), [t.requires_grad_() for t in tensors(shapes, seed=1)]
    params[0] = params[0].mT.contiguous().mT.requires_grad_()
    lrs = [t.requires_grad_() for t in rates("per_element", shapes)]
    torch.library.opcheck(torch.ops.fastmeta.sgd_update.default, (params, grads, lrs))
    for with_lr in (True, False):
        args = (tensors(shapes, seed=3), grads, lrs, with_lr)
        torch.library.opcheck(torch.ops.fastmeta.sgd_update_backward.default, args)


@pytest.mark.parametrize("kind", ["scalar", "per_element"])
@pytest.mark.parametrize(
    "in_dims", [(0, 0, None), (None, 0, None), (0, 0, 0), (None, 1, 0)], ids=str
)
def test_vmap_is_the_loop(in_dims, kind):
    batch, shape = 4, (3, 5)
    (param,), (grad,), (lr,) = (
        tensors([shape]),
        tensors([shape], seed=1),
        rates(kind, [(1, *shape)]),
    )
    factors = torch.linspace(0.5, 2, batch, dtype=torch.float64)

    def stack(tensor, dim):
        return tensor if dim is None else torch.stack([tensor * f for f in factors], dim)

    inputs = [stack(t, d) for t, d in zip((param, grad, lr), in_dims, strict=True)]

    def loss(p, g, a):
        return fm.sgd_update([p, p], [g, 2 * g], [a, a])[1].pow(3).sum()

    def truth(p, g, a):
        return (p - a * 2 * g).pow(3).sum()

    for transform in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1, 2))):
        got = torch.vmap(transform(loss), in_dims=in_dims)(*inputs)
        want = torch.vmap(transform(truth), in_dims=in_dims)(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_second_order_maml_by_hand_under_functorch():
    (x,), (y,), (w,) = tensors([(4, 6, 3)]), tensors([(4, 6)], seed=1), tensors([(3,)], seed=2)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def meta(update):
        def task(w, lr, x, y):
            loss = lambda w: (x @ w - y).square().mean()  # noqa: E731
            for _ in range(3):
                w = update(w, torch.func.grad(loss)(w), lr)
            return loss(w)

        def total(w, lr):
            return torch.vmap(task, in_dims=(None, None, 0, 0))(w, lr, x, y).sum()

        return torch.func.grad(total, argnums=(0, 1))(w, lr)

    got = meta(lambda w, g, lr: fm.sgd_update({"w": w}, {"w": g}, lr)["w"])
    want = meta(lambda w, g, lr: w - lr * g)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    shapes = [(2, 3, 2), (2, 4)]
    params, grads = [t.requires_grad_() for t in tensors(shapes)], tensors(shapes, seed=1)

    def loss(*params):
        return sum(u.square().sum() for u in fm.sgd_update(list(params), grads, 0.1))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*params), params), torch.autograd.grad(loss(*params), params)
    )


def test_structures_are_kept():
    params, grads = tensors([(2, 3), (2,)]), tensors([(2, 3), (2,)], seed=1)
    expected = [p - 0.5 * g for p, g in zip(params, grads, strict=True)]
    pair = namedtuple("pair", "weight bias")
    as_list = fm.sgd_update(params, grads, 0.5)
    as_tuple = fm.sgd_update(pair(*params), pair(*grads), (0.5, torch.tensor(0.5)))
    as_dict = fm.sgd_update(
        {"a": params[0], "b": params[1]}, {"b": grads[1], "a": grads[0]}, {"a": 0.5, "b": 0.5}
    )
    one = fm.sgd_update(params[0], grads[0], 0.5)
    assert isinstance(as_list, list)
    assert isinstance(as_tuple, pair)
    assert list(as_dict) == ["a", "b"]
    for got in (as_list, list(as_tuple), list(as_dict.values())):
        for value, want in zip(got, expected, strict=True):
            torch.testing.assert_close(value, want)
    torch.testing.assert_close(one, expected[0])
    assert fm.sgd_update([], [], 0.1) == []


def test_missing_gradient_leaves_the_parameter():
    params = tensors([(2, 3), (2,)])
    updated = fm.sgd_update(params, [None, params[1]], 1.0)
    assert updated[0] is params[0]
    assert torch.equal(updated[1], torch.zeros(2, dtype=torch.float64))


def test_mixed_dtypes_update_each_in_its_own():
    params = [
        torch.ones(3),
        torch.ones(2, dtype=torch.float64),
        torch.ones(4, dtype=torch.bfloat16),
    ]
    updated = fm.sgd_update(params, params, 0.5)
    assert [u.dtype for u in updated] == [p.dtype for p in params]
    assert all((u == 0.5).all() for u in updated)


def test_layouts_empty_and_nan():
    param = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).t()
    grad = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))[::2].movedim(0, 0)
    torch.testing.assert_close(fm.sgd_update(param, grad, 0.1), param - 0.1 * grad)
    assert fm.sgd_update(torch.ones(0, 3), torch.ones(0, 3), 0.1).shape == (0, 3)
    spoilt = torch.tensor([1.0, torch.nan, torch.inf])
    got = fm.sgd_update(torch.ones(3), spoilt, 1.0)
    assert got[0] == 0
    assert got[1].isnan()
    assert got[2] == -torch.inf


def test_bit_equal_for_any_number_of_threads():
    shapes = [(3, 40_000), (3, 7), (3, 300, 301)]
    params, grads = tensors(shapes, torch.float32), tensors(shapes, torch.float32, seed=1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            lr = torch.tensor(0.1, requires_grad=True)
            per_element = torch.full((40_000,), 0.1, requires_grad=True)
            updated = fm.sgd_update(params, grads, [per_element, lr, lr])
            loss = sum(u.square().sum() for u in updated)
            results.append([*updated, *torch.autograd.grad(loss, (lr, per_element))])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


P = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error_type", "message", "args"),
    [
        (TypeError, "params must be a tensor, or a list", ("p", P, 0.1)),
        (TypeError, r"params\[0\] must be a float32", ([P.int()], [P], 0.1)),
        (
            TypeError,
            r"grads\[0\] must be torch.float32, like its parameter",
            ([P], [P.double()], 0.1),
        ),
        (
            ValueError,
            r"grads\[0\] must be of a shape that \[2, 3\].*\[2, 4\]",
            ([P], [torch.zeros(2, 4)], 0.1),
        ),
        (ValueError, r"grads\[0\] must be on cpu", ([P], [P.to("meta")], 0.1)),
        (ValueError, "grads must be of 2 entries, like params, got 1", ([P, P], [P], 0.1)),
        (ValueError, "lr must be of 1 entries", ([P], [P], [0.1, 0.2])),
        (TypeError, r"lr\[0\] must be a number or a tensor, got str", ([P], [P], "0.1")),
        (TypeError, r"lr\[0\] must be a float32", ([P], [P], torch.tensor(1))),
        (
            ValueError,
            r"lr\[0\] must be of a shape that broadcasts to \[2, 3\]",
            ([P], [P], torch.ones(2)),
        ),
        (
            ValueError,
            r"grads must be a mapping with the keys \['w'\], got keys \['v'\]",
            ({"w": P}, {"v": P}, 0.1),
        ),
        (ValueError, r"lr must be a mapping with the keys", ({"w": P}, {"w": P}, {"v": 0.1})),
    ],
)
def test_bad_input_names_the_argument(error_type, message, args):
    with pytest.raises(error_type, match=f"sgd_update: .*{message}"):
        fm.sgd_update(*args)


def test_empty_parameters_with_a_rate_for_each_task():
    for shape in ((3, 0), (3, 2, 0), (0, 4)):
        param, lr = (
            torch.zeros(shape, requires_grad=True),
            torch.ones(shape[0], *[1] * (len(shape) - 1)),
        )
        out = fm.sgd_update(param, torch.zeros(shape), lr.requires_grad_())
        assert out.shape == shape
        grads = torch.autograd.grad(out.sum(), (param, lr))
        assert not grads[1].any()
