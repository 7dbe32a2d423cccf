"""The update of an inner loop: all parameters of all tasks, one step, twice differentiable.

The workloads and their peers are in `benchmarks._update`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from benchmarks import _harness, _update


def cases(options: argparse.Namespace) -> Iterator[_harness.Case]:
    """Forward and backward."""
    return _update.cases("sgd", options)


if __name__ == "__main__":
    sys.exit(_harness.run("sgd_update", "inner-loop update of all tasks, forward+backward", cases))
