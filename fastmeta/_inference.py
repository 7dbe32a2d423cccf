"""Calls under ``torch.inference_mode``, in which no inner gradient can be had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["outside_inference", "usable"]


@contextlib.contextmanager
def outside_inference() -> Iterator[None]:
    """Out of ``torch.inference_mode``, in which no inner gradient can be had, into ``no_grad``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def usable(*inputs: Any) -> tuple[Any, ...]:
    """Copies of inference tensors, which autograd cannot save; all else as it is."""
    return tuple(t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in inputs)
