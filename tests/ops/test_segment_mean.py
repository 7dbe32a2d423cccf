"""``fm.segment_mean`` against its definition: the mean of a class's rows."""

import pytest
import torch
from opcases import CASES, assert_same, error, finite_weights, isas, layouts, use_isa
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm


def definition(values, labels, num_classes):
    means, counts = [], []
    for rows, own in zip(values, labels, strict=True):
        for c in range(num_classes):
            chosen = rows[own == c]
            counts.append(float(len(chosen)))
            means.append(chosen.mean(0) if len(chosen) else rows.new_zeros(rows.shape[-1]))
    shape = (values.shape[0], num_classes)
    return torch.stack(means).reshape(*shape, -1), torch.tensor(counts).reshape(shape)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_definition_in_float64(case, isa):
    _, values, labels, *_ = case.make()
    truth, counts = definition(values, labels, case.classes)
    with use_isa(isa):
        mean, count = fm.segment_mean(values, labels, case.classes)
    assert error(mean, truth) < 1e-13
    assert torch.equal(count, counts.double())
    weights = finite_weights(truth.shape)
    v = values.clone().requires_grad_()
    with use_isa(isa):
        grad = torch.autograd.grad(
            (fm.segment_mean(v, labels, case.classes)[0] * weights).sum(), v
        )[0]
    w = values.clone().requires_grad_()
    expected = torch.autograd.grad((definition(w, labels, case.classes)[0] * weights).sum(), w)[0]
    assert error(grad, expected) < 1e-13


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype, isa):
    _, values, labels, *_ = CASES[3].make(dtype)
    truth, _ = definition(values.double(), labels, 4)
    with use_isa(isa):
        mean, count = fm.segment_mean(values, labels, 4)
    assert mean.dtype == dtype
    assert count.dtype == torch.float32
    assert error(mean, truth) <= torch.finfo(dtype).eps * truth.abs().max().item()


def test_long_float32_sums_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, 200_000, 3, generator=generator) + 1
    labels = torch.zeros(1, 200_000, dtype=torch.long)
    mean, _ = fm.segment_mean(values, labels, 1)
    truth = values.double().mean(1, keepdim=True)
    assert error(mean, truth) < (2e-6 if fm.backend_info()["native"] else 1e-3)


def test_gradcheck_and_gradgradcheck():
    _, values, labels, *_ = CASES[5].make()
    v = values[:2, :7, :4].clone().requires_grad_()
    assert gradcheck(lambda v: fm.segment_mean(v, labels[:2, :7], 3)[0], v)
    assert gradgradcheck(lambda v: fm.segment_mean(v, labels[:2, :7], 3)[0], v)


def test_opcheck():
    _, values, labels, *_ = CASES[3].make()
    values = values.requires_grad_()
    torch.library.opcheck(torch.ops.fastmeta.segment_mean.default, (values, labels, 4))
    with torch.no_grad():
        mean, count = torch.ops.fastmeta.segment_mean(values, labels, 4)
    grad = torch.randn_like(mean).mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(torch.ops.fastmeta.segment_mean_backward.default, (grad, labels, count))


def test_functorch_transforms():
    _, values, labels, *_ = CASES[3].make()

    def loss(v):
        return fm.segment_mean(v, labels, 4)[0].pow(3).sum()

    def truth(v):
        return definition(v, labels, 4)[0].pow(3).sum()

    assert error(torch.func.grad(loss)(values), torch.func.grad(truth)(values)) < 1e-12
    twice = lambda f: torch.func.grad(lambda v: torch.func.grad(f)(v).square().sum())(values)  # noqa: E731
    assert error(twice(loss), twice(truth)) < 1e-12
    stacked = torch.stack([values, -values])
    mapped = torch.vmap(torch.func.grad(loss))(stacked)
    torch.testing.assert_close(mapped[1], torch.func.grad(loss)(-values))
    per_label = torch.vmap(lambda y: fm.segment_mean(values, y, 4)[0])(
        torch.stack([labels, 3 - labels])
    )
    torch.testing.assert_close(per_label[1], fm.segment_mean(values, 3 - labels, 4)[0])


@pytest.mark.compile
def test_compiles_without_graph_breaks():
    _, values, labels, *_ = CASES[3].make()
    v = values.requires_grad_()
    loss = lambda v: fm.segment_mean(v, labels, 4)[0].square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(v), v), torch.autograd.grad(loss(v), v))


def test_layouts_broadcasting_and_unbatched():
    _, values, labels, *_ = CASES[3].make()
    mean, count = fm.segment_mean(values, labels, 4)
    for _, strided in layouts(values):
        assert torch.equal(fm.segment_mean(strided, labels, 4)[0], mean)
    one, own = fm.segment_mean(values[0], labels[0].int(), 4)
    assert torch.equal(one, mean[0])
    assert torch.equal(own, count[0])
    shared, _ = fm.segment_mean(values[0], labels, 4)
    assert torch.equal(shared[1], fm.segment_mean(values[0], labels[1], 4)[0])


def test_padding_nan_and_empty_class():
    values = torch.tensor([[[1.0, 2.0], [torch.nan, 5.0], [torch.nan, 7.0]]])
    mean, count = fm.segment_mean(values, torch.tensor([[0, -100, 1]]), 3)
    assert torch.equal(count, torch.tensor([[1.0, 1.0, 0.0]]))
    assert torch.equal(mean[0, 0], torch.tensor([1.0, 2.0]))
    assert mean[0, 1, 0].isnan()
    assert mean[0, 1, 1] == 7
    assert torch.equal(mean[0, 2], torch.zeros(2))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_inputs(shape):
    values = torch.ones(shape, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.long)
    mean, count = fm.segment_mean(values, labels, 2)
    assert mean.shape == (shape[0], 2, shape[2])
    assert count.shape == (shape[0], 2)
    assert torch.autograd.grad(mean.sum(), values)[0].shape == shape


def test_bit_equal_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, 33, generator=generator)
    labels = torch.randint(0, 7, (3, 5000), generator=generator)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(fm.segment_mean(values, labels, 7)[0])
        finally:
            torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


V, Y = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("error_type", "message", "args"),
    [
        (TypeError, "values must be a float32", (V.int(), Y, 2)),
        (ValueError, "values must be of at least 2 dimensions", (V[0, 0], Y[0], 2)),
        (TypeError, "labels must be an integer tensor", (V, Y.float(), 2)),
        (ValueError, r"labels must be of shape \[..., S=5\]", (V, Y[:, 1:], 2)),
        (ValueError, r"labels must be of leading shape \[2\]", (V, Y[:1].expand(3, 5), 2)),
        (ValueError, r"labels must be in \[0, num_classes=2\) or -100, got 3", (V, Y + 3, 2)),
        (ValueError, "labels must be on cpu", (V, Y.to("meta"), 2)),
        (ValueError, "num_classes must be an integer of at least 1", (V, Y, 0)),
    ],
)
def test_bad_input_names_the_argument(error_type, message, args):
    with pytest.raises(error_type, match=f"segment_mean: .*{message}"):
        fm.segment_mean(*args)
