"""Memory of a meta-step against the number of inner steps, and over a long run.

The peak of one meta-step (forward, query loss, meta-gradient) above idle, for K = 1, 5, 20 and 50
inner steps: ours, learn2learn's documented loop, torch.func and plain autograd. Then a thousand
meta-steps of ours with an outer optimizer, after which the process must not have grown.

``python -m benchmarks.maml_memory [--quick] [--threads N] [--peers a|b] [--json DIR] [--plot DIR]``
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastmeta as fm
from benchmarks import _harness, _maml, _memory, _plots
from benchmarks._harness import Step
from benchmarks._maml import Work
from benchmarks._peers import AbsentError
from benchmarks.maml import Meeting

STEPS = (1, 5, 20, 50)
#: Growth over a long run up to which a process counts as not growing: an arena of the allocator.
ALLOWED_MIB = 4.0


def contestants(meeting: Meeting) -> dict[str, Callable[[str], Step]]:
    """Who is measured; of torch.func the order that is right through batch norm."""
    return {
        "fastmeta": meeting.ours(),
        "fastmeta, vmap strategy": meeting.ours("vmap"),
        "autograd loop": meeting.autograd,
        "torch.func vmap(grad)": meeting.functional("vmap(grad)"),
        "learn2learn": meeting.learn2learn,
    }


def peak(name: str, work: Work, options: argparse.Namespace) -> float | str | None:
    """MiB of one meta-step above idle, or why there is no such number.

    The step is the first of its size, so that what a library keeps for the next one counts as well;
    a tiny one before it has loaded the code.
    """
    _harness.configure(options)
    try:
        contestants(Meeting(_maml.QUICK[-1], options))[name]("float32")()
        extra = _memory.extra(contestants(Meeting(work, options))[name]("float32"), options.device)
    except AbsentError as error:
        return str(error)
    return None if extra is None else extra / 2**20


def peaks(work: Work, options: argparse.Namespace) -> dict[str, dict[int, float | None]]:
    """`peak` by contestant and number of steps, each in a process of its own (--quick: in this)."""
    found: dict[str, dict[int, float | None]] = {}
    wanted = options.peers.split("|") if options.peers else [""]
    names = [
        name
        for name in contestants(Meeting(work, options))
        if name.startswith("fastmeta") or any(p in name for p in wanted)
    ]
    for count in STEPS[:2] if options.quick else STEPS:
        for name in names:
            args = (name, dataclasses.replace(work, K=count), options)
            if options.quick:
                result = peak(*args)
            else:
                print(f"  ... {name}, K={count}", end="\r", flush=True)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    result = pool.apply(peak, args)
            if isinstance(result, str):
                print(f"  - {name}, K={count}: {result}", flush=True)
            else:
                found.setdefault(name, {})[count] = result
                if options.json:  # as it comes: the longest take minutes
                    options.json.mkdir(parents=True, exist_ok=True)
                    (options.json / "maml_memory.json").write_text(json.dumps(found) + "\n")
    return found


def growth(work: Work, options: argparse.Namespace, steps: int) -> float:
    """MiB by which the process grew from the first tenth of a training run to its end."""
    model = _maml.module(work).float()
    xs, ys, xq, yq = _maml.tensors(_maml.data(work), "float32", options.device)
    maml = fm.MAML(model, lr=work.lr, steps=work.K, loss="mse")
    optimizer = torch.optim.SGD(maml.parameters(), lr=1e-4)
    before = 0
    for step in range(steps):
        if step == steps // 10:
            gc.collect()
            before = _memory.resident()
        optimizer.zero_grad()
        maml.loss(xs, ys, xq, yq).backward()
        optimizer.step()
    gc.collect()
    return (_memory.resident() - before) / 2**20


def table(found: dict[str, dict[int, float | None]]) -> str:
    """`peaks` for people."""
    counts = sorted({k for row in found.values() for k in row})
    width = max(map(len, found))
    lines = ["  " + " " * width + "".join(f"{f'K={k}':>9}" for k in counts) + "   MiB above idle"]
    for name, row in found.items():
        cells = ["" if row.get(k) is None else f"{row[k]:.1f}" for k in counts]
        lines.append("  " + name.ljust(width) + "".join(f"{c:>9}" for c in cells))
    return "\n".join(lines)


def plot(path: Path, title: str, found: dict[str, dict[int, float | None]]) -> None:
    """Memory against steps, both on logarithmic axes."""
    plt = _plots.pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, row in found.items():
        known = {k: v for k, v in row.items() if v is not None}
        style = "o-" if name.startswith("fastmeta") else "o--"
        axis.plot(list(known), list(known.values()), style, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("inner steps K")
    axis.set_ylabel("peak of a meta-step above idle, MiB")
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _plots.save(path, figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts; 1 if the process grew."""
    options = _harness.parser("python -m benchmarks.maml_memory", "memory of MAML").parse_args(argv)
    _harness.configure(options)
    work = _maml.QUICK[-1] if options.quick else _maml.memory_work()
    facts: dict[str, Any] = _harness.machine(options)
    print(f"== maml_memory: peak memory of a meta-step\n{_harness.header(facts)}\n\n{work.title}")
    found = peaks(work, options)
    print(table(found), flush=True)
    steps = 50 if options.quick else 1000
    grown = growth(_maml.QUICK[0] if options.quick else _maml.FULL[1], options, steps)
    print(f"\n{steps} meta-steps: grew by {grown:.1f} MiB ({ALLOWED_MIB:.0f} allowed)")
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": "maml_memory",
            "machine": facts,
            "work": work.title,
            "mib": found,
            "meta_steps": steps,
            "grown_mib": round(grown, 2),
        }
        (options.json / "maml_memory.json").write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        plot(options.plot / "maml_memory.png", work.title.replace(f"K={work.K}", "K steps"), found)
    return int(grown > ALLOWED_MIB)


if __name__ == "__main__":
    sys.exit(main())
