"""Processes that have imported torch, and not yet fastmeta: forks of one that did so once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from subprocess import CompletedProcess


def run(code: str, folder: Path, environment: dict[str, str]) -> CompletedProcess[str]:
    """Run ``code`` where ``import fastmeta`` finds the one in ``folder``.

    ``environment`` is what there is of variables ``FASTMETA_*``. Every RuntimeWarning is shown.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as scratch:
        process = context.Process(target=_child, args=(code, folder, environment, Path(scratch)))
        process.start()
        process.join()
        out, err = (Path(scratch, name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode is not None
    return CompletedProcess(code, process.exitcode, out, err)


def _child(code: str, folder: Path, environment: dict[str, str], scratch: Path) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT), descriptor)
    for name in [name for name in os.environ if name.startswith("FASTMETA_")]:
        del os.environ[name]
    os.environ.update(environment)
    assert "fastmeta" not in sys.modules
    sys.path.insert(0, str(folder))
    warnings.simplefilter("always", RuntimeWarning)
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
