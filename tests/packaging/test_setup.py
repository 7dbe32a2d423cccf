"""``setup.py``: what it decides from the environment, what it refuses, and what it packs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("fastmeta_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clean(monkeypatch):
    """The environment without the switches of the build."""
    for name in ("FASTMETA_NATIVE", "FASTMETA_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def script(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit to be found: an nvcc of release 13.0 for three architectures, and a header."""
    home = tmp_path / "cuda"
    answer = 'case "$1" in --version) echo "release 13.0, V13.0.88";; *) printf "%s";; esac'
    script(home / "bin", "nvcc", answer % "compute_75\\ncompute_90\\ncompute_120\\n")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def test_switches_are_checked(setup, clean):
    clean.setenv("FASTMETA_CUDA", "AUTO")
    assert setup.switch("FASTMETA_CUDA", "auto", ("auto", "0", "1")) == "auto"
    clean.setenv("FASTMETA_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTMETA_CUDA must be one of auto, 0, 1, got 'yes'"):
        setup.switch("FASTMETA_CUDA", "auto", ("auto", "0", "1"))


def test_a_named_compiler_that_is_absent_is_no_reason_to_take_another(setup, clean):
    clean.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(SystemExit, match="CXX=/nonexistent/g\\+\\+") as refused:
        setup.find_compiler()
    assert "FASTMETA_NATIVE=0 pip install" in str(refused.value)


def test_no_compiler_says_how_to_get_one_or_go_on_without(setup, clean, tmp_path):
    clean.setenv("PATH", str(tmp_path))
    clean.setattr(sysconfig, "get_config_var", lambda _: None)
    with pytest.raises(SystemExit) as refused:
        setup.find_compiler()
    assert "apt-get install g++" in str(refused.value)
    assert "FASTMETA_NATIVE=0 pip install" in str(refused.value)


def test_an_old_compiler_is_named(setup, clean, tmp_path):
    old = script(tmp_path, "g++-4", 'echo "unrecognized option -std=c++20" >&2; exit 1')
    clean.setenv("CXX", str(old))
    with pytest.raises(SystemExit, match="does not compile C\\+\\+20") as refused:
        setup.find_compiler()
    assert "unrecognized option" in str(refused.value)


def test_missing_python_headers_are_named(setup, clean, tmp_path):
    clean.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit, match="apt-get install python3-dev"):
        setup.find_compiler()


@pytest.mark.parametrize(
    ("cuda", "home", "wrong"),
    [
        (None, None, "torch .* has no CUDA"),
        ("13.0", "/nonexistent", "no CUDA toolkit at CUDA_HOME=/nonexistent"),
        ("12.8", None, "is 13.0, torch's CUDA 12.8"),
    ],
)
def test_cuda_that_cannot_be_is_refused_when_asked_for(setup, clean, toolkit, cuda, home, wrong):
    clean.setattr(torch.version, "cuda", cuda)
    clean.setenv("CUDA_HOME", home or str(toolkit))
    found, why = setup.cuda_decision()
    assert found is None
    assert re.search(wrong, why)
    clean.setenv("FASTMETA_CUDA", "1")
    with pytest.raises(SystemExit, match=wrong) as refused:
        setup.cuda_decision()
    assert "FASTMETA_CUDA=0" in str(refused.value)


def test_cuda_is_built_where_it_can_be_and_wanted(setup, clean, toolkit):
    clean.setattr(torch.version, "cuda", "13.2")
    clean.setenv("CUDA_HOME", str(toolkit))
    assert setup.cuda_decision()[0] == toolkit
    clean.setenv("FASTMETA_CUDA", "0")
    assert setup.cuda_decision() == (None, "FASTMETA_CUDA=0")


def test_the_toolkit_is_found_beside_its_nvcc(setup, clean, toolkit, tmp_path):
    clean.delenv("CUDA_PATH", raising=False)
    links = tmp_path / "links"
    links.mkdir()
    (links / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    clean.setenv("PATH", f"{links}{os.pathsep}{os.environ['PATH']}")
    assert setup.find_cuda() == toolkit


def test_architectures(setup, clean, toolkit):
    assert setup.arch_list(toolkit) == "8.0;9.0+PTX"  # no GPU visible
    clean.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0+PTX")
    assert setup.arch_list(toolkit) == "7.5 9.0+PTX"
    clean.setenv("TORCH_CUDA_ARCH_LIST", "7.0;9.0")
    with pytest.raises(SystemExit, match=r"names 7\.0, .* can compile for 7\.5 9\.0 12\.0"):
        setup.arch_list(toolkit)


@pytest.mark.parametrize(
    ("visible", "expected"), [([(9, 0), (7, 5)], "7.5;9.0"), ([(13, 0)], "12.0+PTX")]
)
def test_architectures_of_the_visible_gpus(setup, clean, toolkit, visible, expected):
    clean.setattr(torch.cuda, "is_available", lambda: True)
    clean.setattr(torch.cuda, "device_count", lambda: len(visible))
    clean.setattr(torch.cuda, "get_device_capability", lambda i: visible[i])
    assert setup.arch_list(toolkit) == expected


def test_one_front_end_pass_serves_several_architectures(setup):
    assert setup.gencode_flags("7.5 8.0;9.0;12.0+PTX") == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_90]",
        "-gencode=arch=compute_100,code=[sm_120,compute_100]",
    ]
    assert setup.gencode_flags("Ampere;9.0") == []  # names are torch's to read


def test_the_cuda_report_compiles_as_the_build_does(setup):
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    report = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = report  # for its dataclasses
    spec.loader.exec_module(report)
    archs = ";".join(f"{a // 10}.{a % 10}" for a in report.ARCHITECTURES)
    assert setup.gencode_flags(archs) == report.gencode_flags()


def test_kernels_are_compiled_with_the_jobs_and_flags_asked_for(setup, clean, tmp_path):
    log = tmp_path / "ninja.log"
    script(tmp_path, "ninja", f'echo "$@" > {log}')
    clean.setattr(setup, "find_ninja", lambda: str(tmp_path / "ninja"))
    clean.setenv("MAX_JOBS", "3")
    objects = setup.compile_kernels(tmp_path / "out", "g++", ["-O3"], setup.ISA_FLAGS)
    assert log.read_text().split()[-2:] == ["-j", "3"]
    rules = (tmp_path / "out" / "build.ninja").read_text()
    for isa, flags in setup.ISA_FLAGS.items():
        assert " ".join(["g++ -O3", *flags, f"-DFASTMETA_ISA={isa}"]) in rules
    sources = list((ROOT / "csrc").glob("**/*_cpu.cpp"))
    assert len(objects) == len(set(objects)) == len(sources) * len(setup.ISA_FLAGS)


def test_cmake_has_the_same_flags(setup):
    text = (ROOT / "CMakeLists.txt").read_text()
    assert f"set(FASTMETA_KERNEL_FLAGS {' '.join(setup.KERNEL_FLAGS)})" in text
    for isa, flags in setup.ISA_FLAGS.items():
        assert f"set(FASTMETA_FLAGS_{isa} {' '.join(flags) or chr(34) * 2})" in text


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what an install needs: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("csrc", "fastmeta", "tests", "benchmarks", "cmake", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def build(tree, *command, **env):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("FASTMETA_")}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env={**keep, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_pure_wheel(tree, tmp_path):
    done = build(tree, "bdist_wheel", "-d", str(tmp_path), FASTMETA_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fastmeta: building with") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = archive.read("fastmeta/_build_info.json")
    assert b'"native": false' in info
    assert "fastmeta/py.typed" in names
    assert not [n for n in names if n.endswith((".so", ".cpp")) or n.startswith("tests")]
    assert not (tree / "fastmeta" / "_build_info.json").exists()


def test_the_source_archive_holds_all_that_compiling_and_testing_take(tree, tmp_path):
    done = build(tree, "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[-1] for name in tar.getnames()}
    wanted = {
        str(path.relative_to(tree))
        for folder in ("csrc", "fastmeta", "tests", "benchmarks", "cmake", "tools")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "CMakePresets.json", "Makefile"}
    wanted |= {"LICENSE", "README.md"}
    assert sorted(wanted - packed) == []
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FASTMETA_NATIVE": "0", "FASTMETA_CUDA": "1"}, "unset one of them"),
        ({"FASTMETA_NATIVE": "maybe"}, "FASTMETA_NATIVE must be one of 0, 1, got 'maybe'"),
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler found"),
    ],
    ids=["contradiction", "unknown-value", "no-compiler"],
)
def test_an_impossible_request_ends_the_build(tree, tmp_path, env, message):
    done = build(tree, "bdist_wheel", "-d", str(tmp_path), **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
