"""How matching attention scales: supports, features, threads and instruction sets.

``python -m benchmarks._matching_scaling DIR`` times forward and forward+backward of one task of 64
queries and 20 classes (dot, float32) beside eager PyTorch's one-hot and ``index_add``, and writes
``matching_scaling.json`` and ``.png`` to DIR. Median of calls in turns for half a second a point.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastmeta as fm
from benchmarks import _floors
from benchmarks import _matching as m
from benchmarks._matching import Work
from fastmeta import _native

SUPPORTS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FEATURES = (16, 64, 256, 1024, 4096)
DENSE = 20_000  # supports up to which eager PyTorch may write one-hot labels
SECONDS = 0.4


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


def point(supports: int, features: int, backward: bool, peers: bool = True) -> dict[str, Any]:
    """One workload: our time, the best of eager's, the floor of its arithmetic."""
    work = Work("scaling", 1, 20, supports, 64, features, backward=backward)
    x = m.tensors(work, m.draw(work, "float32"), "float32", "cpu")

    def ours() -> Any:
        return fm.matching_attention(
            x.query, x.support, x.labels, work.C, similarity="dot", scale=x.scale
        )

    eager = [m.one_hot, m.index_add] if supports <= DENSE else [m.index_add]
    steps = [m.torch_step(x, backward, ours)]
    for function in eager if peers else []:
        call = lambda f=function: m.head("log_probs", x, f(work, x))  # noqa: E731
        steps.append(m.torch_step(x, backward, call))
    own, *others = medians(steps)
    flops = (3 if backward else 1) * 2.0 * supports * work.Q * features
    floor = 1e3 * flops / (_floors.fma_peak(torch.get_num_threads()) or float("inf"))
    return {
        "S": supports,
        "D": features,
        "backward": backward,
        "threads": torch.get_num_threads(),
        "ours_ms": own,
        "eager_ms": min(others, default=None),
        "floor_ms": floor,
    }


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
        yield "threads", point(20_000, 128, True, peers=False)
    torch.set_num_threads(threads)
    if _native.cpu_module is not None:
        chosen = _native.cpu_module.current_isa()
        for isa in _native.cpu_module.available_isas():
            _native.cpu_module.set_isa(isa)
            yield "instruction sets", {"isa": isa, **point(1_000, 64, True)}
        _native.cpu_module.set_isa(chosen)


def plot(path: Path, points: list[tuple[str, dict[str, Any]]]) -> None:
    """Time against supports and against features: ours, eager PyTorch, the arithmetic alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, key, label in (
        (axes[0], "supports", "S", "supports (D=64)"),
        (axes[1], "features", "D", "features (S=100)"),
    ):
        for backward, style in ((False, "-"), (True, "--")):
            rows = [p for n, p in points if n == name and p["backward"] == backward]
            what = "forward+backward" if backward else "forward"
            for column, title, colour in (
                ("ours_ms", "fastmeta", "C0"),
                ("eager_ms", "eager PyTorch, best", "C1"),
                ("floor_ms", "arithmetic at peak", "0.6"),
            ):
                axis.loglog(
                    [r[key] for r in rows],
                    [r[column] for r in rows],
                    style,
                    color=colour,
                    marker=".",
                    label=f"{title}, {what}",
                )
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
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
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
