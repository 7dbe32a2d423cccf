"""Second derivatives of matching attention, as a gradient penalty or MAML over it asks for.

Each contestant computes the log-probabilities, their gradients, and the gradients of the inner
product of those with fixed directions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import _harness, _matching, _matching_peers


def cases(options: argparse.Namespace) -> Iterator[_harness.Case]:
    """Workloads that plain PyTorch has the room and the derivatives for (its cdist has none)."""
    works = [
        replace(work, second=True)
        for work in _matching.works(options)
        if work.backward and work.S < 10_000 and work.similarity != "euclidean"
    ]
    return _matching_peers.cases(options, "log_probs", works)


if __name__ == "__main__":
    sys.exit(_harness.run("matching_double_backward", "matching attention, second order", cases))
