"""The op suite on a device: against the definition in float64, with the cases that all tests share."""

import pytest
import torch
from opcases import (
    CASES,
    SIMILARITIES,
    SMALL,
    assert_within_budget,
    attention_definition,
    eager_attention,
    error,
    gradient_sizes,
    gradients,
    largest_logit,
    layouts,
    leaves,
    weighted_sum,
)
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm

NATIVE = (
    "adam_update",
    "adam_update_backward",
    "matching_attention",
    "matching_attention_backward",
    "matching_attention_double_backward",
    "matching_nll",
    "matching_nll_backward",
    "matching_nll_double_backward",
    "momentum_update",
    "momentum_update_backward",
    "segment_mean",
    "segment_mean_backward",
    "sgd_update",
    "sgd_update_backward",
)
LOW = [torch.float32, torch.bfloat16, torch.float16]


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def attention(query, support, labels, scale, weight, classes, similarity):
    return fm.matching_attention(
        query, support, labels, classes, similarity=similarity, scale=scale, weight=weight
    )


def nll_definition(logp, targets, classes):
    """Loss of each query: 0 where ignored."""
    counts = (targets >= 0) & (targets < classes)
    index = torch.where(counts, targets, 0).unsqueeze(-1)
    return torch.where(counts, -logp.gather(-1, index).squeeze(-1), 0)


def finite_sum(value):
    """`weighted_sum` for losses, whose infinities are positive."""
    return weighted_sum(torch.where(value.isinf(), 0, value))


def test_every_op_has_its_kernel(device):
    ops = fm.backend_info()["ops"]
    assert {op: ops[op][device.type] for op in NATIVE} == dict.fromkeys(NATIVE, "native")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention_matches_the_definition_in_float64(case, similarity, device):
    query, support, labels, _, scale, weight = case.make(similarity=similarity)
    truth_inputs = leaves(query, support, scale, weight)
    q, s, a, w = truth_inputs
    truth = attention_definition(q, s, labels, case.classes, similarity, a, w)
    truth_grads = gradients(weighted_sum(truth), truth_inputs)
    tensors = leaves(*on(device, query, support, scale, weight))
    value = attention(*tensors[:2], labels.to(device), *tensors[2:], case.classes, similarity)
    grads = gradients(weighted_sum(value.cpu()), tensors)
    assert error(value.detach().cpu(), truth.detach()) < 1e-10
    for grad, expected in zip(grads, truth_grads, strict=True):
        assert error(grad.cpu(), expected) < 1e-9 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nll_matches_the_definition_in_float64(case, similarity, device):
    query, support, labels, targets, scale, weight = case.make(similarity=similarity)
    truth_inputs = leaves(query, support, scale, weight)
    q, s, a, w = truth_inputs
    logp = attention_definition(q, s, labels, case.classes, similarity, a, w)
    truth = nll_definition(logp, targets, case.classes)
    truth_grads = gradients(finite_sum(truth), truth_inputs)
    tensors = leaves(*on(device, query, support, scale, weight))
    value = fm.matching_nll(
        *tensors[:2],
        labels.to(device),
        targets.to(device),
        case.classes,
        similarity=similarity,
        scale=tensors[2],
        weight=tensors[3],
        reduction="none",
    )
    grads = gradients(finite_sum(value.cpu()), tensors)
    assert error(value.detach().cpu(), truth.detach()) < 1e-10
    for grad, expected in zip(grads, truth_grads, strict=True):
        assert error(grad.cpu(), expected) < 1e-9 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.padded], ids=lambda c: c.name)
def test_error_is_within_twice_pytorchs_own(case, similarity, dtype, device):
    query, support, labels, _, scale, weight = case.make(dtype, similarity=similarity)
    truth_inputs = leaves(
        *(t if t is None else t.double() for t in (query, support, scale, weight))
    )
    q, s, a, w = truth_inputs
    truth = attention_definition(q, s, labels, case.classes, similarity, a, w)
    truth_grads = gradients(weighted_sum(truth), truth_inputs)
    eager_inputs = leaves(*on(device, query, support, scale.to(dtype), weight))
    q, s, a, w = eager_inputs
    eager = eager_attention(q, s, labels.to(device), case.classes, similarity, a, w)
    eager_grads = gradients(weighted_sum(eager.cpu()), eager_inputs)
    tensors = leaves(*on(device, query, support, scale, weight))
    value = attention(*tensors[:2], labels.to(device), *tensors[2:], case.classes, similarity)
    grads = gradients(weighted_sum(value.cpu()), tensors)
    assert value.dtype == dtype
    logit = largest_logit(query, support, labels, similarity, scale, weight)
    sizes = gradient_sizes(query, truth_grads, scale)
    got, peer = value.detach().cpu(), eager.detach().cpu()
    assert_within_budget(got, truth.detach(), peer, dtype, "value", logit=logit)
    for i, (grad, wanted, own) in enumerate(zip(grads, truth_grads, eager_grads, strict=True)):
        what = f"gradient {i}"
        assert_within_budget(
            grad.cpu(), wanted, own.cpu(), dtype, what, logit=logit, magnitude=sizes[i]
        )


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_strides_leave_the_numbers_alone(similarity, device):
    query, support, labels, _, scale, weight = on(device, *SMALL.make(similarity=similarity))
    expected = attention(query, support, labels, scale, weight, SMALL.classes, similarity)
    for (name, q), (_, s) in zip(layouts(query), layouts(support), strict=True):
        got = attention(q, s, labels, scale, weight, SMALL.classes, similarity)
        assert torch.equal(got, expected), name
    shifted = torch.cat([query.new_zeros(1), query.flatten()])[1:].view_as(query)
    got = attention(shifted, support, labels, scale, weight, SMALL.classes, similarity)
    assert torch.equal(got, expected), "off a 16-byte boundary"


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_first_and_second_derivatives(similarity, device):
    query, support, labels, _, scale, weight = on(device, *SMALL.make(similarity=similarity))
    inputs = tuple(t for t in leaves(query, support, scale, weight) if t is not None)

    def probs(query, support, scale, weight=None):
        return attention(query, support, labels, scale, weight, SMALL.classes, similarity).exp()

    assert gradcheck(probs, inputs)
    assert gradgradcheck(probs, inputs)


def second_derivatives(value, inputs):
    """Gradients, to the inputs, of a weighted sum of the gradients of the value."""
    firsts = torch.autograd.grad(finite_sum(value), inputs, create_graph=True)
    return torch.autograd.grad(sum(weighted_sum(g.cpu()) for g in firsts), inputs)


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.padded], ids=lambda c: c.name)
def test_second_derivatives_match_the_definition_in_float64(case, similarity, fused, device):
    query, support, labels, targets, scale, weight = case.make(similarity=similarity)

    def derivatives(place, function):
        made = leaves(*on(place, query, support, scale, weight))
        return second_derivatives(function(*made).cpu(), [t for t in made if t is not None])

    def definition(q, s, a, w):
        logp = attention_definition(q, s, labels, case.classes, similarity, a, w)
        return nll_definition(logp, targets, case.classes) if fused else logp

    def kernels(q, s, a, w):
        if not fused:
            return attention(q, s, labels.to(device), a, w, case.classes, similarity)
        ints = labels.to(device), targets.to(device)
        options = {"similarity": similarity, "scale": a, "weight": w, "reduction": "none"}
        return fm.matching_nll(q, s, *ints, case.classes, **options)

    truth = derivatives(torch.device("cpu"), definition)
    found = derivatives(device, kernels)
    rounding = 1e-11 * max(100.0, largest_logit(query, support, labels, similarity, scale, weight))
    for got, expected in zip(found, truth, strict=True):
        assert error(got.cpu(), expected) < rounding * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_schema_fake_and_autograd_agree(similarity, device):
    made = SMALL.make(similarity=similarity)
    query, support, labels, targets, scale, weight = on(device, *made)
    scale, weight = scale.reshape(1), None if weight is None else weight.reshape(1, -1)
    query, support, scale, weight = leaves(query, support, scale, weight)
    classes = SMALL.classes
    torch.library.opcheck(
        torch.ops.fastmeta.matching_attention.default,
        (query, support, labels, scale, weight, classes, similarity),
    )
    torch.library.opcheck(
        torch.ops.fastmeta.matching_nll.default,
        (query, support, labels, targets, scale, weight, classes, similarity),
    )


def test_functorch_transforms(device):
    query, support, labels, _, scale, _ = on(device, *SMALL.make())

    def loss(q, s):
        return weighted_sum(attention(q, s, labels[0], scale, None, SMALL.classes, "cosine").cpu())

    batched = torch.func.vmap(torch.func.grad(loss))(query, support)
    for t in range(query.shape[0]):
        single = torch.func.grad(loss)(query[t], support[t])
        torch.testing.assert_close(batched[t], single)


def test_autocast_runs_in_low_precision_and_returns_float32(device):
    query, support, labels, _, scale, _ = on(device, *SMALL.make(torch.float32))
    with torch.autocast(device.type, torch.bfloat16):
        value = attention(query, support, labels, scale, None, SMALL.classes, "cosine")
    assert value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_segment_mean(case, dtype, device):
    _, support, labels, *_ = case.make(dtype)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), case.classes).double()
    one_hot = one_hot * (labels >= 0).unsqueeze(-1)
    counts = one_hot.sum(1)
    wide = support.double().requires_grad_()
    truth = (one_hot.mT @ wide) / counts.clamp(min=1).unsqueeze(-1)
    (truth_grad,) = torch.autograd.grad(weighted_sum(truth), wide)
    values = support.to(device).requires_grad_()
    mean, count = fm.segment_mean(values, labels.to(device), case.classes)
    (grad,) = torch.autograd.grad(weighted_sum(mean.cpu()), values)
    assert torch.equal(count.double().cpu(), counts)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(mean.double().cpu(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double().cpu(), truth_grad, rtol=tolerance, atol=tolerance)


def sgd(p, g, states, r):
    return (p - r * g,)


def momentum(p, g, states, r):
    buffer = 0.75 * states[0] + g
    return p - r * buffer, buffer


def adam(p, g, states, r):
    mean, square = 0.875 * states[0] + 0.125 * g, 0.75 * states[1] + 0.25 * g**2
    step = mean / (1 - 0.875**2) / ((square / (1 - 0.75**2)).sqrt() + 1e-2)
    return p - r * step, mean, square


def fused_sgd(p, g, states, r):
    return [fm.sgd_update(p, g, r)]


def fused_momentum(p, g, states, r):
    return fm.momentum_update(p, g, states[0], r, momentum=0.75)


def fused_adam(p, g, states, r):
    state = fm.AdamState(1, *states)
    new, state = fm.adam_update(p, g, state, r, betas=(0.875, 0.75), eps=1e-2)
    return new, state.mean, state.square


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("rate", ["number", "per_element", "per_task", "one"])
@pytest.mark.parametrize(
    ("formula", "fused", "states"),
    [(sgd, fused_sgd, 0), (momentum, fused_momentum, 1), (adam, fused_adam, 2)],
    ids=["sgd", "momentum", "adam"],
)
def test_updates(formula, fused, states, rate, dtype, device):
    shapes = [(3, 5), (3, 64, 9), (3, 1025), (3,)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    columns = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2)]
    columns += [[torch.rand(shape, dtype=acc) + 0.1 for shape in shapes] for _ in range(states)]
    if rate == "number":
        rates = [torch.tensor(0.1, dtype=acc) for _ in shapes]
    elif rate == "per_element":
        rates = [torch.randn(shape[1:], dtype=acc) for shape in shapes]
    else:
        rates = [
            torch.randn((3 if rate == "per_task" else 1,) + (1,) * (len(shape) - 1), dtype=acc)
            for shape in shapes
        ]
    flat = [t for column in (*columns, rates) for t in column]

    def split(tensors):
        p, g, *kept, r = (tensors[k : k + 4] for k in range(0, len(tensors), 4))
        return p, g, kept, r

    wide = leaves(*(t.double() for t in flat))
    p, g, kept, r = split(wide)
    rows = [formula(p[k], g[k], [state[k] for state in kept], r[k]) for k in range(4)]
    truth = [t for column in zip(*rows, strict=True) for t in column]
    truth_grads = gradients(sum(map(weighted_sum, truth)), wide)
    inputs = leaves(*on(device, *flat))
    updated = [t for column in fused(*split(inputs)) for t in column]
    found = gradients(sum(weighted_sum(u.cpu()) for u in updated), inputs)
    for got, wanted in zip([*updated, *found], [*truth, *truth_grads], strict=True):
        tolerance = 64 * torch.finfo(dtype).eps  # weights of the sum are rounded to dtype as well
        scale = max(1.0, wanted.detach().abs().max().item())
        torch.testing.assert_close(
            got.double().cpu(), wanted, rtol=tolerance, atol=tolerance * scale
        )


def test_a_maml_step_equals_that_of_the_cpu(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    ).double()
    inputs = torch.randn(4, 6, 8, dtype=torch.float64)
    labels = torch.arange(6).remainder(3).expand(4, 6)
    losses, grads = [], []
    for place in ("cpu", device):
        model.to(place)
        maml = fm.MAML(model, lr=0.3, steps=3)
        out = maml(inputs.to(place), labels.to(place), inputs.to(place))
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten().to(place))
        losses.append(loss.cpu())
        grads.append([g.cpu() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(losses[1], losses[0])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, wanted)
