"""Checks of arguments, and the one form that their errors have.

Every message names the function, the argument, what was wanted and what came.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastmeta import _native

__all__ = [
    "IGNORE_INDEX",
    "check_choice",
    "check_float_tensor",
    "check_int_tensor",
    "check_integer",
    "check_labels",
    "check_num_classes",
    "fail",
    "is_number",
    "is_tracing",
]

#: Label of padding, in supports and in query targets (the ``ignore_index`` of torch's losses).
IGNORE_INDEX = -100

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(
    error: type[Exception], function: str, argument: str, wanted: str, got: object
) -> NoReturn:
    """Raise ``error`` with the message ``function: argument must be wanted, got got``."""
    raise error(f"{function}: {argument} must be {wanted}, got {got}")


def describe(value: object) -> str:
    """What came, in few words: dtype, shape and device of a tensor, else type and value."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_float_tensor(function: str, argument: str, value: Any, *, min_dim: int = 0) -> None:
    """Raise unless ``value`` is a real floating tensor of at least ``min_dim`` dimensions."""
    wanted = "a float32, float64, bfloat16 or float16 tensor"
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        fail(TypeError, function, argument, wanted, describe(value))
    if value.layout != torch.strided:
        fail(TypeError, function, argument, "a dense (strided) tensor", value.layout)
    if value.dim() < min_dim:
        shape = list(value.shape)
        fail(ValueError, function, argument, f"of at least {min_dim} dimensions", f"shape {shape}")


def check_int_tensor(function: str, argument: str, value: Any, *, device: torch.device) -> None:
    """Raise unless ``value`` is an integer tensor on ``device``."""
    if (
        not isinstance(value, Tensor)
        or value.dtype == torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        fail(TypeError, function, argument, "an integer tensor", describe(value))
    if value.layout != torch.strided:
        fail(TypeError, function, argument, "a dense (strided) tensor", value.layout)
    if value.device != device:
        fail(ValueError, function, argument, f"on {device}, like the other tensors", value.device)


def check_integer(
    function: str, argument: str, value: Any, low: int, high: int | None = None
) -> int:
    """The value as an int of at least ``low`` and below ``high``; raises for anything else.

    NumPy's integers are ints too. Tensors are not: to look at one could stall a stream.
    """
    number = value
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
            fail(TypeError, function, argument, _integer(low, high), describe(value))
        number = operator.index(value)
    if number < low or (high is not None and number >= high):
        fail(ValueError, function, argument, _integer(low, high), number)
    return number  # type: ignore[no-any-return]


def check_num_classes(function: str, value: Any) -> int:
    """The number of classes; kernels hold them in 32 bits."""
    number = check_integer(function, "num_classes", value, 1)
    if number >= 2**31:
        fail(ValueError, function, "num_classes", "below 2**31", number)
    return number


def _integer(low: int, high: int | None) -> str:
    return f"an integer of at least {low}" + ("" if high is None else f" and below {high}")


def is_number(value: Any) -> bool:
    """Whether the value is a real number, of NumPy's too: no bool, no tensor."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def check_choice(function: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        names = ", ".join(repr(c) for c in choices)
        fail(ValueError, function, argument, f"one of {names}", repr(value))


def is_tracing(*tensors: Tensor) -> bool:
    """Whether data cannot be looked at: compiling, exporting, fake, meta, or inside a transform."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    for t in tensors:  # noqa: SIM110 (a generator costs a small call more)
        if t.is_meta or isinstance(t, FakeTensor):
            return True
    return False


def check_labels(
    function: str,
    argument: str,
    labels: Tensor,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
) -> None:
    """Raise unless every label is in [0, num_classes) or ``ignore_index``.

    Only on the CPU and outside tracing: on CUDA the look would stall the stream. Kernels treat what
    gets past as padding.
    """
    if not labels.is_cpu or is_tracing(labels):
        return
    native = _native.cpu_module
    if native is not None and labels.dtype == torch.int64 and labels.is_contiguous():
        if native.labels_fit(labels.data_ptr(), labels.numel(), num_classes, ignore_index):
            return
    elif labels.numel() == 0:
        return
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        wanted = f"in [0, num_classes={num_classes}) or {ignore_index}"
        fail(ValueError, function, argument, wanted, int(labels[wrong][0]))
