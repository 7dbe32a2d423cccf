"""Loads the compiled kernels, once, and remembers what came of it.

``FASTMETA_BACKEND=auto`` (default) warns once when the extension is absent and goes on with the
reference; ``native`` makes its absence an error; ``reference`` leaves it unloaded on purpose.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the extension: its libraries carry torch's symbols

__all__ = ["BACKEND", "build_info", "cpu_module", "cpu_reason", "cuda_module", "cuda_reason"]

BACKEND = os.environ.get("FASTMETA_BACKEND", "auto").lower()
if BACKEND not in ("auto", "native", "reference"):
    raise ValueError(
        f"FASTMETA_BACKEND must be one of 'auto', 'native', 'reference', got {BACKEND!r}"
    )


def build_info() -> dict[str, Any]:
    """What setup.py resolved when it built the installed package; empty when it did not."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module, or None and why."""
    if BACKEND == "reference":
        return None, "FASTMETA_BACKEND=reference"
    try:
        return importlib.import_module(f"fastmeta.{name}"), "loaded"
    except ModuleNotFoundError:
        built = build_info()
        if built.get("native") is False:
            return None, f"not built ({built.get('reason', 'pure Python install')})"
        if name == "_C_cuda" and built and not built.get("cuda"):
            return None, f"not built ({built.get('cuda_reason')})"
        return None, f"not built: no fastmeta.{name} beside {Path(__file__).parent}"
    except ImportError as error:
        return None, f"did not load: {error}"


cpu_module, cpu_reason = _load("_C")
cuda_module: ModuleType | None = None
cuda_reason = "CPU kernels absent"
if cpu_module is not None:
    if torch.version.cuda is None:
        cuda_reason = f"this torch ({torch.__version__}) has no CUDA"
    else:
        cuda_module, cuda_reason = _load("_C_cuda")

if cpu_module is None and BACKEND == "native":
    raise ImportError(
        f"FASTMETA_BACKEND=native, but the compiled kernels are absent: {cpu_reason}. "
        "Install with a C++ compiler at hand (pip install .), or unset FASTMETA_BACKEND."
    )
if cpu_module is None and BACKEND == "auto":
    warnings.warn(
        f"fastmeta runs on its pure-PyTorch reference (same results, slower): kernels "
        f"{cpu_reason}. "
        "FASTMETA_BACKEND=reference says that this is meant; `fastmeta info` shows more.",
        RuntimeWarning,
        stacklevel=3,
    )
