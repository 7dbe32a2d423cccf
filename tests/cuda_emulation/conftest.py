"""Builds the CUDA sources for the host, with the emulator, into a module that the tests drive.

The launchers and kernels are compiled as they are: ``g++ -include cuemu.h`` on the ``.cu`` files.
Objects are kept in ``build/cuda_emulation`` under a hash of everything that goes into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pybind11
import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"

# What is compiled together: parsing the headers is half of a source's time. The longest first.
UNITS: dict[str, tuple[Path, ...]] = {
    "bindings": (HERE / "bindings.cpp",),
    "matching": tuple(sorted(CSRC.glob("matching/*_cuda.cu"))),
    "others": tuple(sorted(set(CSRC.glob("*/*_cuda.cu")) - set(CSRC.glob("matching/*_cuda.cu")))),
}
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Kernels may contract a * b + c as nvcc does; -O1 compiles in half the time of -O2.
OPTIMISE = ["-O1"]
SANITIZE = {
    "": [],
    # -O0: the sanitizers' checks take the optimiser minutes.
    "address": ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def compile_emulation(*, name: str = "fastmeta_emulation", sanitize: str = "") -> Path:
    """Return the path of the built module, compiling what has changed.

    Args:
        name: Module name.
        sanitize: ``""``, ``"address"`` (AddressSanitizer and UndefinedBehaviorSanitizer) or
            ``"thread"`` (ThreadSanitizer).

    Raises:
        RuntimeError: A compiler is missing or failed; the message holds its output.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"the CUDA emulation tests need a C++20 compiler and found no {compiler[0]!r}: "
            "install g++ or set CXX"
        )
    includes = [CSRC, HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    base = [*compiler, *FLAGS, *OPTIMISE, *SANITIZE[sanitize], *(f"-I{i}" for i in includes)]
    base += [f"-DFASTMETA_EMULATION={name}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda item: _object(base, *item), UNITS.items()))
        digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        folder = BUILD / digest
        module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            folder.mkdir(exist_ok=True)
            part = module.with_suffix(".part")
            _run([*compiler, *SANITIZE[sanitize], "-shared", *map(str, objects), "-o", str(part)])
            part.rename(module)
    return module


def compile_executable(source: Path, sanitize: str = "") -> Path:
    """Return the path of a program built from one file that needs no Python."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = [*FLAGS, *OPTIMISE, *SANITIZE[sanitize], f"-I{CSRC}", f"-I{HERE}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        item = _object([*compiler, *flags], source.stem, (source,))
        program = item.with_suffix("")
        if not program.exists():
            part = item.with_suffix(".part")
            _run([*compiler, *SANITIZE[sanitize], str(item), "-o", str(part)])
            part.rename(program)
    return program


def _object(base: list[str], name: str, sources: tuple[Path, ...]) -> Path:
    """Return the path of the object that ``sources``, as one translation unit, compile to."""
    inputs = [*sources, *sorted(HERE.glob("*.h"))]
    inputs += sorted(h for h in CSRC.glob("*/*") if h.suffix in {".h", ".cuh"})
    digest = hashlib.sha256(" ".join(base).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        part = target.with_suffix(".part")
        unit = "".join(f'#include "{source}"\n' for source in sources)
        _run([*base, "-include", "cuemu.h", "-x", "c++", "-c", "-", "-o", str(part)], unit)
        part.rename(target)
    return target


def _run(command: list[str], given: str | None = None) -> None:
    # A sanitizer preloaded for the tests would slow the compiler down many times over.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, input=given)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def load_module(path: Path) -> ModuleType:
    """Import the extension module at ``path``."""
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SANITIZER = "FASTMETA_EMULATION_SANITIZE"
SEED = "FASTMETA_EMULATION_SEED"

SCALARS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GUARD = 64  # bytes on both sides of every array


class Array:
    """Memory of one kernel argument, with guard zones, at a chosen alignment.

    Outputs start as NaN bytes, so that what a kernel leaves unwritten shows; writes beside the
    array show in :meth:`read`, which checks the guard zones.
    """

    def __init__(self, like: torch.Tensor, *, fill: bool, offset: int = 0) -> None:
        self.like = like
        self.size = like.numel() * like.element_size()
        self.buffer: npt.NDArray[np.uint8] = np.full(self.size + 4 * GUARD, 0xFF, np.uint8)
        start = -self.buffer.ctypes.data % GUARD + GUARD + offset * like.element_size()
        self.start = start
        self.address = self.buffer.ctypes.data + start
        self.buffer[:start] = 0xA5
        self.buffer[start + self.size :] = 0xA5
        if fill and self.size:
            raw = like.detach().contiguous().view(torch.uint8).numpy()
            self.buffer[start : start + self.size] = raw.reshape(-1)

    def read(self) -> torch.Tensor:
        """Return the contents as a tensor of the array's dtype and shape."""
        end = self.start + self.size
        assert (self.buffer[: self.start] == 0xA5).all(), "written before the array"
        assert (self.buffer[end:] == 0xA5).all(), "written past the array"
        if self.size == 0:
            return torch.empty_like(self.like)
        raw = torch.from_numpy(self.buffer[self.start : end].copy())
        return raw.view(self.like.dtype).reshape(self.like.shape)


class Emulation:
    """The module and its arrays: what the tests of every op share."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def schedule(self, seed: int = 0, order: str = "random", max_grid: int = 2**31 - 1) -> None:
        """Set the order of threads and blocks, and the most blocks that a launch gets.

        ``FASTMETA_EMULATION_SEED`` is added to the seed: another number is another set of orders.
        """
        self.module.schedule(order, seed + int(os.environ.get(SEED, "0")), max_grid)

    def input(self, tensor: torch.Tensor, offset: int = 0) -> Array:
        """Return an argument that holds ``tensor``, ``offset`` elements past 64-byte alignment."""
        return Array(tensor, fill=True, offset=offset)

    def output(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> Array:
        """Return an argument to be written, NaN until then."""
        return Array(torch.empty(shape, dtype=dtype), fill=False, offset=offset)

    @staticmethod
    def check(
        got: torch.Tensor,
        truth: torch.Tensor,
        peer: torch.Tensor,
        magnitude: float = 0.0,
        what: str = "result",
    ) -> None:
        """Assert that ``got`` errs at most twice as much as ``peer``, and a rounding of its dtype.

        Args:
            got: What the kernel wrote.
            truth: The definition, in float64.
            peer: The definition in the kernel's accumulation type, by PyTorch. In float64 it is the
                truth, whose own rounding is then allowed for: 64 units in the last place.
            magnitude: Of sums that cancel: the sum of the terms' absolute values.
            what: For the message.
        """
        assert got.shape == truth.shape
        finite = torch.isfinite(truth)
        assert torch.equal(got.double()[~finite], truth[~finite]), "infinities differ"
        if not finite.any():
            return
        error = (got.double() - truth)[finite].abs().nan_to_num(float("inf"))
        peer_error = (peer.double() - truth)[finite].abs().max().item()
        scale = truth[finite].abs()
        acc = torch.float64 if got.dtype == torch.float64 else torch.float32
        units = 64 if acc == torch.float64 else 4
        rounding = torch.finfo(acc).eps * max(units * scale.max().item(), units * magnitude / 4)
        rounding += torch.finfo(got.dtype).eps * scale + torch.finfo(got.dtype).tiny
        worst = (error - rounding).max().item()
        message = f"{what}: error {error.max().item():.3e}, peer's {peer_error:.3e}"
        assert worst <= 2 * peer_error, message

    def launches(self) -> list:
        """Return the launches since the last call."""
        return self.module.take_launches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Time the tests and not the build, which can outlast the time limit on a busy machine."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def emulation_module() -> ModuleType:
    """The compiled sources; with the sanitizer that ``FASTMETA_EMULATION_SANITIZE`` names."""
    return load_module(compile_emulation(sanitize=os.environ.get(SANITIZER, "")))


@pytest.fixture(scope="session")
def compile_program() -> Callable[..., Path]:
    """:func:`compile_executable`, for tests that run a program of their own."""
    return compile_executable


@pytest.fixture
def emulation(emulation_module: ModuleType) -> Emulation:
    """The emulator at its default schedule, with no launches recorded."""
    emulation = Emulation(emulation_module)
    emulation.schedule()
    emulation.module.tensor_cores(True)
    emulation.module.multiprocessors(128)
    emulation.launches()
    return emulation
