import itertools
import pickle

import pytest
import torch

from fastmeta.data import Augment, Episode, EpisodeSampler, EpisodeStream, sinusoids

IMAGES = torch.rand(80, 1, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(80) % 8


def sampler(**change):
    options = dict(ways=(2, 5), shots=(1, 2), queries=3, tasks=3, seed=11, transform=Augment())
    return EpisodeSampler(IMAGES, LABELS, **{**options, **change})


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, Episode)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [sampler, lambda **o: sinusoids(tasks=3, seed=2, **o)])
def test_workers_change_nothing(make, workers):
    want = [make()[i] for i in range(5)]
    assert_same(take(make(workers=workers), 5), want)
    assert_same(list(make(workers=workers, batches=5)), want)


def test_workers_leave_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    take(sampler(workers=1), 2)
    assert torch.equal(torch.rand(4), want)


def test_an_endless_stream_goes_on_and_a_finite_one_starts_again():
    endless, want = sampler(), [sampler()[i] for i in range(6)]
    assert_same(take(endless, 2) + take(endless, 3) + take(endless, 1), want)
    finite = sampler(batches=3)
    assert len(finite) == 3
    take(finite, 2)
    assert_same(list(finite) + list(finite), want[:3] * 2)
    with pytest.raises(TypeError, match="endless; give batches="):
        len(endless)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [None, 6])
def test_resuming_goes_on_where_it_was_left(workers, batches):
    want = [sampler()[i] for i in range(6)]
    first = sampler(workers=workers, batches=batches)
    # Workers are ahead of the reader here: what counts is what was handed over.
    assert_same(take(first, 2), want[:2])
    state = pickle.loads(pickle.dumps(first.state_dict()))
    resumed = sampler(workers=workers, batches=batches)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), want[2:])
    if batches:
        assert_same(list(resumed), want)


def test_a_finished_set_stays_finished_when_resumed():
    first = sampler(batches=2)
    for _ in first:
        state = first.state_dict()
    again = sampler(batches=2)
    again.load_state_dict(state)
    assert [len(list(again)), len(list(again))] == [0, 2]


def test_a_state_of_another_stream_is_refused():
    state = sampler().state_dict()
    for change, text in {
        "seed": (dict(seed=12), r"state\['seed'\] must be 12 as here, got 11"),
        "tasks": (dict(tasks=4), r"state\['tasks'\] must be 4 as here, got 3"),
        "ways": (dict(ways=3), r"state\['ways'\] must be '\[3\]' as here"),
    }.values():
        with pytest.raises(ValueError, match=text):
            sampler(**change).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'stream'"):
        sinusoids(tasks=3, seed=11).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state of state_dict\(\) with 'position'"):
        sampler().load_state_dict({k: v for k, v in state.items() if k != "position"})


def test_any_batch_can_be_read_directly_and_streams_pickle():
    stream = pickle.loads(pickle.dumps(sampler(batches=4)))
    assert_same([stream[3]], [sampler()[3]])
    for index in (-1, 4):
        with pytest.raises(
            IndexError, match=f"index must be not negative and below 4, got {index}"
        ):
            stream[index]


class Counting(EpisodeStream):
    """A stream of one's own: its items are the numbers of the tasks."""

    def make(self, tasks):
        x = torch.tensor(list(tasks), dtype=torch.float32).view(-1, 1, 1)
        return Episode(x, x, x, x)


def test_own_streams():
    got = torch.cat([e.support_x.flatten() for e in Counting(tasks=2, batches=3, workers=1)])
    assert got.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [None, 7])
def test_shards_are_the_stream_without_what_is_over(workers, batches):
    whole = sampler(workers=workers, batches=batches)
    want = [sampler()[i] for i in range(6)]
    parts = [whole.shard(rank, 3) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert_same(take(part, 2), want[rank::3])
    if batches:
        assert [len(part) for part in parts] == [2, 2, 2]
        assert [len(list(part)) for part in parts] == [2, 2, 2]


def test_the_state_of_one_shard_serves_all():
    first = sampler().shard(0, 2)
    take(first, 2)
    other = sampler().shard(1, 2)
    other.load_state_dict(first.state_dict())
    assert_same(take(other, 1), [sampler()[5]])
    with pytest.raises(ValueError, match=r"'ranks'.*must be 1 as here"):
        sampler().load_state_dict(first.state_dict())
    old = sampler().state_dict()
    del old["ranks"]
    sampler().load_state_dict(old)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((2, 2), "rank must be an integer of at least 0 and below 2"),
        ((0, 0), "ranks must be an integer of at least 1"),
        ((0, 9), "ranks must be at most the 7 batches, got 9"),
    ],
)
def test_wrong_shards_are_told(numbers, message):
    with pytest.raises(ValueError, match=f"EpisodeSampler.shard: {message}"):
        sampler(batches=7).shard(*numbers)
    with pytest.raises(ValueError, match="a whole one, got 1 of 2 parts"):
        sampler().shard(0, 2).shard(0, 2)


def test_names_are_those_of_the_shards_classes():
    items, labels = torch.arange(400.0)[:, None], torch.arange(400) % 20
    part = EpisodeSampler(items, labels, ways=3, queries=1, tasks=1).shard(1, 2)
    for index in range(3):
        drawn = labels[part[index].support_x[0, :, 0].long()].tolist()
        assert part.class_names(index) == [[str(label) for label in drawn]]


def test_defaults_of_torch_change_nothing_but_roundings():
    want = sampler()[0]
    torch.set_default_dtype(torch.float64)
    try:
        got = [sampler()[0], *take(sampler(workers=1), 1)]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        got.append(sampler()[0])
    for episode in got:
        for x, y in zip(episode, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
