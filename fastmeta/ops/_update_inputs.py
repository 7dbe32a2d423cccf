"""What the updates take: structures of parameters, checks of each entry, and their vmap rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmeta.errors import check_float_tensor, describe, fail, is_number
from fastmeta.ops._define import acc_dtype

__all__ = ["Entries", "Groups", "Params", "check_number", "lead", "ranks_of", "unlead_rates"]

Params = TypeVar("Params", Tensor, Sequence[Tensor], Mapping[str, Tensor])


class Entries:
    """The entries of a structure of parameters, and of the arguments that are structured like it.

    Args:
        function: Named by errors.
        params: A tensor, a sequence or a mapping of tensors.

    Attributes:
        names: Of the entries, as an error shows them: ``[0]`` or ``['weight']``.
        params: The parameters, one an entry.
    """

    def __init__(self, function: str, params: Any) -> None:
        self.function = function
        self._like = params
        if isinstance(params, Tensor):
            self._keys: list[Any] = [0]
            self.params = [params]
        elif isinstance(params, Mapping):
            self._keys = list(params)
            self.params = list(params.values())
        elif isinstance(params, (list, tuple)):
            self._keys = list(range(len(params)))
            self.params = list(params)
        else:
            wanted = "a tensor, or a list, tuple or mapping of tensors"
            fail(TypeError, function, "params", wanted, describe(params))
        self.names = [f"[{key!r}]" for key in self._keys]

    def column(self, argument: str, values: Any) -> list[Any]:
        """The entries of an argument that must be structured like the parameters."""
        if isinstance(self._like, Tensor):
            return [values]
        if isinstance(self._like, Mapping):
            if not isinstance(values, Mapping) or set(values) != set(self._keys):
                wanted = f"a mapping with the keys {sorted(self._keys)}"
                got = f"keys {sorted(values)}" if isinstance(values, Mapping) else describe(values)
                fail(ValueError, self.function, argument, wanted, got)
            return [values[key] for key in self._keys]
        if not isinstance(values, (list, tuple)) or len(values) != len(self._keys):
            wanted = f"of {len(self._keys)} entries, like params"
            several = isinstance(values, (list, tuple))
            got = f"{len(values)} entries" if several else describe(values)
            fail(ValueError, self.function, argument, wanted, got)
        return list(values)

    def shared_column(self, argument: str, values: Any) -> list[Any]:
        """`column` of an argument that may also be one value, which then serves every entry."""
        kinds = Mapping if isinstance(self._like, Mapping) else (list, tuple)
        if isinstance(values, kinds):
            return self.column(argument, values)
        return [values] * len(self._keys)

    def state_column(self, argument: str, values: Any) -> list[Any]:
        """`column` of a state; None where there is none yet."""
        return [None] * len(self._keys) if values is None else self.column(argument, values)

    def rebuild(self, values: list[Any]) -> Any:
        """The structure of the parameters with other values."""
        if isinstance(self._like, Tensor):
            return values[0]
        if isinstance(self._like, Mapping):
            return dict(zip(self._keys, values, strict=True))
        if isinstance(self._like, list):
            return values
        return type(self._like)(*values) if hasattr(self._like, "_fields") else tuple(values)


class Groups:
    """Entries checked and sorted by dtype and device: each group is one call of an op.

    Args:
        entries: The structure.
        grads: A gradient an entry; entries with None take no part.
        lrs: A number or tensor an entry.
        states: By the name of the argument, a state an entry; None is zero.
    """

    def __init__(
        self,
        entries: Entries,
        grads: list[Any],
        lrs: list[Any],
        states: dict[str, list[Any]] | None = None,
    ) -> None:
        self._function = entries.function
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, list[Tensor]]]] = {}
        states = states or {}
        for i, (name, param, grad) in enumerate(
            zip(entries.names, entries.params, grads, strict=True)
        ):
            if grad is None:
                continue
            operands = [self._param(name, param, grad), grad]
            operands += [self._state(f"{a}{name}", s[i], grad) for a, s in states.items()]
            operands.append(self._rate(f"lr{name}", lrs[i], grad))
            self._groups.setdefault((grad.dtype, grad.device), []).append((i, operands))

    def __iter__(self) -> Any:
        """Of each group: positions of its entries; columns params, grads, states and rates."""
        for group in self._groups.values():
            yield [i for i, _ in group], [list(c) for c in zip(*(o for _, o in group), strict=True)]

    def _param(self, name: str, param: Any, grad: Any) -> Tensor:
        """The parameter, expanded to its gradient's shape."""
        function = self._function
        check_float_tensor(function, f"params{name}", param)
        check_float_tensor(function, f"grads{name}", grad)
        if grad.dtype != param.dtype:
            wanted = f"{param.dtype}, like its parameter"
            fail(TypeError, function, f"grads{name}", wanted, grad.dtype)
        if grad.device != param.device:
            wanted = f"on {param.device}, like its parameter"
            fail(ValueError, function, f"grads{name}", wanted, grad.device)
        if param.shape == grad.shape:
            return param  # type: ignore[no-any-return]
        if not _broadcasts(param.shape, grad.shape):
            wanted = f"of a shape that {list(param.shape)} (its parameter) broadcasts to"
            fail(ValueError, function, f"grads{name}", wanted, f"shape {list(grad.shape)}")
        return param.expand(grad.shape)  # type: ignore[no-any-return]

    def _rate(self, argument: str, rate: Any, grad: Tensor) -> Tensor:
        function = self._function
        if isinstance(rate, Tensor):
            self._check_like(argument, rate, grad)
            return rate.to(acc_dtype(grad.dtype))
        if not is_number(rate):
            fail(TypeError, function, argument, "a number or a tensor", describe(rate))
        return self._constant(float(rate), grad)

    def _state(self, argument: str, state: Any, grad: Tensor) -> Tensor:
        if state is None:
            return self._constant(0.0, grad).expand(grad.shape)
        self._check_like(argument, state, grad)
        if state.dtype != acc_dtype(grad.dtype):
            wanted = f"{acc_dtype(grad.dtype)}, as the state of {grad.dtype} parameters is"
            fail(TypeError, self._function, argument, wanted, state.dtype)
        return state if state.shape == grad.shape else state.expand(grad.shape)  # type: ignore[no-any-return]

    def _check_like(self, argument: str, value: Any, grad: Tensor) -> None:
        check_float_tensor(self._function, argument, value)
        if value.device != grad.device:
            wanted = f"on {grad.device}, like grads"
            fail(ValueError, self._function, argument, wanted, value.device)
        if value.shape != grad.shape and not _broadcasts(value.shape, grad.shape):
            wanted = f"of a shape that broadcasts to {list(grad.shape)} (its gradient)"
            fail(ValueError, self._function, argument, wanted, f"shape {list(value.shape)}")

    def _constant(self, value: float, grad: Tensor) -> Tensor:
        """One tensor of a number for all entries that use it."""
        if torch.compiler.is_compiling():  # a number of the graph's, which may be another next time
            return torch.ones((), dtype=acc_dtype(grad.dtype), device=grad.device) * value
        key = (value, acc_dtype(grad.dtype), grad.device)
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=key[1], device=key[2])
        return self._constants[key]


def check_number(
    function: str, argument: str, value: Any, least: float, below: float | None = None
) -> float:
    """A number of at least ``least``, and less than ``below``."""
    if not is_number(value):
        fail(TypeError, function, argument, "a number", describe(value))
    if not (value >= least and value < (float("inf") if below is None else below)):
        limit = "finite" if below is None else f"below {below:g}"
        fail(ValueError, function, argument, f"at least {least:g} and {limit}", value)
    return float(value)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def lead(
    batch: int, columns: Sequence[list[Tensor]], dims: Sequence[Any], ranks: list[int], expand: bool
) -> list[list[Tensor]]:
    """The mapped dim in front of every operand's logical dims: [B or 1, 1, ..., *shape].

    An update is elementwise, so under vmap the mapped dim is one more leading dim. The last column
    is the rates', which broadcast by themselves and are expanded only where ``expand``.
    """

    def moved(tensor: Tensor, dim: int | None, rank: int, full: bool) -> Tensor:
        tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
        ones = (1,) * (rank - (tensor.dim() - 1))
        tensor = tensor.reshape(tensor.shape[0], *ones, *tensor.shape[1:])
        return tensor.expand(batch, *tensor.shape[1:]) if full else tensor

    last = len(columns) - 1
    return [
        [
            moved(tensor, dim, rank, expand or c < last)
            for tensor, dim, rank in zip(column, dims[c], ranks, strict=True)
        ]
        for c, column in enumerate(columns)
    ]


def unlead_rates(
    batch: int, grad_lrs: list[Tensor], lrs: list[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """The gradients of rates that `lead` expanded, in the rates' own shapes behind the batch."""
    return [
        g.reshape(batch, *(t.shape if d is None else t.movedim(d, 0).shape[1:]))
        for g, t, d in zip(grad_lrs, lrs, dims, strict=True)
    ]


def ranks_of(column: list[Tensor], dims: Sequence[int | None]) -> list[int]:
    """Dims of each tensor without the mapped one."""
    return [t.dim() - (d is not None) for t, d in zip(column, dims, strict=True)]
