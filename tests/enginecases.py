"""Networks with an engine form, and the plain unrolling that the engine is held against.

The truth here comes from the module itself, by ``torch.func.functional_call`` and plain autograd: it
shares nothing with the programs and their reference.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


@dataclass
class Case:
    """One program with the module that says what it means.

    Attributes:
        build: Makes the module.
        program: Its text without the loss: names of the module's parameters in braces.
        shape: Of one row of the input.
        shared: Names of the parameters that do not adapt.
    """

    build: object
    program: str
    shape: tuple
    shared: tuple = ()
    outputs: int = 3
    options: dict = field(default_factory=dict)

    def make(self, dtype=torch.float64, seed=0):
        """The module, away from special values."""
        torch.manual_seed(seed)
        module = self.build().to(dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return module

    def text(self, module, loss):
        """The program's text, and the tensors of ``fast`` and ``shared`` by name."""
        names = [n for n, _ in module.named_parameters()]
        fast = [n for n in names if n not in self.shared]
        shared = [n for n in names if n in self.shared]
        shared += [n for n, b in module.named_buffers() if b.is_floating_point()]
        refs = {n: f"f{i}" for i, n in enumerate(fast)} | {n: f"s{i}" for i, n in enumerate(shared)}
        text = self.program
        for name, ref in refs.items():
            text = text.replace("{" + name + "}", ref)
        return f"fm1;{text};loss={loss}", fast, shared


def _mlp(*middle):
    return lambda: nn.Sequential(nn.Linear(4, 6), *(m() for m in middle), nn.Linear(6, 3))


def _image(*middle, flat, size=6):
    def build():
        layers = [make() for make in middle]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 3))

    return build


def _around(middle, extra="", nodes=1):
    """Program of `_mlp` with one layer in the middle, whose parameters are {1.weight}, {1.bias}."""
    return (
        f"in=4;linear(0,w={{0.weight}},b={{0.bias}},out=6);{middle};"
        f"linear({nodes + 1},w={{{nodes + 1}.weight}},b={{{nodes + 1}.bias}},out=3)"
    )


def _conv(inputs=2, out=4, k="3x3", s="1x1", p="0x0", d="1x1", g=1, name="0", bias=True, of=0):
    b = f"b={{{name}.bias}}," if bias else ""
    return f"conv2d({of},w={{{name}.weight}},{b}out={out},k={k},s={s},p={p},d={d},g={g})"


def _head(name, of, out=3):
    return f"flatten({of});linear({of + 1},w={{{name}.weight}},b={{{name}.bias}},out={out})"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))
        self.short = nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) + self.short(x)).mean((2, 3)))


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.second(torch.tanh(self.first(x))))


class Frozen(nn.Module):
    """A shared extractor with batch norm's running statistics, and a head."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.activation = activation
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        return self.head(self.activation(self.norm(self.body(x))))


class NormReadTwice(nn.Module):
    """A batch norm whose value is read with an activation and without."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x):
        normal = self.norm(self.body(x))
        return self.head(torch.relu(normal) + normal)


def _activation(make, text):
    return Case(_mlp(make), _around(text), (4,))


CASES = {
    "linear": Case(
        lambda: nn.Sequential(nn.Linear(4, 3)), "in=4;linear(0,w={0.weight},b={0.bias},out=3)", (4,)
    ),
    "no_bias": Case(
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False)),
        "in=4;linear(0,w={0.weight},out=3)",
        (4,),
    ),
    "relu": _activation(nn.ReLU, "relu(1)"),
    "tanh": _activation(nn.Tanh, "tanh(1)"),
    "sigmoid": _activation(nn.Sigmoid, "sigmoid(1)"),
    "silu": _activation(nn.SiLU, "silu(1)"),
    "leaky_relu": _activation(lambda: nn.LeakyReLU(0.1), "leaky_relu(1,slope=0.1)"),
    "elu": _activation(lambda: nn.ELU(0.7), "elu(1,alpha=0.7)"),
    "gelu": _activation(nn.GELU, "gelu(1,approximate=none)"),
    "gelu_tanh": _activation(lambda: nn.GELU("tanh"), "gelu(1,approximate=tanh)"),
    "softplus": _activation(lambda: nn.Softplus(1.5, 2.0), "softplus(1,beta=1.5,threshold=2.0)"),
    "batch_norm": _activation(
        lambda: nn.BatchNorm1d(6, eps=1e-4, track_running_stats=False),
        "batch_norm(1,w={1.weight},b={1.bias},eps=0.0001)",
    ),
    "batch_norm_plain": _activation(
        lambda: nn.BatchNorm1d(6, affine=False, track_running_stats=False),
        "batch_norm(1,eps=1e-05)",
    ),
    "layer_norm": _activation(
        lambda: nn.LayerNorm(6), "layer_norm(1,w={1.weight},b={1.bias},eps=1e-05)"
    ),
    "group_norm": _activation(
        lambda: nn.GroupNorm(2, 6), "group_norm(1,w={1.weight},b={1.bias},groups=2,eps=1e-05)"
    ),
    "deep": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
        ),
        "in=4;linear(0,w={0.weight},b={0.bias},out=7);tanh(1);"
        "linear(2,w={2.weight},b={2.bias},out=6);tanh(3);linear(4,w={4.weight},b={4.bias},out=3)",
        (4,),
    ),
    "narrow": Case(  # layers of one and two outputs
        lambda: nn.Sequential(
            nn.Linear(4, 16),
            nn.Tanh(),
            nn.Linear(16, 1),
            nn.Linear(1, 8),
            nn.Linear(8, 2),
            nn.Linear(2, 3),
        ),
        "in=4;linear(0,w={0.weight},b={0.bias},out=16);tanh(1);"
        "linear(2,w={2.weight},b={2.bias},out=1);linear(3,w={3.weight},b={3.bias},out=8);"
        "linear(4,w={4.weight},b={4.bias},out=2);linear(5,w={5.weight},b={5.bias},out=3)",
        (4,),
    ),
    "narrow_odd": Case(  # inputs that are no whole vectors, with numbers in their padding
        lambda: nn.Sequential(
            nn.Linear(4, 9), nn.Sigmoid(), nn.Linear(9, 2), nn.Softplus(), nn.Linear(2, 3)
        ),
        "in=4;linear(0,w={0.weight},b={0.bias},out=9);sigmoid(1);"
        "linear(2,w={2.weight},b={2.bias},out=2);softplus(3,beta=1.0,threshold=20.0);"
        "linear(4,w={4.weight},b={4.bias},out=3)",
        (4,),
    ),
    "narrow_shared": Case(
        lambda: nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1, bias=False), nn.Linear(1, 3)
        ),
        "in=8;linear(0,w={0.weight},b={0.bias},out=16);tanh(1);linear(2,w={2.weight},out=1);"
        "linear(3,w={3.weight},b={3.bias},out=3)",
        (8,),
        shared=("2.weight", "3.bias"),
    ),
    "conv": Case(
        _image(lambda: nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh, flat=36),
        f"in=2x6x6;{_conv(s='2x2', p='1x1')};tanh(1);{_head('3', 2)}",
        (2, 6, 6),
    ),
    "conv_dilated": Case(
        _image(lambda: nn.Conv2d(2, 4, (3, 2), (1, 2), (2, 1), (2, 3)), nn.Tanh, flat=72),
        f"in=2x6x6;{_conv(k='3x2', s='1x2', p='2x1', d='2x3')};tanh(1);{_head('3', 2)}",
        (2, 6, 6),
    ),
    "conv_groups": Case(
        _image(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh, flat=96),
        f"in=4x6x6;{_conv(out=6, g=2, bias=False)};tanh(1);{_head('3', 2)}",
        (4, 6, 6),
    ),
    "conv_depthwise": Case(
        _image(
            lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1),
            nn.Tanh,
            lambda: nn.Conv2d(4, 3, 1),
            flat=75,
        ),
        f"in=2x5x5;{_conv(g=2, p='1x1')};tanh(1);{_conv(out=3, k='1x1', name='2', of=2)};"
        f"{_head('4', 3)}",
        (2, 5, 5),
    ),
    "conv_deep": Case(
        _image(
            lambda: nn.Conv2d(2, 8, 3, 2, 1),
            nn.Tanh,
            lambda: nn.Conv2d(8, 6, (2, 3), (2, 3), (1, 2), (2, 1)),
            nn.Tanh,
            lambda: nn.Conv2d(6, 8, 1, 2),
            flat=16,
        ),
        f"in=2x9x8;{_conv(out=8, s='2x2', p='1x1')};tanh(1);"
        f"{_conv(out=6, k='2x3', s='2x3', p='1x2', d='2x1', name='2', of=2)};tanh(3);"
        f"{_conv(out=8, k='1x1', s='2x2', name='4', of=4)};{_head('6', 5)}",
        (2, 9, 8),
    ),
    "conv_deep_groups": Case(
        _image(
            lambda: nn.Conv2d(2, 6, 3, 1, 1),
            nn.Tanh,
            lambda: nn.Conv2d(6, 4, 3, 2, 1, groups=2),
            flat=36,
        ),
        f"in=2x5x6;{_conv(out=6, p='1x1')};tanh(1);"
        f"{_conv(s='2x2', p='1x1', g=2, name='2', of=2)};{_head('4', 3)}",
        (2, 5, 6),
    ),
    "conv_large": Case(  # images that are taken in bands
        _image(
            lambda: nn.Conv2d(2, 4, 3, 1, 1),
            nn.Tanh,
            lambda: nn.Conv2d(4, 3, 3, (3, 2), (0, 1)),
            nn.Tanh,
            lambda: nn.AdaptiveAvgPool2d(1),
            flat=3,
        ),
        f"in=2x37x31;{_conv(p='1x1')};tanh(1);"
        f"{_conv(out=3, s='3x2', p='0x1', name='2', of=2)};tanh(3);mean_pool(4);{_head('6', 5)}",
        (2, 37, 31),
    ),
    "conv_batch_norm": Case(
        _image(
            lambda: nn.Conv2d(2, 4, 3, padding=1, bias=False),
            lambda: nn.BatchNorm2d(4, track_running_stats=False),
            nn.Tanh,
            flat=144,
        ),
        f"in=2x6x6;{_conv(p='1x1', bias=False)};"
        f"batch_norm(1,w={{1.weight}},b={{1.bias}},eps=1e-05);tanh(2);{_head('4', 3)}",
        (2, 6, 6),
    ),
    "batch_norm_relu": Case(  # norms and activations in one node
        _image(
            lambda: nn.Conv2d(2, 4, 3, padding=1),
            lambda: nn.BatchNorm2d(4, track_running_stats=False),
            nn.ReLU,
            lambda: nn.Conv2d(4, 9, 3, 2, 1),
            lambda: nn.BatchNorm2d(9, affine=False, track_running_stats=False),
            lambda: nn.LeakyReLU(0.1),
            flat=81,
        ),
        f"in=2x6x5;{_conv(p='1x1')};batch_norm(1,w={{1.weight}},b={{1.bias}},eps=1e-05);relu(2);"
        f"{_conv(out=9, s='2x2', p='1x1', name='3', of=3)};batch_norm(4,eps=1e-05);"
        f"leaky_relu(5,slope=0.1);{_head('7', 6)}",
        (2, 6, 5),
    ),
    "batch_norm_read_twice": Case(
        NormReadTwice,
        "in=4;linear(0,w={body.weight},b={body.bias},out=6);"
        "batch_norm(1,w={norm.weight},b={norm.bias},eps=1e-05);relu(2);add(3+2);"
        "linear(4,w={head.weight},b={head.bias},out=3)",
        (4,),
    ),
    "conv_layer_norm": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), lambda: nn.LayerNorm([4, 4, 4]), nn.Tanh, flat=64),
        f"in=2x6x6;{_conv()};layer_norm(1,w={{1.weight}},b={{1.bias}},eps=1e-05);tanh(2);"
        f"{_head('4', 3)}",
        (2, 6, 6),
    ),
    "conv_group_norm": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.Tanh, flat=64),
        f"in=2x6x6;{_conv()};group_norm(1,w={{1.weight}},b={{1.bias}},groups=2,eps=1e-05);tanh(2);"
        f"{_head('4', 3)}",
        (2, 6, 6),
    ),
    "instance_norm": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), lambda: nn.InstanceNorm2d(4), nn.Tanh, flat=64),
        f"in=2x6x6;{_conv()};group_norm(1,groups=4,eps=1e-05);tanh(2);{_head('4', 3)}",
        (2, 6, 6),
    ),
    "max_pool": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), nn.Tanh, lambda: nn.MaxPool2d(2), flat=36),
        f"in=2x8x8;{_conv()};tanh(1);max_pool(2,k=2x2,s=2x2,p=0x0,d=1x1,ceil=0);{_head('4', 3)}",
        (2, 8, 8),
    ),
    "max_pool_odd": Case(
        _image(
            lambda: nn.Conv2d(2, 4, 3),
            nn.Tanh,
            lambda: nn.MaxPool2d((3, 2), (2, 3), (1, 1), (1, 2), ceil_mode=True),
            flat=32,
        ),
        f"in=2x8x7;{_conv()};tanh(1);max_pool(2,k=3x2,s=2x3,p=1x1,d=1x2,ceil=1);{_head('4', 3)}",
        (2, 8, 7),
    ),
    "avg_pool": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), nn.Tanh, lambda: nn.AvgPool2d(2), flat=36),
        f"in=2x8x8;{_conv()};tanh(1);avg_pool(2,k=2x2,s=2x2,p=0x0,ceil=0,include_pad=1);"
        f"{_head('4', 3)}",
        (2, 8, 8),
    ),
    "avg_pool_odd": Case(
        _image(
            lambda: nn.Conv2d(2, 4, 3),
            nn.Tanh,
            lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
            flat=64,
        ),
        f"in=2x8x8;{_conv()};tanh(1);avg_pool(2,k=3x2,s=2x2,p=1x1,ceil=1,include_pad=0);"
        f"{_head('4', 3)}",
        (2, 8, 8),
    ),
    "mean_pool": Case(
        _image(lambda: nn.Conv2d(2, 4, 3), nn.Tanh, lambda: nn.AdaptiveAvgPool2d(1), flat=4),
        f"in=2x6x5;{_conv()};tanh(1);mean_pool(2);{_head('4', 3)}",
        (2, 6, 5),
    ),
    "residual": Case(
        Residual,
        "in=2x5x5;"
        + ";".join(
            [
                _conv(out=3, p="1x1", name="body.0"),
                "tanh(1)",
                _conv(out=3, k="1x1", name="body.2", of=2),
                _conv(out=3, k="1x1", name="short", of=0),
                "add(3+4);tanh(5);mean_pool(6)",
                _head("head", 7),
            ]
        ),
        (2, 5, 5),
    ),
    "tied": Case(
        TiedWeights,
        "in=4;linear(0,w={first.weight},b={first.bias},out=4);tanh(1);"
        "linear(2,w={first.weight},b={second.bias},out=4);linear(3,w={out.weight},b={out.bias},out=3)",
        (4,),
    ),
    "frozen": Case(
        Frozen,
        "in=4;linear(0,w={body.weight},b={body.bias},out=5);batch_norm(1,w={norm.weight},"
        "b={norm.bias},mean={norm.running_mean},var={norm.running_var},eps=1e-05);tanh(2);"
        "linear(3,w={head.weight},b={head.bias},out=3)",
        (4,),
        shared=("body.weight", "body.bias", "norm.weight", "norm.bias"),
    ),
    "frozen_relu": Case(
        lambda: Frozen(torch.relu),
        "in=4;linear(0,w={body.weight},b={body.bias},out=5);batch_norm(1,w={norm.weight},"
        "b={norm.bias},mean={norm.running_mean},var={norm.running_var},eps=1e-05);relu(2);"
        "linear(3,w={head.weight},b={head.bias},out=3)",
        (4,),
        shared=("body.weight", "body.bias", "norm.weight", "norm.bias"),
    ),
}

#: A loss by the name in a program's text, and as torch has it.
LOSSES = {
    "cross_entropy": ("cross_entropy(smoothing=0.0,ignore=-100)", F.cross_entropy),
    "smoothed": (
        "cross_entropy(smoothing=0.2,ignore=-100)",
        lambda p, y: F.cross_entropy(p, y, label_smoothing=0.2),
    ),
    "ignoring": (
        "cross_entropy(smoothing=0.1,ignore=1)",
        lambda p, y: F.cross_entropy(p, y, ignore_index=1, label_smoothing=0.1),
    ),
    "mse": ("mse()", F.mse_loss),
    "huber": ("huber(delta=0.6)", lambda p, y: F.huber_loss(p, y, delta=0.6)),
    "bce": ("bce()", F.binary_cross_entropy_with_logits),
}


def tasks(shape, *, count=3, support=7, query=4, classes=3, targets=False, seed=0):
    """Supports and queries in float64; with ``targets``, numbers in [0, 1] instead of labels."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        return torch.randn(count, n, *shape, generator=generator, dtype=torch.float64)

    def labels(n):
        if targets:
            return torch.rand(count, n, classes, generator=generator, dtype=torch.float64)
        return torch.randint(classes, (count, n), generator=generator)

    return [rows(support), labels(support), rows(query), labels(query)]


def rates_of(kind, per_step, steps, fast, dtype=torch.float64):
    """Rates Tensor[R, E] of one granularity, all different."""
    width = {"scalar": 1, "parameter": len(fast), "element": sum(p.numel() for p in fast)}[kind]
    generator = torch.Generator().manual_seed(5)
    shape = (steps if per_step and steps else 1, width)
    return 0.1 + 0.3 * torch.rand(shape, generator=generator, dtype=dtype)


def unroll(module, fast, shared, rates, data, steps, loss, first_order=False):
    """Each task's query loss, its prediction, and its adapted weights, by the definition."""
    values = dict(module.named_parameters()) | dict(module.named_buffers())
    start = {n: values[n] for n in fast}
    held = {n: values[n] for n in shared}
    losses, predictions, ends = [], [], []
    for support_x, support_y, query_x, query_y in zip(*data, strict=True):
        theta = dict(start)
        for step in range(steps):
            value = loss(functional_call(module, theta | held, (support_x,)), support_y)
            grads = torch.autograd.grad(
                value, list(theta.values()), create_graph=True, materialize_grads=True
            )
            if first_order:
                grads = [g.detach() for g in grads]
            row = rates[min(step, rates.shape[0] - 1)]
            if row.numel() == 1:
                columns = [row[0]] * len(fast)
            elif row.numel() == len(fast):
                columns = list(row)
            else:
                parts = row.split([p.numel() for p in theta.values()])
                columns = [c.view_as(p) for c, p in zip(parts, theta.values(), strict=True)]
            theta = {
                n: p - a * g for (n, p), a, g in zip(theta.items(), columns, grads, strict=True)
            }
        prediction = functional_call(module, theta | held, (query_x,))
        losses.append(loss(prediction, query_y))
        predictions.append(prediction)
        ends.append(list(theta.values()))
    stacked = [torch.stack(column) for column in zip(*ends, strict=True)]
    return torch.stack(losses), torch.stack(predictions), stacked


def relative_error(found, wanted, floor=0.0):
    """Largest distance of a pair, over the norm of the wanted one or ``floor`` of the largest."""
    largest = max((float(w.detach().norm()) for w in wanted), default=0.0)
    worst = 0.0
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        size = max(float(w.detach().norm()), floor * largest, 1e-300)
        worst = max(worst, float((f.detach() - w.detach()).norm()) / size)
    return worst
