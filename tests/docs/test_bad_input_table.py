"""The table of bad input says what happens: rows that the tests of the ops do not hold already."""

import pytest
import torch

import fastmeta as fm

NAN = float("nan")
SIMILARITIES = ["dot", "cosine", "sqeuclidean", "euclidean", "additive"]


@pytest.fixture(params=SIMILARITIES)
def options(request):
    weight = torch.ones(8) if request.param == "additive" else None
    return {"similarity": request.param, "weight": weight}


@pytest.fixture
def episode():
    return torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.arange(5).repeat(2, 1)


def test_nan_stays_where_the_table_says(options, episode):
    query, support, labels = episode
    spoilt = query.clone()
    spoilt[0, 1, 3] = NAN
    wrong = fm.matching_attention(spoilt, support, labels, 5, **options).isnan()
    assert wrong[0, 1].all()
    assert wrong.sum() == 5
    spoilt = support.clone()
    spoilt[0, 2, 3] = NAN
    wrong = fm.matching_attention(query, spoilt, labels, 5, **options).isnan()
    assert wrong[0].all()
    assert not wrong[1].any()
    labels = labels.clone()
    labels[0, 2] = fm.IGNORE_INDEX
    kept = fm.matching_attention(query, spoilt, labels, 5, **options)
    assert not kept.isnan().any()


def test_empty_sizes(options, episode):
    query, support, labels = episode
    call = fm.matching_attention
    assert call(query[:0], support[:0], labels[:0], 5, **options).shape == (0, 4, 5)
    assert call(query[:, :0], support, labels, 5, **options).shape == (2, 0, 5)
    none = call(query, support[:, :0], labels[:, :0], 5, **options)
    assert torch.equal(none, torch.full((2, 4, 5), -torch.inf))
    if options["weight"] is not None:
        options = {**options, "weight": torch.ones(0)}
    flat = call(query[..., :0], support[..., :0], labels, 5, output="probs", **options)
    torch.testing.assert_close(flat, torch.full((2, 4, 5), 0.2))


def test_losses_of_nothing(episode):
    query, support, labels = episode
    ignored = torch.full((2, 4), fm.IGNORE_INDEX)
    assert fm.matching_nll(query, support, labels, ignored, 5).isnan()
    assert fm.matching_nll(query, support, labels, ignored, 5, reduction="sum") == 0
    assert fm.matching_nll(query, support, labels, torch.full((2, 4), 5), 6) == torch.inf
    assert fm.matching_nll(query[:, :0], support, labels, ignored[:, :0], 5).isnan()


def test_empty_means_and_updates(episode):
    _, support, labels = episode
    mean, count = fm.segment_mean(support[:, :0], labels[:, :0], 3)
    assert mean.shape == (2, 3, 8)
    assert not mean.any()
    assert not count.any()
    assert fm.sgd_update([], [], 0.1) == []
    kept = torch.ones(2)
    assert fm.sgd_update([kept], [None], 0.1)[0] is kept
    assert fm.momentum_update([kept], [None], None, 0.1)[0][0] is kept
    assert fm.adam_update([kept], [None], None, 0.1)[0][0] is kept


def test_nan_of_one_task_stays_in_it():
    maml = fm.MAML(torch.nn.Linear(3, 2), lr=0.1, steps=1)
    support, query = torch.randn(3, 4, 3), torch.randn(3, 5, 3)
    support[1, 0, 0] = NAN
    wrong = maml(support, torch.tensor([[0, 1, 0, 1]] * 3), query).isnan()
    assert wrong[1].all()
    assert not wrong[[0, 2]].any()
