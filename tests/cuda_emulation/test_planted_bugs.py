"""The net itself: every planted bug must be caught, and the same kernels without it must pass."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent / "planted_bugs.cpp"


def run(program: Path, bug: str, seed: int | str = 0) -> subprocess.CompletedProcess[str]:
    # Names of functions in a report are what takes ThreadSanitizer a second.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:symbolize=0:atexit_sleep_ms=0"}
    command = [str(program), bug, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def plain(compile_program) -> Path:
    return compile_program(SOURCE)


@pytest.fixture(scope="module")
def sanitized(compile_program) -> Path:
    return compile_program(SOURCE, sanitize="address")


@pytest.fixture(scope="module")
def race_detector(compile_program) -> Path:
    return compile_program(SOURCE, sanitize="thread")


@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        ("divergent barrier", "barriers in divergent code"),
        ("lane outside mask", "not in its own mask"),
        ("partner outside mask", "outside the mask"),
        ("lost lanes", "is in the mask but has returned"),
        ("returned", "returned"),
        ("large block", "invalid block size"),
    ],
)
def test_the_emulator_complains(plain, bug, complaint):
    done = run(plain, bug)
    assert done.returncode == 1
    assert complaint in done.stderr


@pytest.mark.parametrize("bug", ["missing barrier", "unwritten shared", "unwritten output"])
def test_what_was_not_written_is_seen(plain, bug):
    assert "nan" in run(plain, bug).stdout


def test_thread_orders_tell_a_race_from_a_sum(plain):
    assert len({run(plain, "race", seed).stdout for seed in range(8)}) > 1
    assert len({run(plain, "no race", seed).stdout for seed in range(8)}) == 1


@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        ("overrun shared", "AddressSanitizer"),
        ("overrun output", "AddressSanitizer"),
        ("misaligned pack", "misaligned address"),
    ],
)
def test_the_sanitizers_complain(sanitized, bug, complaint):
    done = run(sanitized, bug)
    assert done.returncode != 0
    assert complaint in done.stderr


@pytest.mark.parametrize("order", [0, 1, 2, "forward", "reverse"])
@pytest.mark.parametrize("bug", ["missing barrier", "race", "missing warp barrier", "two owners"])
def test_races_are_seen_in_every_order(race_detector, bug, order):
    done = run(race_detector, bug, order)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


def test_without_a_bug_all_are_silent(plain, sanitized, race_detector):
    for program in (plain, sanitized, race_detector):
        for bug in ("none", "no race", "warp barrier", "one owner"):
            done = run(program, bug)
            assert done.returncode == 0, done.stderr
            assert "nan" not in done.stdout
            assert done.stderr == ""
