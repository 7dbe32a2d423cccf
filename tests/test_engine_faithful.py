"""What modules may do that a look at their forward pass could get wrong: as plain PyTorch, or not
by the engine."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from mamlcases import agree, make
from torch import nn
from torch.utils import checkpoint

import fastmeta as fm

DATA = make("mlp")[1]


def gradients(maml, data=DATA):
    maml.zero_grad()
    loss = maml.loss(*data)
    loss.backward()
    return {"value": loss.detach()} | {
        n: p.grad.clone() for n, p in maml.named_parameters() if p.grad is not None
    }


def check(model, change=None, **options):
    """Auto against the loop, before and after a change of the module."""
    maml = fm.MAML(model, 0.1, 2, **options)
    loop = lambda: fm.MAML(model, 0.1, 2, strategy="loop", **options)  # noqa: E731
    for _ in range(2):
        agree(gradients(maml), gradients(loop()), 1e-9)
    if change is not None:
        before = gradients(maml)["value"]
        change(model)
        after = gradients(maml)
        assert not torch.equal(after["value"], before)
        agree(after, gradients(loop()), 1e-9)
    return maml


class Asks(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.layer, self.question = nn.Linear(4, 3), question

    def forward(self, x):
        y = self.layer(x)
        return torch.tanh(y) if self.question(self, x) else y


@pytest.mark.parametrize(
    "question",
    [
        lambda m, x: m.layer.weight.device == x.device,
        lambda m, x: x.device.type == "cpu",
        lambda m, x: x.is_cuda,
        lambda m, x: not x.requires_grad,
        lambda m, x: x.is_contiguous(),
        lambda m, x: x.stride(0) == 4,
    ],
)
@pytest.mark.filterwarnings("ignore:MAML. tasks run one after another")
def test_questions_about_the_input_have_its_own_answers(question):
    torch.manual_seed(0)
    check(Asks(question).double())


def test_a_bias_for_each_row_is_no_bias_for_each_output():
    class PerRow(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4).double())
            self.bias = nn.Parameter(torch.randn(shape).double())

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    data = [t[:, :3] for t in DATA]
    for shape in ((3, 1), (1,), (), (3,), (1, 3)):
        model = PerRow(*shape)
        found = gradients(fm.MAML(model, 0.1, 2), data)
        agree(found, gradients(fm.MAML(model, 0.1, 2, strategy="loop"), data), 1e-9)


class Holds(nn.Module):
    """Options in modules that are no submodules, in partials and methods, in a tensor."""

    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        act = nn.LeakyReLU(0.1)
        self.held = {
            "list": [act],
            "object": types.SimpleNamespace(act=act),
            "partial": functools.partial(F.leaky_relu, negative_slope=0.1),
            "method": act.forward,
            "tensor": None,
        }[how]
        if how == "tensor":
            self.register_buffer("slope", torch.tensor(0.1))

    def forward(self, x):
        y, held = self.layer(x), self.held
        if isinstance(held, list):
            return held[0](y)
        if isinstance(held, types.SimpleNamespace):
            return held.act(y)
        return F.leaky_relu(y, float(self.slope)) if held is None else held(y)


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("list", lambda m: setattr(m.held[0], "negative_slope", 0.9)),
        ("object", lambda m: setattr(m.held.act, "negative_slope", 0.9)),
        ("partial", lambda m: m.held.keywords.update(negative_slope=0.9)),
        ("method", lambda m: setattr(m.held.__self__, "negative_slope", 0.9)),
        ("tensor", lambda m: m.slope.fill_(0.9)),
    ],
)
def test_options_that_change_anywhere_in_it(how, change):
    torch.manual_seed(0)
    check(Holds(how).double(), change)


def test_a_tensor_as_an_option_is_not_frozen():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("slope", torch.tensor(0.1))

        def forward(self, x):
            return F.leaky_relu(self.layer(x), self.slope)

    torch.manual_seed(0)
    check(Slope().double(), lambda m: m.slope.fill_(0.9), batch_norm="batch")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c, "weight", torch.tensor([1.0, 5.0, 0.2]).double()),
        lambda c: setattr(c, "label_smoothing", 0.3),
        lambda c: setattr(c, "ignore_index", 1),
        lambda c: setattr(c, "reduction", "sum"),
        lambda c: c.register_forward_hook(lambda *args: args[2] * 2),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_module_that_changes(change, weighted):
    model = make("mlp")[0]
    weight = torch.tensor([1.0, 2.0, 3.0]).double() if weighted else None
    criterion = nn.CrossEntropyLoss(weight)
    maml = fm.MAML(model, 0.1, 2, loss=criterion)
    before = maml.loss(*DATA)
    change(criterion)
    after = maml.loss(*DATA)
    assert not torch.equal(before, after)
    agree(gradients(maml), gradients(fm.MAML(model, 0.1, 2, loss=criterion)), 1e-12)
    if weighted:
        criterion.weight = None
        agree(gradients(maml), gradients(fm.MAML(model, 0.1, 2, loss=criterion)), 1e-12)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_chunks_run_again_in_the_modes_of_the_first_run(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    maml = fm.MAML(model, 0.1, 1, task_chunk=1, strategy=strategy)
    results = []
    for switch in (False, True):
        torch.manual_seed(1)
        model.train()
        maml.zero_grad()
        loss = F.cross_entropy(maml(*DATA[:3]).flatten(0, 1), DATA[3].flatten())
        if switch:
            model.eval()
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    agree(results[1], results[0], 1e-12)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_chunks_run_again_with_the_buffers_of_the_first_run(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    options = {"batch_norm": "running", "strategy": strategy}
    wanted = fm.MAML(model, 0.1, 2, **options)(*DATA[:3]).square().sum()
    wanted = torch.autograd.grad(wanted, list(model.parameters()))
    out = fm.MAML(model, 0.1, 2, task_chunk=2, **options)(*DATA[:3]).square().sum()
    statistics = model[1].running_mean
    model[1].running_mean = torch.ones(6).double()
    found = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    statistics.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, list(model.parameters()))


def test_parameters_that_come_later_adapt():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight

    def untie(model):
        model[2].weight = nn.Parameter(model[2].weight.detach() * 1.1)

    maml = check(model, untie)
    assert "2.weight" in maml.plan().adapted
    check(model, lambda m: m.append(nn.Linear(4, 3).double()))
    rated = fm.MAML(model, 0.1, 2, learn_lr="parameter")
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="that were there when learn_lr='parameter' made rates"):
        rated.loss(*DATA)


def test_a_parameter_held_outside_of_its_place_is_not_the_engines():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.held = [self.first.weight]

        def forward(self, x):
            return self.last(F.linear(torch.tanh(self.first(x)), self.held[0]))

    maml = fm.MAML(Alias().double(), 0.1, 2)
    maml.loss(*DATA)
    assert "belongs to no module" in maml.plan().reason


def test_parameters_of_a_subclass_keep_their_meaning():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.linear:
                x, weight, bias = args
                return torch.addmm(bias, x, 2 * weight.as_subclass(torch.Tensor).T)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Doubled))
    maml = fm.MAML(model, 0.1, 1)
    with pytest.warns(UserWarning, match="tasks run one after another"):
        found = gradients(maml)
    agree(found, gradients(fm.MAML(model, 0.1, 1, strategy="loop")), 1e-12)


def test_second_derivatives_at_the_kinks_are_torchs():
    torch.manual_seed(0)
    for activation in (nn.ELU(), nn.ELU(0.7), nn.Softplus(2.0, 0.0)):
        model = nn.Sequential(nn.Linear(4, 5), copy.deepcopy(activation), nn.Linear(5, 3)).double()
        nn.init.zeros_(model[0].bias)
        data = [DATA[0].clone(), *DATA[1:]]
        data[0][:, 0] = 0
        found = gradients(fm.MAML(model, 0.1, 2, strategy="engine"), data)
        agree(found, gradients(fm.MAML(model, 0.1, 2, strategy="loop"), data), 1e-9)


@pytest.mark.parametrize("strategy", ["auto", "loop"])
@pytest.mark.filterwarnings("ignore:MAML. tasks run one after another")
def test_a_model_that_checkpoints_itself_is_refused(strategy):
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            y = checkpoint.checkpoint(lambda z: torch.tanh(self.first(z)), x, use_reentrant=False)
            return self.last(y)

    maml = fm.MAML(Saves().double(), 0.1, 2, strategy=strategy)
    with pytest.raises(RuntimeError, match="one that does not checkpoint itself"):
        maml.loss(*DATA)
    with torch.no_grad():
        maml(*DATA[:3])


def test_pruned_parameters_and_targets_of_another_dtype():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    maml = check(model)
    model[0].weight.data = model[0].weight.data[:2]
    model[0].bias.data = model[0].bias.data[:2]
    model[2].weight.data = model[2].weight.data[:, :2]
    agree(gradients(maml), gradients(fm.MAML(model, 0.1, 2, strategy="loop")), 1e-9)
    sx, _, qx, _ = DATA
    sy, qy = torch.randn(*sx.shape[:2], 3).double(), torch.randn(*qx.shape[:2], 3)
    found = fm.MAML(model, 0.1, 2, loss="mse").loss(sx, sy, qx, qy)
    wanted = fm.MAML(model, 0.1, 2, loss="mse", strategy="loop").loss(sx, sy, qx, qy)
    torch.testing.assert_close(found, wanted)


def test_gradients_that_are_kept_are_not_those_that_went_out():
    model, data = make("mlp")
    parameters = list(model.parameters())
    loss = fm.MAML(model, 0.1, 2).loss(*data)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    wanted = [g.clone() for g in first]
    for g in first:
        g.mul_(2)
    again = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(list(again), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer", [nn.Tanh(), nn.ReLU(), nn.GroupNorm(2, 6), nn.BatchNorm2d(6)], ids=str
)
def test_padding_of_grouped_convolutions_is_not_what_was_there_before(layer):
    """Memory that another model has left infinite, in a layout of more lanes than channels."""
    torch.set_num_threads(1)  # the same thread's memory
    x, y = torch.randn(2, 5, 4, 4, 4), torch.arange(5).repeat(2, 1) % 3
    wild = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    model = nn.Sequential(grouped, copy.deepcopy(layer), nn.Flatten(), nn.Linear(96, 3))
    options = {"learn_lr": "parameter", "strategy": "engine"}
    fm.MAML(wild, 0.1, 2, **options).backward(x * torch.inf, y, x * torch.inf, y)
    maml = fm.MAML(model, 0.1, 2, **options)
    maml.backward(x, y, x, y)
    assert all(p.grad.isfinite().all() for p in maml.parameters())
