"""Builds the extension modules: fastmeta._C (CPU) and, with nvcc, fastmeta._C_cuda.

Environment:
    FASTMETA_NATIVE       1 (default) compiles the C++ part; 0 installs pure Python.
    FASTMETA_CUDA         auto (default): CUDA when nvcc and a CUDA build of torch are there;
                          1: or fail; 0: never.
    FASTMETA_DEBUG        1 builds without optimisation and with assertions.
    TORCH_CUDA_ARCH_LIST  Architectures, as "8.0;9.0+PTX". Default: the visible GPUs, or with none
                          visible 8.0, 9.0 and PTX.
    MAX_JOBS              Compilers at a time (default: all cores).
    CXX, CUDA_HOME        Compiler and CUDA toolkit, where the usual places hold other ones.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from json import dumps
from pathlib import Path
from typing import NoReturn

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# LibTorch Stable ABI: what is built against any torch runs on 2.11 and later.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
DEFAULT_ARCHS = "8.0;9.0+PTX"
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
WITHOUT = "or go on without (pure PyTorch, same results, slower): FASTMETA_NATIVE=0 pip install ."


def stop(message: str) -> NoReturn:
    sys.exit(f"\nfastmeta: {message}\n")


def switch(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").lower() or default
    if value not in choices:
        stop(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def find_compiler() -> str:
    """The C++ compiler command, proved on a line of C++20, or an exit that says what to do."""
    asked = os.environ.get("CXX")
    candidates = (
        [asked] if asked else [sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
    )
    found = next((c for c in candidates if c and shutil.which(shlex.split(c)[0])), None)
    if found is None:
        looked = f"CXX={asked}" if asked else "c++, g++, clang++"
        stop(
            f"no C++ compiler found (looked for {looked}).\n"
            "  Get one:         apt-get install g++   (or dnf install gcc-c++)\n"
            "  or name yours:   CXX=/path/to/compiler pip install .\n"
            f"  {WITHOUT}"
        )
    probe = subprocess.run(
        [*shlex.split(found), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <span>\n#include <type_traits>\nstd::type_identity_t<int> one = 1;\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        stop(
            f"the C++ compiler {found!r} does not compile C++20:\n{probe.stderr}"
            "  Take g++ 11 or clang 14, or later:   CXX=/path/to/compiler pip install .\n"
            f"  {WITHOUT}"
        )
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        stop(
            f"this Python's C headers are missing (no {include}/Python.h).\n"
            f"  Get them:   apt-get install python3-dev   (dnf install python3-devel)\n  {WITHOUT}"
        )
    return found


def find_cuda() -> Path | None:
    """The CUDA toolkit: a folder with bin/nvcc and the headers (a bare nvcc may be a wrapper)."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    around = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(asked)] if asked else [*around, Path("/usr/local/cuda")]:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def cuda_decision() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None, and why."""
    wanted = switch("FASTMETA_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return None, "FASTMETA_CUDA=0"
    import torch

    home, built_for, missing = find_cuda(), torch.version.cuda, []
    if home is None:
        asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"at CUDA_HOME={asked}" if asked else "found"
        missing.append(f"no CUDA toolkit {where} (install nvcc, or set CUDA_HOME)")
    if built_for is None:
        missing.append(f"torch {torch.__version__} has no CUDA (install a CUDA build of torch)")
    if home is not None and built_for is not None:
        release = re.search(
            r"release (\d+)\.(\d+)", output(str(home / "bin" / "nvcc"), "--version")
        )
        if release is None or release[1] != built_for.split(".")[0]:
            have = f"{release[1]}.{release[2]}" if release else "of unknown version"
            missing.append(f"nvcc in {home} is {have}, torch's CUDA {built_for} (set CUDA_HOME)")
    if not missing:
        return home, f"{home}, torch for CUDA {built_for}"
    if wanted == "1":
        stop(
            "FASTMETA_CUDA=1 cannot be met: " + "; ".join(missing) + ".\n"
            "  Build against this environment's torch:   pip install --no-build-isolation .\n"
            "  or without CUDA:                          FASTMETA_CUDA=0 pip install ."
        )
    return None, "; ".join(missing)


def arch_list(home: Path) -> str:
    """What nvcc compiles for, checked against what it can."""
    import torch

    listed = re.findall(
        r"compute_(\d+)(\d)\b", output(str(home / "bin" / "nvcc"), "--list-gpu-arch")
    )
    able = sorted((int(major), int(minor)) for major, minor in listed)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        wrong = [
            f"{major}.{minor}"
            for major, minor in re.findall(r"(\d+)\.(\d)", asked)
            if (int(major), int(minor)) not in able
        ]
        if wrong:
            can = " ".join(f"{major}.{minor}" for major, minor in able)
            stop(
                f"TORCH_CUDA_ARCH_LIST={asked} names {', '.join(wrong)}, but nvcc in {home} can "
                f"compile for {can}.\n  Set TORCH_CUDA_ARCH_LIST to some of these, or CUDA_HOME to "
                "another toolkit."
            )
        return asked
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = {torch.cuda.get_device_capability(i) for i in range(count)}
    # A GPU newer than nvcc runs the PTX of the last architecture that nvcc knows.
    newest = max(able, default=(9, 0))
    names = {f"{a}.{b}" if (a, b) in able else f"{newest[0]}.{newest[1]}+PTX" for a, b in visible}
    return ";".join(sorted(names)) or DEFAULT_ARCHS


def gencode_flags(archs: str) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST; none where torch shall read names such as Ampere.

    One front-end pass serves several architectures, since the kernels ask no more of 8.0 to 9.0
    than of 8.0: a third of the compile time. (From that pass ptxas makes spills on 12.0; a pass for
    10.0 serves there.)
    """
    entries = re.split(r"[;\s]+", archs.strip())
    numbers = [re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", entry) for entry in entries]
    if not all(numbers):
        return []
    codes: dict[int, list[str]] = {}
    for number in numbers:
        real = int(number[1] + number[2])
        virtual = 100 if real >= 100 else min(real, 80)
        codes.setdefault(virtual, []).append(f"sm_{real}")
        if number[3]:
            codes[virtual].append(f"compute_{virtual}")
    return [f"-gencode=arch=compute_{v},code=[{','.join(c)}]" for v, c in sorted(codes.items())]


def find_ninja() -> str:
    """The ninja of this environment, put on PATH for torch as well, or any other."""
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        pass
    return shutil.which("ninja") or stop("no ninja found:   pip install ninja")


def compile_kernels(
    folder: Path, compiler: str, flags: list[str], isas: dict[str, list[str]]
) -> list[str]:
    """Compile every torch-free ``*_cpu.cpp`` once per instruction set, in one run of ninja."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["ninja_required_version = 1.3"]
    objects = []
    for isa, isa_flags in isas.items():
        command = shlex.join([*shlex.split(compiler), *flags, *isa_flags, f"-DFASTMETA_ISA={isa}"])
        lines += [f"rule {isa}", f"  command = {command} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        for source in sorted((ROOT / "csrc").glob("**/*_cpu.cpp")):
            objects.append(str(folder / isa / f"{source.stem}.o"))
            paths = [path.replace(" ", "$ ") for path in (objects[-1], str(source))]
            lines.append(f"build {paths[0]}: {isa} {paths[1]}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=False)
    if done.returncode != 0:
        stop("the CPU kernels do not compile: see the compiler's messages above")
    return objects


def extensions():
    """The extension modules, the command that builds them, and the resolved configuration."""
    compiler = os.environ["CXX"] = find_compiler()
    find_ninja()
    home, why = cuda_decision()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: it looks there
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = switch("FASTMETA_DEBUG", "0", ("0", "1")) == "1"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISA_FLAGS if x86 else {"baseline": []}
    optimise = ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3", "-g0"]
    common = ["-std=c++20", *optimise, "-Wall", "-Wextra", "-fvisibility=hidden", TORCH_TARGET]
    if x86:
        common.append("-DFASTMETA_X86")
    include = [str(ROOT / "csrc"), pybind11.get_include()]

    def sources(*patterns: str) -> list[str]:
        found = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
        return sorted(str(path.relative_to(ROOT)) for path in found)

    modules = [
        CppExtension(
            "fastmeta._C",
            sources("module.cpp", "**/*_torch.cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": common},
        )
    ]
    if home is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list(home)
        defines = ["-DUSE_CUDA", "-DFASTMETA_CUDA"]
        optimise = "-O0" if debug else "-O3"
        codes = gencode_flags(os.environ["TORCH_CUDA_ARCH_LIST"])
        modules.append(
            CUDAExtension(
                "fastmeta._C_cuda",
                sources("cuda_module.cpp", "**/*_torch.cpp", "**/*_cuda.cu"),
                include_dirs=include,
                extra_compile_args={
                    "cxx": [*common, *defines],
                    "nvcc": ["-std=c++20", optimise, TORCH_TARGET, *defines, *codes],
                },
            )
        )

    class Build(BuildExtension):
        """Compiles each ``*_cpu.cpp`` once per instruction set, then the rest as usual."""

        def run(self):
            for stale in Path(self.build_lib).glob("fastmeta/_C*"):
                stale.unlink()  # else a module of an earlier configuration gets into the wheel
            super().run()
            if self.inplace:
                write_info(ROOT / "fastmeta", info)

        def build_extension(self, ext):
            # One source makes objects in both modules, so each has its own folder of them. It is a
            # lasting one in an editable install too, so that ninja compiles only what changed.
            temp = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / temp / ext.name)
            if ext.name == "fastmeta._C":
                folder = Path(self.build_temp, "kernels")
                flags = [*common, *KERNEL_FLAGS, "-DNDEBUG", "-fPIC", f"-I{ROOT / 'csrc'}"]
                ext.extra_objects = compile_kernels(folder, compiler, flags, isas)
            super().build_extension(ext)

    info = {
        "native": True,
        "torch": torch.__version__,
        "torch_target": "2.11",
        "compiler": (output(*shlex.split(compiler), "--version").splitlines() or [compiler])[0],
        "debug": debug,
        "isas": list(isas),
        "cuda": home is not None,
        "cuda_reason": why,
        "cuda_archs": os.environ.get("TORCH_CUDA_ARCH_LIST", "") if home is not None else "",
        "max_jobs": os.environ.get("MAX_JOBS", "all cores"),
    }
    return modules, Build.with_options(use_ninja=True), info


def write_info(package: Path, info: dict) -> None:
    """Leave what was resolved beside the modules, where ``fastmeta info`` reads it."""
    (package / "_build_info.json").write_text(dumps(info, indent=2) + "\n")


def main() -> None:
    native = switch("FASTMETA_NATIVE", "1", ("0", "1")) == "1"
    if not native and switch("FASTMETA_CUDA", "auto", ("auto", "0", "1")) == "1":
        stop("FASTMETA_NATIVE=0 with FASTMETA_CUDA=1: unset one of them")
    if not BUILD_COMMANDS & set(sys.argv):  # metadata or a source archive: needs no torch
        setup()
        return
    modules, commands = [], {}
    info = {"native": False, "reason": "FASTMETA_NATIVE=0"}
    if native:
        modules, commands["build_ext"], info = extensions()

    class BuildPython(build_py):
        def run(self):
            super().run()
            write_info(
                ROOT / "fastmeta" if self.editable_mode else Path(self.build_lib, "fastmeta"), info
            )

    width = max(map(len, info))
    lines = [f"  {name:<{width}}  {value}" for name, value in info.items()]
    print("fastmeta: building with", *lines, sep="\n", file=sys.stderr, flush=True)
    setup(ext_modules=modules, cmdclass={**commands, "build_py": BuildPython})


if __name__ == "__main__":
    main()
