"""Launches of the emulated kernels against the limits of every architecture and the stated design."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from cuda_emulation.cases import DTYPES, SIMILARITIES, Case
from cuda_emulation.test_segment_mean import make, run_backward, run_mean
from cuda_emulation.test_task_batch_norm import make as make_norm
from cuda_emulation.test_task_batch_norm import run as run_norm
from cuda_emulation.test_task_conv2d import CASES as CONVOLUTIONS
from cuda_emulation.test_task_conv2d import make as make_conv2d
from cuda_emulation.test_task_conv2d import run as run_conv2d
from cuda_emulation.test_task_linear import make as make_linear
from cuda_emulation.test_task_linear import run as run_linear
from cuda_emulation.updates import LAYOUTS, OPS, Entry, run_forward
from cuda_emulation.updates import run_backward as run_update_backward

SPEC = importlib.util.spec_from_file_location(
    "cuda_report", Path(__file__).resolve().parents[2] / "tools" / "cuda_report.py"
)
report = importlib.util.module_from_spec(SPEC)
sys.modules["cuda_report"] = report
SPEC.loader.exec_module(report)


def segment_mean(emulation, dtype):
    values, labels = make(2, 7, 3, 8, DTYPES[dtype])
    mean, count = run_mean(emulation, values, labels, 3, dtype)
    run_backward(emulation, mean, labels, count, dtype)


def update(op):
    def run(emulation, dtype):
        entries = [Entry(op, 2, 9000, lr, DTYPES[dtype], 1) for lr in LAYOUTS]
        run_forward(emulation, entries)
        run_update_backward(emulation, entries)

    return run


def task_linear(emulation, dtype):
    run_linear(emulation, dtype, *make_linear(2, 5, 600, 9, DTYPES[dtype]))


def task_conv2d(emulation, dtype):
    case = CONVOLUTIONS["groups"]
    run_conv2d(emulation, dtype, case, make_conv2d(case, DTYPES[dtype]))


def task_batch_norm(emulation, dtype):
    run_norm(emulation, dtype, make_norm(2, 3, 2, 5, DTYPES[dtype]))


def matching(similarity):
    def run(emulation, dtype):
        case = Case(1, 70, 67, 3, 260, similarity, DTYPES[dtype])
        case.run(emulation, nll=False)
        case.run_second(emulation, nll=False, dots=case.directions())

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("run", "similarity"),
    [
        pytest.param(segment_mean, "", id="segment_mean"),
        *(pytest.param(update(op), "", id=f"{op}_update") for op in OPS),
        pytest.param(task_linear, "", id="task_linear"),
        pytest.param(task_conv2d, "", id="task_conv2d"),
        pytest.param(task_batch_norm, "", id="task_batch_norm"),
        *(pytest.param(matching(name), name, id=name) for name in SIMILARITIES),
    ],
)
def test_launches_fit_every_architecture(emulation, run, similarity, dtype):
    run(emulation, dtype)
    # On tensor cores, which the oldest architecture has not for these types.
    tensor = DTYPES[dtype].itemsize == 2 and similarity in ("dot", "cosine")
    launches = emulation.launches()
    assert launches
    for launch in launches:
        shared = launch.shared_bytes + launch.static_shared_bytes
        assert launch.block <= report.MAX_THREADS
        assert launch.grid <= report.MAX_GRID
        for arch, limits in report.LIMITS.items():
            if tensor and arch < report.TENSOR_CORES:
                continue
            assert shared + limits.shared_system <= limits.shared, (launch.what, arch)
            assert shared <= limits.shared_block, (launch.what, arch)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_report_counts_with_the_shared_memory_that_is_launched(emulation, similarity, dtype):
    segment_mean(emulation, dtype)
    for op in OPS:
        update(op)(emulation, dtype)
    task_linear(emulation, dtype)
    task_conv2d(emulation, dtype)
    task_batch_norm(emulation, dtype)
    case = Case(1, 2, 3, 2, 4, similarity, DTYPES[dtype])
    case.run(emulation, nll=False)
    case.run_second(emulation, nll=False, dots=case.directions())
    tensor = dtype == "bfloat16" and similarity in ("dot", "cosine")
    for launch in emulation.launches():
        stated = [d for d in report.DESIGN if d.launch == launch.what]
        kinds = [d for d in stated if d.double == (dtype == "float64") and d.tensor == tensor]
        design = (kinds or [d for d in stated if not d.double and not d.tensor])[0]
        assert (launch.block, launch.shared_bytes) == (design.threads, design.shared), launch.what
