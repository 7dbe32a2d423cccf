"""Loading of the compiled kernels: each case in a process of its own, as loading happens once."""

import json
import shutil
from pathlib import Path

import fresh
import pytest
from opcases import compiled_ops

import fastmeta

PACKAGE = Path(fastmeta.__file__).parent
CLASSIFY = """
query = torch.tensor([[1.0, 0.0]])
support = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
print(fm.matching_attention(query, support, torch.tensor([1, 0]), 2, output="probs").tolist())
"""
INFO = "print(json.dumps(fm.backend_info()))"


def run(code, *, folder=PACKAGE.parent, **env):
    """Runs ``code`` after the imports, with ``fastmeta`` from ``folder``."""
    return fresh.run(f"import json, torch\nimport fastmeta as fm\n{code}", folder, env)


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory):
    """A copy of the package that lacks the compiled modules."""
    folder = tmp_path_factory.mktemp("pure")
    ignore = shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fastmeta", ignore=ignore)
    return folder


def test_without_the_extension_one_warning_and_everything_works(without_extension):
    done = run(
        CLASSIFY + "import fastmeta.ops, fastmeta.info" + "\n" + INFO, folder=without_extension
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "fastmeta runs on its pure-PyTorch reference" in done.stderr
    probabilities, info = (json.loads(line) for line in done.stdout.splitlines())
    # cos = 1, 0: softmax of (1, 0) over labels (1, 0)
    assert probabilities[0] == pytest.approx([1 / (1 + 2.718281828459045), 0.7310585786300049])
    assert info["native"] is False
    assert "not built" in info["native_reason"]
    assert {on["cpu"] for on in info["ops"].values()} == {"reference"}


def test_native_makes_absence_an_error(without_extension):
    done = run(CLASSIFY, folder=without_extension, FASTMETA_BACKEND="native")
    assert done.returncode != 0
    assert (
        "ImportError: FASTMETA_BACKEND=native, but the compiled kernels are absent" in done.stderr
    )


def test_a_broken_extension_is_named(without_extension, tmp_path):
    shutil.copytree(without_extension / "fastmeta", tmp_path / "fastmeta")
    (tmp_path / "fastmeta" / "_C.so").write_bytes(b"not a shared library")
    done = run(INFO, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "did not load" in json.loads(done.stdout)["native_reason"]
    assert done.stderr.count("RuntimeWarning") == 1


def test_reference_is_silent_and_loads_nothing():
    # torch._dynamo takes as long to import as torch.
    imported = "import sys; assert 'torch._dynamo' not in sys.modules\n"
    done = run(imported + INFO, FASTMETA_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    info = json.loads(done.stdout)
    assert (info["backend"], info["native"], info["isa"]) == ("reference", False, None)
    assert {on["cpu"] for on in info["ops"].values()} == {"reference"}


def test_a_wrong_backend_is_an_error():
    done = run(INFO, FASTMETA_BACKEND="fastest")
    assert done.returncode != 0
    assert (
        "FASTMETA_BACKEND must be one of 'auto', 'native', 'reference', got 'fastest'"
        in done.stderr
    )


@pytest.fixture
def built():
    info = fastmeta.backend_info()
    if not info["native"]:
        pytest.skip("runs where the extension is built")
    return info


def test_all_kernels_are_loaded(built):
    done = run(INFO, FASTMETA_BACKEND="native")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    native = {op for op, on in info["ops"].items() if on["cpu"] == "native"}
    assert native == compiled_ops()
    assert info["build"]["native"] is True
    assert info["build"]["torch_target"] == "2.11"
    # Intel's dot products of AVX512-BF16 are no faster than two FMA, and are taken on demand.
    best = info["isas"][-1]
    assert info["isa"] == best or (info["isa"], best) == ("avx512", "avx512_bf16")


def test_the_instruction_set_is_overridden_downwards(built):
    for isa in built["isas"]:
        done = run(INFO, FASTMETA_BACKEND="native", FASTMETA_CPU_ISA=isa)
        info = json.loads(done.stdout)
        assert info["isa"] == isa
        assert info["isa_reason"] == f"FASTMETA_CPU_ISA={isa}"


def test_the_instruction_set_never_goes_above_the_machine(built):
    names = ["baseline", "avx2", "avx512", "avx512_bf16"]
    done = run(INFO, FASTMETA_BACKEND="native", FASTMETA_CPU_ISA=names[-1])
    assert json.loads(done.stdout)["isa"] == built["isas"][-1]
    for above in names[len(built["isas"]) :]:
        with pytest.raises(ValueError, match="cannot run"):
            fastmeta._native.cpu_module.set_isa(above)


def test_a_wrong_instruction_set_is_an_error(built):
    done = run(INFO, FASTMETA_BACKEND="native", FASTMETA_CPU_ISA="avx1024")
    assert done.returncode != 0
    wanted = "FASTMETA_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got 'avx1024'"
    assert wanted in done.stderr
