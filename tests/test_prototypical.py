"""PrototypicalNetwork against class means and distances written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.matching import MatchingNetwork
from fastmeta.nn import MLP
from fastmeta.prototypical import PrototypicalNetwork

IN, DIM, WAYS = 5, 4, 3


def make(seed=0, norm="none", **options):
    torch.manual_seed(seed)
    encoder = MLP([IN, 6, DIM], activation="tanh", norm=norm)
    return PrototypicalNetwork(encoder, **options).double()


def episode(tasks=2, supports=6, queries=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    support_x = torch.randn(tasks, supports, IN, generator=g, dtype=torch.float64)
    query_x = torch.randn(tasks, queries, IN, generator=g, dtype=torch.float64)
    support_y = torch.stack([torch.randperm(supports, generator=g) % WAYS for _ in range(tasks)])
    return support_x, support_y, query_x, torch.randint(WAYS, (tasks, queries), generator=g)


def means(support, labels):
    return torch.stack([support[labels == c].mean(0) for c in range(WAYS)])


def logits(similarity, query, prototypes):
    if similarity == "sqeuclidean":  # Snell et al. 2017
        return -(query.unsqueeze(1) - prototypes.unsqueeze(0)).square().sum(-1)
    if similarity == "euclidean":  # the distance that easyfsl takes
        return -torch.cdist(query, prototypes)
    if similarity == "cosine":
        return F.cosine_similarity(query.unsqueeze(1), prototypes.unsqueeze(0), dim=-1)
    return query @ prototypes.T


@pytest.mark.parametrize("similarity", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_formula_and_its_gradient(similarity):
    net = make(similarity=similarity, scale=1.5, learn_scale=True)
    support_x, support_y, query_x, query_y = episode()
    want = torch.stack(
        [
            logits(similarity, net.encoder(q), means(net.encoder(s), y))
            for s, y, q in zip(support_x, support_y, query_x, strict=True)
        ]
    )
    want = (net.log_scale.exp() * want).log_softmax(-1)
    torch.testing.assert_close(net(support_x, support_y, query_x), want)
    loss = net.loss(support_x, support_y, query_x, query_y)
    want_loss = F.nll_loss(want.flatten(0, 1), query_y.flatten())
    torch.testing.assert_close(loss, want_loss)
    parameters = list(net.parameters())
    got = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(got, torch.autograd.grad(want_loss, parameters))


def test_defaults_are_the_papers():
    net = make()
    assert net.similarity == "sqeuclidean"
    assert net.scale.item() == 1
    assert not net.log_scale.requires_grad


def test_prototypes():
    net = make()
    support_x, support_y, query_x, _ = episode()
    got, count = net.prototypes(support_x, support_y)
    for task in range(2):
        want = means(net.encoder(support_x[task]), support_y[task])
        torch.testing.assert_close(got[task], want)
    assert count.tolist() == [[2, 2, 2], [2, 2, 2]]
    one, count = net.prototypes(support_x[0], support_y[0], WAYS + 1)
    torch.testing.assert_close(one[:WAYS], got[0])
    assert (one[WAYS] == 0).all()
    assert count.tolist() == [2, 2, 2, 0]
    # The prototypes are those that the call compares with.
    want = logits("sqeuclidean", net.encoder(query_x[0]), got[0]).log_softmax(-1)
    torch.testing.assert_close(net(support_x, support_y, query_x)[0], want)


def test_one_shot_equals_matching_network():
    net = make(similarity="cosine", scale=10.0)
    matching = MatchingNetwork(net.encoder).double()
    support_x, support_y, query_x, _ = episode(supports=WAYS)
    torch.testing.assert_close(
        net(support_x, support_y, query_x), matching(support_x, support_y, query_x)
    )


def test_class_without_support():
    net = make()
    support_x, support_y, query_x, query_y = episode()
    support_y[1] = support_y[1].clamp(max=1)
    logp = net(support_x, support_y, query_x, WAYS)
    assert logp[0].isfinite().all()
    assert (logp[1, :, 2] == -math.inf).all()
    torch.testing.assert_close(logp[1, :, :2], net(support_x[1], support_y[1], query_x[1], 2))
    query_y[1] = query_y[1].clamp(max=1)
    net.loss(support_x, support_y, query_x, query_y, WAYS).backward()
    assert all(p.grad.isfinite().all() for p in net.encoder.parameters())


@pytest.mark.parametrize("how", ["labels", "lengths", "mask"])
def test_ragged_equals_each_task_alone(how):
    net = make()
    support_x, support_y, query_x, _ = episode(tasks=3)
    lengths = torch.tensor([6, 3, 4])
    mask = torch.arange(6) < lengths[:, None]
    want = [
        net(support_x[t, :n], support_y[t, :n], query_x[t], WAYS) for t, n in enumerate(lengths)
    ]
    options = {"labels": {}, "lengths": {"lengths": lengths}, "mask": {"mask": mask}}[how]
    if how == "labels":
        support_y = support_y.masked_fill(~mask, -100)
    support_x = support_x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(
        net(support_x, support_y, query_x, WAYS, **options), torch.stack(want)
    )
    got, count = net.prototypes(support_x, support_y, WAYS, **options)
    assert got.isfinite().all()
    assert count.sum(-1).tolist() == [6, 3, 4]


def test_padding_enters_no_batch_statistics():
    net = make(norm="batch")
    truth = copy.deepcopy(net)
    support_x, support_y, _, _ = episode()
    support_y[1, 4:] = -100
    embedded = truth.encoder(support_x[support_y >= 0])
    got, _ = net.prototypes(support_x, support_y)
    torch.testing.assert_close(got[0], means(embedded[:6], support_y[0]))
    torch.testing.assert_close(net.encoder.norm1.running_mean, truth.encoder.norm1.running_mean)


def test_one_task_without_its_dimension():
    net = make()
    support_x, support_y, query_x, query_y = episode()
    one = support_x[0], support_y[0], query_x[0]
    torch.testing.assert_close(net(*one), net(support_x, support_y, query_x)[0])
    losses = net.loss(support_x, support_y, query_x, query_y, reduction="none")
    torch.testing.assert_close(net.loss(*one, query_y[0], reduction="none"), losses[0])


def test_second_order_and_transforms():
    torch.manual_seed(0)
    net = PrototypicalNetwork(MLP([2, 2], activation="tanh"), learn_scale=True).double()
    g = torch.Generator().manual_seed(0)
    support_x = torch.randn(2, 4, 2, generator=g, dtype=torch.float64)
    query_x = torch.randn(2, 2, 2, generator=g, dtype=torch.float64)
    support_y = torch.tensor([[0, 1, 0, -100], [1, 1, 0, 0]])
    names, values = zip(*net.named_parameters(), strict=True)

    def loss(support_x, query_x, *values):
        parameters = dict(zip(names, values, strict=True))
        args = (support_x, support_y, query_x, 2)
        return torch.func.functional_call(net, parameters, args)[..., 0].sum()

    inputs = [t.detach().requires_grad_() for t in (support_x, query_x, *values)]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)

    def one(support_x, support_y, query_x):
        return net(support_x, support_y, query_x, 2)

    got = torch.func.vmap(one)(support_x, support_y, query_x)
    torch.testing.assert_close(got, net(support_x, support_y, query_x))


def test_autocast():
    net = make().float()
    support_x, support_y, query_x, _ = episode()
    args = support_x.float(), support_y, query_x.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*args)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, net(*args), atol=0.05, rtol=0.05)


def test_learns_to_compare():
    """Classes that differ in 2 of 8 features, the others noise; five noisy shots of each."""
    torch.manual_seed(0)
    net = PrototypicalNetwork(MLP([8, 8]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.tensor([0.2, 0.2] + [4.0] * 6)

    def task(tasks=16, ways=3):
        # Centres on a circle, so that no two of them are close.
        angle = torch.rand(tasks, 1, generator=generator) + torch.arange(ways) / ways
        angle = 2 * torch.pi * angle
        centres = torch.zeros(tasks, ways, 1, 8)
        centres[..., 0, 0], centres[..., 0, 1] = angle.cos(), angle.sin()

        def draw(rows):
            x = centres + torch.randn(tasks, ways, rows, 8, generator=generator) * noise
            return x.flatten(1, 2), torch.arange(ways).repeat_interleave(rows).repeat(tasks, 1)

        return (*draw(5), *draw(5))

    def accuracy():
        support_x, support_y, query_x, query_y = task(64)
        with torch.no_grad():
            logp = net(support_x, support_y, query_x)
        return (logp.argmax(-1) == query_y).float().mean().item()

    assert accuracy() < 0.7
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        net.loss(*task()).backward()
        optimizer.step()
    assert accuracy() > 0.95


def test_state_dict_round_trip():
    net, other = make(scale=2.0), make(seed=3)
    other.load_state_dict(net.state_dict())
    args = episode()[:3]
    assert torch.equal(net(*args), other(*args))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"similarity": "additive"}, ValueError, "similarity must be one of 'sqeuclidean'"),
        ({"scale": 0}, ValueError, "scale must be a positive number"),
        ({"encoder": None}, TypeError, "encoder must be a torch.nn.Module"),
        ({"encode": "both"}, ValueError, "encode must be one of"),
    ],
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=f"PrototypicalNetwork: {message}"):
        PrototypicalNetwork(**({"encoder": nn.Linear(2, 2)} | options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x, y, q: n(x, y.float(), q), TypeError, "support_y must be an integer"),
        (lambda n, x, y, q: n(x, y, None), TypeError, "query_x must be a tensor"),
        (lambda n, x, y, q: n(x, y, q, 2), ValueError, "support_y must be in"),
        (
            lambda n, x, y, q: n.prototypes(x, y[:, :3]),
            ValueError,
            r"support_x must be of shape \[2, 3",
        ),
        (lambda n, x, y, q: n.prototypes(x, y, 0), ValueError, "num_classes must be"),
    ],
)
def test_call_errors(call, error, message):
    with pytest.raises(error, match=f"PrototypicalNetwork: {message}"):
        call(make(), *episode()[:3])
