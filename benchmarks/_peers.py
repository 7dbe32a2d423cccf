"""Optional peers: imported when installed, named with the reason when not."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class AbsentError(Exception):
    """A contestant that cannot take part, and why."""


class _Placeholder(type):
    """A class whose every attribute is a class again: enough to import, name and subclass."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__call__(cls)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.made: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        self.made.append(spec.name)
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: getattr(_Placeholder(spec.name, (), {}), name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _placeholders(*names: str) -> Iterator[None]:
    """Let a peer be imported without packages that only its data sets need."""
    missing = tuple(
        n for n in names if n not in sys.modules and importlib.util.find_spec(n) is None
    )
    finder = _Finder(missing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


def peer(module: str, without: tuple[str, ...] = ()) -> Any:
    """Import ``module``, or raise `AbsentError` that says why not.

    Args:
        module: Name to import.
        without: Packages that the peer imports for parts that no benchmark touches (``torchvision``
            for data sets): placeholders stand in for them where they are not installed.
    """
    package = module.split(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise AbsentError(f"{package} is not installed")
    try:
        with warnings.catch_warnings(), _placeholders(*without):
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # old packages fail in many ways; all mean the same here
        raise AbsentError(f"{package} does not import: {type(error).__name__}: {error}") from error


@contextmanager
def double(jax: Any, dtype: str) -> Iterator[None]:
    """Within it JAX computes in float64, if ``dtype`` is that; else it would round silently."""
    if dtype != "float64":
        yield
        return
    try:
        switch = jax.enable_x64
    except AttributeError:  # before jax 0.8
        switch = jax.experimental.enable_x64
    with switch(True):
        yield


def jax_step(jax: Any, dtype: str, function: Any, *args: Any) -> Any:
    """A step of the jitted function: waits for the result and returns its arrays as one list."""
    jitted = jax.jit(function)

    def step() -> list[Any]:
        with double(jax, dtype):
            outputs = jax.block_until_ready(jitted(*args))
        return jax.tree_util.tree_leaves(outputs)

    return step


def jax_for(device: str) -> Any:
    """JAX, ready to compute on ``device``."""
    jax = peer("jax")
    try:
        devices = jax.devices("gpu" if device == "cuda" else "cpu")
        jax.config.update("jax_default_device", devices[0])
    except RuntimeError as error:
        raise AbsentError(f"this jax has no {device} backend") from error
    return jax
