"""Runs the benchmarks: ``python -m benchmarks [names ...] [options]``; without names, all."""

from __future__ import annotations

import subprocess
import sys

#: Run by the command line as well, but no table of times.
OTHERS = ("maml_memory",)
NAMES = (
    "matching_attention",
    "matching_nll",
    "matching_double_backward",
    "segment_mean",
    "sgd_update",
    "momentum_update",
    "adam_update",
    "task_layers",
    "maml",
)


def main(argv: list[str] | None = None) -> int:
    """Run each named benchmark in a process of its own, with the same options."""
    argv = sys.argv[1:] if argv is None else argv
    names = [a for a in argv if a in (*NAMES, *OTHERS)]
    options = [a for a in argv if a not in names]
    if options and not options[0].startswith("-"):
        print(f"no benchmark {options[0]!r}; there are: {', '.join((*NAMES, *OTHERS))}")
        return 2
    status = 0
    for name in names or (*NAMES, *OTHERS):
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False)
        status = max(status, done.returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
