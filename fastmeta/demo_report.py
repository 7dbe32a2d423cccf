"""The demo's results as a page and as a picture."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmeta.data import Episode
from fastmeta.demo import (
    ADAPTING,
    DIGITS,
    FLOOR,
    GLYPHS,
    MATCHING,
    NAMES,
    TEST_QUERIES,
    Demo,
    Shown,
)
from fastmeta.errors import fail
from fastmeta.train.report import Page, image_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["demo_page", "demo_picture"]

COLOURS = {MATCHING: "#2b5fb3", ADAPTING: "#d1731f", FLOOR: "#9aa3ad"}
TRANSDUCTIVE = (
    "batch norm by the batch it sees, in tests too: a query's answer depends on the task's other "
    "queries (transductive), as in the original code; the other two columns have no such help"
)
RIGHT, WRONG = "#1a7f4b", "#c4314b"
INK, SOFT, LINE = "#1c2128", "#5b6470", "#d9dee4"
LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "path",
    "svg.hashsalt": "fastmeta",
    "figure.facecolor": "white",
}

STYLE = """
.task { display: inline-block; margin: .2rem 1.6rem 1rem 0; vertical-align: top; }
.task .note { margin: .2rem 0; font-size: .82rem; white-space: nowrap; }
.task h3 { margin: 1rem 0 0; }
.task table { border-collapse: separate; border-spacing: 5px 4px; }
.task th { font-size: .8rem; font-weight: 600; color: var(--soft); text-align: right;
  padding-right: .6rem; vertical-align: middle; white-space: nowrap; }
.task td { padding: 0; text-align: center; line-height: 0; }
.task img { width: 52px; height: 52px; border: 1px solid var(--line); border-radius: 3px; }
.task .support img { border: 2px solid var(--ink); }
.task .support td { padding-bottom: .5rem; }
.task .answers { display: flex; gap: 4px; justify-content: center; margin: 3px 0 5px; }
.task .answer { position: relative; width: 26px; border-radius: 3px; padding: 2px 2px 0; }
.task .answer img { width: 22px; height: 22px; border: 0; border-radius: 2px; }
.task .answer b { display: block; font: 700 11px/13px system-ui, sans-serif; color: #fff; }
.task .yes { background: var(--right); } .task .no { background: var(--wrong); }
.strip { display: inline-block; margin: 0 1.2rem .6rem 0; line-height: 0; }
.strip img { width: 48px; height: 48px; border: 1px solid var(--line); border-radius: 3px;
  margin: 0 3px 3px 0; }
"""


def demo_page(demo: Demo) -> Page:
    """The report: results, learning curves, tasks with both learners' answers, circumstances."""
    page = Page("From printed characters to handwriting", STYLE)
    classes = demo.images["training glyphs"].num_classes
    seconds = sum(curve.seconds for curve in demo.curves.values())
    page.text(
        f"A Matching Network and a MAML learner were meta-trained for {seconds:.0f} seconds on "
        f"tasks made of {classes:,} characters from printed fonts, not one digit among them. Then "
        "they saw one example each of 5 or 10 handwritten digits and had to tell new ones apart.",
        "lead",
    )
    if demo.quick:
        page.text("This was a quick run to see that everything works: its numbers mean little.")
    page.figure(
        bars(demo),
        "Bars of accuracy of both learners and the pixel floor on each test set",
        "Accuracy with 95% confidence intervals. The pixel floor labels a query like the support "
        "with the largest cosine between raw pixels, on the very same tasks. Dashed: guessing.",
    )
    page.table(
        ["1-shot accuracy, %", *NAMES, *(f"{name} gain" for name in NAMES[:2])],
        [
            [
                f"{cell.data}, {cell.ways}-way",
                *(str(cell.interval(name)) for name in NAMES),
                *(cell.gain(name).signed() for name in NAMES[:2]),
            ]
            for cell in demo.cells
        ],
    )
    page.text(
        f"Each line: {demo.sizes.test_tasks} tasks with one example and {TEST_QUERIES} queries of "
        "each class. Intervals are 1.96 standard errors over tasks. Gain: over the pixel floor, "
        "from the differences task by task.",
        "note",
    )
    page.heading("Learning")
    page.figure(
        curves(demo),
        "Learning curves of both learners",
        "Lines: accuracy on the training tasks (mean of 20 steps), which have more classes than "
        f"test tasks. Points: 5-way 1-shot accuracy on {demo.sizes.look_tasks} other tasks of each "
        "test set. Digits took no part in training, and nothing was chosen by these looks.",
    )
    page.heading("What they were trained on")
    page.text(
        "Some classes of one training task: the support, then queries, the same character in other "
        "typefaces, all bent, turned, reweighted and put out of focus at random."
    )
    page.html(training_strip(demo.training))
    page.heading("Tasks and answers")
    page.text(
        "The first test tasks, not picked. On top the support, one example of each class; below it "
        "queries of that class. Under each query stands the example that each learner took it for, "
        "left the Matching Network, right MAML: ✓ on green is right, ✗ on red is wrong."
    )
    for shown in in_order(demo.shown):
        page.html(task_markup(shown))
    page.heading("How it was measured")
    page.table([], facts(demo), "words")
    return page


def in_order(shown: list[Shown]) -> list[Shown]:
    """Handwriting first; of each kind two small tasks, which fit side by side, or a wide one."""
    kept, seen = [], Counter[tuple[str, int]]()
    for task in sorted(shown, key=lambda task: task.data == GLYPHS):
        ways = task.episode.num_classes
        seen[task.data, ways] += 1
        if seen[task.data, ways] <= (2 if ways <= 5 else 1):
            kept.append(task)
    return kept


def facts(demo: Demo) -> list[list[str]]:
    """What was trained and tested, where, and how long it took."""
    info, images = demo.info, demo.images
    compiled = [op for op, on in info["ops"].items() if on["cpu"] == "native"]
    native = ", ".join(op for op in compiled if not op.endswith("_backward")) or "none"
    glyphs, held_out, digits = images["training glyphs"], images[GLYPHS], images[DIGITS]
    others = [[k, f"{len(v):,} images"] for k, v in images.items() if k not in (GLYPHS, DIGITS)]
    matching, adapting = demo.curves[MATCHING], demo.curves[ADAPTING]
    return [
        [
            "Training",
            f"{glyphs.num_classes:,} characters in 8 to 21 typefaces each ({len(glyphs):,} "
            "images), no digits; support and queries of different typefaces, each image bent, "
            "turned, reweighted and put out of focus at random",
        ],
        [
            GLYPHS,
            f"{held_out.num_classes} characters, whose base letters do not occur in training; "
            "distorted like the training images",
        ],
        [
            DIGITS,
            f"{len(digits):,} digits by 43 writers (scikit-learn), 8x8 pixels enlarged to the "
            "28x28 that learners and floor see",
        ],
        *others[1:],
        [
            MATCHING,
            f"{demo.parameters[MATCHING]:,} parameters: four convolutions, cosine attention with a "
            f"learned scale; {len(matching.loss)} steps of {matching.ways}-way 1-shot tasks; batch "
            "norm by running statistics in tests: each query by itself",
        ],
        [
            ADAPTING,
            f"{demo.parameters[ADAPTING]:,} parameters and rates: four convolutions and a linear "
            f"layer, which all adapt; second order; {len(adapting.loss)} steps of "
            f"{adapting.ways}-way 1-shot tasks; {TRANSDUCTIVE}",
        ],
        ["Seconds", ", ".join(f"{name} {value:.0f}" for name, value in demo.seconds.items())],
        [
            "Machine",
            f"fastmeta {info['version']}, torch {info['torch']}, {info['platform']}, "
            f"{info['threads']} threads, instruction set {info['isa'] or 'of the reference'}; "
            f"compiled ops: {native}",
        ],
        ["Command", f"fastmeta demo --seed {demo.seed}{' --quick' if demo.quick else ''}"],
    ]


def training_strip(episode: Episode, classes: int = 8) -> str:
    """Some classes of a training task."""
    groups = []
    for label in range(classes):
        images = rows_of(episode, label)
        tags = "".join(f'<img alt="" src="{image_uri(image)}">' for image in images)
        groups.append(f'<span class="strip">{tags}</span>')
    return f"<div>{' '.join(groups)}</div>"


def rows_of(episode: Episode, label: int) -> list[Tensor]:
    """Support and queries of a class of the first task."""
    support = episode.support_x[0][episode.support_y[0] == label]
    return [*support, *episode.query_x[0][episode.query_y[0] == label]]


def task_markup(shown: Shown, rows: int = 3) -> str:
    """A task as a table: a column for each class."""
    episode = shown.episode
    uri = [image_uri(image) for image in episode.support_x[0]]
    ways = len(uri)
    support = "".join(f'<td><img alt="example {i + 1}" src="{uri[i]}"></td>' for i in range(ways))
    body = [f'<tr class="support"><th>support</th>{support}</tr>']
    columns = [(episode.query_y[0] == label).nonzero()[:rows, 0].tolist() for label in range(ways)]
    for row in range(rows):
        cells = "".join(
            _query(shown, column[row], label, uri) for label, column in enumerate(columns)
        )
        head = "<th>queries</th>" if row == 0 else "<th></th>"
        body.append(f"<tr>{head}{cells}</tr>")
    right = ", ".join(
        f"{name} {int((answer == episode.query_y[0]).sum())}"
        for name, answer in shown.answers.items()
    )
    title = f"{shown.data}, {ways}-way 1-shot"
    count = episode.query_y.numel()
    return (
        f'<div class="task"><h3>{escape(title)}</h3>'
        f'<p class="note">right of {count}: {escape(right)}</p>'
        f"<table>{''.join(body)}</table></div>"
    )


def _query(shown: Shown, query: int, label: int, uri: list[str]) -> str:
    marks = []
    for name in (MATCHING, ADAPTING):
        said = int(shown.answers[name][query])
        kind, mark = ("yes", "✓") if said == label else ("no", "✗")
        text = f"{name}: example {said + 1}, {'right' if said == label else 'wrong'}"
        marks.append(
            f'<span class="answer {kind}" title="{text}"><img alt="{text}" src="{uri[said]}">'
            f"<b>{mark}</b></span>"
        )
    image = image_uri(shown.episode.query_x[0, query])
    return f'<td><img alt="query" src="{image}"><div class="answers">{"".join(marks)}</div></td>'


def figure(width: float, height: float) -> Figure:
    """A figure of its own, known to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_bars(axes: Axes, demo: Demo, data: list[str]) -> None:
    """Bars of all learners and the floor, grouped by test set and ways."""
    cells = [cell for cell in demo.cells if cell.data in data]
    width = 0.26
    for place, name in enumerate(NAMES):
        at = [i + (place - 1) * width for i in range(len(cells))]
        intervals = [cell.interval(name) for cell in cells]
        means = [100 * i.mean for i in intervals]
        errors = [100 * i.half for i in intervals]
        axes.bar(at, means, width * 0.94, color=COLOURS[name], label=name, zorder=2)
        axes.errorbar(at, means, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
        for x, mean, error in zip(at, means, errors, strict=True):
            axes.annotate(
                f"{mean:.1f}", (x, mean + error), (0, 3), textcoords="offset points",
                ha="center", fontsize=7.5, color=INK if name != FLOOR else SOFT,
            )  # fmt: skip
    for i, cell in enumerate(cells):
        axes.plot([i - 0.42, i + 0.42], [100 / cell.ways] * 2, "--", color=INK, lw=0.8, zorder=4)
    axes.set_xticks(range(len(cells)), [f"{cell.data}\n{cell.ways}-way 1-shot" for cell in cells])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=LINE, lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def bars(demo: Demo) -> Figure:
    """Accuracy of everything on everything."""
    from matplotlib import rc_context

    with rc_context(LOOK):
        picture = figure(9.2, 3.6)
        axes = picture.add_subplot()
        draw_bars(axes, demo, [cell.data for cell in demo.cells])
        axes.set_ylabel("accuracy, %")
        picture.legend(loc="outside upper left", ncols=3, frameon=False)
        return picture


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last ``window`` values, or as many as there are."""
    series = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    last = torch.arange(1, len(values) + 1)
    first = (last - window).clamp_min(0)
    return ((series[last] - series[first]) / (last - first)).tolist()


def curves(demo: Demo) -> Figure:
    """Accuracy over training steps, a panel for each learner."""
    from matplotlib import rc_context

    with rc_context(LOOK):
        picture = figure(9.2, 3.4)
        panels = picture.subplots(1, 2, sharey=True)
        for axes, (name, curve) in zip(panels, demo.curves.items(), strict=True):
            steps = range(1, len(curve.accuracy) + 1)
            line = [100 * a for a in smooth(curve.accuracy, 20)]
            label = f"training, {curve.ways}-way"
            axes.plot(steps, line, color=COLOURS[name], lw=1.4, label=label)
            for style, (data, looks) in zip("os^", curve.looks.items(), strict=False):
                at, values = zip(*looks, strict=True)
                axes.plot(
                    at, [100 * v for v in values], style + ":", color=INK, ms=4, lw=0.8,
                    mfc=INK if data == DIGITS else "white", label=f"{data}, 5-way",
                )  # fmt: skip
            axes.set_title(f"{name}, {curve.seconds:.0f} s")
            axes.set_xlabel("training step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(0, 100)
            axes.grid(color=LINE, lw=0.6)
            axes.legend(loc="lower right", frameon=False, fontsize=8)
        panels[0].set_ylabel("accuracy, %")
        return picture


def check_picture(path: str | Path) -> Path:
    """The path of a picture, or a ValueError if it is of no kind that can be drawn."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        fail(ValueError, "demo_picture", "path", "a name that ends in .png or .svg", str(path))
    return path


def demo_picture(demo: Demo, path: str | Path) -> Path:
    """One picture of it all, for the top of a README: a training task, a test task, the accuracies.

    Args:
        demo: what `fastmeta.demo.run_demo` found.
        path: file to write, ``.png`` or ``.svg``.
    """
    from matplotlib import rc_context

    path = check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(LOOK):
        picture = figure(10.4, 3.9)
        panels: Any = picture.subfigures(1, 3, width_ratios=[2.9, 4.1, 4.2], wspace=0.04)
        left, middle, right = panels
        _picture_training(left, demo.training)
        shown = next(s for s in demo.shown if s.data == DIGITS)
        _picture_task(middle, shown)
        axes = right.add_subplot()
        draw_bars(axes, demo, [DIGITS])
        axes.set_ylabel("accuracy, %")
        axes.set_title("Handwriting from one example each", fontweight="bold")
        axes.legend(loc="upper right", frameon=False, fontsize=7.5, ncols=3, columnspacing=0.9,
                    handlelength=1, bbox_to_anchor=(1.02, 1.04))  # fmt: skip
        picture.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _picture_training(panel: Figure, episode: Episode, classes: int = 5) -> None:
    """Rows of one character each, distorted."""
    panel.suptitle("Trained on printed glyphs", x=0.02, ha="left", fontsize=10, fontweight="bold")
    grid = panel.subplots(classes, 4)
    for label in range(classes):
        for axes, image in zip(grid[label], rows_of(episode, label), strict=True):
            _picture_image(axes, image, LINE)


def _picture_task(panel: Figure, shown: Shown, rows: int = 3) -> None:
    """Supports on top, queries below, each with a mark for each learner."""
    episode = shown.episode
    ways = len(episode.support_x[0])
    panel.suptitle("One example of each digit, then queries", x=0.02, ha="left", fontsize=10,
                   fontweight="bold")  # fmt: skip
    panel.supxlabel("✓ right  ✗ wrong;  left: Matching Network, right: MAML", x=0.02, ha="left",
                    fontsize=7.5, color=SOFT)  # fmt: skip
    grid = panel.subplots(rows + 1, ways)
    for label in range(ways):
        _picture_image(grid[0, label], episode.support_x[0, label], INK, 1.6)
        queries = (episode.query_y[0] == label).nonzero()[:rows, 0].tolist()
        for axes, query in zip(grid[1:, label], queries, strict=True):
            _picture_image(axes, episode.query_x[0, query], LINE)
            for name, x in ((MATCHING, 0.25), (ADAPTING, 0.75)):
                right = int(shown.answers[name][query]) == label
                axes.text(x, -0.06, "✓" if right else "✗", transform=axes.transAxes, ha="center",
                          va="top", fontsize=9, fontweight="bold",
                          color=RIGHT if right else WRONG)  # fmt: skip


def _picture_image(axes: Axes, image: Tensor, edge: str, width: float = 0.8) -> None:
    axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(visible=True, color=edge, linewidth=width)
