"""Layers called under ``torch.func.vmap`` with weights of each task, run by the ops made for that.

torch maps a convolution with weights of each task to a grouped one, whose second derivative loops
over the groups, and batch norm to one of all tasks' channels, whose second derivative is a dozen
passes over memory. The ops of ``fastmeta.ops.task_layers`` compute the same, and stay one call.
Here is where they are taken: on the CPU and CUDA, with their kernels loaded, in float32 and float64
without autocast; and only where a tensor is mapped, for a layer that all tasks share is already one
call. Convolutions that may round to TF32 are left to cuDNN, which is as fast with it; linear layers
to torch, which maps them to one batched product, as their derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta import _native
from fastmeta.ops._task_norm import norm
from fastmeta.ops.task_layers import _conv, _conv_size, allow_tf32_conv

__all__ = ["batch_norm", "conv2d"]

#: By kind of device, what has the kernels; None where they are not loaded.
_KERNELS = {"cpu": _native.cpu_module, "cuda": _native.cuda_module}

_mapped = torch._C._functorch.is_batchedtensor


def _takes(mapped: Tensor, *others: Tensor | None) -> bool:
    dtype, device = mapped.dtype, mapped.device
    return (
        _mapped(mapped)
        and _KERNELS.get(device.type) is not None
        and dtype in (torch.float32, torch.float64)
        and all(t is None or (t.dtype == dtype and t.device == device) for t in others)
        and not torch.is_autocast_enabled(device.type)
    )


def _may_round(tensor: Tensor) -> bool:
    """Whether a convolution of it by torch may round to TF32."""
    return (
        tensor.is_cuda
        and tensor.dtype == torch.float32
        and allow_tf32_conv()
        and torch.cuda.get_device_capability(tensor.device)[0] >= 8
    )


def _pair(value: Any) -> tuple[int, int] | None:
    """Two integers, or None for what is left to torch."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return (value[0], value[0]) if len(value) == 1 else tuple(value[:2])
    return None


def _padding(
    value: str | int | Sequence[int], size: Sequence[int], dilation: Any
) -> tuple[int, int] | None:
    """Rows and columns on each side; None where the sides differ."""
    if value == "valid":
        return 0, 0
    if value != "same":
        return _pair(value)
    steps = _pair(dilation)
    if steps is None:
        return None
    total = [d * (k - 1) for d, k in zip(steps, size, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def _one(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """``F.conv2d`` with weights of each task; None for what is left to torch, errors among it."""
    if input.dim() != 4 or weight.dim() != 4:
        return None
    pairs = [_pair(stride), _padding(padding, weight.shape[2:], dilation), _pair(dilation)]
    if any(p is None for p in pairs) or (padding == "same" and pairs[0] != (1, 1)):
        return None
    if not _takes(weight, input, bias) or _may_round(weight):
        return None
    geometry = [n for p in pairs if p is not None for n in p] + [groups]
    channels, outputs = input.shape[1], weight.shape[0]
    if groups < 1 or channels != weight.shape[1] * groups or outputs % groups or not channels:
        return None
    if bias is not None and bias.shape != (outputs,):
        return None
    x, w = input.unsqueeze(0), weight.unsqueeze(0)
    if min(geometry[:2]) < 1 or min(geometry[2:4]) < 0 or min(_conv_size(x, w, geometry)) < 1:
        return None
    return _conv(x, w, _one(bias), *geometry).squeeze(0)  # type: ignore[no-any-return]


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """``F.batch_norm`` by batch statistics; None for what is left to torch."""
    if input.dim() < 2 or not _takes(input, weight, bias):
        return None
    rows, channels = input.shape[:2]
    if rows * math.prod(input.shape[2:]) < 2:  # torch has a word to say about it
        return None
    if any(t is not None and t.shape != (channels,) for t in (weight, bias)):
        return None
    x = input.unsqueeze(0)
    x = x.unsqueeze(3) if x.dim() == 3 else x.flatten(3)
    return norm(x, _one(weight), _one(bias), eps)[0].reshape(input.shape)  # type: ignore[no-any-return]
