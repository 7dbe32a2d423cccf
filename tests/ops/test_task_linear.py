"""``fm.task_linear`` against one linear layer for each task."""

import pytest
import torch
import torch.nn.functional as F
from opcases import assert_same, error, finite_weights, isas, layouts, use_isa
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm

SIZES = [(1, 1, 1, 1), (3, 5, 7, 4), (2, 17, 33, 9), (2, 130, 65, 41), (4, 6, 784, 16)]


def make(sizes, dtype=torch.float64, *, bias=True):
    tasks, rows, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [normal(tasks, rows, inputs), normal(tasks, outputs, inputs)]
    return [*tensors, normal(tasks, outputs) if bias else None]


def definition(x, weight, bias=None):
    biases = [None] * len(x) if bias is None else bias
    return torch.stack([F.linear(*own) for own in zip(x, weight, biases, strict=True)])


def derivatives(function, tensors):
    """Output, gradients, and gradients of a weighted sum of the gradients."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    given = [leaf for leaf in leaves if leaf is not None]
    out = function(*leaves)
    grads = torch.autograd.grad(out.square().sum() / 2, given, create_graph=True)
    scalar = sum((g * finite_weights(g.shape).to(g)).sum() for g in grads)
    return [out, *grads, *torch.autograd.grad(scalar, given)]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_definition_to_second_order(sizes, bias, isa):
    tensors = make(sizes, bias=bias)
    with use_isa(isa):
        found = derivatives(fm.task_linear, tensors)
    for value, truth in zip(found, derivatives(definition, tensors), strict=True):
        assert error(value, truth) <= 1e-12 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_within_twice_torchs_own_error(dtype, isa):
    tensors = make((3, 19, 70, 33), dtype)
    exact = definition(*(t.double() for t in tensors))
    with use_isa(isa):
        out = fm.task_linear(*tensors)
    assert out.dtype == dtype
    slack = torch.finfo(dtype).eps * exact.abs().max().item()
    assert error(out, exact) <= 2 * error(definition(*tensors), exact) + slack


def test_gradcheck_and_gradgradcheck():
    tensors = [t.requires_grad_() for t in make((2, 3, 4, 2))]
    assert gradcheck(fm.task_linear, tensors)
    assert gradgradcheck(fm.task_linear, tensors)


def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in make((2, 3, 4, 5)))
    op = torch.ops.fastmeta.task_linear.default
    torch.library.opcheck(op, (x, weight, bias))
    torch.library.opcheck(op, (x, weight, None))
    torch.library.opcheck(op, (x.mT.detach(), weight[..., :3].detach(), None))


def test_functorch_transforms():
    x, weight, bias = make((2, 3, 4, 5))

    def loss(call):
        return lambda w: call(x, w, bias).pow(3).sum()

    twice = lambda f: torch.func.grad(lambda w: torch.func.grad(f)(w).square().sum())(weight)  # noqa: E731
    assert error(twice(loss(fm.task_linear)), twice(loss(definition))) < 1e-9
    weights = torch.stack([weight, -weight, 2 * weight], 1)
    mapped = torch.vmap(fm.task_linear, (None, 1, None))(x, weights, bias)
    torch.testing.assert_close(mapped[2], definition(x, 2 * weight, bias))
    per_sample = torch.vmap(torch.func.grad(loss(fm.task_linear)), 1)(weights)
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss(definition))(-weight))


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    x, weight, bias = (t.requires_grad_() for t in make((2, 3, 4, 5)))
    loss = lambda w: fm.task_linear(x, w, bias).square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(weight), weight), torch.autograd.grad(loss(weight), weight)
    )


@pytest.mark.parametrize("isa", isas())
def test_layouts(isa):
    x, weight, bias = make((3, 5, 7, 4))
    with use_isa(isa):
        out = fm.task_linear(x, weight, bias)
        for _, own in layouts(x):
            for _, strided in layouts(weight):
                found = fm.task_linear(own, strided, bias)  # by another path, in another order
                torch.testing.assert_close(found, out, rtol=1e-13, atol=1e-13)
        shared = fm.task_linear(x, weight[:1].expand(3, -1, -1), bias[:1].expand(3, -1))
    torch.testing.assert_close(shared, F.linear(x, weight[0], bias[0]))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=str)
def test_empty_inputs(sizes):
    tensors = [t.requires_grad_() for t in make(sizes)]
    out = fm.task_linear(*tensors)
    assert out.shape == (*sizes[:2], sizes[3])
    assert torch.equal(out, definition(*tensors) if sizes[0] else out)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]


def test_bit_equal_for_any_number_of_threads():
    tensors = make((2, 300, 200, 130), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(fm.task_linear(*tensors))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x must be of shape \[T, N, I\], got shape \[3, 4\]"),
        ({"x": torch.ones(2, 3, 4).long()}, "x must be a float32, float64, bfloat16 or float16"),
        ({"weight": torch.ones(2, 5, 3)}, r"weight must be of shape \[T, O, I\] = \[2, \*, 4\]"),
        ({"weight": torch.ones(2, 5, 4).double()}, r"weight must be torch\.float32, like x"),
        ({"bias": torch.ones(2, 4)}, r"bias must be of shape \[T, O\] = \[2, 5\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"x": torch.ones(2, 3, 4), "weight": torch.ones(2, 5, 4), "bias": torch.ones(2, 5)}
    with pytest.raises((TypeError, ValueError), match=f"task_linear: {message}"):
        fm.task_linear(**(given | change))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("expand", ["outputs", "inputs", "rows", "tasks"])
def test_expanded_operands(expand, rows, isa):
    """Strides of 0, which autograd makes of a sum's gradient too."""
    x, weight, bias = make((2, rows, 64, 40))
    if expand == "outputs":
        weight = weight[:, :1].contiguous().expand(2, 40, 64)
    elif expand == "inputs":
        weight = weight[:, :, :1].contiguous().expand(2, 40, 64)
    elif expand == "rows":
        x = x[:, :1].contiguous().expand(2, rows, 64)
    else:
        x, weight = x[:1].expand(2, rows, 64), weight[:1].expand(2, 40, 64)
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    results = []
    for function in (fm.task_linear, definition):
        with use_isa(isa):
            out = function(*given)
            results.append([out, *torch.autograd.grad(out.sum(), given)])
    for value, truth in zip(*results, strict=True):
        assert error(value, truth) <= 1e-12 * max(1.0, truth.abs().max().item())
