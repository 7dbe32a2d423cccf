"""What runs where, and why: ``fm.backend_info()`` and ``fastmeta info``."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

from fastmeta import _native
from fastmeta._version import __version__
from fastmeta.ops._define import OPS

__all__ = ["backend_info", "format_info"]


def backend_info() -> dict[str, Any]:
    """State of the compiled kernels on this machine.

    Returns:
        A dictionary of plain values: ``version``, ``python``, ``torch``, ``platform``, ``threads``;
        ``backend`` (the ``FASTMETA_BACKEND`` asked for); ``native`` (whether CPU kernels are
        loaded) and ``native_reason``; ``isa`` (instruction set whose kernels run), ``isa_reason``
        and ``isas`` (all that would run here); ``cuda`` (whether CUDA kernels are loaded) and
        ``cuda_reason``; ``build`` (what the build resolved: compiler, torch, architectures);
        ``ops``: for each op and each of ``cpu`` and ``cuda``, ``"native"`` or ``"reference"``.

    Example:
        >>> import fastmeta as fm
        >>> fm.backend_info()["ops"]["matching_attention"]["cpu"] in ("native", "reference")
        True
    """
    native = _native.cpu_module
    isas = native.available_isas() if native else []
    isa = native.current_isa() if native else None
    cap = os.environ.get("FASTMETA_CPU_ISA")
    if native is None:
        isa_reason = "no CPU kernels loaded"
    elif cap and isa == cap:
        isa_reason = f"FASTMETA_CPU_ISA={cap}"
    elif isa == native.default_isa():
        isa_reason = "the best that this machine and build have"
        if isa != isas[-1]:
            isa_reason = f"of what this machine and build have the fastest; not {isas[-1]}"
    else:
        isa_reason = "chosen by set_isa"
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "backend": _native.BACKEND,
        "native": native is not None,
        "native_reason": _native.cpu_reason,
        "isa": isa,
        "isa_reason": isa_reason,
        "isas": isas,
        "cuda": _native.cuda_module is not None,
        "cuda_reason": _cuda_reason(),
        "build": _native.build_info(),
        "ops": {op: {"cpu": _backend(op, "CPU"), "cuda": _backend(op, "CUDA")} for op in OPS},
    }


def _cuda_reason() -> str:
    if _native.cuda_module is not None and not torch.cuda.is_available():
        return "loaded, but torch sees no GPU"
    return _native.cuda_reason


def _backend(op: str, key: str) -> str:
    """Which implementation torch's dispatcher holds for the op: asked of it, not assumed."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmeta::{op}", key)
    return "native" if registered else "reference"


def format_info(info: dict[str, Any] | None = None) -> str:
    """`backend_info` as text for people."""
    info = backend_info() if info is None else info
    build = info["build"]
    cpu_state = "kernels loaded" if info["native"] else "reference"
    cuda_state = "CUDA kernels loaded" if info["cuda"] else "no CUDA kernels"
    lines = [
        f"fastmeta {info['version']}  (Python {info['python']}, torch {info['torch']}, "
        f"{info['platform']}, {info['threads']} threads)",
        f"  CPU    {cpu_state} ({info['native_reason']}), FASTMETA_BACKEND={info['backend']}",
        f"  ISA    {info['isa']} ({info['isa_reason']}; available: "
        f"{', '.join(info['isas']) or 'none'})",
        f"  CUDA   {cuda_state} ({info['cuda_reason']})",
    ]
    if build:
        lines.append(
            f"  built  {build.get('compiler', 'no compiler')}, against torch {build.get('torch')}, "
            f"to run on {build.get('torch_target')} and later"
            if build.get("native")
            else f"  built  pure Python ({build.get('reason')})"
        )
    width = max(len(op) for op in info["ops"])
    lines.append(f"  {'op':<{width}}  {'cpu':<10}cuda")
    lines += [f"  {op:<{width}}  {on['cpu']:<10}{on['cuda']}" for op, on in info["ops"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(format_info() + "\n")
