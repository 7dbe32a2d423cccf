"""Models, tasks, and the plain unrolling that MAML is held against."""

import copy
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm


class BodyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.second(torch.tanh(self.first(x))))


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Branches(nn.Module):
    """What vmap cannot map: a branch on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-2 * x)


class Functional(nn.Module):
    """Batch norm by the function, with buffers of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))
        self.register_buffer("shift", torch.full((3,), 0.25))

    def forward(self, x):
        x = F.batch_norm(self.layer(x), self.mean, self.var, training=self.training)
        return self.out(torch.tanh(x)) + self.shift


def plain_weight_norm(v, g, dim):
    assert dim == 0
    return v * g / v.pow(2).flatten(1).sum(1).sqrt().reshape(g.shape)


def image(*layers, size=4):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(4 * size * size, 3)
    )


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "mlp_norms": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)
        ),
        (4,),
    ),
    "body_head": (BodyHead, (4,)),
    "tied": (Tied, (4,)),
    "conv_bn": (lambda: image(nn.BatchNorm2d(4), nn.Tanh()), (2, 4, 4)),
    "conv_bn_eval": (lambda: image(nn.BatchNorm2d(4), nn.Tanh()).eval(), (2, 4, 4)),
    "conv1d_bn": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 6),
    ),
    "functional_bn": (Functional, (4,)),
    "instance_norm": (
        lambda: image(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh()),
        (2, 4, 4),
    ),
    "instance_norm_eval": (
        lambda: image(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).eval(),
        (2, 4, 4),
    ),
    "group_norm": (lambda: image(nn.GroupNorm(2, 4), nn.Tanh()), (2, 4, 4)),
    "layer_norm": (lambda: image(nn.LayerNorm([4, 4, 4]), nn.Tanh()), (2, 4, 4)),
    "rms_norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    "max_pool": (lambda: image(nn.Tanh(), nn.MaxPool2d(2), size=2), (2, 4, 4)),
    "average_pool": (lambda: image(nn.Tanh(), nn.AdaptiveAvgPool2d(2), size=2), (2, 4, 4)),
    "transposed": (lambda: image(nn.Tanh(), nn.ConvTranspose2d(4, 4, 1)), (2, 4, 4)),
    "dropout_eval": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).eval(),
        (4,),
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), (4,)),
    "weight_norm": (
        lambda: nn.Sequential(
            weight_norm(nn.Conv2d(2, 4, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 4, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3)),
        7,
    ),
    "attention": (Attention, (5, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 3)),
    "branches": (Branches, (4,)),
}


def batch(shape, *, tasks=3, support=6, query=4, seed=0):
    """Supports and queries of 3-way tasks; an integer ``shape`` is a vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def inputs(rows):
        if isinstance(shape, int):
            return torch.randint(shape, (tasks, rows, 2), generator=generator)
        return torch.randn(tasks, rows, *shape, generator=generator, dtype=torch.float64)

    def labels(rows):
        return torch.randint(3, (tasks, rows), generator=generator)

    return [inputs(support), labels(support), inputs(query), labels(query)]


def make(name):
    """A model in float64 whose parameters are all away from their special values, and tasks."""
    torch.manual_seed(1)
    build, shape = MODELS[name]
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, batch(shape)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1))


def meta_gradients(maml, data, outer=cross_entropy):
    """What ``backward`` puts into ``.grad``, by the names within the model (and the rates)."""
    maml.zero_grad()
    outer(maml(*data[:3]), data[3]).backward()
    named = {n.removeprefix("model."): p.grad for n, p in maml.named_parameters()}
    return {n: g for n, g in named.items() if g is not None}


def batch_statistics(model):
    """A deep copy, sharing parameters, whose batch and instance norms have batch statistics only."""
    memo = {id(p): p for p in model.parameters()}
    model = copy.deepcopy(model, memo)
    for layer in model.modules():
        if hasattr(layer, "track_running_stats"):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    if isinstance(model, Functional):
        model.train()
    return model


def unroll(
    model,
    data,
    *,
    steps,
    lr=None,
    rates=None,
    per_step=False,
    first_order=False,
    adapted=None,
    inner=F.cross_entropy,
    outer=cross_entropy,
    value=False,
):
    """Meta-gradients by one task after another and ``create_graph=True``: the definition itself."""
    plain = batch_statistics(model)
    start = dict(plain.named_parameters())
    adapted = adapted or [n for n, p in start.items() if p.requires_grad]
    outputs = []
    # Where the default has no second derivative (attention), or a wrong one (weight norm).
    exact = mock.patch.object(torch, "_weight_norm", plain_weight_norm)
    with exact, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for support_x, support_y, query_x in zip(*data[:3], strict=True):
            theta = dict(start)
            for step in range(steps):
                loss = inner(functional_call(plain, theta, (support_x,)), support_y)
                grads = torch.autograd.grad(
                    loss,
                    [theta[n] for n in adapted],
                    create_graph=not first_order,
                    allow_unused=True,
                )
                for name, g in zip(adapted, grads, strict=True):
                    if g is not None:
                        rate = lr if rates is None else rates[name]
                        rate = rate[step] if per_step else rate
                        theta[name] = theta[name] - rate * g
            outputs.append(functional_call(plain, theta, (query_x,)))
        loss = outer(torch.stack(outputs), data[3])
        if value:
            return loss
        learned = {n: p for n, p in start.items() if p.requires_grad}
        if rates is not None:
            by_id = {}
            for name, rate in rates.items():
                by_id.setdefault(id(rate), (name.replace(".", "/"), rate))
            shared = len(by_id) == 1
            learned |= {f"rates.{'all' if shared else n}": r for n, r in by_id.values()}
        grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    return {n: g for n, g in zip(learned, grads, strict=True) if g is not None}


def agree(found, wanted, tolerance=1e-10):
    """Relative to the norm of each gradient, or of the largest where one is zero by symmetry."""
    assert set(found) == set(wanted)
    largest = max(float(w.detach().norm()) for w in wanted.values())
    for name, value in wanted.items():
        error = float((found[name] - value).detach().norm())
        bound = tolerance * max(float(value.detach().norm()), 1e-3 * largest)
        assert error <= bound, f"{name}: {error:.1e} of {float(value.detach().norm()):.1e}"
