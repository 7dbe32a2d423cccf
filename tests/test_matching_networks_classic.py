"""The classic MatchingNetworks class against its formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.matching import MatchingNetworks

FEATURES, HIDDEN, WAYS = 5, 4, 3


def make(attention="concat", seed=0):
    torch.manual_seed(seed)
    return MatchingNetworks(FEATURES, HIDDEN, WAYS, attention=attention).double()


def data(supports=6, queries=4, leading=(), seed=1):
    g = torch.Generator().manual_seed(seed)
    support = torch.randn(*leading, supports, FEATURES, generator=g, dtype=torch.float64)
    query = torch.randn(*leading, queries, FEATURES, generator=g, dtype=torch.float64)
    return support, torch.randint(WAYS, (*leading, supports), generator=g), query


def naive(net, support, labels, query):
    """Weights [Q, S] and probabilities [Q, C]: softmax over the supports of w . [s; q] + b."""
    support, query = net.encoder(support), net.encoder(query)
    rows = []
    for q in query:
        if isinstance(net.attention, nn.Linear):
            scores = torch.cat([net.attention(torch.cat((s, q))) for s in support])
        else:
            a = net.attention
            hidden = [torch.tanh(a.query.weight @ q + a.support.weight @ s) for s in support]
            scores = torch.stack([a.weight @ h for h in hidden])
        rows.append(torch.softmax(scores, 0))
    weights = torch.stack(rows)
    return weights, weights @ F.one_hot(labels, WAYS).to(weights.dtype)


@pytest.mark.parametrize("attention", ["concat", "additive"])
def test_formula_and_its_gradient(attention):
    net, (support, labels, query) = make(attention), data()
    want_weights, want = naive(net, support, labels, query)
    got = net(support, labels, query)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(net.attention_weights(support, labels, query), want_weights)
    torch.testing.assert_close(net.log_probs(support, labels, query), want.log())
    parameters = list(net.parameters())
    targets = torch.tensor([0, 1, 2, 0])
    grads = torch.autograd.grad(
        F.nll_loss(net.log_probs(support, labels, query), targets), parameters
    )
    torch.testing.assert_close(
        grads, torch.autograd.grad(F.nll_loss(want.log(), targets), parameters)
    )


@pytest.mark.parametrize("attention", ["concat", "additive"])
def test_distributions(attention):
    net, args = make(attention), data(leading=(2,))
    ones = torch.ones(2, 4, dtype=torch.float64)
    assert net(*args).shape == (2, 4, WAYS)
    torch.testing.assert_close(net(*args).sum(-1), ones)
    torch.testing.assert_close(net.attention_weights(*args).sum(-1), ones)
    assert (net.attention_weights(*args) > 0).all()


def test_what_the_concatenated_score_does():
    """It gives every query the same answer and its query part no gradient; additive does not."""
    args = data()
    net = make("concat")
    out = net(*args)
    torch.testing.assert_close(out, out[:1].expand_as(out))
    out[:, 0].prod().backward()
    of_support, of_query = net.attention.weight.grad.chunk(2, 1)
    assert of_support.abs().max() > 1e-6
    assert of_query.abs().max() < 1e-15
    assert net.attention.bias.grad.abs() < 1e-15
    out = make("additive")(*args)
    assert (out - out[:1]).abs().max() > 1e-3


def test_parameters_are_those_of_the_classic_class():
    shapes = {k: tuple(v.shape) for k, v in make().state_dict().items()}
    assert shapes == {
        "encoder.0.weight": (HIDDEN, FEATURES),
        "encoder.0.bias": (HIDDEN,),
        "encoder.2.weight": (HIDDEN, HIDDEN),
        "encoder.2.bias": (HIDDEN,),
        "attention.weight": (1, 2 * HIDDEN),
        "attention.bias": (1,),
    }
    assert isinstance(make().encoder[1], nn.ReLU)


@pytest.mark.parametrize("attention", ["concat", "additive"])
def test_batched_and_padded_equal_each_task_alone(attention):
    net, (support, labels, query) = make(attention), data(leading=(2,))
    labels[1, 4:] = -100
    support[1, 4:] = torch.nan
    got = net(support, labels, query)
    torch.testing.assert_close(got[0], naive(net, support[0], labels[0], query[0])[1])
    torch.testing.assert_close(got[1], naive(net, support[1, :4], labels[1, :4], query[1])[1])
    assert (net.attention_weights(support, labels, query)[1, :, 4:] == 0).all()
    got[..., 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_one_hot_labels():
    net, (support, labels, query) = make("additive"), data(leading=(2,))
    one_hot = F.one_hot(labels, WAYS).double()
    assert torch.equal(net(support, one_hot, query), net(support, labels, query))
    assert torch.equal(net(support[0], one_hot[0], query[0]), net(support[0], labels[0], query[0]))


def test_class_without_support():
    net, (support, _, query) = make("additive"), data()
    labels = torch.zeros(6, dtype=torch.long)
    assert (net(support, labels, query)[:, 1:] == 0).all()
    assert (net.log_probs(support, labels, query)[:, 1:] == -math.inf).all()


def test_empty():
    net = make()
    assert net(*data(queries=0)).shape == (0, WAYS)
    assert net.attention_weights(*data(supports=0)).shape == (4, 0)
    assert (net(*data(supports=0)) == 0).all()


@pytest.mark.parametrize("attention", ["concat", "additive"])
def test_second_order_and_transforms(attention):
    torch.manual_seed(0)
    net = MatchingNetworks(2, 2, 2, attention=attention).double()
    support, query = torch.randn(2, 3, 2).double(), torch.randn(2, 2, 2).double()
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    names, values = zip(*net.named_parameters(), strict=True)
    inputs = [v.detach().clone().requires_grad_() for v in values]

    def loss(*values, task=0):
        parameters = dict(zip(names, values, strict=True))
        args = (support[task], labels[task], query[task])
        return torch.func.functional_call(net, parameters, args).square().sum()

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)
    torch.testing.assert_close(
        torch.func.grad(loss)(*values), torch.autograd.grad(loss(*inputs), inputs[0])[0]
    )
    over_tasks = torch.func.vmap(net)(support, labels, query)
    torch.testing.assert_close(over_tasks, net(support, labels, query))


def test_additive_learns_where_concat_cannot():
    """Which of two supports a query resembles: chance for concat, whatever it learns."""
    generator = torch.Generator().manual_seed(0)

    def task(tasks=16):
        support = torch.randn(tasks, 2, 2, generator=generator)
        support = F.normalize(support, dim=-1) * 2
        targets = torch.randint(2, (tasks, 8), generator=generator)
        query = support.gather(1, targets.unsqueeze(-1).expand(-1, -1, 2))
        query = query + 0.05 * torch.randn(query.shape, generator=generator)
        return support, torch.tensor([0, 1]).repeat(tasks, 1), query, targets

    accuracy = {}
    for attention in ("concat", "additive"):
        torch.manual_seed(0)
        net = MatchingNetworks(2, 32, 2, attention=attention)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(100):
            *args, targets = task()
            optimizer.zero_grad()
            F.nll_loss(net.log_probs(*args).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        *args, targets = task(256)
        accuracy[attention] = (net(*args).argmax(-1) == targets).float().mean().item()
    assert accuracy["concat"] < 0.6
    assert accuracy["additive"] > 0.9


def test_state_dict_round_trip():
    net, other = make("additive"), make("additive", seed=3)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(*data()), other(*data()))


def test_autocast():
    net, (support, labels, query) = make("additive").float(), data()
    args = support.float(), labels, query.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*args)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, net(*args), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0, 4, 3), {}, "input_size must be an integer of at least 1, got 0"),
        ((5, 4.0, 3), {}, "hidden_size must be"),
        ((5, 4, True), {}, "num_classes must be"),
        ((5, 4, 3), {"attention": "dot"}, "attention must be one of 'concat', 'additive'"),
    ],
)
def test_constructor_errors(args, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=f"MatchingNetworks: {message}"):
        MatchingNetworks(*args, **kwargs)


X, Y, Q = data()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X[:, :3], Y, Q), ValueError, r"support_set must be of shape \[S, 5\] or \[T, S, 5\]"),
        ((X[0], Y, Q), ValueError, "support_set must be of shape"),
        ((X.long(), Y, Q), TypeError, "support_set must be a float"),
        ((X, Y, Q[0]), ValueError, "query must be of shape"),
        ((X, Y, Q[:, :3]), ValueError, "query must be of 5 features"),
        ((X, Y, Q[None]), ValueError, "query must be of shape"),
        ((X, Y[:3], Q), ValueError, r"support_labels must be of shape \[6\]"),
        ((X, Y + 3, Q), ValueError, "support_labels must be in"),
        ((X, Y.bool(), Q), TypeError, "support_labels must be an integer tensor"),
        ((X, Y.tolist(), Q), TypeError, "support_labels must be an integer tensor"),
        ((X, Y.double(), Q), ValueError, r"one-hot of shape \[6, 3\], got float64 tensor"),
        ((X, torch.full((6, 3), 1 / 3), Q), ValueError, "support_labels must be one-hot rows"),
        ((X, torch.zeros(6, 3), Q), ValueError, "support_labels must be one-hot rows"),
    ],
)
def test_call_errors(args, error, message):
    with pytest.raises(error, match=message):
        make()(*args)


def test_one_hot_labels_are_refused_while_tracing():
    net, one_hot = make(), F.one_hot(Y, WAYS).double()
    with pytest.raises(TypeError, match=r"integers under torch\.compile"):
        torch.func.grad(lambda x: net(x, one_hot, Q)[0, 0])(X)
