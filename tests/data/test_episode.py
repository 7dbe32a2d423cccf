import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm
from fastmeta.data import Episode, collate_episodes


def task(ways, shots, queries, seed):
    """One task with distinct items and labels sorted by class."""
    g = torch.Generator().manual_seed(seed)
    return Episode(
        torch.rand(1, ways * shots, 6, generator=g),
        torch.arange(ways).repeat_interleave(shots)[None],
        torch.rand(1, ways * queries, 6, generator=g),
        torch.arange(ways).repeat_interleave(queries)[None],
    )


TASKS = [task(3, 2, 4, 0), task(5, 1, 2, 1), task(2, 3, 1, 2)]


def test_unpacks_and_tells_its_sizes():
    episode = collate_episodes(TASKS)
    support_x, support_y, query_x, query_y = episode
    assert support_x.shape == (3, 6, 6)
    assert query_x.shape == (3, 12, 6)
    assert support_y.dtype == query_y.dtype == torch.int64
    assert (episode.tasks, episode.num_classes) == (3, 5)
    assert episode.ways.tolist() == [3, 5, 2]
    assert episode.shots.tolist() == [[2, 2, 2, 0, 0], [1, 1, 1, 1, 1], [3, 3, 0, 0, 0]]
    assert episode.queries.tolist() == [[4, 4, 4, 0, 0], [2, 2, 2, 2, 2], [1, 1, 0, 0, 0]]
    assert episode.support_lengths.tolist() == [6, 5, 6]
    assert episode.query_lengths.tolist() == [12, 10, 2]


def test_padding_is_zero_and_ignored_and_comes_off_again():
    episode = collate_episodes(TASKS)
    assert (episode.support_y[1, 5:] == -100).all()
    assert (episode.support_x[1, 5:] == 0).all()
    assert (episode.query_y[2, 2:] == -100).all()
    assert (episode.query_x[2, 2:] == 0).all()
    for index, alone in enumerate(TASKS):
        for got, want in zip(episode.task(index), alone, strict=True):
            assert torch.equal(got, want)


def test_cross_entropy_skips_the_padding():
    episode = collate_episodes(TASKS)
    logits = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(logits.flatten(0, 1), episode.query_y.flatten(), reduction="sum")
    want = sum(
        F.cross_entropy(logits[i, : t.query_y.shape[1]], t.query_y[0], reduction="sum")
        for i, t in enumerate(TASKS)
    )
    torch.testing.assert_close(loss, want)


def test_the_ops_take_padded_episodes_as_they_are():
    episode = collate_episodes(TASKS)
    support_x, support_y, query_x, query_y = episode.to(dtype=torch.float64)
    nll = fm.matching_nll(query_x, support_x, support_y, query_y, 5, scale=3.0, reduction="sum")
    want = 0.0
    for alone in TASKS:
        sx, sy, qx, qy = (
            part[0].double() if part.is_floating_point() else part[0] for part in alone
        )
        similar = 3.0 * F.normalize(qx, dim=-1) @ F.normalize(sx, dim=-1).T
        chance = similar.softmax(-1) @ F.one_hot(sy).double()
        want -= chance.gather(1, qy[:, None]).log().sum()
    torch.testing.assert_close(nll, want)


def test_to_changes_the_type_of_items_and_float_targets_only():
    moved = TASKS[0].to("cpu", torch.float64)
    assert moved.support_x.dtype == moved.query_x.dtype == torch.float64
    assert moved.support_y.dtype == moved.query_y.dtype == torch.int64
    x = torch.rand(1, 4, 1)
    assert Episode(x, x, x, x).to(dtype=torch.float64).query_y.dtype == torch.float64


def test_regression_episodes_have_no_classes():
    x = torch.rand(2, 4, 1)
    episode = Episode(x, x, x, x)
    assert episode.query_lengths.tolist() == [4, 4]
    assert torch.equal(episode.task(1).support_x, x[1:])
    with pytest.raises(TypeError, match=r"num_classes: support_y must be integer labels"):
        _ = episode.num_classes
    with pytest.raises(TypeError, match=r"integer labels"):
        _ = episode.shots
    short = Episode(*(part[:, :3] for part in episode))
    with pytest.raises(ValueError, match=r"equal sizes when targets are floats"):
        collate_episodes([episode, short])


def test_wrong_use_is_told():
    with pytest.raises(ValueError, match="at least one Episode, got none"):
        collate_episodes([])
    with pytest.raises(IndexError, match=r"index must be in \[0, 1\), got 1"):
        TASKS[0].task(1)


@pytest.mark.cuda
def test_pinned_episodes_move_without_waiting():
    pinned = TASKS[0].pin_memory()
    assert all(part.is_pinned() for part in pinned)
    assert pinned.to("cuda", non_blocking=True).support_x.is_cuda
