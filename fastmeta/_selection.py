"""Which parameters of a model adapt: what ``MAML(adapt=...)`` may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fastmeta.errors import describe, fail

Adapt = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | nn.Module | None


def check_model(model: Any) -> None:
    """Refuses what cannot be adapted whichever parameters are chosen."""
    if not isinstance(model, nn.Module):
        fail(TypeError, "MAML", "model", "an nn.Module", describe(model))
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        wanted = "an nn.Module that is not compiled by torch.jit, whose weights cannot be replaced"
        fail(TypeError, "MAML", "model", wanted, type(model).__name__)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            wanted = "initialized: run it once on an input of its shape"
            fail(ValueError, "MAML", "model", wanted, f"the lazy parameter {name!r}")


def selected(model: nn.Module, adapt: Adapt) -> frozenset[str]:
    """Names of the parameters that ``adapt`` stands for."""
    parameters = dict(model.named_parameters())
    if adapt is None:
        names = set(parameters)
    elif isinstance(adapt, nn.Module):
        inside = {id(p) for p in adapt.parameters()}
        names = {name for name, p in parameters.items() if id(p) in inside}
    elif isinstance(adapt, str) or (
        isinstance(adapt, Sequence) and all(isinstance(a, str) for a in adapt)
    ):
        names = set()
        for pattern in [adapt] if isinstance(adapt, str) else adapt:
            found = {n for n in _aliases(model) if _matches(n, pattern)}
            if not found:
                wanted = f"names or patterns of the model's parameters {sorted(parameters)}"
                fail(ValueError, "MAML", "adapt", wanted, repr(pattern))
            names |= {_aliases(model)[n] for n in found}
    elif callable(adapt):
        names = {name for name, p in parameters.items() if adapt(name, p)}
    else:
        wanted = "names, patterns, a predicate, a submodule or None"
        fail(TypeError, "MAML", "adapt", wanted, describe(adapt))
    if not any(parameters[name].requires_grad for name in names):
        got = f"{sorted(names)}" if names else "no match"
        wanted = "such that a parameter of the model that has requires_grad=True adapts"
        fail(ValueError, "MAML", "model" if adapt is None else "adapt", wanted, got)
    return frozenset(names)


def _aliases(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter, the first name of it: tied parameters have several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(p), name) for name, p in named}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
