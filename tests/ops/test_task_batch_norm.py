"""``fm.task_batch_norm`` against one batch norm for each task."""

import pytest
import torch
from opcases import assert_same, error, finite_weights, isas, layouts, use_isa
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm

SHAPES = [(1, 2, 1), (3, 7, 5), (2, 5, 3, 4), (2, 3, 4, 5, 7), (3, 40, 2, 9, 9), (2, 1, 3, 13)]


def make(shape, dtype=torch.float64, *, affine=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(*shape) * 2 + 1
    if not affine:
        return [x, None, None]
    return [x, normal(shape[0], shape[2]), normal(shape[0], shape[2])]


def definition(x, weight=None, bias=None, eps=1e-5):
    """By the formula, task after task: torch's own kernels are no truth in second order."""
    outputs = []
    for t, rows in enumerate(x):
        over = [d for d in range(rows.dim()) if d != 1]
        column = (1, -1) + (1,) * (rows.dim() - 2)
        mean = rows.mean(over, keepdim=True)
        variance = (rows - mean).square().mean(over, keepdim=True)
        out = (rows - mean) / (variance + eps).sqrt()
        if weight is not None:
            out = out * weight[t].reshape(column)
        outputs.append(out if bias is None else out + bias[t].reshape(column))
    return torch.stack(outputs)


def derivatives(function, tensors):
    """Output, gradients, and gradients of a weighted sum of the gradients."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    given = [leaf for leaf in leaves if leaf is not None]
    out = function(*leaves)
    grads = torch.autograd.grad((out.pow(3) / 3).sum(), given, create_graph=True)
    scalar = sum((g * finite_weights(g.shape).to(g)).sum() for g in grads)
    return [out, *grads, *torch.autograd.grad(scalar, given)]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition_to_second_order(shape, affine, isa):
    tensors = make(shape, affine=affine)
    with use_isa(isa):
        found = derivatives(fm.task_batch_norm, tensors)
    for value, truth in zip(found, derivatives(definition, tensors), strict=True):
        assert error(value, truth) <= 1e-11 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("given", [(True, False), (False, True)])
def test_weight_and_bias_are_independent(given):
    x, *affine = make((2, 5, 3, 4))
    affine = [t if g else None for t, g in zip(affine, given, strict=True)]
    found = derivatives(fm.task_batch_norm, [x, *affine])
    for value, truth in zip(found, derivatives(definition, [x, *affine]), strict=True):
        assert error(value, truth) <= 1e-11 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_within_twice_torchs_own_error(dtype, isa):
    tensors = make((3, 40, 4, 6, 6), dtype)
    truth = derivatives(definition, [t.double() for t in tensors])[:4]
    with use_isa(isa):
        found = derivatives(fm.task_batch_norm, tensors)[:4]
    theirs = derivatives(definition, tensors)[:4]
    for value, wanted, own in zip(found, truth, theirs, strict=True):
        assert value.dtype == dtype
        slack = 4 * torch.finfo(dtype).eps * wanted.abs().max().item()
        assert error(value, wanted) <= 2 * error(own, wanted) + slack


def test_far_from_zero_keeps_its_digits():
    x = make((2, 50, 3, 4), torch.float32)[0] + 1000
    truth = definition(x.double())
    assert error(fm.task_batch_norm(x), truth) < 5e-4


def test_gradcheck_and_gradgradcheck():
    tensors = [t.requires_grad_() for t in make((2, 3, 2, 2))]
    assert gradcheck(fm.task_batch_norm, tensors)
    assert gradgradcheck(fm.task_batch_norm, tensors)


def test_third_derivatives():
    tensors = make((2, 4, 3, 3))
    x = tensors[0].clone().requires_grad_()

    def third(call):
        loss = call(x, *tensors[1:]).pow(4).sum()
        for _ in range(2):
            grad = torch.autograd.grad(loss, x, create_graph=True)[0]
            loss = (grad * finite_weights(grad.shape)).sum()
        return torch.autograd.grad(loss, x)[0]

    wanted = third(definition)
    assert error(third(fm.task_batch_norm), wanted) < 1e-10 * wanted.abs().max().item()


def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in make((2, 5, 3, 4)))
    ops = torch.ops.fastmeta
    torch.library.opcheck(ops.task_batch_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(ops.task_batch_norm.default, (x, None, None, 1e-5))
    with torch.no_grad():
        out, mean, rstd = ops.task_batch_norm(x, weight, bias, 1e-5)
    grad = torch.randn_like(out).mT.contiguous().mT.requires_grad_()
    own = (grad, x, weight, mean, rstd, 1e-5)
    torch.library.opcheck(ops.task_batch_norm_backward.default, own)
    columns = torch.randn_like(mean).requires_grad_()
    second = (out.detach().requires_grad_(), columns, columns, *own)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.task_batch_norm_second.default, second, test_utils=checks)


def test_functorch_transforms():
    x, weight, bias = make((2, 4, 3, 2))

    def loss(call):
        return lambda x: call(x, weight, bias).pow(3).sum()

    twice = lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x)  # noqa: E731
    wanted = twice(loss(definition))
    assert error(twice(loss(fm.task_batch_norm)), wanted) < 1e-11 * wanted.abs().max().item()
    thrice = lambda f: torch.func.grad(  # noqa: E731
        lambda x: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x).sin().sum()
    )(x)
    wanted = thrice(loss(definition))
    assert error(thrice(loss(fm.task_batch_norm)), wanted) < 1e-10 * wanted.abs().max().item()
    stacked = torch.stack([x, -x], 2)
    per_sample = torch.vmap(torch.func.grad(loss(fm.task_batch_norm)), 2)(stacked)
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss(definition))(-x))


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    x, weight, bias = (t.requires_grad_() for t in make((2, 5, 3, 4)))
    loss = lambda x: fm.task_batch_norm(x, weight, bias).pow(3).sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("isa", isas())
def test_layouts(isa):
    x, weight, bias = make((3, 5, 4, 7))
    with use_isa(isa):
        out = fm.task_batch_norm(x, weight, bias)
        for _, own in layouts(x):
            assert_same(fm.task_batch_norm(own, weight.mT.contiguous().mT, bias), out)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=str)
def test_empty_inputs(shape):
    tensors = [t.requires_grad_() for t in make(shape)]
    out = fm.task_batch_norm(*tensors)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)


def test_a_single_value_normalises_to_the_bias():
    x, weight, bias = make((2, 1, 3))
    torch.testing.assert_close(fm.task_batch_norm(x, weight, bias)[:, 0], bias)


def test_nan_stays_in_its_task_and_channel():
    x = make((2, 4, 3, 2))[0]
    x[1, 2, 0, 1] = torch.nan
    wrong = fm.task_batch_norm(x).isnan()
    assert wrong[1, :, 0].all()
    assert wrong.sum() == 8


def test_bit_equal_for_any_number_of_threads():
    tensors = make((2, 50, 17, 30), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(derivatives(fm.task_batch_norm, tensors))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        for value, first in zip(result[:4], results[0][:4], strict=True):
            assert_same(value, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x must be of shape \[T, N, C, \.\.\.\], got shape"),
        ({"weight": torch.ones(2, 3)}, r"weight must be of shape \[T, C\] = \[2, 4\]"),
        ({"bias": torch.ones(2, 4).double()}, r"bias must be torch\.float32, like x"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"eps": "small"}, "eps must be a number, got str 'small'"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"x": torch.ones(2, 3, 4)}
    with pytest.raises((TypeError, ValueError), match=f"task_batch_norm: {message}"):
        fm.task_batch_norm(**(given | change))


@pytest.mark.parametrize("isa", isas())
def test_rows_that_do_not_fill_a_vector_at_the_largest_numbers(isa):
    """What lies past a row must not reach a sum, not even as 0 times infinity."""
    x = torch.full((1, 7, 2, 3), 2.0**121, requires_grad=True)
    weight = torch.ones(1, 2, requires_grad=True)
    with use_isa(isa):
        grads = torch.autograd.grad(fm.task_batch_norm(x, weight).sum(), (x, weight))
    assert all(g.isfinite().all() for g in grads)
