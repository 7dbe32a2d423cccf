import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fastmeta.data import Augment, EpisodeSampler, LabelledImages
from fastmeta.data._draw import subsets

# Items that say which they are; labels neither sorted nor 0..n-1; classes of 8 to 18 items.
SIZES = {label: 8 + (7 * k) % 13 for k, label in enumerate([900, -5, 3, 17, 42, 1000, 8, 77, 64])}
LABELS = np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))
ITEMS = torch.arange(len(LABELS), dtype=torch.float32)[:, None] + 1  # 0 is padding


def unbalanced(generator, ways):
    return generator.integers(1, 4, size=ways)


CASES = {
    "fixed": dict(ways=5, shots=3, queries=5),
    "ragged": dict(ways=(2, 6), shots=(1, 4), queries=[1, 3]),
    "unbalanced": dict(ways=4, shots=unbalanced, queries=unbalanced),
    "functions": dict(ways=lambda g: int(g.integers(2, 5)), shots=1, queries=lambda g, w: w),
    "no queries": dict(ways=5, shots=3, queries=0),
    "all classes": dict(ways=9, shots=4, queries=4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tasks_are_what_they_should_be(case):
    sampler = EpisodeSampler(ITEMS, LABELS, tasks=7, seed=5, **case)
    for episode in (sampler[0], sampler[31]):
        assert torch.equal((episode.support_x[..., 0] == 0), episode.support_y == -100)
        assert torch.equal((episode.query_x[..., 0] == 0), episode.query_y == -100)
        for index in range(episode.tasks):
            support_x, support_y, query_x, query_y = (p[0] for p in episode.task(index))
            support = (support_x[:, 0].long() - 1).tolist()
            query = (query_x[:, 0].long() - 1).tolist()
            # No item twice, none in both.
            assert len(set(support + query)) == len(support + query)
            # A task's label stands for one class, and different labels for different ones.
            pairs = set(zip(support_y.tolist(), LABELS[support].tolist(), strict=True)) | set(
                zip(query_y.tolist(), LABELS[query].tolist(), strict=True)
            )
            ways = int(episode.ways[index])
            assert sorted(label for label, _ in pairs) == list(range(ways))
            assert len({original for _, original in pairs}) == ways


def test_sizes_follow_the_request():
    episode = EpisodeSampler(ITEMS, LABELS, ways=5, shots=3, queries=5, tasks=4)[0]
    assert episode.support_x.shape == (4, 15, 1)
    assert (episode.shots == 3).all()
    assert (episode.queries == 5).all()
    sampler = EpisodeSampler(ITEMS, LABELS, ways=(2, 6), shots=(1, 4), queries=[1, 3], tasks=300)
    episode = sampler[0]
    assert set(episode.ways.tolist()) == {2, 3, 4, 5, 6}
    assert set(episode.shots[:, 0].tolist()) == {1, 2, 3, 4}
    assert set(episode.queries[:, 0].tolist()) == {1, 3}
    episode = EpisodeSampler(ITEMS, LABELS, **CASES["unbalanced"], tasks=50)[0]
    assert any(len(set(row)) > 1 for row in episode.shots.tolist())


def test_other_labels_have_no_names_of_the_data():
    images = LabelledImages(
        torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 4, ("a", "b", "c", "d")
    )
    sampler = EpisodeSampler(images, torch.arange(40) % 2 + 10, ways=2, tasks=1, queries=1)
    assert set(sampler.class_names(0)[0]) == {"10", "11"}


def test_class_names_are_those_of_the_tasks():
    sampler = EpisodeSampler(ITEMS, LABELS, ways=(2, 6), shots=1, queries=1, tasks=9, seed=2)
    names = sampler.class_names(3)
    episode = sampler[3]
    for index in range(9):
        items = episode.task(index).support_x[0, :, 0].long() - 1
        assert names[index] == [str(label) for label in LABELS[items]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_task_depends_on_seed_and_number_alone(case):
    together = EpisodeSampler(ITEMS, LABELS, tasks=6, seed=9, **case)[2]
    alone = EpisodeSampler(ITEMS, LABELS, tasks=1, seed=9, **case)
    other = EpisodeSampler(ITEMS, LABELS, tasks=6, seed=10, **case)[2]
    for index in range(6):
        for got, want in zip(together.task(index), alone[12 + index], strict=True):
            assert torch.equal(got, want)
    assert together.support_x.shape != other.support_x.shape or not torch.equal(
        together.support_x, other.support_x
    )


def test_draws_are_uniform():
    # All 60 ordered samples of 3 out of 5 equally often: chi-squared, 59 degrees of freedom.
    draws, g = 12000, np.random.default_rng(1)
    drawn = subsets(
        np.full(draws, 5), np.full(draws, 3), g.random((draws, 3)), g.random((draws, 3))
    )
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(itertools.permutations(range(5), 3))
    chi = sum((n - draws / 60) ** 2 / (draws / 60) for n in counts.values())
    assert chi < 110  # exceeded by chance once in 20,000


def test_rows_of_a_draw_have_sizes_of_their_own():
    g = np.random.default_rng(2)
    sizes, counts = np.array([3, 100, 1, 7]), np.array([3, 5, 1, 0])
    drawn = subsets(sizes, counts, g.random((4, 6)), g.random((4, 6)))
    for row, size, count in zip(drawn, sizes, counts, strict=True):
        assert len(set(row[:count].tolist())) == count
        assert (row[:count] >= 0).all()
        assert (row[:count] < size).all()
        assert (row[count:] == -1).all()


def test_every_item_gets_its_turn_on_both_sides():
    sampler = EpisodeSampler(ITEMS, LABELS, ways=5, shots=2, queries=3, tasks=500)
    episode = sampler[0]
    assert len(episode.support_x.unique()) == len(episode.query_x.unique()) == len(LABELS)


def test_turned_classes():
    images = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 4
    sampler = EpisodeSampler(
        images, labels, ways=12, shots=2, queries=2, tasks=5, rotations=True, seed=3
    )
    turned = {k: torch.rot90(images, k, (2, 3)) for k in range(4)}
    names = sampler.class_names(0)
    for index in range(5):
        task = sampler[0].task(index)
        assert len(set(names[index])) == 12
        for x, y in ((task.support_x, task.support_y), (task.query_x, task.query_y)):
            for image, label in zip(x[0], y[0].tolist(), strict=True):
                name, _, turn = names[index][label].partition(", turned ")
                same = (turned[int(turn or 0) // 90] == image).flatten(1).all(1).nonzero()
                assert labels[same].flatten().tolist() == [int(name)]


def test_separate_pools():
    face = np.random.default_rng(4).integers(0, 4, len(LABELS))
    pools = dict(support_items=face < 2, query_items=np.flatnonzero(face >= 2))
    sampler = EpisodeSampler(
        ITEMS, LABELS, ways=4, shots=2, queries=2, tasks=50, small="skip", **pools
    )
    episode = sampler[0]
    assert (face[episode.support_x.long() - 1] < 2).all()
    assert (face[episode.query_x.long() - 1] >= 2).all()
    for side, labels in (
        (episode.support_x, episode.support_y),
        (episode.query_x, episode.query_y),
    ):
        original = LABELS[side[..., 0].long() - 1]
        for t in range(50):
            assert len({*zip(labels[t].tolist(), original[t].tolist(), strict=True)}) == 4
    with pytest.raises(ValueError, match=r"disjoint from support_items, got .* shared items"):
        EpisodeSampler(ITEMS, LABELS, support_items=face < 2, query_items=face >= 1)
    with pytest.raises(ValueError, match="together with query_items"):
        EpisodeSampler(ITEMS, LABELS, support_items=face < 2)
    with pytest.raises(ValueError, match=r"10 support and 5 query items in every class"):
        EpisodeSampler(ITEMS, LABELS, shots=10, queries=5, **pools)


def test_small_classes_are_an_error_unless_allowed():
    with pytest.raises(
        ValueError, match=r"at least 12 items \(4 shots \+ 8 queries\).* got [89] in"
    ):
        EpisodeSampler(ITEMS, LABELS, shots=4, queries=8)
    sampler = EpisodeSampler(ITEMS, LABELS, shots=4, queries=8, tasks=60, small="skip")
    used = set(LABELS[sampler[0].support_x.long().flatten() - 1].tolist())
    assert used == {label for label, size in SIZES.items() if size >= 12}
    with pytest.raises(
        ValueError, match=r"5 classes with 9 shots and 8 queries .*got 2 usable of 9"
    ):
        EpisodeSampler(ITEMS, LABELS, shots=9, queries=8, small="skip")


@pytest.mark.parametrize(("shots", "queries"), [(1, 15), (5, 5), (12, 1), (9, 30), (20, 0)])
@pytest.mark.parametrize("pools", [False, True])
def test_reused_items_stay_on_their_side(shots, queries, pools):
    # Every class has items on both sides, whatever its size.
    order = np.argsort(np.argsort(LABELS, kind="stable"))
    extra = dict(support_items=order % 2 == 0, query_items=order % 2 == 1) if pools else {}
    sampler = EpisodeSampler(
        ITEMS, LABELS, ways=9, shots=shots, queries=queries, tasks=5, small="reuse", **extra
    )
    episode = sampler[0]
    assert (episode.shots == shots).all()
    assert (episode.queries.numel() == 0) == (queries == 0) or (episode.queries == queries).all()
    for t in range(5):
        support = set(episode.support_x[t].flatten().tolist())
        query = set(episode.query_x[t].flatten().tolist())
        assert not support & query
        # As many different items as the classes have room for, up to those asked for.
        room = sum(min(size, shots + queries) for size in SIZES.values())
        assert pools or len(support | query) == room


def test_reuse_needs_an_item_for_each_side():
    labels = torch.tensor([0, 0, 1, 1, 2])
    with pytest.raises(ValueError, match="got 2 usable of 3 classes"):
        EpisodeSampler(torch.rand(5, 2), labels, ways=3, shots=1, queries=1, small="reuse")


class Noisy(Dataset):
    """A dataset whose items are random, by each of the generators that transforms use."""

    def __init__(self):
        self.targets = [k % 3 for k in range(30)]

    def __len__(self):
        return 30

    def __getitem__(self, index):
        noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.tensor([float(index), noise]), self.targets[index]


def test_datasets_with_random_items_are_reproducible_and_leave_no_trace():
    sampler = EpisodeSampler(Noisy(), ways=3, shots=1, queries=2, tasks=4, seed=1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    want = torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = sampler[1]
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == want  # noqa: NPY002
    for a, b in zip(first, sampler[1], strict=True):
        assert torch.equal(a, b)
    alone = EpisodeSampler(Noisy(), ways=3, shots=1, queries=2, tasks=1, seed=1)[6]
    assert torch.equal(first.support_x[2:3], alone.support_x)
    noise = torch.cat([first.support_x, first.query_x], 1)[..., 1]
    assert noise.unique().numel() == noise.numel()


def test_kinds_of_data_give_the_same_tasks():
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(60) % 6
    names = tuple("abcdef")
    options = dict(ways=4, shots=2, queries=3, tasks=3, seed=8)
    want = EpisodeSampler(images, labels, **options)[0]
    assert want.support_x.dtype == torch.float32
    assert want.support_x.max() <= 1
    sources = [
        (images.numpy(), labels.numpy()),
        (images, labels.tolist()),
        (images.numpy()[::-1][::-1], labels.to(torch.uint8)),
        (TensorDataset(images, labels), labels),
        (LabelledImages(images, labels, names), None),
    ]
    for data, given in sources:
        for got, part in zip(EpisodeSampler(data, given, **options)[0], want, strict=True):
            assert torch.equal(got, part)
    assert (
        EpisodeSampler(LabelledImages(images, labels, names), **options).class_names(0)[0][0]
        in names
    )
    assert EpisodeSampler(images.double(), labels, **options)[0].query_x.dtype == torch.float64
    assert EpisodeSampler(images.long(), labels, **options)[0].query_x.dtype == torch.int64
    assert EpisodeSampler(images > 99, labels, **options)[0].query_x.dtype == torch.float32


def test_a_transform_per_task_and_a_batched_one_are_the_same():
    images, labels = torch.rand(60, 1, 28, 28), torch.arange(60) % 6
    augment = Augment()
    options = dict(ways=(2, 4), shots=1, queries=(1, 2), tasks=5, seed=4)
    batched = EpisodeSampler(images, labels, transform=augment, **options)[1]
    plain = EpisodeSampler(images, labels, transform=lambda x, g: augment(x, g), **options)[1]
    bare = EpisodeSampler(images, labels, **options)[1]
    for a, b, c in zip(batched, plain, bare, strict=True):
        assert torch.equal(a, b)
        assert a.is_floating_point() != torch.equal(a, c)
    alone = EpisodeSampler(images, labels, transform=augment, **{**options, "tasks": 1})[7]
    assert torch.equal(batched.task(2).query_x, alone.query_x)


GOOD = dict(data=ITEMS, labels=LABELS)
WRONG = {
    "no labels": (ValueError, dict(labels=None), "labels must be given, for data without"),
    "few labels": (ValueError, dict(labels=LABELS[:-1]), r"one label for each of the \d+ items"),
    "float labels": (TypeError, dict(labels=LABELS / 2), "labels must be integers, got float64"),
    "data is a list": (TypeError, dict(data=[1, 2]), "data must be LabelledImages, .* got list"),
    "scalar data": (ValueError, dict(data=torch.tensor(1.0)), r"items \[N, ...\] on the CPU"),
    "few classes": (ValueError, dict(ways=10, queries=1), "10 classes with 1 shots.*got 9 usable"),
    "no ways": (ValueError, dict(ways=0), "ways must be at least 1, got 0"),
    "no shots": (ValueError, dict(shots=(0, 2)), "shots must be at least 1, got 0"),
    "negative queries": (ValueError, dict(queries=-1), "queries must be at least 0, got -1"),
    "empty range": (ValueError, dict(shots=(3, 2)), r"\(low, high\) with low <= high"),
    "float ways": (TypeError, dict(ways=5.0), "ways must be an int, a tuple .* got 5.0"),
    "bool ways": (TypeError, dict(ways=True), "ways must be an int, a tuple"),
    "tasks": (ValueError, dict(tasks=0), "tasks must be an integer of at least 1, got 0"),
    "tasks is a float": (TypeError, dict(tasks=2.0), "tasks must be an integer .*got float 2.0"),
    "seed": (ValueError, dict(seed=-1), "seed must be an integer of at least 0"),
    "large seed": (ValueError, dict(seed=2**64), "below 18446744073709551616"),
    "workers": (ValueError, dict(workers=-1), "workers must be an integer of at least 0"),
    "batches": (ValueError, dict(batches=0), "batches must be an integer of at least 1"),
    "small": (ValueError, dict(small="drop"), "small must be one of 'error', 'skip', 'reuse'"),
    "rotations": (ValueError, dict(rotations=True), r"square images \[..., H, H\]"),
    "transform": (TypeError, dict(transform=3), "transform must be a function"),
    "pool": (ValueError, dict(support_items=[-1], query_items=[0]), "support_items must be a mask"),
}


@pytest.mark.parametrize(("error", "change", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_told(error, change, text):
    arguments = {**GOOD, "shots": 1, "queries": 2, **change}
    with pytest.raises(error, match=f"^EpisodeSampler: .*{text}"):
        EpisodeSampler(arguments.pop("data"), arguments.pop("labels"), **arguments)


def test_functions_that_return_nonsense_are_told():
    sampler = EpisodeSampler(ITEMS, LABELS, shots=lambda g, w: [1, 2], queries=1)
    with pytest.raises(ValueError, match=r"int of at least 1 or 5 of them, got \[1, 2\]"):
        sampler[0]
    with pytest.raises(ValueError, match="ways must be a function that returns an int"):
        EpisodeSampler(ITEMS, LABELS, ways=lambda g: 0, queries=1)[0]
    with pytest.raises(ValueError, match="at least 41 items"):
        EpisodeSampler(ITEMS, LABELS, queries=lambda g, w: 40)[0]


class Odd(Dataset):
    labels = (0, 0, 0, 0)

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.items[index]


def test_items_that_cannot_be_stacked_are_told():
    options = dict(ways=1, shots=2, queries=2, tasks=1)
    with pytest.raises(TypeError, match=r"tensors or arrays .*got an item of type str"):
        EpisodeSampler(Odd("abcd"), **options)[0]
    with pytest.raises(ValueError, match=r"of items of one shape, got \[\(1,\), \(2,\)\]"):
        EpisodeSampler(Odd([torch.rand(1 + k % 2) for k in range(4)]), **options)[0]
