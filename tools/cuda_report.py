"""Compile every CUDA source for every supported architecture and report what each kernel uses.

    python tools/cuda_report.py            # table of registers, shared memory and occupancy
    python tools/cuda_report.py --check    # the same, and fail on a spill or too low an occupancy
    python tools/cuda_report.py --output docs/cuda_report.md

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
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, on all of them
WARPS = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # of a multiprocessor

# Threads of a block and the fewest blocks that registers must leave room for, by kernel; the first
# pattern that matches counts. Every kernel must be listed: a new one states its design figure here.
DESIGN = (
    (r"matching.*(forward|backward)_kernel<double", 256, 1),
    (r"matching.*(forward|backward)_kernel<", 256, 2),
    (r"matching.*(inverse_length|grad_sum|sum_partials)_kernel<", 256, 4),
    (r"segment.*mean(_backward)?_kernel<", 128, 8),
    (r"update.*sgd(_backward|_reduce|_finish)?_kernel<", 256, 3),
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

    def design(self) -> tuple[int, int]:
        """Threads of a block, and the fewest blocks a multiprocessor must have room for."""
        for pattern, threads, blocks in DESIGN:
            if re.search(pattern, self.name):
                return threads, blocks
        raise SystemExit(f"cuda_report: state the design figure of {self.name} in DESIGN")

    def blocks(self) -> int:
        """Blocks a multiprocessor has room for, by registers (granted 8 a thread) and warps."""
        threads, _ = self.design()
        granted = -(-self.registers // 8) * 8
        return min(REGISTERS // (granted * threads), WARPS[self.arch] * 32 // threads)

    def complaint(self) -> str:
        """Why this kernel fails the check, or nothing."""
        _, wanted = self.design()
        if self.spills or self.stack:
            return f"spills {self.spills} bytes, stack of {self.stack} bytes"
        if self.blocks() < wanted:
            return f"{self.registers} registers leave room for {self.blocks()} blocks, not {wanted}"
        return ""


def compile_source(nvcc: str, source: Path, threads: int) -> list[Kernel]:
    """Compile ``source`` for all architectures; SystemExit with nvcc's output on an error."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", *codes]
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


def table(kernels: list[Kernel]) -> str:
    """Return a Markdown table: a row a kernel, a column an architecture."""
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | static shared |",
        "|---|" + "---|" * (len(ARCHITECTURES) + 1),
    ]
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    for name in sorted(by_name):
        row = by_name[name]
        cells = [
            f"{row[a].registers} x{row[a].blocks()}"
            + (f" **{row[a].spills} B**" if row[a].spills else "")
            for a in ARCHITECTURES
        ]
        shared = max(k.static_shared for k in row.values())
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {shared} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail on spills or low occupancy")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
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

    text = (
        "# CUDA kernels: what each uses\n\n"
        "Made by `tools/cuda_report.py` with nvcc; each cell is registers a thread x blocks of a "
        "multiprocessor that they leave room for.\n\n" + table(kernels) + "\n"
    )
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    spilling = sum(k.spills > 0 or k.stack > 0 for k in kernels)
    print(
        f"{len(sources)} sources, {len(kernels)} kernels over {len(ARCHITECTURES)} architectures, "
        f"{spilling} with spills or a stack, at most {max(k.registers for k in kernels)} registers"
    )
    complaints = [f"{k.name} on sm_{k.arch}: {k.complaint()}" for k in kernels if k.complaint()]
    for complaint in complaints:
        print("cuda_report:", complaint, file=sys.stderr)
    return 1 if options.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
