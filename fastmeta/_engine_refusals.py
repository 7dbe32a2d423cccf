"""What keeps a module, or a call, from the engine; and how a layer is called in a message."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["NoProgram", "is_torchs", "label", "no_randomness", "refuse_hooks"]

_any_global_hook: Any = nn.modules.module._has_any_global_hook


class NoProgram(Exception):
    """No error but an answer: why a module, or a call, has no engine form."""


def refuse_hooks(model: nn.Module) -> None:
    """Raise `NoProgram` if calling a module would run more than its ``forward``."""
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            raise NoProgram(f"{label(name, module)} has hooks")
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise NoProgram(f"{label(name, module)} is compiled by torch.compile")
    if _any_global_hook():
        raise NoProgram("hooks of all modules are registered")


@contextmanager
def no_randomness() -> Iterator[None]:
    """Raise `NoProgram` if random numbers are drawn: another run would be another network."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    drew = False
    try:
        yield
    finally:
        drew = (
            not torch.equal(torch.get_rng_state(), before[0])
            or random.getstate() != before[1]
            or str(np.random.get_state()) != str(before[2])  # noqa: NPY002
        )
        if drew:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])  # noqa: NPY002
    if drew:
        raise NoProgram("the forward pass draws random numbers")


def label(name: str, module: nn.Module) -> str:
    kind = type(module)
    title = f"nn.{kind.__name__}" if is_torchs(module) else kind.__name__
    return f"layer {name!r} ({title})" if name else f"the model ({title})"


def is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")
