"""What MAML does around the numbers: buffers, padding, randomness, modes, strategies, memory."""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from mamlcases import agree, batch, cross_entropy, make, meta_gradients, unroll
from memorycases import resident
from torch import nn

from fastmeta.maml import MAML

STRATEGIES = ("vmap", "loop")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv_bn", "functional_bn", "instance_norm"])
def test_buffers_are_never_touched(name, training, batch_norm, strategy):
    model, data = make(name)
    model.train(training)
    before = {n: b.clone() for n, b in model.named_buffers()}
    held = {n: b for n, b in model.named_buffers()}
    maml = MAML(model, 0.1, 2, batch_norm=batch_norm, strategy=strategy)
    meta_gradients(maml, data)
    maml.adapt(*data[:2])(data[2])
    assert before.keys() == dict(model.named_buffers()).keys()
    for n, b in model.named_buffers():
        assert b is held[n]
        assert torch.equal(b, before[n])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_used_as_they_are(training, strategy):
    model, data = make("conv_bn")
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        model[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.0, 1.0]))
    model.train(training)
    found = meta_gradients(MAML(model, 0.1, 2, batch_norm="running", strategy=strategy), data)

    class Affine(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias
            self.mean, self.var = norm.running_mean, norm.running_var

        def forward(self, x):
            x = (x - self.mean[:, None, None]) / (self.var[:, None, None] + 1e-5).sqrt()
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    plain = nn.Sequential(model[0], Affine(model[1]), *model[2:])
    agree(found, unroll(plain, data, lr=0.1, steps=2))


def test_batch_statistics_hold_in_evaluation_mode():
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 2)
    outputs = []
    for training in (True, False):
        maml.train(training)
        assert model.training is training
        outputs.append(maml(*data[:3]))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


class Counting(nn.Module):
    """A buffer that the forward pass writes, in place or by another tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.in_place = in_place

    def forward(self, x):
        if self.in_place:
            self.seen += 1
        else:
            self.seen = self.seen + x.mean().detach()
        return self.layer(x) * (1 + 0.1 * self.seen)


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_that_the_model_writes_start_anew_for_each_task(in_place):
    torch.manual_seed(0)
    model = Counting(in_place).double()
    data = batch((4,))
    loop = MAML(model, 0.1, 2, strategy="loop")(*data[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(MAML(model, 0.1, 2)(*data[:3]), loop)
    alone = [
        MAML(model, 0.1, 2, strategy="loop")(*(d[t : t + 1] for d in data[:3])) for t in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), loop)
    assert model.seen == 0


def padded(data, queries=False):
    """The tasks with rows of padding after, and within, their supports; and the mask of queries."""
    support_x, support_y, query_x, query_y = data
    rows = torch.tensor([0, 6, 1, 2, 7, 3, 4, 5])  # 6 and 7 are padding
    x = torch.cat([support_x, torch.zeros_like(support_x[:, :2])], 1)[:, rows]
    y = torch.cat([support_y, torch.full_like(support_y[:, :2], -100)], 1)[:, rows]
    x[0, -1], y[0, -1] = 0, -100  # and one row more in the first task
    mask = torch.ones(query_y.shape, dtype=torch.bool)
    if queries:
        mask[1, 1] = mask[2, 3] = False
        query_x = query_x.masked_fill(~mask.reshape(*mask.shape, *(1,) * (query_x.dim() - 2)), 0)
        query_y = query_y.masked_fill(~mask, -100)
    return [x, y, query_x, query_y], mask


def one_by_one(model, data, mask, **options):
    """The meta-loss of padded tasks, each alone and without its padding."""
    total, count = 0.0, int(mask.sum())
    for x, y, qx, qy, m in zip(*data, mask, strict=True):
        keep = y != -100
        maml = MAML(model, 0.1, 2, strategy="loop", **options)
        out = maml(x[keep][None], y[keep][None], qx[m][None])[0]
        total = total + F.cross_entropy(out, qy[m], reduction="sum")
    loss = total / count
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "loop"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_padding_counts_for_nothing(name, strategy, queries):
    model, data = make(name)
    data, mask = padded(data, queries)
    wanted = one_by_one(model, data, mask)
    maml = MAML(model, 0.1, 2, strategy=strategy)
    model.zero_grad()
    out = maml(*data[:3], query_mask=mask)
    assert not out[~mask].any()
    cross_entropy(out, data[3]).backward()
    agree({n: p.grad for n, p in model.named_parameters()}, wanted)
    plan = maml.plan()
    if strategy == "auto":
        assert (plan.strategy == "loop") == (name == "conv_bn")
        if name == "conv_bn":
            assert "padded" in plan.reason
            maml(*(d[:, 2:4] for d in data[:3]))
            assert maml.plan().strategy != "loop"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_through_running_statistics_is_harmless(strategy):
    model, data = make("conv_bn")
    data, mask = padded(data)
    maml = MAML(model, 0.1, 2, batch_norm="running", strategy=strategy)
    wanted = one_by_one(model, data, mask, batch_norm="running")
    agree(meta_gradients(maml, data), wanted)


def test_padding_that_vmap_cannot_take_out_is_refused():
    model, data = make("conv_bn")
    data, _ = padded(data)
    with pytest.raises(ValueError, match="strategy must be 'loop' or 'auto' for padded tasks"):
        MAML(model, 0.1, 2, strategy="vmap")(*data[:3])


def test_padding_is_kept_from_a_loss_of_ones_own():
    def smooth(prediction, target):
        return F.cross_entropy(prediction, target, label_smoothing=0.1)

    model, data = make("mlp")
    data, mask = padded(data)
    maml = MAML(model, 0.1, 2, loss=smooth)
    found = meta_gradients(maml, data)
    assert maml.plan().strategy == "loop"
    agree(found, one_by_one(model, data, mask, loss=smooth))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_task_of_nothing_but_padding_does_not_adapt(strategy):
    model, data = make("mlp")
    data[1][1] = -100
    maml = MAML(model, 0.1, 2, strategy=strategy)
    out = maml(*data[:3])
    torch.testing.assert_close(out[1], model(data[2][1]), rtol=1e-12, atol=1e-12)
    assert all(g.isfinite().all() for g in meta_gradients(maml, data).values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout(randomness, chunk, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x, y, query = torch.randn(1, 6, 4).double(), torch.randint(3, (1, 6)), torch.randn(1, 5, 4)
    data = [t.expand(2, *t.shape[1:]) for t in (x, y, query.double())]
    maml = MAML(model, 0.5, 2, randomness=randomness, strategy=strategy, task_chunk=chunk)
    torch.manual_seed(5)
    first = maml(*data)
    assert torch.equal(first[0], first[1]) == (randomness == "same")
    torch.manual_seed(5)
    torch.testing.assert_close(maml(*data), first, rtol=0, atol=0)
    assert not torch.equal(maml(*data), first)
    maml.eval()
    torch.testing.assert_close(maml(*data), maml(*data), rtol=0, atol=0)


def test_recomputed_chunks_draw_the_same_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    data = batch((4,))
    maml = MAML(model, 0.5, 2, strategy="loop", task_chunk=1)
    weight = model[0].weight
    direction = torch.randn_like(weight)

    def value(step):
        torch.manual_seed(7)
        with torch.no_grad():
            weight.add_(step * direction)
            loss = cross_entropy(maml(*data[:3]), data[3])
            weight.sub_(step * direction)
        return loss

    torch.manual_seed(7)
    found = (meta_gradients(maml, data)["0.weight"] * direction).sum()
    torch.testing.assert_close(found, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_a_graph(mode, strategy):
    model, data = make("conv_bn")
    maml = MAML(model, 0.1, 3, strategy=strategy, learn_lr="scalar")
    wanted = maml(*data[:3]).detach()
    with mode():
        data = [d.clone() for d in data]
        out, tasks = maml(*data[:3]), maml.adapt(*data[:2])
        again = tasks(data[2])
        inside = torch.is_inference_mode_enabled()
    assert inside == (mode is torch.inference_mode)
    assert not out.requires_grad
    assert not any(p.requires_grad for p in tasks.parameters.values())
    torch.testing.assert_close(out.clone(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.clone(), wanted, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in maml.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_autocast(chunk, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [d.float() if d.is_floating_point() else d for d in batch((4,))]
    maml = MAML(model, 0.1, 2, strategy=strategy, task_chunk=chunk)
    exact = meta_gradients(maml, data)
    maml.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = maml(*data[:3])
    cross_entropy(out.float(), data[3]).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert not torch.equal(p.grad, exact[name])
        assert (p.grad - exact[name]).norm() < 0.03 * exact[name].norm()


def test_auto_falls_back_with_a_reason_once():
    model, data = make("branches")
    maml = MAML(model, 0.1, 2)
    assert maml.plan().reason == "it will be tried first"
    with pytest.warns(UserWarning, match="strategy 'loop'.*because vmap failed"):
        first = maml(*data[:3])
    plan = maml.plan()
    assert plan.strategy == "loop"
    assert "vmap failed with RuntimeError" in plan.reason
    assert "loop: vmap failed" in str(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(maml(*data[:3]), first)
    with pytest.raises(RuntimeError, match="vmap"):
        MAML(model, 0.1, 2, strategy="vmap")(*data[:3])


def test_falling_back_does_not_change_the_random_numbers():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            x = F.dropout(x, 0.5)
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    torch.manual_seed(0)
    model, data = Draws().double(), batch((4,))
    outputs = []
    for strategy in ("auto", "loop"):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(MAML(model, 0.1, 2, strategy=strategy)(*data[:3]))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_errors_of_the_model_surface_as_they_are(strategy):
    model, data = make("mlp")
    x, query = data[0][..., :3], data[2][..., :3]
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(6x3 and 4x5\)"):
        MAML(model, 0.1, 2, strategy=strategy)(x, data[1], query)
    maml = MAML(model, 0.1, 2, strategy=strategy)
    maml(*data[:3])
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(4x3 and 4x5\)"):
        maml(*data[:2], query)
    assert (maml.plan().strategy == "loop") == (strategy == "loop")

    class Own(nn.Linear):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        MAML(Own(4, 3), 0.1, 2, strategy=strategy)(*data[:3])
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_error_leaves_the_model_as_it_was(strategy):
    model, data = make("functional_bn")
    state = {n: p for n, p in model.named_parameters()} | dict(model.named_buffers())
    with pytest.raises(RuntimeError):
        MAML(model, 0.1, 2, strategy=strategy)(*data[:2], data[2][..., :2])
    now = {n: p for n, p in model.named_parameters()} | dict(model.named_buffers())
    assert state.keys() == now.keys()
    assert all(state[n] is now[n] for n in now)


class Kept:
    """A tensor that a graph keeps; without its node, which may be the one that keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


@contextlib.contextmanager
def watched():
    """Weak references to all that graphs keep."""
    seen = []

    def pack(tensor):
        kept = Kept(tensor)
        seen.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield seen


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "lstm"])
@pytest.mark.parametrize("options", [{}, {"task_chunk": 2}, {"learn_lr": "element"}])
def test_no_graph_survives_a_meta_step(name, options):
    model, data = make(name)
    maml = MAML(model, 0.1, 2, strategy="loop" if name == "lstm" else "vmap", **options)
    gc.collect()
    gc.disable()
    try:
        with watched() as seen:
            out = maml(*data[:3])
            alive = sum(kept() is not None for kept in seen)
            cross_entropy(out, data[3]).backward(retain_graph=True)
            del out
            left = sum(kept() is not None for kept in seen)
    finally:
        gc.enable()
    assert len(seen) > 20
    assert alive > 5
    assert left == 0


def test_memory_does_not_grow_over_many_steps():
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    data = [d.float() if d.is_floating_point() else d for d in batch((4,), tasks=8)]
    maml = MAML(model, 0.1, 1)
    gc.disable()
    try:
        for i in range(200):
            meta_gradients(maml, data)
            if i == 49:
                start = resident()
        grown = resident() - start
    finally:
        gc.enable()
    # A meta-step keeps three copies of 8 tasks' 1603 numbers at the least.
    assert grown < 0.2 * 150 * (3 * 8 * 1603 * 4), f"{grown} bytes in 150 steps"


def test_task_chunk_bounds_the_graph():
    model, data = make("mlp")
    kept = {}
    for chunk in (None, 1):
        maml = MAML(model, 0.1, 5, strategy="vmap", task_chunk=chunk)
        with watched() as seen:
            out = maml(*data[:3])
        storages = [box.tensor.untyped_storage() for box in (ref() for ref in seen) if box]
        kept[chunk] = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        assert out.requires_grad
    weights = sum(p.nbytes for p in model.parameters()) + sum(d.nbytes for d in data)
    assert kept[1] <= weights < kept[None]


def test_state_holds_model_and_rates():
    model, data = make("body_head")
    maml = MAML(model, 0.1, 2, learn_lr="parameter", lr_per_step=True, adapt="head")
    state = maml.state_dict()
    assert {n for n in state if n.startswith("rates.")} == {"rates.head/weight", "rates.head/bias"}
    assert state["rates.head/bias"].tolist() == [0.1, 0.1]
    other = MAML(make("body_head")[0], 0.3, 2, learn_lr="parameter", lr_per_step=True, adapt="head")
    other.load_state_dict(state)
    torch.testing.assert_close(other(*data[:3]), maml(*data[:3]), rtol=0, atol=0)
    twin = copy.deepcopy(maml)
    torch.testing.assert_close(twin(*data[:3]), maml(*data[:3]), rtol=0, atol=0)
    assert twin.model is not maml.model


@pytest.mark.parametrize("how", ["submodule", "predicate"])
def test_what_chooses_the_parameters_is_no_part_of_it(how):
    model, data = make("body_head")
    chosen = model.head if how == "submodule" else lambda name, _: name.startswith("head")
    maml = MAML(model, 0.1, 2, adapt=chosen)
    assert all(name.startswith("model.") for name in maml.state_dict())
    twin = pickle.loads(pickle.dumps(maml))
    torch.testing.assert_close(twin(*data[:3]), maml(*data[:3]), rtol=0, atol=0)
    assert twin.plan().adapted == ("head.weight", "head.bias")


def test_maml_of_maml_runs():
    model, data = make("mlp")
    inner = MAML(model, 0.1, 1)

    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(data[0][:1], data[1][:1], x.unsqueeze(0))[0]

    out = MAML(Through(), 0.1, 1, strategy="loop")(*data[:3])
    assert out.shape == (3, 4, 3)


def test_learning_helps():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    )
    maml = MAML(model, 0.05, 3, loss="mse")
    optimizer = torch.optim.Adam(maml.parameters(), 3e-3)

    def tasks():
        amplitude, phase = 1 + torch.rand(16, 1, 1), 3 * torch.rand(16, 1, 1)
        x = 6 * torch.rand(16, 20, 1) - 3
        y = amplitude * torch.sin(x + phase)
        return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]

    losses = []
    for _ in range(80):
        x, y, query_x, query_y = tasks()
        loss = F.mse_loss(maml(x, y, query_x), query_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
