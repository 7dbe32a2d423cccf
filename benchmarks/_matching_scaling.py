"""How matching attention scales: supports, features, threads and instruction sets.

``python -m benchmarks._matching_scaling DIR`` times forward and forward+backward of one task of 64
queries and 20 classes (dot, float32) beside eager PyTorch's one-hot and ``index_add``, measures the
memory of a call, and writes ``matching_scaling.json`` and ``.png`` to DIR. Median of calls in turns
for half a second a point.

PyTorch's libraries take the machine's best instruction set. So that there is a comparison with what
they would do on a machine of the oldest, one point is measured in a process that holds both sides
to SSE2.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastmeta as fm
from benchmarks import _floors, _memory
from benchmarks import _matching as m
from benchmarks._matching import Work
from fastmeta import _native

SUPPORTS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FEATURES = (16, 64, 256, 1024, 4096)
DENSE = 20_000  # supports up to which eager PyTorch may write one-hot labels
SECONDS = 0.4
#: What keeps ATen and MKL to SSE2, and fastmeta as well.
SSE2 = {
    "FASTMETA_CPU_ISA": "baseline",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
}


def medians(steps: list[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each step, taken in turns."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    end = time.perf_counter() + SECONDS * len(steps)
    while time.perf_counter() < end or len(times[0]) < 3:
        for step, samples in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            samples.append(time.perf_counter() - start)
    return [1e3 * statistics.median(samples) for samples in times]


def point(supports: int, features: int, backward: bool) -> dict[str, Any]:
    """One workload: our time, the best of eager's, the floor of its arithmetic; the memory."""
    work = Work("scaling", 1, 20, supports, 64, features, backward=backward)
    x = m.tensors(work, m.draw(work, "float32"), "float32", "cpu")

    def ours() -> Any:
        return fm.matching_attention(
            x.query, x.support, x.labels, work.C, similarity="dot", scale=x.scale
        )

    eager = [m.one_hot, m.index_add] if supports <= DENSE else [m.index_add]
    steps = [m.torch_step(x, work, ours)]
    for function in eager:
        call = lambda f=function: m.head("log_probs", x, f(work, x))  # noqa: E731
        steps.append(m.torch_step(x, work, call))
    own, *others = medians(steps)
    memory = [_memory.extra(step, "cpu") for step in steps]
    flops = (3 if backward else 1) * 2.0 * supports * work.Q * features
    floor = 1e3 * flops / (_floors.fma_peak(torch.get_num_threads()) or float("inf"))
    return {
        "S": supports,
        "D": features,
        "backward": backward,
        "threads": torch.get_num_threads(),
        "ours_ms": own,
        "eager_ms": min(others),
        "floor_ms": floor,
        "ours_bytes": memory[0],
        "eager_bytes": min((b for b in memory[1:] if b is not None), default=None),
    }


def held_to_sse2() -> dict[str, Any]:
    """The point of the instruction sets, with neither side above SSE2."""
    command = [sys.executable, "-m", "benchmarks._matching_scaling", "--point"]
    done = subprocess.run(
        command, env=os.environ | SSE2, capture_output=True, text=True, check=True
    )
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def series() -> Iterator[tuple[str, dict[str, Any]]]:
    """All points, named by the axis that they lie on."""
    threads = torch.get_num_threads()
    for backward in (False, True):
        for supports in SUPPORTS if not backward else SUPPORTS[:-1]:
            yield "supports", point(supports, 64, backward)
        for features in FEATURES:
            yield "features", point(100, features, backward)
    for count in range(1, threads + 1):
        torch.set_num_threads(count)
        for backward in (False, True):
            yield "threads", point(20_000, 128, backward)
    torch.set_num_threads(threads)
    if _native.cpu_module is not None:
        chosen = _native.cpu_module.current_isa()
        for isa in _native.cpu_module.available_isas():
            _native.cpu_module.set_isa(isa)
            yield "instruction sets", {"isa": isa, **point(1_000, 64, True)}
        _native.cpu_module.set_isa(chosen)
        if "avx2" in _native.cpu_module.available_isas():
            yield "instruction sets", {"isa": "baseline, eager too", **held_to_sse2()}


def _pass(values: dict[str, Any]) -> str:
    return "forward+backward" if values["backward"] else "forward"


def plot(path: Path, points: list[tuple[str, dict[str, Any]]]) -> None:
    """Time against all axes and memory against supports: ours, eager PyTorch, the arithmetic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    axes = grid.flatten()
    for axis, name, key, label, unit in (
        (axes[0], "supports", "S", "supports (D=64)", "ms"),
        (axes[1], "features", "D", "features (S=100)", "ms"),
        (axes[2], "supports", "S", "supports (D=64)", "bytes"),
    ):
        for backward, style in ((False, "-"), (True, "--")):
            rows = [p for n, p in points if n == name and p["backward"] == backward]
            what = "forward+backward" if backward else "forward"
            for column, title, colour in (
                (f"ours_{unit}", "fastmeta", "C0"),
                (f"eager_{unit}", "eager PyTorch, best", "C1"),
                ("floor_ms", "arithmetic at peak", "0.6"),
            ):
                if unit == "bytes" and column == "floor_ms":
                    continue
                axis.loglog(
                    [r[key] for r in rows],
                    [
                        max(r[column] or 0, 1e5) / 2**20 if unit == "bytes" else r[column]
                        for r in rows
                    ],
                    style,
                    color=colour,
                    marker=".",
                    label=f"{title}, {what}",
                )
        axis.set_xlabel(label)
        axis.set_ylabel(
            "ms" if unit == "ms" else "MiB beyond the inputs, 0.1 or less at the bottom"
        )
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    bars = [p for n, p in points if n in ("threads", "instruction sets")]
    names = [
        p.get("isa") or f"{p['threads']} thread{'s' * (p['threads'] > 1)}, {_pass(p)}" for p in bars
    ]
    for offset, side, colour in ((-0.2, "ours", "C0"), (0.2, "eager", "C1")):
        ratios = [p[f"{side}_ms"] / p["ours_ms"] for p in bars]
        places = [i + offset for i in range(len(bars))]
        axes[3].barh(places, ratios, 0.4, color=colour)
    axes[3].set_yticks(range(len(bars)), names, fontsize=7)
    axes[3].set_xlabel(
        "time over fastmeta's\n(threads: S=20,000, D=128;\ninstruction sets: S=1,000, D=64)"
    )
    axes[3].invert_yaxis()
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Measure, print and write all points."""
    points = []
    for name, values in series():
        points.append((name, values))
        ahead = values["eager_ms"] / values["ours_ms"] if values["eager_ms"] else float("nan")
        print(f"{name:17s} ahead of eager {ahead:5.2f}  {values}", flush=True)
    rows = [
        {"axis": n, **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in p.items()}}
        for n, p in points
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matching_scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(folder / "matching_scaling.png", points)


if __name__ == "__main__":
    if sys.argv[1:] == ["--point"]:
        print(json.dumps(point(1_000, 64, True)))
        sys.exit()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
