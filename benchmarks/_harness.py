"""Times contestants beside each other, fairly.

For each case: every contestant is built, its first call timed (compilation included), its outputs
compared with float64 truth, and only those that are right are timed. Then all take turns, round
after round: a turn is a short pause (so that another library's spinning threads fall asleep), an
untimed warm-up and one timed sample of about 20 milliseconds or one call: as in a training loop,
all threads are awake. What is reported is the median over the rounds with its quartiles, the
contestant's time over ours, the extra memory of a call, and the distance of ours from the physical
floor. Who could not take part is listed with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _floors, _memory, _plots
from benchmarks._peers import AbsentError

Step = Callable[[], Sequence[Any]]

#: Relative error (Frobenius norm, worst output) up to which a contestant counts as right.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: Shown in the tables.
        build: Takes a dtype name and returns the step, a function without arguments that does the
            work once and returns its outputs; raises `AbsentError` when it cannot take part.
        kind: ``"ours"``, ``"eager"`` (plain PyTorch), ``"compiled"`` (torch.compile), ``"jax"`` or
            ``"library"``.
        tolerance: Replaces that of the case, where the peer computes something a little different;
            ``note`` then says what.
        note: Shown beside the name.
    """

    name: str
    build: Callable[[str], Step]
    kind: str = "library"
    tolerance: float | None = None
    note: str = ""


@dataclass
class Case:
    """One workload: contestants, the truth they are held to, and the least work it takes.

    Attributes:
        name: Of the workload, with its shape.
        contestants: In the order of the table.
        truth: Computes the outputs in float64.
        flops: Floating-point operations of the arithmetic that no program can skip.
        traffic: Bytes that have to be read or written at least once.
        checks: Dtypes in which each contestant is compared with the truth before it is timed, and
            the tolerances. Empty: the dtype of the run with `TOLERANCE`.
    """

    name: str
    contestants: list[Contestant]
    truth: Callable[[], Sequence[Any]]
    flops: float
    traffic: float
    checks: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """What was measured of one contestant; times in seconds, memory in bytes."""

    name: str
    kind: str
    note: str = ""
    absent: str = ""
    first: float = 0.0
    error: float = 0.0
    first_checked: str | None = None  # dtype that `error` is of
    memory: float | None = None
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over the rounds."""
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high


def as_float64(value: Any) -> np.ndarray:
    """A torch tensor, JAX array or number as a float64 NumPy array."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().cpu().numpy()
    return np.asarray(value).astype(np.float64)


def relative_error(outputs: Sequence[Any], truth: Sequence[Any]) -> float:
    """Worst relative Frobenius distance over the outputs; infinite for a wrong shape or NaN."""
    if len(outputs) != len(truth):
        raise ValueError(f"{len(outputs)} outputs, {len(truth)} wanted")
    scale = max(np.linalg.norm(as_float64(t)) / max(1, np.sqrt(as_float64(t).size)) for t in truth)
    worst = 0.0
    for output, wanted in zip(outputs, truth, strict=True):
        got, want = as_float64(output), as_float64(wanted)
        if got.shape != want.shape:
            return float("inf")
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite]):
            return float("inf")
        # Against the largest output where one is zero (a bias before batch norm has no gradient).
        size = max(np.linalg.norm(want[finite]), 1e-3 * scale * np.sqrt(max(1, want.size)))
        error = float(np.linalg.norm(got[finite] - want[finite]) / size)
        worst = max(worst, float("inf") if np.isnan(error) else error)
    return worst


def _clock(options: argparse.Namespace, step: Step, number: int) -> float:
    """Seconds a call, over ``number`` calls; by CUDA events on a GPU."""
    if options.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(number):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / number
    begin = time.perf_counter()
    for _ in range(number):
        step()
    return (time.perf_counter() - begin) / number


def _prepare(
    options: argparse.Namespace, case: Case, contestant: Contestant, truth: Sequence[Any]
) -> tuple[Result, Step | None]:
    """Build and check one contestant; the step is None when it takes no part."""
    result = Result(contestant.name, contestant.kind, contestant.note)
    checks = case.checks or {options.dtype: TOLERANCE[options.dtype]}
    try:
        step = None
        for dtype, tolerance in checks.items():
            if dtype == "float64" and contestant.kind == "compiled":
                continue  # compiled twice for nothing: its eager source is checked
            begin = time.perf_counter()
            built = contestant.build(dtype)
            outputs = built()
            first = time.perf_counter() - begin
            error = relative_error(outputs, truth)
            result.error = error if result.first_checked is None else result.error
            result.first_checked = dtype if result.first_checked is None else result.first_checked
            allowed = contestant.tolerance or tolerance
            if not error <= allowed:
                result.absent = (
                    f"WRONG: relative error {error:.1e} in {dtype}, {allowed:.0e} allowed"
                )
                return result, None
            if dtype == options.dtype:
                step, result.first = built, first
        if step is None:
            step = contestant.build(options.dtype)
        result.memory = _memory.extra(step, options.device)
        return result, step
    except AbsentError as error:
        result.absent = str(error)
    except Exception as error:
        if contestant.kind == "ours":
            raise
        first_line = (str(error).splitlines() or [""])[0]
        result.absent = f"failed: {type(error).__name__}: {first_line[:90]}"
    return result, None


def measure(options: argparse.Namespace, case: Case) -> list[Result]:
    """Check all contestants of a case, then time them by turns."""
    wanted = [c for c in case.contestants if _selected(options, c)]
    truth = [as_float64(t) for t in case.truth()]
    prepared = [_prepare(options, case, c, truth) for c in wanted]
    running = [(result, step) for result, step in prepared if step is not None]
    gc.collect()
    numbers = []
    for _, step in running:
        step()
        once = _clock(options, step, 1)
        numbers.append(max(1, min(1000, round(options.sample / max(once, 1e-7)))))
    started, rounds = time.perf_counter(), 0
    while running and rounds < 25:
        if rounds >= 5 and time.perf_counter() - started > options.seconds:
            break
        turn = list(zip(running, numbers, strict=True))
        shift = rounds % len(turn)
        for (result, step), number in turn[shift:] + turn[:shift]:
            if len(result.times) >= 3 and sum(result.times) > options.seconds:
                continue  # a call of seconds: three samples are enough
            time.sleep(0.002)
            if number > 1 or not result.times or result.median < 0.5:
                _clock(options, step, max(1, number // 4))
            result.times.append(_clock(options, step, number))
        rounds += 1
    return [result for result, _ in prepared]


def _selected(options: argparse.Namespace, contestant: Contestant) -> bool:
    if contestant.kind == "ours" or not options.peers:
        return True
    return any(p in contestant.name for p in options.peers.split("|"))


def summarise(options: argparse.Namespace, case: Case, results: list[Result]) -> dict[str, Any]:
    """The case as plain values, for JSON and the table."""
    timed = [r for r in results if r.times]
    ours = next((r.median for r in timed if r.kind == "ours"), None)  # None if it was wrong
    peers = [r for r in timed if r.kind != "ours"]
    best = min(peers, key=lambda r: r.median, default=None)
    eager = min((r for r in peers if r.kind == "eager"), key=lambda r: r.median, default=None)
    floor = 0.0  # not measured for tiny shapes
    if not options.quick:
        floor = _floors.floor_seconds(
            options.device, options.threads, case.flops, case.traffic, options.dtype
        )
    rows = [
        {
            "name": r.name,
            "kind": r.kind,
            "ms": r.median * 1e3,
            "quartiles_ms": [q * 1e3 for q in r.quartiles],
            "times_ours": r.median / ours if ours else None,
            "first_ms": r.first * 1e3,
            "memory_mib": None if r.memory is None else r.memory / 2**20,
            "error": r.error,
            "note": r.note,
        }
        for r in timed
    ]
    return {
        "case": case.name,
        "quick": options.quick,
        "gflop": case.flops / 1e9,
        "traffic_mib": case.traffic / 2**20,
        "floor_ms": floor * 1e3,
        "of_floor": floor / ours if ours else None,
        "rounds": len(timed[0].times) if timed else 0,
        "ahead_of_best": best.median / ours if best and ours else None,
        "best": best.name if best else None,
        "ahead_of_eager": eager.median / ours if eager and ours else None,
        "eager": eager.name if eager else None,
        "rows": rows,
        "ours_wrong": any(r.kind == "ours" and r.absent.startswith("WRONG") for r in results),
        "absent": {r.name: r.absent for r in results if r.absent},
    }


def table(summary: dict[str, Any]) -> str:
    """The case for people."""
    head = ("", "ms", "quartiles", "/ ours", "first ms", "MiB", "error")
    lines = []
    for row in summary["rows"]:
        low, high = row["quartiles_ms"]
        memory = row["memory_mib"]
        lines.append(
            (
                row["name"] + (f" ({row['note']})" if row["note"] else ""),
                f"{row['ms']:.3f}",
                f"{low:.3f} to {high:.3f}",
                "" if row["times_ours"] is None else f"{row['times_ours']:.2f}",
                f"{row['first_ms']:.0f}",
                "" if memory is None else f"{memory:.1f}",
                f"{row['error']:.0e}",
            )
        )
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [f"\n{summary['case']}"]
    for line in [head, *lines]:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        text.append("  " + "  ".join(cells).rstrip())
    for name, why in summary["absent"].items():
        text.append(f"  - {name}: {why}")
    if summary["ahead_of_best"] and not summary["quick"]:
        eager = ""
        if summary["ahead_of_eager"]:
            eager = f", of eager ({summary['eager']}) by {summary['ahead_of_eager']:.2f}"
        text.append(
            f"  ahead of the best ({summary['best']}) by {summary['ahead_of_best']:.2f}{eager}; "
            f"floor of {summary['gflop']:.3g} GFLOP and {summary['traffic_mib']:.3g} MiB "
            f"{summary['floor_ms']:.3f} ms, {100 * summary['of_floor']:.0f}% of it reached"
        )
    return "\n".join(text)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the run was made."""
    import fastmeta as fm

    info = fm.backend_info()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    peak = gemm = None
    if not options.quick:
        peak = _floors.fma_peak(options.threads)
        gemm = _floors.gemm_peak(options.device, options.threads)
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": options.threads,
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastmeta": info["version"],
        "isa": info["isa"],
        "ops": {op: on[options.device] for op, on in info["ops"].items()},
        "dtype": options.dtype,
        "device": options.device,
        "fma_gflops": None if peak is None else round(peak / 1e9),
        "gemm_gflops": None if gemm is None else round(gemm / 1e9),
    }
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def header(facts: dict[str, Any]) -> str:
    """`machine` for people."""
    ops = {op: on for op, on in facts["ops"].items() if not op.endswith("backward")}
    native = [op for op, on in ops.items() if on == "native"]
    rest = [op for op, on in ops.items() if on != "native"]
    lines = [
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, "
        f"fastmeta {facts['fastmeta']}, {facts['dtype']}, load {facts['load_before']}",
        f"native ({facts['isa']}): {', '.join(native) or 'none'}"
        + (f"; on the reference: {', '.join(rest)}" if rest else ""),
    ]
    if facts["gemm_gflops"]:
        fma = f"{facts['fma_gflops']} GFLOP/s" if facts["fma_gflops"] else "unknown (no compiler)"
        lines.append(f"FMA peak {fma}, torch mm {facts['gemm_gflops']} GFLOP/s")
    return "\n".join(lines)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    p = argparse.ArgumentParser(prog=prog, description=description)
    dtypes = ("float32", "float64", "bfloat16", "float16")
    add = p.add_argument
    add("--quick", action="store_true", help="tiny shapes: does everything run and agree?")
    add("--compile", action="store_true", help="with peers that take long to compile (minutes)")
    add("--cases", default="", help="only cases whose name contains one of these: a|b")
    add("--peers", default="", help="only peers whose name contains one of these: a|b")
    add("--threads", type=int, default=None, help="threads of every contestant (all cores)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=dtypes)
    add("--seconds", type=float, default=None, help="time spent on a case (5; quick: 0.2)")
    add("--json", type=Path, metavar="DIR", help="write DIR/<benchmark>.json")
    add("--plot", type=Path, metavar="DIR", help="write DIR/<benchmark>.png, needs matplotlib")
    add("--fail-behind", action="store_true", help="exit with 1 where eager PyTorch is faster")
    return p


def configure(options: argparse.Namespace) -> None:
    """Give every library the same cores and threads, before any of them makes its pool."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if options.threads is None:
        options.threads = len(cores) if cores else (os.cpu_count() or 1)
    if cores and options.threads < len(cores) and options.device == "cpu":
        os.sched_setaffinity(0, cores[: options.threads])  # XLA sizes its pool by it
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        _memory.keep_freed()
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 5.0
    options.sample = 2e-4 if options.quick else 2e-2
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda, but torch sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def _write(path: Path, name: str, facts: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def short(value: Any) -> Any:
        """Four digits are more than any clock here is good for."""
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    content = short({"benchmark": name, "machine": facts, "cases": cases})
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(
    name: str,
    description: str,
    cases: Callable[[argparse.Namespace], Iterable[Case]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one benchmark file from its command line; returns the exit status."""
    options = parser(f"python -m benchmarks.{name}", description).parse_args(argv)
    configure(options)
    facts = machine(options)
    print(f"== {name}: {description}\n{header(facts)}", flush=True)
    gc.collect()
    gc.freeze()  # or every collection would walk all that was imported
    chosen = options.cases.split("|")
    summaries = []
    for case in cases(options):
        if any(part in case.name for part in chosen):
            summaries.append(summarise(options, case, measure(options, case)))
            print(table(summaries[-1]), flush=True)
            if options.json:  # after every case, so that a run that is stopped leaves what it has
                _write(options.json / f"{name}.json", name, facts, summaries)
    gc.unfreeze()
    if not summaries:
        print(f"no case is named like {options.cases!r}")
        return 2
    if options.plot:
        _plots.panels(options.plot / f"{name}.png", name, facts, summaries)
        _plots.overview(options.plot / f"{name}_overview.png", name, facts, summaries)
    wrong = [s["case"] for s in summaries if s["ours_wrong"]]
    for name in wrong:
        print(f"WRONG: {name}")
    if wrong or options.quick:
        print("\ntiny shapes: the times say nothing" if options.quick else "")
        return 1 if wrong else 0
    behind = [s for s in summaries if (s["ahead_of_eager"] or 1.0) < 1.0]
    for s in behind:
        print(f"BEHIND eager ({s['eager']}): {s['case']}: {s['ahead_of_eager']:.2f}")
    return 1 if behind and options.fail_behind else 0
