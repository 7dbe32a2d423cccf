"""What every test starts from: the backend asserted and named, seeds, threads, no unseen skip."""

import os
import random
from collections import Counter

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("fastmeta", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fastmeta")

WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1" if WORKER else "2"))


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail when any test was skipped")


def pytest_configure(config):
    """Under FASTMETA_BACKEND=native every op with a kernel in csrc must have it, or no test runs."""
    torch.set_num_threads(THREADS)
    try:
        from opcases import compiled_ops

        import fastmeta as fm
    except ImportError as error:
        raise pytest.UsageError(str(error)) from error
    info = fm.backend_info()
    native = {op for op, on in info["ops"].items() if on["cpu"] == "native"}
    missing = sorted(compiled_ops() - native)
    if info["backend"] == "native" and missing:
        raise pytest.UsageError(f"FASTMETA_BACKEND=native, but no CPU kernel for {missing}")


def pytest_report_header(config):
    import fastmeta as fm
    from fastmeta.info import format_info

    return [f"fastmeta from {os.path.dirname(fm.__file__)}", *format_info().splitlines()]


@pytest.fixture(autouse=True)
def _same_start():
    """Seeds, thread count and default dtype, whatever the test before left behind."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy state is what a test may draw from by accident
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)


def _skips(config):
    """Skipped tests by reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return Counter()
    return Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in reporter.stats.get("skipped", [])
    )


def pytest_sessionfinish(session):
    if session.config.getoption("--no-skips") and _skips(session.config) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    skips = _skips(config)
    if skips:
        verdict = "not allowed here" if config.getoption("--no-skips") else "allowed"
        terminalreporter.section(f"{sum(skips.values())} skipped ({verdict})")
        for reason, count in skips.most_common():
            terminalreporter.write_line(f"{count:5}  {reason}")
