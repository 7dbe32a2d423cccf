"""The step with momentum: all parameters of all tasks, with the state that it keeps.

The workloads and their peers are in `benchmarks._update`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from benchmarks import _harness, _update


def cases(options: argparse.Namespace) -> Iterator[_harness.Case]:
    """Forward and backward."""
    return _update.cases("momentum", options)


if __name__ == "__main__":
    sys.exit(
        _harness.run(
            "momentum_update", "inner-loop step with momentum of all tasks, forward+backward", cases
        )
    )
