"""``fm.task_conv2d`` against one convolution for each task."""

import pytest
import torch
import torch.nn.functional as F
from opcases import assert_same, error, finite_weights, isas, layouts, use_isa
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm

# tasks, rows, channels, (height, width), outputs, (kh, kw), stride, padding, dilation, groups
CASES = {
    "one": (1, 1, 1, (1, 1), 1, (1, 1), 1, 0, 1, 1),
    "conv4": (2, 3, 5, (7, 7), 6, (3, 3), 2, 1, 1, 1),
    "odd": (3, 2, 3, (9, 5), 7, (3, 2), 1, 1, 1, 1),
    "pairs": (2, 2, 2, (8, 9), 3, (2, 3), (2, 3), (0, 2), (3, 1), 1),
    "dilated": (2, 2, 2, (9, 9), 4, (3, 3), 1, 2, 2, 1),
    "groups": (2, 3, 6, (5, 6), 9, (3, 3), 1, 1, 1, 3),
    "depthwise": (2, 2, 4, (6, 6), 4, (3, 3), 2, 1, 1, 4),
    "pointwise": (2, 3, 9, (4, 5), 5, (1, 1), 1, 0, 1, 1),
    "pointwise_strided": (2, 3, 9, (5, 5), 5, (1, 1), 2, 0, 1, 1),
    "wide_padding": (1, 2, 2, (3, 3), 3, (2, 2), 1, 3, 1, 1),
    "unused_border": (1, 2, 2, (8, 8), 3, (2, 2), 3, 0, 1, 1),
    "crosses_blocks": (2, 9, 40, (11, 12), 33, (3, 3), 1, 1, 1, 1),
}


def make(name, dtype=torch.float64, *, bias=True):
    tasks, rows, channels, size, outputs, kernel, stride, padding, dilation, groups = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(tasks, rows, channels, *size)
    weight = normal(tasks, outputs, channels // groups, *kernel)
    return [x, weight, normal(tasks, outputs) if bias else None], (
        stride,
        padding,
        dilation,
        groups,
    )


def definition(x, weight, bias, *geometry):
    biases = [None] * len(x) if bias is None else bias
    return torch.stack([F.conv2d(*own, *geometry) for own in zip(x, weight, biases, strict=True)])


def derivatives(function, tensors, geometry):
    """Output, gradients, and gradients of a weighted sum of the gradients."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    given = [leaf for leaf in leaves if leaf is not None]
    out = function(*leaves, *geometry)
    grads = torch.autograd.grad(out.square().sum() / 2, given, create_graph=True)
    scalar = sum((g * finite_weights(g.shape).to(g)).sum() for g in grads)
    return [out, *grads, *torch.autograd.grad(scalar, given)]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_matches_the_definition_to_second_order(name, bias, isa):
    tensors, geometry = make(name, bias=bias)
    with use_isa(isa):
        found = derivatives(fm.task_conv2d, tensors, geometry)
    for value, truth in zip(found, derivatives(definition, tensors, geometry), strict=True):
        assert error(value, truth) <= 1e-12 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_within_twice_torchs_own_error(dtype, isa):
    tensors, geometry = make("crosses_blocks", dtype)
    exact = [t.double() for t in tensors]
    with use_isa(isa):
        found = derivatives(fm.task_conv2d, tensors, geometry)[:4]
    truth = derivatives(definition, exact, geometry)
    theirs = derivatives(definition, tensors, geometry)
    for value, wanted, own in zip(found, truth, theirs, strict=False):
        assert value.dtype == dtype
        slack = 2 * torch.finfo(dtype).eps * wanted.abs().max().item()
        assert error(value, wanted) <= 2 * error(own, wanted) + slack


@pytest.mark.parametrize("name", ["conv4", "pairs", "groups"])
def test_gradcheck_and_gradgradcheck(name):
    tensors, geometry = make(name)
    small = [t[:, :2].clone().requires_grad_() if i == 0 else t for i, t in enumerate(tensors)]
    small = [t.requires_grad_() for t in small]
    call = lambda *given: fm.task_conv2d(*given, *geometry)  # noqa: E731
    assert gradcheck(call, small, fast_mode=True)
    assert gradgradcheck(call, small, fast_mode=True)


def test_third_derivatives():
    tensors, geometry = make("groups")
    weight = tensors[1].clone().requires_grad_()

    def third(call):
        loss = call(tensors[0], weight, None, *geometry).pow(4).sum()
        for _ in range(2):
            grad = torch.autograd.grad(loss, weight, create_graph=True)[0]
            loss = (grad * finite_weights(grad.shape)).sum()
        return torch.autograd.grad(loss, weight)[0]

    wanted = third(definition)
    assert error(third(fm.task_conv2d), wanted) < 1e-11 * wanted.abs().max().item()


@pytest.mark.parametrize("name", ["conv4", "groups"])
def test_opcheck(name):
    (x, weight, bias), (stride, padding, dilation, groups) = make(name)
    geometry = (stride,) * 2 + (padding,) * 2 + (dilation,) * 2 + (groups,)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    ops = torch.ops.fastmeta
    torch.library.opcheck(ops.task_conv2d.default, (x, weight, bias, *geometry))
    with torch.no_grad():
        grad = ops.task_conv2d(x, weight, None, *geometry)
    grad = grad.mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(ops.task_conv2d_input.default, (grad, weight, *x.shape[3:], *geometry))
    torch.library.opcheck(ops.task_conv2d_weight.default, (grad, x, *weight.shape[3:], *geometry))


def test_functorch_transforms():
    (x, weight, bias), geometry = make("conv4")

    def loss(call):
        return lambda w: call(x, w, bias, *geometry).pow(3).sum()

    twice = lambda f: torch.func.grad(lambda w: torch.func.grad(f)(w).square().sum())(weight)  # noqa: E731
    wanted = twice(loss(definition))
    assert error(twice(loss(fm.task_conv2d)), wanted) < 1e-12 * wanted.abs().max().item()
    weights = torch.stack([weight, -weight, 2 * weight], 2)
    mapped = torch.vmap(lambda w: fm.task_conv2d(x, w, bias, *geometry), 2)(weights)
    torch.testing.assert_close(mapped[2], definition(x, 2 * weight, bias, *geometry))
    per_sample = torch.vmap(torch.func.grad(loss(fm.task_conv2d)), 2)(weights)
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss(definition))(-weight))


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    (x, weight, bias), geometry = make("conv4")
    weight.requires_grad_()
    loss = lambda w: fm.task_conv2d(x, w, bias, *geometry).square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(weight), weight), torch.autograd.grad(loss(weight), weight)
    )


@pytest.mark.parametrize("isa", isas())
def test_layouts(isa):
    (x, weight, bias), geometry = make("odd")
    with use_isa(isa):
        out = fm.task_conv2d(x, weight, bias, *geometry)
        for _, own in layouts(x):
            for _, strided in layouts(weight):
                assert_same(fm.task_conv2d(own, strided, bias, *geometry), out)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty_inputs(shape):
    x = torch.ones(*shape, 4, 5, 5, requires_grad=True)
    weight = torch.ones(shape[0], 6, 4, 3, 3, requires_grad=True)
    bias = torch.ones(shape[0], 6, requires_grad=True)
    out = fm.task_conv2d(x, weight, bias)
    assert out.shape == (*shape, 6, 3, 3)
    for grad, tensor in zip(
        torch.autograd.grad(out.sum(), [x, weight, bias]), [x, weight, bias], strict=True
    ):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_bit_equal_for_any_number_of_threads():
    tensors, geometry = make("crosses_blocks", torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(derivatives(fm.task_conv2d, tensors, geometry))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        for value, first in zip(result[:4], results[0][:4], strict=True):
            assert_same(value, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4, 5, 5)}, r"x must be of shape \[T, N, C, H, W\], got"),
        ({"weight": torch.ones(2, 6, 3, 3, 3)}, r"weight must be of shape .* = \[2, \*, 4, \*, \*"),
        ({"weight": torch.ones(2, 6, 4, 3, 3).half()}, r"weight must be torch\.float32, like x"),
        ({"bias": torch.ones(2, 5)}, r"bias must be of shape \[T, O\] = \[2, 6\]"),
        ({"groups": 3}, "groups must be a divisor of the 4 channels of x, got 3"),
        ({"groups": 2.0}, "groups must be an integer of at least 1, got float 2.0"),
        ({"stride": 0}, "stride must be an integer of at least 1 and below 2147483648, got 0"),
        ({"stride": (1, 2, 3)}, "stride must be an integer or a pair of integers"),
        ({"padding": -1}, "padding must be an integer of at least 0"),
        ({"dilation": 3}, r"x must be at least as large, with its padding, as the window \[3, 3\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"x": torch.ones(2, 3, 4, 5, 5), "weight": torch.ones(2, 6, 4, 3, 3)}
    with pytest.raises((TypeError, ValueError), match=f"task_conv2d: {message}"):
        fm.task_conv2d(**(given | change))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (2**63 - 1, 0)},
        {"padding": (2**61, 0), "dilation": (2**62, 1)},
        {"padding": (2**31 - 1, 2**31 - 1), "dilation": (2**31 - 1, 2**31 - 1)},
    ],
    ids=str,
)
def test_sizes_past_all_memory_are_refused(options):
    x, weight = torch.zeros(1, 1, 1, 5, 5), torch.zeros(1, 1, 1, 3, 3)
    with pytest.raises((ValueError, RuntimeError)):
        fm.task_conv2d(x, weight, **options)
    two = {k: v if isinstance(v, tuple) else (v, v) for k, v in options.items()}
    geometry = (1, 1, *two.get("padding", (0, 0)), *two.get("dilation", (1, 1)), 1)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.fastmeta.task_conv2d(x, weight, None, *geometry)
