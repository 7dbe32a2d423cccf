"""Builds the extension modules: fastmeta._C (CPU) and, with nvcc, fastmeta._C_cuda.

Environment:
    FASTMETA_NATIVE       1 (default) builds the C++ part; 0 installs pure Python.
    FASTMETA_CUDA         auto (default): CUDA when nvcc and a CUDA build of torch are there;
                          1: or fail; 0: never.
    FASTMETA_DEBUG        1 builds without optimisation and with assertions.
    TORCH_CUDA_ARCH_LIST  Architectures, as "8.0;9.0+PTX". Default: the visible GPUs, or with none
                          visible 8.0, 9.0 and PTX.
    MAX_JOBS, CXX, CUDA_HOME, NVCC_THREADS as torch's cpp_extension has them.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
BUILD_INFO = ROOT / "fastmeta" / "_build_info.json"
# LibTorch Stable ABI: what is built against any torch runs on 2.11 and later.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
DEFAULT_ARCHS = "8.0;9.0+PTX"


def switch(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).lower()
    if value not in choices:
        sys.exit(f"fastmeta: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def find_compiler() -> str:
    """The C++ compiler, or an exit that says how to get one or how to go on without."""
    command = os.environ.get("CXX", "c++").split()[0]
    for candidate in (command, "g++", "clang++"):
        if shutil.which(candidate):
            return candidate
    sys.exit(
        f"fastmeta: no C++ compiler found (looked for {command!r}, 'g++' and 'clang++').\n"
        "  Get one:         apt-get install g++   (or dnf install gcc-c++, conda install cxx-compiler)\n"
        "  or name yours:   CXX=/path/to/compiler pip install .\n"
        "  or go on without (pure PyTorch, same results, slower): FASTMETA_NATIVE=0 pip install ."
    )


def cuda_decision() -> tuple[bool, str]:
    """Whether to build the CUDA part, and why."""
    wanted = switch("FASTMETA_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return False, "FASTMETA_CUDA=0"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    missing = []
    if nvcc is None or not nvcc.exists():
        missing.append("nvcc (install the CUDA toolkit or set CUDA_HOME)")
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (this one is {torch.__version__})")
    if not missing:
        return True, f"{nvcc}, torch for CUDA {torch.version.cuda}"
    if wanted == "1":
        sys.exit(
            "fastmeta: FASTMETA_CUDA=1, but there is no " + " and no ".join(missing) + ".\n"
            "  Build without CUDA: FASTMETA_CUDA=0. Use this environment's torch: pip install "
            "--no-build-isolation ."
        )
    return False, "no " + ", no ".join(missing)


def arch_list() -> str:
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    return ";".join(f"{major}.{minor}" for major, minor in capabilities) or DEFAULT_ARCHS


def extensions():
    """The extension modules, the build command, and the configuration for people to read."""
    compiler = find_compiler()
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = switch("FASTMETA_DEBUG", "0", ("0", "1")) == "1"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISA_FLAGS if x86 else {"baseline": []}
    optimise = ["-O0", "-g", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3"]
    common = ["-std=c++20", *optimise, "-Wall", "-Wextra", "-fvisibility=hidden", TORCH_TARGET]
    if x86:
        common.append("-DFASTMETA_X86")
    include = [str(ROOT / "csrc"), pybind11.get_include()]

    def sources(*patterns: str) -> list[str]:
        found = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
        return sorted(str(path.relative_to(ROOT)) for path in found)

    headers = sources("**/*.h", "**/*.cuh")
    cpu = CppExtension(
        "fastmeta._C",
        sources("module.cpp", "**/*_torch.cpp"),
        include_dirs=include,
        extra_compile_args={"cxx": common},
        depends=headers,
    )
    modules = [cpu]
    with_cuda, why = cuda_decision()
    archs = arch_list() if with_cuda else ""
    if with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        defines = ["-DUSE_CUDA", "-DFASTMETA_CUDA"]
        modules.append(
            CUDAExtension(
                "fastmeta._C_cuda",
                sources("cuda_module.cpp", "**/*_torch.cpp", "**/*_cuda.cu"),
                include_dirs=include,
                extra_compile_args={
                    "cxx": [*common, *defines],
                    "nvcc": ["-std=c++20", "-O3", TORCH_TARGET, *defines],
                },
                depends=headers,
            )
        )

    class Build(BuildExtension):
        """Compiles each ``*_cpu.cpp`` once per instruction set, then the rest as usual."""

        def build_extension(self, ext):
            # One source makes objects in both modules, so each has its own folder of them.
            temp, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            if ext.name == "fastmeta._C":
                for isa, flags in isas.items():
                    flags = [*common, *KERNEL_FLAGS, *flags, f"-DFASTMETA_ISA={isa}"]
                    ext.extra_objects += self.compiler.compile(
                        sources("**/*_cpu.cpp"),
                        output_dir=str(Path(self.build_temp).resolve() / isa),
                        include_dirs=ext.include_dirs,
                        extra_postargs={"cxx": flags},
                        depends=headers,
                    )
            super().build_extension(ext)
            self.build_temp = temp

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    info = {
        "torch": torch.__version__,
        "torch_target": "2.11",
        "compiler": version.stdout.splitlines()[0] if version.stdout else compiler,
        "debug": debug,
        "isas": list(isas),
        "cuda": with_cuda,
        "cuda_reason": why,
        "cuda_archs": archs,
        "max_jobs": os.environ.get("MAX_JOBS", "all cores"),
    }
    return modules, {"build_ext": Build.with_options(use_ninja=True)}, info


def main() -> None:
    building = any(
        command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build")
    )
    modules, commands, info = [], {}, {"native": False, "reason": "FASTMETA_NATIVE=0"}
    if switch("FASTMETA_NATIVE", "1", ("0", "1")) == "1" and building:
        modules, commands, info = extensions()
        info["native"] = True
    if building:
        print("fastmeta: building with", json.dumps(info, indent=2), file=sys.stderr)
        BUILD_INFO.write_text(json.dumps(info, indent=2) + "\n")
    setup(ext_modules=modules, cmdclass=commands)


main()
