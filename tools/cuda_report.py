"""Compile every CUDA source for every supported architecture and report what each kernel uses.

    python tools/cuda_report.py            # table of registers, spills and theoretical occupancy
    python tools/cuda_report.py --check    # fail on a spill, too low an occupancy, or a stale table
    python tools/cuda_report.py --write    # the table, into docs/cuda-kernels.md

Needs nvcc 13 (from the CUDA toolkit) and no GPU, no torch. Without nvcc it fails and says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "cuda-kernels.md"
REGISTERS = 65536  # of a multiprocessor, on all architectures; granted 256 a warp


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor, from the table of compute capabilities in the CUDA programming guide."""

    warps: int
    blocks: int
    shared: int  # bytes, all blocks together
    shared_block: int  # bytes a block can opt in to
    shared_system: int  # bytes that every block gives to the system


KIB = 1024
LIMITS = {
    75: Limits(32, 16, 64 * KIB, 64 * KIB, 0),
    80: Limits(64, 32, 164 * KIB, 163 * KIB, KIB),
    86: Limits(48, 16, 100 * KIB, 99 * KIB, KIB),
    89: Limits(48, 24, 100 * KIB, 99 * KIB, KIB),
    90: Limits(64, 32, 228 * KIB, 227 * KIB, KIB),
    100: Limits(64, 32, 228 * KIB, 227 * KIB, KIB),
    120: Limits(48, 24, 100 * KIB, 99 * KIB, KIB),
}
ARCHITECTURES = tuple(LIMITS)
TENSOR_CORES = 80  # the first with bfloat16 and TF32 on them
# The front end runs once for several, as in setup.py.
VIRTUAL = {75: (75,), 80: (80, 86, 89, 90), 100: (100, 120)}
MAX_THREADS, MAX_GRID = 1024, 2**31 - 1  # of a block, and of a grid in its first dimension


@dataclass(frozen=True)
class Design:
    """What a kernel is launched with, and the blocks a multiprocessor must have room for.

    The tests of the emulated kernels hold ``launch``, ``threads`` and ``shared`` against the
    launches themselves.
    """

    pattern: str  # of the kernel's name
    launch: str  # name that the launcher gives it
    threads: int
    shared: int  # dynamic, bytes
    blocks: int
    tensor: bool = False  # stated for tensor cores

    @property
    def double(self) -> bool:
        """Whether it is stated for float64 alone."""
        return "<double" in self.pattern


SECOND = "matching_double_backward"
# The first pattern that matches counts. Every kernel must be listed: a new one states its figure.
DESIGN = (
    Design(r"matching.*:forward_kernel<double", "matching_attention", 256, 55424, 1),
    Design(r"matching.*:forward_kernel<.*TensorDot", "matching_attention", 256, 30208, 2, True),
    Design(r"matching.*:forward_kernel<", "matching_attention", 256, 28736, 2),
    # With one tile of slopes. A second one, for wide features and 65 to 128 rows, takes 17 KB more.
    Design(r"matching.*:backward_kernel<double", "matching_attention_backward", 256, 58032, 1),
    Design(
        r"matching.*:backward_kernel<.*Tensor", "matching_attention_backward", 256, 33328, 2, True
    ),
    Design(
        r"matching.*:backward_kernel<.*float16, .*Dot", "matching_attention_backward", 256, 30832, 1
    ),
    Design(r"matching.*:backward_kernel<", "matching_attention_backward", 256, 30832, 2),
    Design(r"matching.*merge_splits_kernel<", "matching_attention: splits", 256, 0, 4),
    Design(r"matching.*merge_gradients_kernel<", "matching_attention_backward: splits", 256, 0, 4),
    Design(r"matching.*class_order_kernel", "matching_attention: class order", 128, 8192, 8),
    Design(r"matching.*inverse_length_kernel<", "matching_attention: row lengths", 256, 0, 4),
    Design(r"matching.*grad_sum_kernel<", "matching_attention: sums of grad", 256, 0, 4),
    Design(r"matching.*sum_partials_kernel<", "matching_attention: totals", 256, 0, 4),
    Design(r"matching.*class_means_kernel<double", f"{SECOND}: class means", 256, 58192, 1),
    Design(r"matching.*class_means_kernel<", f"{SECOND}: class means", 256, 30256, 2),
    Design(r"matching.*second_kernel<double", SECOND, 256, 58192, 1),
    Design(r"matching.*second_kernel<.*(WeightedTanh|Squared)", SECOND, 256, 30256, 1),
    Design(r"matching.*second_kernel<", SECOND, 256, 30256, 2),
    Design(r"matching.*stretch_kernel<", f"{SECOND}: row stretches", 256, 0, 4),
    Design(r"segment.*mean_backward_kernel<", "segment_mean_backward", 128, 0, 8),
    Design(r"segment.*mean_kernel<", "segment_mean", 128, 0, 8),
    Design(r"task_layers.*batch_norm_kernel<double", "task_batch_norm", 256, 0, 2),
    Design(r"task_layers.*batch_norm_kernel<", "task_batch_norm", 256, 0, 4),
    Design(
        r"task_layers.*batch_norm_backward_kernel<double", "task_batch_norm_backward", 256, 0, 2
    ),
    Design(r"task_layers.*batch_norm_backward_kernel<", "task_batch_norm_backward", 256, 0, 4),
    Design(r"task_layers.*batch_norm_second_kernel<double", "task_batch_norm_second", 256, 0, 2),
    Design(r"task_layers.*batch_norm_second_kernel<", "task_batch_norm_second", 256, 0, 4),
    Design(r"task_layers.*product_kernel<double, .*Matrix", "task_linear", 256, 0, 1),
    Design(r"task_layers.*product_kernel<.*Matrix.*, true>", "task_linear", 256, 0, 2, True),
    Design(r"task_layers.*product_kernel<.*Matrix", "task_linear", 256, 0, 2),
    Design(r"task_layers.*product_kernel<double, .*Patches", "task_conv2d", 256, 0, 1),
    Design(r"task_layers.*product_kernel<.*Patches.*, true>", "task_conv2d", 256, 0, 2, True),
    Design(r"task_layers.*product_kernel<.*Patches", "task_conv2d", 256, 0, 2),
    Design(r"task_layers.*product_kernel<.*Patches", "task_conv2d_input", 256, 0, 2),
    Design(r"task_layers.*product_kernel<.*Patches", "task_conv2d_weight", 256, 0, 2),
    Design(r"task_layers.*sum_parts_kernel<", "task_layers: sums of parts", 256, 0, 4),
    *(
        Design(rf"update.*{kernel}_kernel<{kind}.*::{op}{part}Step>", launch, 256, 0, blocks)
        for op in ("Sgd", "Momentum", "Adam")
        for kernel, part, launch in (
            ("step", "", f"{op.lower()}_update"),
            ("backward", "Backward", f"{op.lower()}_update_backward"),
        )
        for kind, blocks in (("double", 2), ("", 3))
    ),
    *(
        Design(r"update.*finish_kernel<", f"{op}_update_backward: totals", 256, 0, 4)
        for op in ("sgd", "momentum", "adam")
    ),
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture; bytes but for ``registers``."""

    source: str
    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    static_shared: int

    def design(self) -> Design:
        """Its entry in DESIGN."""
        for design in DESIGN:
            if re.search(design.pattern, self.name):
                return design
        raise SystemExit(f"cuda_report: state the design figure of {self.name} in DESIGN")

    def blocks(self) -> int:
        """Blocks a multiprocessor has room for: registers, warps, shared memory, block slots."""
        design, limits = self.design(), LIMITS[self.arch]
        warps = -(-design.threads // 32)
        granted = -(-self.registers * 32 // 256) * 256  # of a warp
        room = [REGISTERS // granted // warps, limits.warps // warps, limits.blocks]
        shared = self.static_shared + design.shared
        if shared > limits.shared_block:
            return 0
        granule = 256 if self.arch == 75 else 128
        shared = -(-(shared + limits.shared_system) // granule) * granule
        if shared:
            room.append(limits.shared // shared)
        return min(room)

    def occupancy(self) -> float:
        """Warps that can be resident over what the multiprocessor has places for."""
        return self.blocks() * self.design().threads / 32 / LIMITS[self.arch].warps

    def complaint(self) -> str:
        """Why this kernel fails the check, or nothing."""
        if self.design().tensor and self.arch < TENSOR_CORES:
            return ""  # a stub that is never launched
        wanted = self.design().blocks
        if self.spills or self.stack:
            return f"spills {self.spills} bytes, stack of {self.stack} bytes"
        if self.blocks() < wanted:
            return f"room for {self.blocks()} blocks a multiprocessor, not {wanted}"
        return ""


def gencode_flags() -> list[str]:
    """Return nvcc's flags for all architectures."""
    return [
        f"-gencode=arch=compute_{virtual},code=[{','.join(f'sm_{a}' for a in real)}]"
        for virtual, real in VIRTUAL.items()
    ]


def compile_source(nvcc: str, source: Path, threads: int) -> list[Kernel]:
    """Compile ``source`` for all architectures; SystemExit with nvcc's output on an error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            "-std=c++20",
            "-O3",
            f"-I{ROOT / 'csrc'}",
            "-Xptxas",
            "-v",
            *gencode_flags(),
        ]
        command += [f"--threads={threads}", "-Werror=all-warnings", "-c", str(source)]
        command += ["-o", str(Path(folder) / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cuda_report: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse(str(source.relative_to(ROOT)), done.stdout + done.stderr)


def parse(source: str, output: str) -> list[Kernel]:
    """Read ptxas's report of one compilation."""
    entry = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = entry.findall(output)
    names = demangle([mangled for mangled, *_ in found])
    kernels = []
    for name, (_, arch, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                source=source,
                name=name,
                arch=int(arch),
                registers=int(registers),
                stack=int(stack),
                spills=int(stores) + int(loads),
                static_shared=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Return readable names, without parameters and the project's namespace."""
    if not names:
        return []
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise SystemExit("cuda_report: needs c++filt (binutils) to name kernels")
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    readable = done.stdout.strip().split("\n")
    # c++filt appends the parameters, which repeat the template arguments.
    return [
        re.sub(r"\(fastmeta.*|\(.*\)$|^void ", "", n).replace("fastmeta::", "") for n in readable
    ]


HEADER = """# CUDA kernels

What every kernel takes on every architecture: registers of a thread / bytes spilled / theoretical
occupancy. Blocks is the fewest that a multiprocessor must have room for, the figure that each
kernel is designed to; a spill, or room for fewer, fails `make cuda-report CHECK=1`. Shared memory
is static and dynamic together. Written by `make cuda-report WRITE=1`.

"""


def table(kernels: list[Kernel]) -> str:
    """Return a Markdown table: a row a kernel, a column an architecture."""
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [
        f"| kernel | threads | shared, bytes | blocks | {heads} |",
        "|---|" + "---:|" * (len(ARCHITECTURES) + 3),
    ]
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    for name in sorted(by_name):
        row = by_name[name]
        design = row[ARCHITECTURES[0]].design()
        shared = design.shared + max(k.static_shared for k in row.values())
        cells = [
            f"{row[a].registers} / {row[a].spills} / {row[a].occupancy():.0%}"
            if a >= TENSOR_CORES or not design.tensor
            else "not used"
            for a in ARCHITECTURES
        ]
        short = re.sub(r"\b(matching|segment|task_layers|update)::cuda::", "", name)
        lines.append(
            f"| `{short}` | {design.threads} | {shared} | {design.blocks} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def release(nvcc: str) -> str:
    """Version of nvcc, on which registers depend."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return found[1] if found else "unknown"


def main(argv: list[str] | None = None) -> int:
    """Run the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail on spills or low occupancy")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at once")
    options = parser.parse_args(argv)

    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        print("=" * 88, file=sys.stderr)
        print(
            "cuda_report: NO NVCC FOUND: no CUDA source was compiled or checked.", file=sys.stderr
        )
        print("Install the CUDA 13 toolkit, put nvcc on PATH or name it in NVCC.", file=sys.stderr)
        print("=" * 88, file=sys.stderr)
        return 2

    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    with ThreadPoolExecutor(max_workers=len(sources)) as pool:
        jobs = pool.map(lambda source: compile_source(nvcc, source, options.jobs), sources)
        kernels = [kernel for found in jobs for kernel in found]
    for source in sources:
        archs = {k.arch for k in kernels if k.source == str(source.relative_to(ROOT))}
        if archs != set(ARCHITECTURES):
            raise SystemExit(f"cuda_report: {source} has kernels for {sorted(archs)} alone")

    text = HEADER + f"nvcc {release(nvcc)}.\n\n" + table(kernels) + "\n"
    if options.write:
        TABLE.write_text(text)
    elif not options.check:
        print(text)
    spilling = sum(k.spills > 0 or k.stack > 0 for k in kernels)
    print(
        f"{len(sources)} sources, {len(kernels)} kernels over {len(ARCHITECTURES)} architectures, "
        f"{spilling} with spills or a stack, at most {max(k.registers for k in kernels)} registers"
    )
    complaints = [f"{k.name} on sm_{k.arch}: {k.complaint()}" for k in kernels if k.complaint()]
    committed = TABLE.read_text() if TABLE.exists() else ""
    # Another nvcc gives other numbers; they are held to the design, not to the table.
    if f"nvcc {release(nvcc)}." in committed and committed != text:
        complaints.append(f"{TABLE.relative_to(ROOT)} is out of date: make cuda-report WRITE=1")
    for complaint in complaints:
        print("cuda_report:", complaint, file=sys.stderr)
    return 1 if options.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
