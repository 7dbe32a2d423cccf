"""``MAML`` on the engine against plain unrolling, in float64; and ``MAML.loss`` on every strategy."""

import pytest
import torch
import torch.nn.functional as F
from enginecases import CASES, relative_error
from mamlcases import agree, batch, cross_entropy, make, meta_gradients, unroll
from torch import nn

import fastmeta as fm
from fastmeta.maml import MAML

STRATEGIES = ("engine", "vmap", "loop")
NETS = [
    "mlp",
    "mlp_norms",
    "body_head",
    "tied",
    "conv_bn",
    "conv_bn_eval",
    "instance_norm",
    "group_norm",
    "layer_norm",
    "max_pool",
    "dropout_eval",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def engine(model, *arguments, **options):
    return MAML(model, *arguments, strategy="engine", **options)


def loss_gradients(maml, data):
    """Value of `MAML.loss`, and what its ``backward`` puts into ``.grad``."""
    maml.zero_grad()
    value = maml.loss(*data)
    value.backward()
    named = {n.removeprefix("model."): p.grad for n, p in maml.named_parameters()}
    return value.detach(), {n: g for n, g in named.items() if g is not None}


def both(maml, data, wanted, tolerance=1e-9):
    """The gradients of the call and of `MAML.loss` are the wanted ones, and the engine's."""
    agree(meta_gradients(maml, data), wanted, tolerance)
    assert maml.plan().strategy == "engine"
    agree(loss_gradients(maml, data)[1], wanted, tolerance)
    assert maml.plan().strategy == "engine"


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("name", NETS)
def test_agrees_with_unrolling(name, first_order):
    model, data = make(name)
    wanted = unroll(model, data, lr=0.2, steps=2, first_order=first_order)
    both(engine(model, 0.2, 2, first_order=first_order), data, wanted)


@pytest.mark.parametrize("name", list(CASES))
def test_the_tracer_writes_the_programs_of_the_ops_tests(name):
    case = CASES[name]
    model = case.make()
    maml = engine(
        model,
        0.1,
        1,
        adapt=lambda n, _: n not in case.shared,
        batch_norm="running" if "mean=" in case.program else "batch",
    )
    x = torch.randn(2, 5, *case.shape).double()
    maml(x, torch.randint(3, (2, 5)), x[:, :3])
    (ready,) = maml._runner.engine._programs.values()
    program, fast, _ = case.text(model, "cross_entropy(smoothing=0.0,ignore=-100)")
    assert ready.fast == fast
    found = [n.text() for n in ready.program.nodes]
    for i, shared in enumerate(ready.shared):
        assert shared in case.shared or "running" in shared
        found = [f.replace(f"=s{i},", f"={{{shared}}},") for f in found]
    written = [n for n in program.split(";")[2:-1]]
    if not case.shared:
        assert found == written
    assert [f.split("(")[0] for f in found] == [w.split("(")[0] for w in written]


@pytest.mark.parametrize("steps", [0, 1, 5, 20])
def test_any_number_of_steps(steps):
    model, data = make("mlp")
    both(engine(model, 0.1, steps), data, unroll(model, data, lr=0.1, steps=steps))


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("granularity", ["scalar", "parameter", "element"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_learned_rates(granularity, per_step, first_order):
    model, data = make("mlp_norms")
    maml = engine(
        model, 0.2, 3, learn_lr=granularity, lr_per_step=per_step, first_order=first_order
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for rate in maml.rates.values():
            rate.mul_(1 + 0.5 * torch.rand_like(rate))
    rates = {
        name: maml.rates["all" if granularity == "scalar" else name.replace(".", "/")]
        for name, _ in model.named_parameters()
    }
    wanted = unroll(model, data, rates=rates, per_step=per_step, steps=3, first_order=first_order)
    both(maml, data, wanted)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_learned_rates_of_another_number_of_steps(steps):
    model, data = make("mlp")
    found = []
    for strategy in STRATEGIES:
        maml = MAML(model, 0.2, 3, learn_lr="parameter", lr_per_step=True, strategy=strategy)
        with torch.no_grad():
            for i, rate in enumerate(maml.rates.values()):
                rate.copy_(torch.tensor([0.1, 0.2, 0.3]) + 0.05 * i)
        tasks = maml.adapt(*data[:2], steps=steps)
        value = sum(p.square().sum() for p in tasks.parameters.values())
        grads = torch.autograd.grad(value, list(maml.parameters()), materialize_grads=True)
        found.append(dict(enumerate([*tasks.parameters.values(), *grads])))
    agree(found[0], found[1])
    agree(found[2], found[1])


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_inputs_have_gradients(first_order):
    """The way by which a feature extractor before the model learns, as under ANIL."""
    model, data = make("mlp")
    data[0].requires_grad_()
    data[2].requires_grad_()
    if first_order:
        truth = unroll(
            model, [data[0].detach(), *data[1:]], lr=0.3, steps=2, first_order=True, value=True
        )
        wanted = [torch.zeros_like(data[0]), torch.autograd.grad(truth, data[2])[0]]
    else:
        truth = unroll(model, data, lr=0.3, steps=2, value=True)
        wanted = torch.autograd.grad(truth, [data[0], data[2]])
    maml = engine(model, 0.3, 2, first_order=first_order)
    for loss in (cross_entropy(maml(*data[:3]), data[3]), maml.loss(*data)):
        found = torch.autograd.grad(loss, [data[0], data[2]], materialize_grads=True)
        assert relative_error(found, wanted, 1e-3) < 1e-9


@pytest.mark.parametrize("name", ["body_head", "conv_bn"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_alone_adapts_and_the_body_learns(name, frozen):
    model, data = make(name)
    head = [n for n, _ in model.named_parameters()][-2:]
    body = [n for n, _ in model.named_parameters()][:-2]
    for n in body:
        model.get_parameter(n).requires_grad_(not frozen)
    data[0].requires_grad_()
    maml = engine(model, 0.3, 3, adapt=head)
    wanted = unroll(model, data, lr=0.3, steps=3, adapted=head)
    both(maml, data, wanted)
    assert set(wanted) == set(head if frozen else head + body)
    truth = unroll(model, data, lr=0.3, steps=3, adapted=head, value=True)
    found = torch.autograd.grad(maml.loss(*data), data[0])
    assert relative_error(found, torch.autograd.grad(truth, data[0])) < 1e-9


def test_unused_parameters_stay():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.never, self.used = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model, data = Half().double(), batch((4,))
    maml = engine(model, 0.3, 2, learn_lr="element")
    assert set(loss_gradients(maml, data)[1]) == {
        "used.weight",
        "used.bias",
        "rates.used/weight",
        "rates.used/bias",
    }
    tasks = maml.adapt(*data[:2])
    assert torch.equal(tasks.parameters["never.bias"], model.never.bias.expand(3, 3))
    other = MAML(model, 0.3, 2, strategy="vmap").adapt(*data[:2])
    agree(tasks.parameters, other.parameters)


LOSSES = {
    "mse": (("mse", nn.MSELoss()), F.mse_loss, True),
    "huber": (("huber", nn.HuberLoss()), F.huber_loss, True),
    "huber_delta": ((nn.HuberLoss(delta=0.3),), lambda p, y: F.huber_loss(p, y, delta=0.3), True),
    "bce": (("bce", nn.BCEWithLogitsLoss()), F.binary_cross_entropy_with_logits, True),
    "cross_entropy": (("cross_entropy", nn.CrossEntropyLoss()), F.cross_entropy, False),
    "smoothed": (
        (nn.CrossEntropyLoss(label_smoothing=0.2),),
        lambda p, y: F.cross_entropy(p, y, label_smoothing=0.2),
        False,
    ),
    "weighted": (
        (
            nn.CrossEntropyLoss(
                weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
            ),
        ),
        lambda p, y: F.cross_entropy(
            p, y, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
        ),
        False,
    ),
    "ignoring": (
        (nn.CrossEntropyLoss(ignore_index=2),),
        lambda p, y: F.cross_entropy(p, y, ignore_index=2),
        False,
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_by_name_and_as_modules(name, strategy):
    spellings, inner, numbers = LOSSES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = batch((4,))
    if numbers:
        data[1], data[3] = torch.rand(3, 6, 3).double(), torch.rand(3, 4, 3).double()
    # Each task of its own mean: tasks may count differently many queries.
    outer = lambda out, y: torch.stack([inner(p, t) for p, t in zip(out, y, strict=True)]).mean()  # noqa: E731
    wanted = unroll(model, data, lr=0.3, steps=2, inner=inner, outer=outer)
    truth = unroll(model, data, lr=0.3, steps=2, inner=inner, outer=outer, value=True)
    for loss in spellings:
        maml = MAML(model, 0.3, 2, loss=loss, strategy=strategy)
        value, found = loss_gradients(maml, data)
        torch.testing.assert_close(value, truth.detach(), rtol=1e-10, atol=0)
        agree(found, wanted, 1e-9)
        agree(meta_gradients(maml, data, outer=outer), wanted, 1e-9)
        assert maml.plan().strategy == strategy


def test_losses_that_are_not_the_plain_mean_are_ones_own():
    for loss in (
        nn.MSELoss(reduction="sum"),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        nn.SmoothL1Loss(),
    ):
        maml = engine(nn.Linear(4, 3), 0.1, 1, loss=loss)
        x, y = torch.randn(2, 5, 4), torch.rand(2, 5, 3)
        with pytest.raises(ValueError, match="because the loss is a function of your own"):
            maml(x, y, x)
        value = MAML(maml.model, 0.1, 1, loss=loss).loss(x, y, x, y)
        assert value.dim() == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_counts_for_nothing(strategy):
    model, data = make("mlp")
    data[1][0, 1] = data[1][1, 4:] = -100
    data[3][0, 1] = data[3][2, :2] = -100
    maml = MAML(model, 0.3, 2, strategy=strategy)
    value, found = loss_gradients(maml, data)
    model.zero_grad()
    total = 0
    for x, y, qx, qy in zip(*data, strict=True):
        alone = MAML(model, 0.3, 2, strategy="loop")
        keep, asked = y != -100, qy != -100
        out = alone(x[keep][None], y[keep][None], qx[asked][None])[0]
        total = total + F.cross_entropy(out, qy[asked]) / 3
    total.backward()
    torch.testing.assert_close(value, total.detach(), rtol=1e-10, atol=0)
    agree(found, {n: p.grad for n, p in model.named_parameters()}, 1e-9)
    assert maml.plan().strategy == strategy


@pytest.mark.parametrize("part", ["support", "query"])
def test_padding_and_batch_norm_go_another_way(part, monkeypatch):
    import fastmeta._inner_loop as inner_loop

    monkeypatch.setattr(inner_loop, "has_kernel", lambda device_type: True)
    model, data = make("conv_bn")
    data[1 if part == "support" else 3][0, 1] = -100
    with pytest.raises(ValueError, match="because tasks are padded and batch norm"):
        engine(model, 0.1, 2).loss(*data)
    auto, loop = MAML(model, 0.1, 2), MAML(model, 0.1, 2, strategy="loop")
    found, wanted = loss_gradients(auto, data), loss_gradients(loop, data)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=0)
    agree(found[1], wanted[1])
    assert auto.plan().strategy == "loop"
    whole = batch((2, 4, 4))
    auto.loss(*whole)
    assert auto.plan().strategy == "engine"
    running = engine(model, 0.1, 2, batch_norm="running")
    wanted = loss_gradients(MAML(model, 0.1, 2, batch_norm="running", strategy="loop"), data)
    agree(loss_gradients(running, data)[1], wanted[1], 1e-9)


def test_masked_queries_are_zero():
    model, data = make("mlp")
    mask = torch.rand(3, 4) < 0.6
    out = engine(model, 0.3, 2)(*data[:3], query_mask=mask)
    assert not out[~mask].any()
    wanted = MAML(model, 0.3, 2, strategy="vmap")(*data[:3], query_mask=mask)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_adapt_then_call_is_the_call(name):
    model, data = make(name)
    maml = engine(model, 0.2, 2)
    tasks = maml.adapt(*data[:2])
    assert maml.plan().strategy == "engine"
    out = tasks(data[2])
    torch.testing.assert_close(out, maml(*data[:3]), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(cross_entropy(out, data[3]), list(model.parameters()))
    wanted = unroll(model, data, lr=0.2, steps=2)
    agree(dict(zip(wanted, found, strict=True)), wanted, 1e-9)
    with torch.no_grad():
        more = maml.adapt(*data[:2], steps=7)
    assert not any(p.requires_grad for p in more.parameters.values())


@pytest.mark.parametrize("chunk", [1, 2])
def test_task_chunks_give_the_same_numbers(chunk):
    model, data = make("conv_bn")
    data[0].requires_grad_()
    maml = engine(model, 0.1, 2, task_chunk=chunk, learn_lr="element")
    wanted = meta_gradients(engine(model, 0.1, 2, learn_lr="element"), data)
    on_x = data[0].grad.clone()
    data[0].grad = None
    agree(meta_gradients(maml, data), wanted)
    torch.testing.assert_close(data[0].grad, on_x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1])
def test_dropout(chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    data = batch((4,))
    maml = engine(model, 0.5, 2, task_chunk=chunk)
    weight = model[0].weight
    direction = torch.randn_like(weight)

    def value(step):
        torch.manual_seed(7)
        with torch.no_grad():
            weight.add_(step * direction)
            losses = torch.stack([maml.loss(*data), cross_entropy(maml(*data[:3]), data[3])])
            weight.sub_(step * direction)
        return losses

    slopes = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.manual_seed(7)
    found = [loss_gradients(maml, data)[1], meta_gradients(maml, data)]
    for gradient, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(
            (gradient["0.weight"] * direction).sum(), slope, rtol=1e-6, atol=1e-8
        )
    assert not torch.equal(maml.loss(*data), maml.loss(*data))
    maml.eval()
    assert torch.equal(maml.loss(*data), maml.loss(*data))
    same = engine(model.train(), 0.5, 2, randomness="same")
    with pytest.raises(ValueError, match="because dropout is to be the same for all tasks"):
        same(*data[:3])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_of_a_call(strategy):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2, strategy=strategy)
    value, found = loss_gradients(maml, data)
    wanted = cross_entropy(maml(*data[:3]), data[3])
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=0)
    agree(found, meta_gradients(maml, data))
    maml.zero_grad()
    (3 * maml.loss(*data)).backward()
    agree({n: p.grad / 3 for n, p in model.named_parameters()}, found)
    with torch.no_grad():
        quiet = maml.loss(*data)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, value, rtol=1e-10, atol=0)
    with torch.inference_mode():
        inside = maml.loss(*(d.clone() for d in data))
    torch.testing.assert_close(inside.clone(), value, rtol=1e-10, atol=0)


def test_gradients_accumulate_and_graphs_can_be_kept():
    model, data = make("mlp")
    maml = engine(model, 0.1, 2)
    once = loss_gradients(maml, data)[1]
    maml.zero_grad()
    value = maml.loss(*data)
    value.backward(retain_graph=True)
    value.backward()
    agree({n: p.grad / 2 for n, p in model.named_parameters()}, once)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


def test_a_second_differentiation_is_refused():
    model, data = make("mlp")
    maml = engine(model, 0.1, 2)
    for loss in (maml.loss(*data), cross_entropy(maml(*data[:3]), data[3])):
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated again.*strategy='vmap'"):
            grads[0].sum().backward()


def test_float32_on_a_smooth_network():
    model, data = make("mlp")
    wanted = unroll(model, data, lr=0.1, steps=5)
    single = [d.float() if d.is_floating_point() else d for d in data]
    found = loss_gradients(engine(model.float(), 0.1, 5), single)[1]
    agree({n: g.double() for n, g in found.items()}, wanted, 2e-5)


def test_transforms_and_autocast_go_another_way():
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2)
    wanted = meta_gradients(maml, data)

    def meta_loss(parameters):
        return cross_entropy(torch.func.functional_call(maml, parameters, tuple(data[:3])), data[3])

    found = torch.func.grad(meta_loss)({n: p.detach() for n, p in maml.named_parameters()})
    agree({n.removeprefix("model."): g for n, g in found.items()}, wanted)
    assert maml.plan().strategy == "vmap"


def test_functional_call_reaches_the_engine():
    model, data = make("mlp")
    maml = engine(model, 0.1, 2)
    wanted = maml(*data[:3])
    values = {n: p.detach().clone().requires_grad_() for n, p in maml.named_parameters()}
    out = torch.func.functional_call(maml, values, tuple(data[:3]))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    grads = torch.autograd.grad(cross_entropy(out, data[3]), list(values.values()))
    agree(
        {n.removeprefix("model."): g for n, g in zip(values, grads, strict=True)},
        meta_gradients(maml, data),
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: [d[0], d[1] + 1, *d[2:]], ValueError, r"support_y must be in \[0, 3\)"),
        (lambda d: [*d[:3], d[3] + 1], ValueError, r"query_y must be in \[0, 3\)"),
        (lambda d: [*d[:3], d[3].double()], TypeError, "query_y must be an integer tensor"),
        (lambda d: [*d[:3], d[3][:, :1]], ValueError, r"query_y must be of shape \[3, 4\]"),
        (
            lambda d: [*d[:2], d[2][:, :0], d[3][:, :0]],
            ValueError,
            "at least one task and one query",
        ),
        (lambda d: [*d[:2], d[2][:2], d[3][:2]], ValueError, r"query_x must be of shape \[T=3, Q"),
        (lambda d: [*d[:3], 3], TypeError, "query_y must be a tensor, got int 3"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_loss_says_to_what_it_cannot_use(change, error, match, strategy):
    model, data = make("mlp")
    data[1][0, 0] = data[3][0, 0] = 2
    with pytest.raises(error, match=match):
        MAML(model, 0.1, 2, strategy=strategy).loss(*change(data))


def test_targets_of_another_shape_are_refused():
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(2, 5, 4).double(), torch.randn(2, 5).double()
    for strategy in ("engine", "auto"):
        with pytest.raises(ValueError, match=r"targets are not of the shape|returns the shape of"):
            MAML(model, 0.1, 1, loss="mse", strategy=strategy).loss(x, y, x, y)


def test_auto_takes_the_engine_where_it_is_compiled():
    native = fm.backend_info()["ops"]["meta_step"]["cpu"] == "native"
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2)
    assert maml.plan().strategy == ("engine" if native else "vmap")
    agree(loss_gradients(maml, data)[1], unroll(model, data, lr=0.1, steps=2), 1e-9)
    assert maml.plan().strategy == ("engine" if native else "vmap")
    assert "reference" not in maml.plan().reason
