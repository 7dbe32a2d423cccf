"""The command line: what it prints, and how it fails."""

import json
import subprocess
import sys

import pytest

import fastmeta as fm
from fastmeta.cli import main


def test_info_prints_the_state_of_every_op(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for op, on in fm.backend_info()["ops"].items():
        assert any(line.split()[:2] == [op, on["cpu"]] for line in text.splitlines())


def test_info_as_json_is_backend_info(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fm.backend_info()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastmeta {fm.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_exit_with_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fastmeta" in capsys.readouterr().err


def test_help_lists_the_commands():
    # In a process of its own, as the console script runs.
    done = subprocess.run(
        [sys.executable, "-m", "fastmeta.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "info" in done.stdout


def test_a_report_that_cannot_be_written_is_told_before_training(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert f"cannot write {tmp_path}" in capsys.readouterr().err
