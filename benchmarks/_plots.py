"""Pictures of what a benchmark measured; they need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "ours": "#1b6ca8",
    "eager": "#9aa5b1",
    "compiled": "#d98e04",
    "jax": "#3f9b6c",
    "library": "#7a5195",
}


def pyplot() -> Any:
    """Matplotlib without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _where(facts: dict[str, Any]) -> str:
    return (
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['dtype']}"
    )


def save(path: Path, figure: Any) -> None:
    """Write and close a figure."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def panels(path: Path, title: str, facts: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    """Each contestant's time over ours, a panel a case, on a logarithmic axis."""
    summaries = [s for s in summaries if s["ahead_of_best"]]
    if not summaries:
        return
    plt = pyplot()
    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    most = max(len(s["rows"]) for s in summaries)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, rows * (0.28 * most + 1.1)), squeeze=False
    )
    for axis in axes.flat[len(summaries) :]:
        axis.axis("off")
    for axis, summary in zip(axes.flat, summaries, strict=False):
        bars = sorted(summary["rows"], key=lambda r: r["ms"])
        values = [r["times_ours"] for r in bars]
        shades = [COLOURS[r["kind"]] for r in bars]
        drawn = axis.barh([r["name"] for r in bars], values, color=shades)
        axis.bar_label(drawn, [f"{v:.2g}" for v in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *values) / 1.2, max(values) * 1.8)
        axis.axvline(1, color="#1b6ca8", linewidth=0.8)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(summary["case"], fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{title}: time over fastmeta's, less is faster ({_where(facts)})",
        fontsize=10,
    )
    save(path, figure)


def overview(
    path: Path, title: str, facts: dict[str, Any], summaries: list[dict[str, Any]]
) -> None:
    """One axis: for each case the best peer of each kind, as its time over ours."""
    summaries = [s for s in summaries if s["ahead_of_best"]]
    if not summaries:
        return
    plt = pyplot()
    kinds = [k for k in COLOURS if k != "ours"]
    figure, axis = plt.subplots(figsize=(9.5, 1.2 + 0.62 * len(summaries)))
    for position, summary in enumerate(summaries):
        for offset, kind in enumerate(kinds):
            rows = [r for r in summary["rows"] if r["kind"] == kind and r["times_ours"]]
            if not rows:
                continue
            best = min(rows, key=lambda r: r["times_ours"])
            bar = axis.barh(
                position + 0.2 * (offset - 1.5), best["times_ours"], 0.18, color=COLOURS[kind]
            )
            times = best["times_ours"]
            number = f"{times:.2g}" if times < 10 else f"{times:.0f}"
            axis.bar_label(bar, [f"{best['name']} {number}"], padding=3, fontsize=7)
    axis.set_yticks(range(len(summaries)), [s["case"] for s in summaries], fontsize=8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.5), high * 4)
    axis.axvline(1, color=COLOURS["ours"], linewidth=0.8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[k]) for k in kinds]
    names = ["best eager PyTorch", "torch.compile", "JAX", "best library"]
    axis.legend(handles, names, fontsize=8, frameon=False, loc="lower right")
    axis.set_xlabel("time over fastmeta's: above 1 fastmeta is faster", fontsize=8)
    figure.suptitle(f"{title} ({_where(facts)})", fontsize=9, x=0.01, ha="left")
    axis.margins(y=0.01)
    save(path, figure)
