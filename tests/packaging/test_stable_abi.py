"""The compiled module takes from torch only what its stable ABI promises to later releases."""

import re
import shutil
import subprocess

import pytest

from fastmeta import _native


def undefined(path):
    """C++ names that the library wants from others, demangled."""
    nm = shutil.which("nm")
    assert nm, "this test needs nm: apt-get install binutils"
    done = subprocess.run([nm, "-D", "-C", "-u", path], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]


def test_no_symbol_of_torch_outside_its_stable_abi():
    modules = [m for m in (_native.cpu_module, _native.cuda_module) if m is not None]
    if not modules:
        pytest.skip("no compiled module is loaded")
    for module in modules:
        names = undefined(module.__file__)
        assert any(n.startswith(("aoti_torch_", "torch_")) for n in names)
        assert [n for n in names if re.search(r"\b(at|c10|caffe2|torch)::", n)] == []
