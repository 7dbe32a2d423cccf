"""Arguments of the matching ops: checked, and folded to one task dimension."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastmeta.errors import (
    FLOAT_DTYPES,
    IGNORE_INDEX,
    check_choice,
    check_float_tensor,
    check_int_tensor,
    check_labels,
    check_num_classes,
    describe,
    fail,
    is_number,
    is_tracing,
)
from fastmeta.ops._define import acc_dtype
from fastmeta.ops._matching_reference import SIMILARITIES

__all__ = ["MatchingInputs", "mask_labels"]


class MatchingInputs:
    """Checked arguments of a matching op, with one task dimension: ``args`` goes to raw ops."""

    def __init__(
        self,
        function: str,
        query: Tensor,
        support: Tensor,
        labels: Tensor,
        num_classes: int,
        similarity: str,
        scale: float | Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        self.function = function
        check_choice(function, "similarity", similarity, SIMILARITIES)
        self.num_classes = num_classes = check_num_classes(function, num_classes)
        if (
            lengths is None
            and mask is None
            and weight is None
            and similarity != "additive"
            and _are_folded(query, support, labels)
        ):
            self._take_folded(query, support, labels, scale)
            return
        check_float_tensor(function, "query", query, min_dim=2)
        check_float_tensor(function, "support", support, min_dim=2)
        device = query.device
        if support.device != device:
            fail(ValueError, function, "support", f"on {device}, like query", support.device)
        autocast = torch.is_autocast_enabled(device.type)
        if query.dtype != support.dtype:
            if not autocast:
                fail(TypeError, function, "support", f"{query.dtype}, like query", support.dtype)
            dtype = torch.promote_types(query.dtype, support.dtype)
            query, support = query.to(dtype), support.to(dtype)
        acc = acc_dtype(query.dtype)
        self.out_dtype = acc if autocast else query.dtype
        if support.shape[-1] != query.shape[-1]:
            wanted = f"of shape [..., S, D={query.shape[-1]}], like query"
            fail(ValueError, function, "support", wanted, f"shape {list(support.shape)}")

        check_int_tensor(function, "labels", labels, device=device)
        if labels.dim() < 1 or labels.shape[-1] != support.shape[-2]:
            wanted = f"of shape [..., S={support.shape[-2]}], like support"
            fail(ValueError, function, "labels", wanted, f"shape {list(labels.shape)}")
        labels = mask_labels(function, labels, lengths, mask, device)
        check_labels(function, "labels", labels, num_classes)
        scale = _scale_tensor(function, scale, acc, device)
        if (similarity == "additive") != (weight is not None):
            wanted = "given with similarity='additive', and only then"
            got = f"{similarity=} with weight={weight is not None}"
            fail(ValueError, function, "weight", wanted, got)
        if weight is not None:
            check_float_tensor(function, "weight", weight, min_dim=1)
            if weight.shape[-1] != query.shape[-1] or weight.device != device:
                wanted = f"of shape [..., D={query.shape[-1]}] on {device}"
                got = f"{list(weight.shape)} on {weight.device}"
                fail(ValueError, function, "weight", wanted, got)
            weight = weight.to(acc)

        self.leading = self._leading(query, support, labels, scale, weight)
        self.args = (
            self._fold(query, 2),
            self._fold(support, 2),
            self._fold(labels, 1),
            self._fold(scale, 0) if scale.numel() != 1 else scale.reshape(1),
            None if weight is None else self._fold_weight(weight),
        )

    def _take_folded(
        self, query: Tensor, support: Tensor, labels: Tensor, scale: float | Tensor
    ) -> None:
        """The short way for what kernels take as it is: on small tasks the checks are the cost."""
        check_labels(self.function, "labels", labels, self.num_classes)
        acc = acc_dtype(query.dtype)
        self.out_dtype = acc if torch.is_autocast_enabled(query.device.type) else query.dtype
        scale = _scale_tensor(self.function, scale, acc, query.device)
        self.leading = query.shape[:1]
        if scale.dim() != 1 or scale.shape[0] != 1:
            if scale.numel() == 1:
                scale = scale.reshape(1)
            elif scale.shape != self.leading:
                self.leading = self._leading(query, support, labels, scale, None)
        operands = ((query, 2), (support, 2), (labels, 1))
        if self.leading != query.shape[:1]:
            query, support, labels = (self._fold(x, trailing) for x, trailing in operands)
        if scale.shape[0] != 1:
            scale = self._fold(scale, 0)
        self.args = query, support, labels, scale, None

    def _leading(
        self, query: Tensor, support: Tensor, labels: Tensor, scale: Tensor, weight: Tensor | None
    ) -> torch.Size:
        """The leading (task) dimensions that the operands broadcast to."""
        shapes = [query.shape[:-2], support.shape[:-2], labels.shape[:-1]]
        if scale.numel() != 1:
            shapes.append(scale.shape)
        if weight is not None and weight.dim() > 1:
            shapes.append(weight.shape[:-1])
        if all(shape == shapes[0] for shape in shapes):
            return shapes[0]
        try:
            return torch.broadcast_shapes(*shapes)
        except RuntimeError:
            got = ", ".join(str(list(shape)) for shape in shapes)
            wanted = "of leading dimensions that broadcast"
            fail(ValueError, self.function, "query, support, labels, scale", wanted, got)

    def _fold(self, tensor: Tensor, trailing: int) -> Tensor:
        """[..., *trailing] -> [T, *trailing]."""
        tail = tensor.shape[tensor.dim() - trailing :]
        if (
            len(self.leading) == 1
            and tensor.dim() == trailing + 1
            and tensor.shape[0] == self.leading[0]
        ):
            return tensor
        return tensor.expand(*self.leading, *tail).reshape(math.prod(self.leading), *tail)

    def _fold_weight(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0) if weight.dim() == 1 else self._fold(weight, 1)

    def targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Checked query targets [T, Q], ignored ones as -100."""
        query = self.args[0]
        check_int_tensor(self.function, "targets", targets, device=query.device)
        if targets.dim() < 1 or targets.shape[-1] != query.shape[1]:
            wanted = f"of shape [..., Q={query.shape[1]}], like query"
            fail(ValueError, self.function, "targets", wanted, f"shape {list(targets.shape)}")
        shape = targets.shape[:-1]
        try:
            fits = shape == self.leading or (
                torch.broadcast_shapes(shape, self.leading) == self.leading
            )
        except RuntimeError:
            fits = False
        if not fits:
            wanted = f"of leading shape {list(self.leading)}"
            fail(ValueError, self.function, "targets", wanted, f"shape {list(targets.shape)}")
        targets = targets.long()
        check_labels(self.function, "targets", targets, self.num_classes, ignore_index)
        if ignore_index != IGNORE_INDEX:
            targets = torch.where(targets == ignore_index, IGNORE_INDEX, targets)
        return self._fold(targets, 1)

    def restore(self, value: Tensor) -> Tensor:
        """[T, ...] -> [*leading, ...] in the output dtype."""
        if value.dtype != self.out_dtype:
            value = value.to(self.out_dtype)
        if len(self.leading) == 1:
            return value
        return value.reshape(*self.leading, *value.shape[1:])


def _are_folded(query: Tensor, support: Tensor, labels: Tensor) -> bool:
    """Whether operands are [T, Q, D], [T, S, D], [T, S] as kernels take them, on one device."""
    if not (
        isinstance(query, Tensor)
        and isinstance(support, Tensor)
        and isinstance(labels, Tensor)
        and (
            (query.is_cpu and support.is_cpu and labels.is_cpu)
            or (query.is_cuda and query.device == support.device == labels.device)
        )
        and query.layout == support.layout == labels.layout == torch.strided
        and query.dtype in FLOAT_DTYPES
        and support.dtype == query.dtype
        and labels.dtype == torch.int64
        and query.dim() == 3
        and support.dim() == 3
    ):
        return False
    shape, rows = query.shape, support.shape
    return shape[0] == rows[0] and shape[2] == rows[2] and labels.shape == rows[:2]


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device="cpu")


def _may_keep_tensors() -> bool:
    """Whether a tensor made now is an ordinary one, good for later calls."""
    return not (
        is_tracing()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def _scale_tensor(
    function: str, scale: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if not isinstance(scale, Tensor):
        if not is_number(scale):
            fail(TypeError, function, "scale", "a number or a tensor", f"{type(scale).__name__}")
        if device.type == "cpu" and _may_keep_tensors():
            return _constant(float(scale), dtype)
        if torch.compiler.is_compiling():  # a number of the graph's, which may be another next time
            return torch.ones(1, dtype=dtype, device=device) * scale
        return torch.full((1,), float(scale), dtype=dtype, device=device)
    check_float_tensor(function, "scale", scale)
    if scale.device != device:
        fail(ValueError, function, "scale", f"on {device}, like query", scale.device)
    return scale if scale.dtype == dtype else scale.to(dtype)


def mask_labels(
    function: str,
    labels: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Labels as int64 with -100 where ``lengths`` or ``mask`` leave a support out."""
    labels = labels.long()
    if lengths is None and mask is None:
        return labels
    supports = labels.shape[-1]
    if lengths is not None:
        if mask is not None:
            fail(ValueError, function, "mask", "None when lengths is given", "both")
        check_int_tensor(function, "lengths", lengths, device=device)
        lengths = lengths.long()
        if not is_tracing(lengths) and device.type == "cpu" and lengths.numel():
            low, high = (int(v) for v in torch.aminmax(lengths))
            if low < 0 or high > supports:
                fail(ValueError, function, "lengths", f"in [0, S={supports}]", f"[{low}, {high}]")
        mask = torch.arange(supports, device=device) < lengths.unsqueeze(-1)
        _check_broadcast(function, "lengths", lengths.shape, labels.shape[:-1])
    assert mask is not None
    if not isinstance(mask, Tensor):
        fail(TypeError, function, "mask", "a bool tensor", describe(mask))
    if mask.layout != torch.strided:
        fail(TypeError, function, "mask", "a dense (strided) tensor", mask.layout)
    if mask.dtype != torch.bool or mask.device != device:
        fail(TypeError, function, "mask", f"bool on {device}", f"{mask.dtype} on {mask.device}")
    if mask.dim() < 1 or mask.shape[-1] != supports:
        fail(ValueError, function, "mask", f"of shape [..., S={supports}]", f"{list(mask.shape)}")
    _check_broadcast(function, "mask", mask.shape, labels.shape)
    return torch.where(mask, labels, IGNORE_INDEX)


def _check_broadcast(function: str, argument: str, shape: torch.Size, to: torch.Size) -> None:
    if shape == to:
        return
    try:
        torch.broadcast_shapes(shape, to)
    except RuntimeError:
        wanted = f"of a shape that broadcasts with {list(to)} of labels"
        fail(ValueError, function, argument, wanted, f"shape {list(shape)}")
