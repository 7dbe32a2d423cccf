"""The net itself: every planted bug must be caught, and the same kernels without it must pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent / "planted_bugs.cpp"


def run(program: Path, bug: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), bug, str(seed)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain(compile_program) -> Path:
    return compile_program(SOURCE)


@pytest.fixture(scope="module")
def sanitized(compile_program) -> Path:
    return compile_program(SOURCE, sanitize="address")


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


def test_without_a_bug_all_are_silent(plain, sanitized):
    for program in (plain, sanitized):
        for bug in ("none", "no race"):
            done = run(program, bug)
            assert done.returncode == 0, done.stderr
            assert "nan" not in done.stdout
            assert done.stderr == ""
