"""From modules to programs: what has an engine form, what has none, and what the plan says of it."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastmeta as fm
from fastmeta._engine import NoProgram
from fastmeta._inner_losses import Supports
from fastmeta.maml import MAML


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def prepared(model, row=(4,), *, queries=3, **options):
    """What the engine makes of a module, for float32 rows of shape ``row``."""
    maml = MAML(model, 0.1, 1, strategy="engine", **options)
    weights = maml._weights()
    supports = Supports(torch.zeros(2, 5, *row), torch.zeros(2, 5, dtype=torch.long), 0, False)
    query_x = torch.zeros(2, queries, *row)
    engine = maml._runner.engine
    return engine.prepare(model, weights.names, supports, query_x, masked=lambda: False)


def text(model, row=(4,), **options):
    """The nodes of the program of a module."""
    return prepared(model, row, **options).text.split(";", 1)[1].rsplit(";", 1)[0]


def stops(model, row=(4,), **options):
    """Why a module has no program."""
    with pytest.raises(NoProgram) as caught:
        prepared(model, row, **options)
    return str(caught.value)


class Calls(nn.Module):
    """A layer, and whatever is done to its output."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer or nn.Linear(4, 4)

    def forward(self, x):
        return self.function(self.layer(x))


LINEAR = "linear(0,w=f0,b=f1,out=4)"
CONV = "conv2d(0,w=f0,b=f1,out=4,k=3x3,s=1x1,p=1x1,d=1x1,g=1)"


def test_a_stack_reads_as_it_stands():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    assert text(model, (1, 4, 4)) == (
        "in=16;linear(0,w=f0,b=f1,out=4);relu(1);linear(2,w=f2,b=f3,out=3)"
    )
    assert text(model[:1] + model[1:], (2, 8)) == text(model, (16,))


@pytest.mark.parametrize(
    ("function", "node"),
    [
        (F.relu, "relu(1)"),
        (torch.relu, "relu(1)"),
        (lambda x: x.relu_(), "relu(1)"),
        (torch.tanh, "tanh(1)"),
        (F.tanh, "tanh(1)"),
        (F.sigmoid, "sigmoid(1)"),
        (nn.Sigmoid(), "sigmoid(1)"),
        (F.silu, "silu(1)"),
        (lambda x: F.leaky_relu(x, 0.2), "leaky_relu(1,slope=0.2)"),
        (nn.ELU(0.5), "elu(1,alpha=0.5)"),
        (nn.GELU("tanh"), "gelu(1,approximate=tanh)"),
        (nn.Softplus(2, 10), "softplus(1,beta=2.0,threshold=10.0)"),
        (lambda x: x + x, "add(1+1)"),
        (lambda x: torch.add(x, F.relu(x)), "relu(1);add(1+2)"),
        (nn.Identity(), ""),
        (lambda x: x.view(x.size(0), -1), ""),
        (lambda x: x.reshape(len(x), 4).contiguous(), ""),
        (lambda x: F.dropout(x, 0.5, training=False), ""),
        (nn.Dropout(0.25), "dropout(1,p=0.25,id=0)"),
        (
            nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.5)),
            "dropout(1,p=0.25,id=0);dropout(2,p=0.5,id=1)",
        ),
        (nn.LayerNorm(4, elementwise_affine=False), "layer_norm(1,eps=1e-05)"),
    ],
)
def test_functions_of_rows(function, node):
    assert text(Calls(function)) == ";".join(filter(None, ["in=4", LINEAR, node]))


@pytest.mark.parametrize(
    ("function", "nodes"),
    [
        (lambda x: x.mean((2, 3)), "mean_pool(1);flatten(2)"),
        (lambda x: x.mean([-1, -2], keepdim=True).flatten(1), "mean_pool(1);flatten(2)"),
        (lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), "mean_pool(1);flatten(2)"),
        (
            lambda x: F.max_pool2d(x, 2).view(x.shape[0], -1),
            "max_pool(1,k=2x2,s=2x2,p=0x0,d=1x1,ceil=0);flatten(2)",
        ),
        (
            nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Flatten()),
            "avg_pool(1,k=3x3,s=2x2,p=1x1,ceil=1,include_pad=1);flatten(2)",
        ),
        (
            nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Flatten()),
            "group_norm(1,w=f2,b=f3,groups=4,eps=1e-05);flatten(2)",
        ),
        (
            nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten()),
            "group_norm(1,w=f2,b=f3,groups=2,eps=1e-05);flatten(2)",
        ),
    ],
)
def test_functions_of_images(function, nodes):
    model = Calls(function, nn.Conv2d(1, 4, 3, padding="same"))
    found = text(model, (1, 4, 4))
    if isinstance(function, nn.Module):
        # Parameters come in the order of the module, in which `function` is before `layer`.
        found = text(nn.Sequential(model.layer, function), (1, 4, 4))
    assert found == f"in=1x4x4;{CONV};{nodes}"


def test_batch_norm_follows_the_policy_in_both_modes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0.1))
    for training in (True, False):
        model.train(training)
        assert text(model) == f"in=4;{LINEAR};batch_norm(1,w=f2,b=f3,eps=0.1)"
        running = text(model, batch_norm="running")
        assert running == f"in=4;{LINEAR};batch_norm(1,w=f2,b=f3,mean=s0,var=s1,eps=0.1)"
    before = {n: b.clone() for n, b in model.named_buffers()}
    prepared(model)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert text(model) == f"in=4;{LINEAR};tanh(1);linear(2,w=f0,b=f2,out=4)"
    model[0].weight.requires_grad_(False)
    found = prepared(model)
    assert (found.fast, found.shared) == (["0.bias", "2.bias"], ["0.weight"])
    assert "linear(0,w=s0,b=f0,out=4);tanh(1);linear(2,w=s0,b=f1,out=4)" in found.text
    only = prepared(model, adapt="2")
    assert (only.fast, only.shared) == (["2.bias"], ["0.bias", "0.weight"])


#: Every encoder with every option, and a row for it.
ENCODERS = (
    [
        (lambda a=a, n=n: fm.nn.MLP([16, 8, 3], activation=a, norm=n), (1, 4, 4))
        for a in ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
        for n in ("none", "batch", "layer")
    ]
    + [
        (
            lambda p=p, n=n, o=o: fm.nn.Conv4(
                1, 4, pooling=p, norm=n, output=o, image_size=32, num_classes=3
            ),
            (1, 32, 32),  # of 16 the last norm would have single numbers, zeros for its ReLU
        )
        for p in ("max", "stride")
        for n in ("batch", "group", "none")
        for o in ("flatten", "mean")
    ]
    + [
        (
            lambda n=n, o=o: fm.nn.ResNet12(
                1, (2, 2, 4, 4), norm=n, output=o, image_size=16, num_classes=3
            ),
            (1, 16, 16),
        )
        for n in ("batch", "group", "none")
        for o in ("flatten", "mean")
    ]
)


@pytest.mark.parametrize(("make", "row"), ENCODERS)
def test_every_encoder_is_a_program(make, row):
    model = make()
    found = prepared(model, row)
    assert set(found.fast) == {n for n, _ in model.named_parameters()}
    assert found.program.output == (3,)


@pytest.mark.parametrize(("make", "row"), ENCODERS)
def test_every_encoder_has_the_gradients_of_autograd(make, row):
    torch.manual_seed(0)
    model = make().double()
    data = [torch.randn(2, 5, *row).double(), torch.arange(5).repeat(2, 1) % 3]
    data += [torch.randn(2, 3, *row).double(), torch.arange(3).repeat(2, 1)]
    found = []
    for strategy in ("engine", "loop"):
        loss = fm.MAML(model, 0.1, 2, strategy=strategy).loss(*data)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def no_grad(x):
    with torch.no_grad():
        return F.relu(x)


@pytest.mark.parametrize(
    ("model", "row", "reason"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.PReLU())),
            (4,),
            "layer '1.1' (nn.PReLU) has no engine form",
        ),
        (
            nn.Sequential(nn.Linear(4, 4), Gate()),
            (4,),
            "layer '1' (Gate) has no engine form: it calls torch.Tensor.mul",
        ),
        (nn.LSTM(4, 4), (5, 4), "the model (nn.LSTM) has no engine form"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(1, 1, 1)),
            (4,),
            "layer '1' (nn.ConvTranspose2d) has no engine form",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")),
            (1, 4, 4),
            "layer '0' (nn.Conv2d) has no engine form",
        ),
        (
            nn.Sequential(weight_norm(nn.Linear(4, 4))),
            (4,),
            "has no engine form",
        ),
        (nn.Sequential(nn.LayerNorm(4)), (2, 3, 4), "it normalises over less than a row"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), (1, 4, 4), "pooling to 2"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), (1, 4, 4), "has no engine form"),
        (nn.Sequential(nn.Linear(4, 4)), (3, 4), "rows of shape [3, 4]"),
        (Calls(lambda x: F.relu(x).flatten()), (4,), "it flattens less, or more, than a row"),
        (Calls(lambda x: x + 1), (4,), "a sum of unlike values"),
        (Calls(lambda x: x + torch.rand(4)), (4,), "it calls torch.rand"),
        (Calls(lambda x: x if random.random() < 2 else -x), (4,), "draws random numbers"),
        (Calls(lambda x: x if x.sum() > 0 else -x), (4,), "it calls torch.Tensor.sum"),
        (Calls(no_grad), (4,), "it runs under torch.no_grad()"),
        (Calls(Straight.apply), (4,), "or in an autograd.Function"),
        (Calls(lambda x: x.detach()), (4,), "it calls torch.Tensor.detach"),
        (Calls(lambda x: (x, x)), (4,), "the model returns tuple, no tensor"),
        (Calls(lambda x: F.relu(x) if len(x) == 5 else x), (4,), "between supports and queries"),
        (Counts(), (4,), "the forward pass changes the module"),
        (nn.Sequential(nn.Linear(3, 4)), (4,), "layer '0' (nn.Linear) has no engine form: rows"),
    ],
)
def test_what_has_no_program_says_which_layer_and_why(model, row, reason):
    if not any(True for _ in model.parameters()):
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(4, 3))
    state = random.getstate(), torch.get_rng_state()
    assert reason in stops(model, row)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_hooks_and_compiled_modules_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    assert text(model) == f"in=4;{LINEAR}"
    handle = model[0].register_forward_hook(lambda *_: None)
    assert "layer '0' (nn.Linear) has hooks" in stops(model)
    handle.remove()
    assert text(model) == f"in=4;{LINEAR}"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks of all modules" in stops(model)
    finally:
        handle.remove()
    assert "is compiled by torch.compile" in stops(torch.compile(model))


def maml_and_data(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    maml = MAML(model, 0.1, 2, strategy="engine", **options)
    data = torch.randn(2, 5, 4), torch.randint(3, (2, 5)), torch.randn(2, 3, 4)
    return maml, data


def nodes(maml):
    """What the last call's plan says of the network."""
    return maml.plan().reason.split("(")[1].split(";")[0]


def change_training(model):
    model.train()


def change_slope(model):
    model[1] = nn.LeakyReLU(0.1)


def change_layer_option(model):
    model[2].p = 0.0
    model.train()


def drop_bias(model):
    model[0].bias = None


def freeze(model):
    model[0].weight.requires_grad_(False)


def add_hook(model):
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def tie(model):
    model[3].weight = model[0].weight


@pytest.mark.parametrize(
    "change", [change_training, change_slope, change_layer_option, drop_bias, freeze, add_hook, tie]
)
def test_a_change_of_the_module_is_noticed(change):
    maml, data = maml_and_data()
    maml(*data)
    change(maml.model)
    fresh = MAML(copy.deepcopy(maml.model), 0.1, 2, strategy="engine")
    torch.manual_seed(7)
    if change is add_hook:
        with pytest.raises(ValueError, match=r"because layer '0' .* has hooks"):
            maml(*data)
        return
    wanted = fresh(*data)
    torch.manual_seed(7)
    torch.testing.assert_close(maml(*data), wanted)
    assert maml.plan() == fresh.plan()


def test_programs_are_kept_while_the_module_stays(monkeypatch):
    import fastmeta._engine as engine

    maml, data = maml_and_data()
    seen = []
    real = engine.trace
    monkeypatch.setattr(engine, "trace", lambda *a: seen.append(a[3]) or real(*a))
    for _ in range(3):
        maml(*data)
        with torch.no_grad():
            for p in maml.parameters():
                p.mul_(0.9)
    assert seen == [5, 3]
    maml(data[0], data[1], data[2][:, :2])
    assert seen == [5, 3, 2]
    maml.double()
    maml(*(d.double() if d.is_floating_point() else d for d in data))
    assert len(seen) == 5


def test_a_deep_copy_has_programs_of_its_own():
    maml, data = maml_and_data()
    maml(*data)
    twin = copy.deepcopy(maml)
    with torch.no_grad():
        twin.model[0].weight.add_(1)
        twin.model[3] = nn.Linear(4, 4)
    assert not torch.equal(twin(*data), maml(*data))
    torch.testing.assert_close(
        twin(*data), MAML(twin.model, 0.1, 2, strategy="vmap")(*data), rtol=1e-5, atol=1e-6
    )


def test_plans():
    maml, data = maml_and_data()
    assert maml.plan().reason == "strategy='engine' was asked for"
    maml(*data)
    plan = maml.plan()
    assert plan.strategy == "engine"
    assert plan.reason.startswith("the model is a program (2 linear, tanh; cross_entropy)")
    other = MAML(nn.Sequential(nn.Linear(4, 4), nn.PReLU()), 0.1, 1)
    other(*data)
    assert other.plan().strategy == "vmap"
    if fm.backend_info()["ops"]["meta_step"]["cpu"] == "native":
        assert "not the engine: layer '1' (nn.PReLU) has no engine form" in other.plan().reason
        auto = MAML(maml.model, 0.1, 1)
        assert auto.plan().strategy == "engine"
        auto(*data)
        assert auto.plan() == plan
    else:
        assert "not the engine: it is not compiled for cpu" in other.plan().reason


def test_a_plan_names_what_stops_the_engine_where_vmap_fails_too():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.lstm(x[:, None])[0][:, -1])

    maml = MAML(Last(), 0.1, 1)
    with pytest.warns(UserWarning, match="vmap failed"):
        maml(*maml_and_data()[1])
    plan = maml.plan()
    assert plan.strategy == "loop"
    if fm.backend_info()["ops"]["meta_step"]["cpu"] == "native":
        assert "; not the engine: the model (Last) has no engine form" in plan.reason


def test_a_weight_in_two_shapes_is_left_to_others():
    """What only the kernel finds: the layouts of a convolution's weight with groups and without."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Linear(64, 3)

        def forward(self, x):
            x = torch.tanh(F.conv2d(x, self.weight, padding=1))
            return self.head(F.conv2d(x, self.weight, padding=1, groups=2).flatten(1))

    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 2, 4, 4), torch.randint(3, (2, 6))
    model = Twice()
    maml = MAML(model, 0.1, 1)
    wanted = MAML(model, 0.1, 1, strategy="loop").loss(x, y, x, y)
    torch.testing.assert_close(maml.loss(x, y, x, y), wanted)
    if fm.backend_info()["ops"]["meta_step"]["cpu"] == "native":
        assert "a parameter in two shapes" in maml.plan().reason
        with pytest.raises(ValueError, match=r"strategy must be another here.*in two shapes"):
            MAML(model, 0.1, 1, strategy="engine").loss(x, y, x, y)


def test_asked_for_and_impossible_is_an_error():
    data = maml_and_data()[1]
    maml = MAML(nn.Sequential(nn.Linear(4, 4), nn.PReLU()), 0.1, 1, strategy="engine")
    wanted = (
        r"MAML: strategy must be another here, because layer '1' \(nn.PReLU\) has no engine form, "
        "got 'engine'"
    )
    with pytest.raises(ValueError, match=wanted):
        maml(*data)
    with pytest.raises(ValueError, match=wanted):
        maml.adapt(*data[:2])
    with pytest.raises(ValueError, match=wanted):
        maml.loss(*data[:2], *data[:2])
    own = MAML(nn.Linear(4, 3), 0.1, 1, loss=lambda p, y: F.cross_entropy(p, y), strategy="engine")
    with pytest.raises(ValueError, match="because the loss is a function of your own"):
        own(*data)
    low = MAML(nn.Linear(4, 3).bfloat16(), 0.1, 1, strategy="engine")
    with pytest.raises(ValueError, match="because inputs are bfloat16"):
        low(data[0].bfloat16(), data[1], data[2].bfloat16())
    mixed = MAML(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double()), 0.1, 1, strategy="engine"
    )
    with pytest.raises(
        ValueError, match=r"'1.bias' is float64 on cpu, unlike the inputs|'1.weight'"
    ):
        mixed(*data)
    with pytest.raises(ValueError, match="because autocast is enabled"), torch.autocast("cpu"):
        maml(*data)
