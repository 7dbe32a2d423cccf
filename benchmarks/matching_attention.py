"""Matching attention: from embeddings to class log-probabilities, five to a million supports.

Peers write the same formula: softmax over the supports, then class sums by a one-hot product, a
scatter or ``index_add``, and a logarithm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from benchmarks import _harness, _matching_peers


def cases(options: argparse.Namespace) -> Iterator[_harness.Case]:
    """Log-probabilities; with gradients to query, support and scale."""
    return _matching_peers.cases(options, "log_probs")


if __name__ == "__main__":
    sys.exit(_harness.run("matching_attention", "matching attention, log-probabilities", cases))
