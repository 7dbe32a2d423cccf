"""Networks and episodes that the tests of MatchingNetwork share, and the paper's formula."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastmeta.matching import MatchingNetwork
from fastmeta.nn import MLP

SIMILARITIES = ["dot", "cosine", "sqeuclidean", "euclidean", "additive", "concat"]
IN, DIM, WAYS = 5, 4, 3


def encoder(**options):
    return MLP([IN, 6, DIM], activation="tanh", **options)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MatchingNetwork(options.pop("encoder", None) or encoder(), **options).double()


def episode(tasks=2, supports=6, queries=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    support_x = torch.randn(tasks, supports, IN, generator=g, dtype=torch.float64)
    query_x = torch.randn(tasks, queries, IN, generator=g, dtype=torch.float64)
    # Every class has a support, in an order of its own for each task.
    support_y = torch.stack([torch.randperm(supports, generator=g) % WAYS for _ in range(tasks)])
    query_y = torch.randint(WAYS, (tasks, queries), generator=g)
    return support_x, support_y, query_x, query_y


def score(net, q, s):
    """Similarity of one query and one support, from its formula."""
    if net.similarity == "dot":
        return q @ s
    if net.similarity == "cosine":
        return (q @ s) / (q.norm() * s.norm())
    if net.similarity == "sqeuclidean":
        return -((q - s) ** 2).sum()
    if net.similarity == "euclidean":
        return -(((q - s) ** 2).sum().sqrt())
    if net.similarity == "concat":
        return net.attention.weight[0] @ torch.cat((s, q)) + net.attention.bias[0]
    a = net.attention
    return a.weight @ torch.tanh(a.query.weight @ q + a.support.weight @ s)


def naive(net, support, labels, query):
    """Probabilities [Q, C] of one task: attention-weighted sum of one-hot labels."""
    one_hot = F.one_hot(labels, WAYS).to(support.dtype)
    rows = []
    for q in query:
        scores = net.log_scale.exp() * torch.stack([score(net, q, s) for s in support])
        rows.append(torch.softmax(scores, 0) @ one_hot)
    return torch.stack(rows)
