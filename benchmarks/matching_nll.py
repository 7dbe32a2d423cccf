"""Matching attention with the negative log-likelihood of the queries' labels.

Beside the peers of ``matching_attention`` a formula that needs no class sums: the difference of two
log-sum-exps over the supports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from benchmarks import _harness, _matching_peers


def cases(options: argparse.Namespace) -> Iterator[_harness.Case]:
    """The mean loss; with gradients to query, support and scale."""
    return _matching_peers.cases(options, "nll")


if __name__ == "__main__":
    sys.exit(_harness.run("matching_nll", "matching attention with the loss fused", cases))
