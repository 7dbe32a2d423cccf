"""The emulated tests once more, every kernel under the sanitizers and in several thread orders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OPS = (
    "segment_mean",
    "updates",
    "matching_attention",
    "matching_double_backward",
    "task_linear",
    "task_conv2d",
    "task_batch_norm",
)
# What each sanitizer needs in front of an interpreter that is not built with it. libstdc++ is there
# so that exceptions are seen; leaks and races outside of the kernels are the interpreter's own.
SANITIZERS = {
    "address": (["libasan.so", "libstdc++.so.6"], {"ASAN_OPTIONS": "detect_leaks=0"}),
    "thread": (
        ["libtsan.so"],
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"},
    ),
}


def run(sanitizer: str, seed: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the emulated ops in an interpreter with the sanitizer in front."""
    compiler = os.environ.get("CXX", "g++").split()
    names, options = SANITIZERS[sanitizer]
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    environment = {
        **os.environ,
        **options,
        "FASTMETA_EMULATION_SANITIZE": sanitizer,
        "FASTMETA_EMULATION_SEED": str(seed),
        "LD_PRELOAD": " ".join(libraries),
        "OMP_NUM_THREADS": "1",
    }
    files = [str(HERE / f"test_{op}.py") for op in OPS]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1000, 2000])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_are_clean_under_the_sanitizers(sanitizer, seed):
    done = run(sanitizer, seed)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
