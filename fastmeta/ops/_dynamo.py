"""What ``torch.compile`` is told about functions here, without importing it to tell it.

``torch._dynamo`` takes as long to import as torch itself, and a process that neither compiles nor
makes an optimizer never needs it. So it is told when somebody else has imported it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

__all__ = ["allow_in_graph"]

_NAME = "torch._dynamo"


class _AfterImport:
    """Finder that finds nothing, and has functions allowed once ``torch._dynamo`` was imported."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []
        self._asking_others = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            for function in self.functions:
                torch.compiler.allow_in_graph(function)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_after_import = _AfterImport()


def allow_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.allow_in_graph``, put off until ``torch._dynamo`` is imported."""
    if _NAME in sys.modules:
        torch.compiler.allow_in_graph(function)
        return function
    if not _after_import.functions:
        sys.meta_path.insert(0, _after_import)
    _after_import.functions.append(function)
    return function
