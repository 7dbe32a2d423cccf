"""The bridges' CUDA side compiles, also where no CUDA build of torch is: their calls match the launchers'."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
BRIDGES = sorted((ROOT / "csrc").glob("*/*_torch.cpp"))


def compile_(*arguments):
    """Runs the compiler as for the CUDA side of a bridge."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    defines = ["-DUSE_CUDA", "-DFASTMETA_CUDA", "-DFASTMETA_X86"]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
    flags = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Werror", target, *defines, *includes]
    done = subprocess.run(
        [compiler, *flags, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]


@pytest.fixture(scope="module")
def torch_headers(tmp_path_factory):
    """A header before all others that is parsed already: torch's take seconds, and every bridge."""
    header = tmp_path_factory.mktemp("parsed") / "torch_headers.h"
    header.write_text('#include "common/torch_bridge.h"\n')
    compile_("-x", "c++-header", header, "-o", f"{header}.gch")
    return header


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda path: path.stem)
def test_cuda_bridge_compiles(bridge, torch_headers):
    compile_("-fsyntax-only", "-include", torch_headers, bridge)


def test_what_the_bridge_asks_about_tf32_follows_torch():
    import fastmeta.ops  # noqa: F401 - defines the op

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert torch.ops.fastmeta.allow_tf32() is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_every_family_has_a_bridge():
    assert {"matching", "segment", "update"} <= {path.parent.name for path in BRIDGES}
