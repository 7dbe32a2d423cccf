"""A demo in small: its numbers hang together, nothing leaks, and the report stands alone."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmeta import cli, demo, demo_report
from fastmeta.data import EpisodeSampler, digits, glyphs
from fastmeta.demo import ADAPTING, DIGITS, FLOOR, GLYPHS, MATCHING, NAMES, format_table, run_demo


@pytest.fixture(scope="module")
def result():
    patch = pytest.MonkeyPatch()
    patch.delenv("FASTMETA_DATA", raising=False)
    threads = torch.get_num_threads()
    yield run_demo(seed=3, quick=True, quiet=True)
    torch.set_num_threads(threads)
    patch.undo()


def percent(values):
    """Mean and 95% interval as the table prints them, from the definition in numpy."""
    values = np.asarray(values, np.float64)
    half = 1.96 * np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))
    return f"{100 * values.mean():.1f} ± {100 * half:.1f}"


def test_every_cell_has_every_column_over_all_tasks(result):
    assert [(c.data, c.ways) for c in result.cells] == [
        (GLYPHS, 5), (GLYPHS, 10), (DIGITS, 5), (DIGITS, 10),
    ]  # fmt: skip
    for cell in result.cells:
        assert list(cell.accuracy) == list(NAMES)
        for accuracy in cell.accuracy.values():
            assert accuracy.shape == (result.sizes.test_tasks,)
            # Queries are 5 of each class, so accuracies are whole multiples of 1 / (5 ways).
            right = accuracy.double() * 5 * cell.ways
            torch.testing.assert_close(right, right.round(), atol=1e-4, rtol=0)


def test_table_shows_the_accuracies(result):
    lines = format_table(result).splitlines()[2:-1]
    assert len(lines) == len(result.cells)
    for line, cell in zip(lines, result.cells, strict=True):
        assert line.startswith(f"{cell.data}, {cell.ways}-way ")
        wanted = [percent(cell.accuracy[name]) for name in NAMES]
        gains = [cell.accuracy[name] - cell.accuracy[FLOOR] for name in (MATCHING, ADAPTING)]
        wanted += [percent(gain.double()) for gain in gains]
        assert [g.lstrip("+") for g in re.findall(r"[+-]?[\d.]+ ± [\d.]+", line)] == wanted


def test_floor_is_nearest_pixels_of_the_digits_in_numpy(result):
    sampler = EpisodeSampler(
        digits(), ways=5, shots=1, queries=5, tasks=25, batches=1, seed=3 + 2**63
    )
    sx, sy, qx, qy = (x.numpy() for x in sampler[0])
    for task in range(25):
        s = sx[task].reshape(5, -1).astype(np.float64)
        q = qx[task].reshape(25, -1).astype(np.float64)
        cosine = (q / np.linalg.norm(q, axis=1)[:, None]) @ (
            s / np.linalg.norm(s, axis=1)[:, None]
        ).T
        right = (sy[task][cosine.argmax(1)] == qy[task]).mean()
        assert float(result.cells[2].accuracy[FLOOR][task]) == pytest.approx(right)


def test_shown_tasks_are_the_first_counted_ones(result):
    cells = {(cell.data, cell.ways): cell for cell in result.cells}
    seen = dict.fromkeys(cells, 0)
    for shown in result.shown:
        kind = (shown.data, shown.episode.support_x.shape[1])
        for name in NAMES:
            right = (shown.answers[name] == shown.episode.query_y[0]).float().mean()
            assert right == pytest.approx(float(cells[kind].accuracy[name][seen[kind]]), abs=1e-6)
        seen[kind] += 1
    assert set(seen.values()) == {2}


def test_nothing_of_the_test_sets_is_trained_on(result):
    train, held_out = result.images["training glyphs"], result.images[GLYPHS]
    assert not set(train.groups.tolist()) & set(held_out.groups.tolist())
    characters = {name[0] for name in train.classes + held_out.classes}
    assert not characters & set("0123456789")
    assert train.classes == glyphs("train").classes


def test_learning_changes_every_learner(result):
    for name, curve in result.curves.items():
        assert len(curve.loss) == len(curve.accuracy) == 4
        assert all(np.isfinite(curve.loss))
        assert {step for looks in curve.looks.values() for step, _ in looks} == {0, 4}
        assert result.parameters[name] > 10_000
    assert (
        result.seconds["total"] >= sum(v for k, v in result.seconds.items() if k != "total") - 0.1
    )


def test_same_seed_same_numbers_and_time_ends_training(monkeypatch):
    tiny = demo.Sizes(matching_steps=3, maml_steps=3, test_tasks=25, points=1, look_tasks=25)
    monkeypatch.setattr(demo, "QUICK", tiny)
    monkeypatch.setattr(demo, "WAYS", (5,))
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    one, two = (run_demo(seed=5, quick=True, quiet=True, seconds=1e-6) for _ in range(2))
    for name in (MATCHING, ADAPTING):
        assert len(one.curves[name].loss) == 1  # the first step is always made
        assert one.curves[name].loss == pytest.approx(two.curves[name].loss, rel=1e-4)
        for a, b in zip(one.cells, two.cells, strict=True):
            torch.testing.assert_close(a.accuracy[name], b.accuracy[name], atol=0.05, rtol=0)
            torch.testing.assert_close(a.accuracy[FLOOR], b.accuracy[FLOOR], atol=0, rtol=0)


class Sources(HTMLParser):
    """All addresses that a page refers to, and its elements."""

    def __init__(self):
        super().__init__()
        self.addresses, self.elements = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset")]


def test_report_stands_alone_and_shows_the_table(result, tmp_path):
    path = demo_report.demo_page(result).write(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Sources()
    page.feed(text)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.elements)
    assert "url(" not in text
    assert "@import" not in text
    for cell in result.cells:
        for name in NAMES:
            assert f"<td>{percent(cell.accuracy[name])}</td>" in text
    # Three queries of each class shown, two answers for each.
    kept = demo_report.in_order(result.shown)
    shown = sum(6 * s.episode.support_x.shape[1] for s in kept)
    assert len(re.findall(r'class="answer (?:yes|no)"', text)) == shown


def test_marks_of_a_task_say_what_was_answered(result):
    shown = result.shown[-1]
    ways, target = shown.episode.support_x.shape[1], shown.episode.query_y[0]
    perfect = SimpleNamespace(
        data="x", episode=shown.episode, answers={n: target.clone() for n in NAMES}
    )
    markup = demo_report.task_markup(perfect)
    assert markup.count('class="answer yes"') == 6 * ways
    assert 'class="answer no"' not in markup
    perfect.answers[ADAPTING] = (target + 1) % ways
    markup = demo_report.task_markup(perfect)
    assert markup.count('class="answer no"') == 3 * ways
    assert f"{ADAPTING} 0, {FLOOR} {len(target)}" in markup


def test_handwriting_comes_first_and_of_wide_tasks_one(result):
    kinds = [(s.data, s.episode.support_x.shape[1]) for s in demo_report.in_order(result.shown)]
    assert kinds == [
        (DIGITS, 5), (DIGITS, 5), (DIGITS, 10), (GLYPHS, 5), (GLYPHS, 5), (GLYPHS, 10),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_picture(result, tmp_path, name, magic):
    path = demo_report.demo_picture(result, tmp_path / name)
    data = path.read_bytes()
    assert data.startswith(magic)
    assert len(data) < 300_000


def test_command_writes_and_prints(result, tmp_path, monkeypatch, capsys):
    asked = {}

    def instead(**options):
        asked.update(options)
        return result

    monkeypatch.setattr(demo, "run_demo", instead)
    out, picture = tmp_path / "r.html", tmp_path / "p.png"
    words = [
        "demo",
        "--seed",
        "3",
        "--quick",
        "--quiet",
        "--out",
        str(out),
        "--picture",
        str(picture),
    ]
    assert cli.main(words) == 0
    assert asked == {"seed": 3, "seconds": 150, "quick": True, "threads": None, "quiet": True}
    assert format_table(result) in capsys.readouterr().out
    assert out.stat().st_size > 10_000
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picture", "x.gif"], r"path must be a name that ends in .png or .svg, got x.gif"),
        (["--seconds", "0"], r"seconds must be positive, got 0.0"),
        (["--threads", "0"], r"threads must be at least 1, got 0"),
        (["--seed", "-1"], r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_command_refuses_before_it_trains(words, message, capsys):
    assert cli.main(["demo", *words]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_mnist_joins_where_its_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMETA_DATA", str(tmp_path))
    assert list(demo._test_sets()) == [GLYPHS, DIGITS]
    # Two MNIST files of one image each.
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        b"\0\0\x08\x03" + np.array([1, 28, 28], ">i4").tobytes() + bytes(784)
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01" + np.array([1], ">i4").tobytes() + b"\7"
    )
    assert list(demo._test_sets()) == [GLYPHS, DIGITS, demo.MNIST]
