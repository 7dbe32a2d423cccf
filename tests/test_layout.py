"""The folders keep one pattern, so that a reader of one op can read them all."""

import importlib
from pathlib import Path

import pytest

import fastmeta.ops as ops

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FAMILIES = sorted(p.name for p in CSRC.iterdir() if p.is_dir() and p.name != "common")
SUFFIXES = (".h", "_cpu.cpp", "_kernel.cuh", "_cuda.cu", "_torch.cpp")
OPS = sorted(
    name for name in vars(ops) if callable(getattr(ops, name)) and not name.startswith("_")
)


def test_something_is_looked_at():
    assert {"matching", "segment", "update"} <= set(FAMILIES)
    assert {"matching_attention", "matching_nll", "segment_mean", "sgd_update"} <= set(OPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_files(family):
    names = {p.name for p in (CSRC / family).iterdir()}
    bridged = {n.removesuffix("_torch.cpp") for n in names if n.endswith("_torch.cpp")}
    assert bridged, f"csrc/{family} has no bridge to torch"
    functions = importlib.import_module(f"fastmeta.ops.{family}").__all__
    for op in bridged:
        # A family that runs its reference on CUDA keeps its bridge out of that build, and says so.
        on_cuda = "!defined(FASTMETA_CUDA)" not in (CSRC / family / f"{op}_torch.cpp").read_text()
        wanted = SUFFIXES if on_cuda else [s for s in SUFFIXES if not s.endswith((".cu", ".cuh"))]
        missing = [op + suffix for suffix in wanted if op + suffix not in names]
        assert not missing, f"csrc/{family} lacks {missing}"
        assert op in functions, f"csrc/{family}/{op}_torch.cpp belongs to no function"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_tests_and_a_benchmark(op):
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    family = getattr(ops, op).__module__.rsplit(".", 1)[1]
    benchmarks = {op, family}
    assert any((ROOT / "benchmarks" / f"{name}.py").exists() for name in benchmarks)


def test_kernels_are_free_of_torch():
    kernels = [p for p in CSRC.rglob("*") if p.name.endswith(("_cpu.cpp", ".cu", ".cuh"))]
    assert kernels
    wrong = [str(p.relative_to(ROOT)) for p in kernels if "torch/" in p.read_text()]
    assert not wrong
