"""Intervals against their definition, and progress that can be read."""

import builtins
import math

import numpy as np
import pytest
import torch

from fastmeta.train import Progress, mean_interval


def test_interval_against_numpy():
    values = np.random.default_rng(0).random(37)
    interval = mean_interval(torch.from_numpy(values).float())
    assert interval.mean == pytest.approx(values.mean(), rel=1e-6)
    assert interval.half == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(37), rel=1e-5)
    assert interval.n == 37


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(400):
        interval = mean_interval(torch.randn(50, generator=generator))
        hits += abs(interval.mean) <= interval.half
    # 95% of 400 is 380, give or take 3 standard deviations of 4.4.
    assert 366 <= hits <= 394


def test_interval_of_one_value_is_infinite():
    assert mean_interval(torch.tensor([0.5])) == (0.5, math.inf, 1)


def test_interval_as_text():
    interval = mean_interval(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert str(interval) == "25.0 ± 49.0"
    assert interval.signed() == "+25.0 ± 49.0"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.zeros(0), ValueError, r"values must be of shape \[n\] with n at least 1"),
        (torch.zeros(2, 2), ValueError, r"got shape \[2, 2\]"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "got int64 tensor"),
        ([0.5], TypeError, "got list"),
    ],
)
def test_interval_refuses(values, error, message):
    with pytest.raises(error, match=message):
        mean_interval(values)


def without_tqdm(monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_progress_without_tqdm_writes_a_line_for_each_tenth(monkeypatch, capsys):
    without_tqdm(monkeypatch)
    with Progress("work", 25) as bar:
        for step in range(25):
            bar.step(f"note {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("work ") for line in lines)
    assert lines[-1].startswith("work 100% after ")
    assert lines[-1].endswith("note 24")


def test_progress_with_tqdm_shows_label_and_note(capsys):
    pytest.importorskip("tqdm")
    with Progress("work", 2) as bar:
        bar.step()
        bar.step("the note")
    text = capsys.readouterr().err
    assert "work 100%" in text
    assert "the note" in text


def test_quiet_progress_says_nothing(capsys):
    with Progress("work", 1, quiet=True) as bar:
        bar.step("note")
    assert capsys.readouterr() == ("", "")
