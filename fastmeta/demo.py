"""``fastmeta demo``: two learners trained on printed characters, tested on handwriting."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.data import Augment, Episode, EpisodeSampler, LabelledImages, nearest_pixels
from fastmeta.data import digits as load_digits
from fastmeta.data import glyphs as load_glyphs
from fastmeta.data import mnist as load_mnist
from fastmeta.errors import fail
from fastmeta.info import backend_info
from fastmeta.maml import MAML
from fastmeta.matching import MatchingNetwork
from fastmeta.nn.encoders import Conv4
from fastmeta.train.meter import Interval, Progress, mean_interval

__all__ = ["Cell", "Curve", "Demo", "Shown", "Sizes", "format_table", "run_demo"]

MATCHING, ADAPTING, FLOOR = "Matching Network", "MAML", "pixel floor"
#: The columns of every result: the learners, and nearest neighbour on pixels.
NAMES = (MATCHING, ADAPTING, FLOOR)
GLYPHS, DIGITS, MNIST = "held-out glyphs", "handwritten digits", "MNIST digits"

#: Classes of test tasks, and queries of each class in them.
WAYS, TEST_QUERIES = (5, 10), 5
#: Tasks that are tested together.
BATCH = 25
WARM_UP = 15  # steps
CLIP = 10.0  # norm of the gradient


@dataclass(frozen=True)
class Sizes:
    """How much work a demo does.

    Attributes:
        matching_steps: training steps of the Matching Network.
        maml_steps: training steps of MAML.
        test_tasks: tasks behind every accuracy, a multiple of 25.
        points: how often a learning curve looks at tasks of the test sets.
        look_tasks: how many tasks of each it looks at, a multiple of 25.
    """

    matching_steps: int
    maml_steps: int
    test_tasks: int
    points: int
    look_tasks: int


FULL = Sizes(matching_steps=450, maml_steps=350, test_tasks=400, points=6, look_tasks=50)
QUICK = Sizes(matching_steps=4, maml_steps=4, test_tasks=25, points=1, look_tasks=25)


@dataclass
class Curve:
    """What a learner did while it trained.

    Attributes:
        ways: classes of its training tasks.
        loss: of each step.
        accuracy: of each step, on the queries of its training tasks, in [0, 1].
        looks: for held-out glyphs and digits, ``(step, accuracy)`` on some 5-way 1-shot tasks,
            other ones than those of the results. Nothing is chosen by them.
        seconds: spent on training alone.
    """

    ways: int
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    looks: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Cell:
    """Accuracies on one kind of test task.

    Attributes:
        data: name of the test set.
        ways: classes of a task.
        accuracy: for each learner and for the pixel floor, ``Tensor[tasks]`` in [0, 1].
    """

    data: str
    ways: int
    accuracy: dict[str, Tensor]

    def interval(self, name: str) -> Interval:
        """Mean of a learner or of the floor, with its 95% confidence interval."""
        return mean_interval(self.accuracy[name])

    def gain(self, name: str) -> Interval:
        """How far a learner is above the floor, from the differences on the same tasks."""
        return mean_interval(self.accuracy[name] - self.accuracy[FLOOR])


@dataclass
class Shown:
    """A test task to look at.

    Attributes:
        data: name of the test set.
        episode: the task, T = 1.
        answers: for each learner and the pixel floor, the class of each query, ``Tensor[Q]``.
    """

    data: str
    episode: Episode
    answers: dict[str, Tensor]


@dataclass
class Demo:
    """All that a demo found.

    Attributes:
        seed: what all its random numbers depend on.
        quick: whether it was told to do little.
        sizes: how much it did.
        info: `fastmeta.backend_info` of the run.
        images: for the training set and each test set, what is in it.
        curves: of each learner.
        cells: accuracies, test set by test set.
        shown: test tasks to look at, the first ones there are.
        training: training tasks to look at.
        parameters: numbers that each learner learned.
        seconds: wall-clock, of each part and in total.
    """

    seed: int
    quick: bool
    sizes: Sizes
    info: dict[str, Any]
    images: dict[str, LabelledImages]
    curves: dict[str, Curve]
    cells: list[Cell]
    shown: list[Shown]
    training: Episode
    parameters: dict[str, int]
    seconds: dict[str, float]


class SoftAugment(Augment):
    """`fastmeta.data.Augment`, then out of focus by a random amount, as coarse scans are.

    A picture is blended with what three 3x3 means make of it, its darkest ink kept.

    Example:
        >>> import numpy as np, torch
        >>> augment = SoftAugment(rotate=20)
        >>> augment(torch.rand(8, 1, 28, 28), np.random.default_rng(0)).shape
        torch.Size([8, 1, 28, 28])
    """

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of `Augment`, and one more for each image."""
        blend = generator.random((count, 1), dtype=np.float32)
        return np.concatenate([super().draw(generator, count), blend], axis=1)

    def apply(self, items: Tensor, numbers: Tensor) -> Tensor:
        """Change images ``[N, C, H, W]``."""
        sharp = super().apply(items, numbers[:, :-1].contiguous())
        soft = sharp
        for _ in range(3):
            soft = F.avg_pool2d(soft, 3, 1, 1)
        soft = soft * (sharp.amax((1, 2, 3), True) / soft.amax((1, 2, 3), True).clamp_min(1e-6))
        return sharp + numbers[:, -1].view(-1, 1, 1, 1) * (soft - sharp)


class _Matching:
    """A Matching Network, trained on 20-way tasks."""

    ways, queries, tasks = 20, 3, 4

    def __init__(self) -> None:
        self.module = MatchingNetwork(Conv4(hidden=64, pooling="stride"))
        self.groups: list[dict[str, Any]] = [
            {"params": list(self.module.parameters()), "peak": 2e-3}
        ]

    def scores(self, episode: Episode) -> Tensor:
        """Log-probabilities ``[T, Q, C]``."""
        logp: Tensor = self.module(episode.support_x, episode.support_y, episode.query_x)
        return logp


class _Adapting:
    """MAML, trained on 20-way tasks; of its 20 outputs a 5-way task uses the first 5."""

    ways, queries, tasks = 20, 3, 4

    def __init__(self) -> None:
        body = Conv4(hidden=32, pooling="stride", image_size=28)
        features = body.embedding_dim
        assert features is not None
        # Features of one length, so that one step size fits all tasks.
        length = nn.LayerNorm(features, elementwise_affine=False)
        # A head of zeros treats all classes alike, and its first step makes it a classifier by
        # class means. It stays zero between tasks, because the outer optimizer does not get it.
        head = nn.Linear(features, self.ways)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model = nn.Sequential(OrderedDict(body=body, length=length, head=head))
        self.module = MAML(model, lr=0.4, steps=2, learn_lr="parameter", lr_per_step=True)
        rates = self.module.rates
        with torch.no_grad():
            for name, rate in rates.items():
                if name.startswith("head"):
                    rate.fill_(3.0)
        self.groups: list[dict[str, Any]] = [
            {"params": list(body.parameters()), "peak": 4e-3},
            {"params": list(rates.parameters()), "peak": 1e-2},
        ]

    def scores(self, episode: Episode) -> Tensor:
        """Logits ``[T, Q, C]`` of the classes that the tasks have."""
        logits: Tensor = self.module(episode.support_x, episode.support_y, episode.query_x)
        return logits[..., : episode.num_classes]


_Learner = _Matching | _Adapting


def run_demo(
    *,
    seed: int = 0,
    seconds: float = 150.0,
    quick: bool = False,
    threads: int | None = None,
    quiet: bool = False,
) -> Demo:
    """Train both learners on rendered characters without digits, test them on what is new to them.

    Everything that is random follows from ``seed``: the same seed gives the same tasks, and the
    same numbers up to the rounding of floating-point sums, unless time runs out.

    Args:
        seed: in [0, 2**63).
        seconds: most time to train for, both learners together. Where it does not suffice for all
            steps, learning rates fall to zero by then all the same, and the steps done are in the
            result.
        quick: a few steps and tasks only, to see that everything runs.
        threads: of torch; None leaves them as they are.
        quiet: no progress bars.

    Returns:
        Accuracies, curves and example tasks, which `fastmeta.demo_report` turns into a page.

    Raises:
        ImportError: matplotlib or scikit-learn is missing (``pip install fastmeta[train]``).
        ValueError: an argument out of range.
    """
    if not 0 <= seed < 2**63:
        fail(ValueError, "run_demo", "seed", "in [0, 2**63)", seed)
    if not seconds > 0:
        fail(ValueError, "run_demo", "seconds", "positive", seconds)
    if threads is not None:
        if threads < 1:
            fail(ValueError, "run_demo", "threads", "at least 1", threads)
        torch.set_num_threads(threads)
    sizes = QUICK if quick else FULL
    start = time.perf_counter()
    train_set, test_sets = load_glyphs("train"), _test_sets()
    spent = {"images": time.perf_counter() - start}

    # Distorted, because faces are so alike that plain glyphs are easy for pixels too.
    changes = {GLYPHS: SoftAugment()}
    looks = {
        name: _tests(test_sets[name], 5, changes.get(name), seed + 1, sizes.look_tasks // BATCH)
        for name in (GLYPHS, DIGITS)
    }
    torch.manual_seed(seed)
    learners: dict[str, _Learner] = {MATCHING: _Matching(), ADAPTING: _Adapting()}
    steps = {MATCHING: sizes.matching_steps, ADAPTING: sizes.maml_steps}
    curves, samplers = {}, {}
    for name, learner in learners.items():
        samplers[name] = EpisodeSampler(
            train_set,
            ways=learner.ways,
            queries=learner.queries,
            tasks=learner.tasks,
            seed=seed,
            transform=SoftAugment(),
        )
        before = time.perf_counter()
        with Progress(f"{name:<{len(MATCHING)}}", steps[name], quiet=quiet) as bar:
            curves[name] = _train(
                learner, samplers[name], looks, steps[name], sizes.points, seconds / 2, bar
            )
        spent[name] = time.perf_counter() - before

    before = time.perf_counter()
    cells, shown = [], []
    kinds = [(name, ways) for name in test_sets for ways in WAYS]
    label = f"{'testing':<{len(MATCHING)}}"
    with Progress(label, len(kinds) * sizes.test_tasks // BATCH, quiet=quiet) as bar:
        for name, ways in kinds:
            sampler = _tests(
                test_sets[name], ways, changes.get(name), seed, sizes.test_tasks // BATCH
            )
            cells.append(_test(name, ways, learners, sampler, bar))
            shown += _show(name, learners, sampler)
    spent["tests"] = time.perf_counter() - before
    spent["total"] = time.perf_counter() - start
    return Demo(
        seed=seed,
        quick=quick,
        sizes=sizes,
        info=backend_info(),
        images={"training glyphs": train_set, **test_sets},
        curves=curves,
        cells=cells,
        shown=shown,
        training=samplers[MATCHING][0],
        parameters={n: _size(learner) for n, learner in learners.items()},
        seconds=spent,
    )


def _test_sets() -> dict[str, LabelledImages]:
    """What is never trained on; MNIST too, where the user has its files."""
    sets = {GLYPHS: load_glyphs("test"), DIGITS: load_digits()}
    root = os.environ.get("FASTMETA_DATA")
    if root and Path(root).is_dir():
        with contextlib.suppress(FileNotFoundError):  # the folder may be there for other data
            sets[MNIST] = load_mnist("test", root)
    return sets


def _tests(
    data: LabelledImages, ways: int, change: Augment | None, seed: int, batches: int
) -> EpisodeSampler:
    return EpisodeSampler(
        data,
        ways=ways,
        shots=1,
        queries=TEST_QUERIES,
        tasks=BATCH,
        batches=batches,
        # Away from the training tasks' seeds, so that no distortion is drawn a second time.
        seed=(seed + 2**63) % 2**64,
        transform=change,
    )


def _train(
    learner: _Learner,
    sampler: EpisodeSampler,
    looks: dict[str, EpisodeSampler],
    steps: int,
    points: int,
    seconds: float,
    bar: Progress,
) -> Curve:
    """Train to the last step or till time is over; the rates are a cosine that ends with it."""
    curve = Curve(learner.ways, looks={name: [] for name in looks})
    optimizer = torch.optim.Adam(learner.groups)
    look_after = {round(point * steps / points) for point in range(points + 1)}
    for step in range(steps + 1):
        if step in look_after:
            for name, tests in looks.items():
                right = torch.cat([_right(learner, episode) for episode in tests])
                curve.looks[name].append((step, float(right.mean())))
        share = max(step / steps, curve.seconds / seconds)
        if share >= 1:
            break
        before = time.perf_counter()
        learner.module.train()
        episode = sampler[step]
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / WARM_UP)
            group["lr"] = group["peak"] * warm * (1 + math.cos(math.pi * share)) / 2
        scores, target = learner.scores(episode).flatten(0, 1), episode.query_y.flatten()
        loss = F.cross_entropy(scores, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.module.parameters(), CLIP)
        optimizer.step()
        curve.loss.append(float(loss.detach()))
        curve.accuracy.append(float((scores.argmax(-1) == target).float().mean()))
        curve.seconds += time.perf_counter() - before
        recent = curve.accuracy[-20:]
        bar.step(f"{learner.ways}-way {100 * sum(recent) / len(recent):.0f}%")
    return curve


@torch.no_grad()
def _answers(learner: _Learner, episode: Episode) -> Tensor:
    """Class of each query, ``[T, Q]``."""
    learner.module.eval()
    return learner.scores(episode).argmax(-1)


def _right(learner: _Learner, episode: Episode) -> Tensor:
    return (_answers(learner, episode) == episode.query_y).float().mean(1)


def _test(
    name: str, ways: int, learners: dict[str, _Learner], sampler: EpisodeSampler, bar: Progress
) -> Cell:
    found: dict[str, list[Tensor]] = {column: [] for column in NAMES}
    for episode in sampler:
        for column in NAMES:
            if column == FLOOR:
                right = (nearest_pixels(episode) == episode.query_y).float().mean(1)
            else:
                right = _right(learners[column], episode)
            found[column].append(right)
        bar.step(f"{name}, {ways}-way")
    return Cell(name, ways, {column: torch.cat(parts) for column, parts in found.items()})


def _show(name: str, learners: dict[str, _Learner], sampler: EpisodeSampler) -> list[Shown]:
    """The first tasks, with the answers that were counted."""
    batch = sampler[0]
    answers = {column: _answers(learner, batch) for column, learner in learners.items()}
    answers[FLOOR] = nearest_pixels(batch)
    return [
        Shown(name, batch.task(task), {column: row[task] for column, row in answers.items()})
        for task in range(2)
    ]


def _size(learner: _Learner) -> int:
    return sum(p.numel() for group in learner.groups for p in group["params"])


def format_table(demo: Demo) -> str:
    """Results as a table for the terminal, percent correct with 95% confidence intervals."""
    heads = ["1-shot accuracy, %", *NAMES, *(f"{name} gain" for name in NAMES[:2])]
    rows = [
        [
            f"{cell.data}, {cell.ways}-way",
            *(str(cell.interval(name)) for name in NAMES),
            *(cell.gain(name).signed() for name in NAMES[:2]),
        ]
        for cell in demo.cells
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for first, *others in [heads, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    note = f"{demo.sizes.test_tasks} tasks each, ± 95% confidence; gain: over the pixel floor"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])
